//! The control stream between broker and provider: frames, and descriptors beside them where the kernel is shared.
//!
//! A descriptor is sent with the first byte of the frame that names it, so it is here before the frame is whole
//! (unix(7), `SCM_RIGHTS`).

use kso_wire::CodecError;
use kso_wire::codec::Bounded;
use kso_wire::frame::{self, Frames};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Serialize, de::DeserializeOwned};
use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Bytes read at a time.
const READ: usize = 64 << 10;
/// Bytes that may wait to be sent.
const MAX_WAITING: usize = 8 << 20;
/// Descriptors that may have come before their frames.
const MAX_EARLY: usize = 128;
/// Descriptors taken from one read.
const RIGHTS: usize = 8;

/// Why a channel is of no use any more.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The other side closed it.
    #[error("it closed its control stream")]
    Closed,
    /// It sent what is no message.
    #[error("it sent what is no message: {0}")]
    Malformed(#[from] CodecError),
    /// It does not read.
    #[error("it does not read what it is sent")]
    Deaf,
    /// It sent descriptors that belong to no message.
    #[error("it sent descriptors without their messages")]
    Descriptors,
    /// Input or output failed.
    #[error("its control stream failed: {0}")]
    Io(rustix::io::Errno),
}

#[derive(Debug)]
struct Chunk {
    bytes: Vec<u8>,
    sent: usize,
    descriptor: Option<OwnedFd>,
}

/// See the module.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
    passes: bool,
    frames: Frames,
    early: VecDeque<OwnedFd>,
    waiting: VecDeque<Chunk>,
    waiting_bytes: usize,
    buffer: Vec<u8>,
}

impl Channel {
    /// Over a connected, non-blocking stream socket. Descriptors pass if it is a unix socket.
    #[must_use]
    pub fn new(socket: OwnedFd) -> Self {
        let passes = rustix::net::sockopt::socket_domain(&socket) == Ok(AddressFamily::UNIX);
        Self { passes, ..Self::without_descriptors(socket) }
    }

    /// As [`Self::new`]; but the other side is elsewhere, and something carries bytes only between it and `socket`.
    #[must_use]
    pub fn without_descriptors(socket: OwnedFd) -> Self {
        Self {
            socket,
            passes: false,
            frames: Frames::default(),
            early: VecDeque::new(),
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            buffer: vec![0; READ],
        }
    }

    /// Whether descriptors ride on messages.
    #[must_use]
    pub fn passes_descriptors(&self) -> bool {
        self.passes
    }

    /// Sends a message, or keeps it until [`Self::flush`].
    ///
    /// # Errors
    /// [`ChannelError::Deaf`], or the message is over a bound.
    pub fn send<M: Serialize + Bounded>(
        &mut self,
        message: &M,
        descriptor: Option<OwnedFd>,
    ) -> Result<(), ChannelError> {
        let mut bytes = Vec::with_capacity(128);
        frame::append(message, &mut bytes)?;
        if self.waiting_bytes + bytes.len() > MAX_WAITING {
            return Err(ChannelError::Deaf);
        }
        self.waiting_bytes += bytes.len();
        match self.waiting.back_mut() {
            // One system call for many small messages.
            Some(last) if descriptor.is_none() && last.bytes.len() < READ => {
                last.bytes.extend_from_slice(&bytes)
            }
            _ => self.waiting.push_back(Chunk { bytes, sent: 0, descriptor }),
        }
        Ok(())
    }

