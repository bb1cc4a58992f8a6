//! A broker in another process: wire messages over a `SOCK_SEQPACKET` socket, descriptors by `SCM_RIGHTS`.

use kso_wire::{
    Answer, BrokerLink, Caller, Errno, Failure, Hello, MAX_MESSAGE, Request, RequestId, Submitted, ToBroker,
    ToRunner, Welcome, decode, encode,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, connect, recvmsg, send, socket_with,
};
use std::collections::{HashSet, VecDeque};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

/// The broker must welcome a session within this time.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(10);

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// No broker listens there.
    #[error("no broker answers at {path}: {source} (start one with: kso broker --listen {path})")]
    Connect {
        /// Its socket.
        path: String,
        /// What connect said.
        source: io::Error,
    },
    /// It refused, and says why.
    #[error("the broker refused the session: {0}")]
    Refused(String),
    /// It speaks something else.
    #[error("the broker sent what is no welcome: {0}")]
    Protocol(String),
    /// It does not answer.
    #[error("the broker did not answer within {} s", WELCOME_TIMEOUT.as_secs())]
    Silent,
    /// Input or output failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A session of a broker in another process.
#[derive(Debug)]
pub struct RemoteLink {
    socket: OwnedFd,
    /// Asked and not answered.
    waiting: HashSet<RequestId>,
    /// Answers made here, because the broker is gone or does not keep up.
    local: VecDeque<(RequestId, Answer)>,
    buffer: Vec<u8>,
    lost: bool,
}

impl RemoteLink {
    /// Opens a session.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn open(path: &Path, hello: Hello) -> Result<(Self, Welcome), LinkError> {
        let failed = |source: io::Error| LinkError::Connect { path: path.display().to_string(), source };
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(|error| failed(error.into()))?;
        let address = SocketAddrUnix::new(path).map_err(|error| failed(error.into()))?;
        connect(&socket, &address).map_err(|error| failed(error.into()))?;
        let mut link = Self {
            socket,
            waiting: HashSet::new(),
            local: VecDeque::new(),
            buffer: vec![0; MAX_MESSAGE],
            lost: false,
        };
        let bytes =
            encode(&ToBroker::Hello(hello)).map_err(|error| LinkError::Protocol(error.to_string()))?;
        send(&link.socket, &bytes, SendFlags::NOSIGNAL).map_err(io::Error::from)?;
        let timeout = Timespec { tv_sec: WELCOME_TIMEOUT.as_secs() as i64, tv_nsec: 0 };
        let mut polled = [PollFd::new(&link.socket, PollFlags::IN)];
        if poll(&mut polled, Some(&timeout)).map_err(io::Error::from)? == 0 {
            return Err(LinkError::Silent);
        }
        match link.receive()? {
            Some((ToRunner::Welcome(welcome), _)) => Ok((link, welcome)),
            Some((ToRunner::Refused(reason), _)) => Err(LinkError::Refused(reason)),
            Some((other, _)) => Err(LinkError::Protocol(format!("{other:?}"))),
            None => Err(LinkError::Protocol("it closed the connection".into())),
        }
    }

    /// The next message, if one is there. `None`: nothing is, or the broker is gone (then `lost` is set).
    fn receive(&mut self) -> io::Result<Option<(ToRunner, Option<OwnedFd>)>> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let received =
            match recvmsg(&self.socket, &mut [IoSliceMut::new(&mut self.buffer)], &mut ancillary, flags) {
                Ok(received) => received,
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(None),
                Err(error) => {
                    self.lost = true;
                    return Err(error.into());
                }
            };
        let mut descriptor = None;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(mut received) = message {
                descriptor = received.next();
            }
        }
        if received.bytes == 0 {
            self.lost = true;
            return Ok(None);
        }
        let bytes = self.buffer.get(..received.bytes).unwrap_or_default();
        match decode::<ToRunner>(bytes) {
            Ok(message) => Ok(Some((message, descriptor))),
            Err(error) => {
                self.lost = true;
                Err(io::Error::new(io::ErrorKind::InvalidData, error))
            }
        }
    }

    /// The broker is gone: whatever waits gets an answer now. The sandbox goes on without a network.
    fn give_up(&mut self) {
        if !self.waiting.is_empty() {
            tracing::warn!("the broker is gone: outside connections fail from now on");
        }
        for id in self.waiting.drain() {
            self.local.push_back((id, refusal(Errno::ENETDOWN)));
        }
    }
}

fn refusal(errno: Errno) -> Answer {
    Answer::plain(Err(Failure::kernel(errno)))
}

impl BrokerLink for RemoteLink {
    fn submit(&mut self, id: RequestId, caller: &Caller, request: Request) -> Submitted {
        if self.lost {
            return Submitted::Done(refusal(Errno::ENETDOWN));
        }
        let message = ToBroker::Request { id, caller: caller.clone(), request };
        let Ok(bytes) = encode(&message) else { return Submitted::Done(refusal(Errno::EMSGSIZE)) };
        match send(&self.socket, &bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(_) => {
                self.waiting.insert(id);
                Submitted::Pending
            }
            // The broker does not keep up: better an error than a queue without an end.
            Err(rustix::io::Errno::AGAIN) => Submitted::Done(refusal(Errno::ENOBUFS)),
            Err(_) => {
                self.lost = true;
                self.give_up();
                Submitted::Done(refusal(Errno::ENETDOWN))
            }
        }
    }

    fn forget(&mut self, id: RequestId) {
        if self.waiting.remove(&id)
            && let Ok(bytes) = encode(&ToBroker::Forget(id))
        {
            // Lost or late: its answer is dropped when it comes.
            let _ = send(&self.socket, &bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
        }
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        (!self.lost).then(|| self.socket.as_fd())
    }

    fn completed(&mut self) -> Option<(RequestId, Answer)> {
        loop {
            if let Some(answer) = self.local.pop_front() {
                return Some(answer);
            }
            if self.lost {
                return None;
            }
            match self.receive() {
                Ok(Some((ToRunner::Answered { id, result, descriptor: announced }, descriptor))) => {
                    // An answer that nobody waits for is dropped, and its descriptor closed.
                    if self.waiting.remove(&id) {
                        let descriptor = if announced { descriptor } else { None };
                        return Some((id, Answer { result, descriptor }));
                    }
                }
                Ok(Some(_)) => {}
                Ok(None) if !self.lost => return None,
                Ok(None) => self.give_up(),
                Err(error) => {
                    tracing::warn!(%error, "the broker's messages cannot be read");
                    self.lost = true;
                    self.give_up();
                }
            }
        }
    }
}
