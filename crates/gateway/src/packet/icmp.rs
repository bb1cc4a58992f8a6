//! ICMP errors: what they mean in both families, and packets that tell them to the sandbox's kernel, quoting
//! the packet they are about so that it finds the socket. Sources: RFC 792, RFC 1122 section 3.2.2, RFC 4443.

use super::checksum::Sum;
use super::{ip, protocol, put};
use kso_wire::Errno;
use std::net::IpAddr;

/// Bytes of an ICMP error's own header.
const HEADER: usize = 8;
/// The longest error, bytes (RFC 1812, 4.3.2.3).
const LONGEST_V4: usize = 576;
/// The longest error, bytes: the least MTU (RFC 4443, 2.4 c).
pub const LONGEST: usize = 1280;

/// Why a packet did not arrive, in either family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// No route to its network.
    Network,
    /// No way to its host.
    Host,
    /// Its host does not know the protocol.
    Protocol,
    /// Nobody listens on its port.
    Port,
    /// Forbidden: by policy, or by a filter on the way.
    Prohibited,
    /// Longer than the path's MTU, and not to be fragmented.
    TooBig(u32),
    /// The hop limit was used up.
    Hops,
    /// Fragments are missing.
    Reassembly,
}

impl Cause {
    /// Of an ICMP message. `None`: it is no error.
    #[must_use]
    pub fn of_v4(kind: u8, code: u8, mtu: u32) -> Option<Self> {
        Some(match (kind, code) {
            (3, 0 | 6 | 11) => Self::Network,
            (3, 2) => Self::Protocol,
            (3, 3) => Self::Port,
            (3, 4) => Self::TooBig(mtu),
            (3, 9 | 10 | 13 | 14 | 15) => Self::Prohibited,
            (3, _) => Self::Host,
            (11, 0) => Self::Hops,
            (11, _) => Self::Reassembly,
            (12, _) => Self::Protocol,
            _ => return None,
        })
    }

    /// Of an ICMPv6 message. `None`: it is no error.
    #[must_use]
    pub fn of_v6(kind: u8, code: u8, mtu: u32) -> Option<Self> {
        Some(match (kind, code) {
            (1, 0) => Self::Network,
            (1, 1 | 5 | 6) => Self::Prohibited,
            (1, 4) => Self::Port,
            (1, _) => Self::Host,
            (2, _) => Self::TooBig(mtu),
            (3, 0) => Self::Hops,
            (3, _) => Self::Reassembly,
            (4, _) => Self::Protocol,
            _ => return None,
        })
    }

    /// Of what a socket call said.
    #[must_use]
    pub fn of_errno(errno: Errno) -> Self {
        match errno {
            Errno::ECONNREFUSED => Self::Port,
            Errno::ENETUNREACH | Errno::ENETDOWN | Errno::EADDRNOTAVAIL | Errno::EAFNOSUPPORT => {
                Self::Network
            }
            Errno::EACCES | Errno::EPERM => Self::Prohibited,
            Errno::EPROTO | Errno::ENOPROTOOPT | Errno::EPROTONOSUPPORT => Self::Protocol,
            _ => Self::Host,
        }
    }

    /// Type, code and the word after the checksum.
    fn v4(self) -> (u8, u8, u32) {
        match self {
            Self::Network => (3, 0, 0),
            Self::Host => (3, 1, 0),
            Self::Protocol => (3, 2, 0),
            Self::Port => (3, 3, 0),
            Self::Prohibited => (3, 13, 0),
            Self::TooBig(mtu) => (3, 4, mtu.min(0xffff)),
            Self::Hops => (11, 0, 0),
            Self::Reassembly => (11, 1, 0),
        }
    }

    fn v6(self) -> (u8, u8, u32) {
        match self {
            Self::Network => (1, 0, 0),
            Self::Host => (1, 3, 0),
            // The pointer says where the unknown next header stood.
            Self::Protocol => (4, 1, 6),
            Self::Port => (1, 4, 0),
            Self::Prohibited => (1, 1, 0),
            Self::TooBig(mtu) => (2, 0, mtu),
            Self::Hops => (3, 0, 0),
            Self::Reassembly => (3, 1, 0),
        }
    }
}

