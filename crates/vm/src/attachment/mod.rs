//! The user's standard streams, terminal and signals, joined to a guest's program.
//!
//! ```text
//!   [booting] --Started--> [running] --Ended--> [draining] --all output written--> Exited
//!       |  SIGINT...            |  SIGINT...: to the program |  SIGINT...
//!       +--> Interrupted        +--> Lost                    +--> Exited
//! ```
//!
//! Everything is served from one descriptor ([`Attachment::poll_fd`]) by [`Attachment::run_ready`], which never waits.
//! With a terminal the user's own is raw while the program runs, and what it was before whatever happens.

mod terminal;

use crate::job::{Job, JobEvent};
use kso_stdio::{Direction, Pump, Stream};
use kso_sys::process::Signals;
use kso_wire::job::{Ended, Start};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::Signal;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use terminal::RawTerminal;

/// Signals that are passed on to the program.
const FORWARDED: &[Signal] =
    &[Signal::HUP, Signal::INT, Signal::QUIT, Signal::TERM, Signal::USR1, Signal::USR2];
/// Signals of a terminal's job control. Those for the background are taken so that a read or a setting fails instead of
/// stopping all of kso, the guest's network included.
const TERMINAL: &[Signal] = &[Signal::WINCH, Signal::CONT, Signal::TTIN, Signal::TTOU];
/// How often a process in the background asks whether it may read its terminal, nanoseconds.
const ASK_AGAIN: i64 = 300_000_000;
/// So many events are taken at a time.
const EVENTS: usize = 8;

/// What an event is about; smaller numbers are pumps.
const JOB: u64 = 16;
const SIGNALS: u64 = 17;
const TIMER: u64 = 18;

/// What to attach.
#[derive(Clone, Copy, Debug, Default)]
pub struct AttachOptions {
    /// A terminal even if the user's streams are none; otherwise there is one if standard input and output are.
    pub terminal: bool,
    /// The program reads nothing: its input is at its end from the start.
    pub no_input: bool,
}

/// Sockets to be joined to the guest's streams to `kso_wire::guest::ports`.
#[derive(Debug)]
pub struct Ends {
    /// `JOB`.
    pub job: OwnedFd,
    /// `STDIN`.
    pub stdin: OwnedFd,
    /// `STDOUT`, unless there is a terminal.
    pub stdout: Option<OwnedFd>,
    /// `STDERR`, unless it is the terminal.
    pub stderr: Option<OwnedFd>,
}

/// How it came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The program ended; all of its output is written.
    Exited(Ended),
    /// It could not be run: why, and the exit status.
    Failed {
        /// For a person.
        reason: String,
        /// Exit status.
        status: u8,
    },
    /// The guest broke off.
    Lost(String),
    /// The user had enough before it started, by this signal.
    Interrupted(u8),
}

