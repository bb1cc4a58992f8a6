//! Between a broker and a provider on another kernel.
//!
//! ```text
//!   broker                                              provider
//!     | -- Hello ----------------------------------------> |
//!     | <------------------------------- Welcome, Refused  |
//!     | -- Connect{stream, peer, ..} + stream -----------> |
//!     | <----------------- Connected{stream} | Failed      |
//!     | -- Listen{listener, ..} -------------------------> |
//!     | <------------- Listening{listener} | NotListening  |
//!     | -- Offer{listener, stream} + stream -------------> |   the streams of connections to come
//!     | <----------------- Accepted{listener, stream, ..}  |   uses up an offer
//!     | <------------------------------- Failed{stream}    |   one that did not arrive
//!     | <-------------------------------- Ended{stream}    |   nothing of it is left
//!     | -- Share{stream, path, ..} + stream -------------> |
//!     | <----------------- Shared{stream} | Failed         |   then FUSE requests and replies on the stream
//!     | <-------------------------------- Ended{stream}    |
//!     | -- Ping ---------------------------------> Pong    |
//! ```
//!
//! These messages say what is to be done; the bytes of a socket never pass here. Each socket has a **stream** of
//! its own, with the flow control of whatever carries it: a slow socket stalls no other. The broker makes every
//! stream: where a descriptor can be passed it rides on the message that names it ([`Connect`], [`Offer`], [`Share`]),
//! elsewhere the stream begins with a [`Ticket`]. A provider accepts a connection only when it has a stream for
//! it, so the queue of those that wait is the external kernel's own.
//!
//! **How a stream ends.** Each side says that it sends no more by shutting down its direction. A stream that is
//! closed before both directions were shut down is a connection that was reset. So the death of either side, or of
//! the kernel between them, resets its connections without anybody having to say so.

use crate::codec::Bounded;
use crate::message::{MAX_DNS, MAX_MESSAGE_TEXT};
use crate::{Errno, Family, OptionName, OptionValue, SocketOptions};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, SocketAddr};

/// Version of these messages.
pub const PROVIDE_VERSION: u16 = 2;
/// Most streams of a session.
pub const MAX_STREAMS: usize = 65_536;
/// Most listeners of a session.
pub const MAX_LISTENERS: usize = 4096;
/// Most streams that wait at a listener for connections.
pub const MAX_OFFERS: usize = 64;
/// Most questions of a session that are unanswered.
pub const MAX_QUESTIONS: usize = 1024;
/// Most addresses of a provider.
pub const MAX_ADDRESSES: usize = 64;
/// Longest name, bytes.
pub const MAX_NAME: usize = 128;
/// Longest path of a directory, bytes (`PATH_MAX` of Linux).
pub const MAX_PATH: usize = 4096;

/// What can be outsourced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Service {
    /// Streams out.
    TcpConnect,
    /// Streams in.
    TcpListen,
    /// Datagrams.
    Udp,
    /// Echo requests.
    Ping,
    /// Names.
    Names,
    /// Files.
    Files,
}

impl Service {
    /// All there are.
    pub const ALL: [Self; 6] =
        [Self::TcpConnect, Self::TcpListen, Self::Udp, Self::Ping, Self::Names, Self::Files];

    /// Its name, as routes have it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::TcpConnect => "tcp-connect",
            Self::TcpListen => "tcp-listen",
            Self::Udp => "udp",
            Self::Ping => "ping",
            Self::Names => "names",
            Self::Files => "files",
        }
    }
}

/// Names a stream within its session. The broker chooses it, and uses none twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct StreamId(pub u64);

/// Names a listener within its session. The broker chooses it, and uses none twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ListenerId(pub u64);

/// The first bytes of a stream that cannot ride on a message: [`Self::bytes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Ticket {
    /// [`Welcome::session`].
    pub session: u128,
    /// Which stream of it.
    pub stream: StreamId,
}

impl Ticket {
    /// Bytes of a ticket.
    pub const SIZE: usize = 28;
    /// No frame of a control stream begins so: as a length it is over [`crate::frame::MAX_FRAME`].
    const MARK: [u8; 4] = *b"ksoT";

