//! From packets of smoltcp to frames on the link: where the next hop is, who that is, and what the link does for us.
//!
//! A packet to an address of our own does not leave: it comes back by [`Egress::take_looped`].

use crate::frame::{HEAD, Kind, MAX_PACKET, Offload, write_head};
use crate::neighbours::Neighbours;
use crate::solicit;
use crate::stack::Link;
use ipnet::IpNet;
use smoltcp::phy::{self, Checksum, DeviceCapabilities, Medium, PacketMeta};
use smoltcp::wire::{
    EthernetAddress, IpAddress, IpProtocol, Ipv4Packet, Ipv6Packet, TcpPacket, TcpSeqNumber, checksum,
};
use std::collections::VecDeque;
use std::net::{IpAddr, Ipv6Addr};
use std::num::NonZeroUsize;
use std::time::Instant;

/// Most packets to ourselves that wait.
const MAX_LOOPED: usize = 1024;

/// Bytes of the headers of IPv4 and TCP.
const V4_HEADERS: usize = 40;

/// Our addresses, and the ways out.
#[derive(Debug)]
pub struct Places {
    /// Our hardware address.
    pub hardware: EthernetAddress,
    /// Our addresses, those of loopback among them.
    pub own: Vec<IpNet>,
    /// Where packets to elsewhere go.
    pub gateways: Vec<IpAddr>,
}

impl Places {
    /// Whether an address is ours.
    pub fn is_own(&self, address: IpAddr) -> bool {
        self.own.iter().any(|own| own.addr() == address)
    }

    /// Who takes a packet to `target`. `None`: there is no way.
    pub fn next_hop(&self, target: IpAddr) -> Option<IpAddr> {
        if self.own.iter().any(|own| own.contains(&target)) {
            return Some(target);
        }
        self.gateways.iter().copied().find(|gateway| gateway.is_ipv4() == target.is_ipv4())
    }

    /// The address that speaks to `target`: one of its network, or else the first.
    pub fn source(&self, target: IpAddr) -> Option<IpAddr> {
        if self.is_own(target) {
            return Some(target);
        }
        let family = || {
            let own = self.own.iter().filter(|own| own.addr().is_ipv4() == target.is_ipv4());
            own.filter(|own| !own.addr().is_loopback())
        };
        let near = family().find(|own| own.contains(&target));
        let local = |own: &&IpNet| matches!(own.addr(), IpAddr::V6(v6) if v6.is_unicast_link_local());
        near.or_else(|| family().find(|own| !local(own))).map(IpNet::addr)
    }

    /// The link-local address of our hardware (RFC 4291, appendix A).
    pub fn link_local(EthernetAddress([a, b, c, d, e, f]): EthernetAddress) -> Ipv6Addr {
        let word = |high, low| u16::from_be_bytes([high, low]);
        Ipv6Addr::new(0xfe80, 0, 0, 0, word(a ^ 2, b), word(c, 0xff), word(0xfe, d), word(e, f))
    }
}

/// What is known of, and learned about, the connection that sends.
#[derive(Clone, Copy, Debug, Default)]
pub struct Note {
    /// The path takes segments of so many bytes.
    pub path: Option<u16>,
    /// Something was sent.
    pub sent: bool,
    /// The number of its SYN.
    pub syn: Option<u32>,
    /// The number after all that was ever sent.
    highest: Option<u32>,
}

/// See the module.
#[derive(Debug)]
pub struct Egress {
    /// Our addresses, and the ways out.
    pub places: Places,
    /// Who is there.
    pub neighbours: Neighbours,
    looped: VecDeque<Vec<u8>>,
    buffer: Vec<u8>,
    offload: bool,
    mtu: usize,
}

impl Egress {
    pub fn new(places: Places, mtu: usize, offload: bool) -> Self {
        Self {
            places,
            neighbours: Neighbours::default(),
            looped: VecDeque::new(),
            buffer: Vec::new(),
            offload,
            mtu,
        }
    }

    /// The next packet to ourselves.
    pub fn take_looped(&mut self) -> Option<Vec<u8>> {
        self.looped.pop_front()
    }

    /// Whether there is one.
    pub fn has_looped(&self) -> bool {
        !self.looped.is_empty()
    }

