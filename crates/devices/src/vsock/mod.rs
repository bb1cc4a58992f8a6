//! The vsock device: the streams of guests end at sockets of the host, at the broker, or in another guest.
//!
//! [`Hub`] is the device of all guests of a process; [`Outside`] is what it asks of the broker. Below, [`stream`]
//! knows when who may send what and does no I/O; [`packet`] and [`chain`] know how it lies in guest memory.

pub mod chain;
pub mod packet;
pub mod stream;

mod ends;
mod guest;
mod hub;
mod outside;
mod receive;
mod sender;
mod sendfile;
mod spin;
mod streams;
mod table;
mod transmit;

pub use guest::Endpoint;
pub use hub::{Hub, Limits, MAX_STREAMS};
pub use outside::{End, GuestId, Outside, Verdict};
