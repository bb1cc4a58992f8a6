//! The place to read and write packets, with or without virtio-net headers: a sandbox's TUN, or a stream of a guest's.

use crate::framed::Framed;
use crate::packet::checksum::Sum;
use crate::packet::ip::{self, MAX_PACKET, header_length};
use crate::packet::transport::{TCP_CHECKSUM, UDP_CHECKSUM, UDP_HEADER, udp_header};
use crate::packet::{icmp, protocol, put, vnet};
use kso_sys::datagram::MAX_SEGMENTS;
use kso_sys::tun::{Tun, VNET_HEADER};
use std::io::{self, IoSlice};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};

/// The most that one read gives, bytes.
pub const MAX_READ: usize = VNET_HEADER + MAX_PACKET;
/// The most datagram bytes in one packet, whichever the family.
const MAX_DATAGRAM: usize = 65_535 - ip::V4_HEADER - UDP_HEADER;
/// Slices beside those of the payload: one for all headers.
const HEADS: usize = 1;

/// See the module.
#[derive(Debug)]
pub enum Device {
    /// A TUN of this kernel.
    Tun(Tun),
    /// One of another kernel.
    Framed(Framed),
}

/// Consecutive datagrams of one flow and one size, to be written as one packet.
#[derive(Debug)]
pub struct Train<'a> {
    slices: [IoSlice<'a>; HEADS + MAX_SEGMENTS],
    count: usize,
    bytes: usize,
    datagrams: usize,
    unit: usize,
    /// A shorter datagram was added: it is the last.
    closed: bool,
    traffic_class: u8,
}

impl Default for Train<'_> {
    fn default() -> Self {
        Self {
            slices: [IoSlice::new(&[]); HEADS + MAX_SEGMENTS],
            count: 0,
            bytes: 0,
            datagrams: 0,
            unit: 0,
            closed: false,
            traffic_class: 0,
        }
    }
}

impl<'a> Train<'a> {
    /// Adds a datagram, or several of `unit` bytes that lie after each other. Not taken if they do not go with
    /// those that are there: then write the train and begin anew.
    pub fn add(&mut self, payload: &'a [u8], unit: usize, traffic_class: u8) -> bool {
        let first = self.count == 0;
        let goes = first
            || !self.closed
                && traffic_class == self.traffic_class
                && (unit == self.unit || unit == payload.len() && unit < self.unit)
                && unit > 0
                && self.bytes + payload.len() <= MAX_DATAGRAM;
        // Nothing is divided by the unit of an empty datagram.
        let datagrams = payload.len().div_ceil(unit.max(1)).max(1);
        if !goes || !first && self.datagrams + datagrams > MAX_SEGMENTS {
            return false;
        }
        let Some(slice) = self.slices.get_mut(HEADS + self.count) else { return false };
        *slice = IoSlice::new(payload);
        if first {
            self.unit = unit;
            self.traffic_class = traffic_class;
        }
        self.count += 1;
        self.bytes += payload.len();
        self.datagrams += datagrams;
        self.closed = unit == 0 || unit < self.unit || !payload.len().is_multiple_of(unit);
        true
    }

    /// Whether nothing was added.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

impl Device {
    /// Packets begin with a virtio-net header.
    #[must_use]
    pub fn has_vnet_header(&self) -> bool {
        match self {
            Self::Tun(tun) => tun.has_vnet_header(),
            Self::Framed(_) => true,
        }
    }

    /// Several datagrams can be written as one packet.
    #[must_use]
    pub fn joins(&self) -> bool {
        match self {
            Self::Tun(tun) => tun.segments_datagrams(),
            Self::Framed(framed) => framed.segments(),
        }
    }