    /// Asks who has an address.
    pub fn ask(&mut self, link: &mut dyn Link, wanted: IpAddr) {
        let Some(from) = self.places.source(wanted) else { return };
        if let Some(frame) = solicit::ask(self.places.hardware, from, wanted) {
            link.send(&frame);
        }
    }

    /// A neighbour spoke.
    pub fn hear(&mut self, link: &mut dyn Link, said: solicit::Said, now: Instant) {
        match said {
            solicit::Said::Asks { wanted, asker } => {
                let own = !wanted.is_loopback() && self.places.is_own(wanted);
                let Some((address, hardware)) = asker.filter(|_| own) else { return };
                if let Some(frame) = solicit::tell(self.places.hardware, wanted, address, hardware) {
                    link.send(&frame);
                }
                self.learn(link, address, hardware, true, now);
            }
            solicit::Said::Has(address, hardware) => self.learn(link, address, hardware, false, now),
        }
    }

    fn learn(
        &mut self,
        link: &mut dyn Link,
        address: IpAddr,
        hardware: EthernetAddress,
        wanted: bool,
        now: Instant,
    ) {
        if self.places.is_own(address) || !self.places.own.iter().any(|own| own.contains(&address)) {
            return;
        }
        for mut frame in self.neighbours.told(address, hardware, wanted, now) {
            if let Some(place) = frame.get_mut(crate::frame::VNET..crate::frame::VNET + 6) {
                place.copy_from_slice(&hardware.0);
            }
            link.send(&frame);
        }
    }

    /// The packet in the buffer, `length` bytes long.
    fn dispatch(&mut self, length: usize, segment: Option<u16>, port: Sending<'_>) {
        let Some((kind, target, protocol, ip_header)) =
            self.buffer.get(HEAD..HEAD + length).and_then(read_header)
        else {
            return;
        };
        let note = port.note;
        note.sent = true;
        let mut offload = None;
        if protocol == IpProtocol::Tcp
            && let Some(tcp_header) = self.look_at_segment(length, ip_header, note)
            && self.offload
        {
            let payload = length.saturating_sub(ip_header + tcp_header);
            let limit = segment.unwrap_or(u16::MAX).min(note.path.unwrap_or(u16::MAX));
            let segment = Some(limit).filter(|limit| payload > usize::from(*limit));
            offload = Some(Offload { v4: kind == Kind::V4, ip_header, tcp_header, segment });
            self.partial_checksum(length, ip_header);
        }
        if self.places.is_own(target) {
            if self.looped.len() < MAX_LOOPED {
                self.looped.push_back(self.buffer.get(HEAD..HEAD + length).unwrap_or_default().to_vec());
            }
            return;
        }
        let Some(next) = self.places.next_hop(target) else { return };
        let known = self.neighbours.find(next, port.now);
        let frame = self.buffer.get_mut(..HEAD + length).unwrap_or_default();
        write_head(frame, offload, self.places.hardware, known.unwrap_or(EthernetAddress::BROADCAST), kind);
        match known {
            Some(_) => port.link.send(frame),
            None => self.neighbours.park(next, frame.to_vec()),
        }
    }

    /// Notes what a segment is; the length of its header.
    ///
    /// An acknowledgement without data bears the number of what comes next (RFC 9293, 3.10.7.4: SND.NXT). smoltcp takes that back
    /// when it sends again, and then the peer takes no acknowledgement of it: two of them would wait for each other for ever.
    fn look_at_segment(&mut self, length: usize, ip_header: usize, note: &mut Note) -> Option<usize> {
        let offload = self.offload;
        let packet = self.buffer.get_mut(HEAD..HEAD + length)?;
        let (from, to) = ends(packet)?;
        let mut tcp = TcpPacket::new_checked(packet.get_mut(ip_header..)?).ok()?;
        let header = usize::from(tcp.header_len());
        let number = tcp.seq_number().0.cast_unsigned();
        if tcp.syn() {
            note.syn = Some(number);
        }
        let data = length.saturating_sub(ip_header + header);
        let occupied = data + usize::from(tcp.syn()) + usize::from(tcp.fin());
        let end = number.wrapping_add(u32::try_from(occupied).unwrap_or(0));
        // How far it is behind what was sent already.
        let behind = note.highest.map_or(0, |highest| highest.wrapping_sub(end).cast_signed());
        match note.highest {
            Some(highest) if behind > 0 && occupied == 0 => {
                tcp.set_seq_number(TcpSeqNumber(highest.cast_signed()));
                if !offload {
                    tcp.fill_checksum(&from, &to);
                }
            }
            _ if behind <= 0 => note.highest = Some(end),
            _ => {}
        }
        Some(header)
    }

