//! A provider as a process: performs, on the kernel it runs on, what a broker on another one asks for.
//!
//! Each broker has a [`Session`] with a loop, a thread and limits of its own; what one of them sends harms no other.
//! The messages are those of `kso_wire::provide`.

mod listeners;
mod session;
mod streams;

pub use session::{Fault, Session};

use kso_wire::Errno;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// What one broker may use.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Streams at one time.
    pub streams: usize,
    /// Listeners at one time.
    pub listeners: usize,
    /// Brokers at one time.
    pub sessions: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { streams: kso_wire::provide::MAX_STREAMS, listeners: 1024, sessions: 16 }
    }
}

/// Shared by the sessions of a process.
#[derive(Clone, Debug, Default)]
pub struct Shared {
    /// Set when the process shall end: nothing new is taken.
    pub draining: Arc<AtomicBool>,
    sessions: Arc<AtomicUsize>,
    /// Addresses to tell, first those that connections come from; none: the kernel's own are told.
    pub addresses: Vec<IpAddr>,
}

impl Shared {
    /// Serves the broker behind `socket` until it is gone. Runs on the caller's thread.
    ///
    /// # Errors
    /// See [`Fault`].
    pub fn serve(&self, socket: OwnedFd, limits: Limits) -> Result<(), Fault> {
        let count = self.sessions.fetch_add(1, Ordering::Relaxed);
        let result = if count < limits.sessions {
            Session::new(socket, limits, self.clone()).and_then(Session::run)
        } else {
            Err(Fault::TooManySessions(limits.sessions))
        };
        self.sessions.fetch_sub(1, Ordering::Relaxed);
        result
    }

    /// Sessions now.
    #[must_use]
    pub fn sessions(&self) -> usize {
        self.sessions.load(Ordering::Relaxed)
    }
}

fn portable(error: &std::io::Error) -> Errno {
    kso_sys::errno::of(error)
}

#[cfg(test)]
mod tests;
