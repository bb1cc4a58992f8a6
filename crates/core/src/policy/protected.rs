//! Addresses that are denied unless a rule names them, and the ways to hide one address in another.

use ipnet::IpNet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Why a destination needs a rule of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protected {
    /// 127.0.0.0/8, `::1`, and 0.0.0.0 and `::`, for which Linux takes loopback (`ip(7)`; net/ipv4/route.c).
    HostLoopback,
    /// An address of one of the host's interfaces.
    Host,
    /// 169.254.0.0/16 (RFC 3927) and fe80::/10 (RFC 4291, 2.5.6).
    LinkLocal,
    /// Where clouds hand credentials to whoever asks.
    Metadata,
    /// 224.0.0.0/4 and ff00::/8.
    Multicast,
    /// 255.255.255.255.
    Broadcast,
    /// The rest of 0.0.0.0/8 (RFC 1122, 3.2.1.3).
    ThisNetwork,
}

impl fmt::Display for Protected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::HostLoopback => "the host's loopback",
            Self::Host => "an address of the host",
            Self::LinkLocal => "a link-local address",
            Self::Metadata => "a cloud metadata address",
            Self::Multicast => "a multicast address",
            Self::Broadcast => "a broadcast address",
            Self::ThisNetwork => "an address of this network",
        })
    }
}

const fn v4(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> IpNet {
    IpNet::new_assert(IpAddr::V4(Ipv4Addr::new(a, b, c, d)), prefix)
}

const fn v6(segments: [u16; 8], prefix: u8) -> IpNet {
    let [a, b, c, d, e, f, g, h] = segments;
    IpNet::new_assert(IpAddr::V6(Ipv6Addr::new(a, b, c, d, e, f, g, h)), prefix)
}

/// What is protected. The first that contains an address says which; a rule must lie within its network to
/// lift it, so that `0.0.0.0/0` or `fd00::/8` opens nothing by accident.
const RANGES: [(Protected, IpNet); 14] = [
    (Protected::HostLoopback, v4(127, 0, 0, 0, 8)),
    (Protected::HostLoopback, v6([0, 0, 0, 0, 0, 0, 0, 1], 128)),
    // 169.254.169.254 (AWS, GCP, Azure, OpenStack, ...) lies in link-local, and is lifted with it.
    (Protected::LinkLocal, v4(169, 254, 0, 0, 16)),
    (Protected::LinkLocal, v6([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10)),
    // AWS over IPv6, GCP over IPv6, Alibaba, Azure's wire server, Oracle.
    (Protected::Metadata, v6([0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254], 128)),
    (Protected::Metadata, v6([0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254], 128)),
    (Protected::Metadata, v4(100, 100, 100, 200, 32)),
    (Protected::Metadata, v4(168, 63, 129, 16, 32)),
    (Protected::Metadata, v4(192, 0, 0, 192, 32)),
    (Protected::Multicast, v4(224, 0, 0, 0, 4)),
    (Protected::Multicast, v6([0xff00, 0, 0, 0, 0, 0, 0, 0], 8)),
    (Protected::Broadcast, v4(255, 255, 255, 255, 32)),
    (Protected::ThisNetwork, v4(0, 0, 0, 0, 8)),
    (Protected::HostLoopback, v6([0, 0, 0, 0, 0, 0, 0, 0], 128)),
];

const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// Why `address`, which is [`canonical`], is protected, and the network within which a rule lifts it.
pub(super) fn protection(address: IpAddr) -> Option<(Protected, IpNet)> {
    let (why, range) = *RANGES.iter().find(|(_, range)| range.contains(&address))?;
    Some((if address == METADATA { Protected::Metadata } else { why }, range))
}

/// The address that the kernel goes to when a program says `address`: IPv4-mapped addresses are IPv4
/// addresses (RFC 4291, 2.5.5.2), and the unspecified address is loopback.
#[must_use]
pub fn canonical(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => IpAddr::V6(Ipv6Addr::LOCALHOST),
        other => other,
    }
}

/// The IPv4 addresses that a [`canonical`] IPv6 address carries inside, to which a translator or a tunnel on
/// the way would deliver. They are looked at too, so that none of them gets round a rule.
pub(super) fn embedded(address: IpAddr) -> impl Iterator<Item = IpAddr> {
    let found = match address {
        IpAddr::V4(_) | IpAddr::V6(Ipv6Addr::LOCALHOST) => [None; 3],
        IpAddr::V6(address) => {
            let [a, b, c, d, e, f, g, h] = address.segments();
            let (low, after48) = (join(g, h), join(d, e << 8 | f >> 8));
            let prefixed = match (a, b, c, d, e, f) {
                // IPv4-compatible, RFC 4291, 2.5.5.1; IPv4-translated, RFC 2765; NAT64, RFC 6052.
                (0, 0, 0, 0, 0, 0) | (0, 0, 0, 0, 0xffff, 0) | (0x64, 0xff9b, 0, 0, 0, 0) => Some(low),
                // 6to4, RFC 3056.
                (0x2002, ..) => Some(join(b, c)),
                // Teredo, RFC 4380: the client's address, its bits inverted.
                (0x2001, 0, ..) => Some(Ipv4Addr::from_bits(!low.to_bits())),
                // NAT64 with a local prefix, RFC 8215: /48 or /96 of RFC 6052, the other form is zero.
                (0x64, 0xff9b, 1, ..) => Some(low).filter(|low| !low.is_unspecified()),
                _ => None,
            };
            let local48 = ((a, b, c) == (0x64, 0xff9b, 1) && !after48.is_unspecified()).then_some(after48);
            // ISATAP, RFC 5214, 6.1.
            let isatap = (matches!(e, 0 | 0x200) && f == 0x5efe).then_some(low);
            [prefixed, local48, isatap]
        }
    };
    found.into_iter().flatten().map(|address| canonical(IpAddr::V4(address)))
}

fn join(high: u16, low: u16) -> Ipv4Addr {
    Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low))
}
