//! Which address a CID stands for; or a port, where the VMM gives out ports and every connection comes from CID 2.

use kso_wire::guest::{FIRST_NAMED_CID, FIRST_PSEUDO_CID, LAST_PSEUDO_CID, address_of, cid_of};
use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};

/// So many addresses that are no CIDs are remembered: what falls out is asked of the broker.
const MAX_PEERS: usize = 4096;

/// The addresses that a CID cannot carry, and what stands for them. The oldest fall out.
#[derive(Debug, Default)]
pub struct Peers {
    by_cid: HashMap<u32, IpAddr>,
    by_address: HashMap<IpAddr, u32>,
    order: VecDeque<u32>,
    given: u32,
    by_port: HashMap<u32, SocketAddr>,
    ports: VecDeque<u32>,
}

impl Peers {
    /// The CID to connect to for an address.
    pub fn cid(&mut self, address: IpAddr) -> u32 {
        let address = address.to_canonical();
        if let Some(cid) = cid_of(address).or_else(|| self.by_address.get(&address).copied()) {
            return cid;
        }
        let cid = FIRST_PSEUDO_CID + self.given;
        self.given = (self.given + 1) % (FIRST_NAMED_CID - FIRST_PSEUDO_CID);
        self.by_address.insert(address, cid);
        self.remember(cid, address);
        cid
    }

    /// The broker gave out a CID for an address.
    pub fn named(&mut self, cid: u32, address: IpAddr) {
        if (FIRST_NAMED_CID..LAST_PSEUDO_CID).contains(&cid) {
            self.remember(cid, address.to_canonical());
        }
    }

    /// The address of a CID, if it is known here.
    pub fn address(&self, cid: u32) -> Option<IpAddr> {
        address_of(cid).map(IpAddr::V4).or_else(|| self.by_cid.get(&cid).copied())
    }

    /// The VMM gave out a port of CID 2 for a connection from an address.
    pub fn came_by(&mut self, port: u32, address: SocketAddr) {
        if self.by_port.insert(port, address).is_none() {
            self.ports.push_back(port);
        }
        while self.ports.len() > MAX_PEERS {
            if let Some(oldest) = self.ports.pop_front() {
                self.by_port.remove(&oldest);
            }
        }
    }

    /// The address that a port of CID 2 stands for, if it is known here.
    pub fn of_port(&self, port: u32) -> Option<SocketAddr> {
        self.by_port.get(&port).copied()
    }

    fn remember(&mut self, cid: u32, address: IpAddr) {
        if self.by_cid.insert(cid, address).is_none() {
            self.order.push_back(cid);
        }
        while self.order.len() > MAX_PEERS {
            let Some(oldest) = self.order.pop_front() else { return };
            if let Some(address) = self.by_cid.remove(&oldest)
                && self.by_address.get(&address) == Some(&oldest)
            {
                self.by_address.remove(&address);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::net::Ipv6Addr;

    #[test]
    fn an_address_has_one_cid_and_back() {
        let mut peers = Peers::default();
        assert_eq!(peers.cid("::ffff:10.0.0.1".parse().unwrap()), 0x0a00_0001);
        assert_eq!(peers.address(0x0a00_0001), Some("10.0.0.1".parse().unwrap()));
        let v6: IpAddr = "2001:db8::1".parse().unwrap();
        let cid = peers.cid(v6);
        assert_eq!(cid, peers.cid(v6));
        assert_eq!(peers.address(cid), Some(v6));
        peers.named(FIRST_NAMED_CID + 5, v6);
        assert_eq!(peers.address(FIRST_NAMED_CID + 5), Some(v6));
        peers.named(5, v6);
        assert_eq!(peers.address(5), Some("0.0.0.5".parse().unwrap()), "a CID that is an address stays one");
    }

    #[test]
    fn no_more_is_remembered_than_the_bound() {
        let mut peers = Peers::default();
        for n in 0..3 * MAX_PEERS as u128 {
            peers.cid(Ipv6Addr::from(1_u128 << 100 | n).into());
            peers.named(FIRST_NAMED_CID + n as u32, Ipv6Addr::from(1_u128 << 101 | n).into());
        }
        assert!(peers.by_cid.len() <= MAX_PEERS && peers.by_address.len() <= MAX_PEERS);
        assert_eq!(peers.order.len(), peers.by_cid.len());
    }

    #[test]
    fn a_port_of_the_vmm_has_the_address_that_was_told_last() {
        let mut peers = Peers::default();
        let address = |port| SocketAddr::from(([10, 0, 0, 1], port));
        peers.came_by(1 << 30, address(1));
        peers.came_by(1 << 30, address(2));
        assert_eq!(peers.of_port(1 << 30), Some(address(2)));
        for port in 0..2 * MAX_PEERS as u32 {
            peers.came_by(port, address(3));
        }
        assert_eq!(peers.of_port(1 << 30), None);
        assert!(peers.by_port.len() == MAX_PEERS && peers.ports.len() == MAX_PEERS);
    }
}
