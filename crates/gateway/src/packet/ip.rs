//! IPv4 (RFC 791) and IPv6 (RFC 8200) headers.

use super::checksum::Sum;
use super::{Fault, put, u16_at, u32_at};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;

/// Bytes of an IPv4 header without options.
pub const V4_HEADER: usize = 20;
/// Bytes of an IPv6 header.
pub const V6_HEADER: usize = 40;
/// The longest packet: an IPv6 header and as much as its length field can say, bytes.
pub const MAX_PACKET: usize = V6_HEADER + 65_535;
/// More extension headers than any sender has a reason for.
const MAX_EXTENSIONS: usize = 8;
/// What the hop limit of our own packets is.
pub const HOPS: u8 = 64;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const NO_NEXT_HEADER: u8 = 59;
const DESTINATION_OPTIONS: u8 = 60;

/// Where a fragment belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// Fragments of one packet have the same.
    pub identification: u32,
    /// Of its first byte in the payload of the whole.
    pub offset: usize,
    /// It is not the last one.
    pub more: bool,
}

/// A checked header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// From.
    pub source: IpAddr,
    /// To.
    pub destination: IpAddr,
    /// Of the payload.
    pub protocol: u8,
    /// Time to live, or hop limit.
    pub hops: u8,
    /// Type of service, or traffic class.
    pub traffic_class: u8,
    /// It is a part of a packet.
    pub fragment: Option<Fragment>,
    /// Where the payload is.
    pub payload: Range<usize>,
}

impl Header {
    /// Reads the header of `packet`. Bytes after the length it states are ignored.
    ///
    /// # Errors
    /// It is not an IP packet, or not one that can be carried.
    pub fn parse(packet: &[u8]) -> Result<Self, Fault> {
        match packet.first().map(|first| first >> 4) {
            Some(4) => Self::parse_v4(packet),
            Some(6) => Self::parse_v6(packet),
            _ => Err(Fault::Malformed),
        }
    }

    fn parse_v4(packet: &[u8]) -> Result<Self, Fault> {
        let fixed: &[u8; V4_HEADER] = packet.first_chunk().ok_or(Fault::Malformed)?;
        let header = usize::from(fixed[0] & 0xf) * 4;
        let total = usize::from(u16_at(fixed, 2).ok_or(Fault::Malformed)?);
        if header < V4_HEADER || total < header || total > packet.len() {
            return Err(Fault::Malformed);
        }
        if !Sum::default().bytes(packet.get(..header).unwrap_or_default()).holds() {
            return Err(Fault::Checksum);
        }
        let identification = u32::from(u16_at(fixed, 4).unwrap_or(0));
        let flags = u16_at(fixed, 6).unwrap_or(0);
        let (offset, more) = (usize::from(flags & 0x1fff) * 8, flags & 0x2000 != 0);
        let octets = |at| u32_at(fixed, at).map(Ipv4Addr::from_bits).ok_or(Fault::Malformed);
        Ok(Self {
            source: octets(12)?.into(),
            destination: octets(16)?.into(),
            protocol: fixed[9],
            hops: fixed[8],
            traffic_class: fixed[1],
            fragment: (offset != 0 || more).then_some(Fragment { identification, offset, more }),
            payload: header..total,
        })
    }

    fn parse_v6(packet: &[u8]) -> Result<Self, Fault> {
        let fixed: &[u8; V6_HEADER] = packet.first_chunk().ok_or(Fault::Malformed)?;
        let end = V6_HEADER + usize::from(u16_at(fixed, 4).unwrap_or(0));
        let packet = packet.get(..end).ok_or(Fault::Malformed)?;
        let address = |at: usize| {
            let octets: Option<&[u8; 16]> = fixed.get(at..).and_then(|rest| rest.first_chunk());
            octets.copied().map(Ipv6Addr::from).ok_or(Fault::Malformed)
        };
        let mut header = Self {
            source: address(8)?.into(),
            destination: address(24)?.into(),
            protocol: fixed[6],
            hops: fixed[7],
            traffic_class: fixed[0] << 4 | fixed[1] >> 4,
            fragment: None,
            payload: V6_HEADER..end,
        };
        for _ in 0..MAX_EXTENSIONS {
            if !header.extension(packet)? {
                return Ok(header);
            }
        }
        Err(Fault::Unsupported)
    }

