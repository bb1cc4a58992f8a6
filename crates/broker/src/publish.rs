//! Where a listener of the program listens outside.
//!
//! | the program's socket | no address (loopback) | IPv4 address | IPv6 address | every address |
//! |---|---|---|---|---|
//! | `AF_INET` | 127.0.0.1 | it | - | 0.0.0.0 |
//! | `AF_INET6`, both families | :: on the loopback device | it, mapped | it | :: |
//! | `AF_INET6`, IPv6 only | ::1 | - | it | :: |
//!
//! The descriptor must have the family of the program's own socket, so some publications do not fit some
//! listeners (-): those stay inside, and a warning says so. So does a listener that the program bound to
//! loopback: what a program does not show to its own network it does not mean to publish, as in containers.
//!
//! With `--loopback external` a listener that nothing publishes is made outside too, on the address that
//! the program gave it if that is loopback, and on the wildcard address *of the loopback device* if it is
//! the wildcard: other interfaces do not reach it.

use kso_core::routes::{Asked, Routes};
use kso_provider::stream::Place;
use kso_wire::provide::Service;
use kso_wire::{Family, Listen, LoopbackMode, OptionName, Protocol, Publication};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// What becomes of a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// Nothing publishes it.
    Inside,
    /// It is published, but no publication fits its family.
    Unfit,
    /// Its port is published, but the program listens on loopback alone.
    OnLoopback,
    /// It listens here.
    Outside(Place),
}

/// Whether the program's socket takes only IPv6.
pub(crate) fn v6_only(listen: &Listen) -> bool {
    listen.options.get(OptionName::V6Only) == Some(1)
}

/// See the module.
pub(crate) fn fate(listen: &Listen, publications: &[Publication], mode: LoopbackMode) -> Fate {
    let ip = listen.local.ip().to_canonical();
    let port = listen.local.port();
    let published = |one: &&Publication| {
        one.protocol == Protocol::Tcp && (one.inner_port == 0 || one.inner_port == port && port != 0)
    };
    if ip.is_loopback() && mode == LoopbackMode::Private {
        let explicit = |one: &Publication| published(&one) && one.inner_port != 0;
        return if publications.iter().any(explicit) { Fate::OnLoopback } else { Fate::Inside };
    }
    let mut unfit = false;
    if !ip.is_loopback() {
        for publication in publications.iter().filter(published) {
            unfit = true;
            if let Some((address, loopback_only)) = address(publication.address, listen) {
                let port = if publication.outer_port == 0 { port } else { publication.outer_port };
                // A port that is only kept must keep others out, also those that permit reuse.
                let reuse = mode == LoopbackMode::Private && port != 0;
                return Fate::Outside(Place {
                    address: SocketAddr::new(address, port),
                    loopback_only,
                    reuse,
                });
            }
        }
    }
    if mode == LoopbackMode::External && (ip.is_loopback() || ip.is_unspecified()) {
        let loopback_only = ip.is_unspecified();
        return Fate::Outside(Place { address: listen.local, loopback_only, reuse: false });
    }
    if unfit { Fate::Unfit } else { Fate::Inside }
}

/// Where a listener listens outside, and whether on the loopback device alone.
fn address(published: Option<IpAddr>, listen: &Listen) -> Option<(IpAddr, bool)> {
    let v6_only = v6_only(listen);
    let address: IpAddr = match (published, listen.family) {
        (None, Family::V4) => Ipv4Addr::LOCALHOST.into(),
        (None, Family::V6) if v6_only => Ipv6Addr::LOCALHOST.into(),
        // One socket for 127.0.0.1 and ::1.
        (None, Family::V6) => return Some((Ipv6Addr::UNSPECIFIED.into(), true)),
        (Some(ip), Family::V4) if ip.is_unspecified() => Ipv4Addr::UNSPECIFIED.into(),
        (Some(ip), Family::V6) if ip.is_unspecified() => Ipv6Addr::UNSPECIFIED.into(),
        (Some(IpAddr::V4(ip)), Family::V4) => ip.into(),
        (Some(IpAddr::V4(ip)), Family::V6) if !v6_only => ip.to_ipv6_mapped().into(),
        (Some(IpAddr::V6(ip)), Family::V6) => ip.into(),
        (Some(IpAddr::V4(_)), Family::V6) | (Some(IpAddr::V6(_)), Family::V4) => return None,
    };
    Some((address, false))
}

