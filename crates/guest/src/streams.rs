//! The program's standard streams: pipes, or a terminal, with pumps to the host's streams behind them.
//!
//! Pipes, because a program may open /dev/stdout again, which a socket does not let it.

use crate::host;
use kso_stdio::{Pump, Stream};
use kso_wire::guest::ports;
use kso_wire::job::{Start, WindowSize};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{InputModes, OptionalActions, Winsize, tcgetattr, tcsetattr, tcsetwinsize};
use std::io;
use std::os::fd::OwnedFd;

/// The program's side: standard input, output and error.
pub struct Inner {
    streams: [OwnedFd; 3],
    terminal: bool,
}

/// Our side.
pub struct Streams {
    input: Pump,
    output: Pump,
    errors: Option<Pump>,
    master: Option<OwnedFd>,
    /// Held so that the terminal does not hang up while no program has it open.
    _terminal: Option<OwnedFd>,
}

/// So many pumps, whose events are numbered from 0.
pub const PUMPS: u64 = 3;

impl Streams {
    /// Connects the host's streams and makes the program's.
    pub fn new(start: &Start) -> Result<(Self, Inner), String> {
        let made = match start.terminal {
            Some(size) => with_terminal(start, size),
            None => with_pipes(start),
        };
        made.map_err(|error| format!("cannot make the standard streams: {error}"))
    }

    /// Serves the pump of this number, or all.
    pub fn run(&mut self, events: &OwnedFd, number: Option<u64>) -> io::Result<()> {
        for (index, pump) in
            [Some(&mut self.input), Some(&mut self.output), self.errors.as_mut()].into_iter().enumerate()
        {
            if let Some(pump) = pump.filter(|pump| !pump.is_over())
                && number.is_none_or(|number| usize::try_from(number) == Ok(index))
            {
                pump.run(events)?;
            }
        }
        Ok(())
    }

    /// The program has ended: what it wrote so far is all.
    pub fn drain(&mut self, events: &OwnedFd) -> io::Result<()> {
        self.input.close(events);
        for pump in [Some(&mut self.output), self.errors.as_mut()].into_iter().flatten() {
            if !pump.is_over() {
                pump.drain(events)?;
            }
        }
        Ok(())
    }

    /// All output is on its way.
    pub fn is_drained(&self) -> bool {
        self.output.is_over() && self.errors.as_ref().is_none_or(Pump::is_over)
    }

    pub fn resize(&self, size: WindowSize) {
        if let Some(master) = &self.master {
            let _ = tcsetwinsize(master, winsize(size));
        }
    }
}

impl Inner {
    /// In the program's process: makes them its standard streams, and the terminal its own.
    pub fn take(&self) -> io::Result<()> {
        rustix::process::setsid()?;
        let [input, output, errors] = &self.streams;
        rustix::stdio::dup2_stdin(input)?;
        rustix::stdio::dup2_stdout(output)?;
        rustix::stdio::dup2_stderr(errors)?;
        if self.terminal {
            rustix::process::ioctl_tiocsctty(input)?;
        }
        Ok(())
    }
}

fn winsize(size: WindowSize) -> Winsize {
    Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 }
}

/// A pipe whose ends the program's user may open again.
fn pipe(start: &Start) -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    own(&reader, start)?;
    Ok((reader, writer))
}

fn own(descriptor: &OwnedFd, start: &Start) -> io::Result<()> {
    std::os::unix::fs::fchown(descriptor, Some(start.user), Some(start.group))
}

/// A pipe for what the program writes, with the pump behind it.
fn output(start: &Start, port: u32, number: u64) -> io::Result<(OwnedFd, Pump)> {
    let (reader, writer) = pipe(start)?;
    // Only our end shall not wait, and a pipe has two files.
    let source = Stream::own(reader)?;
    Ok((writer, Pump::new(source, Stream::socket(host::connect(port)?), number)))
}

fn with_pipes(start: &Start) -> io::Result<(Streams, Inner)> {
    let (stdin, writer) = pipe(start)?;
    let input = Pump::new(Stream::socket(host::connect(ports::STDIN)?), Stream::own(writer)?, 0);
    let (stdout, output_pump) = output(start, ports::STDOUT, 1)?;
    let (stderr, errors) = output(start, ports::STDERR, 2)?;
    let streams = Streams { input, output: output_pump, errors: Some(errors), master: None, _terminal: None };
    Ok((streams, Inner { streams: [stdin, stdout, stderr], terminal: false }))
}

fn with_terminal(start: &Start, size: WindowSize) -> io::Result<(Streams, Inner)> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let terminal =
        ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    // The group stays that of all terminals (devpts' gid), so that wall and write work.
    std::os::unix::fs::fchown(&terminal, Some(start.user), None)?;
    tcsetwinsize(&master, winsize(size))?;
    let mut modes = tcgetattr(&terminal)?;
    modes.input_modes |= InputModes::IUTF8;
    tcsetattr(&terminal, OptionalActions::Now, &modes)?;

    let stream = host::connect(ports::STDIN)?;
    let copy = || terminal.try_clone();
    let (stderr, errors) = if start.error_apart {
        let (writer, pump) = output(start, ports::STDERR, 2)?;
        (writer, Some(pump))
    } else {
        (copy()?, None)
    };
    let inner = Inner { streams: [copy()?, copy()?, stderr], terminal: true };
    let input = Pump::new(Stream::socket(stream.try_clone()?), Stream::own(master.try_clone()?)?, 0);
    let output = Pump::new(Stream::own(master.try_clone()?)?, Stream::socket(stream), 1);
    Ok((Streams { input, output, errors, master: Some(master), _terminal: Some(terminal) }, inner))
}