    /// As it is sent.
    #[must_use]
    pub fn bytes(self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        let parts = Self::MARK.into_iter().chain(self.session.to_le_bytes());
        let parts = parts.chain(self.stream.0.to_le_bytes());
        bytes.iter_mut().zip(parts).for_each(|(to, from)| *to = from);
        bytes
    }

    /// As it was received; `None`: it is no ticket.
    #[must_use]
    pub fn parse(bytes: &[u8; Self::SIZE]) -> Option<Self> {
        let (mark, rest) = bytes.split_first_chunk::<4>()?;
        let (session, rest) = rest.split_first_chunk::<16>()?;
        let (stream, _) = rest.split_first_chunk::<8>()?;
        let stream = StreamId(u64::from_le_bytes(*stream));
        (*mark == Self::MARK).then(|| Self { session: u128::from_le_bytes(*session), stream })
    }

    /// Whether a connection that begins with these bytes is a stream, not a control stream.
    #[must_use]
    pub fn is_begun_by(bytes: [u8; 4]) -> bool {
        bytes == Self::MARK
    }
}

/// Connect: [`ToBroker::Connected`] or [`ToBroker::Failed`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connect {
    /// Whose bytes go here.
    pub stream: StreamId,
    /// Where to.
    pub peer: SocketAddr,
    /// Family of the socket.
    pub family: Family,
    /// The port to connect from, if it is free there; 0: any.
    pub port: u16,
    /// Options to set before.
    pub options: SocketOptions,
}

/// Listen: [`ToBroker::Listening`] or [`ToBroker::NotListening`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listen {
    /// Named so from now on.
    pub listener: ListenerId,
    /// Where; port 0 is any.
    pub address: SocketAddr,
    /// Connections that may wait.
    pub backlog: i32,
    /// Options to set before.
    pub options: SocketOptions,
}

/// The stream of a connection to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// At this listener.
    pub listener: ListenerId,
    /// The stream.
    pub stream: StreamId,
}

/// What the client of a directory may remember.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Caching {
    /// Nothing: for directories to which several clients write.
    None,
    /// What a look now and then shows to be unchanged.
    #[default]
    Auto,
    /// Everything: for what nobody else writes.
    Always,
}

/// Serve a directory: [`ToBroker::Shared`] or [`ToBroker::Failed`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// Where requests come from, and replies go to.
    pub stream: StreamId,
    /// The directory, one that the provider offers or beneath it: an absolute path of its kernel, of at most
    /// [`MAX_PATH`] bytes.
    pub path: Vec<u8>,
    /// Nothing is to be written.
    pub read_only: bool,
    /// What the client remembers.
    pub caching: Caching,
}

/// What is asked about a stream's socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Question {
    /// `getsockopt`: [`Reply::Value`].
    GetOption(OptionName),
    /// `setsockopt`: [`Reply::Done`].
    SetOption(OptionName, OptionValue),
    /// `getsockname`: [`Reply::Address`].
    LocalAddress,
    /// `getpeername`: [`Reply::Address`].
    PeerAddress,
}

/// What came of a [`Question`] or a query.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// Done.
    Done,
    /// A number.
    Value(OptionValue),
    /// An address.
    Address(SocketAddr),
    /// A DNS message.
    Resolved(Vec<u8>),
}

/// From a broker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToProvider {
    /// First message.
    Hello {
        /// [`PROVIDE_VERSION`].
        version: u16,
        /// Who asks, for logs.
        name: String,
    },
    /// See [`Connect`]; the stream rides along.
    Connect(Connect),
    /// See [`Listen`].
    Listen(Listen),
    /// See [`Offer`]; the stream rides along.
    Offer(Offer),
    /// The listener shall be closed, and its offers with it: [`ToBroker::Unlistened`], also if it is gone already.
    Unlisten(ListenerId),
    /// Answered by [`ToBroker::Answered`].
    Ask {
        /// Named so.
        id: u64,
        /// About.
        stream: StreamId,
        /// What.
        question: Question,
    },
    /// A DNS query of at most [`MAX_DNS`] bytes; answered by [`ToBroker::Answered`].
    Resolve {
        /// Named so.
        id: u64,
        /// RFC 1035.
        query: Vec<u8>,
    },
    /// Answered by [`ToBroker::Pong`].
    Ping(u64),
    /// See [`Share`]; the stream rides along.
    Share(Share),
}

