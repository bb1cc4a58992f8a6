//! Frames as a TAP has them: `struct virtio_net_hdr` (include/uapi/linux/virtio_net.h), an Ethernet header, a packet.
//!
//! The first header tells of checksums that are not computed and of segments that are to be cut, in the byte order of
//! the host.

use smoltcp::wire::EthernetAddress;

/// Bytes of `struct virtio_net_hdr`.
pub const VNET: usize = kso_sys::tun::VNET_HEADER;
/// Bytes of an Ethernet header.
pub const ETHERNET: usize = 14;
/// Bytes before the packet.
pub const HEAD: usize = VNET + ETHERNET;
/// The longest packet: IPv4's, bytes.
pub const MAX_PACKET: usize = 65_535;
/// The longest frame, with its header.
pub const MAX_FRAME: usize = HEAD + MAX_PACKET;

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`: the checksum is that of the pseudo header; `VIRTIO_NET_HDR_F_DATA_VALID`.
const NEEDS_CHECKSUM: u8 = 1;
const DATA_VALID: u8 = 2;
/// `VIRTIO_NET_HDR_GSO_TCPV4`, `VIRTIO_NET_HDR_GSO_TCPV6`.
const SEGMENT_V4: u8 = 1;
const SEGMENT_V6: u8 = 4;
/// Where a TCP header has its checksum.
const TCP_CHECKSUM: u16 = 16;

/// What kind of packet follows an Ethernet header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// RFC 826.
    Arp,
    /// An IPv4 packet.
    V4,
    /// An IPv6 packet.
    V6,
}

impl Kind {
    fn ether_type(self) -> [u8; 2] {
        match self {
            Self::Arp => [0x08, 0x06],
            Self::V4 => [0x08, 0x00],
            Self::V6 => [0x86, 0xdd],
        }
    }
}

/// A frame that came.
#[derive(Clone, Copy, Debug)]
pub struct Incoming<'a> {
    /// The sender vouches for the checksum of the transport.
    pub trusted: bool,
    /// To whom.
    pub target: EthernetAddress,
    /// From whom.
    pub source: EthernetAddress,
    /// What.
    pub kind: Kind,
    /// The packet, perhaps with padding.
    pub packet: &'a [u8],
}

impl<'a> Incoming<'a> {
    /// Reads a frame. `None`: it is none, or of another protocol.
    pub fn parse(frame: &'a [u8]) -> Option<Self> {
        let (vnet, rest) = frame.split_first_chunk::<VNET>()?;
        let (target, rest) = rest.split_first_chunk::<6>()?;
        let (source, rest) = rest.split_first_chunk::<6>()?;
        let (ether_type, packet) = rest.split_first_chunk::<2>()?;
        let kind =
            [Kind::Arp, Kind::V4, Kind::V6].into_iter().find(|kind| kind.ether_type() == *ether_type)?;
        let [flags, ..] = *vnet;
        let trusted = flags & (NEEDS_CHECKSUM | DATA_VALID) != 0;
        Some(Self {
            trusted,
            target: EthernetAddress(*target),
            source: EthernetAddress(*source),
            kind,
            packet,
        })
    }
}

/// Writes both headers in front of a packet that begins at [`HEAD`].
pub fn write_head(
    frame: &mut [u8],
    offload: Option<Offload>,
    from: EthernetAddress,
    to: EthernetAddress,
    kind: Kind,
) {
    let vnet = offload.map_or([0; VNET], Offload::bytes);
    let parts = vnet.into_iter().chain(to.0).chain(from.0).chain(kind.ether_type());
    frame.iter_mut().zip(parts).for_each(|(place, byte)| *place = byte);
}

/// What the other side of the TAP has to do with a TCP segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offload {
    /// Of IPv4.
    pub v4: bool,
    /// Bytes of the IP header.
    pub ip_header: usize,
    /// Bytes of the TCP header.
    pub tcp_header: usize,
    /// It is to be cut into segments with so many bytes.
    pub segment: Option<u16>,
}

impl Offload {
    fn bytes(self) -> [u8; VNET] {
        let start = ETHERNET + self.ip_header;
        let kind = match (self.segment, self.v4) {
            (None, _) => 0,
            (Some(_), true) => SEGMENT_V4,
            (Some(_), false) => SEGMENT_V6,
        };
        // Headers are short: all of these fit.
        let word = |number: usize| u16::try_from(number).unwrap_or(0).to_ne_bytes();
        let [length_a, length_b] = word(start + self.tcp_header);
        let [size_a, size_b] = self.segment.unwrap_or(0).to_ne_bytes();
        let [start_a, start_b] = word(start);
        let [offset_a, offset_b] = TCP_CHECKSUM.to_ne_bytes();
        [NEEDS_CHECKSUM, kind, length_a, length_b, size_a, size_b, start_a, start_b, offset_a, offset_b]
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_written_is_read() {
        let (from, to) = (EthernetAddress([2, 0, 0, 0, 0, 1]), EthernetAddress([2, 0, 0, 0, 0, 2]));
        let mut frame = vec![9; HEAD + 3];
        let offload = Offload { v4: true, ip_header: 20, tcp_header: 32, segment: Some(1460) };
        write_head(&mut frame, Some(offload), from, to, Kind::V4);
        assert_eq!(frame[..2], [1, 1]);
        assert_eq!(u16::from_ne_bytes([frame[6], frame[7]]), 34, "the TCP header begins there");
        let read = Incoming::parse(&frame).unwrap();
        assert!(read.trusted);
        assert_eq!((read.source, read.target, read.kind, read.packet), (from, to, Kind::V4, &[9; 3][..]));
        write_head(&mut frame, None, from, to, Kind::Arp);
        let read = Incoming::parse(&frame).unwrap();
        assert_eq!((read.trusted, read.kind), (false, Kind::Arp));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_not(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Some(read) = Incoming::parse(&bytes) {
                prop_assert_eq!(read.packet.len() + HEAD, bytes.len());
            }
        }
    }
}
