//! A guest's packets on a stream: frames ([`kso_wire::frame`]) of one packet each, with its virtio-net header.

use kso_wire::frame::{Frames, HEADER, MAX_FRAME};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// So many bytes are read at a time.
const READ: usize = 256 * 1024;
/// Most bytes that wait for a guest that does not read. More is dropped, as a full queue of a TUN drops.
const MAX_WAITING: usize = 512 * 1024;

/// See the module.
pub struct Framed {
    stream: OwnedFd,
    frames: Frames,
    buffer: Box<[u8]>,
    waiting: Vec<u8>,
    /// Sent already, of what waits.
    sent: usize,
    /// Nothing comes or goes any more.
    closed: bool,
    segments: bool,
}

impl std::fmt::Debug for Framed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Framed")
            .field("stream", &self.stream)
            .field("closed", &self.closed)
            .finish_non_exhaustive()
    }
}

impl Framed {
    /// On this stream socket.
    ///
    /// # Errors
    /// It is not one.
    pub fn new(stream: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&stream, true)?;
        Ok(Self {
            stream,
            frames: Frames::default(),
            buffer: vec![0; READ].into_boxed_slice(),
            waiting: Vec::new(),
            sent: 0,
            closed: false,
            segments: false,
        })
    }

    pub fn segments(&self) -> bool {
        self.segments
    }

    pub fn set_segments(&mut self, segments: bool) {
        self.segments = segments;
    }

    /// Whether the other end is gone.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Whether something waits until the stream can be written.
    pub fn is_waiting(&self) -> bool {
        !self.closed && self.sent < self.waiting.len()
    }

    /// The next packet; one that is longer than the buffer is none, and is passed over.
    ///
    /// # Errors
    /// `EWOULDBLOCK` when there is none.
    pub fn read(&mut self, packet: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.frames.next_bytes() {
                Ok(Some(frame)) => {
                    if let Some(place) = packet.get_mut(..frame.len()) {
                        place.copy_from_slice(frame);
                        return Ok(frame.len());
                    }
                }
                Ok(None) => self.fill()?,
                Err(error) => {
                    tracing::warn!(%error, "a guest's packets are no frames: they are not looked at any more");
                    self.closed = true;
                    return Err(io::ErrorKind::WouldBlock.into());
                }
            }
        }
    }

    /// Whether a packet is here that was not read yet.
    pub fn has_packet(&self) -> bool {
        !self.closed && self.frames.has_frame()
    }

    fn fill(&mut self) -> io::Result<()> {
        while !self.closed {
            match rustix::net::recv(&self.stream, &mut *self.buffer, RecvFlags::DONTWAIT) {
                Ok((0, _)) => self.closed = true,
                Ok((count, _)) => {
                    self.frames.push(self.buffer.get(..count).unwrap_or_default());
                    return Ok(());
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => self.closed = true,
            }
        }
        Err(io::ErrorKind::WouldBlock.into())
    }

    /// Writes a packet, or keeps it until there is room.
    ///
    /// # Errors
    /// It is lost: too much waits already, or the other end is gone.
    pub fn write(&mut self, slices: &[IoSlice<'_>]) -> io::Result<()> {
        let length: usize = slices.iter().map(|slice| slice.len()).sum();
        if self.closed || length > MAX_FRAME {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if self.waiting.len() - self.sent + HEADER + length > MAX_WAITING {
            return Err(io::Error::from_raw_os_error(Errno::NOBUFS.raw_os_error()));
        }
        let header = u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes();
        self.waiting.reserve(HEADER + length);
        self.waiting.extend_from_slice(&header);
        slices.iter().for_each(|slice| self.waiting.extend_from_slice(slice));
        self.flush();
        Ok(())
    }

    /// Sends what waits, as far as there is room.
    pub fn flush(&mut self) {
        while let Some(rest) = self.waiting.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match rustix::net::send(&self.stream, rest, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(count) => self.sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => {
                    self.closed = true;
                    self.waiting = Vec::new();
                    self.sent = 0;
                }
            }
        }
        if self.sent == self.waiting.len() {
            self.waiting.clear();
            self.sent = 0;
        } else if self.sent > MAX_WAITING / 2 {
            self.waiting.drain(..self.sent);
            self.sent = 0;
        }
    }
}

impl AsFd for Framed {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn packets_keep_their_boundaries_both_ways() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut framed = Framed::new(ours.into()).unwrap();
        let mut packet = [0; 100];
        assert!(framed.read(&mut packet).is_err());
        let mut bytes = Vec::new();
        for length in [3, 0, 101, 7] {
            kso_wire::frame::append_bytes(&vec![length as u8; length], &mut bytes).unwrap();
        }
        theirs.write_all(&bytes[..9]).unwrap();
        assert_eq!(framed.read(&mut packet).unwrap(), 3);
        assert!(framed.read(&mut packet).is_err() && !framed.has_packet());
        theirs.write_all(&bytes[9..]).unwrap();
        assert_eq!(framed.read(&mut packet).unwrap(), 0);
        assert_eq!(framed.read(&mut packet).unwrap(), 7, "what is too long is passed over");
        framed.write(&[IoSlice::new(b"ab"), IoSlice::new(b"c")]).unwrap();
        let mut read = [0; 7];
        theirs.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"\x03\0\0\0abc");
        drop(theirs);
        assert!(framed.read(&mut packet).is_err() && framed.is_closed());
        assert!(framed.write(&[IoSlice::new(b"x")]).is_err());
    }

    #[test]
    fn who_does_not_read_loses_packets_and_not_their_boundaries() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut framed = Framed::new(ours.into()).unwrap();
        let packet = [7; 1400];
        let written = (0..2000).filter(|_| framed.write(&[IoSlice::new(&packet)]).is_ok()).count();
        assert!(written < 2000 && framed.is_waiting());
        let mut other = Framed::new(theirs.into()).unwrap();
        let mut read = 0;
        let mut buffer = [0; 2000];
        while framed.is_waiting() || read < written {
            while let Ok(length) = other.read(&mut buffer) {
                assert_eq!(&buffer[..length], &packet);
                read += 1;
            }
            framed.flush();
        }
        assert_eq!(read, written);
    }

    #[test]
    fn what_is_no_frame_ends_it() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut framed = Framed::new(ours.into()).unwrap();
        theirs.write_all(&[0xff; 20]).unwrap();
        assert!(framed.read(&mut [0; 10]).is_err());
        assert!(framed.is_closed() && !framed.has_packet());
    }
}
