//! How long to poll before sleeping.

use std::time::{Duration, Instant};

/// Longest time without work before sleeping.
const MOST: Duration = Duration::from_micros(100);
/// Shortest, once polling pays at all.
const LEAST: Duration = Duration::from_micros(25);
/// A sleep this short would have been better spent polling: a wake-up costs as much.
const SHORT: Duration = Duration::from_micros(250);
/// A yield that takes this long gave the core to others for a time slice: it is not idle, and polling only delays.
const TAKEN: Duration = Duration::from_micros(400);
/// How long there is no polling after that.
const PAUSE: Duration = Duration::from_millis(250);

/// Polls longer while sleeps are short, and not at all when they are long (as KVM's halt polling does): a guest that
/// idles costs nothing.
#[derive(Debug)]
pub(super) struct Spin {
    budget: Duration,
    /// When there was work last.
    worked: Instant,
    /// No polling before.
    paused: Instant,
    /// Since when it sleeps.
    slept: Option<Instant>,
}

impl Spin {
    pub fn new(now: Instant) -> Self {
        Spin { budget: Duration::ZERO, worked: now, paused: now, slept: None }
    }

    pub fn sleeping(&self) -> bool {
        self.slept.is_some()
    }

    /// It was called, for work or not.
    pub fn wake(&mut self, now: Instant) {
        let Some(slept) = self.slept.take() else { return };
        self.worked = now;
        self.budget = if now.duration_since(slept) <= SHORT {
            (self.budget * 2).clamp(LEAST, MOST)
        } else {
            self.budget / 2
        };
        if self.budget < LEAST {
            self.budget = Duration::ZERO;
        }
    }

    pub fn worked(&mut self, now: Instant) {
        self.worked = now;
    }

    /// Whether to sleep now that there is nothing to do.
    pub fn over(&self, now: Instant) -> bool {
        now < self.paused || now.duration_since(self.worked) >= self.budget
    }

    /// It yielded the core.
    pub fn yielded(&mut self, before: Instant, after: Instant) {
        if after.duration_since(before) >= TAKEN {
            self.paused = after + PAUSE;
        }
    }

    pub fn sleep(&mut self, now: Instant) {
        self.slept = Some(now);
    }
}
