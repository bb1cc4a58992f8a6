//! ICMP echo: ping sockets.
//!
//! A datagram ICMP socket needs no privilege but a group in `net.ipv4.ping_group_range` (icmp(7)); a raw one
//! needs `CAP_NET_RAW` and is the second choice.

use crate::errno;
use kso_wire::{Errno, Family};
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};

/// Opens a ping socket connected to `peer`; and whether it is raw.
///
/// # Errors
/// `EACCES`: neither kind is permitted.
pub fn open(peer: IpAddr) -> Result<(OwnedFd, bool), Errno> {
    let (domain, protocol, family) = match peer {
        IpAddr::V4(_) => (AddressFamily::INET, ipproto::ICMP, Family::V4),
        IpAddr::V6(_) => (AddressFamily::INET6, ipproto::ICMPV6, Family::V6),
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let open = |kind| rustix::net::socket_with(domain, kind, flags, Some(protocol));
    let (socket, raw) = match open(SocketType::DGRAM) {
        Ok(socket) => (socket, false),
        Err(rustix::io::Errno::ACCESS | rustix::io::Errno::PERM) => match open(SocketType::RAW) {
            Ok(socket) => (socket, true),
            Err(_) => return Err(Errno::EACCES),
        },
        Err(error) => return Err(errno(error)),
    };
    kso_sys::provide::receive_errors(socket.as_fd(), family).map_err(|error| kso_sys::errno::of(&error))?;
    if raw && family == Family::V4 {
        let filtered = kso_sys::provide::only_echo_answers(socket.as_fd());
        filtered.map_err(|error| kso_sys::errno::of(&error))?;
    }
    rustix::net::connect(&socket, &SocketAddr::new(peer, 0)).map_err(errno)?;
    Ok((socket, raw))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::net::{RecvFlags, SendFlags};

    #[test]
    fn loopback_answers_a_ping() {
        let (socket, raw) = match open(IpAddr::from([127, 0, 0, 1])) {
            Ok(opened) => opened,
            // Neither a group nor a privilege: nothing to test.
            Err(Errno::EACCES) => return,
            Err(other) => panic!("{other}"),
        };
        // Echo request, its checksum (RFC 1071) right for identifier 0: a ping socket sets both anew.
        let request = [8, 0, 0xf7, 0xfe, 0, 0, 0, 1];
        rustix::net::send(&socket, &request, SendFlags::empty()).unwrap();
        let mut polled = [PollFd::new(&socket, PollFlags::IN)];
        assert_eq!(poll(&mut polled, Some(&Timespec { tv_sec: 2, tv_nsec: 0 })).unwrap(), 1);
        let mut read = [0; 64];
        let (length, _) = rustix::net::recv(&socket, &mut read[..], RecvFlags::empty()).unwrap();
        assert_eq!(length, if raw { 28 } else { 8 });
    }
}