/// Whether a kernel that is not the host's listens for it: then no address here is claimed.
pub(crate) fn is_elsewhere(publication: &Publication, routes: &Routes) -> bool {
    let address = publication.address.unwrap_or(Ipv4Addr::UNSPECIFIED.into());
    let port = publication.inner_port;
    let asked = Asked { service: Service::TcpListen, address, port, program: "" };
    publication.protocol == Protocol::Tcp && !routes.is_native(&asked)
}

/// The addresses that a publication claims outside, whichever listener comes: to see that they are free.
/// None for `all`.
pub(crate) fn claims(publication: &Publication) -> Vec<SocketAddr> {
    let port = if publication.outer_port == 0 { publication.inner_port } else { publication.outer_port };
    if port == 0 {
        return Vec::new();
    }
    let addresses = match publication.address {
        None => vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()],
        Some(address) if address.is_unspecified() => {
            vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()]
        }
        Some(address) => vec![address],
    };
    addresses.into_iter().map(|address| SocketAddr::new(address, port)).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use kso_wire::SocketOptions;

    fn listen(local: &str, v6_only: bool) -> Listen {
        let local: SocketAddr = local.parse().unwrap();
        let mut options = SocketOptions::default();
        if v6_only {
            options.push(OptionName::V6Only, 1);
        }
        let family = if local.is_ipv4() { Family::V4 } else { Family::V6 };
        Listen { local, family, backlog: Some(5), options }
    }

    fn outside(local: &str, v6_only: bool, publication: &str) -> Option<String> {
        let publication = kso_core::publish::parse(publication).unwrap();
        match fate(&listen(local, v6_only), &[publication], LoopbackMode::Private) {
            Fate::Outside(place) => Some(place.address.to_string()),
            _ => None,
        }
    }

    #[test]
    fn the_table_holds() {
        let table = [
            ("0.0.0.0:80", false, "8080:80", Some("127.0.0.1:8080")),
            ("[::]:80", false, "8080:80", Some("[::]:8080")),
            ("[::]:80", true, "8080:80", Some("[::1]:8080")),
            ("0.0.0.0:80", false, "192.0.2.1:8080:80", Some("192.0.2.1:8080")),
            ("[::]:80", false, "192.0.2.1:8080:80", Some("[::ffff:192.0.2.1]:8080")),
            ("[::]:80", true, "192.0.2.1:8080:80", None),
            ("0.0.0.0:80", false, "[2001:db8::1]:8080:80", None),
            ("[::]:80", true, "[2001:db8::1]:8080:80", Some("[2001:db8::1]:8080")),
            ("0.0.0.0:80", false, "*:8080:80", Some("0.0.0.0:8080")),
            ("[::]:80", false, "*:8080:80", Some("[::]:8080")),
            ("0.0.0.0:80", false, "8080:81", None),
            ("0.0.0.0:80", false, "8080:80/udp", None),
            ("0.0.0.0:81", false, "all", Some("127.0.0.1:81")),
            ("0.0.0.0:0", false, "all", Some("127.0.0.1:0")),
            ("198.18.0.2:80", false, "8080:80", Some("127.0.0.1:8080")),
            ("127.0.0.1:80", false, "8080:80", None),
            ("[::1]:80", false, "all", None),
        ];
        for (local, v6_only, publication, expected) in table {
            assert_eq!(outside(local, v6_only, publication).as_deref(), expected, "{local} {publication}");
        }
    }

    #[test]
    fn a_published_port_on_loopback_is_told_apart() {
        let of = |publication: &str| {
            let publication = kso_core::publish::parse(publication).unwrap();
            fate(&listen("127.0.0.1:80", false), &[publication], LoopbackMode::Private)
        };
        assert_eq!(of("8080:80"), Fate::OnLoopback);
        assert_eq!(of("8080:81"), Fate::Inside);
        assert_eq!(of("all"), Fate::Inside);
    }

    #[test]
    fn external_loopback_takes_loopback_and_wildcards() {
        let of = |local: &str| match fate(&listen(local, false), &[], LoopbackMode::External) {
            Fate::Outside(place) => Some((place.address.to_string(), place.loopback_only)),
            _ => None,
        };
        assert_eq!(of("127.0.0.1:80"), Some(("127.0.0.1:80".into(), false)));
        assert_eq!(of("[::]:0"), Some(("[::]:0".into(), true)));
        assert_eq!(of("198.18.0.2:80"), None);
    }
}
