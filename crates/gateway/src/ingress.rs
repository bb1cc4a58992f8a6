//! What arrives on the TUN: admitted, put together if it came in fragments, or dropped with a reason.

use crate::packet::ip::{Header, MAX_PACKET, header_length, is_unicast, write};
use crate::packet::transport::{Transport, parse};
use crate::packet::vnet::Offload;
use crate::packet::{Fault, protocol};
use crate::reassembly::{Outcome, Reassembly};
use kso_wire::TunAddresses;
use std::borrow::Cow;
use std::net::IpAddr;
use std::time::Instant;

/// IGMP: the sandbox's kernel joins groups.
const IGMP: u8 = 2;

/// A packet that may be carried, whole.
#[derive(Debug)]
pub struct Arrival<'a> {
    /// Its header.
    pub header: Header,
    /// What follows its headers.
    pub payload: Cow<'a, [u8]>,
    /// All of it, if its transport header follows a header of IP.
    packet: Option<&'a [u8]>,
    offload: Offload,
}

impl<'a> Arrival<'a> {
    /// What it carries.
    ///
    /// # Errors
    /// It cannot be carried.
    pub fn transport<'b>(&self, payload: &'b [u8]) -> Result<Transport<'b>, Fault> {
        parse(&self.header, payload, self.offload.trusted, self.offload.datagrams)
    }

    /// The packet without extension headers and fragments. `None`: too long to be one.
    pub fn packet<'b>(&'b self, payload: &'b [u8]) -> Option<Cow<'b, [u8]>> {
        if let Some(packet) = self.packet {
            return Some(Cow::Borrowed(packet));
        }
        let Header { source, destination, protocol, traffic_class, .. } = self.header;
        let mut packet = vec![0; header_length(source)];
        write(&mut packet, source, destination, protocol, traffic_class, payload.len())?;
        packet.extend_from_slice(payload);
        (packet.len() <= MAX_PACKET).then_some(Cow::Owned(packet))
    }
}

/// The way in.
#[derive(Debug)]
pub struct Ingress {
    addresses: TunAddresses,
    vnet_header: bool,
    reassembly: Reassembly,
}

impl Ingress {
    /// For a sandbox with these addresses.
    #[must_use]
    pub fn new(addresses: TunAddresses, vnet_header: bool) -> Self {
        Self { addresses, vnet_header, reassembly: Reassembly::default() }
    }

    /// Looks at what was read from the TUN. `None`: nothing is to be done, or not yet.
    ///
    /// # Errors
    /// It is dropped.
    pub fn admit<'a>(&mut self, bytes: &'a [u8], now: Instant) -> Result<Option<Arrival<'a>>, Fault> {
        let (offload, packet) = if self.vnet_header {
            Offload::split(bytes).ok_or(Fault::Malformed)?
        } else {
            (Offload::default(), bytes)
        };
        let header = Header::parse(packet)?;
        if !is_unicast(header.destination) {
            // Routers are looked for, and groups joined, by every kernel.
            let quiet = matches!(header.protocol, protocol::ICMP6 | IGMP);
            return if quiet { Ok(None) } else { Err(Fault::NotUnicast) };
        }
        if !self.addresses.guest.contains(&header.source)
            || self.addresses.guest.contains(&header.destination)
        {
            return Err(Fault::Spoofed);
        }
        let payload = packet.get(header.payload.clone()).ok_or(Fault::Malformed)?;
        let Some(fragment) = header.fragment else {
            let plain = match header.source {
                // Options of IPv4 are within its header.
                IpAddr::V4(_) => true,
                IpAddr::V6(_) => header.payload.start == header_length(header.source),
            };
            let packet = packet.get(..header.payload.end).filter(|_| plain);
            return Ok(Some(Arrival { header, payload: Cow::Borrowed(payload), packet, offload }));
        };
        match self.reassembly.insert(&header, fragment, payload, now) {
            Outcome::Whole(header, payload) => Ok(Some(Arrival {
                header,
                payload: Cow::Owned(payload),
                packet: None,
                offload: Offload::default(),
            })),
            Outcome::Waiting => Ok(None),
            Outcome::Spoiled => Err(Fault::Malformed),
        }
    }

    /// Drops fragments that have waited too long.
    pub fn expire(&mut self, now: Instant) {
        self.reassembly.expire(now);
    }

    /// When [`Self::expire`] has something to do.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        self.reassembly.next_deadline()
    }
}