impl Outcome {
    /// The exit status: the program's own, 128 + N for signal N, 125 if the guest failed.
    #[must_use]
    pub fn status(&self) -> u8 {
        match self {
            Self::Exited(Ended::Exited(status)) | Self::Failed { status, .. } => *status,
            Self::Exited(Ended::Killed(signal)) | Self::Interrupted(signal) => signal.saturating_add(128),
            Self::Lost(_) => 125,
        }
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Attachment {
    events: OwnedFd,
    timer: OwnedFd,
    signals: Signals,
    job: Job,
    /// Input, output, errors.
    pumps: [Option<Pump>; 3],
    /// The user's terminal, if the program shall have one; what keeps it raw.
    terminal: Option<OwnedFd>,
    raw: Option<RawTerminal>,
    kernel: Option<String>,
    ended: Option<Ended>,
}

impl Attachment {
    /// Attaches the user's streams. Whether the program gets a terminal is decided here, and written into `start`.
    ///
    /// # Errors
    /// The command line is too long; no descriptors are left.
    pub fn new(options: AttachOptions, mut start: Start) -> io::Result<(Self, Ends)> {
        let (stdin, stdout, stderr) =
            (rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr());
        let [in_is, out_is, error_is] = [stdin, stdout, stderr].map(rustix::termios::isatty);
        let wanted = options.terminal || (in_is && out_is && !options.no_input);
        start.terminal = wanted.then(|| terminal::size(if out_is { stdout } else { stdin }));
        start.error_apart = wanted && out_is && !error_is;
        let apart = start.error_apart;

        let mut numbers: Vec<i32> = FORWARDED.iter().chain(TERMINAL).map(|signal| signal.as_raw()).collect();
        if wanted {
            numbers.push(Signal::TSTP.as_raw());
        }
        let signals = Signals::take(&numbers)?;
        let (job, job_end) = Job::new(start)?;
        let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?;
        let watch = |descriptor: BorrowedFd<'_>, data| {
            epoll::add(&events, descriptor, EventData::new_u64(data), EventFlags::IN)
        };
        watch(job.poll_fd(), JOB)?;
        watch(signals.as_fd(), SIGNALS)?;
        watch(timer.as_fd(), TIMER)?;

        let (input, stdin_end) = pair()?;
        let output = |user: BorrowedFd<'_>, source: OwnedFd, data| -> io::Result<Option<Pump>> {
            let sink = Stream::shared(user, Direction::Write)?;
            Ok(Some(Pump::new(Stream::socket(source), sink, data)))
        };
        let (mut stdout_end, mut stderr_end, mut errors) = (None, None, None);
        let shown = if wanted {
            output(stdout, input.try_clone()?, 1)?
        } else {
            let (ours, theirs) = pair()?;
            stdout_end = Some(theirs);
            output(stdout, ours, 1)?
        };
        if !wanted || apart {
            let (ours, theirs) = pair()?;
            stderr_end = Some(theirs);
            errors = output(stderr, ours, 2)?;
        }
        let mut typed = None;
        if options.no_input {
            rustix::net::shutdown(&input, rustix::net::Shutdown::Write)?;
        } else {
            typed = Some(Pump::new(Stream::shared(stdin, Direction::Read)?, Stream::socket(input), 0));
        }
        let attachment = Self {
            events,
            timer,
            signals,
            job,
            pumps: [typed, shown, errors],
            terminal: if wanted && in_is { Some(stdin.try_clone_to_owned()?) } else { None },
            raw: None,
            kernel: None,
            ended: None,
        };
        Ok((attachment, Ends { job: job_end, stdin: stdin_end, stdout: stdout_end, stderr: stderr_end }))
    }

    /// Readable when [`Self::run_ready`] has something to do.
    #[must_use]
    pub fn poll_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    /// The guest kernel's release, once its init runs: until then there should be an end to patience.
    #[must_use]
    pub fn kernel(&self) -> Option<&str> {
        self.kernel.as_deref()
    }

    /// The program runs, or did.
    #[must_use]
    pub fn has_started(&self) -> bool {
        self.job.has_started()
    }

    /// Serves what is ready. With an outcome all is over: the machine may be killed, and this be dropped, which gives
    /// the terminal back.
    ///
    /// # Errors
    /// epoll_ctl(2).
    pub fn run_ready(&mut self) -> io::Result<Option<Outcome>> {
        let mut events = Vec::with_capacity(EVENTS);
        let zero = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        epoll::wait(&self.events, rustix::buffer::spare_capacity(&mut events), Some(&zero))
            .or_else(|error| if error == rustix::io::Errno::INTR { Ok(0) } else { Err(error) })?;
        let mut due = [false; 3];
        let (mut job, mut signals) = (false, false);
        for event in &events {
            match event.data.u64() {
                JOB => job = true,
                SIGNALS => signals = true,
                TIMER => self.ask_again()?,
                number => {
                    if let Some(due) = usize::try_from(number).ok().and_then(|number| due.get_mut(number)) {
                        *due = true;
                    }
                }
            }
        }
        for (pump, due) in self.pumps.iter_mut().zip(due) {
            if let Some(pump) = pump.as_mut().filter(|_| due) {
                pump.run(&self.events)?;
            }
        }
        self.set_timer()?;
        if signals && let Some(outcome) = self.take_signals()? {
            return Ok(Some(outcome));
        }
        if job && let Some(outcome) = self.serve_job()? {
            return Ok(Some(outcome));
        }
        Ok(self.drained().map(Outcome::Exited))
    }

    /// The program's end, once its output is written too.
    fn drained(&self) -> Option<Ended> {
        let [_, output, errors] = &self.pumps;
        let written = |pump: &Option<Pump>| pump.as_ref().is_none_or(Pump::is_over);
        self.ended.filter(|_| written(output) && written(errors))
    }

