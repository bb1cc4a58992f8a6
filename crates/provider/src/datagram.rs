//! Datagram flows and published datagram ports.
//!
//! Each flow is a socket connected to its peer, so that the kernel sorts what comes back and reports ICMP
//! errors to the right flow. Flows of one sender inside leave from one port outside, as NAT with
//! endpoint-independent mapping does (RFC 4787, 4.1): their sockets share the port by `SO_REUSEPORT`, which,
//! unlike `SO_REUSEADDR`, keeps other users out (socket(7)).
//!
//! The first socket gets its port *before* it permits sharing: with sharing permitted the kernel might give it
//! a port that another sender's flows use (net/ipv4/udp.c, udp_lib_get_port).

use crate::{domain, errno, family_of, local_address};
use kso_wire::{Errno, Family};
use rustix::net::{SocketFlags, SocketType, sockopt};
use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};

/// Receive and send buffer that is asked for, bytes: a burst of a bulk sender. It is a limit, not memory used.
const BUFFER: usize = 4 << 20;

/// Which port outside a sender inside has. The descriptors of flows are not held here, so an entry may outlive
/// its flows; then the port is free or somebody else's, and the next flow gets another. What was not used
/// for longest goes first.
#[derive(Debug)]
pub struct Ports {
    limit: usize,
    clock: u64,
    by_sender: HashMap<SocketAddr, (u16, u64)>,
    by_age: BTreeMap<u64, SocketAddr>,
}

impl Ports {
    /// Remembers at most `limit` senders.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { limit, clock: 0, by_sender: HashMap::new(), by_age: BTreeMap::new() }
    }

    fn get(&self, sender: SocketAddr) -> Option<u16> {
        self.by_sender.get(&sender).map(|(port, _)| *port)
    }

    fn put(&mut self, sender: SocketAddr, port: u16) {
        self.clock += 1;
        if let Some((_, age)) = self.by_sender.insert(sender, (port, self.clock)) {
            self.by_age.remove(&age);
        }
        self.by_age.insert(self.clock, sender);
        while self.by_age.len() > self.limit
            && let Some((_, oldest)) = self.by_age.pop_first()
        {
            self.by_sender.remove(&oldest);
        }
    }
}

fn fresh(family: Family) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(domain(family), SocketType::DGRAM, flags, None).map_err(errno)?;
    if family == Family::V6 {
        sockopt::set_ipv6_v6only(&socket, true).map_err(errno)?;
    }
    kso_sys::provide::receive_errors(socket.as_fd(), family).map_err(|error| kso_sys::errno::of(&error))?;
    // Beyond net.core.rmem_max with CAP_NET_ADMIN; a smaller buffer is no reason to fail.
    if sockopt::set_socket_recv_buffer_size_force(&socket, BUFFER).is_err() {
        let _ = sockopt::set_socket_recv_buffer_size(&socket, BUFFER);
    }
    if sockopt::set_socket_send_buffer_size_force(&socket, BUFFER).is_err() {
        let _ = sockopt::set_socket_send_buffer_size(&socket, BUFFER);
    }
    Ok(socket)
}

fn any(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// Opens the flow of `sender` (inside) to `peer` (outside).
///
/// # Errors
/// What `socket`, `bind` or `connect` said.
pub fn open(ports: &mut Ports, sender: SocketAddr, peer: SocketAddr) -> Result<OwnedFd, Errno> {
    let family = family_of(peer);
    let socket = fresh(family)?;
    let shared = ports.get(sender).is_some_and(|port| {
        sockopt::set_socket_reuseport(&socket, true).is_ok()
            && rustix::net::bind(&socket, &SocketAddr::new(any(family), port)).is_ok()
    });
    if !shared {
        sockopt::set_socket_reuseport(&socket, false).map_err(errno)?;
        rustix::net::bind(&socket, &SocketAddr::new(any(family), 0)).map_err(errno)?;
        sockopt::set_socket_reuseport(&socket, true).map_err(errno)?;
    }
    rustix::net::connect(&socket, &peer).map_err(errno)?;
    ports.put(sender, local_address(&socket)?.port());
    Ok(socket)
}

/// Binds a published port.
///
/// # Errors
/// What `bind` said.
pub fn bind(address: SocketAddr) -> Result<OwnedFd, Errno> {
    let socket = fresh(family_of(address))?;
    rustix::net::bind(&socket, &address).map_err(errno)?;
    Ok(socket)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use std::net::UdpSocket;

    fn peers(loopback: &str) -> [UdpSocket; 2] {
        [UdpSocket::bind((loopback, 0)).unwrap(), UdpSocket::bind((loopback, 0)).unwrap()]
    }

    #[test]
    fn flows_of_one_sender_share_a_port_and_each_hears_its_own_peer() {
        let mut ports = Ports::new(16);
        for (loopback, sender) in [("127.0.0.1", "198.18.0.2:5000"), ("::1", "[fd6b:736f::2]:5000")] {
            let sender: SocketAddr = sender.parse().unwrap();
            let peers = peers(loopback);
            let flows: Vec<UdpSocket> = peers
                .iter()
                .map(|peer| open(&mut ports, sender, peer.local_addr().unwrap()).unwrap().into())
                .collect();
            let port = flows[0].local_addr().unwrap().port();
            assert_eq!(flows[1].local_addr().unwrap().port(), port);
            for (index, peer) in peers.iter().enumerate().rev() {
                peer.send_to(&[index as u8], (loopback, port)).unwrap();
            }
            for (index, flow) in flows.iter().enumerate() {
                flow.set_nonblocking(false).unwrap();
                let mut read = [9; 1];
                flow.recv(&mut read).unwrap();
                assert_eq!(read, [index as u8]);
            }
        }
    }

    #[test]
    fn senders_have_different_ports() {
        let mut ports = Ports::new(64);
        let peer = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let flows: Vec<OwnedFd> = (1..=200)
            .map(|port| open(&mut ports, SocketAddr::from(([198, 18, 0, 2], port)), peer).unwrap())
            .collect();
        let mut seen: Vec<u16> = flows.iter().map(|flow| local_address(flow).unwrap().port()).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), flows.len());
        assert_eq!(ports.by_sender.len(), 64);
        assert_eq!(ports.by_age.len(), 64);
    }

    #[test]
    fn a_port_that_was_lost_is_replaced() {
        let mut ports = Ports::new(16);
        let sender = "198.18.0.2:5000".parse().unwrap();
        let other = UdpSocket::bind("0.0.0.0:0").unwrap();
        ports.put(sender, other.local_addr().unwrap().port());
        let peer = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let flow = open(&mut ports, sender, peer).unwrap();
        assert_ne!(local_address(&flow).unwrap().port(), other.local_addr().unwrap().port());
    }
}
