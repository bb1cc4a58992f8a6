//! The one loop of `kso run`.
//!
//! The notifier is polled directly, so that the kernel can hand a call over on the caller's own core
//! (`SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP`), and so is the gateway, because each level of epoll costs a packet
//! time. What is rare comes through one epoll instance.

use super::session::Session;
use super::{RunArgs, publishing};
use crate::commands::program::{raise_open_files, resolv_conf};
use crate::commands::volumes::{for_sandbox, name};
use anyhow::{Context, Result, bail};
use kso_broker::BrokerConfig;
use kso_files::mount::Served;
use kso_gateway::{Gateway, GatewayConfig};
use kso_runner::{Interceptor, InterceptorConfig, Sandbox, SandboxConfig, interceptor};
use kso_sys::options::Defaults;
use kso_sys::process::{self, Signals};
use kso_wire::{Family, Hello, RequestId};
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Signals that are passed on to the program.
const FORWARDED: &[i32] = &[
    rustix::process::Signal::HUP.as_raw(),
    rustix::process::Signal::INT.as_raw(),
    rustix::process::Signal::QUIT.as_raw(),
    rustix::process::Signal::TERM.as_raw(),
    rustix::process::Signal::USR1.as_raw(),
    rustix::process::Signal::USR2.as_raw(),
];

/// Directories with sockets by which a program could have names resolved, or sessions opened, past its own
/// session.
const HIDDEN: &[&str] = &["/run/systemd/resolve", "/run/nscd", "/var/run/nscd"];

/// Threads of a directory that another kernel performs.
const FILE_THREADS: usize = 2;
/// So many events are taken at a time.
const EVENTS: usize = 16;

/// What an event is about.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
enum Source {
    Signals,
    Ended,
    Broker,
}

impl Source {
    const ALL: [Self; 3] = [Self::Signals, Self::Ended, Self::Broker];

    fn of(data: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|source| *source as u64 == data)
    }
}

/// Runs the program to its end and tells its status.
pub fn supervise(args: &RunArgs, hello: Hello) -> Result<i32> {
    let open_files = process::open_files_limit().context("cannot read the limit of open files")?;
    let program = &args.program;
    let publishing = publishing(&hello.publish);
    let mut hidden: Vec<PathBuf> = HIDDEN.iter().map(PathBuf::from).collect();
    hidden.push(kso_broker::runtime_directory());
    let volumes = program.volumes()?;
    let directory = match program.directory()? {
        // Where it is now may be another directory once all is mounted.
        None if !volumes.is_empty() => std::env::current_dir().ok(),
        directory => directory,
    };
    let config = SandboxConfig {
        command: program.command.clone(),
        directory,
        environment: program.variables()?,
        tun: hello.tun,
        resolv_conf: resolv_conf(&hello.tun),
        hidden,
        volumes: for_sandbox(&volumes)?,
        filter: interceptor::rules(publishing, program.io_uring),
        open_files,
    };
    // The session comes first: a wrong rule, or a port that is taken, is told before anything starts.
    let mut session = match &program.broker {
        Some(path) => Session::remote(path, hello.clone())?,
        None => {
            let config =
                BrokerConfig { kernels_later: true, ..program.broker_config(&args.kernel, &volumes)? };
            Session::embedded(config, &hello)?
        }
    };
    let signals = Signals::take(FORWARDED).context("cannot take signals")?;
    let mut sandbox = Sandbox::start(&config, &signals)?;
    if program.broker.is_none() {
        check_locks(args.unlocked)?;
    }
    session.started(sandbox.pid());
    session.start_kernels()?;
    raise_open_files(open_files);
    let elsewhere = volumes.iter().filter(|volume| volume.is_elsewhere());
    let files = elsewhere.zip(std::mem::take(&mut sandbox.mounts)).map(|(volume, device)| {
        let route = session.files(volume)?;
        kso_files::mount::serve_relayed(route, &device, FILE_THREADS).with_context(|| name(volume))
    });
    let files = files.collect::<Result<Vec<_>>>()?;

    let notifier = sandbox.notifier.take().context("the sandbox has no notifier")?;
    let tun = sandbox.tun.take().context("the sandbox has no TUN")?;
    let [v4, v6] = &sandbox.fresh;
    let netns = kso_sys::netns_cookie(v4.as_fd()).context("kso run needs Linux 5.14 or newer")?;
    let defaults = [Defaults::of(v4.as_fd(), Family::V4), Defaults::of(v6.as_fd(), Family::V6)];
    let config = InterceptorConfig { tun: hello.tun, loopback: hello.loopback, publishing, netns, defaults };
    let interceptor = Interceptor::new(notifier, config).context("cannot supervise")?;
    let config = GatewayConfig { addresses: hello.tun, publish: hello.publish, ..GatewayConfig::default() };
    let mut gateway = Gateway::new(tun, config)?;
    gateway.start(session.link())?;

    let supervisor = Supervisor {
        _files: files,
        events: epoll::create(epoll::CreateFlags::CLOEXEC)?,
        session,
        interceptor,
        gateway,
        signals,
        sandbox,
    };
    supervisor.run()
}

