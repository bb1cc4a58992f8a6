//! A broker in the runner's own process: requests are function calls.

use crate::broker::Broker;
use crate::session::SessionId;
use kso_wire::{Answer, BrokerLink, Caller, Request, RequestId, Submitted};
use std::os::fd::{BorrowedFd, OwnedFd};

/// One session over a broker in this process. Whoever polls [`BrokerLink::poll_fd`] calls
/// [`Broker::run_ready`] when it is readable or [`Broker::next_deadline`] has come.
#[derive(Debug)]
pub struct Embedded {
    broker: Broker,
    session: SessionId,
}

impl Embedded {
    /// Serves `session` of `broker`.
    #[must_use]
    pub fn new(broker: Broker, session: SessionId) -> Self {
        Self { broker, session }
    }

    /// The broker.
    #[must_use]
    pub fn broker(&self) -> &Broker {
        &self.broker
    }

    /// The broker.
    pub fn broker_mut(&mut self) -> &mut Broker {
        &mut self.broker
    }

    /// The session.
    #[must_use]
    pub fn session(&self) -> SessionId {
        self.session
    }
}

/// One session of a broker that is somebody else's.
#[derive(Debug)]
pub struct Link<'a> {
    broker: &'a mut Broker,
    session: SessionId,
}

impl<'a> Link<'a> {
    /// To `session` of `broker`.
    pub fn new(broker: &'a mut Broker, session: SessionId) -> Self {
        Self { broker, session }
    }
}

impl BrokerLink for Link<'_> {
    fn submit(&mut self, id: RequestId, caller: &Caller, request: Request) -> Submitted {
        self.broker.handle(self.session, id, caller, request)
    }

    fn wants_program(&self) -> bool {
        self.broker.is_watched()
    }

    fn forget(&mut self, id: RequestId) {
        self.broker.forget(self.session, id);
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.broker.poll_fd())
    }

    /// Answers to several sessions come by [`Broker::completed`] alone: one does not take another's.
    fn completed(&mut self) -> Option<(RequestId, Answer)> {
        None
    }
}

impl BrokerLink for Embedded {
    fn submit(&mut self, id: RequestId, caller: &Caller, request: Request) -> Submitted {
        self.broker.handle(self.session, id, caller, request)
    }

    fn wants_program(&self) -> bool {
        self.broker.is_watched()
    }

    fn discard(&mut self, socket: OwnedFd) {
        self.broker.discard(socket);
    }

    fn forget(&mut self, id: RequestId) {
        self.broker.forget(self.session, id);
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.broker.poll_fd())
    }

    fn completed(&mut self) -> Option<(RequestId, Answer)> {
        self.broker.completed().map(|(_, id, answer)| (id, answer))
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        self.broker.close_session(self.session);
    }
}
