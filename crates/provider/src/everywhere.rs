//! A network in which every address is the kernel's own: for stand-ins (`kso-kernels`).
//!
//! Routes of type `local` for everything (ip-route(8)), on the loopback device.

use crate::netlink::Netlink;
use std::io;

/// `RTM_NEWLINK`.
const NEW_LINK: u16 = 16;
/// `RTM_NEWROUTE`.
const NEW_ROUTE: u16 = 24;
/// `NLM_F_CREATE | NLM_F_REPLACE`.
const CREATE_REPLACE: u16 = 0x500;
/// Index of `lo` in every network namespace.
const LOOPBACK: u32 = 1;
/// `IFF_UP`.
const UP: u32 = 1;
/// `RTA_OIF`.
const DEVICE: u16 = 4;
/// `RT_TABLE_LOCAL`, `RTPROT_BOOT`, `RT_SCOPE_HOST`, `RTN_LOCAL`.
const LOCAL: [u8; 4] = [255, 3, 254, 2];
/// `AF_INET`, `AF_INET6`.
const FAMILIES: [u8; 2] = [2, 10];

/// Makes the calling thread's network namespace one: `lo` is up, and every address is local. Without IPv6 it is one of
/// IPv4.
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN` there.
pub fn make() -> io::Result<()> {
    let netlink = Netlink::open(None, 0)?;
    // struct ifinfomsg
    let mut link = vec![0; 4];
    for word in [LOOPBACK, UP, UP] {
        link.extend_from_slice(&word.to_ne_bytes());
    }
    netlink.change(NEW_LINK, 0, &link)?;
    for family in FAMILIES {
        // struct rtmsg: no prefix, no type of service.
        let mut route = vec![family, 0, 0, 0];
        route.extend_from_slice(&LOCAL);
        route.extend_from_slice(&[0; 4]);
        route.extend_from_slice(&8_u16.to_ne_bytes());
        route.extend_from_slice(&DEVICE.to_ne_bytes());
        route.extend_from_slice(&LOOPBACK.to_ne_bytes());
        match netlink.change(NEW_ROUTE, CREATE_REPLACE, &route) {
            Err(error) if family == FAMILIES[1] => tracing::debug!(%error, "no IPv6 for stand-ins"),
            other => other?,
        }
    }
    Ok(())
}
