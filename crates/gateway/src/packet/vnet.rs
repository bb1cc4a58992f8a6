//! `struct virtio_net_hdr`: what stands before each packet of a TUN with offloads. Source:
//! `include/uapi/linux/virtio_net.h`, virtio 1.2 section 5.1.6. The TUN has it in the byte order of the host.

use kso_sys::tun::VNET_HEADER;

const NEEDS_CHECKSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const SEGMENT_UDP: u8 = 5;
/// `VIRTIO_NET_HDR_GSO_ECN`.
const ECN: u8 = 0x80;

/// What the header says of the packet after it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// The sender vouches for its transport checksum, which may not have been computed.
    pub trusted: bool,
    /// It is several UDP datagrams of so many bytes of payload, the last one perhaps shorter.
    pub datagrams: Option<u16>,
}

impl Offload {
    /// Reads the header at the start of `bytes`; and what follows it.
    #[must_use]
    pub fn split(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (header, packet) = bytes.split_first_chunk::<VNET_HEADER>()?;
        let [flags, kind, _, _, size_a, size_b, ..] = *header;
        let size = u16::from_ne_bytes([size_a, size_b]);
        let offload = Self {
            trusted: flags & (NEEDS_CHECKSUM | DATA_VALID) != 0,
            datagrams: (kind & !ECN == SEGMENT_UDP && size != 0).then_some(size),
        };
        Some((offload, packet))
    }
}

/// The header of a packet that needs nothing.
#[must_use]
pub fn plain() -> [u8; VNET_HEADER] {
    [0; VNET_HEADER]
}

/// The header of a packet whose transport header begins at `start` and has its checksum `offset` bytes further:
/// the field holds the sum of the pseudo header. With `segment`, it is several UDP datagrams of that size.
#[must_use]
pub fn partial(start: usize, offset: u16, header_length: usize, segment: Option<u16>) -> [u8; VNET_HEADER] {
    let [start_a, start_b] = (start as u16).to_ne_bytes();
    let [offset_a, offset_b] = offset.to_ne_bytes();
    let [length_a, length_b] = (header_length as u16).to_ne_bytes();
    let [size_a, size_b] = segment.unwrap_or(0).to_ne_bytes();
    let kind = if segment.is_some() { SEGMENT_UDP } else { 0 };
    [NEEDS_CHECKSUM, kind, length_a, length_b, size_a, size_b, start_a, start_b, offset_a, offset_b]
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let header = partial(20, 6, 28, Some(1200));
        let (offload, rest) = Offload::split(&header).unwrap();
        assert_eq!((offload, rest), (Offload { trusted: true, datagrams: Some(1200) }, &[][..]));
        assert_eq!(Offload::split(&plain()).unwrap().0, Offload::default());
        assert_eq!(Offload::split(&[0; 9]), None);
    }
}
