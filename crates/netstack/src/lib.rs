//! smoltcp as an external kernel: the TCP of programs in user space, on an Ethernet interface of its own.
//!
//! ```text
//!   broker's side                      this crate, a thread for each kernel                  the network
//!     control: wire::provide  <---->  Session: one epoll loop
//!     streams, passed         <---->    Joint: a stream and its connection, byte for byte
//!                                       Stack: connections, listeners, ports   (no I/O)
//!                                         smoltcp: a set of one socket for each connection
//!                                         Egress, Neighbours: next hop, ARP, NDP, offloads
//!                                       Tap: frames with virtio-net headers  <-----------------> TAP
//! ```
//!
//! smoltcp is the TCP: segments, windows, retransmission, congestion control. What a kernel has around that is made here:
//! a backlog (a listening socket of smoltcp takes one connection), a table of connections whose cost does not grow
//! with their number (smoltcp looks through all sockets of a set), ports, TIME_WAIT without buffers, errors told by
//! ICMP, the path's MTU, and neighbours that can fail.
//!
//! The crate knows nothing of policy, programs or stand-ins; it does what `kso_wire::provide` asks for, as the provider of a
//! Linux does.
#![forbid(unsafe_code)]

mod config;
mod connection;
mod egress;
mod frame;
mod joint;
mod listeners;
mod neighbours;
mod options;
mod packet;
mod session;
mod solicit;
mod stack;
mod tap;
mod waiting;

pub use config::{Config, ConfigError};
pub use connection::ConnectionId;
pub use options::Options;
pub use packet::Tuple;
pub use session::{Fault, Session};
pub use stack::{Event, Link, Stack};
pub use tap::Tap;

use std::os::fd::OwnedFd;

/// Serves the broker behind `control` on the caller's thread, until it is gone.
///
/// # Errors
/// See [`Fault`].
pub fn serve(control: OwnedFd, tap: Tap, config: &Config) -> Result<(), Fault> {
    Session::new(control, tap, config)?.run()
}
