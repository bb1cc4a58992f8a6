//! Guests of a broker reach each other's published listeners as `NAME.kso.internal`, with the port inside.
//!
//! Each guest has an address for that, out of the half of 198.18.0.0/15 (RFC 2544: nobody's) that the TUN does not use.

use super::Guests;
use crate::broker::Broker;
use crate::session::SessionId;
use kso_core::names::normal;
use kso_devices::vsock::GuestId;
use std::net::{IpAddr, Ipv4Addr};

/// What names of guests end with.
pub(crate) const GUESTS: &str = ".kso.internal";
/// 198.19.0.0/16.
const POOL: u32 = u32::from_be_bytes([198, 19, 0, 0]);
const POOL_MASK: u32 = 0xffff_0000;
/// Most guests at one time: also far fewer than there are addresses.
const MAX_GUESTS: usize = 4096;

/// Whether an address stands for a guest.
pub(crate) fn is_guest_address(address: IpAddr) -> bool {
    matches!(address.to_canonical(), IpAddr::V4(v4) if u32::from(v4) & POOL_MASK == POOL)
}

impl Guests {
    /// An address that no guest has. One that a guest had is not given out again soon.
    pub(super) fn free_address(&mut self) -> Option<Ipv4Addr> {
        if self.all.len() >= MAX_GUESTS {
            return None;
        }
        loop {
            // Neither the network's own address nor its broadcast address.
            self.next_address = if self.next_address >= u16::MAX - 1 { 1 } else { self.next_address + 1 };
            let address = Ipv4Addr::from(POOL | u32::from(self.next_address));
            if self.all.values().all(|guest| guest.address != address) {
                return Some(address);
            }
        }
    }

    /// The guest that has an address.
    pub(super) fn at(&self, address: IpAddr) -> Option<GuestId> {
        let IpAddr::V4(address) = address.to_canonical() else { return None };
        self.all.iter().find(|(_, guest)| guest.address == address).map(|(id, _)| *id)
    }

    /// The addresses of guests with their sessions.
    fn addresses(&self) -> impl Iterator<Item = (u64, Ipv4Addr)> {
        self.all.values().map(|guest| (guest.session.0, guest.address))
    }
}

impl Broker {
    /// The names of guests, if `asker` is one, and their addresses. A name belongs to who had it first.
    pub(crate) fn names_of_guests(&self, asker: SessionId) -> Vec<(String, Ipv4Addr)> {
        if self.guests.of_session(asker).is_none() {
            return Vec::new();
        }
        let mut named: Vec<_> = self
            .guests
            .addresses()
            .filter_map(|(id, address)| Some((id, host_name(&self.sessions.get(&id)?.name)?, address)))
            .collect();
        named.sort_by_key(|(id, ..)| *id);
        named.into_iter().map(|(_, name, address)| (name, address)).collect()
    }
}

/// The name of a session as others ask for it, if it can be one.
fn host_name(session: &str) -> Option<String> {
    let name = normal(session).filter(|name| !name.contains('.') && name != "host")?;
    Some(name + GUESTS)
}
