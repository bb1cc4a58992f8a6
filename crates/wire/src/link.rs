//! The seam behind which a broker is reached.
//!
//! The runner asks; it does not know whether the broker is in its own process (no copy, no wake-up: the
//! answer comes back from [`BrokerLink::submit`]) or in another (the answer comes later, from
//! [`BrokerLink::completed`]).

use crate::{Caller, Failure, Reply, Request, RequestId};
use std::os::fd::{BorrowedFd, OwnedFd};

/// What came of a request, with the descriptor that rides along.
#[derive(Debug)]
pub struct Answer {
    /// The outcome.
    pub result: Result<Reply, Failure>,
    /// The descriptor of [`Reply::Socket`] and [`Reply::Echo`].
    pub descriptor: Option<OwnedFd>,
}

impl Answer {
    /// An answer without a descriptor.
    #[must_use]
    pub fn plain(result: Result<Reply, Failure>) -> Self {
        Self { result, descriptor: None }
    }

    /// An answer with one.
    #[must_use]
    pub fn with(reply: Reply, descriptor: OwnedFd) -> Self {
        Self { result: Ok(reply), descriptor: Some(descriptor) }
    }
}

/// Whether a request was answered at once.
#[derive(Debug)]
pub enum Submitted {
    /// Here is the answer.
    Done(Answer),
    /// It will come from [`BrokerLink::completed`].
    Pending,
}

/// A way to a broker. Never blocks.
pub trait BrokerLink {
    /// Asks for something. A link that is broken answers `ECONNRESET`-like failures at once: a request is
    /// never lost.
    fn submit(&mut self, id: RequestId, caller: &Caller, request: Request) -> Submitted;

    /// Whether anybody looks at [`Caller::program`]. If not it may be empty: it costs a look into `/proc`.
    fn wants_program(&self) -> bool {
        true
    }

    /// Closes a socket that nobody waits for: now, or elsewhere where that costs the caller less.
    fn discard(&mut self, socket: OwnedFd) {
        drop(socket);
    }

    /// The answer to `id` is no longer wanted. If it was under way, what it opened is closed.
    fn forget(&mut self, id: RequestId);

    /// Readable when [`Self::completed`] may have something.
    fn poll_fd(&self) -> Option<BorrowedFd<'_>>;

    /// The next answer that came since, if any. Call until `None` when [`Self::poll_fd`] is readable.
    fn completed(&mut self) -> Option<(RequestId, Answer)>;
}
