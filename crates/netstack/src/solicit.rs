//! ARP (RFC 826) and neighbour discovery (RFC 4861): who has an address, and who tells.

use crate::frame::{HEAD, Kind, write_head};
use smoltcp::wire::{EthernetAddress, IpProtocol, checksum};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Ethernet, IPv4, and the lengths of their addresses.
const ARP_HEAD: [u8; 6] = [0, 1, 8, 0, 6, 4];
/// Neighbour solicitation and advertisement.
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
/// Options: the link-layer address of the source, and of the target. Both are one unit of 8 bytes long.
const SOURCE_ADDRESS: u8 = 1;
const TARGET_ADDRESS: u8 = 2;
/// Flags of an advertisement: solicited, and override.
const SOLICITED_OVERRIDE: u8 = 0x60;
/// A hop limit that nobody from outside the link can have.
const HOP_LIMIT: u8 = 255;
/// Bytes of an IPv6 header, and of a solicitation or advertisement with an option.
const V6_HEADER: usize = 40;
const MESSAGE: usize = 32;

/// What neighbours say of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    /// Who has `wanted`? Says `asker`, if it has an address.
    Asks {
        /// The address.
        wanted: IpAddr,
        /// Who asks, and its hardware.
        asker: Option<(IpAddr, EthernetAddress)>,
    },
    /// It has this address.
    Has(IpAddr, EthernetAddress),
}

/// Reads an ARP packet.
pub fn parse_arp(packet: &[u8]) -> Option<Said> {
    let (head, rest) = packet.split_first_chunk::<6>()?;
    let (operation, rest) = rest.split_first_chunk::<2>()?;
    let (hardware, rest) = rest.split_first_chunk::<6>()?;
    let (address, rest) = rest.split_first_chunk::<4>()?;
    let (_, rest) = rest.split_first_chunk::<6>()?;
    let (wanted, _) = rest.split_first_chunk::<4>()?;
    let (hardware, address) = (EthernetAddress(*hardware), Ipv4Addr::from(*address));
    if *head != ARP_HEAD || !hardware.is_unicast() {
        return None;
    }
    match operation {
        [0, 1] => {
            let asker = (!address.is_unspecified()).then_some((address.into(), hardware));
            Some(Said::Asks { wanted: Ipv4Addr::from(*wanted).into(), asker })
        }
        [0, 2] => Some(Said::Has(address.into(), hardware)),
        _ => None,
    }
}

/// Reads the ICMPv6 message in the packet from `source`, whose hop limit and checksum were looked at. `None`: it is no matter of
/// neighbours.
pub fn parse_ndp(source: Ipv6Addr, message: &[u8]) -> Option<Said> {
    let (head, rest) = message.split_first_chunk::<8>()?;
    let (target, options) = rest.split_first_chunk::<16>()?;
    let target = Ipv6Addr::from(*target);
    let [kind, code, ..] = *head;
    if code != 0 || target.is_multicast() {
        return None;
    }
    match kind {
        SOLICITATION => {
            let hardware = option(options, SOURCE_ADDRESS);
            let asker = hardware.filter(|_| !source.is_unspecified());
            Some(Said::Asks { wanted: target.into(), asker: asker.map(|hardware| (source.into(), hardware)) })
        }
        ADVERTISEMENT => Some(Said::Has(target.into(), option(options, TARGET_ADDRESS)?)),
        _ => None,
    }
}

/// The hardware address in an option.
fn option(mut options: &[u8], wanted: u8) -> Option<EthernetAddress> {
    loop {
        let (&[kind, units], _) = options.split_first_chunk::<2>()?;
        let length = usize::from(units) * 8;
        let value = options.get(2..length)?;
        if kind == wanted {
            let (hardware, _) = value.split_first_chunk::<6>()?;
            return Some(EthernetAddress(*hardware)).filter(EthernetAddress::is_unicast);
        }
        options = options.get(length..)?;
    }
}

/// The frame that asks who has `wanted`.
pub fn ask(own: EthernetAddress, from: IpAddr, wanted: IpAddr) -> Option<Vec<u8>> {
    match (from, wanted) {
        (IpAddr::V4(from), IpAddr::V4(wanted)) => {
            Some(arp(1, own, from, EthernetAddress([0; 6]), wanted, EthernetAddress::BROADCAST))
        }
        (IpAddr::V6(from), IpAddr::V6(wanted)) => {
            let [.., a, b, c] = wanted.octets();
            let group =
                Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(a), u16::from_be_bytes([b, c]));
            let hardware = EthernetAddress([0x33, 0x33, 0xff, a, b, c]);
            Some(ndp((SOLICITATION, 0, SOURCE_ADDRESS), own, from, group, hardware, wanted))
        }
        _ => None,
    }
}

