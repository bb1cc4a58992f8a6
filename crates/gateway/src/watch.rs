//! The epoll instance of a gateway, and the requests it has under way.

use crate::streams::StreamKey;
use crate::table::Token;
use kso_wire::RequestId;
use rustix::event::epoll;
use rustix::io::Errno;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The TUN.
    Tun,
    /// A published datagram port, by its place.
    Published(u32),
    /// A datagram flow.
    Flow(Token),
    /// An echo flow.
    Echo(Token),
    /// A stream.
    Stream(Token),
}

/// The kind of source is in the upper two bits.
const KIND: u32 = 62;
const TUN: u64 = u32::MAX as u64;

impl Source {
    fn to_bits(self) -> u64 {
        match self {
            Self::Tun => TUN,
            Self::Published(index) => u64::from(index),
            Self::Flow(token) => 1 << KIND | token.to_bits(),
            Self::Echo(token) => 2 << KIND | token.to_bits(),
            Self::Stream(token) => 3 << KIND | token.to_bits(),
        }
    }

    fn from_bits(bits: u64) -> Self {
        let token = Token::from_bits(bits & ((1 << KIND) - 1));
        match bits >> KIND {
            0 if bits == TUN => Self::Tun,
            0 => Self::Published(bits as u32),
            1 => Self::Flow(token),
            2 => Self::Echo(token),
            _ => Self::Stream(token),
        }
    }
}

/// What is ready of a source.
#[derive(Clone, Copy, Debug)]
pub struct Ready {
    /// It can be read.
    pub readable: bool,
    /// It can be written.
    pub writable: bool,
    /// An error is pending or queued.
    pub error: bool,
}

/// At most so many events are taken at a time.
const EVENTS: usize = 64;

/// The epoll instance.
pub struct Watch {
    epoll: OwnedFd,
    events: Vec<epoll::Event>,
    ready: Vec<(Source, Ready)>,
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").field("epoll", &self.epoll).finish_non_exhaustive()
    }
}

impl Watch {
    /// Makes one.
    ///
    /// # Errors
    /// Too many open files.
    pub fn new() -> Result<Self, Errno> {
        Ok(Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            events: Vec::with_capacity(EVENTS),
            ready: Vec::with_capacity(EVENTS),
        })
    }

    /// Readable when something is ready.
    #[must_use]
    pub fn poll_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Watches for something to read, and for errors, as long as they last.
    ///
    /// # Errors
    /// No memory, or too many watches.
    pub fn add(&self, descriptor: impl AsFd, source: Source) -> Result<(), Errno> {
        epoll::add(
            &self.epoll,
            descriptor,
            epoll::EventData::new_u64(source.to_bits()),
            epoll::EventFlags::IN,
        )
    }

    /// Watches for something to read, and for room to write if it is wanted.
    ///
    /// # Errors
    /// It is not watched.
    pub fn watch_room(&self, descriptor: impl AsFd, source: Source, wanted: bool) -> Result<(), Errno> {
        let room = if wanted { epoll::EventFlags::OUT } else { epoll::EventFlags::empty() };
        let data = epoll::EventData::new_u64(source.to_bits());
        epoll::modify(&self.epoll, descriptor, data, epoll::EventFlags::IN | room)
    }

    /// Watches it no more.
    pub fn remove(&self, descriptor: impl AsFd) {
        let _ = epoll::delete(&self.epoll, descriptor);
    }

    /// Watches for changes in both directions.
    ///
    /// # Errors
    /// No memory, or too many watches.
    pub fn add_stream(&self, descriptor: impl AsFd, source: Source) -> Result<(), Errno> {
        let flags =
            epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
        epoll::add(&self.epoll, descriptor, epoll::EventData::new_u64(source.to_bits()), flags)
    }

    /// What is ready now. Give the vector back with [`Self::done`].
    pub fn take_ready(&mut self) -> Vec<(Source, Ready)> {
        let zero = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        self.events.clear();
        let _ = epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut self.events), Some(&zero));
        let mut ready = std::mem::take(&mut self.ready);
        ready.clear();
        ready.extend(self.events.iter().map(|event| {
            let flags = event.flags;
            let state = Ready {
                readable: flags
                    .intersects(epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::HUP),
                writable: flags.contains(epoll::EventFlags::OUT),
                error: flags.contains(epoll::EventFlags::ERR),
            };
            (Source::from_bits(event.data.u64()), state)
        }));
        ready
    }

    /// Takes the vector back.
    pub fn done(&mut self, ready: Vec<(Source, Ready)>) {
        self.ready = ready;
    }
}

/// Who waits for an answer.
#[derive(Clone, Debug)]
pub enum Waiting {
    /// A datagram flow that is to be opened.
    Flow(Token),
    /// An echo flow that is to be opened.
    Echo(Token),
    /// A stream that is to be connected.
    Stream(Token),
    /// A query that came in a datagram.
    Query {
        /// Who asked.
        asker: SocketAddr,
        /// At which of our addresses.
        asked: SocketAddr,
        /// How long the answer may be, bytes.
        limit: usize,
        /// The first bytes of the query, for an answer if there is none.
        head: Box<[u8]>,
    },
    /// A query that came by a stream.
    StreamQuery {
        /// Which.
        stream: Token,
        /// Of which connection.
        key: StreamKey,
        /// The first two bytes of the query.
        identification: [u8; 2],
    },
    /// A published port, by its place in the list of publications.
    Published(usize),
}

/// Header and one question with the longest name.
pub const QUERY_HEAD: usize = 12 + 255 + 4;

/// Requests that were not answered yet.
#[derive(Debug, Default)]
pub struct Requests {
    last: u64,
    waiting: HashMap<RequestId, Waiting>,
}

impl Requests {
    /// A name for a new request.
    pub fn add(&mut self, waiting: Waiting) -> RequestId {
        self.last += 1;
        let id = RequestId::gateway(self.last);
        self.waiting.insert(id, waiting);
        id
    }

    /// The request was answered or is no longer wanted.
    pub fn take(&mut self, id: RequestId) -> Option<Waiting> {
        self.waiting.remove(&id)
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.waiting.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_survive_as_bits() {
        let token = Token::from_bits(u64::from(u32::MAX >> 2) << 32 | 77);
        for source in [
            Source::Tun,
            Source::Published(0),
            Source::Published(9),
            Source::Flow(token),
            Source::Echo(token),
            Source::Stream(token),
        ] {
            assert_eq!(Source::from_bits(source.to_bits()), source);
        }
    }
}
