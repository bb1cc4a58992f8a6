//! The one loop of `kso vm`: device, broker, gateway, the user's streams and the machine.
//!
//! The device and the gateway are polled directly, because each level of epoll costs a packet time; what is rare comes
//! through one epoll instance.

use super::VmArgs;
use super::served::Served;
use super::start;
use crate::commands::program::raise_open_files;
use anyhow::{Context, Result, bail};
use kso_devices::fs::FsMount;
use kso_sys::process;
use kso_vm::{AttachOptions, Attachment, DeviceSocket, Ends, Machine, MachineConfig, Outcome};
use kso_wire::Hello;
use kso_wire::guest::ports;
use rustix::event::{Timespec, epoll};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// So many events are taken at a time.
const EVENTS: usize = 16;
/// How long output of a guest that has ended is waited for.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// What an event is about.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
enum Source {
    Ended,
    Console,
    Broker,
    Attachment,
}

impl Source {
    const ALL: [Self; 4] = [Self::Ended, Self::Console, Self::Broker, Self::Attachment];

    fn of(data: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|source| *source as u64 == data)
    }
}

struct Supervisor {
    events: OwnedFd,
    served: Served,
    attachment: Attachment,
    machine: Machine,
    files: Vec<FsMount>,
    console: bool,
    /// Until its init runs.
    boots_until: Option<Instant>,
    boot_timeout: Duration,
}

/// Runs the program to its end and tells its status.
pub fn supervise(args: &VmArgs, hello: &Hello) -> Result<u8> {
    let open_files = process::open_files_limit().context("cannot read the limit of open files")?;
    let volumes = args.program.volumes()?;
    let directories = start::directories(args, &volumes)?;
    let start = start::start(args, hello, &directories, open_files)?;
    let kernel = kso_vm::kernels::find(&args.kernel())?;
    // The session comes first: a wrong rule, or a port that is taken, is told before anything starts.
    let mut served = match &args.program.broker {
        Some(path) => Served::broker(path)?,
        None => Served::here(args.program.broker_config(&[], &volumes)?)?,
    };
    raise_open_files(open_files);
    let options = AttachOptions { terminal: args.tty, no_input: false };
    let (attachment, ends) = Attachment::new(options, start).context("cannot attach the standard streams")?;
    let (ours, theirs) = UnixStream::pair().context("cannot make the vsock device")?;
    served.open(ours, hello, streams(ends))?;

    let mut config = MachineConfig::new(&kernel, args.kind(), kso_vm::accelerator(&kernel), &args.module)?;
    config.memory = args.memory;
    config.cpus = args.cpus;
    config.vsock = Some(DeviceSocket::Connected(theirs.into()));
    config.talkative = args.console;
    config.append.clone_from(&args.append);
    config.arguments.clone_from(&args.qemu_arg);
    let (files, systems) = super::files::serve(args, &mut served, &directories)?;
    for (mount, system) in files.iter().zip(&systems) {
        if let Some(files) = mount.files() {
            served.offer_files(&system.tag, files);
        }
    }
    config.file_systems = systems;
    let machine = Machine::start(&config)?;
    // QEMU has its own copies of the sockets: ours would keep the devices from seeing its end.
    drop(config);
    let supervisor = Supervisor {
        events: epoll::create(epoll::CreateFlags::CLOEXEC)?,
        served,
        attachment,
        machine,
        files,
        console: args.console,
        boots_until: Some(Instant::now() + args.boot_timeout()),
        boot_timeout: args.boot_timeout(),
    };
    supervisor.run()
}

/// What serves which of the guest's ports.
fn streams(ends: Ends) -> Vec<(u32, OwnedFd)> {
    let Ends { job, stdin, stdout, stderr } = ends;
    let all = [
        (ports::JOB, Some(job)),
        (ports::STDIN, Some(stdin)),
        (ports::STDOUT, stdout),
        (ports::STDERR, stderr),
    ];
    all.into_iter().filter_map(|(port, end)| Some((port, end?))).collect()
}