    fn serve_job(&mut self) -> io::Result<Option<Outcome>> {
        for event in self.job.run_ready() {
            match event {
                JobEvent::Ready { kernel } => self.kernel = Some(kernel),
                JobEvent::Started => self.started()?,
                JobEvent::Failed { reason, status } => return Ok(Some(Outcome::Failed { reason, status })),
                JobEvent::Ended(ended) => {
                    self.ended = Some(ended);
                    if let Some(input) = &mut self.pumps[0] {
                        input.close(&self.events);
                    }
                }
                JobEvent::Lost(reason) => {
                    // What has arrived is shown.
                    for pump in self.pumps.iter_mut().skip(1).flatten() {
                        pump.run(&self.events)?;
                    }
                    return Ok(Some(Outcome::Lost(reason)));
                }
            }
        }
        Ok(None)
    }

    fn started(&mut self) -> io::Result<()> {
        self.enter_raw()?;
        for pump in self.pumps.iter_mut().flatten() {
            pump.run(&self.events)?;
        }
        self.set_timer()
    }

    /// Until the program starts the keys are the user's own, Ctrl-C in particular; and in the background the terminal is
    /// another's.
    fn enter_raw(&mut self) -> io::Result<()> {
        let Some(terminal) = self.terminal.as_ref().filter(|terminal| in_foreground(terminal)) else {
            return Ok(());
        };
        match &self.raw {
            Some(raw) => raw.again()?,
            None => self.raw = Some(RawTerminal::enter(terminal)?),
        }
        self.job.resize(terminal::size(terminal));
        Ok(())
    }

    fn take_signals(&mut self) -> io::Result<Option<Outcome>> {
        while let Some(signal) = self.signals.next() {
            match Signal::from_named_raw(signal.number) {
                Some(Signal::WINCH) => {
                    if let Some(terminal) = &self.terminal {
                        self.job.resize(terminal::size(terminal));
                    }
                }
                Some(Signal::TSTP) => self.stop()?,
                Some(Signal::CONT) => self.resume()?,
                Some(Signal::TTIN | Signal::TTOU) => {}
                _ => {
                    let number = u8::try_from(signal.number).unwrap_or_default();
                    if !self.job.has_started() {
                        return Ok(Some(Outcome::Interrupted(number)));
                    }
                    if let Some(ended) = self.ended {
                        // Whoever should read the rest does not.
                        return Ok(Some(Outcome::Exited(ended)));
                    }
                    self.job.signal(number, signal.from_terminal);
                }
            }
        }
        Ok(None)
    }

    /// As a program does that is told to stop: the terminal is given back first.
    fn stop(&mut self) -> io::Result<()> {
        if let Some(raw) = &self.raw {
            raw.restore();
        }
        rustix::process::kill_process(rustix::process::getpid(), Signal::STOP)?;
        self.resume()
    }

    fn resume(&mut self) -> io::Result<()> {
        if self.job.has_started() && self.ended.is_none() {
            self.enter_raw()?;
        }
        self.ask_again()
    }

    fn ask_again(&mut self) -> io::Result<()> {
        // Takes the timer's number, without which it stays readable.
        let _ = rustix::io::read(&self.timer, &mut [0; 8]);
        if let Some(input) = self.pumps[0].as_mut().filter(|pump| pump.is_paused()) {
            input.resume(&self.events)?;
            if !input.is_paused() {
                self.enter_raw()?;
            }
        }
        self.set_timer()
    }

    fn set_timer(&self) -> io::Result<()> {
        let paused = self.pumps[0].as_ref().is_some_and(Pump::is_paused);
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let value = Timespec { tv_sec: 0, tv_nsec: if paused { ASK_AGAIN } else { 0 } };
        let time = Itimerspec { it_interval: zero, it_value: value };
        rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &time)?;
        Ok(())
    }
}

fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?)
}

fn in_foreground(terminal: &OwnedFd) -> bool {
    rustix::termios::tcgetpgrp(terminal).is_ok_and(|group| group == rustix::process::getpgrp())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_those_of_a_shell() {
        assert_eq!(Outcome::Exited(Ended::Exited(3)).status(), 3);
        assert_eq!(Outcome::Exited(Ended::Killed(9)).status(), 137);
        assert_eq!(Outcome::Failed { reason: String::new(), status: 127 }.status(), 127);
        assert_eq!(Outcome::Interrupted(2).status(), 130);
        assert_eq!(Outcome::Lost(String::new()).status(), 125);
    }
}