/// A program gets the host's sockets only locked to what was approved (`kso_sys::lock`).
fn check_locks(unlocked: bool) -> Result<()> {
    let Err(error) = kso_sys::lock::probe() else { return Ok(()) };
    if !unlocked {
        bail!(
            "this kernel refuses socket filters (SO_ATTACH_FILTER) to this user: {error}.\nBy them kso keeps a \
             hostile program from using a socket for anything but what was allowed.\nRun kso as root, or with --unlocked if the program \
             is one that you trust not to race its supervisor."
        );
    }
    kso_sys::lock::permit_unlocked();
    Ok(())
}

struct Supervisor {
    /// Dropped first: the session has the kernels that perform them.
    _files: Vec<Served>,
    events: OwnedFd,
    session: Session,
    interceptor: Interceptor,
    gateway: Gateway,
    signals: Signals,
    sandbox: Sandbox,
}

impl Supervisor {
    fn run(mut self) -> Result<i32> {
        self.watch(&self.signals, Source::Signals)?;
        self.watch(self.sandbox.ended_fd(), Source::Ended)?;
        if let Some(descriptor) = self.session.poll_fd() {
            self.watch(descriptor, Source::Broker)?;
        }
        self.sandbox.go()?;
        let mut supervising = true;
        loop {
            let timeout = self.timeout();
            let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
            let [calls, packets, others] = self.wait(supervising, timeout.as_ref())?;
            if calls.contains(PollFlags::IN) {
                self.interceptor.serve(self.session.link());
            } else if calls.intersects(PollFlags::HUP | PollFlags::ERR) {
                supervising = false;
            }
            if packets.contains(PollFlags::IN) {
                self.gateway.run_ready(Instant::now(), self.session.link());
            }
            if others.contains(PollFlags::IN)
                && let Some(status) = self.serve_others()?
            {
                return Ok(status);
            }
            self.deliver_answers();
            self.expire();
        }
    }

    /// Waits for calls (while there is anybody to make them), packets and the rest.
    fn wait(&self, supervising: bool, timeout: Option<&Timespec>) -> Result<[PollFlags; 3]> {
        let calls = if supervising { self.interceptor.poll_fd() } else { self.events.as_fd() };
        let mut polled = [calls, self.gateway.poll_fd(), self.events.as_fd()]
            .map(|descriptor| PollFd::from_borrowed_fd(descriptor, PollFlags::IN));
        match poll(&mut polled, timeout) {
            Ok(_) => {
                let [calls, packets, others] = polled.map(|polled| polled.revents());
                Ok([if supervising { calls } else { PollFlags::empty() }, packets, others])
            }
            Err(rustix::io::Errno::INTR) => Ok([PollFlags::empty(); 3]),
            Err(error) => Err(error).context("cannot wait for events"),
        }
    }

    fn watch(&self, descriptor: impl AsFd, source: Source) -> Result<()> {
        let data = epoll::EventData::new_u64(source as u64);
        epoll::add(&self.events, descriptor.as_fd(), data, epoll::EventFlags::IN).context("cannot watch")
    }

    /// Serves everything but intercepted calls. The program's status, if it has ended.
    fn serve_others(&mut self) -> Result<Option<i32>> {
        let mut events = Vec::with_capacity(EVENTS);
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        epoll::wait(&self.events, rustix::buffer::spare_capacity(&mut events), Some(&zero))
            .or_else(|error| if error == rustix::io::Errno::INTR { Ok(0) } else { Err(error) })?;
        for event in events {
            match Source::of(event.data.u64()) {
                Some(Source::Signals) => self.forward_signals(),
                Some(Source::Ended) => return Ok(Some(self.sandbox.wait()?)),
                Some(Source::Broker) => self.session.run_ready(),
                None => {}
            }
        }
        Ok(None)
    }

    fn forward_signals(&self) {
        while let Some(signal) = self.signals.next() {
            // A key on the terminal reached the program already: it is in the same process group.
            if !signal.from_terminal {
                self.sandbox.signal(signal.number);
            }
        }
    }

    fn deliver_answers(&mut self) {
        while let Some((id, answer)) = self.session.link().completed() {
            self.deliver(id, answer);
        }
    }

    fn deliver(&mut self, id: RequestId, answer: kso_wire::Answer) {
        if id.is_gateway() {
            self.gateway.answered(id, answer, Instant::now(), self.session.link());
        } else {
            self.interceptor.answered(id, answer);
        }
    }

    fn timeout(&self) -> Option<Duration> {
        let next =
            [self.gateway.next_deadline(), self.session.next_deadline()].into_iter().flatten().min()?;
        Some(next.saturating_duration_since(Instant::now()))
    }

    fn expire(&mut self) {
        let now = Instant::now();
        if self.gateway.next_deadline().is_some_and(|deadline| deadline <= now) {
            self.gateway.expire(now, self.session.link());
        }
        if self.session.next_deadline().is_some_and(|deadline| deadline <= now) {
            self.session.run_ready();
        }
        if self.interceptor.next_deadline().is_some_and(|deadline| deadline <= now) {
            self.interceptor.expire();
        }
    }
}
