//! TIME_WAIT without sockets: which connections are over, and may still be spoken to by their peers. Pure.
//!
//! The last acknowledgement may be lost, and the peer says its last again: it is acknowledged again. A new connection of the same
//! peer's port takes the place of the old (RFC 9293, 3.6.1).

use crate::packet::Tuple;
use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

/// How long. Longer than peers repeat their last segment, for those whose network is not worse than most.
const WAIT: Duration = Duration::from_secs(30);
/// Most of them; the oldest goes first.
const MAX: usize = 16_384;

/// See the module.
#[derive(Debug, Default)]
pub struct Waiting {
    all: HashMap<Tuple, Instant>,
    order: VecDeque<(Instant, Tuple)>,
}

impl Waiting {
    /// A connection is over.
    pub fn insert(&mut self, tuple: Tuple, now: Instant) {
        self.expire(now);
        if self.order.len() >= MAX
            && let Some((until, tuple)) = self.order.pop_front()
        {
            self.forget(until, tuple);
        }
        self.all.insert(tuple, now + WAIT);
        self.order.push_back((now + WAIT, tuple));
    }

    /// Whether one of these ends was so.
    pub fn contains(&self, tuple: &Tuple, now: Instant) -> bool {
        self.all.get(tuple).is_some_and(|until| *until > now)
    }

    /// A new connection has these ends.
    pub fn remove(&mut self, tuple: &Tuple) {
        self.all.remove(tuple);
    }

    fn expire(&mut self, now: Instant) {
        while let Some((until, tuple)) = self.order.front().copied().filter(|(until, _)| *until <= now) {
            self.order.pop_front();
            self.forget(until, tuple);
        }
    }

    /// Unless the same ends wait anew.
    fn forget(&mut self, until: Instant, tuple: Tuple) {
        if self.all.get(&tuple) == Some(&until) {
            self.all.remove(&tuple);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn tuple(port: u16) -> Tuple {
        Tuple { local: ([192, 0, 2, 1], 80).into(), remote: ([192, 0, 2, 2], port).into() }
    }

    #[test]
    fn they_wait_for_a_while_and_not_all_of_them() {
        let (mut waiting, now) = (Waiting::default(), Instant::now());
        for port in 0..40_000 {
            waiting.insert(tuple(port), now);
        }
        assert_eq!((waiting.all.len(), waiting.order.len()), (MAX, MAX));
        assert!(waiting.contains(&tuple(39_999), now) && !waiting.contains(&tuple(0), now));
        waiting.remove(&tuple(39_999));
        assert!(!waiting.contains(&tuple(39_999), now));
        waiting.insert(tuple(1), now + WAIT);
        assert_eq!((waiting.all.len(), waiting.order.len()), (1, 1));
    }
}
