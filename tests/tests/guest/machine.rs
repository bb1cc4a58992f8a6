//! A guest with an init of its own.

use kso_tests::{World, c_program, program};
use kso_vm::{Choice, DeviceSocket, FileSystem, MachineConfig, MachineKind, kernels};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

/// A machine that runs, and what it wrote to its console.
pub struct Machine {
    machine: kso_vm::Machine,
    text: Vec<u8>,
}

impl Machine {
    /// Boots Debian's kernel with the init of `tests/programs`, which runs `script`.
    pub fn start(world: &World, vsock: &str, root: &str, script: &str) -> Self {
        let kernel = kernels::find(&Choice::Release("6.1".into())).expect("kso kernels fetch 6.1");
        let accelerator = kso_vm::accelerator(&kernel);
        let mut config =
            MachineConfig::new(&kernel, MachineKind::Microvm, accelerator, &[]).expect("an initramfs");
        // The modules of kso's own; what comes later in an initramfs takes the place of what was before.
        let mut archive = fs::read(&config.initramfs).expect("an initramfs");
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend(archive_of("init", &fs::read(init()).expect("an init")));
        config.initramfs = world.file("initramfs", archive).into();
        config.vsock = Some(DeviceSocket::Path(vsock.into()));
        let socket = DeviceSocket::Path(root.into());
        config.file_systems.push(FileSystem { tag: "root".into(), socket, queues: 1 });
        config.append.push(format!("script={script}"));
        Self { machine: kso_vm::Machine::start(&config).expect("QEMU"), text: Vec::new() }
    }

    /// Waits until it wrote `text`.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str, limit: Duration) {
        let until = Instant::now() + limit;
        while !self.text().contains(text) {
            assert!(Instant::now() < until, "waited {limit:?} for {text:?} in vain: {}", self.text());
            let mut polled = [
                PollFd::from_borrowed_fd(self.machine.console_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.machine.ended_fd(), PollFlags::IN),
            ];
            let _ = poll(&mut polled, Some(&Timespec { tv_sec: 1, tv_nsec: 0 }));
            let ended = !polled[1].revents().is_empty();
            let own = &mut self.text;
            self.machine.serve_console(&mut |bytes| own.extend_from_slice(bytes));
            let there = self.text().contains(text);
            assert!(there || !ended, "it ended without {text:?}: {}", self.machine.last_words());
        }
    }

    /// All that it wrote.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.text).replace('\r', "")
    }
}

/// The init, static: there is nothing else in its initramfs.
fn init() -> String {
    // Built natively first: that tells of its errors.
    let output = format!("{}-static", c_program("guest_init"));
    let fresh = format!("{output}.{:?}", std::thread::current().id());
    let built = Command::new("cc").args(["-static", "-O1", "-o", &fresh, &program("guest_init.c")]).status();
    assert!(built.is_ok_and(|status| status.success()), "cc -static");
    fs::rename(&fresh, &output).expect("the binary can be put in place");
    output
}

/// An archive ("newc") with one file.
fn archive_of(name: &str, contents: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (inode, name, mode, contents) in [(1, name, 0o100_755, contents), (2, "TRAILER!!!", 0, &[][..])] {
        bytes.extend_from_slice(b"070701");
        let fields = [inode, mode, 0, 0, 1, 0, contents.len(), 0, 0, 0, 0, name.len() + 1, 0];
        fields.iter().for_each(|field| bytes.extend_from_slice(format!("{field:08x}").as_bytes()));
        bytes.extend_from_slice(name.as_bytes());
        bytes.push(0);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend_from_slice(contents);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}
