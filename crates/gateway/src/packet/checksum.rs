//! The Internet checksum (RFC 1071).

use std::net::IpAddr;

/// A sum under way. The parts that are added have an even number of bytes, but for the last.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum(u64);

impl Sum {
    /// Adds bytes.
    #[must_use]
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        // The sum does not depend on the order of bytes in a word (RFC 1071, 2 B), so words are added as
        // this machine reads them, and four bytes at a time; 2^32 of them fit.
        let (words, rest) = bytes.as_chunks::<4>();
        for word in words {
            self.0 += u64::from(u32::from_ne_bytes(*word));
        }
        let (pairs, odd) = rest.as_chunks::<2>();
        for pair in pairs {
            self.0 += u64::from(u16::from_ne_bytes(*pair));
        }
        if let [last] = odd {
            self.0 += u64::from(u16::from_ne_bytes([*last, 0]));
        }
        self
    }

    /// Adds the header that transport checksums cover too (RFC 768, RFC 8200 section 8.1).
    #[must_use]
    pub fn pseudo(self, source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> Self {
        let sum = match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                self.bytes(&source.octets()).bytes(&destination.octets())
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                self.bytes(&source.octets()).bytes(&destination.octets())
            }
            _ => self,
        };
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        sum.bytes(&length.to_be_bytes()).bytes(&[0, 0, 0, protocol])
    }

    /// The sum in 16 bits, as it stands in a packet whose checksum the kernel shall complete.
    #[must_use]
    pub fn partial(self) -> [u8; 2] {
        let mut sum = self.0;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        (sum as u16).to_ne_bytes()
    }

    /// The checksum: the complement of the sum.
    #[must_use]
    pub fn finish(self) -> [u8; 2] {
        let [a, b] = self.partial();
        [!a, !b]
    }

    /// As [`Self::finish`], for UDP, where 0 would mean that there is none (RFC 768).
    #[must_use]
    pub fn finish_udp(self) -> [u8; 2] {
        match self.finish() {
            [0, 0] => [0xff, 0xff],
            sum => sum,
        }
    }

    /// Whether a sum over bytes with their checksum says that they are whole.
    #[must_use]
    pub fn holds(self) -> bool {
        self.partial() == [0xff, 0xff]
    }
}

#[cfg(test)]
#[allow(clippy::indexing_slicing)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn plainly(bytes: &[u8]) -> u16 {
        let mut sum: u32 = 0;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    proptest! {
        #[test]
        fn it_is_the_sum_of_the_rfc(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            prop_assert_eq!(u16::from_be_bytes(Sum::default().bytes(&bytes).finish()), plainly(&bytes));
        }

        #[test]
        fn bytes_with_their_checksum_hold(mut bytes in proptest::collection::vec(any::<u8>(), 2..500)) {
            bytes[0] = 0;
            bytes[1] = 0;
            let sum = Sum::default().bytes(&bytes).finish();
            bytes[..2].copy_from_slice(&sum);
            prop_assert!(Sum::default().bytes(&bytes).holds());
            bytes[0] ^= 1;
            prop_assert!(!Sum::default().bytes(&bytes).holds());
        }
    }
}
