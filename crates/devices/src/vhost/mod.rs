//! A vhost-user back end that runs in any loop.
//!
//! ```text
//!   VMM == unix socket ==> FrontEnd --handle()--> Change::Started(i, Queue) | Change::Stopped(i)
//!                             |                         |
//!                 GET_VRING_BASE closes it              v
//!                             +------------------> Queue --lock()--> Ring: pop, push, signal
//! ```
//!
//! The owner watches the [`FrontEnd`]'s descriptor and calls [`FrontEnd::handle`] when it is readable. Each
//! [`Queue`] that a change starts has a kick to wait for ([`Queue::kick`]; register it **edge-triggered and never
//! read it**: nothing then depends on what the front end passed), and may be served by any thread: [`Queue::lock`]
//! gives the ring, or `None` once the front end has stopped it. A thread that works on a request for long
//! lets go of the lock after [`Ring::pop`] and takes it again for [`Ring::push`]; the chain holds the memory alive.
//! A front end that stops a ring does not wait for such requests: their `push` then finds the ring closed.
//!
//! ```text
//!   loop {                                               a worker
//!     let Some(mut ring) = queue.lock() else { break };
//!     ring.suppress_kicks();
//!     while let Some(chain) = ring.pop(ring.memory())? { ..; ring.push(chain.head_index(), written)?; }
//!     ring.signal()?;
//!     if ring.await_kicks()? { continue }                // something came in between
//!     drop(ring); wait for queue.kick()
//!   }
//! ```
//!
//! What the front end sends is not trusted: a wrong message ends the connection.

mod front;
mod queue;
mod state;

pub use front::{Error, FrontEnd};
pub use queue::{Broken, Chain, Memory, Queue, Ring};
pub use state::{Change, Spec};
