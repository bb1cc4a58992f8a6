//! `kso guest`: the runner for a guest that is somebody else's, under its own init.
//!
//! ```text
//!   control stream --> which way its streams go --> TUN --> program, under the filter, with a resolv.conf of its own
//!                                                              |
//!   loop: runner, signals, children --> the program's end --> what it left behind is ended, too
//! ```
//!
//! The broker outside knows the guest by its device: what it may reach and what is published of it stands in the broker's
//! configuration. Nothing of the guest is changed for good: the TUN goes with this process, and the program's
//! resolv.conf is seen by it alone.

use crate::{host, machine};
use kso_runner::program::{NotStarted, Program, ProgramConfig};
use kso_runner::{GuestConfig, GuestRunner, GuestStreams, guest, sandbox};
use kso_sys::process::{self, Signals};
use kso_sys::tun::{self, Tun};
use kso_wire::guest::ports;
use kso_wire::{LoopbackMode, Protocol, Publication, TunAddresses};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, wait};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// So many events are taken at a time.
const EVENTS: usize = 16;
/// What an event is about.
const SIGNALS: u64 = 0;
const STARTED: u64 = 1;
/// Signals that are passed on to the program; and the end of a child.
const TAKEN: &[i32] = &[
    Signal::HUP.as_raw(),
    Signal::INT.as_raw(),
    Signal::QUIT.as_raw(),
    Signal::TERM.as_raw(),
    Signal::USR1.as_raw(),
    Signal::USR2.as_raw(),
    Signal::CHILD.as_raw(),
];
/// An abstract unix socket that whoever runs here holds.
const ALONE: &[u8] = b"kso-guest";
/// The broker prepares for a runner that comes after another within this time.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often it is asked.
const PAUSE: Duration = Duration::from_millis(20);

/// What to run.
#[derive(Debug)]
pub struct ResidentConfig {
    /// Program and arguments.
    pub command: Vec<OsString>,
    /// Its whole environment.
    pub environment: Vec<(OsString, OsString)>,
    /// Its working directory.
    pub directory: PathBuf,
    /// Its user, group and further groups; `None`: ours.
    pub identity: Option<(u32, u32, Vec<u32>)>,
    /// io_uring is permitted.
    pub io_uring: bool,
    /// Datagrams, echo and names go by a TUN; the text of resolv.conf that leads there.
    pub tun: Option<String>,
}

fn failed(reason: impl Into<String>) -> NotStarted {
    NotStarted { reason: reason.into(), status: 125 }
}

fn broken(error: impl std::fmt::Display) -> NotStarted {
    failed(format!("kso guest cannot go on: {error}"))
}

/// Runs the program to its end: its exit status, as a shell tells it. This process must have one thread.
///
/// # Errors
/// There is no broker, the kernel lacks something, or the program cannot be started.
pub fn run(config: &ResidentConfig) -> Result<i32, NotStarted> {
    if !rustix::process::geteuid().is_root() {
        return Err(failed(
            "kso guest needs root in its guest: for the TUN, for mounts of the program's own, and to serve processes of other \
             users. Run the program as somebody else with --user.",
        ));
    }
    let _alone = alone()?;
    let control = host::connect_first(ports::CONTROL).map_err(|error| failed(no_broker(&error)))?;
    let hybrid = is_hybrid()?;
    tracing::info!(hybrid, "the broker is there");
    let signals = Signals::take(TAKEN).map_err(broken)?;
    process::adopt_orphans().map_err(broken)?;
    let tun = match &config.tun {
        Some(_) => make_tun(hybrid)?,
        None if hybrid => return Err(failed(NEEDS_TUN)),
        None => None,
    };
    let packets = match tun {
        Some(tun) => Some((Tun::from_fd(tun).map_err(broken)?, packets_stream()?)),
        None => None,
    };
    let names = config.tun.as_deref().filter(|_| packets.is_some());
    let open_files = process::open_files_limit().map_err(broken)?;
    let publish = published();
    let program_config = ProgramConfig {
        command: config.command.clone(),
        environment: config.environment.clone(),
        directory: config.directory.clone(),
        identity: config.identity.clone(),
        filter: guest::rules(GuestConfig::publishing(&publish, LoopbackMode::Private), config.io_uring),
        open_files,
    };
    let mut program = Program::start(&program_config, &signals, || match names {
        Some(text) => sandbox::own_resolv_conf(text),
        None => Ok(()),
    })?;
    // Descriptors of connections pass through here: as many as may be.
    let (_, hard) = open_files;
    let _ = process::set_open_files_limit(hard, hard);
    let notifier = program.notifier.take().ok_or_else(|| broken("the filter has no other end"))?;
    let config = GuestConfig {
        tun: TunAddresses::standard(),
        loopback: LoopbackMode::Private,
        publish,
        inside: Vec::new(),
        defaults: machine::defaults().map_err(failed)?,
        hybrid,
    };
    let runner = GuestRunner::new(GuestStreams { notifier, control, packets }, config)
        .map_err(|error| failed(format!("the broker does not take this guest: {error}")))?;
    let pid =
        i32::try_from(program.child.pid).ok().and_then(Pid::from_raw).ok_or_else(|| broken("no pid"))?;
    let status = Supervisor::new(signals, program, pid, runner)?.serve();
    end_children();
    status
}

