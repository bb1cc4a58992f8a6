//! How streams reach a kernel to which no descriptor can be passed.

use kso_wire::provide::Ticket;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// Makes the streams of such a kernel. It may have threads of its own, or be served by the loop of its kernel, which then polls
/// [`Self::poll_fds`] and calls [`Self::run_ready`]. Nothing here waits. It is made, used and dropped on one thread.
pub trait Carrier {
    /// A new stream: a non-blocking stream socket, at once. Its bytes, and its end, reach the provider after the ticket;
    /// if it cannot be carried it is closed. What is shut down or closed on one side is so on the other.
    ///
    /// # Errors
    /// `EMFILE`, or it cannot be carried for sure.
    fn open(&mut self, ticket: Ticket) -> io::Result<OwnedFd>;

    /// How long the provider may take to say welcome, if a usual time does not do: the kernel is emulated, and starts.
    fn welcome_within(&self) -> Option<Duration> {
        None
    }

    /// Readable when [`Self::run_ready`] has something to do. They stay the same.
    fn poll_fds(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    /// When [`Self::run_ready`] is due at the latest; in the past: at once, after a look at other descriptors.
    fn next_deadline(&self) -> Option<Instant> {
        None
    }

    /// Serves what is ready.
    ///
    /// # Errors
    /// The kernel is dead, and why.
    fn run_ready(&mut self) -> Result<(), String> {
        Ok(())
    }

    /// What is known of why the kernel fails, when its provider is gone; or, if not `gone`, is silent or lies.
    fn explain(&mut self, _gone: bool) -> Option<String> {
        None
    }
}
