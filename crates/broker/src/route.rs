//! Where a connection goes: what the program said, translated.
//!
//! ```text
//!   an address of another guest --> nowhere (see `guest`)
//!   127.0.0.1, ::1, 0.0.0.0, ::, own TUN address
//!        a published listener of the session --> that listener, outside
//!        --loopback external, not a TUN address --> the host's loopback, as it is
//!        else --> inside
//!   the TUN gateway, port 53  --> inside: by the TUN, to the gateway's own name server
//!   the TUN gateway           --> the host's loopback        host
//!   an address of the host's  --> as it is                   host
//!   else                      --> as it is
//! ```
//!
//! *host* stands for the host's loopback in policy. An address of one of the host's interfaces is one too:
//! what the host serves on its wildcard address answers there as it does on loopback, so loopback alone would
//! protect little.

use crate::guest::is_guest_address;
use kso_core::policy::canonical;
use kso_wire::{Family, TunAddresses};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Where names are asked for (RFC 1035, 4.2).
const NAMES: u16 = 53;

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// The client kernel's own business, unless a published listener is meant.
    Inside,
    /// To this address, if policy permits.
    Outside {
        /// Translated; of the family of the program's socket.
        peer: SocketAddr,
        /// It stands for the host's loopback.
        host: bool,
    },
}

/// The route to `peer`. `own`: whether an address is one of the host's.
pub(crate) fn route(
    peer: SocketAddr,
    tun: &TunAddresses,
    external_loopback: bool,
    own: impl FnOnce(IpAddr) -> bool,
) -> Route {
    let ip = canonical(peer.ip());
    if ip.is_loopback() {
        return if external_loopback { Route::Outside { peer, host: false } } else { Route::Inside };
    }
    // What goes to other guests is found before, by who can reach them.
    if tun.is_guest(ip) || is_guest_address(ip) {
        return Route::Inside;
    }
    if tun.is_gateway(ip) && peer.port() == NAMES {
        return Route::Inside;
    }
    if tun.is_gateway(ip) {
        return Route::Outside { peer: loopback_like(peer), host: true };
    }
    Route::Outside { peer, host: own(ip) }
}

/// Loopback in the form of `peer`: IPv4, IPv6 or IPv4-mapped.
fn loopback_like(peer: SocketAddr) -> SocketAddr {
    let ip = match peer.ip() {
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some() => Ipv4Addr::LOCALHOST.to_ipv6_mapped().into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    };
    SocketAddr::new(ip, peer.port())
}

/// `address` as a socket of `family` connects to it; `None` if it cannot.
pub(crate) fn in_family(address: SocketAddr, family: Family) -> Option<SocketAddr> {
    let ip = match (address.ip().to_canonical(), family) {
        (IpAddr::V4(ip), Family::V4) => IpAddr::V4(ip),
        (IpAddr::V4(ip), Family::V6) => IpAddr::V6(ip.to_ipv6_mapped()),
        (IpAddr::V6(ip), Family::V6) => IpAddr::V6(ip),
        (IpAddr::V6(_), Family::V4) => return None,
    };
    Some(SocketAddr::new(ip, address.port()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn to(peer: &str, external: bool) -> Route {
        let own = |ip| ip == IpAddr::from([192, 0, 2, 9]);
        route(peer.parse().unwrap(), &TunAddresses::standard(), external, own)
    }

    fn outside(peer: &str, host: bool) -> Route {
        Route::Outside { peer: peer.parse().unwrap(), host }
    }

    #[test]
    fn loopback_is_inside_unless_it_is_external() {
        for peer in
            ["127.0.0.1:80", "127.9.9.9:80", "[::1]:80", "0.0.0.0:80", "[::]:80", "[::ffff:127.0.0.1]:80"]
        {
            assert_eq!(to(peer, false), Route::Inside, "{peer}");
            assert_eq!(to(peer, true), outside(peer, false), "{peer}");
        }
        for peer in ["198.18.0.2:80", "[fd6b:736f::2]:80"] {
            assert_eq!(to(peer, true), Route::Inside);
        }
    }

    #[test]
    fn the_gateway_is_the_loopback_of_the_host() {
        assert_eq!(to("198.18.0.1:8000", false), outside("127.0.0.1:8000", true));
        assert_eq!(to("198.18.0.1:53", false), Route::Inside);
        assert_eq!(to("[fd6b:736f::1]:8000", true), outside("[::1]:8000", true));
        assert_eq!(to("[::ffff:198.18.0.1]:8000", false), outside("[::ffff:127.0.0.1]:8000", true));
    }

    #[test]
    fn an_address_of_the_host_is_the_host() {
        assert_eq!(to("192.0.2.9:22", false), outside("192.0.2.9:22", true));
        assert_eq!(to("[::ffff:192.0.2.9]:22", false), outside("[::ffff:192.0.2.9]:22", true));
        assert_eq!(to("192.0.2.1:22", false), outside("192.0.2.1:22", false));
    }

    #[test]
    fn an_ipv4_socket_has_no_ipv6_peer() {
        let of = |text: &str, family| in_family(text.parse().unwrap(), family).map(|found| found.to_string());
        assert_eq!(of("[::ffff:127.0.0.1]:1", Family::V4).unwrap(), "127.0.0.1:1");
        assert_eq!(of("127.0.0.1:1", Family::V6).unwrap(), "[::ffff:127.0.0.1]:1");
        assert_eq!(of("[::1]:1", Family::V4), None);
    }
}
