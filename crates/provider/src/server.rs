//! A provider as a process: performs, on the kernel it runs on, what a broker on another one asks for.
//!
//! Each broker has a [`Session`] with a loop, a thread and limits of its own; what one of them sends harms no other.
//! The messages are those of `kso_wire::provide`. Where brokers connect to, a [`Door`] tells their control streams from
//! streams that begin with tickets.

mod door;
mod exports;
mod listeners;
mod session;
mod shares;
mod streams;
mod tickets;

pub use door::Door;
pub use exports::Export;
pub use session::{Fault, Session};
pub use tickets::Unclaimed;

use crate::channel::Channel;
use kso_wire::Errno;
use kso_wire::provide::Ticket;
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
    /// Directories at one time.
    pub shares: usize,
    /// Brokers at one time.
    pub sessions: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { streams: kso_wire::provide::MAX_STREAMS, listeners: 1024, shares: 64, sessions: 16 }
    }
}

/// Shared by the sessions of a process.
#[derive(Clone, Debug, Default)]
pub struct Shared {
    /// Set when the process shall end: nothing new is taken.
    pub draining: Arc<AtomicBool>,
    sessions: Arc<AtomicUsize>,
    tickets: Arc<tickets::Registry>,
    /// Addresses to tell, first those that connections come from; none: the kernel's own are told.
    pub addresses: Vec<IpAddr>,
    /// Directories that brokers may have.
    pub exports: Vec<Export>,
    /// No sockets are served.
    pub files_only: bool,
}

impl Shared {
    /// Serves the broker behind `socket` until it is gone. Runs on the caller's thread.
    ///
    /// # Errors
    /// See [`Fault`].
    pub fn serve(&self, socket: OwnedFd, limits: Limits) -> Result<(), Fault> {
        self.serve_over(Channel::new(socket), limits)
    }

    /// As [`Self::serve`]; but the broker is elsewhere, and something carries bytes only between it and `socket`: its streams come
    /// by [`Self::claim`].
    ///
    /// # Errors
    /// See [`Fault`].
    pub fn serve_with_tickets(&self, socket: OwnedFd, limits: Limits) -> Result<(), Fault> {
        self.serve_over(Channel::without_descriptors(socket), limits)
    }

    fn serve_over(&self, channel: Channel, limits: Limits) -> Result<(), Fault> {
        let count = self.sessions.fetch_add(1, Ordering::Relaxed);
        let result = if count < limits.sessions {
            Session::new(channel, limits, self.clone()).and_then(Session::run)
        } else {
            Err(Fault::TooManySessions(limits.sessions))
        };
        self.sessions.fetch_sub(1, Ordering::Relaxed);
        result
    }

    /// Gives a stream that began with this ticket, which was read, to the session that it is of. That closes it if nobody
    /// names it in time.
    ///
    /// # Errors
    /// There is no such session, or too many wait.
    pub fn claim(&self, ticket: Ticket, stream: OwnedFd) -> Result<(), Unclaimed> {
        self.tickets.claim(ticket, stream)
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