    /// Reads a packet.
    ///
    /// # Errors
    /// `EWOULDBLOCK` when there is none.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let tun = match self {
            Self::Tun(tun) => tun,
            Self::Framed(framed) => return framed.read(buffer),
        };
        loop {
            match rustix::io::read(&*tun, &mut *buffer) {
                Err(rustix::io::Errno::INTR) => {}
                done => return Ok(done?),
            }
        }
    }

    /// Whether a packet can be read of which the descriptor does not tell.
    #[must_use]
    pub fn has_packet(&self) -> bool {
        matches!(self, Self::Framed(framed) if framed.has_packet())
    }

    /// Writes a packet whose checksums are right.
    ///
    /// # Errors
    /// It is lost: the device is down, or there is no memory.
    pub fn write(&mut self, packet: &[u8]) -> io::Result<()> {
        if self.has_vnet_header() {
            self.write_slices(&[IoSlice::new(&vnet::plain()), IoSlice::new(packet)])
        } else {
            self.write_slices(&[IoSlice::new(packet)])
        }
    }

    /// Writes a TCP packet whose checksum is left out if the device has virtio-net headers.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn write_tcp(&mut self, packet: &mut [u8]) -> io::Result<()> {
        if !self.has_vnet_header() {
            return self.write(packet);
        }
        let malformed = || io::Error::from(io::ErrorKind::InvalidData);
        let header = ip::Header::parse(packet).map_err(|_| malformed())?;
        let start = header.payload.start;
        let sum =
            Sum::default().pseudo(header.source, header.destination, protocol::TCP, header.payload.len());
        put(packet, start + usize::from(TCP_CHECKSUM), &sum.partial());
        let head = vnet::partial(start, TCP_CHECKSUM, 0, None);
        self.write_slices(&[IoSlice::new(&head), IoSlice::new(packet)])
    }

    /// Writes the datagrams of a train. Tells how many there were.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn write_train(
        &mut self,
        from: SocketAddr,
        to: SocketAddr,
        train: &mut Train<'_>,
    ) -> io::Result<usize> {
        let Train { count, bytes, datagrams, unit, traffic_class, .. } = *train;
        if datagrams <= 1 || self.joins() {
            let segment = if datagrams > 1 { u16::try_from(unit).ok() } else { None };
            let slices = train.slices.get_mut(..HEADS + count).unwrap_or_default();
            self.write_datagram(from, to, traffic_class, bytes, segment, slices)?;
            return Ok(datagrams);
        }
        for slice in train.slices.iter().skip(HEADS).take(count) {
            for payload in slice.chunks(unit.max(1)) {
                let mut slices = [IoSlice::new(&[]), IoSlice::new(payload)];
                self.write_datagram(from, to, traffic_class, payload.len(), None, &mut slices)?;
            }
        }
        Ok(datagrams)
    }

    /// Writes one datagram.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn write_payload(&mut self, from: SocketAddr, to: SocketAddr, payload: &[u8]) -> io::Result<()> {
        let mut slices = [IoSlice::new(&[]), IoSlice::new(payload)];
        self.write_datagram(from, to, 0, payload.len(), None, &mut slices)
    }

    /// Tells the sandbox's kernel why a packet did not arrive.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn write_error(
        &mut self,
        cause: icmp::Cause,
        offender: IpAddr,
        quoted: &icmp::Quoted<'_>,
    ) -> io::Result<()> {
        let mut packet = [0; icmp::LONGEST];
        let length = icmp::write(&mut packet, cause, offender, quoted);
        match length.and_then(|length| packet.get(..length)) {
            Some(packet) => self.write(packet),
            None => Ok(()),
        }
    }

    /// Slices of payload, with a place before them for the headers.
    fn write_datagram<'a>(
        &mut self,
        from: SocketAddr,
        to: SocketAddr,
        traffic_class: u8,
        bytes: usize,
        segment: Option<u16>,
        slices: &mut [IoSlice<'a>],
    ) -> io::Result<()> {
        let too_long = || io::Error::from_raw_os_error(rustix::io::Errno::MSGSIZE.raw_os_error());
        let ip_length = header_length(to.ip());
        let mut udp = udp_header(from.port(), to.port(), bytes).ok_or_else(too_long)?;
        let sum = Sum::default().pseudo(from.ip(), to.ip(), protocol::UDP, UDP_HEADER + bytes);
        let start = if self.has_vnet_header() { VNET_HEADER } else { 0 };
        let mut head = [0; VNET_HEADER + ip::V6_HEADER + UDP_HEADER];
        if start > 0 {
            put(&mut udp, usize::from(UDP_CHECKSUM), &sum.partial());
            put(&mut head, 0, &vnet::partial(ip_length, UDP_CHECKSUM, ip_length + UDP_HEADER, segment));
        } else {
            let sum = slices.iter().skip(HEADS).fold(sum.bytes(&udp), |sum, slice| sum.bytes(slice));
            put(&mut udp, usize::from(UDP_CHECKSUM), &sum.finish_udp());
        }
        let ip = head.get_mut(start..).unwrap_or_default();
        ip::write(ip, from.ip(), to.ip(), protocol::UDP, traffic_class, UDP_HEADER + bytes)
            .ok_or_else(too_long)?;
        put(ip, ip_length, &udp);
        let head = head.get(..start + ip_length + UDP_HEADER).unwrap_or_default();
        // The slice of the headers lives shorter than those of the payload: all are copied to new places.
        let mut all = [IoSlice::new(&[]); HEADS + MAX_SEGMENTS];
        for (place, slice) in all.iter_mut().zip(slices.iter()) {
            *place = IoSlice::new(slice);
        }
        if let Some(first) = all.first_mut() {
            *first = IoSlice::new(head);
        }
        self.write_slices(all.get(..slices.len()).unwrap_or_default())
    }

    fn write_slices(&mut self, slices: &[IoSlice<'_>]) -> io::Result<()> {
        let tun = match self {
            Self::Tun(tun) => tun,
            Self::Framed(framed) => return framed.write(slices),
        };
        loop {
            match rustix::io::writev(&*tun, slices) {
                Err(rustix::io::Errno::INTR) => {}
                done => return Ok(done.map(|_| ())?),
            }
        }
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tun(tun) => tun.as_fd(),
            Self::Framed(framed) => framed.as_fd(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datagrams_of_one_size_go_together_and_a_shorter_one_is_the_last() {
        let bytes = [0; 65_000];
        let mut train = Train::default();
        assert!(train.add(&bytes[..100], 100, 0));
        assert!(train.add(&bytes[..300], 100, 0), "three that were joined already");
        assert!(!train.add(&bytes[..100], 100, 4), "another class");
        assert!(!train.add(&bytes[..101], 101, 0), "a longer one");
        assert!(!train.add(&bytes[..0], 0, 0), "an empty one is not a segment");
        assert!(!train.add(&bytes[..65_000], 100, 0), "too many segments");
        assert!(train.add(&bytes[..250], 100, 0), "the last of three is shorter");
        assert!(!train.add(&bytes[..100], 100, 0), "closed");
        assert_eq!((train.count, train.datagrams, train.bytes), (3, 7, 650));
        let mut train = Train::default();
        assert!(train.add(&bytes[..0], 0, 0));
        assert!(!train.add(&bytes[..1], 1, 0));
        assert_eq!(train.datagrams, 1);
        let mut train = Train::default();
        assert!(train.add(&bytes[..40_000], 40_000, 0));
        assert!(!train.add(&bytes[..40_000], 40_000, 0), "longer than a packet");
    }
}
