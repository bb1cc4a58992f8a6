//! How a listener outside holds back what the guest does not take.
//!
//! ```text
//!   accepted --> waiting --next--> offered --taken-----> the guest's
//!                   ^                 |
//!                   +----rejected-----+   fewer at a time, and not before a while
//! ```
//!
//! A guest's full queue answers RST, where TCP would let the peer try again. So what it rejects is offered again, in
//! the order of arrival, first one at a time and then more, as the guest takes them. There is a bound to what is held; what
//! comes beyond it waits in the host's own queue.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Time until what was rejected is offered again, first and at most.
const DELAY: Duration = Duration::from_millis(1);
const MAX_DELAY: Duration = Duration::from_millis(100);
/// At most so many connections of a listener are held, whatever its backlog.
const MAX_HELD: usize = 64;

/// See the module.
#[derive(Debug)]
pub(crate) struct Holdback<T> {
    waiting: BTreeMap<u64, T>,
    serial: u64,
    offered: usize,
    window: usize,
    most: usize,
    delay: Duration,
    not_before: Option<Instant>,
}

impl<T> Holdback<T> {
    /// For a listener with this backlog.
    pub fn new(backlog: i32) -> Self {
        let most = usize::try_from(backlog).unwrap_or(1).clamp(1, MAX_HELD);
        Self {
            waiting: BTreeMap::new(),
            serial: 0,
            offered: 0,
            window: most,
            most,
            delay: DELAY,
            not_before: None,
        }
    }

    /// Whether more may be accepted.
    pub fn has_room(&self) -> bool {
        self.waiting.len() + self.offered < self.most
    }

    /// One was accepted.
    pub fn push(&mut self, accepted: T) {
        self.serial += 1;
        self.waiting.insert(self.serial, accepted);
    }

    /// The next to offer now, and its number.
    pub fn next(&mut self, now: Instant) -> Option<(u64, T)> {
        if self.offered >= self.window || self.not_before.is_some_and(|at| now < at) {
            return None;
        }
        let next = self.waiting.pop_first()?;
        self.offered += 1;
        Some(next)
    }

    /// One that was offered was taken, or is gone.
    pub fn taken(&mut self) {
        self.offered = self.offered.saturating_sub(1);
        self.window = (self.window * 2).clamp(1, self.most);
        self.delay = DELAY;
        self.not_before = None;
    }

    /// One that was offered came back.
    pub fn rejected(&mut self, number: u64, accepted: T, now: Instant) {
        self.offered = self.offered.saturating_sub(1);
        self.waiting.insert(number, accepted);
        // Several that were under way together come back together: that is one rejection.
        if self.not_before.is_none_or(|at| at <= now) {
            self.not_before = Some(now + self.delay);
            self.delay = (self.delay * 2).min(MAX_DELAY);
        }
        self.window = 1;
    }

    /// All that waits.
    pub fn drain(&mut self) -> impl Iterator<Item = T> {
        std::mem::take(&mut self.waiting).into_values()
    }

    /// When [`Self::next`] has something.
    pub fn deadline(&self) -> Option<Instant> {
        self.not_before.filter(|_| !self.waiting.is_empty() && self.offered < self.window)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    #[test]
    fn what_is_rejected_comes_again_in_order() {
        let now = Instant::now();
        let mut queue = Holdback::new(3);
        for name in ["a", "b", "c"] {
            assert!(queue.has_room());
            queue.push(name);
        }
        assert!(!queue.has_room());
        let offered: Vec<_> = std::iter::from_fn(|| queue.next(now)).collect();
        assert_eq!(offered.len(), 3);
        queue.taken();
        queue.rejected(offered[2].0, offered[2].1, now);
        queue.rejected(offered[1].0, offered[1].1, now);
        assert!(queue.next(now).is_none());
        let later = queue.deadline().unwrap();
        assert_eq!(later, now + DELAY);
        let (number, name) = queue.next(later).unwrap();
        assert_eq!(name, "b");
        assert!(queue.next(later).is_none(), "one at a time");
        queue.rejected(number, name, later);
        assert_eq!(queue.deadline().unwrap(), later + 2 * DELAY);
        let later = later + 2 * DELAY;
        assert_eq!(queue.next(later).unwrap().1, "b");
        queue.taken();
        assert_eq!(queue.next(later).unwrap().1, "c");
        queue.taken();
        assert!(queue.has_room() && queue.deadline().is_none());
    }

    #[test]
    fn the_pause_has_an_end() {
        let mut now = Instant::now();
        let mut queue = Holdback::new(-1);
        queue.push(());
        for _ in 0..20 {
            let (number, ()) = queue.next(now).unwrap();
            queue.rejected(number, (), now);
            let next = queue.deadline().unwrap();
            assert!(next - now <= MAX_DELAY);
            now = next;
        }
    }
}