/// Takes a broker in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// [`PROVIDE_VERSION`].
    pub version: u16,
    /// The kernel, as uname(2) tells: `Linux 6.12.1`.
    pub kernel: String,
    /// What it performs.
    #[serde(deserialize_with = "crate::codec::at_most::<_, _, 6>")]
    pub services: Vec<Service>,
    /// Its addresses; the first of a family is the one that connections come from.
    #[serde(deserialize_with = "crate::codec::at_most::<_, _, MAX_ADDRESSES>")]
    pub addresses: Vec<IpAddr>,
    /// First part of every [`Ticket`]; nobody can guess it.
    pub session: u128,
}

/// From a provider.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToBroker {
    /// The session is open.
    Welcome(Welcome),
    /// It is not, and why.
    Refused(String),
    /// A connection is established.
    Connected {
        /// Which.
        stream: StreamId,
        /// `getsockname`.
        local: SocketAddr,
    },
    /// A connection, or a directory, failed; its stream is gone. Of a stream that was offered: it did not come, or broke.
    Failed {
        /// Which.
        stream: StreamId,
        /// Why.
        errno: Errno,
    },
    /// A listener listens.
    Listening {
        /// Which.
        listener: ListenerId,
        /// `getsockname`.
        local: SocketAddr,
    },
    /// A listener failed, at once or later; it is gone, and its offers with it.
    NotListening {
        /// Which.
        listener: ListenerId,
        /// Why.
        errno: Errno,
    },
    /// A connection came in.
    Accepted {
        /// At which listener.
        listener: ListenerId,
        /// The stream that was offered.
        stream: StreamId,
        /// `getpeername`.
        peer: SocketAddr,
        /// `getsockname`.
        local: SocketAddr,
    },
    /// A connection is over, or a directory is served no more.
    Ended {
        /// Which.
        stream: StreamId,
        /// Bytes that the peer sent.
        bytes_in: u64,
        /// Bytes that the peer was sent.
        bytes_out: u64,
        /// What broke it, if something did.
        errno: Option<Errno>,
    },
    /// What came of a question.
    Answered {
        /// Its name.
        id: u64,
        /// The outcome.
        result: Result<Reply, Errno>,
    },
    /// It lives.
    Pong(u64),
    /// It is about to end and takes nothing new. The broker leaves when its connections there have ended; it is not waited for
    /// for long.
    Draining,
    /// A listener is closed as was asked. What was offered and not accepted is gone.
    Unlistened(ListenerId),
    /// A directory is served.
    Shared {
        /// On which stream.
        stream: StreamId,
    },
}

impl Bounded for ToProvider {
    fn over_bound(&self) -> Option<&'static str> {
        match self {
            Self::Hello { name, .. } => (name.len() > MAX_NAME).then_some("name"),
            Self::Resolve { query, .. } => (query.len() > MAX_DNS).then_some("query"),
            Self::Share(share) => (share.path.len() > MAX_PATH).then_some("path"),
            // Options keep their bound by their type.
            _ => None,
        }
    }
}

impl Bounded for ToBroker {
    fn over_bound(&self) -> Option<&'static str> {
        match self {
            Self::Welcome(welcome) if welcome.kernel.len() > MAX_NAME => Some("kernel"),
            Self::Welcome(welcome) if welcome.addresses.len() > MAX_ADDRESSES => Some("addresses"),
            Self::Welcome(welcome) if welcome.services.len() > Service::ALL.len() => Some("services"),
            Self::Refused(reason) => (reason.len() > MAX_MESSAGE_TEXT).then_some("reason"),
            Self::Answered { result: Ok(Reply::Resolved(bytes)), .. } => {
                (bytes.len() > MAX_DNS).then_some("answer")
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;
