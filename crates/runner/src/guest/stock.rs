//! Sockets for connections, made in advance.
//!
//! Making one takes half a dozen calls, which cost a fifth of that when they are made for several in a row.

use super::connect::BUFFER;
use super::connector::PATIENCE;
use super::ports::Ports;
use kso_sys::{errno, vsock};
use kso_wire::{Errno, Family};
use rustix::fs::fstat;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// So many ports are tried before there is none.
const PORT_ATTEMPTS: usize = 16;
/// Most that are made in a row.
const MOST: usize = 16;

/// A socket that is bound to a port of ours and can be connected.
#[derive(Debug)]
pub(super) struct Ready {
    pub(super) socket: Arc<OwnedFd>,
    pub(super) port: u32,
    pub(super) inode: u64,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Stock {
    v4: Vec<Ready>,
    v6: Vec<Ready>,
    /// So many are made next.
    next: usize,
}

impl Stock {
    /// A socket for a connection outside.
    ///
    /// # Errors
    /// `EMFILE`, `ENOMEM`, `EADDRNOTAVAIL`.
    pub(super) fn take(&mut self, family: Family, ports: &mut Ports) -> io::Result<Ready> {
        let shelf = if family == Family::V4 { &mut self.v4 } else { &mut self.v6 };
        if shelf.is_empty() {
            // Who makes one connection only shall not pay for many.
            self.next = (2 * self.next).clamp(1, MOST);
            for _ in 1..self.next {
                shelf.push(ready(family, ports)?);
            }
            return ready(family, ports);
        }
        shelf.pop().ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

fn ready(family: Family, ports: &mut Ports) -> io::Result<Ready> {
    let (socket, port) = bound(ports, |ports| ports.connection(family, false))?;
    vsock::set_connect_timeout(socket.as_fd(), PATIENCE)?;
    let inode = fstat(&socket)?.st_ino;
    Ok(Ready { socket: Arc::new(socket), port, inode })
}

/// A vsock socket, bound to a port that `next` gives out.
///
/// # Errors
/// As [`Stock::take`].
pub(super) fn bound(
    ports: &mut Ports,
    mut next: impl FnMut(&mut Ports) -> u32,
) -> io::Result<(OwnedFd, u32)> {
    let socket = vsock::socket()?;
    vsock::set_buffer(socket.as_fd(), BUFFER)?;
    for _ in 0..PORT_ATTEMPTS {
        let port = next(ports);
        match vsock::bind(socket.as_fd(), port) {
            Ok(()) => return Ok((socket, port)),
            Err(error) if errno::of(&error) == Errno::EADDRINUSE => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::from_raw_os_error(errno::to_raw(Errno::EADDRNOTAVAIL)))
}
