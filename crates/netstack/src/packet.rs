//! What a packet that came is about, as far as it has to be known before smoltcp sees it: whose it is.

use crate::frame::Kind;
use crate::solicit::{self, Said};
use kso_wire::Errno;
use smoltcp::wire::{Icmpv4Packet, Icmpv6Packet, IpAddress, IpProtocol, Ipv4Packet, Ipv6Packet, TcpPacket};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Bytes of headers without options: IPv6, TCP.
const V6_HEADER: usize = 40;
const TCP_HEADER: usize = 20;
/// Of neighbours only, who are not farther away than the link (RFC 4861).
const HOP_LIMIT: u8 = 255;
/// The least that a path can carry in a segment: what a smaller number would come of is not believed (RFC 879, RFC 8200).
const LEAST_SEGMENT_V4: u16 = 536;
const LEAST_SEGMENT_V6: u16 = 1220;

/// The ends of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tuple {
    /// Ours.
    pub local: SocketAddr,
    /// The peer's.
    pub remote: SocketAddr,
}

/// A TCP segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Between whom.
    pub tuple: Tuple,
    /// The number of its first byte.
    pub number: u32,
    /// What it acknowledges, if it does.
    pub acknowledged: Option<u32>,
    /// Flags.
    pub syn: bool,
    /// Flags.
    pub fin: bool,
    /// Flags.
    pub rst: bool,
    /// Bytes of data.
    pub length: usize,
}

/// An error that was told about a segment of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// Whose segment it was.
    pub tuple: Tuple,
    /// Its number.
    pub number: u32,
    /// What happened to it.
    pub kind: TroubleKind,
}

/// What happened to a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TroubleKind {
    /// It did not arrive, and why.
    Unreachable(Errno),
    /// The path takes segments of so many bytes.
    TooBig(u16),
}

/// A packet to one of our addresses, or about one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packet {
    /// TCP.
    Segment(Segment),
    /// ICMP tells of an error.
    Trouble(Trouble),
    /// An echo request.
    Echo,
    /// A neighbour speaks.
    Neighbour(Said),
}

/// Reads an IP packet. `None`: it is damaged, a fragment, or nothing that is served here. `is_own` tells whether an address is ours.
pub fn parse(kind: Kind, bytes: &[u8], trusted: bool, is_own: impl Fn(IpAddr) -> bool) -> Option<Packet> {
    match kind {
        Kind::Arp => None,
        Kind::V4 => {
            let packet = Ipv4Packet::new_checked(bytes).ok()?;
            let (source, target) = (packet.src_addr(), packet.dst_addr());
            if packet.version() != 4 || packet.more_frags() || packet.frag_offset() != 0 {
                return None;
            }
            if !is_own(target.into()) || !is_peer_v4(source) || !packet.verify_checksum() {
                return None;
            }
            let ends = (source.into(), target.into());
            match packet.next_header() {
                IpProtocol::Tcp => segment(ends, packet.payload(), trusted).map(Packet::Segment),
                IpProtocol::Icmp => icmp_v4(target, packet.payload(), trusted),
                _ => None,
            }
        }
        Kind::V6 => {
            let packet = Ipv6Packet::new_checked(bytes).ok()?;
            let (source, target) = (packet.src_addr(), packet.dst_addr());
            if packet.version() != 6 || source.is_multicast() {
                return None;
            }
            if packet.next_header() == IpProtocol::Icmpv6 {
                let message = Icmpv6Packet::new_checked(packet.payload()).ok()?;
                if !trusted && !message.verify_checksum(&source, &target) {
                    return None;
                }
                if packet.hop_limit() == HOP_LIMIT
                    && let Some(said) = solicit::parse_ndp(source, packet.payload())
                {
                    return Some(Packet::Neighbour(said));
                }
                let other = icmp_v6(target, packet.payload())?;
                return Some(other).filter(|_| is_own(target.into()) && !source.is_unspecified());
            }
            if !is_own(target.into()) || source.is_unspecified() || packet.next_header() != IpProtocol::Tcp {
                return None;
            }
            segment((source.into(), target.into()), packet.payload(), trusted).map(Packet::Segment)
        }
    }
}

fn is_peer_v4(address: Ipv4Addr) -> bool {
    !address.is_unspecified() && !address.is_multicast() && !address.is_broadcast()
}

