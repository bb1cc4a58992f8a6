//! Which accelerator works here. That /dev/kvm is there says little: it may be of a hypervisor that runs no stock kernel.
//! So a guest is started once, and what came of it is remembered.

use crate::kernels::Kernel;
use crate::{Accelerator, Machine, MachineConfig, MachineKind, cache, initramfs};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs::OpenOptions;
use std::time::{Duration, Instant};

/// A guest's init tells that it runs within this time, or never.
const PATIENCE: Duration = Duration::from_secs(5);
/// The word for init, and what it tells: as in crates/guest/src/boot.rs.
const PROBE: &str = "kso.probe";
const PROBED: &[u8] = b"kso: init runs";
/// Memory of the guest, MiB.
const MEMORY: u32 = 256;

/// The processor's own virtualization where it runs this kernel, emulation otherwise.
#[must_use]
pub fn accelerator(kernel: &Kernel) -> Accelerator {
    if OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
        return Accelerator::Tcg;
    }
    let file = cache::directory().ok().map(|directory| directory.join("kvm").join(key(kernel)));
    let known = file.as_ref().and_then(|file| std::fs::read_to_string(file).ok());
    let works = match known.as_deref().map(str::trim) {
        Some("works") => true,
        Some("fails") => false,
        _ => {
            let works = works(kernel);
            if let Some(file) = file {
                // What cannot be remembered is tried again.
                let _ = cache::write(&file, if works { b"works\n" } else { b"fails\n" });
            }
            works
        }
    };
    if works { Accelerator::Kvm } else { Accelerator::Tcg }
}

/// What the outcome depends on: the host's kernel and processor, the emulator, the guest's kernel.
fn key(kernel: &Kernel) -> String {
    let host = rustix::system::uname();
    let processor = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let processor =
        processor.lines().find(|line| line.starts_with("model name")).unwrap_or_default().to_owned();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let qemu = std::env::split_paths(&path)
        .map(|directory| initramfs::identity(&directory.join(crate::qemu::default_qemu())))
        .find_map(Result::ok);
    let qemu = qemu.unwrap_or_default();
    let words = [host.release().to_bytes(), host.version().to_bytes(), processor.as_bytes(), qemu.as_bytes()];
    cache::key(words.into_iter().chain([kernel.release.as_bytes()]))
}

/// Whether a guest's init runs under KVM.
fn works(kernel: &Kernel) -> bool {
    let Ok(mut config) = MachineConfig::new(kernel, MachineKind::Microvm, Accelerator::Kvm, &[]) else {
        return false;
    };
    config.memory = MEMORY;
    config.append.push(PROBE.into());
    let Ok(mut machine) = Machine::start(&config) else { return false };
    let until = Instant::now() + PATIENCE;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let Ok(timeout) = Timespec::try_from(left) else { return false };
        let mut polled = [
            PollFd::from_borrowed_fd(machine.console_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(machine.ended_fd(), PollFlags::IN),
        ];
        let ready = poll(&mut polled, Some(&timeout));
        let ended = !polled[1].revents().is_empty();
        machine.serve_console(&mut |_| {});
        if machine.console().windows(PROBED.len()).any(|bytes| bytes == PROBED) {
            return true;
        }
        if ended || left.is_zero() || ready.is_err_and(|error| error != rustix::io::Errno::INTR) {
            tracing::info!(console = machine.last_words(), "KVM does not run this kernel");
            return false;
        }
    }
}
