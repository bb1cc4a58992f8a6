//! The kernel's own addresses.
//!
//! What the host serves on its wildcard address it serves on each of these; whoever protects its loopback must
//! protect them too. Read once by rtnetlink(7), and again when the kernel tells of a change.

use crate::netlink::{Message, Netlink, attributes};
use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd};

/// `RTM_GETADDR`.
const GET_ADDRESSES: u16 = 22;
/// `RTM_NEWADDR`.
const ADDRESS: u16 = 20;
/// `IFA_ADDRESS`: the peer's on a point-to-point link.
const ATTRIBUTE_ADDRESS: u16 = 1;
/// `IFA_LOCAL`: our own there.
const ATTRIBUTE_LOCAL: u16 = 2;
/// `RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR`.
const CHANGES: u32 = 0x10 | 0x100;
/// `sizeof(struct ifaddrmsg)`.
const HEADER: usize = 8;

/// See the module.
#[derive(Debug)]
pub struct Addresses {
    changes: Netlink,
    own: HashSet<IpAddr>,
}

impl Addresses {
    /// Reads them, and asks to be told of changes.
    ///
    /// # Errors
    /// Netlink is not there.
    pub fn new() -> io::Result<Self> {
        let changes = Netlink::open(None, CHANGES)?;
        Ok(Self { changes, own: read()? })
    }

    /// Whether `address` is one of them.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        self.own.contains(&address)
    }

    /// Readable when they changed.
    #[must_use]
    pub fn poll_fd(&self) -> BorrowedFd<'_> {
        self.changes.as_fd()
    }

    /// Reads them again after a change.
    pub fn run_ready(&mut self) {
        // Also after ENOBUFS: whatever was told, it is read anew.
        let _ = self.changes.notifications(&mut [0; 8192], |_| {});
        match read() {
            Ok(own) => self.own = own,
            Err(error) => tracing::warn!(%error, "the host's addresses cannot be read again"),
        }
    }
}

/// All there are now.
///
/// # Errors
/// Netlink is not there.
pub fn all() -> io::Result<Vec<IpAddr>> {
    Ok(read()?.into_iter().collect())
}

fn read() -> io::Result<HashSet<IpAddr>> {
    let mut own = HashSet::new();
    Netlink::open(None, 0)?.dump(GET_ADDRESSES, &[0; HEADER], |message| own.extend(parse(message)))?;
    Ok(own)
}

fn parse(message: Message<'_>) -> Option<IpAddr> {
    if message.kind != ADDRESS {
        return None;
    }
    let (mut address, mut local) = (None, None);
    for (kind, value) in attributes(message.body.get(HEADER..)?) {
        match kind {
            ATTRIBUTE_ADDRESS => address = ip(value),
            ATTRIBUTE_LOCAL => local = ip(value),
            _ => {}
        }
    }
    local.or(address)
}

fn ip(value: &[u8]) -> Option<IpAddr> {
    match value.len() {
        4 => Some(Ipv4Addr::from(*value.first_chunk::<4>()?).into()),
        16 => Some(Ipv6Addr::from(*value.first_chunk::<16>()?).into()),
        _ => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_ours_and_a_documentation_address_is_not() {
        let own = Addresses::new().unwrap();
        assert!(own.contains(Ipv4Addr::LOCALHOST.into()));
        assert!(!own.contains(Ipv4Addr::new(192, 0, 2, 1).into()));
    }
}