    /// Steps over the extension header at the head of the payload. Whether there was one.
    fn extension(&mut self, packet: &[u8]) -> Result<bool, Fault> {
        let rest = packet.get(self.payload.clone()).ok_or(Fault::Malformed)?;
        let length = match self.protocol {
            NO_NEXT_HEADER => return Err(Fault::Unsupported),
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => {
                let length = rest.get(1).ok_or(Fault::Malformed)?;
                // A route that is not at its end would lead elsewhere (RFC 8200, 4.4; RFC 5095).
                if self.protocol == ROUTING && rest.get(3) != Some(&0) {
                    return Err(Fault::Unsupported);
                }
                8 + usize::from(*length) * 8
            }
            FRAGMENT if self.fragment.is_some() => return Err(Fault::Malformed),
            FRAGMENT => {
                let offset = u16_at(rest, 2).ok_or(Fault::Malformed)?;
                let identification = u32_at(rest, 4).ok_or(Fault::Malformed)?;
                let fragment =
                    Fragment { identification, offset: usize::from(offset & !7), more: offset & 1 != 0 };
                // An atomic fragment is whole (RFC 6946).
                if fragment.offset != 0 || fragment.more {
                    self.fragment = Some(fragment);
                }
                8
            }
            _ => return Ok(false),
        };
        // Of a later fragment only the headers up to the fragment header are headers.
        let last = self.protocol == FRAGMENT && self.fragment.is_some_and(|fragment| fragment.offset != 0);
        self.protocol = *rest.first().ok_or(Fault::Malformed)?;
        self.payload.start += length;
        if self.payload.start > self.payload.end {
            return Err(Fault::Malformed);
        }
        Ok(!last)
    }
}

/// Whether an address can be the other end of a flow.
#[must_use]
pub fn is_unicast(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            !(address.is_multicast()
                || address.is_broadcast()
                || address.is_loopback()
                // 0.0.0.0/8, "this network" (RFC 1122, 3.2.1.3).
                || address.octets().first() == Some(&0))
        }
        IpAddr::V6(address) => {
            !(address.is_multicast()
                || address.is_unspecified()
                || address.is_loopback()
                || address.to_ipv4_mapped().is_some())
        }
    }
}

/// Bytes of the header that [`write`] makes for an address's family.
#[must_use]
pub fn header_length(address: IpAddr) -> usize {
    if address.is_ipv4() { V4_HEADER } else { V6_HEADER }
}

