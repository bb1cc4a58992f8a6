//! A thread of the transport's that asks: what [`crate::Worker`] is where requests are performed.

use super::asked::{Asked, From, Now};
use super::places::Places;
use super::{Inner, MAX_ASKED, MAX_BYTES, MAX_LOCKS, Phase, Relay};
use crate::abi::{self, Features, IN_HEADER, InHeader, InterruptIn, Opcode};
use crate::buffers::Pieces;
use crate::frames::{MAX_FRAME, bare_request};
use crate::inodes::lock;
use crate::request::{self, MAX_REQUEST, Operation, Request};
use crate::worker::{Outcome, reply};
use rustix::io::Errno;
use std::sync::Arc;
use std::time::Instant;
use zerocopy::{FromBytes, IntoBytes};

/// Asks for one thread.
#[derive(Debug)]
pub struct Asker(Arc<Inner>);

/// What became of a request here.
enum Taken {
    Later(u64),
    Answered(Option<Errno>),
    Silent,
}

impl Relay {
    /// One more thread asks.
    #[must_use]
    pub fn asker(&self) -> Asker {
        Asker(self.0.clone())
    }
}

impl Asker {
    /// Asks what is in `readable`. The reply goes to `writable` if it is known at once; otherwise it comes later, and has at
    /// most as many bytes.
    pub fn serve(&mut self, readable: Pieces<'_>, writable: Pieces<'_>) -> Outcome {
        let mut head = [0; IN_HEADER];
        if readable.read(&mut head) < head.len() {
            return Outcome::Silent;
        }
        let Some(header) = request::header(&head) else { return Outcome::Silent };
        let answer = |error: Option<Errno>| {
            let error = error.map_or(0, |error| -error.raw_os_error());
            reply(writable, header.unique, error, &[], 0)
        };
        let limit = if header.opcode == Opcode::Write as u32 { MAX_FRAME } else { MAX_REQUEST };
        let total = readable.len();
        if header.len as usize != total || total > limit {
            return answer(Some(Errno::INVAL));
        }
        let mut bytes = vec![0; total];
        let got = readable.read(&mut bytes);
        bytes.truncate(got);
        // The memory may be another's, who has changed it since.
        for (to, from) in bytes.iter_mut().zip(head) {
            *to = from;
        }
        match self.take(header, bytes, writable.len()) {
            Taken::Later(ticket) => Outcome::Later(ticket),
            Taken::Answered(error) => answer(error),
            Taken::Silent => Outcome::Silent,
        }
    }

    fn take(&self, header: InHeader, bytes: Vec<u8>, room: usize) -> Taken {
        let long_xattr = lock(&self.0.state).tables.has(Features::SETXATTR_EXT);
        let body = bytes.get(IN_HEADER..).unwrap_or_default();
        let operation = match Request::parse(header, body, long_xattr) {
            Ok(request) => request.operation,
            Err(error) => return Taken::Answered(Some(error)),
        };
        let Some(opcode) = Opcode::of(header.opcode) else { return Taken::Answered(Some(Errno::NOSYS)) };
        let from = From::Client { unique: header.unique, room };
        match operation {
            Operation::Other => Taken::Answered(Some(Errno::NOSYS)),
            Operation::Forget(lookups) => self.forget([(header.nodeid, lookups)].into_iter()),
            Operation::BatchForget(all) => {
                let all = all.chunks_exact(size_of::<abi::ForgetOne>());
                let all = all.filter_map(|one| abi::ForgetOne::read_from_bytes(one).ok());
                self.forget(all.map(|one| (one.nodeid, one.nlookup)))
            }
            Operation::Interrupt(unique) => self.interrupt(unique),
            Operation::Destroy => {
                self.0.forget_client();
                Taken::Answered(None)
            }
            Operation::Init { .. } => {
                self.0.forget_client();
                let asked = Asked::own(from, opcode, bytes, false);
                let mut state = lock(&self.0.state);
                if state.phase == Phase::Closed {
                    return Taken::Answered(Some(Errno::IO));
                }
                let ticket = state.keep(asked);
                state.waiting.push_back(ticket);
                drop(state);
                self.0.changed.notify_all();
                Taken::Later(ticket)
            }
            _ => {
                let places = Places::of(&bytes, opcode, &operation);
                self.ask(Asked { places, ..Asked::own(from, opcode, bytes, long_xattr) })
            }
        }
    }