const NEEDS_TUN: &str = "this VMM's vsock device carries CID 2 only (Firecracker's): the guest's connections go by a TUN, and cannot with --no-tun or \
    without /dev/net/tun (modprobe tun)";

/// Which ports are published the broker knows: it is asked about every listener.
fn published() -> Vec<Publication> {
    vec![Publication { address: None, outer_port: 0, inner_port: 0, protocol: Protocol::Tcp }]
}

/// The broker speaks with one runner of a guest. Held until this process ends.
fn alone() -> Result<OwnedFd, NotStarted> {
    let socket =
        socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).map_err(broken)?;
    let address = SocketAddrUnix::new_abstract_name(ALONE).map_err(broken)?;
    match rustix::net::bind(&socket, &address) {
        Ok(()) => Ok(socket),
        Err(rustix::io::Errno::ADDRINUSE) => Err(failed(
            "another kso guest runs in this guest, and there can be one: have it run a program that starts both, such as sh",
        )),
        Err(error) => Err(broken(error)),
    }
}

fn no_broker(error: &io::Error) -> String {
    use kso_wire::Errno;
    let advice = match kso_sys::errno::of(error) {
        Errno::EAFNOSUPPORT => "this kernel has no vsock: modprobe vmw_vsock_virtio_transport",
        _ if error.raw_os_error() == Some(host::NO_DEVICE) => {
            "this guest has no vsock device, or its driver is not loaded: modprobe vmw_vsock_virtio_transport; the VMM needs a \
             vhost-user vsock device on the socket that `vsock =` names in kso.toml"
        }
        Errno::ECONNRESET => {
            "nobody serves this guest's vsock device: is it one of kso broker's (kso.toml, --vsock-socket)? Or another runner is \
             connected already"
        }
        Errno::ETIMEDOUT => "the vsock device does not answer: is kso broker running?",
        _ => "see docs/vmm.md",
    };
    format!("cannot reach the broker by vsock: {error}\n{advice}")
}

/// Whether the VMM carries CID 2 only. Then the broker takes connections to the port for such guests' streams, and no others.
fn is_hybrid() -> Result<bool, NotStarted> {
    match host::connect(ports::STREAMS) {
        Ok(_) => Ok(true),
        Err(error) if kso_sys::errno::of(&error) == kso_wire::Errno::ECONNRESET => Ok(false),
        Err(error) => Err(failed(format!("the vsock device does not do as it should: {error}"))),
    }
}

/// The stream of packets. One of a runner before us may not be closed yet.
fn packets_stream() -> Result<OwnedFd, NotStarted> {
    let until = Instant::now() + PATIENCE;
    loop {
        match host::connect(ports::PACKETS) {
            Ok(stream) => return Ok(stream),
            Err(_) if Instant::now() < until => std::thread::sleep(PAUSE),
            Err(error) => return Err(failed(format!("the broker does not carry packets: {error}"))),
        }
    }
}

/// The TUN; `None` where the kernel has none.
fn make_tun(needed: bool) -> Result<Option<OwnedFd>, NotStarted> {
    use io::ErrorKind::NotFound;
    let made = tun::create(machine::TUN).and_then(|tun| {
        // The namespace lives on when this process ends.
        tun::temporary(tun.as_fd())?;
        tun::configure(machine::TUN, &TunAddresses::standard(), machine::MTU)?;
        Ok(tun)
    });
    match made {
        Ok(tun) => Ok(Some(tun)),
        Err(error) if error.kind() == NotFound && needed => Err(failed(NEEDS_TUN)),
        Err(error) if error.kind() == NotFound => {
            tracing::warn!(
                "there is no /dev/net/tun (modprobe tun): no datagrams, ping and names through kso"
            );
            Ok(None)
        }
        Err(error) => Err(failed(format!("cannot make the TUN {}: {error}", machine::TUN))),
    }
}

