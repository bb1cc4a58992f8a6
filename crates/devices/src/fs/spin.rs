//! Whether to look again before sleeping: a wake-up costs more than most requests.

use std::time::{Duration, Instant};

/// The longest that is looked.
const LONGEST: Duration = Duration::from_micros(150);
/// After so many times in vain, no more.
const PATIENCE: u32 = 8;
/// Something that came so soon after falling asleep would have been worth the looking.
const SOON: Duration = Duration::from_micros(300);

/// What was learnt of how soon requests follow each other.
#[derive(Debug, Default)]
pub(super) struct Spin {
    in_vain: u32,
}

impl Spin {
    /// Looks for something to do, letting others run meanwhile. `true`: there is.
    pub fn look(&mut self, mut there: impl FnMut() -> bool) -> bool {
        if self.in_vain >= PATIENCE {
            return false;
        }
        let until = Instant::now() + LONGEST;
        while Instant::now() < until {
            if there() {
                self.in_vain = 0;
                return true;
            }
            rustix::thread::sched_yield();
        }
        self.in_vain += 1;
        false
    }

    /// It was slept for so long.
    pub fn slept(&mut self, time: Duration) {
        if time < SOON {
            self.in_vain = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looking_in_vain_ends_until_it_would_have_been_worth_it() {
        let mut spin = Spin::default();
        assert!(spin.look(|| true));
        for _ in 0..PATIENCE {
            assert!(!spin.look(|| false));
        }
        assert!(!spin.look(|| true));
        spin.slept(Duration::from_secs(1));
        assert!(!spin.look(|| true));
        spin.slept(Duration::from_micros(100));
        assert!(spin.look(|| true));
    }
}
