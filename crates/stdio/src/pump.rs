//! Moves bytes one way between two descriptors, as fast as the slower of them.
//!
//! ```text
//!   source --read--> [buffer, bounded] --write--> sink
//!      | end                                | broken
//!      v                                    v
//!   the rest is written, then the sink      the source is closed: its writer
//!   is shut down: over                      hears of it (EPIPE): over
//! ```

use crate::Stream;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use std::io;
use std::os::fd::OwnedFd;

/// Bytes on their way.
const BUFFER: usize = 64 << 10;
/// So many reads and writes are made before others get their turn.
const MAX_TURNS: usize = 16;

/// Whether epoll tells of an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Watched {
    No,
    Yes,
    /// It cannot: a regular file, which is always ready.
    Never,
}

/// One of the two ends.
#[derive(Debug)]
struct End {
    stream: Stream,
    watched: Watched,
}

impl End {
    /// Watches it, or does so no more. An end of which nothing is wanted is not watched at all: it would tell of
    /// hang-ups again and again.
    fn watch(&mut self, events: &OwnedFd, flags: EventFlags, wanted: bool, data: u64) -> io::Result<()> {
        match (self.watched, wanted) {
            (Watched::No, true) => match epoll::add(events, &self.stream, EventData::new_u64(data), flags) {
                Ok(()) => self.watched = Watched::Yes,
                Err(Errno::PERM) => self.watched = Watched::Never,
                Err(error) => return Err(error.into()),
            },
            (Watched::Yes, false) => {
                epoll::delete(events, &self.stream)?;
                self.watched = Watched::No;
            }
            _ => {}
        }
        Ok(())
    }

    /// Its watch must go before it does: a copy of the descriptor would keep it.
    fn close(mut self, events: &OwnedFd) {
        let _ = self.watch(events, EventFlags::empty(), false, 0);
    }
}

/// See the module's documentation. It is watched by an epoll instance of its owner's, who calls [`Self::run`] when told.
#[derive(Debug)]
pub struct Pump {
    source: Option<End>,
    sink: Option<End>,
    buffer: Vec<u8>,
    /// Of the buffer, what is not written yet.
    start: usize,
    end: usize,
    paused: bool,
    /// What the source has now is the last.
    draining: bool,
    /// Names its events.
    data: u64,
}

/// What became of a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    Moved,
    Stuck,
    Over,
}

impl Pump {
    /// A pump whose events are named `data`.
    #[must_use]
    pub fn new(source: Stream, sink: Stream, data: u64) -> Self {
        let end = |stream| Some(End { stream, watched: Watched::No });
        let buffer = vec![0; BUFFER];
        Self {
            source: end(source),
            sink: end(sink),
            buffer,
            start: 0,
            end: 0,
            paused: false,
            draining: false,
            data,
        }
    }