    /// Asks the performer, or lets the mender do so.
    fn ask(&self, mut asked: Asked) -> Taken {
        let mut state = lock(&self.0.state);
        while state.asked.len() >= MAX_ASKED || state.bytes + asked.frame.len() > MAX_BYTES {
            if state.phase == Phase::Closed {
                break;
            }
            state = self.0.room.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        let closes = matches!(asked.opcode, Opcode::Release | Opcode::ReleaseDir);
        if closes
            && state.phase != Phase::Ready
            && let Some(Now::Answer(error)) = asked.without_asking(&mut state.tables)
        {
            // Nobody needs to be found for this.
            return Taken::Answered(error);
        }
        match state.phase {
            Phase::Closed => return Taken::Answered(Some(Errno::IO)),
            Phase::Lost(until) if Instant::now() < until => return Taken::Answered(Some(Errno::IO)),
            // Nothing was mounted.
            _ if state.agreed.is_none() => return Taken::Answered(Some(Errno::IO)),
            _ => {}
        }
        if asked.opcode == Opcode::SetLkW && state.locks >= MAX_LOCKS {
            return Taken::Answered(Some(Errno::NOLCK));
        }
        if state.asked.is_empty() {
            state.heard = Instant::now();
        }
        let ticket = state.next_ticket;
        let link = match (state.phase, state.link.clone()) {
            (Phase::Ready, Some(link)) => match asked.prepare(ticket, &mut state.tables) {
                Now::Send(frame) => Some((link, frame)),
                Now::Answer(error) => return Taken::Answered(error),
                Now::Node(_) | Now::File(_) => None,
            },
            _ => None,
        };
        let sent = asked.sent.clone();
        state.keep(asked);
        match link {
            Some((link, frame)) => {
                drop(state);
                // If it cannot be sent, the end of this life takes care of it.
                let _ = link.send(&frame, Some(&sent));
            }
            None => {
                state.waiting.push_back(ticket);
                drop(state);
                self.0.changed.notify_all();
            }
        }
        Taken::Later(ticket)
    }

    fn forget(&self, nodes: impl Iterator<Item = (u64, u64)>) -> Taken {
        let mut state = lock(&self.0.state);
        for (node, lookups) in nodes {
            state.tables.nodes.forget(node, lookups);
        }
        drop(state);
        self.0.pass_forgotten();
        Taken::Silent
    }

    /// A signal came for who waits.
    fn interrupt(&self, unique: u64) -> Taken {
        let mut state = lock(&self.0.state);
        let found = state
            .asked
            .iter()
            .find(|(_, asked)| matches!(asked.from, From::Client { unique: own, .. } if own == unique));
        let Some((ticket, asked)) = found else { return Taken::Silent };
        let (ticket, lock_wait, asked_now) = (*ticket, asked.opcode == Opcode::SetLkW, asked.life.is_some());
        match state.link.clone().filter(|_| asked_now) {
            Some(link) => {
                drop(state);
                let head = InHeader {
                    len: (IN_HEADER + size_of::<InterruptIn>()) as u32,
                    ..bare_request(Opcode::Interrupt as u32, ticket | 1)
                };
                let body = InterruptIn { unique: ticket };
                let _ = link.send(&[head.as_bytes(), body.as_bytes()].concat(), None);
            }
            // What waits for a performer is answered in a bounded time; who waits for a lock may give up.
            None if lock_wait => {
                if let Some(asked) = state.take(ticket) {
                    drop(state);
                    self.0.answer(ticket, asked, Some(Errno::INTR));
                }
            }
            None => {}
        }
        Taken::Silent
    }
}

impl Inner {
    /// Tells the performer what it need not know any more.
    pub(super) fn pass_forgotten(&self) {
        let mut state = lock(&self.state);
        let forgotten = state.tables.nodes.take_forgotten();
        let link = state.link.clone();
        drop(state);
        let (Some(link), false) = (link, forgotten.is_empty()) else { return };
        // One frame for many would be no shorter by much.
        let mut frames = Vec::with_capacity(forgotten.len() * (IN_HEADER + 8));
        for (node, lookups) in forgotten {
            let head = InHeader {
                len: (IN_HEADER + size_of::<abi::ForgetIn>()) as u32,
                nodeid: node,
                ..bare_request(Opcode::Forget as u32, 0)
            };
            frames.extend_from_slice(head.as_bytes());
            frames.extend_from_slice(abi::ForgetIn { nlookup: lookups }.as_bytes());
        }
        let _ = link.send(&frames, None);
    }
}
