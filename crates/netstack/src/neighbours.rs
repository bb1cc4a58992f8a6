//! Who is at which hardware address, on the link. Pure.
//!
//! ```text
//!   (none) -- wanted --> asking, thrice -- told --> known -- wanted when old --> known, asking -- told --> known
//!                          +-- silent --> failed: (none)                             +-- silent --> (none)
//! ```
//!
//! What is sent meanwhile is parked, a little of it.

use smoltcp::wire::EthernetAddress;
use std::collections::{HashMap, HashSet, VecDeque};
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Most neighbours.
const MAX: usize = 1024;
/// A question is asked so often, and so far apart (RFC 4861, section 10).
const TRIES: u32 = 3;
const INTERVAL: Duration = Duration::from_secs(1);
/// After so long it is asked again whether a neighbour is there, while it is used.
const FRESH: Duration = Duration::from_secs(30);
/// Frames of one neighbour, and bytes of all, that wait for an answer.
const PARKED: usize = 64;
const PARKED_BYTES: usize = 4 << 20;

#[derive(Debug)]
struct Asking {
    asked: u32,
    next: Instant,
}

#[derive(Debug)]
struct Entry {
    hardware: Option<EthernetAddress>,
    confirmed: Instant,
    asking: Option<Asking>,
    parked: VecDeque<Vec<u8>>,
}

/// What has to be done after some time passed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Due {
    /// To be asked for.
    pub ask: Vec<IpAddr>,
    /// They are not there.
    pub failed: Vec<IpAddr>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Neighbours {
    all: HashMap<IpAddr, Entry>,
    asking: HashSet<IpAddr>,
    parked: usize,
}

impl Neighbours {
    /// The hardware address of a neighbour. `None`: it is not known yet, and asked for by [`Self::run_due`].
    pub fn find(&mut self, address: IpAddr, now: Instant) -> Option<EthernetAddress> {
        if !self.all.contains_key(&address) {
            self.make_room();
            let entry = Entry { hardware: None, confirmed: now, asking: None, parked: VecDeque::new() };
            self.all.insert(address, entry);
        }
        let entry = self.all.get_mut(&address)?;
        let old = entry.hardware.is_none() || now.saturating_duration_since(entry.confirmed) > FRESH;
        if old && entry.asking.is_none() {
            entry.asking = Some(Asking { asked: 0, next: now });
            self.asking.insert(address);
        }
        entry.hardware
    }

    /// Keeps a frame until the neighbour is known.
    pub fn park(&mut self, address: IpAddr, frame: Vec<u8>) {
        let Some(entry) = self.all.get_mut(&address) else { return };
        if entry.parked.len() < PARKED && self.parked + frame.len() <= PARKED_BYTES {
            self.parked += frame.len();
            entry.parked.push_back(frame);
        }
    }

    /// A neighbour told of itself: what was parked can be sent. One that nobody asked for is remembered only if `wanted`.
    pub fn told(
        &mut self,
        address: IpAddr,
        hardware: EthernetAddress,
        wanted: bool,
        now: Instant,
    ) -> VecDeque<Vec<u8>> {
        if !self.all.contains_key(&address) {
            if !wanted || self.all.len() >= MAX {
                return VecDeque::new();
            }
            let entry = Entry { hardware: None, confirmed: now, asking: None, parked: VecDeque::new() };
            self.all.insert(address, entry);
        }
        let Some(entry) = self.all.get_mut(&address) else { return VecDeque::new() };
        entry.hardware = Some(hardware);
        entry.confirmed = now;
        entry.asking = None;
        self.asking.remove(&address);
        let parked = std::mem::take(&mut entry.parked);
        self.parked -= parked.iter().map(Vec::len).sum::<usize>();
        parked
    }

    /// When [`Self::run_due`] has something to say.
    pub fn next_deadline(&self) -> Option<Instant> {
        let entries = self.asking.iter().filter_map(|address| self.all.get(address)?.asking.as_ref());
        entries.map(|asking| asking.next).min()
    }

    /// What time brought.
    pub fn run_due(&mut self, now: Instant) -> Due {
        let mut due = Due::default();
        for address in &self.asking {
            let Some(asking) = self.all.get_mut(address).and_then(|entry| entry.asking.as_mut()) else {
                continue;
            };
            if asking.next > now {
                continue;
            }
            if asking.asked >= TRIES {
                due.failed.push(*address);
            } else {
                asking.asked += 1;
                asking.next = now + INTERVAL;
                due.ask.push(*address);
            }
        }
        due.failed.iter().for_each(|address| self.forget(*address));
        due
    }

    fn forget(&mut self, address: IpAddr) {
        self.asking.remove(&address);
        if let Some(entry) = self.all.remove(&address) {
            self.parked -= entry.parked.iter().map(Vec::len).sum::<usize>();
        }
    }

    fn make_room(&mut self) {
        if self.all.len() < MAX {
            return;
        }
        let oldest = self.all.iter().min_by_key(|(_, entry)| (entry.asking.is_some(), entry.confirmed));
        if let Some(address) = oldest.map(|(address, _)| *address) {
            self.forget(address);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const THERE: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 9]);

    fn address(number: u32) -> IpAddr {
        std::net::Ipv4Addr::from(0x0a00_0000 + number).into()
    }

    #[test]
    fn who_answers_is_known_and_asked_again_when_old() {
        let (mut neighbours, now) = (Neighbours::default(), Instant::now());
        assert_eq!(neighbours.find(address(1), now), None);
        neighbours.park(address(1), vec![1; 100]);
        assert_eq!(neighbours.run_due(now).ask, [address(1)]);
        assert_eq!(neighbours.run_due(now), Due::default());
        assert_eq!(neighbours.next_deadline(), Some(now + INTERVAL));
        assert_eq!(neighbours.told(address(1), THERE, false, now).len(), 1);
        assert_eq!((neighbours.find(address(1), now), neighbours.next_deadline()), (Some(THERE), None));
        let later = now + FRESH * 2;
        assert_eq!(neighbours.find(address(1), later), Some(THERE), "it is used meanwhile");
        assert_eq!(neighbours.run_due(later).ask, [address(1)]);
    }

    #[test]
    fn who_is_silent_fails() {
        let (mut neighbours, mut now) = (Neighbours::default(), Instant::now());
        assert_eq!(neighbours.find(address(1), now), None);
        neighbours.park(address(1), vec![1; 100]);
        for _ in 0..TRIES {
            assert_eq!(neighbours.run_due(now), Due { ask: vec![address(1)], failed: vec![] });
            now += INTERVAL;
        }
        assert_eq!(neighbours.run_due(now), Due { ask: vec![], failed: vec![address(1)] });
        assert_eq!((neighbours.all.len(), neighbours.asking.len(), neighbours.parked), (0, 0, 0));
    }

    #[test]
    fn everything_has_a_bound() {
        let (mut neighbours, now) = (Neighbours::default(), Instant::now());
        for number in 0..3000 {
            neighbours.find(address(number), now);
            for _ in 0..30 {
                neighbours.park(address(number), vec![0; 60_000]);
            }
        }
        assert!(neighbours.all.len() <= MAX && neighbours.parked <= PARKED_BYTES);
        let parked: usize = neighbours.all.values().flat_map(|entry| &entry.parked).map(Vec::len).sum();
        assert_eq!(parked, neighbours.parked);
        assert!(neighbours.told(address(9999), THERE, true, now).is_empty());
        assert!(!neighbours.all.contains_key(&address(9999)), "full");
    }
}
