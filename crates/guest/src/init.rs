//! Init's course, from the first step to the last.

use crate::job::{Heard, Job};
use crate::machine::Network;
use crate::streams::{PUMPS, Streams};
use crate::{boot, host, machine, mounts};
use kso_runner::program::{NotStarted, Program, ProgramConfig};
use kso_runner::{GuestConfig, GuestRunner, GuestStreams, guest};
use kso_sys::process::Signals;
use kso_sys::tun::Tun;
use kso_wire::guest::ports;
use kso_wire::job::{Bytes, Ended, Start, ToInit, ToLauncher};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, kill_process_group, wait};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// So many events are taken at a time.
const EVENTS: usize = 16;
/// What an event is about; smaller numbers are pumps.
const SIGNALS: u64 = PUMPS;
const JOB: u64 = PUMPS + 1;
const STARTED: u64 = PUMPS + 2;

/// Runs the guest to its end. An error is one that cannot be told to the launcher.
pub fn run(logs: fn(&str)) -> Result<(), String> {
    boot::boot()?;
    if let Some(machine) = boot::provider()? {
        logs("warn");
        return crate::provider::run(&machine);
    }
    let stream =
        host::connect_first(ports::JOB).map_err(|error| format!("cannot reach the launcher: {error}"))?;
    let mut job = Job::new(stream);
    let start = job.start()?;
    logs(&start.log);
    let last = match Guest::begin(&start, &job) {
        Ok(mut guest) => guest.serve(&mut job),
        Err(not_started) => Err(not_started),
    };
    match last {
        Ok(Some(ended)) => job.say(&ToLauncher::Ended(ended)),
        // The launcher went away.
        Ok(None) => return Ok(()),
        Err(NotStarted { reason, status }) => {
            tracing::debug!(reason, status, "the program was not started");
            job.say(&ToLauncher::Failed { reason, status });
        }
    }
    job.wait_for_end();
    Ok(())
}

fn failed(reason: String) -> NotStarted {
    NotStarted { reason, status: 125 }
}

fn broken(error: impl std::fmt::Display) -> NotStarted {
    failed(format!("init cannot go on: {error}"))
}

struct Guest {
    events: OwnedFd,
    signals: Signals,
    program: Program,
    pid: Pid,
    streams: Streams,
    runner: GuestRunner,
    started: bool,
    ended: Option<Ended>,
}

