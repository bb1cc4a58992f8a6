//! Fragments put together again (RFC 791 section 3.2, RFC 8200 section 4.5).
//!
//! Memory is bounded: so many packets, so many bytes in all, each for so long; the oldest gives way. Fragments
//! that overlap spoil their packet, in both families (RFC 5722); an exact duplicate does no harm.

use crate::packet::ip::{Fragment, Header};
use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// At most so many packets are incomplete at one time.
const MAX_PACKETS: usize = 64;
/// At most so many bytes are held.
const MAX_BYTES: usize = 4 << 20;
/// At most so many separate pieces of one packet; 64 KiB in fragments of 576 bytes are 120.
const MAX_PIECES: usize = 512;
/// The longest payload of a packet, bytes.
const MAX_PAYLOAD: usize = 65_535;
/// How long fragments wait for each other (net.ipv4.ipfrag_time).
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    source: IpAddr,
    destination: IpAddr,
    identification: u32,
    /// 0 for IPv6, whose identification stands for itself.
    protocol: u8,
}

#[derive(Debug)]
struct Assembly {
    /// Sorted, apart from each other.
    pieces: Vec<(usize, usize)>,
    bytes: Vec<u8>,
    total: Option<usize>,
    /// Of the first fragment.
    header: Option<Header>,
    since: Instant,
}

/// What came of a fragment.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was the last one that was missing: here is the packet's header and payload.
    Whole(Header, Vec<u8>),
    /// Others are missing.
    Waiting,
    /// It cannot be: its packet is dropped.
    Spoiled,
}

/// Packets that are incomplete.
#[derive(Debug, Default)]
pub struct Reassembly {
    packets: HashMap<Key, Assembly>,
    held: usize,
}

impl Reassembly {
    /// Takes a fragment in.
    pub fn insert(&mut self, header: &Header, fragment: Fragment, payload: &[u8], now: Instant) -> Outcome {
        self.expire(now);
        let key = Key {
            source: header.source,
            destination: header.destination,
            identification: fragment.identification,
            protocol: if header.source.is_ipv4() { header.protocol } else { 0 },
        };
        let (start, end) = (fragment.offset, fragment.offset + payload.len());
        let fits =
            end <= MAX_PAYLOAD && !payload.is_empty() && (!fragment.more || payload.len().is_multiple_of(8));
        if !fits {
            self.remove(key);
            return Outcome::Spoiled;
        }
        if !self.packets.contains_key(&key) {
            self.make_room(MAX_PACKETS - 1, MAX_BYTES.saturating_sub(MAX_PAYLOAD));
        }
        let fresh =
            || Assembly { pieces: Vec::new(), bytes: Vec::new(), total: None, header: None, since: now };
        let assembly = self.packets.entry(key).or_insert_with(fresh);
        let before = assembly.bytes.len();
        let good = assembly.add(start, end, payload, fragment.more);
        self.held += assembly.bytes.len() - before;
        if start == 0 && assembly.header.is_none() {
            assembly.header = Some(Header { fragment: None, ..header.clone() });
        }
        let whole = assembly.total.is_some_and(|total| assembly.pieces == [(0, total)]);
        if !good {
            self.remove(key);
            return Outcome::Spoiled;
        }
        if whole
            && let Some(assembly) = self.remove(key)
            && let Some(header) = assembly.header
        {
            return Outcome::Whole(header, assembly.bytes);
        }
        self.make_room(MAX_PACKETS, MAX_BYTES);
        Outcome::Waiting
    }

    /// Drops what has waited too long.
    pub fn expire(&mut self, now: Instant) {
        self.packets.retain(|_, assembly| now.saturating_duration_since(assembly.since) < PATIENCE);
        self.held = self.packets.values().map(|assembly| assembly.bytes.len()).sum();
    }

    /// When [`Self::expire`] has something to do.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        self.packets.values().map(|assembly| assembly.since + PATIENCE).min()
    }

    fn remove(&mut self, key: Key) -> Option<Assembly> {
        let assembly = self.packets.remove(&key)?;
        self.held -= assembly.bytes.len();
        Some(assembly)
    }

    fn make_room(&mut self, packets: usize, bytes: usize) {
        while self.packets.len() > packets || self.held > bytes {
            let oldest = self.packets.iter().min_by_key(|(_, assembly)| assembly.since).map(|(key, _)| *key);
            let Some(oldest) = oldest else { return };
            self.remove(oldest);
        }
    }
}

