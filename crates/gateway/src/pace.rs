//! How many packets to ask for at once.
//!
//! ```text
//!             so many calls in a row gave one packet
//!   full ------------------------------------------------> single
//!    ^                                                        |
//!    +---- there was another one as soon as we looked again --+
//! ```
//!
//! To find that there is no second packet costs a system call, or most of one: in a conversation of single packets
//! nearly as much as the packet itself. In a stream of packets it saves many.

/// So many calls in a row must have given one packet.
const SINGLES: u8 = 16;

/// The pace of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pace {
    singles: u8,
}

impl Pace {
    /// How many packets to ask for, `most` at most. `at_once`: there was no pause since the last call.
    pub fn limit(&mut self, most: usize, at_once: bool) -> usize {
        if at_once && self.singles >= SINGLES {
            self.singles = 0;
        }
        if self.singles >= SINGLES { 1 } else { most }
    }

    /// So many came.
    pub fn got(&mut self, count: usize) {
        match count {
            0 => {}
            1 => self.singles = self.singles.saturating_add(1),
            _ => self.singles = 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn single_packets_make_it_single_and_haste_makes_it_full() {
        let mut pace = Pace::default();
        for _ in 0..SINGLES {
            assert_eq!(pace.limit(32, true), 32);
            pace.got(1);
        }
        assert_eq!(pace.limit(32, false), 1);
        pace.got(1);
        assert_eq!(pace.limit(32, false), 1);
        assert_eq!(pace.limit(32, true), 32);
        pace.got(1);
        pace.got(7);
        assert_eq!(pace, Pace::default());
    }
}