impl Supervisor {
    fn run(mut self) -> Result<u8> {
        let watch = |descriptor, source: Source| {
            let data = epoll::EventData::new_u64(source as u64);
            epoll::add(&self.events, descriptor, data, epoll::EventFlags::IN).context("cannot watch")
        };
        watch(self.machine.ended_fd(), Source::Ended)?;
        watch(self.machine.console_fd(), Source::Console)?;
        watch(self.served.rare_fd(), Source::Broker)?;
        watch(self.attachment.poll_fd(), Source::Attachment)?;
        let outcome = loop {
            if let Some(outcome) = self.turn()? {
                break outcome;
            }
        };
        self.end(outcome)
    }

    /// Waits for something and serves it. The outcome, if all is over.
    fn turn(&mut self) -> Result<Option<Outcome>> {
        if self.served.wait(self.events.as_fd(), self.boots_until).context("cannot wait for events")?
            && let Some(outcome) = self.serve_others()?
        {
            return Ok(Some(outcome));
        }
        self.expire()?;
        Ok(None)
    }

    fn serve_others(&mut self) -> Result<Option<Outcome>> {
        let mut events = Vec::with_capacity(EVENTS);
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        epoll::wait(&self.events, rustix::buffer::spare_capacity(&mut events), Some(&zero))
            .or_else(|error| if error == rustix::io::Errno::INTR { Ok(0) } else { Err(error) })?;
        let mut ended = false;
        for event in events {
            match Source::of(event.data.u64()) {
                Some(Source::Ended) => ended = true,
                Some(Source::Console) => self.serve_console(),
                Some(Source::Broker) if !self.served.run_rare() => {
                    return Ok(Some(Outcome::Lost("the broker that serves it is gone".into())));
                }
                Some(Source::Broker) => {}
                Some(Source::Attachment) => {
                    if let Some(outcome) =
                        self.attachment.run_ready().context("cannot serve the program's streams")?
                    {
                        return Ok(Some(outcome));
                    }
                    if self.attachment.kernel().is_some() {
                        self.boots_until = None;
                    }
                }
                None => {}
            }
        }
        if ended { self.machine_ended().map(Some) } else { Ok(None) }
    }

    fn serve_console(&mut self) {
        let shown = self.console;
        self.machine.serve_console(&mut |bytes| {
            if shown {
                let _ = std::io::stderr().write_all(bytes);
            }
        });
    }

    /// QEMU is gone: what the guest still said is on its way through the device.
    fn machine_ended(&mut self) -> Result<Outcome> {
        let until = Instant::now() + LAST_WORDS;
        while Instant::now() < until {
            self.served.run_last();
            if let Some(outcome) =
                self.attachment.run_ready().context("cannot serve the program's streams")?
            {
                return Ok(outcome);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(Outcome::Lost("its machine has ended".into()))
    }

    fn expire(&mut self) -> Result<()> {
        let now = Instant::now();
        if self.boots_until.is_some_and(|deadline| deadline <= now) {
            self.serve_console();
            self.machine.kill();
            bail!(
                "the guest's init does not run after {} s: give it more time with --boot-timeout, or look at its console with --console\n{}",
                self.boot_timeout.as_secs(),
                self.machine.last_words()
            );
        }
        Ok(())
    }

    /// Ends the machine and the session; the terminal is the user's again before anything is printed.
    fn end(self, outcome: Outcome) -> Result<u8> {
        let Self { attachment, mut machine, served, files, .. } = self;
        drop(attachment);
        machine.kill();
        let _ = machine.wait();
        machine.serve_console(&mut |_| {});
        // The session has the kernels that perform some of them.
        drop(files);
        drop(served);
        match &outcome {
            Outcome::Failed { reason, .. } => crate::output::error(&anyhow::anyhow!("{reason}")),
            Outcome::Lost(reason) => {
                let words = machine.last_words();
                let (line, words) = if words.is_empty() { ("", "") } else { ("\n", words.as_str()) };
                crate::output::error(&anyhow::anyhow!("the guest is lost: {reason}{line}{words}"));
            }
            Outcome::Exited(_) | Outcome::Interrupted(_) => {}
        }
        Ok(outcome.status())
    }
}