    /// The link completes it.
    fn partial_checksum(&mut self, length: usize, ip_header: usize) {
        let Some(packet) = self.buffer.get_mut(HEAD..HEAD + length) else { return };
        let Some((from, to)) = ends(packet) else { return };
        let bytes = u32::try_from(length.saturating_sub(ip_header)).unwrap_or(0);
        let sum = checksum::pseudo_header(&from, &to, IpProtocol::Tcp, bytes);
        if let Ok(mut tcp) = TcpPacket::new_checked(packet.get_mut(ip_header..).unwrap_or_default()) {
            tcp.set_checksum(sum);
        }
    }
}

/// From where and to where a packet goes.
fn ends(packet: &[u8]) -> Option<(IpAddress, IpAddress)> {
    if packet.first()? >> 4 == 4 {
        let header = Ipv4Packet::new_checked(packet).ok()?;
        return Some((header.src_addr().into(), header.dst_addr().into()));
    }
    let header = Ipv6Packet::new_checked(packet).ok()?;
    Some((header.src_addr().into(), header.dst_addr().into()))
}

/// Kind, target, protocol and length of the header of a packet.
fn read_header(packet: &[u8]) -> Option<(Kind, IpAddr, IpProtocol, usize)> {
    if packet.first()? >> 4 == 4 {
        let header = Ipv4Packet::new_checked(packet).ok()?;
        let length = usize::from(header.header_len());
        return Some((Kind::V4, header.dst_addr().into(), header.next_header(), length));
    }
    let header = Ipv6Packet::new_checked(packet).ok()?;
    Some((Kind::V6, header.dst_addr().into(), header.next_header(), 40))
}

/// The device that smoltcp sees, for the time of one packet or one socket.
pub struct Port<'a> {
    pub packet: Option<&'a [u8]>,
    pub egress: &'a mut Egress,
    pub link: &'a mut dyn Link,
    pub note: &'a mut Note,
    pub now: Instant,
}

pub struct Receiving<'a>(&'a [u8]);

/// A packet of smoltcp's on its way.
pub struct Transmitting<'a> {
    egress: &'a mut Egress,
    port: Sending<'a>,
    segment: Option<u16>,
}

struct Sending<'a> {
    link: &'a mut dyn Link,
    note: &'a mut Note,
    now: Instant,
}

impl phy::RxToken for Receiving<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

impl phy::TxToken for Transmitting<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        // All bytes are written over; what is longer than anything before is filled with zeroes once.
        if self.egress.buffer.len() < HEAD + length {
            self.egress.buffer.resize(HEAD + length, 0);
        }
        let result = f(self.egress.buffer.get_mut(HEAD..HEAD + length).unwrap_or_default());
        self.egress.dispatch(length, self.segment, self.port);
        result
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.segment = meta.segmentation_offload_size.map(std::num::NonZeroU16::get);
    }
}

impl Port<'_> {
    fn transmitting(&mut self) -> Transmitting<'_> {
        let port = Sending { link: &mut *self.link, note: &mut *self.note, now: self.now };
        Transmitting { egress: &mut *self.egress, port, segment: None }
    }
}

impl phy::Device for Port<'_> {
    type RxToken<'b>
        = Receiving<'b>
    where
        Self: 'b;
    type TxToken<'b>
        = Transmitting<'b>
    where
        Self: 'b;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Receiving<'_>, Transmitting<'_>)> {
        let packet = self.packet.take()?;
        Some((Receiving(packet), self.transmitting()))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Transmitting<'_>> {
        Some(self.transmitting())
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = self.egress.mtu;
        // What came was verified before, by `packet`, or is vouched for.
        capabilities.checksum.tcp = if self.egress.offload { Checksum::None } else { Checksum::Tx };
        if self.egress.offload {
            // As many whole segments as fit in the longest packet. smoltcp drops such packets of IPv6.
            let segment = self.egress.mtu.saturating_sub(V4_HEADERS).max(1);
            let whole = (MAX_PACKET - V4_HEADERS) / segment * segment;
            capabilities.segmentation.tcpv4 = NonZeroUsize::new(V4_HEADERS + whole);
        }
        capabilities
    }
}
