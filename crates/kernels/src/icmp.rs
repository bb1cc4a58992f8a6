//! ICMP errors that carry an errno to a TCP socket whose connection is under way.
//!
//! What the kernel makes of them: `icmp_err_convert` in net/ipv4/icmp.c, `tab_unreach` in net/ipv6/icmp.c. Which socket
//! is meant is told by the segment that the error quotes (RFC 792, RFC 4443).

use kso_wire::Errno;
use std::net::{IpAddr, SocketAddr};

/// Bytes of a TCP header without options.
const TCP_HEADER: usize = 20;
/// Protocol number of TCP.
const TCP: u8 = 6;

/// The codes of "destination unreachable" that come nearest to an errno: ICMP and ICMPv6.
fn codes(errno: Errno) -> (u8, u8) {
    match errno {
        Errno::ECONNREFUSED | Errno::ECONNRESET | Errno::ECONNABORTED => (3, 4),
        Errno::EHOSTUNREACH => (1, 3),
        Errno::EHOSTDOWN => (7, 3),
        Errno::EACCES | Errno::EPERM => (13, 1),
        _ => (0, 0),
    }
}

/// The error for the SYN with the number `sequence` from `local` to `peer`: ICMP with its checksum, or ICMPv6 without.
pub fn unreachable(local: SocketAddr, peer: SocketAddr, sequence: u32, errno: Errno) -> Vec<u8> {
    let (v4_code, v6_code) = codes(errno);
    let mut quoted = Vec::with_capacity(TCP_HEADER);
    quoted.extend_from_slice(&local.port().to_be_bytes());
    quoted.extend_from_slice(&peer.port().to_be_bytes());
    quoted.extend_from_slice(&sequence.to_be_bytes());
    // No acknowledgement; five words, SYN; the rest does not matter.
    quoted.extend_from_slice(&[0, 0, 0, 0, 0x50, 0x02, 0, 0, 0, 0, 0, 0]);
    let mut message;
    match (local.ip().to_canonical(), peer.ip().to_canonical()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            message = vec![3, v4_code, 0, 0, 0, 0, 0, 0];
            message.extend_from_slice(&[0x45, 0, 0, 40, 0, 0, 0, 0, 64, TCP, 0, 0]);
            message.extend_from_slice(&from.octets());
            message.extend_from_slice(&to.octets());
            message.extend_from_slice(&quoted);
            let sum = checksum(&message).to_be_bytes();
            message.splice(2..4, sum);
        }
        (from, to) => {
            let octets = |ip| match ip {
                IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
                IpAddr::V6(v6) => v6.octets(),
            };
            message = vec![1, v6_code, 0, 0, 0, 0, 0, 0];
            message.extend_from_slice(&[0x60, 0, 0, 0, 0, 20, TCP, 64]);
            message.extend_from_slice(&octets(from));
            message.extend_from_slice(&octets(to));
            message.extend_from_slice(&quoted);
        }
    }
    message
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| match *pair {
        [high, low] => u32::from(u16::from_be_bytes([high, low])),
        [high] => u32::from(u16::from_be_bytes([high, 0])),
        _ => 0,
    });
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !u16::try_from(sum).unwrap_or(0)
}
