//! Streams that begin with tickets, where no descriptor can be passed: each is joined with the message that names it.
//!
//! ```text
//!   a connection begins with a ticket --> Registry --> mailbox of the session --> came --+
//!                                                                                        +--> both
//!   the control stream names a stream: Connect, Offer ----------------------> named -----+
//!
//!   whichever comes first waits for the other; after PATIENCE it is given up
//! ```

use kso_wire::provide::{StreamId, Ticket};
use rustix::event::{EventfdFlags, eventfd};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// So long one half waits for the other.
const PATIENCE: Duration = Duration::from_secs(20);
/// Streams of a session that may have come before they were named.
const MAX_EARLY: usize = 4096;

/// Why a stream is closed again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unclaimed {
    /// Its ticket is of no session that there is.
    #[error("its ticket is of no session here")]
    Unknown,
    /// Too many came that nobody has named yet.
    #[error("too many streams came before they were named")]
    TooMany,
}

/// The sessions of a process that have streams with tickets.
#[derive(Debug, Default)]
pub(super) struct Registry {
    sessions: Mutex<HashMap<u128, Arc<Mailbox>>>,
}

#[derive(Debug)]
struct Mailbox {
    arrived: Mutex<Vec<(StreamId, OwnedFd)>>,
    wake: OwnedFd,
}

/// What a session has in the registry, until it is dropped.
#[derive(Debug)]
pub(super) struct Membership {
    registry: Arc<Registry>,
    mailbox: Arc<Mailbox>,
    /// What its tickets begin with.
    pub number: u128,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing here panics while it holds one.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Registry {
    /// A new session, with a number that nobody can guess.
    pub fn join(self: &Arc<Self>) -> io::Result<Membership> {
        let mut bytes = [0; 16];
        // Sixteen bytes come whole, or not at all (getrandom(2)).
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        let number = u128::from_ne_bytes(bytes);
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let mailbox = Arc::new(Mailbox { arrived: Mutex::default(), wake });
        locked(&self.sessions).insert(number, Arc::clone(&mailbox));
        Ok(Membership { registry: Arc::clone(self), mailbox, number })
    }

    /// A connection began with this ticket.
    pub fn claim(&self, ticket: Ticket, stream: OwnedFd) -> Result<(), Unclaimed> {
        let mailbox =
            locked(&self.sessions).get(&ticket.session).map(Arc::clone).ok_or(Unclaimed::Unknown)?;
        let mut arrived = locked(&mailbox.arrived);
        if arrived.len() >= MAX_EARLY {
            return Err(Unclaimed::TooMany);
        }
        arrived.push((ticket.stream, stream));
        // Full: it is awake.
        let _ = rustix::io::write(&mailbox.wake, &1_u64.to_ne_bytes());
        Ok(())
    }
}

impl Membership {
    /// Readable when [`Self::arrived`] has something.
    pub fn wake(&self) -> BorrowedFd<'_> {
        self.mailbox.wake.as_fd()
    }

    /// What has come.
    pub fn arrived(&self) -> Vec<(StreamId, OwnedFd)> {
        let _ = rustix::io::read(&self.mailbox.wake, &mut [0_u8; 8]);
        std::mem::take(&mut *locked(&self.mailbox.arrived))
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        locked(&self.registry.sessions).remove(&self.number);
    }
}

/// Where streams and what names them meet. Pure.
#[derive(Debug)]
pub(super) struct Meeting<S, N> {
    came: HashMap<StreamId, (Instant, S)>,
    named: HashMap<StreamId, (Instant, N)>,
}

impl<S, N> Meeting<S, N> {
    pub fn new() -> Self {
        Self { came: HashMap::new(), named: HashMap::new() }
    }

    /// A stream came. Of two with one name the first counts.
    pub fn came(&mut self, id: StreamId, stream: S, now: Instant) -> Option<(S, N)> {
        if let Some((_, name)) = self.named.remove(&id) {
            return Some((stream, name));
        }
        if self.came.len() < MAX_EARLY {
            self.came.entry(id).or_insert((now, stream));
        }
        None
    }

