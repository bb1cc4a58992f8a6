//! What comes: whose it is, and what becomes of it.

use super::{Link, Stack};
use crate::connection::{Connection, ConnectionId, MAX, Role, room};
use crate::egress::{Note, Port};
use crate::frame::{Incoming, Kind};
use crate::packet::{self, Packet, Segment, Trouble, TroubleKind, Tuple};
use crate::solicit;
use kso_wire::Errno;
use smoltcp::phy::{Device, TxToken};
use smoltcp::socket::tcp::State;
use smoltcp::wire::{IpProtocol, IpRepr, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber};
use std::net::IpAddr;
use std::time::Instant;

/// The window that the last acknowledgement shows: nothing comes any more.
const LAST_WINDOW: u16 = 1024;

impl Stack {
    /// A frame came, with its virtio-net header.
    pub fn input(&mut self, frame: &[u8], link: &mut dyn Link, now: Instant) {
        let Some(incoming) = Incoming::parse(frame) else { return };
        let own = self.egress.places.hardware;
        if incoming.source == own || incoming.target != own && !incoming.target.is_multicast() {
            return;
        }
        if incoming.kind == Kind::Arp {
            if let Some(said) = solicit::parse_arp(incoming.packet) {
                self.egress.hear(link, said, now);
            }
            return;
        }
        let places = &self.egress.places;
        let is_own = |address: IpAddr| !address.is_loopback() && places.is_own(address);
        match packet::parse(incoming.kind, incoming.packet, incoming.trusted, is_own) {
            // Nobody outside speaks for us.
            Some(Packet::Segment(segment)) if self.egress.places.is_own(segment.tuple.remote.ip()) => {}
            // To one of our addresses only: RFC 9293, 3.10.
            Some(Packet::Segment(_)) if incoming.target != own => {}
            Some(read) => self.packet(read, incoming.packet, link, now),
            None => {}
        }
    }

    pub(super) fn packet(&mut self, read: Packet, bytes: &[u8], link: &mut dyn Link, now: Instant) {
        match read {
            Packet::Segment(segment) => self.segment(&segment, bytes, link, now),
            Packet::Trouble(trouble) => self.trouble(&trouble),
            Packet::Echo => self.give_to_nobody(bytes, link, now),
            Packet::Neighbour(said) => self.egress.hear(link, said, now),
        }
    }

    fn segment(&mut self, segment: &Segment, bytes: &[u8], link: &mut dyn Link, now: Instant) {
        if let Some(id) = self.tuples.get(&segment.tuple).copied() {
            return self.deliver(id, segment, bytes, link, now);
        }
        let begins = segment.syn && segment.acknowledged.is_none() && !segment.rst;
        if !begins && self.waiting.contains(&segment.tuple, now) {
            return self.acknowledge_again(segment, link, now);
        }
        let Some((listener, found)) = self.listeners.find(&segment.tuple).filter(|_| begins) else {
            return self.give_to_nobody(bytes, link, now);
        };
        let (options, place) = (found.options, segment.tuple.local);
        // Not answered: it comes again.
        if self.connections.len() >= MAX || !self.listeners.begin(listener) {
            return;
        }
        self.waiting.remove(&segment.tuple);
        let mut connection =
            Connection::new(segment.tuple, Role::HalfOpen(listener), options, room(self.connections.len()));
        // A fresh socket, and a port that is none of 0.
        let _ = connection.socket().listen(place);
        let id = self.insert(connection);
        self.deliver(id, segment, bytes, link, now);
    }

    fn deliver(
        &mut self,
        id: ConnectionId,
        segment: &Segment,
        bytes: &[u8],
        link: &mut dyn Link,
        now: Instant,
    ) {
        let time = self.time(now);
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.receiving(segment);
        let before = connection.look().state();
        let mut port =
            Port { packet: Some(bytes), egress: &mut self.egress, link, note: &mut connection.note, now };
        self.interface.poll_ingress_single(time, &mut port, &mut connection.set);
        connection.sent();
        if segment.rst && before != State::Closed && connection.look().state() == State::Closed {
            let connecting = matches!(before, State::SynSent | State::SynReceived);
            connection.error = Some(if connecting { Errno::ECONNREFUSED } else { Errno::ECONNRESET });
        }
        self.mark(id);
        self.look_at(id);
    }

    /// What belongs to nobody: smoltcp answers echo requests, and segments by a reset.
    fn give_to_nobody(&mut self, bytes: &[u8], link: &mut dyn Link, now: Instant) {
        let (time, mut note) = (self.time(now), Note::default());
        let mut port = Port { packet: Some(bytes), egress: &mut self.egress, link, note: &mut note, now };
        self.interface.poll_ingress_single(time, &mut port, &mut self.nobody);
    }

    /// The last segment of a connection that is over came again: see `waiting`.
    fn acknowledge_again(&mut self, segment: &Segment, link: &mut dyn Link, now: Instant) {
        let Some(acknowledged) = segment.acknowledged.filter(|_| !segment.rst) else { return };
        if segment.length == 0 && !segment.fin {
            return;
        }
        let Tuple { local, remote } = segment.tuple;
        let number = |number: u32| TcpSeqNumber(number.cast_signed());
        let tcp = TcpRepr {
            src_port: local.port(),
            dst_port: remote.port(),
            control: TcpControl::None,
            seq_number: number(acknowledged),
            ack_number: Some(number(segment.number) + segment.length + usize::from(segment.fin)),
            window_len: LAST_WINDOW,
            window_scale: None,
            max_seg_size: None,
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: None,
            payload: &[],
        };
        let ip = IpRepr::new(local.ip().into(), remote.ip().into(), IpProtocol::Tcp, tcp.buffer_len(), 64);
        let (time, mut note) = (self.time(now), Note::default());
        let mut port = Port { packet: None, egress: &mut self.egress, link, note: &mut note, now };
        let checksums = port.capabilities().checksum;
        let Some(token) = port.transmit(time) else { return };
        token.consume(ip.buffer_len(), |buffer| {
            ip.emit(&mut *buffer, &checksums);
            let rest = buffer.get_mut(ip.header_len()..).unwrap_or_default();
            tcp.emit(&mut TcpPacket::new_unchecked(rest), &ip.src_addr(), &ip.dst_addr(), &checksums);
        });
    }

    pub(super) fn trouble(&mut self, trouble: &Trouble) {
        let Some(id) = self.tuples.get(&trouble.tuple).copied() else { return };
        let Some(connection) = self.connections.get_mut(&id) else { return };
        match trouble.kind {
            // Of an established connection it may pass; and anybody could say so (RFC 5927).
            TroubleKind::Unreachable(errno) => {
                if connection.role == Role::Connecting && connection.note.syn == Some(trouble.number) {
                    self.fail(id, errno);
                }
            }
            TroubleKind::TooBig(segment) => {
                let path = connection.note.path.map_or(segment, |path| path.min(segment));
                connection.note.path = Some(path);
            }
        }
    }
}
