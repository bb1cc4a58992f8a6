//! Init's side of [`kso_wire::job`].

use kso_wire::VERSION;
use kso_wire::frame::{self, Frames};
use kso_wire::job::{Start, ToInit, ToLauncher};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// So much is read at a time, bytes.
const CHUNK: usize = 64 << 10;

/// The stream to the launcher.
pub struct Job {
    stream: OwnedFd,
    frames: Frames,
    buffer: Vec<u8>,
}

/// What became of the launcher.
#[derive(Debug, PartialEq, Eq)]
pub enum Heard {
    Message(ToInit),
    Nothing,
    /// It is gone, or babbles.
    Gone,
}

impl Job {
    pub fn new(stream: OwnedFd) -> Self {
        Self { stream, frames: Frames::default(), buffer: vec![0; CHUNK] }
    }

    /// Introduces the guest and waits for what it is to be.
    pub fn start(&mut self) -> Result<Box<Start>, String> {
        let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        self.say(&ToLauncher::Ready { version: VERSION, kernel });
        loop {
            match self.hear() {
                Heard::Message(ToInit::Start(start)) => return Ok(start),
                Heard::Message(_) => {}
                Heard::Nothing => self.wait(PollFlags::IN),
                Heard::Gone => return Err("the launcher broke off".into()),
            }
        }
    }

    /// Says something, however long it takes: it is little.
    pub fn say(&self, message: &ToLauncher) {
        let mut bytes = Vec::new();
        if frame::append(message, &mut bytes).is_err() {
            return;
        }
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            match send(&self.stream, rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(Errno::AGAIN | Errno::INTR) => self.wait(PollFlags::OUT),
                // Nobody listens: that is found when it is read.
                Err(_) => return,
            }
        }
    }

    /// The next message, without waiting.
    pub fn hear(&mut self) -> Heard {
        loop {
            match self.frames.next_message() {
                Ok(Some(message)) => return Heard::Message(message),
                Ok(None) => {}
                Err(_) => return Heard::Gone,
            }
            match recv(&self.stream, self.buffer.as_mut_slice(), RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Heard::Gone,
                Ok((count, _)) => self.frames.push(self.buffer.get(..count).unwrap_or_default()),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Heard::Nothing,
                Err(_) => return Heard::Gone,
            }
        }
    }

    /// Waits until the launcher has heard all and closes.
    pub fn wait_for_end(&mut self) {
        while self.hear() != Heard::Gone {
            self.wait(PollFlags::IN);
        }
    }

    fn wait(&self, flags: PollFlags) {
        let _ = poll(&mut [PollFd::new(&self.stream, flags)], None);
    }
}

impl AsFd for Job {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn messages_pass_and_the_end_is_heard() {
        let (ours, mut launcher) = UnixStream::pair().unwrap();
        let mut job = Job::new(ours.into());
        assert_eq!(job.hear(), Heard::Nothing);
        job.say(&ToLauncher::Started);
        let mut bytes = [0; 5];
        launcher.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, [1, 0, 0, 0, 1]);
        let mut bytes = Vec::new();
        let signal = ToInit::Signal { number: 15, group: false };
        frame::append(&signal, &mut bytes).unwrap();
        launcher.write_all(&bytes).unwrap();
        assert_eq!(job.hear(), Heard::Message(signal));
        launcher.write_all(&[0xff; 8]).unwrap();
        assert_eq!(job.hear(), Heard::Gone);
        drop(launcher);
        job.wait_for_end();
    }
}
