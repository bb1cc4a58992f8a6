//! Requests and replies on a stream of bytes: each begins with its own length, as FUSE has it, and needs no other frame.

use crate::abi;
use crate::inodes::lock;
use crate::service::MAX_WRITE;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{SendFlags, Shutdown};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, TryLockError};
use std::time::Duration;

/// Room for all of a request or a reply but its data.
pub(crate) const HEADERS: usize = 4096;
/// The longest that is read.
pub(crate) const MAX_FRAME: usize = MAX_WRITE as usize + HEADERS;
/// Bytes that are read ahead.
const AHEAD: usize = 64 * 1024;
/// Who does not read for so long is given up.
const PATIENCE: Duration = Duration::from_secs(60);
/// A question of the stream itself, which no kernel asks: its answer, a header, tells that somebody reads.
pub(crate) const PING: u32 = 0x6b73_6f01;

/// Why no more can be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Malformed {
    /// The stream.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A length.
    #[error("a frame of {0} bytes")]
    Length(u32),
}

/// Reads frames.
#[derive(Debug)]
pub(crate) struct Frames<R> {
    from: R,
    /// Bytes of a frame's header: none is shorter.
    head: usize,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl<R: Read> Frames<R> {
    /// Of frames whose headers have `head` bytes.
    pub fn new(from: R, head: usize) -> Self {
        Self { from, head, buffer: vec![0; AHEAD].into(), start: 0, end: 0 }
    }

    fn ahead(&self) -> &[u8] {
        self.buffer.get(self.start..self.end).unwrap_or_default()
    }

    /// Puts the next one into `frame`. `false`: the stream ended before it began.
    pub fn next(&mut self, frame: &mut Vec<u8>) -> Result<bool, Malformed> {
        while self.end - self.start < self.head {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
            let room = self.buffer.get_mut(self.end..).unwrap_or_default();
            match self.from.read(room) {
                Ok(0) if self.end == 0 => return Ok(false),
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(count) => self.end += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        let length = self.ahead().first_chunk().map_or(0, |length| u32::from_ne_bytes(*length));
        let total = length as usize;
        if !(self.head..=MAX_FRAME).contains(&total) {
            return Err(Malformed::Length(length));
        }
        let here = self.ahead();
        let here = here.get(..total).unwrap_or(here);
        frame.clear();
        frame.extend_from_slice(here);
        let here = here.len();
        self.start += here;
        if here < total {
            // Straight to where it belongs, and never more memory than has come.
            let got = self.from.by_ref().take((total - here) as u64).read_to_end(frame)?;
            if got < total - here {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
        }
        Ok(true)
    }
}

/// The frame was not asked: nobody has got all of it, nor ever will.
#[derive(Debug)]
pub(crate) struct Unasked;

/// The end by which frames are sent.
#[derive(Debug)]
pub(crate) struct Link {
    socket: OwnedFd,
    /// Held while a frame is written: they do not mix.
    writing: Mutex<()>,
    over: AtomicBool,
}

impl Link {
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, false)?;
        set_socket_timeout(&socket, Timeout::Send, Some(PATIENCE))?;
        Ok(Self { socket, writing: Mutex::new(()), over: AtomicBool::new(false) })
    }

    /// A descriptor to read from.
    pub fn reader(&self) -> io::Result<std::os::unix::net::UnixStream> {
        Ok(self.socket.try_clone()?.into())
    }

    /// Sends a frame, or several. `sent` becomes true when all of it was written: before another frame can be, and never
    /// after [`Self::end`] has returned.
    pub fn send(&self, frame: &[u8], sent: Option<&AtomicBool>) -> Result<(), Unasked> {
        let writing = lock(&self.writing);
        if self.is_over() {
            return Err(Unasked);
        }
        let mut rest = frame;
        while !rest.is_empty() {
            match rustix::net::send(&self.socket, rest, SendFlags::NOSIGNAL) {
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(error) => {
                    tracing::debug!(%error, "a file stream takes no more");
                    // What comes after half a frame would be read as its other half.
                    self.over.store(true, Ordering::SeqCst);
                    drop(writing);
                    self.shutdown();
                    return Err(Unasked);
                }
            }
        }
        if let Some(sent) = sent {
            sent.store(true, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Sends a frame only if that needs no waiting.
    pub fn offer(&self, frame: &[u8]) {
        {
            let Ok(_writing) = self.writing.try_lock().or_else(|error| match error {
                TryLockError::Poisoned(guard) => Ok(guard.into_inner()),
                TryLockError::WouldBlock => Err(()),
            }) else {
                return;
            };
            let mut polled = [PollFd::new(&self.socket, PollFlags::OUT)];
            let now = Timespec { tv_sec: 0, tv_nsec: 0 };
            if !matches!(poll(&mut polled, Some(&now)), Ok(1)) {
                return;
            }
        }
        let _ = self.send(frame, None);
    }

    /// Ends it, both ways. From then on it is settled for every frame whether it was sent.
    pub fn end(&self) {
        self.over.store(true, Ordering::SeqCst);
        self.shutdown();
        // Who is writing stops now.
        drop(lock(&self.writing));
    }

    fn shutdown(&self) {
        // It may have ended by itself.
        let _ = rustix::net::shutdown(self.socket.as_fd(), Shutdown::Both);
    }

    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }
}

/// A request without a body: its header.
pub(crate) fn bare_request(opcode: u32, unique: u64) -> abi::InHeader {
    abi::InHeader { len: abi::IN_HEADER as u32, opcode, unique, ..abi::InHeader::default() }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::net::UnixStream;

    /// A reader that gives little at a time.
    struct Drops<'a>(&'a [u8], usize);

    impl Read for Drops<'_> {
        fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
            let count = self.1.min(room.len()).min(self.0.len());
            room[..count].copy_from_slice(&self.0[..count]);
            self.0 = &self.0[count..];
            Ok(count)
        }
    }

    fn frame(length: usize, fill: u8) -> Vec<u8> {
        let mut frame = vec![fill; length];
        frame[..4].copy_from_slice(&(length as u32).to_ne_bytes());
        frame
    }

    proptest! {
        #[test]
        fn frames_come_as_they_were_sent(
            lengths in prop::collection::vec(prop_oneof![16..100_usize, 60_000..200_000_usize], 0..6),
            drop in prop_oneof![1..100_usize, 1000..100_000_usize],
            cut in any::<prop::sample::Index>(),
        ) {
            let frames: Vec<_> = lengths.iter().enumerate().map(|(at, length)| frame(*length, at as u8)).collect();
            let all = frames.concat();
            let mut reader = Frames::new(Drops(&all, drop), 16);
            let mut got = Vec::new();
            for frame in &frames {
                prop_assert!(reader.next(&mut got).unwrap());
                prop_assert_eq!(&got, frame);
            }
            prop_assert!(!reader.next(&mut got).unwrap());
            // Cut anywhere, whole ones come, and then an end or an error.
            let cut = cut.index(all.len() + 1);
            let mut reader = Frames::new(Drops(&all[..cut], drop), 16);
            let mut whole = 0;
            while let Ok(true) = reader.next(&mut got) {
                prop_assert_eq!(&got, &frames[whole]);
                whole += 1;
            }
            let bytes: usize = lengths[..whole].iter().sum();
            prop_assert!(bytes <= cut && (whole == lengths.len() || cut < bytes + lengths[whole]));
        }
    }

    #[test]
    fn lengths_that_lie_end_it() {
        for length in [0_u32, 15, MAX_FRAME as u32 + 1, u32::MAX] {
            let mut bytes = frame(64, 0);
            bytes[..4].copy_from_slice(&length.to_ne_bytes());
            let error = Frames::new(bytes.as_slice(), 16).next(&mut Vec::new()).unwrap_err();
            assert!(matches!(error, Malformed::Length(got) if got == length));
        }
        // Much is announced, and little comes: little is kept.
        let mut frame = Vec::new();
        let mut bytes = vec![0; 100];
        bytes[..4].copy_from_slice(&(MAX_FRAME as u32).to_ne_bytes());
        assert!(Frames::new(bytes.as_slice(), 16).next(&mut frame).is_err());
        assert!(frame.capacity() < 4096);
    }

    #[test]
    fn what_was_not_written_whole_was_not_asked() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let link = std::sync::Arc::new(Link::new(ours.into()).unwrap());
        let sent = AtomicBool::new(false);
        link.send(&frame(40, 1), Some(&sent)).unwrap();
        assert!(sent.load(Ordering::SeqCst));
        // One that does not fit, to a peer who does not read: until the end.
        let writer = std::thread::spawn({
            let link = link.clone();
            move || {
                let sent = AtomicBool::new(false);
                (link.send(&frame(MAX_FRAME, 2), Some(&sent)).is_err(), sent.load(Ordering::SeqCst))
            }
        });
        let mut head = [0; 50];
        (&theirs).read_exact(&mut head).unwrap();
        link.end();
        assert_eq!(writer.join().unwrap(), (true, false));
        assert!(link.send(&frame(40, 3), None).is_err());
        // A peer that is gone is noticed by who sends, and from then on by all.
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let link = Link::new(ours.into()).unwrap();
        assert!(link.send(&frame(40, 1), None).is_err());
        assert!(link.is_over());
    }
}