/// The frame that tells `asker`, at `hardware`, that `wanted` is here.
pub fn tell(
    own: EthernetAddress,
    wanted: IpAddr,
    asker: IpAddr,
    hardware: EthernetAddress,
) -> Option<Vec<u8>> {
    match (wanted, asker) {
        (IpAddr::V4(wanted), IpAddr::V4(asker)) => Some(arp(2, own, wanted, hardware, asker, hardware)),
        (IpAddr::V6(wanted), IpAddr::V6(asker)) => {
            let kind = (ADVERTISEMENT, SOLICITED_OVERRIDE, TARGET_ADDRESS);
            Some(ndp(kind, own, wanted, asker, hardware, wanted))
        }
        _ => None,
    }
}

fn arp(
    operation: u8,
    own: EthernetAddress,
    from: Ipv4Addr,
    there: EthernetAddress,
    wanted: Ipv4Addr,
    to: EthernetAddress,
) -> Vec<u8> {
    let mut frame = vec![0; HEAD];
    write_head(&mut frame, None, own, to, Kind::Arp);
    frame.extend_from_slice(&ARP_HEAD);
    frame.extend_from_slice(&[0, operation]);
    frame.extend_from_slice(&own.0);
    frame.extend_from_slice(&from.octets());
    frame.extend_from_slice(&there.0);
    frame.extend_from_slice(&wanted.octets());
    frame
}

fn ndp(
    (kind, flags, option): (u8, u8, u8),
    own: EthernetAddress,
    from: Ipv6Addr,
    to: Ipv6Addr,
    hardware: EthernetAddress,
    target: Ipv6Addr,
) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, flags, 0, 0, 0];
    message.extend_from_slice(&target.octets());
    message.extend_from_slice(&[option, 1]);
    message.extend_from_slice(&own.0);
    let pseudo = checksum::pseudo_header_v6(&from, &to, IpProtocol::Icmpv6, MESSAGE as u32);
    let sum = !checksum::combine(&[pseudo, checksum::data(&message)]);
    if let Some(place) = message.get_mut(2..4) {
        place.copy_from_slice(&sum.to_be_bytes());
    }
    let mut frame = vec![0; HEAD];
    write_head(&mut frame, None, own, hardware, Kind::V6);
    frame.extend_from_slice(&[0x60, 0, 0, 0, 0, MESSAGE as u8, IpProtocol::Icmpv6.into(), HOP_LIMIT]);
    frame.extend_from_slice(&from.octets());
    frame.extend_from_slice(&to.octets());
    frame.extend_from_slice(&message);
    debug_assert_eq!(frame.len(), HEAD + V6_HEADER + MESSAGE);
    frame
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use crate::frame::Incoming;
    use proptest::prelude::*;

    const OWN: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 1]);
    const OTHER: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 2]);

    fn read(frame: &[u8]) -> Said {
        let frame = Incoming::parse(frame).unwrap();
        match frame.kind {
            Kind::Arp => parse_arp(frame.packet).unwrap(),
            _ => {
                let source: [u8; 16] = frame.packet[8..24].try_into().unwrap();
                parse_ndp(source.into(), &frame.packet[V6_HEADER..]).unwrap()
            }
        }
    }

    #[test]
    fn questions_and_answers_are_understood() {
        for (one, other) in [("192.0.2.1", "192.0.2.2"), ("fd00::1", "fd00::2")] {
            let (one, other): (IpAddr, IpAddr) = (one.parse().unwrap(), other.parse().unwrap());
            let asked = read(&ask(OWN, one, other).unwrap());
            assert_eq!(asked, Said::Asks { wanted: other, asker: Some((one, OWN)) });
            let told = read(&tell(OTHER, other, one, OWN).unwrap());
            assert_eq!(told, Said::Has(other, OTHER));
        }
        assert_eq!(ask(OWN, "192.0.2.1".parse().unwrap(), "fd00::2".parse().unwrap()), None);
    }

    #[test]
    fn the_checksum_is_one() {
        let frame = ask(OWN, "fd00::1".parse().unwrap(), "fd00::2".parse().unwrap()).unwrap();
        let packet = smoltcp::wire::Ipv6Packet::new_checked(&frame[HEAD..]).unwrap();
        let message = smoltcp::wire::Icmpv6Packet::new_checked(packet.payload()).unwrap();
        assert!(message.verify_checksum(&packet.src_addr(), &packet.dst_addr()));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_not(bytes in proptest::collection::vec(any::<u8>(), 0..80), kind in 134_u8..138) {
            let _ = parse_arp(&bytes);
            let mut bytes = bytes;
            if let [first, second, ..] = &mut bytes[..] {
                (*first, *second) = (kind, 0);
            }
            let _ = parse_ndp(Ipv6Addr::LOCALHOST, &bytes);
        }
    }
}
