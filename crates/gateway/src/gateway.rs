//! The gateway's own loop body: what is ready, what was answered, what is due.

use crate::datagrams::Datagrams;
use crate::device::{Device, MAX_READ};
use crate::echoes::Echoes;
use crate::framed::Framed;
use crate::ingress::{Arrival, Ingress};
use crate::outgoing::Outgoing;
use crate::pace::Pace;
use crate::packet::icmp::Cause;
use crate::packet::transport::Transport;
use crate::packet::{Fault, icmp, protocol};
use crate::streams::Streams;
use crate::watch::{Requests, Source, Waiting, Watch};
use crate::{GatewayConfig, GatewayError, GatewayStats};
use kso_sys::tun::Tun;
use kso_wire::{
    Answer, BrokerLink, Caller, Failure, Publication, Request, RequestId, Submitted, TunAddresses,
};
use std::borrow::Cow;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// At most so many packets are read by one call of [`Gateway::run_ready`].
const READS: usize = 128;
/// Packets are read into so much memory before they are looked at, bytes.
const ARENA: usize = 4 * MAX_READ;
/// At most so many packets are read before they are looked at: those that follow each other are sent together.
const READ_BATCH: usize = 64;

/// To be called again so soon is to be called at once: something was left.
const AT_ONCE: Duration = Duration::from_micros(4);
/// A flow, or a published port, that was ready so many times in a row, each soon after a packet of the sandbox, converses alone.
const STREAK: u32 = 32;
/// How soon that is.
const SOON: Duration = Duration::from_micros(50);
/// How long it is looked for what it brings next.
const LINGER: Duration = Duration::from_micros(20);
/// The longest time in which nothing else is looked at.
const TURN: Duration = Duration::from_micros(200);

/// Whether one flow converses alone. A stream of datagrams one way is better served in batches, as they gather.
#[derive(Clone, Copy, Debug, Default)]
struct Hot {
    source: Option<Source>,
    times: u32,
    last: Option<Instant>,
    /// The sandbox has sent something since.
    asked: bool,
}

impl Hot {
    fn ready(&mut self, source: Source, now: Instant) {
        let soon = self.last.is_some_and(|last| now.saturating_duration_since(last) < SOON);
        let asked = std::mem::take(&mut self.asked);
        if soon && asked && self.source == Some(source) {
            self.times = self.times.saturating_add(1);
        } else {
            (self.source, self.times) = (Some(source), 0);
        }
        self.last = Some(now);
    }

    fn source(&mut self, now: Instant) -> Option<Source> {
        if self.last.is_some_and(|last| now.saturating_duration_since(last) >= SOON) {
            self.times = 0;
        }
        self.source.filter(|_| self.times >= STREAK)
    }
}

/// Carries a sandbox's packets over sockets of the external kernel. See the crate.
#[derive(Debug)]
pub struct Gateway {
    pub(crate) device: Device,
    pub(crate) watch: Watch,
    pub(crate) requests: Requests,
    pub(crate) addresses: TunAddresses,
    pub(crate) publish: Vec<Publication>,
    pub(crate) datagrams: Datagrams,
    pub(crate) echoes: Echoes,
    pub(crate) streams: Streams,
    pub(crate) stats: GatewayStats,
    ingress: Ingress,
    arena: Vec<u8>,
    pace: Pace,
    /// When the last [`Gateway::run_ready`] ended, and whether this one came at once.
    ended: Option<Instant>,
    pub(crate) at_once: bool,
    hot: Hot,
    /// The device is watched for room to write.
    awaits_room: bool,
}

impl Gateway {
    /// Takes the descriptor of a sandbox's TUN.
    ///
    /// # Errors
    /// It is not one, or there are too many open files.
    pub fn new(tun: OwnedFd, config: GatewayConfig) -> Result<Self, GatewayError> {
        Self::on(Device::Tun(Tun::from_fd(tun).map_err(GatewayError::Tun)?), config)
    }

    /// Takes a stream of a guest's packets: frames of `kso_wire::frame`, each a virtio-net header and a packet.
    ///
    /// # Errors
    /// It is no stream, or there are too many open files.
    pub fn framed(stream: OwnedFd, config: GatewayConfig) -> Result<Self, GatewayError> {
        Self::on(Device::Framed(Framed::new(stream).map_err(GatewayError::Tun)?), config)
    }

