//! UDP (RFC 768), TCP (RFC 9293) and ICMP (RFC 792, RFC 4443) as far as a gateway looks into them.

use super::checksum::Sum;
use super::ip::Header;
use super::{Fault, protocol, put, u16_at};
use std::net::{IpAddr, SocketAddr};

/// Bytes of a UDP header.
pub const UDP_HEADER: usize = 8;
/// Bytes of an ICMP echo header.
pub const ECHO_HEADER: usize = 8;
/// Where the checksum is in a UDP header.
pub const UDP_CHECKSUM: u16 = 6;
/// Where the checksum is in a TCP header.
pub const TCP_CHECKSUM: u16 = 16;
const TCP_HEADER: usize = 20;

/// Type of an ICMP echo request.
pub const ECHO_REQUEST: u8 = 8;
/// Type of an ICMP echo reply.
pub const ECHO_REPLY: u8 = 0;
/// Type of an ICMPv6 echo request.
pub const ECHO_REQUEST_6: u8 = 128;
/// Type of an ICMPv6 echo reply.
pub const ECHO_REPLY_6: u8 = 129;

/// Flags of a TCP segment that a gateway cares for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Segment {
    /// It opens a connection: SYN without ACK.
    Open,
    /// Any other.
    Other,
}

/// What a packet carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport<'a> {
    /// A UDP datagram, or several (`segment` bytes each).
    Datagram {
        /// From.
        source: SocketAddr,
        /// To.
        destination: SocketAddr,
        /// Its bytes.
        payload: &'a [u8],
        /// It is several, each of so many bytes but the last.
        segment: Option<u16>,
    },
    /// A TCP segment.
    Stream {
        /// From.
        source: SocketAddr,
        /// To.
        destination: SocketAddr,
        /// Which.
        segment: Segment,
    },
    /// An echo request.
    Echo {
        /// Of the program.
        identifier: u16,
        /// Of the message.
        sequence: u16,
        /// What follows the echo header.
        payload: &'a [u8],
    },
    /// Nothing to do, and nothing wrong: the sandbox's kernel looks for routers and neighbours, or reports an
    /// error of its own.
    Quiet,
}

/// Reads the payload of a packet. `trusted`: its transport checksum need not hold (the kernel vouches for it).
///
/// # Errors
/// It cannot be carried.
pub fn parse<'a>(
    header: &Header,
    payload: &'a [u8],
    trusted: bool,
    segment: Option<u16>,
) -> Result<Transport<'a>, Fault> {
    match (header.protocol, header.source) {
        (protocol::UDP, _) => datagram(header, payload, trusted, segment),
        (protocol::TCP, _) => stream(header, payload, trusted),
        (protocol::ICMP, IpAddr::V4(_)) => {
            if !trusted && !Sum::default().bytes(payload).holds() {
                return Err(Fault::Checksum);
            }
            echo(payload, ECHO_REQUEST)
        }
        (protocol::ICMP6, IpAddr::V6(_)) => {
            if !trusted && !covered(header, payload).holds() {
                return Err(Fault::Checksum);
            }
            echo(payload, ECHO_REQUEST_6)
        }
        _ => Err(Fault::Unsupported),
    }
}

fn covered(header: &Header, payload: &[u8]) -> Sum {
    Sum::default().pseudo(header.source, header.destination, header.protocol, payload.len()).bytes(payload)
}

fn datagram<'a>(
    header: &Header,
    bytes: &'a [u8],
    trusted: bool,
    segment: Option<u16>,
) -> Result<Transport<'a>, Fault> {
    let (source, destination) = ports(header, bytes)?;
    let length = usize::from(u16_at(bytes, 4).ok_or(Fault::Malformed)?);
    let checksum = u16_at(bytes, 6).ok_or(Fault::Malformed)?;
    // Of a packet that is to be segmented the length field may say anything up to the whole.
    let bytes = if segment.is_some() { bytes } else { bytes.get(..length).ok_or(Fault::Malformed)? };
    let payload = bytes.get(UDP_HEADER..).ok_or(Fault::Malformed)?;
    if destination.port() == 0 {
        return Err(Fault::Malformed);
    }
    // No checksum is one of IPv4's possibilities, not of IPv6's (RFC 8200, 8.1).
    let absent = checksum == 0 && header.source.is_ipv4();
    if !trusted && !absent && (checksum == 0 || !covered(header, bytes).holds()) {
        return Err(Fault::Checksum);
    }
    let segment = segment.filter(|segment| usize::from(*segment) < payload.len());
    Ok(Transport::Datagram { source, destination, payload, segment })
}

fn stream<'a>(header: &Header, bytes: &'a [u8], trusted: bool) -> Result<Transport<'a>, Fault> {
    let (source, destination) = ports(header, bytes)?;
    let flags = *bytes.get(13).ok_or(Fault::Malformed)?;
    let length = usize::from(*bytes.get(12).ok_or(Fault::Malformed)? >> 4) * 4;
    if length < TCP_HEADER || bytes.len() < length || source.port() == 0 || destination.port() == 0 {
        return Err(Fault::Malformed);
    }
    if !trusted && !covered(header, bytes).holds() {
        return Err(Fault::Checksum);
    }
    // FIN, SYN, RST, ACK are bits 0, 1, 2 and 4.
    let segment = if flags & 0b1_0111 == 0b10 { Segment::Open } else { Segment::Other };
    Ok(Transport::Stream { source, destination, segment })
}

fn ports(header: &Header, bytes: &[u8]) -> Result<(SocketAddr, SocketAddr), Fault> {
    let source = u16_at(bytes, 0).ok_or(Fault::Malformed)?;
    let destination = u16_at(bytes, 2).ok_or(Fault::Malformed)?;
    Ok((SocketAddr::new(header.source, source), SocketAddr::new(header.destination, destination)))
}

fn echo(bytes: &[u8], request: u8) -> Result<Transport<'_>, Fault> {
    if bytes.first() != Some(&request) {
        return Ok(Transport::Quiet);
    }
    let identifier = u16_at(bytes, 4).ok_or(Fault::Malformed)?;
    let sequence = u16_at(bytes, 6).ok_or(Fault::Malformed)?;
    let payload = bytes.get(ECHO_HEADER..).ok_or(Fault::Malformed)?;
    Ok(Transport::Echo { identifier, sequence, payload })
}

/// A UDP header with no checksum yet. `None`: too long.
#[must_use]
pub fn udp_header(source: u16, destination: u16, payload: usize) -> Option<[u8; UDP_HEADER]> {
    let [length_a, length_b] = u16::try_from(UDP_HEADER + payload).ok()?.to_be_bytes();
    let [source_a, source_b] = source.to_be_bytes();
    let [destination_a, destination_b] = destination.to_be_bytes();
    Some([source_a, source_b, destination_a, destination_b, length_a, length_b, 0, 0])
}

/// An ICMP echo header, without its checksum.
#[must_use]
pub fn echo_header(kind: u8, identifier: u16, sequence: u16) -> [u8; ECHO_HEADER] {
    let mut header = [kind, 0, 0, 0, 0, 0, 0, 0];
    put(&mut header, 4, &identifier.to_be_bytes());
    put(&mut header, 6, &sequence.to_be_bytes());
    header
}