/// Writes a header without options for `length` bytes of payload to the start of `out` and tells how long it
/// is. `None`: the addresses are of two families, or the payload is too long, or `out` too short.
#[must_use]
pub fn write(
    out: &mut [u8],
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    traffic_class: u8,
    length: usize,
) -> Option<usize> {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let out = out.first_chunk_mut::<V4_HEADER>()?;
            let total = u16::try_from(V4_HEADER + length).ok()?;
            *out = [0; V4_HEADER];
            out[0] = 0x45;
            out[1] = traffic_class;
            put(out, 2, &total.to_be_bytes());
            // Don't fragment: with it the identification may be 0 (RFC 6864).
            out[6] = 0x40;
            out[8] = HOPS;
            out[9] = protocol;
            put(out, 12, &source.octets());
            put(out, 16, &destination.octets());
            let sum = Sum::default().bytes(out).finish();
            put(out, 10, &sum);
            Some(V4_HEADER)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let out = out.first_chunk_mut::<V6_HEADER>()?;
            *out = [0; V6_HEADER];
            out[0] = 0x60 | traffic_class >> 4;
            out[1] = traffic_class << 4;
            put(out, 4, &u16::try_from(length).ok()?.to_be_bytes());
            out[6] = protocol;
            out[7] = HOPS;
            put(out, 8, &source.octets());
            put(out, 24, &destination.octets());
            Some(V6_HEADER)
        }
        _ => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn v6(extensions: &[u8], first: u8) -> Vec<u8> {
        let mut packet = vec![0; V6_HEADER];
        let ends = ("fd00::2".parse().unwrap(), "fd00::1".parse().unwrap());
        assert!(write(&mut packet, ends.0, ends.1, first, 0, extensions.len()).is_some());
        packet.extend_from_slice(extensions);
        packet
    }

    #[test]
    fn what_is_written_is_read() {
        for (source, destination) in [("198.18.0.2", "10.0.0.1"), ("fd00::2", "2001:db8::1")] {
            let (source, destination) = (source.parse().unwrap(), destination.parse().unwrap());
            let mut packet = vec![0; 100];
            let length = write(&mut packet, source, destination, 17, 0xb8, 30).unwrap();
            let header = Header::parse(&packet).unwrap();
            assert_eq!((header.source, header.destination), (source, destination));
            assert_eq!((header.protocol, header.traffic_class, header.hops), (17, 0xb8, HOPS));
            assert_eq!(header.payload, length..length + 30);
            assert_eq!(header.fragment, None);
        }
    }

    #[test]
    fn extension_headers_are_stepped_over() {
        // Hop-by-hop (8 bytes), then destination options (16 bytes), then UDP.
        let mut extensions = vec![0; 24];
        extensions[0] = DESTINATION_OPTIONS;
        extensions[8] = 17;
        extensions[9] = 1;
        extensions.extend_from_slice(b"payload!");
        let packet = v6(&extensions, HOP_BY_HOP);
        let header = Header::parse(&packet).unwrap();
        assert_eq!(header.protocol, 17);
        assert_eq!(&packet[header.payload], b"payload!");
        // One that says to be longer than the packet.
        extensions[1] = 200;
        assert_eq!(Header::parse(&v6(&extensions, HOP_BY_HOP)), Err(Fault::Malformed));
        // A route that goes on.
        assert_eq!(Header::parse(&v6(&[17, 0, 0, 1, 0, 0, 0, 0], ROUTING)), Err(Fault::Unsupported));
        // A chain without end.
        assert_eq!(Header::parse(&v6(&[0; 100], HOP_BY_HOP)), Err(Fault::Unsupported));
    }

    #[test]
    fn a_fragment_is_known_and_an_atomic_one_is_whole() {
        let header = Header::parse(&v6(&[17, 0, 0, 9, 0, 0, 0, 7, 1, 2], FRAGMENT)).unwrap();
        assert_eq!(header.fragment, Some(Fragment { identification: 7, offset: 8, more: true }));
        assert_eq!((header.protocol, header.payload.len()), (17, 2));
        let header = Header::parse(&v6(&[17, 0, 0, 0, 0, 0, 0, 7, 1, 2], FRAGMENT)).unwrap();
        assert_eq!((header.fragment, header.payload.len()), (None, 2));
    }

    proptest! {
        #[test]
        fn nothing_panics_and_the_payload_is_inside(mut packet in proptest::collection::vec(any::<u8>(), 0..200), six: bool) {
            if let Some(first) = packet.first_mut() {
                *first = if six { 0x60 } else { 0x45 };
            }
            if !six && packet.len() >= V4_HEADER {
                put(&mut packet, 10, &[0, 0]);
                let sum = Sum::default().bytes(&packet[..V4_HEADER]).finish();
                put(&mut packet, 10, &sum);
            }
            if let Ok(header) = Header::parse(&packet) {
                prop_assert!(packet.get(header.payload).is_some());
            }
        }
    }
}