/// Everything pure that a packet of the sandbox meets, for fuzzing: whatever the bytes are, nothing panics.
#[doc(hidden)]
pub fn fuzz_packet(bytes: &[u8]) {
    let now = Instant::now();
    for vnet_header in [false, true] {
        let mut ingress = Ingress::new(TunAddresses::standard(), vnet_header);
        // Several packets, each with its length before it, so that fragments can meet.
        let mut rest = bytes;
        let mut packets = vec![bytes];
        while let Some(([a, b], after)) = rest.split_first_chunk::<2>() {
            let length = usize::from(u16::from_be_bytes([*a, *b])).min(after.len());
            let (packet, after) = after.split_at(length);
            packets.push(packet);
            rest = after;
        }
        for packet in packets {
            let Ok(Some(arrival)) = ingress.admit(packet, now) else { continue };
            let payload = arrival.payload.as_ref();
            let _ = arrival.packet(payload);
            let parsed = parse(&arrival.header, payload, true, arrival.offload.datagrams);
            if let Ok(Transport::Datagram { payload, .. }) = parsed
                && crate::dns::is_query(payload)
            {
                let _ = crate::dns::answer_limit(payload);
                let mut answer = crate::dns::failure(payload, crate::dns::Code::Refused);
                crate::dns::truncate(&mut answer, 100);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use crate::packet::checksum::Sum;
    use crate::packet::transport::udp_header;
    use proptest::prelude::*;

    fn datagram(source: &str, destination: &str, payload: &[u8]) -> Vec<u8> {
        let (source, destination): (IpAddr, IpAddr) = (source.parse().unwrap(), destination.parse().unwrap());
        let mut packet = vec![0; header_length(source)];
        write(&mut packet, source, destination, 17, 0, 8 + payload.len()).unwrap();
        let start = packet.len();
        packet.extend_from_slice(&udp_header(4000, 7, payload.len()).unwrap());
        packet.extend_from_slice(payload);
        let sum = Sum::default().pseudo(source, destination, 17, 8 + payload.len()).bytes(&packet[start..]);
        packet[start + 6..start + 8].copy_from_slice(&sum.finish_udp());
        packet
    }

    fn fault(packet: &[u8]) -> Option<Fault> {
        let mut ingress = Ingress::new(TunAddresses::standard(), false);
        match ingress.admit(packet, Instant::now()) {
            Ok(Some(arrival)) => {
                let payload = arrival.payload.as_ref();
                parse(&arrival.header, payload, false, None).err()
            }
            Ok(None) => None,
            Err(fault) => Some(fault),
        }
    }

    #[test]
    fn the_sandbox_speaks_for_itself_to_one_other() {
        assert_eq!(fault(&datagram("198.18.0.2", "10.0.0.1", b"hello")), None);
        assert_eq!(fault(&datagram("fd6b:736f::2", "2001:db8::1", b"hello")), None);
        for (source, destination, expected) in [
            ("198.18.0.3", "10.0.0.1", Fault::Spoofed),
            ("10.0.0.1", "198.18.0.2", Fault::Spoofed),
            ("198.18.0.2", "198.18.0.2", Fault::Spoofed),
            ("fe80::1", "2001:db8::1", Fault::Spoofed),
            ("198.18.0.2", "255.255.255.255", Fault::NotUnicast),
            ("198.18.0.2", "224.0.0.251", Fault::NotUnicast),
            ("198.18.0.2", "0.0.0.0", Fault::NotUnicast),
            ("198.18.0.2", "127.0.0.1", Fault::NotUnicast),
            ("fd6b:736f::2", "ff02::fb", Fault::NotUnicast),
            ("fd6b:736f::2", "::ffff:10.0.0.1", Fault::NotUnicast),
        ] {
            assert_eq!(
                fault(&datagram(source, destination, b"hello")),
                Some(expected),
                "{source} {destination}"
            );
        }
        let mut bad = datagram("198.18.0.2", "10.0.0.1", b"hello");
        *bad.last_mut().unwrap() ^= 1;
        assert_eq!(fault(&bad), Some(Fault::Checksum));
        assert_eq!(fault(&bad[..27]), Some(Fault::Malformed));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            fuzz_packet(&bytes);
        }

        #[test]
        fn no_damage_panics(at in 0_usize..60, value: u8, six: bool) {
            let mut packet = if six {
                datagram("fd6b:736f::2", "2001:db8::1", b"some payload")
            } else {
                datagram("198.18.0.2", "10.0.0.1", b"some payload")
            };
            let at = at % packet.len();
            packet[at] = value;
            if !six {
                packet[10] = 0;
                packet[11] = 0;
                let sum = Sum::default().bytes(&packet[..20]).finish();
                packet[10..12].copy_from_slice(&sum);
            }
            fuzz_packet(&packet);
        }
    }
}