/// The packet that an error is about, as the sandbox sent it.
#[derive(Clone, Copy, Debug)]
pub struct Quoted<'a> {
    /// From.
    pub source: IpAddr,
    /// To.
    pub destination: IpAddr,
    /// What it carried.
    pub protocol: u8,
    /// Its transport header.
    pub head: &'a [u8],
    /// The start of what followed.
    pub payload: &'a [u8],
}

/// Writes an error about `quoted`, found by `offender`, to `out`; and tells how long it is. The offender must be
/// of the family of the quoted packet.
#[must_use]
pub fn write(out: &mut [u8; LONGEST], cause: Cause, offender: IpAddr, quoted: &Quoted<'_>) -> Option<usize> {
    let v4 = quoted.source.is_ipv4();
    let ip_header = ip::header_length(quoted.source);
    let most = if v4 { LONGEST_V4 } else { LONGEST };
    let payload = quoted.payload.len().min(most - 2 * ip_header - HEADER - quoted.head.len());
    let payload = quoted.payload.get(..payload)?;
    let inner = ip_header + quoted.head.len() + payload.len();
    let (outer_protocol, (kind, code, word)) =
        if v4 { (protocol::ICMP, cause.v4()) } else { (protocol::ICMP6, cause.v6()) };
    ip::write(out, offender, quoted.source, outer_protocol, 0, HEADER + inner)?;

    let message = out.get_mut(ip_header..ip_header + HEADER + inner)?;
    let (header, quote) = message.split_at_mut(HEADER);
    header.copy_from_slice(&[kind, code, 0, 0, 0, 0, 0, 0]);
    put(header, 4, &word.to_be_bytes());
    let at = ip::write(quote, quoted.source, quoted.destination, quoted.protocol, 0, inner - ip_header)?;
    put(quote, at, quoted.head);
    put(quote, at + quoted.head.len(), payload);

    let sum = if v4 {
        Sum::default()
    } else {
        Sum::default().pseudo(offender, quoted.source, protocol::ICMP6, message.len())
    };
    let sum = sum.bytes(message).finish();
    put(message, 2, &sum);
    Some(ip_header + HEADER + inner)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::super::ip::Header;
    use super::super::transport::udp_header;
    use super::*;

    #[test]
    fn an_error_is_a_whole_packet_that_quotes_another() {
        for (guest, peer, outer, kind) in
            [("198.18.0.2", "10.0.0.1", 1, [3, 3]), ("fd6b:736f::2", "2001:db8::1", 58, [1, 4])]
        {
            for length in [0, 100, 3000] {
                let (source, destination): (IpAddr, IpAddr) = (guest.parse().unwrap(), peer.parse().unwrap());
                let payload = vec![7; length];
                let head = udp_header(5000, 53, length).unwrap();
                let quoted = Quoted { source, destination, protocol: 17, head: &head, payload: &payload };
                let mut out = [0; LONGEST];
                let whole = write(&mut out, Cause::Port, destination, &quoted).unwrap();
                let header = Header::parse(&out[..whole]).unwrap();
                assert_eq!(
                    (header.source, header.destination, header.protocol),
                    (destination, source, outer)
                );
                assert_eq!(header.payload.end, whole);
                let message = &out[header.payload.clone()];
                assert_eq!(message[..2], kind);
                let sum = if outer == 1 {
                    Sum::default()
                } else {
                    Sum::default().pseudo(destination, source, outer, message.len())
                };
                assert!(sum.bytes(message).holds());
                let inner = Header::parse(&message[8..]).unwrap();
                assert_eq!((inner.source, inner.destination, inner.protocol), (source, destination, 17));
                assert_eq!(message[8 + inner.payload.start..][..8], head);
                assert!(whole <= if outer == 1 { 576 } else { 1280 });
            }
        }
    }

    #[test]
    fn each_cause_survives_both_families() {
        for cause in [
            Cause::Network,
            Cause::Host,
            Cause::Protocol,
            Cause::Port,
            Cause::Prohibited,
            Cause::TooBig(1400),
            Cause::Hops,
            Cause::Reassembly,
        ] {
            let (kind, code, word) = cause.v4();
            assert_eq!(Cause::of_v4(kind, code, word), Some(cause));
            let (kind, code, word) = cause.v6();
            assert_eq!(Cause::of_v6(kind, code, word), Some(cause));
        }
    }
}