struct Supervisor {
    events: OwnedFd,
    signals: Signals,
    program: Program,
    pid: Pid,
    runner: GuestRunner,
    started: bool,
    ended: Option<i32>,
}

impl Supervisor {
    fn new(signals: Signals, program: Program, pid: Pid, runner: GuestRunner) -> Result<Self, NotStarted> {
        let events = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(broken)?;
        epoll::add(&events, signals.as_fd(), EventData::new_u64(SIGNALS), EventFlags::IN).map_err(broken)?;
        epoll::add(&events, program.started_fd(), EventData::new_u64(STARTED), EventFlags::IN)
            .map_err(broken)?;
        program.go().map_err(broken)?;
        Ok(Self { events, signals, program, pid, runner, started: false, ended: None })
    }

    fn serve(mut self) -> Result<i32, NotStarted> {
        loop {
            if let Some(status) = self.ended {
                return Ok(status);
            }
            if self.runner.wait(self.events.as_fd(), None).map_err(broken)? {
                self.serve_events()?;
            }
        }
    }

    fn serve_events(&mut self) -> Result<(), NotStarted> {
        let mut events = Vec::with_capacity(EVENTS);
        let zero = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        match epoll::wait(&self.events, rustix::buffer::spare_capacity(&mut events), Some(&zero)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(broken(error)),
        }
        for event in &events {
            match event.data.u64() {
                SIGNALS => self.take_signals()?,
                _ => self.has_started()?,
            }
        }
        Ok(())
    }

    fn has_started(&mut self) -> Result<(), NotStarted> {
        if self.started {
            return Ok(());
        }
        epoll::delete(&self.events, self.program.started_fd()).map_err(broken)?;
        self.program.started()?;
        self.started = true;
        Ok(())
    }

    fn take_signals(&mut self) -> Result<(), NotStarted> {
        while let Some(signal) = self.signals.next() {
            // A key on the terminal reached the program already: it is in the same process group.
            if signal.number != Signal::CHILD.as_raw()
                && !signal.from_terminal
                && let Some(signal) = Signal::from_named_raw(signal.number)
            {
                let _ = kill_process(self.pid, signal);
            }
        }
        // A program that ends at once still has started, and one that could not is told so: before its end is taken. Until it
        // has started it is the only child.
        self.has_started()?;
        self.reap();
        Ok(())
    }

    /// Takes the ends of children: the program's, and those of others that have lost their parents.
    fn reap(&mut self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            if pid == self.pid {
                let killed = status.terminating_signal().map(|signal| 128 + signal);
                self.ended = status.exit_status().or(killed).or(Some(125));
            }
        }
    }
}

/// Ends what the program left behind: without us its calls would fail. Whoever loses a parent by that is ours, too.
fn end_children() {
    loop {
        for child in children() {
            let _ = kill_process(child, Signal::KILL);
        }
        match wait(WaitOptions::empty()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return,
        }
    }
}

/// Our children (proc_pid_stat(5)).
fn children() -> Vec<Pid> {
    let own = std::process::id();
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let numbers = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    numbers
        .filter(|pid| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            parent(&stat) == Some(own)
        })
        .filter_map(Pid::from_raw)
        .collect()
}

/// The parent in a line of `/proc/PID/stat`: the second word behind the name, which may have anything in it.
fn parent(stat: &str) -> Option<u32> {
    stat.get(stat.rfind(')')? + 1..)?.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_is_read_whatever_the_name() {
        assert_eq!(parent("12 (a) b) (c)) S 7 1 1"), Some(7));
        assert_eq!(parent("12 (a"), None);
        assert_eq!(parent(""), None);
    }

    #[test]
    fn who_cannot_reach_a_broker_is_told_what_to_do() {
        for (raw, part) in
            [(97, "modprobe"), (19, "vhost-user"), (104, "kso.toml"), (110, "running"), (1, "docs")]
        {
            let text = no_broker(&io::Error::from_raw_os_error(raw));
            assert!(text.contains(part), "{text}");
        }
    }
}
