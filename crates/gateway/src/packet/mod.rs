//! Packets as bytes: checked views of what arrives, and writers of what leaves. No state, no I/O.

pub mod checksum;
pub mod icmp;
pub mod ip;
pub mod transport;
pub mod vnet;

/// IP protocol numbers (IANA).
pub mod protocol {
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMPv6.
    pub const ICMP6: u8 = 58;
}

/// Why a packet is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Too short, or its lengths contradict each other.
    Malformed,
    /// A checksum is wrong.
    Checksum,
    /// Its source is not the sandbox's address.
    Spoofed,
    /// It goes to a group, to everybody, or nowhere.
    NotUnicast,
    /// A protocol or extension header that is not carried.
    Unsupported,
}

/// Two bytes in network order.
pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.first_chunk().copied().map(u16::from_be_bytes)
}

/// Four bytes in network order.
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.first_chunk().copied().map(u32::from_be_bytes)
}

/// Overwrites the bytes at `at`; does nothing if they are not there.
pub(crate) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + value.len()) {
        place.copy_from_slice(value);
    }
}