fn segment((source, target): (IpAddr, IpAddr), bytes: &[u8], trusted: bool) -> Option<Segment> {
    let tcp = TcpPacket::new_checked(bytes).ok()?;
    let header = usize::from(tcp.header_len());
    let (from, to): (IpAddress, IpAddress) = (source.into(), target.into());
    if tcp.src_port() == 0 || tcp.dst_port() == 0 || header < TCP_HEADER {
        return None;
    }
    if !trusted && !tcp.verify_checksum(&from, &to) {
        return None;
    }
    Some(Segment {
        tuple: Tuple {
            local: SocketAddr::new(target, tcp.dst_port()),
            remote: SocketAddr::new(source, tcp.src_port()),
        },
        number: tcp.seq_number().0.cast_unsigned(),
        acknowledged: tcp.ack().then(|| tcp.ack_number().0.cast_unsigned()),
        syn: tcp.syn(),
        fin: tcp.fin(),
        rst: tcp.rst(),
        length: bytes.len().saturating_sub(header),
    })
}

/// Bytes of the segments of a path that carries packets of `mtu` bytes, whose headers are `headers` bytes long.
fn segment_of(mtu: u32, headers: u32, least: u16) -> u16 {
    u16::try_from(mtu.saturating_sub(headers)).unwrap_or(u16::MAX).max(least)
}

/// RFC 792; what an error means is Linux's `icmp_err_convert` (net/ipv4/icmp.c).
fn icmp_v4(target: Ipv4Addr, bytes: &[u8], trusted: bool) -> Option<Packet> {
    let message = Icmpv4Packet::new_checked(bytes).ok()?;
    if !trusted && !message.verify_checksum() {
        return None;
    }
    let (head, quoted) = bytes.split_first_chunk::<8>()?;
    let [kind, code, _, _, _, _, mtu_a, mtu_b] = *head;
    let kind = match (kind, code) {
        (8, 0) => return Some(Packet::Echo),
        (3, 2) => TroubleKind::Unreachable(Errno::ENOPROTOOPT),
        (3, 3) => TroubleKind::Unreachable(Errno::ECONNREFUSED),
        (3, 4) => {
            let mtu = u32::from(u16::from_be_bytes([mtu_a, mtu_b]));
            TroubleKind::TooBig(segment_of(mtu, 40, LEAST_SEGMENT_V4))
        }
        (3, 0 | 6 | 9 | 11) => TroubleKind::Unreachable(Errno::ENETUNREACH),
        (3, 7) => TroubleKind::Unreachable(Errno::EHOSTDOWN),
        (3, _) | (11, _) => TroubleKind::Unreachable(Errno::EHOSTUNREACH),
        (12, _) => TroubleKind::Unreachable(Errno::EPROTO),
        _ => return None,
    };
    // The quoted packet is cut off: its length is not that of its header.
    let (&[version, ..], _) = quoted.split_first_chunk::<20>()?;
    let header = usize::from(version & 0xf) * 4;
    let protocol = *quoted.get(9)?;
    let source: [u8; 4] = quoted.get(12..16)?.try_into().ok()?;
    let remote: [u8; 4] = quoted.get(16..20)?.try_into().ok()?;
    if version >> 4 != 4
        || header < 20
        || protocol != u8::from(IpProtocol::Tcp)
        || Ipv4Addr::from(source) != target
    {
        return None;
    }
    trouble(target.into(), Ipv4Addr::from(remote).into(), quoted.get(header..)?, kind)
}

