//! The control stream: frames of `kso_wire::guest`, both ways, without waiting.

use kso_wire::frame::{Frames, append};
use kso_wire::guest::{ToGuest, ToHost};
use kso_wire::{Errno, VERSION};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// Bytes that may wait to be sent; more is refused.
const MAX_WAITING: usize = 1 << 20;
/// Bytes that are read at a time.
const CHUNK: usize = 64 * 1024;
/// The broker must welcome the guest within this time.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(30);
/// What a connection needs sent before it is begun must be sent within this time.
const SEND_TIMEOUT: Duration = Duration::from_millis(200);

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Control {
    /// `None`: the outside is gone.
    stream: Option<OwnedFd>,
    waiting: Vec<u8>,
    frames: Frames,
    buffer: Vec<u8>,
}

impl Control {
    /// Introduces the guest and waits until it is welcome.
    pub(super) fn open(stream: OwnedFd, datagram_segments: bool) -> io::Result<Self> {
        let mut control = Self {
            stream: Some(stream),
            waiting: Vec::new(),
            frames: Frames::default(),
            buffer: vec![0; CHUNK],
        };
        let gone = || io::Error::new(io::ErrorKind::ConnectionAborted, "the broker is gone");
        control.send(&ToHost::Hello { version: VERSION, datagram_segments }).map_err(|_| gone())?;
        let until = Instant::now() + WELCOME_TIMEOUT;
        loop {
            match control.next() {
                Some(ToGuest::Welcome(welcome)) if welcome.version == VERSION => return Ok(control),
                Some(ToGuest::Welcome(welcome)) => {
                    let text = format!("the broker speaks version {}, the guest {VERSION}", welcome.version);
                    return Err(io::Error::new(io::ErrorKind::Unsupported, text));
                }
                Some(ToGuest::Refused(reason)) => {
                    return Err(io::Error::new(io::ErrorKind::PermissionDenied, reason));
                }
                Some(_) => {}
                None if control.stream.is_none() => return Err(gone()),
                None if !control.wait(PollFlags::IN, until) => {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "the broker does not answer"));
                }
                None => {}
            }
        }
    }

    /// Readable when [`Self::next`] may have something. `None`: the outside is gone.
    pub(super) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.stream.as_ref().map(AsFd::as_fd)
    }

    /// Whether [`Self::flush`] waits for room.
    pub(super) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Sends a message, or keeps it until there is room.
    ///
    /// # Errors
    /// `ENETDOWN`: the outside is gone; `ENOBUFS`: it does not keep up.
    pub(super) fn send(&mut self, message: &ToHost) -> Result<(), Errno> {
        if self.stream.is_none() {
            return Err(Errno::ENETDOWN);
        }
        if self.waiting.len() > MAX_WAITING {
            return Err(Errno::ENOBUFS);
        }
        append(message, &mut self.waiting).map_err(|_| Errno::EMSGSIZE)?;
        self.flush();
        if self.stream.is_none() { Err(Errno::ENETDOWN) } else { Ok(()) }
    }

    /// Sends a message that must be on its way before what follows it.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub(super) fn send_now(&mut self, message: &ToHost) -> Result<(), Errno> {
        self.send(message)?;
        let until = Instant::now() + SEND_TIMEOUT;
        while self.has_waiting() {
            if !self.wait(PollFlags::OUT, until) {
                return Err(Errno::ENOBUFS);
            }
            self.flush();
        }
        if self.stream.is_none() { Err(Errno::ENETDOWN) } else { Ok(()) }
    }

    /// Sends what waits, as far as there is room.
    pub(super) fn flush(&mut self) {
        while let Some(stream) = &self.stream
            && !self.waiting.is_empty()
        {
            match send(stream, &self.waiting, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(0) | Err(rustix::io::Errno::AGAIN) => return,
                Ok(sent) => drop(self.waiting.drain(..sent)),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => self.lose(&error.to_string()),
            }
        }
    }

    /// The next message, if one is there.
    pub(super) fn next(&mut self) -> Option<ToGuest> {
        loop {
            match self.frames.next_message() {
                Ok(Some(message)) => return Some(message),
                Ok(None) => {}
                Err(error) => {
                    self.lose(&error.to_string());
                    return None;
                }
            }
            let stream = self.stream.as_ref()?;
            match recv(stream, &mut self.buffer, RecvFlags::DONTWAIT) {
                Ok((0, _)) => self.lose("it was closed"),
                Ok((read, _)) => self.frames.push(self.buffer.get(..read).unwrap_or_default()),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return None,
                Err(error) => self.lose(&error.to_string()),
            }
        }
    }

    fn wait(&self, flags: PollFlags, until: Instant) -> bool {
        let Some(stream) = &self.stream else { return false };
        let left = until.saturating_duration_since(Instant::now());
        let Ok(timeout) = Timespec::try_from(left) else { return false };
        let mut polled = [PollFd::new(stream, flags)];
        matches!(poll(&mut polled, Some(&timeout)), Ok(1..) | Err(rustix::io::Errno::INTR))
    }

    fn lose(&mut self, reason: &str) {
        if self.stream.take().is_some() {
            tracing::warn!(reason, "the control stream is lost: nothing outside can be reached any more");
        }
        self.waiting = Vec::new();
        self.frames = Frames::default();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use kso_wire::Welcome;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn welcome(stream: &mut UnixStream) {
        let mut bytes = Vec::new();
        append(&ToGuest::Welcome(Welcome { version: VERSION, session: 1 }), &mut bytes).unwrap();
        stream.write_all(&bytes).unwrap();
    }

    #[test]
    fn messages_cross_and_the_end_is_seen() {
        let (near, mut far) = UnixStream::pair().unwrap();
        welcome(&mut far);
        let mut control = Control::open(near.into(), true).unwrap();
        let mut hello = [0; 7];
        far.read_exact(&mut hello).unwrap();
        assert!(control.next().is_none() && control.descriptor().is_some());
        let mut bytes = Vec::new();
        append(&ToGuest::Refused("no".into()), &mut bytes).unwrap();
        far.write_all(&bytes[..5]).unwrap();
        assert!(control.next().is_none());
        far.write_all(&bytes[5..]).unwrap();
        assert_eq!(control.next(), Some(ToGuest::Refused("no".into())));
        drop(far);
        assert!(control.next().is_none() && control.descriptor().is_none());
        assert_eq!(control.send(&ToHost::Abandon { local_port: 1 }), Err(Errno::ENETDOWN));
    }

    #[test]
    fn a_peer_that_does_not_read_costs_a_bounded_amount() {
        let (near, mut far) = UnixStream::pair().unwrap();
        welcome(&mut far);
        let mut control = Control::open(near.into(), false).unwrap();
        let failed =
            (0..2_000_000).find_map(|port| control.send(&ToHost::Abandon { local_port: port }).err());
        assert_eq!(failed, Some(Errno::ENOBUFS));
        assert!(control.waiting.len() < MAX_WAITING + 100);
    }
}
