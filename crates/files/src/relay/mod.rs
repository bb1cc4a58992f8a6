//! A share that another kernel performs: requests are sent to it as they are, but for numbers, and its death is survived.
//!
//! ```text
//!   transport --- request ---> Asker (one for each thread) ----- sent -----> stream ---> the file service there
//!                                |  the performer is away, or               |
//!                                |  does not know the node yet              | reply, matched by its number
//!                                v                                          v
//!                              mender: dials, mounts anew, finds      reader of the stream: checks, notes, renumbers
//!                                nodes by name, opens files again           |
//!                                                                           +--> Completer: the transport's reply
//! ```
//!
//! The client gets numbers of nodes and open files from here, so that it need not know when the performer becomes another. A
//! **life** is the time of one stream. Within it, numbers here stand for numbers there. When it ends, those there are void;
//! what the client uses next is looked up by name from the root, or opened again, and is the same only if inode number and
//! generation are. `rules.rs` says what becomes of requests that nobody knows the fate of.
//!
//! What a performer says is checked (see `replies.rs`). One that lies, or is silent though asked, is dropped, like a dead one.

mod asked;
mod asker;
mod files;
mod held;
mod lives;
mod mender;
mod nodes;
mod places;
mod replies;
mod rules;
mod tables;
#[cfg(test)]
mod tests;
mod trial;

pub use asker::Asker;
#[doc(hidden)]
pub use trial::{Fared, Trial};

use crate::abi::Features;
use crate::frames::Link;
use crate::hello::Boot;
use crate::inodes::lock;
use crate::locks::Completer;
use asked::{Asked, From};
use lives::Greeted;
use rustix::io::Errno;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};
use tables::Tables;

/// So often in a row it is dialled before those who wait are told.
pub const ATTEMPTS: u32 = 16;
/// At most so many requests are under way; who asks more waits.
const MAX_ASKED: usize = 2048;
/// At most so many of them wait for locks.
const MAX_LOCKS: usize = 1024;
/// Bytes of requests under way.
const MAX_BYTES: usize = 64 << 20;
/// A performer that was asked something, and is silent for so long, is asked whether it is there.
const QUIET: Duration = Duration::from_secs(15);
/// One that then still is silent is dead.
const PATIENCE: Duration = Duration::from_secs(60);
/// After all attempts were in vain, requests fail at once for so long.
const LOST: Duration = Duration::from_secs(5);
/// A request over which so many performers died is not asked again.
const MAX_DEATHS: u32 = 5;

/// The way to a file service on another kernel.
pub trait Dial: Send + Sync + std::fmt::Debug {
    /// A fresh connection: a stream socket at whose other end [`crate::stream::serve`] performs, perhaps each time another.
    /// May take seconds, while a kernel starts.
    ///
    /// # Errors
    /// There is none now.
    fn dial(&self) -> io::Result<OwnedFd>;
}

/// Why an answer is not passed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// The performer cannot be believed any more.
    Lie(&'static str),
    /// The client is told this instead.
    Errno(Errno),
}

/// Where the performer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// There is none, and who needs one wakes the mender.
    Away,
    /// The mender speaks with one that is not ready.
    Mending,
    /// Requests are sent to it.
    Ready,
    /// None could be found; until then nobody tries again.
    Lost(Instant),
    /// The relay is at its end.
    Closed,
}

/// What was agreed on with the client.
#[derive(Clone, Copy, Debug)]
struct Agreed {
    init: crate::abi::InitIn,
    features: Features,
    max_write: u32,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    tables: Tables,
    /// To the performer of this life.
    link: Option<Arc<Link>>,
    /// A performer that was dialled to see whether there is one.
    spare: Option<Greeted>,
    /// Which client this is: numbers of an earlier one's requests mean nothing.
    client: u64,
    agreed: Option<Agreed>,
    /// Which kernel performed last.
    boot: Option<Boot>,
    asked: HashMap<u64, Asked>,
    /// Tickets of those that wait for the mender.
    waiting: VecDeque<u64>,
    next_ticket: u64,
    bytes: usize,
    locks: usize,
    /// Lives in a row in which the client got no answer.
    fruitless: u32,
    /// When the performer last said something, or was first asked something.
    heard: Instant,
    pinged: Option<u64>,
    /// Why the client's mounting failed.
    failure: Option<String>,
}

#[derive(Debug)]
struct Inner {
    dial: Arc<dyn Dial>,
    completer: Arc<dyn Completer>,
    state: Mutex<State>,
    /// The mender has something to do, or whoever waits for the end of something may look.
    changed: Condvar,
    /// There is room for a request.
    room: Condvar,
}

/// The relay of one client. Dropped, it lets the performer go.
#[derive(Debug)]
pub struct Relay(Arc<Inner>);