/// RFC 4443; `tab_unreach` in net/ipv6/icmp.c.
fn icmp_v6(target: Ipv6Addr, bytes: &[u8]) -> Option<Packet> {
    let (head, quoted) = bytes.split_first_chunk::<8>()?;
    let [kind, code, _, _, mtu @ ..] = *head;
    let kind = match (kind, code) {
        (128, 0) => return Some(Packet::Echo),
        (1, 0) => TroubleKind::Unreachable(Errno::ENETUNREACH),
        (1, 2 | 3) | (3, _) => TroubleKind::Unreachable(Errno::EHOSTUNREACH),
        (1, 4) => TroubleKind::Unreachable(Errno::ECONNREFUSED),
        (1, _) => TroubleKind::Unreachable(Errno::EACCES),
        (2, _) => TroubleKind::TooBig(segment_of(u32::from_be_bytes(mtu), 60, LEAST_SEGMENT_V6)),
        (4, _) => TroubleKind::Unreachable(Errno::EPROTO),
        _ => return None,
    };
    let (header, rest) = quoted.split_first_chunk::<V6_HEADER>()?;
    let (&[version, _, _, _, _, _, protocol, _], addresses) = header.split_first_chunk::<8>()?;
    let (source, remote) = addresses.split_first_chunk::<16>()?;
    let remote: [u8; 16] = remote.try_into().ok()?;
    if version >> 4 != 6 || protocol != u8::from(IpProtocol::Tcp) || Ipv6Addr::from(*source) != target {
        return None;
    }
    trouble(target.into(), Ipv6Addr::from(remote).into(), rest, kind)
}

fn trouble(local: IpAddr, remote: IpAddr, tcp: &[u8], kind: TroubleKind) -> Option<Packet> {
    let (&[from_a, from_b, to_a, to_b, number @ ..], _) = tcp.split_first_chunk::<8>()?;
    let tuple = Tuple {
        local: SocketAddr::new(local, u16::from_be_bytes([from_a, from_b])),
        remote: SocketAddr::new(remote, u16::from_be_bytes([to_a, to_b])),
    };
    Some(Packet::Trouble(Trouble { tuple, number: u32::from_be_bytes(number), kind }))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use smoltcp::wire::checksum;

    /// An ICMP error about the SYN with the number 7 from 10.0.0.2:4000 to 10.0.0.9:80, sent by 10.0.0.1.
    fn unreachable(code: u8, mtu: u16) -> Vec<u8> {
        let mut message = vec![3, code, 0, 0, 0, 0];
        message.extend_from_slice(&mtu.to_be_bytes());
        message.extend_from_slice(&[0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 2, 10, 0, 0, 9]);
        message.extend_from_slice(&[0x0f, 0xa0, 0, 80, 0, 0, 0, 7]);
        let sum = !checksum::data(&message);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        let mut packet =
            vec![0x45, 0, 0, 20 + message.len() as u8, 0, 0, 0, 0, 64, 1, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        let sum = !checksum::data(&packet);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        packet.extend_from_slice(&message);
        packet
    }

    fn own(address: IpAddr) -> bool {
        address == IpAddr::from([10, 0, 0, 2])
    }

    #[test]
    fn an_error_is_about_a_segment() {
        let tuple = Tuple { local: ([10, 0, 0, 2], 4000).into(), remote: ([10, 0, 0, 9], 80).into() };
        for (code, mtu, kind) in [
            (3, 0, TroubleKind::Unreachable(Errno::ECONNREFUSED)),
            (1, 0, TroubleKind::Unreachable(Errno::EHOSTUNREACH)),
            (0, 0, TroubleKind::Unreachable(Errno::ENETUNREACH)),
            (4, 1400, TroubleKind::TooBig(1360)),
            (4, 68, TroubleKind::TooBig(LEAST_SEGMENT_V4)),
        ] {
            let read = parse(Kind::V4, &unreachable(code, mtu), false, own);
            assert_eq!(read, Some(Packet::Trouble(Trouble { tuple, number: 7, kind })));
        }
        let mut damaged = unreachable(3, 0);
        damaged[40] ^= 1;
        assert_eq!(parse(Kind::V4, &damaged, false, own), None);
        assert_eq!(parse(Kind::V4, &unreachable(3, 0), false, |_| false), None, "not for us");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_not(mut bytes in proptest::collection::vec(any::<u8>(), 0..120), next in 0_u8..3) {
            for (kind, version, place) in [(Kind::V4, 0x45, 9), (Kind::V6, 0x60, 6)] {
                let length = bytes.len() as u16;
                if bytes.len() > 44 {
                    bytes[0] = version;
                    bytes[place] = [6, 1, 58][usize::from(next)];
                    if version == 0x45 {
                        bytes[2..4].copy_from_slice(&length.to_be_bytes());
                        bytes[6..8].fill(0);
                    } else {
                        bytes[4..6].copy_from_slice(&(length - 40).to_be_bytes());
                    }
                }
                let _ = parse(kind, &bytes, true, |_| true);
            }
        }
    }
}
