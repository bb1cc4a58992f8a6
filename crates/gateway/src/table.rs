//! Flows by key: bounded, the least recently used ones first to go.
//!
//! ```text
//!            insert               touch(answered)
//!   (none) ----------> one-way ----------------> two-way
//!                         | idle, full              | idle, full
//!                         v                         v
//!                       (gone)                    (gone)
//! ```
//!
//! A flow that was never answered is kept for a shorter time and gives way first, so that a scan of ports does
//! not push out a conversation (RFC 4787, 4.3).

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

const NONE: u32 = u32::MAX;

/// Names a flow, and no later one in its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token {
    index: u32,
    generation: u32,
}

impl Token {
    /// As 62 bits; the inverse of [`Self::from_bits`]. Generations wrap at 2^30.
    #[must_use]
    pub fn to_bits(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index)
    }

    /// Of 62 bits.
    #[must_use]
    pub fn from_bits(bits: u64) -> Self {
        Self { index: bits as u32, generation: (bits >> 32) as u32 }
    }
}

/// Which list a flow is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    OneWay,
    TwoWay,
}

#[derive(Debug)]
struct Slot<K, V> {
    generation: u32,
    entry: Option<(K, V)>,
    kind: Kind,
    used: Instant,
    /// Towards the more recently used.
    newer: u32,
    /// Towards the less recently used.
    older: u32,
}

#[derive(Clone, Copy, Debug)]
struct List {
    newest: u32,
    oldest: u32,
    idle: Duration,
}

/// Flows and what is known of them.
#[derive(Debug)]
pub struct Table<K, V> {
    by_key: HashMap<K, u32>,
    slots: Vec<Slot<K, V>>,
    free: Vec<u32>,
    one_way: List,
    two_way: List,
    limit: usize,
}

impl<K: Clone + Eq + Hash, V> Table<K, V> {
    /// At most `limit` flows; a one-way flow lasts `one_way` after its last use, another `two_way`.
    #[must_use]
    pub fn new(limit: usize, one_way: Duration, two_way: Duration) -> Self {
        let list = |idle| List { newest: NONE, oldest: NONE, idle };
        Self {
            by_key: HashMap::new(),
            slots: Vec::new(),
            free: Vec::new(),
            one_way: list(one_way),
            two_way: list(two_way),
            limit: limit.clamp(1, NONE as usize),
        }
    }