impl Relay {
    /// Nobody is dialled before the client mounts. `completer` gives the client its replies.
    ///
    /// # Errors
    /// Threads ran out.
    pub fn new(dial: Arc<dyn Dial>, completer: Arc<dyn Completer>) -> io::Result<Arc<Self>> {
        let state = State {
            phase: Phase::Away,
            tables: Tables::new(0),
            link: None,
            spare: None,
            client: 0,
            agreed: None,
            boot: None,
            asked: HashMap::new(),
            waiting: VecDeque::new(),
            next_ticket: 2,
            bytes: 0,
            locks: 0,
            fruitless: 0,
            heard: Instant::now(),
            pinged: None,
            failure: None,
        };
        let inner = Arc::new(Inner {
            dial,
            completer,
            state: Mutex::new(state),
            changed: Condvar::new(),
            room: Condvar::new(),
        });
        let mender = inner.clone();
        std::thread::Builder::new().name("kso-relay".into()).spawn(move || mender.mend())?;
        Ok(Arc::new(Self(inner)))
    }

    /// Dials, so that it is known whether there is a performer. The client's mount then uses this connection.
    ///
    /// # Errors
    /// There is none, or it is no file service of this version.
    pub fn reach(&self) -> io::Result<()> {
        let greeted = self.0.greet()?;
        lock(&self.0.state).spare = Some(greeted);
        Ok(())
    }

    /// Waits until the client's mount was answered.
    ///
    /// # Errors
    /// It was refused, or nobody answers.
    pub fn mounted(&self, limit: Duration) -> io::Result<()> {
        let until = Instant::now() + limit;
        let mut state = lock(&self.0.state);
        loop {
            if let Some(failure) = &state.failure {
                return Err(io::Error::other(failure.clone()));
            }
            if state.agreed.is_some() {
                return Ok(());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || state.phase == Phase::Closed {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let waited = self.0.changed.wait_timeout(state, left.min(Duration::from_millis(50)));
            state = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
    }

    /// The client is gone: its requests are not answered, and what it had open is closed.
    pub fn disconnect(&self) {
        self.0.forget_client();
    }

    /// No more requests are performed.
    pub fn close(&self) {
        self.0.forget_client();
        lock(&self.0.state).phase = Phase::Closed;
        self.0.changed.notify_all();
        self.0.room.notify_all();
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.close();
    }
}

impl State {
    /// Numbers a request and keeps it.
    fn keep(&mut self, asked: Asked) -> u64 {
        let ticket = self.next_ticket;
        // Even, as a kernel's own numbers are: an odd one interrupts the one before it.
        self.next_ticket += 2;
        self.bytes += asked.frame.len();
        self.locks += usize::from(asked.opcode == crate::abi::Opcode::SetLkW);
        self.asked.insert(ticket, asked);
        ticket
    }

    /// It is answered.
    fn take(&mut self, ticket: u64) -> Option<Asked> {
        let asked = self.asked.remove(&ticket)?;
        self.bytes -= asked.frame.len();
        self.locks -= usize::from(asked.opcode == crate::abi::Opcode::SetLkW);
        Some(asked)
    }

    /// Lets go of the performer.
    #[must_use]
    fn leave(&mut self) -> Option<Arc<Link>> {
        if !matches!(self.phase, Phase::Closed) {
            self.phase = Phase::Away;
        }
        self.pinged = None;
        let life = self.tables.life() + 1;
        self.tables.begin(life);
        self.link.take()
    }
}

impl Inner {
    /// Everything of the client is forgotten.
    fn forget_client(&self) {
        let mut state = lock(&self.state);
        let link = state.leave();
        state.client += 1;
        state.tables = Tables::new(state.tables.life());
        state.agreed = None;
        state.failure = None;
        state.boot = None;
        state.fruitless = 0;
        state.waiting.clear();
        let before = std::mem::take(&mut state.asked);
        (state.bytes, state.locks) = (0, 0);
        drop(state);
        // Who waits for an answer of the performer's gets none.
        drop(before);
        if let Some(link) = link {
            link.end();
        }
        self.room.notify_all();
        self.changed.notify_all();
    }

    /// Answers a request that was taken out with an error, or without.
    fn answer(&self, ticket: u64, asked: Asked, error: Option<Errno>) {
        match asked.from {
            From::Client { unique, .. } => {
                let error = error.map_or(0, Errno::raw_os_error);
                self.completer.reply(ticket, &crate::worker::bare_reply(unique, error));
            }
            From::Relay(to) => {
                let _ = to.try_send(error.map_or_else(|| Ok(Vec::new()), Err));
            }
        }
        self.room.notify_all();
    }
}