    /// Whether the guest's TUN takes several UDP datagrams of a flow as one packet. Until it is told, it does not.
    pub fn set_segments(&mut self, segments: bool) {
        if let Device::Framed(framed) = &mut self.device {
            framed.set_segments(segments);
        }
    }

    fn on(device: Device, config: GatewayConfig) -> Result<Self, GatewayError> {
        let watch = Watch::new().map_err(|error| GatewayError::Tun(error.into()))?;
        watch.add(&device, Source::Tun).map_err(|error| GatewayError::Tun(error.into()))?;
        Ok(Self {
            ingress: Ingress::new(config.addresses, device.has_vnet_header()),
            streams: Streams::new(&config.addresses, device.has_vnet_header()),
            datagrams: Datagrams::new(&config),
            echoes: Echoes::new(&config),
            device,
            watch,
            requests: Requests::default(),
            addresses: config.addresses,
            publish: config.publish,
            stats: GatewayStats::default(),
            arena: vec![0; ARENA],
            pace: Pace::default(),
            ended: None,
            at_once: false,
            hot: Hot::default(),
            awaits_room: false,
        })
    }

    /// Readable when [`Self::run_ready`] has something to do.
    #[must_use]
    pub fn poll_fd(&self) -> BorrowedFd<'_> {
        self.watch.poll_fd()
    }

    /// What happened so far.
    #[must_use]
    pub fn stats(&self) -> GatewayStats {
        GatewayStats {
            flows: self.datagrams.len(),
            echoes: self.echoes.len(),
            streams: self.streams.len(),
            ..self.stats
        }
    }

    /// Does what is ready, at most so much of it that a caller with other duties is not kept from them.
    pub fn run_ready(&mut self, now: Instant, link: &mut dyn BrokerLink) {
        self.at_once = self.ended.is_some_and(|ended| now.saturating_duration_since(ended) < AT_ONCE);
        let ready = self.watch.take_ready();
        for (source, state) in &ready {
            match *source {
                Source::Tun => {
                    if let Device::Framed(framed) = &mut self.device {
                        framed.flush();
                    }
                    self.read_tun(now, link);
                }
                Source::Flow(token) => {
                    self.flow_ready(token, *state, now);
                    self.hot.ready(*source, now);
                }
                Source::Published(index) => {
                    self.published_ready(index, *state, now, link);
                    self.hot.ready(*source, now);
                }
                Source::Echo(token) => self.echo_ready(token, *state, now),
                Source::Stream(token) => self.stream_ready(token, *state, now, link),
            }
        }
        self.watch.done(ready);
        self.at_once = false;
        self.linger(now, link);
        self.watch_device();
        self.ended = Some(Instant::now());
    }

    /// Takes an answer that came later.
    pub fn answered(&mut self, id: RequestId, answer: Answer, now: Instant, link: &mut dyn BrokerLink) {
        match self.requests.take(id) {
            Some(Waiting::Flow(token)) => self.flow_answered(token, answer, now, link),
            Some(Waiting::Echo(token)) => self.echo_answered(token, answer, now, link),
            Some(Waiting::Stream(token)) => self.stream_answered(token, answer, now, link),
            Some(query @ Waiting::Query { .. }) => self.query_answered(&query, answer),
            Some(Waiting::StreamQuery { stream, key, identification }) => {
                self.stream_query_answered(stream, &key, identification, answer, now, link);
            }
            Some(Waiting::Published(index)) => {
                if let Err(error) = self.published(index, answer) {
                    tracing::error!(%error, "a published port is not served");
                }
            }
            None => {}
        }
    }

    /// When [`Self::expire`] has something to do.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        // The descriptor does not tell of packets that were read with others.
        if self.device.has_packet() {
            return Some(Instant::now());
        }
        [
            self.datagrams.next_deadline(),
            self.echoes.next_deadline(),
            self.streams.next_deadline(),
            self.ingress.next_deadline(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Does what is due: drops what was idle for too long, and sends again what TCP did not get through.
    pub fn expire(&mut self, now: Instant, link: &mut dyn BrokerLink) {
        self.expire_flows(now, link);
        self.expire_echoes(now, link);
        self.expire_streams(now, link);
        self.ingress.expire(now);
        if self.device.has_packet() {
            self.read_tun(now, link);
        }
        self.watch_device();
    }

    /// Has the loop tell when there is room again for a guest's packets, and nothing once it is gone.
    fn watch_device(&mut self) {
        let Device::Framed(framed) = &self.device else { return };
        if framed.is_closed() {
            self.watch.remove(framed);
        } else if framed.is_waiting() != self.awaits_room
            && self.watch.watch_room(framed, Source::Tun, framed.is_waiting()).is_ok()
        {
            self.awaits_room = framed.is_waiting();
        }
    }

    /// Asks the broker. An answer that is there at once is returned.
    pub(crate) fn ask(
        &mut self,
        waiting: Waiting,
        request: Request,
        link: &mut dyn BrokerLink,
    ) -> Result<Answer, RequestId> {
        let id = self.requests.add(waiting);
        match link.submit(id, &Caller::default(), request) {
            Submitted::Done(answer) => {
                self.requests.take(id);
                Ok(answer)
            }
            Submitted::Pending => Err(id),
        }
    }

    /// Why a request failed, as the sandbox's kernel is told it.
    pub(crate) fn cause(failure: &Failure) -> Cause {
        if failure.denied { Cause::Prohibited } else { Cause::of_errno(failure.errno) }
    }

    /// The gateway's own address in the family of `like`.
    pub(crate) fn own(&self, like: IpAddr) -> IpAddr {
        let [first, second] = self.addresses.gateway;
        if first.is_ipv4() == like.is_ipv4() { first } else { second }
    }

    /// Looks again and again for what the flow that converses alone brings next, for a short time: a sleep and a
    /// wake-up cost more than the whole of a datagram's way. Others on this processor have it in between
    /// (`sched_yield`), so nobody is kept waiting by it.
    fn linger(&mut self, now: Instant, link: &mut dyn BrokerLink) {
        let Some(source) = self.hot.source(now) else { return };
        let start = Instant::now();
        let mut last = start;
        loop {
            rustix::thread::sched_yield();
            let now = Instant::now();
            let received = match source {
                Source::Flow(token) => self.receive_flow(token, now),
                Source::Published(place) => self.receive_published(place, now, link),
                Source::Tun | Source::Echo(_) | Source::Stream(_) => false,
            };
            if received {
                self.hot.ready(source, now);
            }
            if self.read_tun(now, link) | received {
                last = now;
            }
            // Until there is nothing, or no conversation any more, or others have waited long enough.
            if now - last > LINGER || now - start > TURN || self.hot.times == 0 {
                return;
            }
        }
    }

    /// Reads packets and carries them. Whether there were any.
    fn read_tun(&mut self, now: Instant, link: &mut dyn BrokerLink) -> bool {
        let mut arena = std::mem::take(&mut self.arena);
        let most = self.pace.limit(READS, self.at_once);
        let mut budget = most;
        while budget > 0 {
            let mut lengths = [0; READ_BATCH];
            let mut count = 0;
            let mut at = 0;
            while count < READ_BATCH.min(budget)
                && let Some(room) = arena.get_mut(at..).filter(|room| room.len() >= MAX_READ)
            {
                let Ok(length) = self.device.read(room) else { break };
                if let Some(place) = lengths.get_mut(count) {
                    *place = length;
                }
                at += length;
                count += 1;
            }
            let full = count == READ_BATCH.min(budget) || arena.len() - at < MAX_READ;
            let mut outgoing = Outgoing::default();
            let mut rest = arena.as_slice();
            for length in lengths.into_iter().take(count) {
                let Some((packet, after)) = rest.split_at_checked(length) else { break };
                rest = after;
                self.packet(packet, &mut outgoing, now, link);
            }
            self.flush(&mut outgoing, now);
            budget -= count;
            if !full {
                break;
            }
        }
        self.arena = arena;
        if budget < most {
            self.hot.asked = true;
        }
        self.pace.got(most - budget);
        budget < most
    }

    fn packet<'a>(
        &mut self,
        bytes: &'a [u8],
        outgoing: &mut Outgoing<'a>,
        now: Instant,
        link: &mut dyn BrokerLink,
    ) {
        self.stats.packets_in += 1;
        let arrival = match self.ingress.admit(bytes, now) {
            Ok(Some(arrival)) => arrival,
            Ok(None) => return,
            Err(fault) => return self.dropped(fault),
        };
        match arrival.payload {
            Cow::Borrowed(payload) => self.transport(&arrival, payload, outgoing, now, link),
            // What was put together does not live as long as the batch: it goes alone, in its turn.
            Cow::Owned(ref payload) => {
                self.flush(outgoing, now);
                let mut alone = Outgoing::default();
                self.transport(&arrival, payload, &mut alone, now, link);
                self.flush(&mut alone, now);
            }
        }
    }

    fn transport<'a>(
        &mut self,
        arrival: &Arrival<'_>,
        payload: &'a [u8],
        outgoing: &mut Outgoing<'a>,
        now: Instant,
        link: &mut dyn BrokerLink,
    ) {
        match arrival.transport(payload) {
            Ok(Transport::Datagram { source, destination, payload, segment }) => {
                let marks = (arrival.header.hops, arrival.header.traffic_class);
                self.datagram((source, destination), payload, segment, marks, outgoing, now, link);
            }
            Ok(Transport::Echo { identifier, sequence, payload }) => {
                self.echo(&arrival.header, identifier, sequence, payload, now, link);
            }
            Ok(Transport::Stream { source, destination, segment }) => {
                if let Some(packet) = arrival.packet(payload) {
                    self.segment(source, destination, segment, &packet, now, link);
                }
            }
            Ok(Transport::Quiet) => {}
            Err(fault) => {
                self.dropped(fault);
                if fault == Fault::Unsupported {
                    self.unknown_protocol(arrival, payload);
                }
            }
        }
    }

    fn unknown_protocol(&mut self, arrival: &Arrival<'_>, payload: &[u8]) {
        let header = &arrival.header;
        // An ICMP message is not answered by an error (RFC 1122, 3.2.2).
        if matches!(header.protocol, protocol::ICMP | protocol::ICMP6) {
            return;
        }
        let quoted = icmp::Quoted {
            source: header.source,
            destination: header.destination,
            protocol: header.protocol,
            head: &[],
            payload,
        };
        let offender = self.own(header.source);
        self.report(Cause::Protocol, offender, &quoted);
    }

    /// Tells the sandbox's kernel why a packet did not arrive.
    pub(crate) fn report(&mut self, cause: Cause, offender: IpAddr, quoted: &icmp::Quoted<'_>) {
        self.stats.errors_reported += 1;
        let written = self.device.write_error(cause, offender, quoted);
        self.wrote(written.map(|()| 1));
    }

    /// Counts what was written to the TUN.
    pub(crate) fn wrote(&mut self, written: std::io::Result<usize>) {
        match written {
            Ok(_) => self.stats.packets_out += 1,
            Err(error) => {
                self.stats.packets_lost += 1;
                tracing::debug!(%error, "a packet could not be written to the TUN");
            }
        }
    }

    fn dropped(&mut self, fault: Fault) {
        let counter = match fault {
            Fault::Malformed => &mut self.stats.malformed,
            Fault::Checksum => &mut self.stats.bad_checksum,
            Fault::Spoofed => &mut self.stats.spoofed,
            Fault::NotUnicast => &mut self.stats.not_unicast,
            Fault::Unsupported => &mut self.stats.unsupported,
        };
        *counter += 1;
    }

    /// How the other end of a published port is shown inside: what only means something outside (the host's
    /// loopback), or means something else inside (the sandbox's own addresses), as the gateway.
    pub(crate) fn shown(&self, peer: SocketAddr) -> SocketAddr {
        let address = peer.ip().to_canonical();
        let other = address.is_loopback() || address.is_unspecified() || self.addresses.is_guest(address);
        // Neither flow information nor a scope means anything inside.
        SocketAddr::new(if other { self.own(address) } else { address }, peer.port())
    }
}