    /// All bytes are where they go, or nobody takes them.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.sink.is_none()
    }

    /// The source is a terminal in whose foreground we are not: nothing is read until [`Self::resume`].
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.paused && self.source.is_some()
    }

    /// Reads again.
    ///
    /// # Errors
    /// epoll_ctl(2).
    pub fn resume(&mut self, events: &OwnedFd) -> io::Result<()> {
        self.paused = false;
        self.run(events)
    }

    /// Stops, whatever is on its way.
    pub fn close(&mut self, events: &OwnedFd) {
        for end in [self.source.take(), self.sink.take()].into_iter().flatten() {
            end.close(events);
        }
    }

    /// What the source has now is the last of it, even if others could still write there.
    ///
    /// # Errors
    /// epoll_ctl(2).
    pub fn drain(&mut self, events: &OwnedFd) -> io::Result<()> {
        self.draining = true;
        self.run(events)
    }

    /// Moves what can be moved, then watches for what is missing.
    ///
    /// # Errors
    /// epoll_ctl(2).
    pub fn run(&mut self, events: &OwnedFd) -> io::Result<()> {
        for _ in 0..MAX_TURNS {
            let read = self.read();
            if read == Turn::Over
                && let Some(source) = self.source.take()
            {
                source.close(events);
            }
            let written = self.write();
            if written == Turn::Over {
                self.close(events);
                return Ok(());
            }
            if read != Turn::Moved && written != Turn::Moved {
                break;
            }
        }
        if self.source.is_none() && self.start == self.end {
            if let Some(sink) = &self.sink {
                sink.stream.finish_writing();
            }
            self.close(events);
            return Ok(());
        }
        self.watch(events)
    }

    fn read(&mut self) -> Turn {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        let room = self.buffer.get_mut(self.end..).filter(|room| !room.is_empty());
        let (Some(source), Some(room), false) = (&self.source, room, self.paused) else { return Turn::Stuck };
        match source.stream.read(room) {
            Ok(0) => Turn::Over,
            Ok(count) => {
                self.end += count;
                Turn::Moved
            }
            Err(Errno::AGAIN) if self.draining => Turn::Over,
            Err(Errno::AGAIN) => Turn::Stuck,
            Err(Errno::INTR) => Turn::Moved,
            // tty(4): the read of a process in the background that does not take SIGTTIN.
            Err(Errno::IO) if in_background(&source.stream) => {
                self.paused = true;
                Turn::Stuck
            }
            Err(_) => Turn::Over,
        }
    }

    fn write(&mut self) -> Turn {
        let bytes = self.buffer.get(self.start..self.end).filter(|bytes| !bytes.is_empty());
        let (Some(sink), Some(bytes)) = (&self.sink, bytes) else { return Turn::Stuck };
        match sink.stream.write(bytes) {
            Ok(count) => {
                self.start += count;
                Turn::Moved
            }
            Err(Errno::AGAIN) => Turn::Stuck,
            Err(Errno::INTR) => Turn::Moved,
            Err(_) => Turn::Over,
        }
    }

    fn watch(&mut self, events: &OwnedFd) -> io::Result<()> {
        let empty = self.start == self.end;
        // What was written to the last byte has room again, however far the marks are.
        let full = self.end == self.buffer.len() && !empty;
        let mut always_ready = false;
        if let Some(source) = &mut self.source {
            source.watch(events, EventFlags::IN, !full && !self.paused, self.data)?;
            always_ready = source.watched == Watched::Never;
        }
        if let Some(sink) = &mut self.sink {
            sink.watch(events, EventFlags::OUT, !empty || always_ready, self.data)?;
        }
        Ok(())
    }
}