impl Guest {
    /// Makes the machine what it is to be, and starts the program.
    fn begin(start: &Start, job: &Job) -> Result<Self, NotStarted> {
        machine::settle(start).map_err(failed)?;
        let network = machine::network(start).map_err(failed)?;
        mounts::arrange(start).map_err(failed)?;
        let directory = PathBuf::from(word(&start.directory));
        fs::create_dir_all(&directory).map_err(|error| {
            failed(format!("cannot make the working directory {}: {error}", directory.display()))
        })?;
        let (mut streams, inner) = Streams::new(start).map_err(failed)?;
        let signals = Signals::take(&[Signal::CHILD.as_raw()]).map_err(broken)?;
        let config = ProgramConfig {
            command: start.command.iter().map(word).collect(),
            environment: start.environment.iter().map(|(name, value)| (word(name), word(value))).collect(),
            directory,
            identity: Some((start.user, start.group, start.groups.clone())),
            filter: guest::rules(GuestConfig::publishing(&start.publish, start.loopback), start.io_uring),
            open_files: start.open_files,
        };
        let mut program = Program::start(&config, &signals, || inner.take())?;
        drop(inner);
        let runner = runner(start, network, program.notifier.take()).map_err(broken)?;
        let pid =
            i32::try_from(program.child.pid).ok().and_then(Pid::from_raw).ok_or_else(|| broken("no pid"))?;
        let events = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(broken)?;
        let watch = |descriptor: BorrowedFd<'_>, data| {
            epoll::add(&events, descriptor, EventData::new_u64(data), EventFlags::IN).map_err(broken)
        };
        watch(signals.as_fd(), SIGNALS)?;
        watch(job.as_fd(), JOB)?;
        watch(program.started_fd(), STARTED)?;
        streams.run(&events, None).map_err(broken)?;
        program.go().map_err(broken)?;
        Ok(Self { events, signals, program, pid, streams, runner, started: false, ended: None })
    }

    /// Serves until the program has ended and its output is on its way. `None`: the launcher is gone.
    fn serve(&mut self, job: &mut Job) -> Result<Option<Ended>, NotStarted> {
        loop {
            if !self.runner.wait(self.events.as_fd(), None).map_err(broken)? {
                continue;
            }
            if !self.serve_events(job)? {
                return Ok(None);
            }
            if let Some(ended) = self.ended
                && self.streams.is_drained()
            {
                return Ok(Some(ended));
            }
        }
    }

    /// Serves what is init's own. False: the launcher is gone.
    fn serve_events(&mut self, job: &mut Job) -> Result<bool, NotStarted> {
        let mut events = Vec::with_capacity(EVENTS);
        let zero = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        match epoll::wait(&self.events, rustix::buffer::spare_capacity(&mut events), Some(&zero)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(broken(error)),
        }
        for event in &events {
            match event.data.u64() {
                SIGNALS => self.reap(job)?,
                JOB => {
                    if !self.obey(job) {
                        return Ok(false);
                    }
                }
                STARTED => self.has_started(job)?,
                number => self.streams.run(&self.events, Some(number)).map_err(broken)?,
            }
        }
        Ok(true)
    }

    fn has_started(&mut self, job: &Job) -> Result<(), NotStarted> {
        if self.started {
            return Ok(());
        }
        epoll::delete(&self.events, self.program.started_fd()).map_err(broken)?;
        self.program.started()?;
        self.started = true;
        job.say(&ToLauncher::Started);
        Ok(())
    }

    /// Takes the ends of children: the program's, and those of others that have lost their parents.
    fn reap(&mut self, job: &Job) -> Result<(), NotStarted> {
        while self.signals.next().is_some() {}
        // A program that ends at once still has started, and one that could not is told so: before its end is taken.
        self.has_started(job)?;
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            if pid != self.pid {
                continue;
            }
            let number = |number: Option<i32>| number.and_then(|number| u8::try_from(number).ok());
            let killed = number(status.terminating_signal()).map(Ended::Killed);
            let exited = number(status.exit_status()).map(Ended::Exited);
            self.ended = killed.or(exited).or(Some(Ended::Exited(u8::MAX)));
            self.streams.drain(&self.events).map_err(broken)?;
        }
        Ok(())
    }

    /// Does what the launcher says. False: it is gone.
    fn obey(&mut self, job: &mut Job) -> bool {
        loop {
            match job.hear() {
                Heard::Message(ToInit::Signal { number, group }) => self.signal(number, group),
                Heard::Message(ToInit::Resize(size)) => self.streams.resize(size),
                Heard::Message(ToInit::Start(_)) => {}
                Heard::Nothing => return true,
                Heard::Gone => return false,
            }
        }
    }

    fn signal(&self, number: u8, group: bool) {
        let Some(signal) = Signal::from_named_raw(number.into()) else { return };
        if self.ended.is_some() {
            return;
        }
        let sent = if group { kill_process_group(self.pid, signal) } else { kill_process(self.pid, signal) };
        if let Err(error) = sent {
            tracing::debug!(%error, number, "the program did not get a signal");
        }
    }
}

/// The runner, welcome at the broker.
fn runner(start: &Start, network: Network, notifier: Option<OwnedFd>) -> io::Result<GuestRunner> {
    let streams = GuestStreams {
        notifier: notifier.ok_or(io::ErrorKind::NotFound)?,
        control: host::connect(ports::CONTROL)?,
        packets: Some((Tun::from_fd(network.tun)?, host::connect(ports::PACKETS)?)),
    };
    let config = GuestConfig {
        tun: start.tun,
        loopback: start.loopback,
        publish: start.publish.clone(),
        inside: start.inside.clone(),
        defaults: network.defaults,
        hybrid: false,
    };
    GuestRunner::new(streams, config)
}

fn word(bytes: &Bytes) -> OsString {
    OsString::from_vec(bytes.clone())
}
