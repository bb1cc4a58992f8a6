//! POSIX locks that an owner holds on a file: ranges that do not overlap.

use crate::abi::FileLock;

/// `F_UNLCK` (fcntl(2)).
pub(super) const NONE: u32 = 2;
/// At most so many ranges of one owner on one file are kept.
pub(super) const MAX_RANGES: usize = 1024;

/// Ranges by their first byte, each to its last, with their kinds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Held(Vec<(u64, u64, u32)>);

impl Held {
    /// What a lock that was taken, or dropped, makes of them.
    pub fn apply(&mut self, lock: &FileLock) {
        let (start, end) = (lock.start, lock.end);
        if end < start {
            return;
        }
        let mut ranges = Vec::with_capacity(self.0.len() + 2);
        for (first, last, kind) in self.0.drain(..) {
            if first < start {
                ranges.push((first, last.min(start - 1), kind));
            }
            if last > end {
                ranges.push((first.max(end + 1), last, kind));
            }
        }
        if lock.kind != NONE {
            ranges.push((start, end, lock.kind));
        }
        ranges.sort_unstable();
        // Neighbours of one kind are one lock.
        ranges.dedup_by(|next, before| {
            let joined = next.2 == before.2 && before.1.checked_add(1) == Some(next.0);
            if joined {
                before.1 = next.1;
            }
            joined
        });
        self.0 = ranges;
    }

    /// One by one, as they are asked for.
    pub fn iter(&self) -> impl Iterator<Item = FileLock> {
        self.0.iter().map(|(start, end, kind)| FileLock { start: *start, end: *end, kind: *kind, pid: 0 })
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
#[allow(clippy::indexing_slicing)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn they_are_what_single_bytes_would_be(
            locks in prop::collection::vec((0..40_u64, 0..40_u64, 0..3_u32), 0..40)
        ) {
            let mut held = Held::default();
            let mut bytes = [NONE; 40];
            for (start, end, kind) in locks {
                held.apply(&FileLock { start, end, kind, pid: 0 });
                if start <= end {
                    bytes[start as usize..=end as usize].fill(kind);
                }
                let mut got = [NONE; 40];
                for lock in held.iter() {
                    prop_assert!(lock.kind != NONE);
                    for byte in &mut got[lock.start as usize..=lock.end as usize] {
                        prop_assert_eq!(*byte, NONE, "ranges overlap");
                        *byte = lock.kind;
                    }
                }
                prop_assert_eq!(got, bytes);
                let changes = bytes.windows(2).filter(|pair| pair[0] != pair[1]).count();
                prop_assert!(held.len() <= changes + 1);
            }
        }
    }

    #[test]
    fn ranges_reach_to_the_end() {
        let mut held = Held::default();
        held.apply(&FileLock { start: 0, end: u64::MAX, kind: 1, pid: 0 });
        held.apply(&FileLock { start: 10, end: u64::MAX, kind: NONE, pid: 0 });
        assert_eq!(held.0, [(0, 9, 1)]);
        held.apply(&FileLock { start: 0, end: u64::MAX, kind: NONE, pid: 0 });
        assert!(held.is_empty());
    }
}