/// Of our own terminal only: the master of another session's says EIO when nobody has its other side open.
fn in_background(terminal: &Stream) -> bool {
    let ours = rustix::process::getsid(None);
    let controls_us = rustix::termios::tcgetsid(terminal).is_ok_and(|session| ours == Ok(session));
    controls_us && rustix::termios::tcgetpgrp(terminal).is_ok_and(|group| group != rustix::process::getpgrp())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::Direction;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    fn events() -> OwnedFd {
        epoll::create(epoll::CreateFlags::CLOEXEC).unwrap()
    }

    fn wait(events: &OwnedFd) {
        let mut ready = Vec::with_capacity(4);
        let second = rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 };
        epoll::wait(events, rustix::buffer::spare_capacity(&mut ready), Some(&second)).unwrap();
    }

    fn bytes(count: usize) -> Vec<u8> {
        (0..count).map(|number| u8::try_from(number * 31 % 251).unwrap()).collect()
    }

    /// Runs a pump to its end while another thread reads all that comes out.
    fn pumped(source: Stream) -> Vec<u8> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            theirs.read_to_end(&mut all).unwrap();
            all
        });
        let (mut pump, events) = (Pump::new(source, Stream::socket(ours.into()), 0), events());
        pump.run(&events).unwrap();
        while !pump.is_over() {
            wait(&events);
            pump.run(&events).unwrap();
        }
        drop(pump);
        reader.join().unwrap()
    }

    #[test]
    fn a_buffer_that_was_written_to_its_last_byte_takes_more() {
        let (source, mut writer) = UnixStream::pair().unwrap();
        let (sink, _reader) = UnixStream::pair().unwrap();
        let (mut pump, events) =
            (Pump::new(Stream::socket(source.into()), Stream::socket(sink.into()), 0), events());
        // As after a turn whose last read filled the buffer, all of which was then written.
        (pump.start, pump.end) = (BUFFER, BUFFER);
        pump.watch(&events).unwrap();
        writer.write_all(b"more").unwrap();
        let mut ready = Vec::with_capacity(1);
        let second = rustix::event::Timespec { tv_sec: 10, tv_nsec: 0 };
        epoll::wait(&events, rustix::buffer::spare_capacity(&mut ready), Some(&second)).unwrap();
        assert_eq!(ready.len(), 1);
    }

    #[test]
    fn a_pipe_a_file_and_a_socket_pass_exactly_with_their_end() {
        let data = bytes(3 * BUFFER * MAX_TURNS + 7);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&data).unwrap();
        io::Seek::rewind(&mut file).unwrap();
        assert!(pumped(Stream::shared(file.as_fd(), Direction::Read).unwrap()) == data);

        let (reader, writer) = std::io::pipe().unwrap();
        let copy = data.clone();
        let feeder = std::thread::spawn(move || {
            let mut writer = writer;
            writer.write_all(&copy).unwrap();
        });
        assert!(pumped(Stream::shared(reader.as_fd(), Direction::Read).unwrap()) == data);
        feeder.join().unwrap();

        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let copy = data.clone();
        let feeder = std::thread::spawn(move || theirs.write_all(&copy).unwrap());
        assert!(pumped(Stream::shared(ours.as_fd(), Direction::Read).unwrap()) == data);
        feeder.join().unwrap();
    }

    #[test]
    fn a_sink_that_does_not_read_holds_the_source_back() {
        let (reader, writer) = std::io::pipe().unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let events = events();
        let mut pump = Pump::new(
            Stream::shared(reader.as_fd(), Direction::Read).unwrap(),
            Stream::socket(ours.into()),
            0,
        );
        rustix::io::ioctl_fionbio(&writer, true).unwrap();
        let mut taken = 0;
        let block = bytes(4096);
        loop {
            match (&writer).write(&block) {
                Ok(count) => taken += count,
                Err(_) => {
                    let before = rustix::io::ioctl_fionread(&reader).unwrap();
                    pump.run(&events).unwrap();
                    if rustix::io::ioctl_fionread(&reader).unwrap() == before {
                        break;
                    }
                }
            }
        }
        assert!(taken < 2 << 20, "bounded: {taken}");
        // Nothing of it is lost.
        drop(writer);
        let (mut got, mut chunk) = (0, vec![0; 65536]);
        while !pump.is_over() {
            while let Ok(count @ 1..) = theirs.read(&mut chunk) {
                got += count;
            }
            pump.run(&events).unwrap();
        }
        while let Ok(count @ 1..) = theirs.read(&mut chunk) {
            got += count;
        }
        assert_eq!(got, taken);
    }

    #[test]
    fn a_writer_hears_that_nobody_reads() {
        let (reader, writer) = std::io::pipe().unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.set_write_timeout(Some(Duration::from_secs(5))).unwrap();
        let events = events();
        let mut pump = Pump::new(
            Stream::socket(ours.into()),
            Stream::shared(writer.as_fd(), Direction::Write).unwrap(),
            0,
        );
        drop((reader, writer));
        pump.run(&events).unwrap();
        theirs.write_all(b"x").unwrap();
        wait(&events);
        pump.run(&events).unwrap();
        assert!(pump.is_over());
        assert_eq!(theirs.write_all(&bytes(1 << 20)).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn an_idle_pump_whose_sink_hung_up_does_not_spin() {
        let (reader, writer) = std::io::pipe().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let events = events();
        let mut pump = Pump::new(
            Stream::shared(reader.as_fd(), Direction::Read).unwrap(),
            Stream::socket(ours.into()),
            0,
        );
        pump.run(&events).unwrap();
        drop(theirs);
        let mut ready = Vec::with_capacity(4);
        let zero = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let count = epoll::wait(&events, rustix::buffer::spare_capacity(&mut ready), Some(&zero)).unwrap();
        assert_eq!(count, 0);
        drop(writer);
    }
}