    /// How many flows there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_key.len()
    }

    /// Whether one more would be too many.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.len() >= self.limit
    }

    /// The flow of a key.
    #[must_use]
    pub fn find(&self, key: &K) -> Option<Token> {
        let index = *self.by_key.get(key)?;
        let generation = self.slots.get(index as usize)?.generation;
        Some(Token { index, generation })
    }

    /// A flow by its name.
    #[must_use]
    pub fn get(&self, token: Token) -> Option<(&K, &V)> {
        let slot = self.slots.get(token.index as usize)?;
        let (key, value) = slot.entry.as_ref()?;
        (slot.generation == token.generation).then_some((key, value))
    }

    /// A flow by its name.
    pub fn get_mut(&mut self, token: Token) -> Option<(&K, &mut V)> {
        let slot = self.slots.get_mut(token.index as usize)?;
        let (key, value) = slot.entry.as_mut()?;
        (slot.generation == token.generation).then_some((key, value))
    }

    /// Adds a flow. One of the same key is replaced, and if there is no room the least recently used one is;
    /// it is returned.
    pub fn insert(&mut self, key: K, value: V, now: Instant) -> (Token, Option<(K, V)>) {
        let replaced = match self.find(&key) {
            Some(token) => self.remove(token),
            None if self.is_full() => self.evict(),
            None => None,
        };
        let slot = Slot {
            generation: 0,
            entry: Some((key.clone(), value)),
            kind: Kind::OneWay,
            used: now,
            newer: NONE,
            older: NONE,
        };
        let index = match self.free.pop() {
            Some(index) => {
                if let Some(place) = self.slots.get_mut(index as usize) {
                    let generation = place.generation;
                    *place = Slot { generation, ..slot };
                }
                index
            }
            None => {
                self.slots.push(slot);
                (self.slots.len() - 1) as u32
            }
        };
        self.by_key.insert(key, index);
        self.link(index);
        let generation = self.slots.get(index as usize).map_or(0, |slot| slot.generation);
        (Token { index, generation }, replaced)
    }

    /// The flow was used; `answered`: by the other end.
    pub fn touch(&mut self, token: Token, answered: bool, now: Instant) {
        let Some(slot) = self.slots.get(token.index as usize) else { return };
        if slot.generation != token.generation || slot.entry.is_none() {
            return;
        }
        let promoted = answered && slot.kind == Kind::OneWay;
        let newest = slot.newer == NONE;
        if promoted || !newest {
            self.unlink(token.index);
        }
        if let Some(slot) = self.slots.get_mut(token.index as usize) {
            slot.used = now;
            if promoted {
                slot.kind = Kind::TwoWay;
            }
        }
        if promoted || !newest {
            self.link(token.index);
        }
    }

    /// Takes a flow out.
    pub fn remove(&mut self, token: Token) -> Option<(K, V)> {
        let slot = self.slots.get(token.index as usize)?;
        if slot.generation != token.generation || slot.entry.is_none() {
            return None;
        }
        self.unlink(token.index);
        let slot = self.slots.get_mut(token.index as usize)?;
        slot.generation = (slot.generation + 1) & (u32::MAX >> 2);
        let (key, value) = slot.entry.take()?;
        self.by_key.remove(&key);
        self.free.push(token.index);
        Some((key, value))
    }

    /// Takes out the least recently used flow, an unanswered one if there is any.
    pub fn evict(&mut self) -> Option<(K, V)> {
        let index = if self.one_way.oldest == NONE { self.two_way.oldest } else { self.one_way.oldest };
        let generation = self.slots.get(index as usize)?.generation;
        self.remove(Token { index, generation })
    }

    /// Takes out a flow that has been idle for too long.
    pub fn expire(&mut self, now: Instant) -> Option<(K, V)> {
        for list in [self.one_way, self.two_way] {
            if let Some(slot) = self.slots.get(list.oldest as usize)
                && now.saturating_duration_since(slot.used) >= list.idle
            {
                return self.remove(Token { index: list.oldest, generation: slot.generation });
            }
        }
        None
    }

    /// When [`Self::expire`] has something to do.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        let due = |list: List| self.slots.get(list.oldest as usize).map(|slot| slot.used + list.idle);
        [due(self.one_way), due(self.two_way)].into_iter().flatten().min()
    }

    fn list(&mut self, kind: Kind) -> &mut List {
        match kind {
            Kind::OneWay => &mut self.one_way,
            Kind::TwoWay => &mut self.two_way,
        }
    }

    fn link(&mut self, index: u32) {
        let Some(kind) = self.slots.get(index as usize).map(|slot| slot.kind) else { return };
        let before = self.list(kind).newest;
        self.list(kind).newest = index;
        if before == NONE {
            self.list(kind).oldest = index;
        } else if let Some(slot) = self.slots.get_mut(before as usize) {
            slot.newer = index;
        }
        if let Some(slot) = self.slots.get_mut(index as usize) {
            slot.older = before;
            slot.newer = NONE;
        }
    }

    fn unlink(&mut self, index: u32) {
        let Some(slot) = self.slots.get(index as usize) else { return };
        let (kind, newer, older) = (slot.kind, slot.newer, slot.older);
        match self.slots.get_mut(newer as usize) {
            Some(slot) => slot.older = older,
            None => self.list(kind).newest = older,
        }
        match self.slots.get_mut(older as usize) {
            Some(slot) => slot.newer = newer,
            None => self.list(kind).oldest = newer,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ONE: Duration = Duration::from_secs(60);
    const TWO: Duration = Duration::from_secs(300);

    #[test]
    fn unanswered_flows_go_first_and_sooner() {
        let start = Instant::now();
        let mut table = Table::new(3, ONE, TWO);
        let (a, _) = table.insert("a", 1, start);
        table.touch(a, true, start);
        let (b, _) = table.insert("b", 2, start);
        table.insert("c", 3, start);
        table.touch(b, false, start);
        let (_, gone) = table.insert("d", 4, start);
        assert_eq!(gone, Some(("c", 3)), "the least recently used of those that nobody answered");
        assert_eq!(table.next_deadline(), Some(start + ONE));
        assert_eq!(table.expire(start + ONE), Some(("b", 2)));
        assert_eq!(table.expire(start + ONE), Some(("d", 4)));
        assert_eq!(table.expire(start + ONE), None);
        assert_eq!(table.next_deadline(), Some(start + TWO));
        assert_eq!(table.expire(start + TWO), Some(("a", 1)));
        assert_eq!(table.len(), 0);
    }

    #[test]
    fn a_name_is_of_one_flow_only() {
        let now = Instant::now();
        let mut table = Table::new(4, ONE, TWO);
        let (a, _) = table.insert("a", 1, now);
        assert_eq!(Token::from_bits(a.to_bits()), a);
        table.remove(a);
        let (b, _) = table.insert("b", 2, now);
        assert_ne!(a, b);
        assert!(table.get(a).is_none() && table.remove(a).is_none());
        assert_eq!(table.get(b), Some((&"b", &2)));
    }

    proptest! {
        #[test]
        fn it_behaves_as_a_list_does(steps in proptest::collection::vec((0_u8..6, 0_u8..20, 0_u64..100), 0..400)) {
            let mut now = Instant::now();
            let mut table = Table::new(8, ONE, TWO);
            // Oldest first: (key, answered, used).
            let mut model: Vec<(u8, bool, Instant)> = Vec::new();
            for (step, key, seconds) in steps {
                let token = table.find(&key);
                let at = model.iter().position(|entry| entry.0 == key);
                prop_assert_eq!(token.is_some(), at.is_some());
                match step {
                    0 | 1 => {
                        if let Some(at) = at {
                            model.remove(at);
                        } else if model.len() == 8 {
                            let oldest = model.iter().position(|entry| !entry.1).unwrap_or(0);
                            model.remove(oldest);
                        }
                        table.insert(key, (), now);
                        model.push((key, false, now));
                    }
                    2 | 3 => if let (Some(token), Some(at)) = (token, at) {
                        table.touch(token, step == 3, now);
                        let old = model.remove(at);
                        model.push((key, old.1 || step == 3, now));
                    },
                    4 => if let (Some(token), Some(at)) = (token, at) {
                        table.remove(token);
                        model.remove(at);
                    },
                    _ => {
                        now += Duration::from_secs(seconds);
                        while table.expire(now).is_some() {}
                        model.retain(|entry| now - entry.2 < if entry.1 { TWO } else { ONE });
                    }
                }
                prop_assert_eq!(table.len(), model.len());
                prop_assert!(table.slots.len() <= 8);
            }
        }
    }
}