    /// A stream was named.
    pub fn named(&mut self, id: StreamId, name: N, now: Instant) -> Option<(S, N)> {
        if let Some((_, stream)) = self.came.remove(&id) {
            return Some((stream, name));
        }
        self.named.insert(id, (now, name));
        None
    }

    /// Whether a stream was named and has not come.
    pub fn awaits(&self, id: StreamId) -> bool {
        self.named.contains_key(&id)
    }

    /// Streams that were named and have not come.
    pub fn awaited(&self) -> usize {
        self.named.len()
    }

    /// Forgets names.
    pub fn forget(&mut self, which: impl Fn(&N) -> bool) {
        self.named.retain(|_, (_, name)| !which(name));
    }

    /// What was named too long ago. Streams that came too long ago are closed.
    pub fn expire(&mut self, now: Instant) -> Vec<(StreamId, N)> {
        let old = |since: Instant| now.saturating_duration_since(since) >= PATIENCE;
        self.came.retain(|_, (since, _)| !old(*since));
        self.named.extract_if(|_, (since, _)| old(*since)).map(|(id, (_, name))| (id, name)).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::relay::stream_pair;
    use proptest::prelude::*;

    #[test]
    fn a_stream_comes_to_the_session_of_its_ticket() {
        let registry = Arc::new(Registry::default());
        let (one, two) = (registry.join().unwrap(), registry.join().unwrap());
        assert_ne!(one.number, two.number);
        let stream = || stream_pair().unwrap().0;
        registry.claim(Ticket { session: one.number, stream: StreamId(7) }, stream()).unwrap();
        let arrived = one.arrived();
        assert_eq!(arrived.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [StreamId(7)]);
        assert!(two.arrived().is_empty() && one.arrived().is_empty());
        let unknown = Ticket { session: one.number ^ two.number, stream: StreamId(7) };
        assert_eq!(registry.claim(unknown, stream()), Err(Unclaimed::Unknown));
        let gone = Ticket { session: two.number, stream: StreamId(7) };
        drop(two);
        assert_eq!(registry.claim(gone, stream()), Err(Unclaimed::Unknown));
    }

    #[test]
    fn one_half_waits_for_the_other_but_not_for_ever() {
        let mut meeting = Meeting::new();
        let now = Instant::now();
        assert_eq!(meeting.named(StreamId(1), "a", now), None);
        assert!(meeting.awaits(StreamId(1)));
        assert_eq!(meeting.came(StreamId(2), 2, now), None);
        assert_eq!(meeting.came(StreamId(2), 3, now), None, "the first counts");
        assert!(meeting.expire(now + PATIENCE / 2).is_empty());
        assert_eq!(meeting.came(StreamId(1), 1, now), Some((1, "a")));
        assert_eq!(meeting.named(StreamId(2), "b", now), Some((2, "b")));
        meeting.named(StreamId(3), "c", now);
        meeting.came(StreamId(4), 4, now);
        assert_eq!(meeting.expire(now + PATIENCE), [(StreamId(3), "c")]);
        assert_eq!(meeting.named(StreamId(4), "d", now), None, "it was closed");
        meeting.forget(|name| *name == "d");
        assert_eq!(meeting.awaited(), 0);
    }

    proptest! {
        #[test]
        fn in_whatever_order_each_is_joined_once(order in proptest::collection::vec((any::<bool>(), 0_u64..8), 0..64)) {
            let (mut meeting, now) = (Meeting::new(), Instant::now());
            let mut counts: HashMap<u64, (usize, usize, usize)> = HashMap::new();
            for (is_stream, id) in order {
                let count = counts.entry(id).or_default();
                // A session names none twice while it waits.
                if !is_stream && meeting.awaits(StreamId(id)) {
                    continue;
                }
                let both = if is_stream { meeting.came(StreamId(id), id, now) } else { meeting.named(StreamId(id), id, now) };
                count.0 += usize::from(is_stream);
                count.1 += usize::from(!is_stream);
                if let Some((stream, name)) = both {
                    prop_assert_eq!((stream, name), (id, id));
                    count.2 += 1;
                }
                prop_assert!(count.2 <= count.0.min(count.1));
            }
        }
    }
}
