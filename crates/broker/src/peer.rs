//! A runner in another process: one session over a `SOCK_SEQPACKET` socket.
//!
//! ```text
//!   connected -- Hello --> open -- Request, Forget --> open
//!       |                   |
//!       +-- Guest --> the launcher of a guest, which says no more
//!       |                   |
//!       +-- anything else --+-- malformed, too many unanswered, gone --> closed
//! ```

use crate::session::SessionId;
use kso_devices::vsock::GuestId;
use kso_wire::{
    Answer, Failure, MAX_MESSAGE, MAX_PENDING, MAX_PORTS, RequestId, ToBroker, ToRunner, decode, encode,
};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use std::collections::{HashSet, VecDeque};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Why a session ends before its runner does.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PeerError {
    #[error("it sent what is no message: {0}")]
    Malformed(#[from] kso_wire::CodecError),
    #[error("it sent a message that does not belong here")]
    OutOfOrder,
    #[error("it used the identifier of an unanswered request again")]
    UsedTwice,
    #[error("it does not read its answers")]
    Deaf,
    #[error("its socket failed: {0}")]
    Socket(rustix::io::Errno),
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Peer {
    socket: OwnedFd,
    pub session: Option<SessionId>,
    /// It launched this guest.
    pub guest: Option<GuestId>,
    pending: HashSet<RequestId>,
    waiting: VecDeque<(Vec<u8>, Option<OwnedFd>)>,
    /// The loop tells when the socket can be written.
    watched: bool,
}

/// What came.
#[allow(clippy::large_enum_variant)] // There is one at a time, and it is taken apart at once.
pub(crate) enum Received {
    /// With the descriptors that rode along.
    Message(ToBroker, Vec<OwnedFd>),
    Nothing,
    Gone,
}

impl Peer {
    pub fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            session: None,
            guest: None,
            pending: HashSet::new(),
            waiting: VecDeque::new(),
            watched: false,
        }
    }

    /// The next message, if one is there.
    pub fn receive(&self, buffer: &mut [u8]) -> Result<Received, PeerError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        loop {
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            // TRUNC tells the whole length: what is longer than any message is none.
            let flags = RecvFlags::DONTWAIT | RecvFlags::TRUNC | RecvFlags::CMSG_CLOEXEC;
            let mut slices = [IoSliceMut::new(buffer)];
            let received = match rustix::net::recvmsg(&self.socket, &mut slices, &mut ancillary, flags) {
                Ok(received) => received,
                Err(rustix::io::Errno::AGAIN) => return Ok(Received::Nothing),
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::CONNRESET) => return Ok(Received::Gone),
                Err(error) => return Err(PeerError::Socket(error)),
            };
            let descriptors = ancillary
                .drain()
                .flat_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect(),
                    _ => Vec::new(),
                })
                .collect();
            return match received.bytes {
                0 => Ok(Received::Gone),
                length if length > buffer.len() => Err(kso_wire::CodecError::TooLong(length).into()),
                length => {
                    let bytes = buffer.get(..length).unwrap_or_default();
                    Ok(Received::Message(decode(bytes)?, descriptors))
                }
            };
        }
    }

    /// Notes a request. False: there are too many, and it is refused.
    pub fn begin(&mut self, id: RequestId) -> Result<bool, PeerError> {
        if self.pending.contains(&id) {
            return Err(PeerError::UsedTwice);
        }
        if self.pending.len() >= MAX_PENDING {
            return Ok(false);
        }
        self.pending.insert(id);
        Ok(true)
    }

    pub fn forget(&mut self, id: RequestId) {
        self.pending.remove(&id);
    }

    pub fn refuse_busy(&mut self, id: RequestId) -> Result<(), PeerError> {
        self.send_answer(id, Answer::plain(Err(Failure::kernel(kso_wire::Errno::ENOBUFS))))
    }

    /// Sends the answer, unless nobody waits for it any more.
    pub fn answer(&mut self, id: RequestId, answer: Answer) -> Result<(), PeerError> {
        if self.pending.remove(&id) { self.send_answer(id, answer) } else { Ok(()) }
    }

    fn send_answer(&mut self, id: RequestId, answer: Answer) -> Result<(), PeerError> {
        let Answer { result, descriptor } = answer;
        self.send(&ToRunner::Answered { id, result, descriptor: descriptor.is_some() }, descriptor)
    }

    pub fn send(&mut self, message: &ToRunner, descriptor: Option<OwnedFd>) -> Result<(), PeerError> {
        let bytes = encode(message)?;
        if self.waiting.is_empty() && self.transmit(&bytes, descriptor.as_ref().map(AsFd::as_fd))? {
            return Ok(());
        }
        if self.waiting.len() >= MAX_PENDING {
            return Err(PeerError::Deaf);
        }
        self.waiting.push_back((bytes, descriptor));
        Ok(())
    }

    /// Whether the loop has to tell when the socket can be written, if that changed.
    pub fn wants_out(&mut self) -> Option<bool> {
        let wants = !self.waiting.is_empty();
        let changed = wants != self.watched;
        self.watched = wants;
        changed.then_some(wants)
    }

    /// Sends what waits. The loop calls it when the socket can be written.
    pub fn flush(&mut self) -> Result<(), PeerError> {
        while let Some((bytes, descriptor)) = self.waiting.front() {
            if !self.transmit(bytes, descriptor.as_ref().map(AsFd::as_fd))? {
                break;
            }
            self.waiting.pop_front();
        }
        Ok(())
    }

    /// False: it cannot be sent now.
    fn transmit(&self, bytes: &[u8], descriptor: Option<BorrowedFd<'_>>) -> Result<bool, PeerError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let descriptors = [descriptor].into_iter().flatten().collect::<Vec<_>>();
        if !descriptors.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        loop {
            match rustix::net::sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut ancillary, flags) {
                Ok(_) => return Ok(true),
                // Too many descriptors are on their way (unix(7), ETOOMANYREFS): later.
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::TOOMANYREFS) => return Ok(false),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(PeerError::Socket(error)),
            }
        }
    }
}

impl AsFd for Peer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Most descriptors that a message brings: a guest's socket, and one for each port.
const MAX_DESCRIPTORS: usize = MAX_PORTS + 1;

/// Room for any message and a byte more.
pub(crate) const BUFFER: usize = MAX_MESSAGE + 1;
