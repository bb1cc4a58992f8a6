//! Socket operations on the kernel it runs on: the external kernel `host`, in process.
//!
//! It does what it is told and takes no decisions: addresses come translated and permitted by the broker. It
//! opens streams ([`stream`]), datagram flows ([`datagram`]) and ping sockets ([`echo`]), sees which listeners
//! still live without holding them ([`alive`]), and looks at the kernel: its own addresses ([`addresses`]),
//! its sockets ([`diagnostics`]) and processes ([`processes`]).
//!
//! For a broker on another kernel it is a process: [`server`] performs what comes over a [`channel`], [`client`] is the
//! broker's end of that, and [`relay`] joins a socket with its stream.
//!
//! No call blocks, and no descriptor stays here that was handed out.
#![forbid(unsafe_code)]

pub mod addresses;
pub mod alive;
pub mod channel;
pub mod client;
pub mod datagram;
pub mod diagnostics;
pub mod echo;
pub mod everywhere;
mod netlink;
pub mod processes;
pub mod relay;
pub mod server;
pub mod stock;
pub mod stream;

use kso_wire::{Errno, Family};
use rustix::net::{AddressFamily, SocketAddrAny};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};

/// The portable error of a failed call.
fn errno(error: rustix::io::Errno) -> Errno {
    kso_sys::errno::from_raw(error.raw_os_error())
}

fn domain(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::INET,
        Family::V6 => AddressFamily::INET6,
    }
}

/// The family of an address.
#[must_use]
pub fn family_of(address: SocketAddr) -> Family {
    if address.is_ipv4() { Family::V4 } else { Family::V6 }
}

/// The local address of a socket.
///
/// # Errors
/// Not an Internet socket.
pub fn local_address(socket: &OwnedFd) -> Result<SocketAddr, Errno> {
    let address: SocketAddrAny = rustix::net::getsockname(socket.as_fd()).map_err(errno)?;
    SocketAddr::try_from(address).map_err(errno)
}
