//! What performs the requests of a transport.

use crate::relay::{Asker, Relay};
use crate::{Outcome, Pieces, Service, Worker};
use std::sync::Arc;

/// This kernel, or another.
#[derive(Clone, Debug)]
pub enum Performer {
    /// This one.
    Local(Arc<Service>),
    /// Another, by a stream.
    Relayed(Arc<Relay>),
}

/// The same for one thread.
#[derive(Debug)]
pub enum Server {
    /// See [`Performer::Local`].
    Local(Box<Worker>),
    /// See [`Performer::Relayed`].
    Relayed(Asker),
}

impl Performer {
    /// Makes the calling thread one that serves: of a local service for the rest of its life (see [`Worker::new`]).
    ///
    /// # Errors
    /// The thread's identity could not be changed.
    pub fn server(&self) -> std::io::Result<Server> {
        Ok(match self {
            Self::Local(service) => Server::Local(Box::new(Worker::new(service.clone())?)),
            Self::Relayed(relay) => Server::Relayed(relay.asker()),
        })
    }

    /// The client is gone: its locks, files and nodes are let go of.
    pub fn disconnect(&self) {
        match self {
            Self::Local(service) => service.disconnect(),
            Self::Relayed(relay) => relay.disconnect(),
        }
    }
}

impl Server {
    /// Serves the request in `readable`. The reply is written to `writable`, or comes later.
    pub fn serve(&mut self, readable: Pieces<'_>, writable: Pieces<'_>) -> Outcome {
        match self {
            Self::Local(worker) => worker.serve(readable, writable),
            Self::Relayed(asker) => asker.serve(readable, writable),
        }
    }
}