    /// Sends what waits. True: some of it still does.
    ///
    /// # Errors
    /// The other side is gone.
    pub fn flush(&mut self) -> Result<bool, ChannelError> {
        while let Some(chunk) = self.waiting.front_mut() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            let descriptors: Vec<BorrowedFd<'_>> = chunk.descriptor.iter().map(AsFd::as_fd).collect();
            if !descriptors.is_empty() {
                ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
            }
            let rest = chunk.bytes.get(chunk.sent..).unwrap_or_default();
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            let sent = sendmsg(&self.socket, &[IoSlice::new(rest)], &mut ancillary, flags);
            match sent {
                Ok(count) => {
                    chunk.sent += count;
                    self.waiting_bytes = self.waiting_bytes.saturating_sub(count);
                    chunk.descriptor = None;
                    if chunk.sent >= chunk.bytes.len() {
                        self.waiting.pop_front();
                    }
                }
                // Too many descriptors are on their way: later (unix(7), ETOOMANYREFS).
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::TOOMANYREFS) => return Ok(true),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => {
                    return Err(ChannelError::Closed);
                }
                Err(error) => return Err(ChannelError::Io(error)),
            }
        }
        Ok(false)
    }

    /// Reads once what has come. False: nothing had.
    ///
    /// # Errors
    /// The other side is gone, or sends too many descriptors.
    pub fn fill(&mut self) -> Result<bool, ChannelError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(RIGHTS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let received = recvmsg(&self.socket, &mut [IoSliceMut::new(&mut self.buffer)], &mut ancillary, flags);
        let count = match received {
            Ok(received) => received.bytes,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(false),
            Err(rustix::io::Errno::CONNRESET) => return Err(ChannelError::Closed),
            Err(error) => return Err(ChannelError::Io(error)),
        };
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                self.early.extend(descriptors);
            }
        }
        if self.early.len() > MAX_EARLY {
            return Err(ChannelError::Descriptors);
        }
        if count == 0 {
            return Err(ChannelError::Closed);
        }
        self.frames.push(self.buffer.get(..count).unwrap_or_default());
        Ok(true)
    }

    /// The next whole message of what was read.
    ///
    /// # Errors
    /// It is malformed.
    pub fn next_message<M: DeserializeOwned + Bounded>(&mut self) -> Result<Option<M>, ChannelError> {
        Ok(self.frames.next_message()?)
    }

    /// The descriptor of the message that came last.
    pub fn take_descriptor(&mut self) -> Option<OwnedFd> {
        self.early.pop_front()
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::relay::stream_pair;
    use kso_wire::provide::{ListenerId, Offer, StreamId, ToProvider};
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn descriptors_come_with_their_messages() {
        let (one, other) = stream_pair().unwrap();
        let (mut broker, mut provider) = (Channel::new(one), Channel::new(other));
        assert!(broker.passes_descriptors());
        let mut kept = Vec::new();
        for number in 0..20 {
            broker.send(&ToProvider::Ping(number), None).unwrap();
            let (own, given) = UnixStream::pair().unwrap();
            kept.push(own);
            let offer = Offer { listener: ListenerId(1), stream: StreamId(number) };
            broker.send(&ToProvider::Offer(offer), Some(given.into())).unwrap();
        }
        assert!(!broker.flush().unwrap());
        let mut seen = 0;
        while provider.fill().unwrap() {
            while let Some(message) = provider.next_message::<ToProvider>().unwrap() {
                let ToProvider::Offer(offer) = message else { continue };
                let mut stream = UnixStream::from(provider.take_descriptor().unwrap());
                stream.write_all(&[u8::try_from(offer.stream.0).unwrap()]).unwrap();
                seen += 1;
            }
        }
        assert_eq!(seen, 20);
        for (number, own) in kept.iter_mut().enumerate() {
            let mut byte = [0];
            own.read_exact(&mut byte).unwrap();
            assert_eq!(usize::from(byte[0]), number);
        }
        drop(broker);
        assert!(matches!(provider.fill(), Err(ChannelError::Closed)));
    }

    #[test]
    fn who_does_not_read_is_deaf_and_not_waited_for() {
        let (one, _other) = stream_pair().unwrap();
        let mut broker = Channel::new(one);
        let query = vec![0; 60_000];
        let refused = (0..1000).any(|id| {
            let message = ToProvider::Resolve { id, query: query.clone() };
            let sent = broker.send(&message, None);
            broker.flush().unwrap();
            matches!(sent, Err(ChannelError::Deaf))
        });
        assert!(refused);
    }
}