impl Assembly {
    /// Whether the piece goes with the others.
    fn add(&mut self, start: usize, end: usize, payload: &[u8], more: bool) -> bool {
        if !more && self.total.replace(end).is_some_and(|total| total != end) {
            return false;
        }
        let last = self.pieces.last().map_or(0, |piece| piece.1);
        if self.total.is_some_and(|total| total < last.max(end)) {
            return false;
        }
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        let Some(place) = self.bytes.get_mut(start..end) else { return false };
        let at = self.pieces.partition_point(|piece| piece.1 <= start);
        if let Some(next) = self.pieces.get(at)
            && next.0 < end
        {
            // A duplicate lies wholly within what is known, and says the same.
            return next.0 <= start && end <= next.1 && place == payload;
        }
        place.copy_from_slice(payload);
        self.pieces.insert(at, (start, end));
        self.join(at);
        if at > 0 {
            self.join(at - 1);
        }
        self.pieces.len() <= MAX_PIECES
    }

    /// Joins the piece at `at` with the next one if they touch.
    fn join(&mut self, at: usize) {
        let (Some(piece), Some(next)) = (self.pieces.get(at).copied(), self.pieces.get(at + 1).copied())
        else {
            return;
        };
        if piece.1 == next.0 {
            self.pieces.remove(at + 1);
            if let Some(piece) = self.pieces.get_mut(at) {
                piece.1 = next.1;
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> Header {
        Header {
            source: "198.18.0.2".parse().unwrap(),
            destination: "10.0.0.1".parse().unwrap(),
            protocol: 17,
            hops: 64,
            traffic_class: 0,
            fragment: None,
            payload: 0..0,
        }
    }

    fn part(identification: u32, offset: usize, more: bool) -> Fragment {
        Fragment { identification, offset, more }
    }

    proptest! {
        #[test]
        fn any_order_and_duplicates_make_the_whole(
            payload in proptest::collection::vec(any::<u8>(), 9..4000),
            sizes in proptest::collection::vec(1_usize..60, 1..40),
            order in any::<u64>(),
        ) {
            let mut parts = Vec::new();
            let mut at = 0;
            for size in sizes.iter().cycle() {
                let end = (at + size * 8).min(payload.len());
                parts.push((at, end));
                at = end;
                if at == payload.len() { break }
            }
            let mut random = order | 1;
            for i in (1..parts.len()).rev() {
                random ^= random << 13; random ^= random >> 7; random ^= random << 17;
                parts.swap(i, (random % (i as u64 + 1)) as usize);
            }
            let now = Instant::now();
            let mut reassembly = Reassembly::default();
            let last = parts.pop().unwrap();
            for (start, end) in parts.iter().chain(&parts) {
                let fragment = part(7, *start, *end != payload.len());
                let outcome = reassembly.insert(&header(), fragment, &payload[*start..*end], now);
                prop_assert_eq!(outcome, Outcome::Waiting);
            }
            let fragment = part(7, last.0, last.1 != payload.len());
            let outcome = reassembly.insert(&header(), fragment, &payload[last.0..last.1], now);
            prop_assert_eq!(outcome, Outcome::Whole(header(), payload));
            prop_assert_eq!(reassembly.held, 0);
        }

        #[test]
        fn hostile_fragments_stay_within_bounds(
            parts in proptest::collection::vec((0_u32..200, 0_usize..8192, any::<bool>(), 0_usize..3000), 0..300)
        ) {
            let now = Instant::now();
            let mut reassembly = Reassembly::default();
            for (identification, offset, more, length) in parts {
                reassembly.insert(&header(), part(identification, offset * 8, more), &vec![1; length], now);
                prop_assert!(reassembly.packets.len() <= MAX_PACKETS && reassembly.held <= MAX_BYTES);
                let held: usize = reassembly.packets.values().map(|assembly| assembly.bytes.len()).sum();
                prop_assert_eq!(held, reassembly.held);
            }
        }
    }

    #[test]
    fn overlaps_spoil_and_time_runs_out() {
        let now = Instant::now();
        let mut reassembly = Reassembly::default();
        assert_eq!(reassembly.insert(&header(), part(1, 0, true), &[1; 16], now), Outcome::Waiting);
        assert_eq!(reassembly.insert(&header(), part(1, 8, true), &[2; 16], now), Outcome::Spoiled);
        assert!(reassembly.packets.is_empty());
        assert_eq!(reassembly.insert(&header(), part(1, 0, true), &[1; 16], now), Outcome::Waiting);
        assert_eq!(reassembly.next_deadline(), Some(now + PATIENCE));
        reassembly.expire(now + PATIENCE);
        assert_eq!((reassembly.packets.len(), reassembly.held), (0, 0));
        // Not the last one, and not a multiple of eight bytes; and beyond the longest packet.
        assert_eq!(reassembly.insert(&header(), part(2, 0, true), &[1; 9], now), Outcome::Spoiled);
        assert_eq!(reassembly.insert(&header(), part(2, 65_528, false), &[1; 8], now), Outcome::Spoiled);
    }
}
