//! Datagram flows.
//!
//! ```text
//!             first datagram            socket from the broker
//!   (none) ---------------> Opening ------------------------------> Open --+
//!      ^                      | refused                              ^     | idle, full
//!      |                      v                          from outside|     v
//!      +---- a second ---- Refused                     (none) --> Published --> (none)
//! ```
//!
//! A flow is a pair of the sandbox's end and the other end. While it is opened its datagrams wait, a bounded
//! number of them. A refused flow is remembered for a second, so that a program that goes on sending does not
//! ask the broker each time. A published flow shares the socket of its port with others.

use crate::device::Train;
use crate::gateway::Gateway;
use crate::outgoing::Outgoing;
use crate::pace::Pace;
use crate::packet::icmp::Cause;
use crate::packet::ip::HOPS;
use crate::published::Published;
use crate::table::{Table, Token};
use crate::watch::{Ready, Source, Waiting};
use crate::{GatewayConfig, queries};
use kso_sys::datagram::{self, Destination, MAX_RECEIVE, MAX_SEND, Message, ReceiveBatch};
use kso_wire::{Answer, BrokerLink, Errno, Family, OpenDatagram, Reply, Request, RequestId};
use std::io::IoSlice;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// Datagrams of one flow that wait until it is open.
const MAX_HELD: usize = 16;
/// Bytes of all flows that wait.
const MAX_HELD_BYTES: usize = 4 << 20;
/// How long a refusal is remembered.
const REFUSAL: Duration = Duration::from_secs(1);
/// Flows that are closed when there are too many open files.
const MAKE_ROOM: usize = 8;

/// A flow's ends as the sandbox sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// The sandbox's.
    pub guest: SocketAddr,
    /// The other.
    pub peer: SocketAddr,
}

#[derive(Debug)]
pub(crate) struct Held {
    payload: Vec<u8>,
    segment: Option<u16>,
    marks: (u8, u8),
}

/// What a flow is at.
#[derive(Debug)]
pub(crate) enum State {
    Opening { id: Option<RequestId>, held: Vec<Held> },
    Open { socket: OwnedFd },
    Published { port: u32, destination: Destination },
    Refused { cause: Cause, until: Instant },
}

/// A flow.
#[derive(Debug)]
pub struct Flow {
    pub(crate) state: State,
    /// Hop limit and traffic class that the socket has.
    marks: (u8, u8),
    /// The longest datagram of which several are sent by one call. A longer one would not fit the path's MTU.
    segment_limit: usize,
    /// It was opened a second time, after room was made.
    again: bool,
}

impl Flow {
    fn new(state: State) -> Self {
        Self { state, marks: (HOPS, 0), segment_limit: usize::MAX, again: false }
    }

    /// The socket by which its datagrams leave, and where to if that is not connected.
    fn way_out<'a>(&'a self, published: &'a [Published]) -> Option<(BorrowedFd<'a>, Option<Destination>)> {
        match &self.state {
            State::Open { socket } => Some((socket.as_fd(), None)),
            State::Published { port, destination } => {
                Some((published.get(*port as usize)?.socket.as_fd(), Some(*destination)))
            }
            State::Opening { .. } | State::Refused { .. } => None,
        }
    }
}

/// The flows of a gateway.
#[derive(Debug)]
pub struct Datagrams {
    pub(crate) table: Table<FlowKey, Flow>,
    pub(crate) batch: ReceiveBatch,
    pub(crate) published: Vec<Published>,
    held_bytes: usize,
    last: Option<(FlowKey, Token)>,
    pub(crate) pace: Pace,
}

impl Datagrams {
    pub(crate) fn new(config: &GatewayConfig) -> Self {
        Self {
            table: Table::new(config.max_flows, config.idle, config.idle_answered),
            batch: ReceiveBatch::new(),
            published: Vec::new(),
            held_bytes: 0,
            last: None,
            pace: Pace::default(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.table.len()
    }

    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.table.next_deadline()
    }

    fn find(&mut self, key: &FlowKey) -> Option<Token> {
        if let Some((last, token)) = &self.last
            && last == key
            && self.table.get(*token).is_some()
        {
            return Some(*token);
        }
        let token = self.table.find(key)?;
        self.last = Some((*key, token));
        Some(token)
    }
}

fn family(address: SocketAddr) -> Family {
    if address.is_ipv4() { Family::V4 } else { Family::V6 }
}

impl Gateway {
    /// Carries a datagram of the sandbox. `ends`: from, to. `marks`: hop limit, traffic class.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn datagram<'a>(
        &mut self,
        ends: (SocketAddr, SocketAddr),
        payload: &'a [u8],
        segment: Option<u16>,
        marks: (u8, u8),
        outgoing: &mut Outgoing<'a>,
        now: Instant,
        link: &mut dyn BrokerLink,
    ) {
        let key = FlowKey { guest: ends.0, peer: ends.1 };
        let Some(token) = self.datagrams.find(&key) else {
            if key.peer.port() == queries::PORT && self.addresses.is_gateway(key.peer.ip()) {
                return self.query(&key, payload, segment, link);
            }
            return self.open_flow(key, Held { payload: payload.to_vec(), segment, marks }, now, link);
        };
        let Some((_, flow)) = self.datagrams.table.get_mut(token) else { return };
        match &mut flow.state {
            State::Open { .. } | State::Published { .. } => {
                let full = outgoing.count == MAX_SEND;
                let marked = matches!(flow.state, State::Open { .. }) && flow.marks != marks;
                if outgoing.token != Some(token) || full || marked {
                    self.flush(outgoing, now);
                    outgoing.token = Some(token);
                }
                if marked {
                    self.mark(token, marks);
                }
                outgoing.push(payload, segment);
            }
            State::Opening { held, .. } => {
                if held.len() < MAX_HELD && self.datagrams.held_bytes + payload.len() <= MAX_HELD_BYTES {
                    self.datagrams.held_bytes += payload.len();
                    held.push(Held { payload: payload.to_vec(), segment, marks });
                } else {
                    self.stats.datagrams_lost += 1;
                }
            }
            State::Refused { until, .. } if *until <= now => {
                self.close_flow(token, link);
                self.open_flow(key, Held { payload: payload.to_vec(), segment, marks }, now, link);
            }
            State::Refused { cause, .. } => {
                let cause = *cause;
                let offender = self.own(key.peer.ip());
                self.report_datagram(&key, cause, offender, payload, payload.len());
            }
        }
    }

    /// Hop limit and traffic class are the socket's, and change seldom.
    fn mark(&mut self, token: Token, marks: (u8, u8)) {
        let Some((key, flow)) = self.datagrams.table.get_mut(token) else { return };
        let State::Open { socket } = &flow.state else { return };
        let (socket, family) = (socket.as_fd(), family(key.peer));
        // What the host does not permit is not worth an error: the datagram goes without.
        if flow.marks.0 != marks.0 {
            let _ = datagram::set_hops(socket, family, marks.0);
        }
        if flow.marks.1 != marks.1 {
            let _ = datagram::set_traffic_class(socket, family, marks.1);
        }
        flow.marks = marks;
    }

    fn open_flow(&mut self, key: FlowKey, first: Held, now: Instant, link: &mut dyn BrokerLink) {
        self.datagrams.held_bytes += first.payload.len();
        let flow = Flow::new(State::Opening { id: None, held: vec![first] });
        let (token, replaced) = self.datagrams.table.insert(key, flow, now);
        if let Some((_, flow)) = replaced {
            self.stats.evicted += 1;
            self.drop_flow(flow, link);
        }
        self.ask_flow(token, now, link);
    }

    fn ask_flow(&mut self, token: Token, now: Instant, link: &mut dyn BrokerLink) {
        let Some((key, _)) = self.datagrams.table.get(token) else { return };
        let request = Request::OpenDatagram(OpenDatagram { guest: key.guest, peer: key.peer });
        match self.ask(Waiting::Flow(token), request, link) {
            Ok(answer) => self.flow_answered(token, answer, now, link),
            Err(asked) => {
                if let Some((_, Flow { state: State::Opening { id, .. }, .. })) =
                    self.datagrams.table.get_mut(token)
                {
                    *id = Some(asked);
                }
            }
        }
    }

    pub(crate) fn flow_answered(
        &mut self,
        token: Token,
        answer: Answer,
        now: Instant,
        link: &mut dyn BrokerLink,
    ) {
        let Some((key, flow)) = self.datagrams.table.get_mut(token) else { return };
        let key = *key;
        let State::Opening { id, held } = &mut flow.state else { return };
        *id = None;
        let opened = match (answer.result, answer.descriptor) {
            (Ok(Reply::Socket { .. }), Some(socket)) => {
                let prepared = datagram::prepare(socket.as_fd(), family(key.peer), true);
                let watched = self.watch.add(&socket, Source::Flow(token));
                prepared.map_err(|_| Cause::Host).and(watched.map_err(|_| Cause::Host)).map(|()| socket)
            }
            (Ok(_), _) => Err(Cause::Host),
            (Err(failure), _) => {
                let scarce =
                    matches!(failure.errno, Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM);
                if scarce && !flow.again {
                    flow.again = true;
                    self.make_room(token, link);
                    return self.ask_flow(token, now, link);
                }
                Err(Self::cause(&failure))
            }
        };
        let held = std::mem::take(held);
        let bytes: usize = held.iter().map(|held| held.payload.len()).sum();
        flow.state = match opened {
            Ok(socket) => State::Open { socket },
            Err(cause) => State::Refused { cause, until: now + REFUSAL },
        };
        self.datagrams.held_bytes = self.datagrams.held_bytes.saturating_sub(bytes);
        for Held { payload, segment, marks } in held {
            let mut outgoing = Outgoing::default();
            self.datagram((key.guest, key.peer), &payload, segment, marks, &mut outgoing, now, link);
            self.flush(&mut outgoing, now);
        }
    }

    /// Closes flows that were not used for longest, but not the one of `token`.
    fn make_room(&mut self, token: Token, link: &mut dyn BrokerLink) {
        for _ in 0..MAKE_ROOM.min(self.datagrams.table.len().saturating_sub(1)) {
            self.datagrams.table.touch(token, false, Instant::now());
            if let Some((_, flow)) = self.datagrams.table.evict() {
                self.stats.evicted += 1;
                self.drop_flow(flow, link);
            }
        }
    }

    fn close_flow(&mut self, token: Token, link: &mut dyn BrokerLink) {
        if let Some((_, flow)) = self.datagrams.table.remove(token) {
            self.drop_flow(flow, link);
        }
    }

    fn drop_flow(&mut self, flow: Flow, link: &mut dyn BrokerLink) {
        if let State::Opening { id, held } = flow.state {
            let bytes: usize = held.iter().map(|held| held.payload.len()).sum();
            self.datagrams.held_bytes = self.datagrams.held_bytes.saturating_sub(bytes);
            if let Some(id) = id {
                self.requests.take(id);
                link.forget(id);
            }
        }
    }

    pub(crate) fn expire_flows(&mut self, now: Instant, link: &mut dyn BrokerLink) {
        while let Some((_, flow)) = self.datagrams.table.expire(now) {
            self.drop_flow(flow, link);
        }
    }

    /// A datagram came in at a published port: makes its flow, or renews it.
    pub(crate) fn published_flow(
        &mut self,
        key: FlowKey,
        port: u32,
        destination: Destination,
        now: Instant,
        link: &mut dyn BrokerLink,
    ) {
        let state = State::Published { port, destination };
        if let Some(token) = self.datagrams.find(&key)
            && let Some((_, flow)) = self.datagrams.table.get_mut(token)
        {
            // A flow that the sandbox opened to the same peer becomes one of the published port.
            let before = std::mem::replace(&mut flow.state, state);
            self.drop_flow(Flow::new(before), link);
            return self.datagrams.table.touch(token, true, now);
        }
        let (token, replaced) = self.datagrams.table.insert(key, Flow::new(state), now);
        if let Some((_, flow)) = replaced {
            self.stats.evicted += 1;
            self.drop_flow(flow, link);
        }
        self.datagrams.table.touch(token, false, now);
    }

    /// Sends what was gathered.
    pub(crate) fn flush(&mut self, outgoing: &mut Outgoing<'_>, now: Instant) {
        let Some(token) = outgoing.token.take() else { return };
        self.datagrams.table.touch(token, false, now);
        let mut done = 0;
        let mut again = true;
        while done < outgoing.count {
            let Some((_, flow)) = self.datagrams.table.get(token) else { break };
            let Some((socket, destination)) = flow.way_out(&self.datagrams.published) else { break };
            let (messages, count) = outgoing.messages(done, flow.segment_limit);
            let messages = messages.get(..count).unwrap_or_default();
            let slices = outgoing.slices.get(done..outgoing.count).unwrap_or_default();
            match datagram::send(socket, destination, slices, messages) {
                Ok(sent) => {
                    let sent = messages.iter().take(sent).map(|message| message.slices).sum::<usize>();
                    self.stats.datagrams_sent += sent as u64;
                    done += sent.max(1);
                }
                Err(error) => {
                    let Some(first) = messages.first().copied() else { break };
                    done += self.not_sent(token, outgoing, done, first, &error, &mut again);
                }
            }
        }
        outgoing.count = 0;
    }

    /// The message of the slices at `from` was not sent. How many of them are done with.
    fn not_sent(
        &mut self,
        token: Token,
        outgoing: &Outgoing<'_>,
        from: usize,
        message: Message,
        error: &std::io::Error,
        again: &mut bool,
    ) -> usize {
        let errno = kso_sys::errno::of(error);
        let Some((key, flow)) = self.datagrams.table.get_mut(token) else { return outgoing.count };
        let key = *key;
        match errno {
            // The socket's buffer is full: what a network does then.
            Errno::EAGAIN | Errno::ENOBUFS | Errno::ENOMEM => {
                let lost = outgoing.count - from;
                self.stats.datagrams_lost += lost as u64;
                return lost;
            }
            // Segments longer than the path's MTU, or a device that cannot: one by one from now on.
            Errno::EINVAL | Errno::EMSGSIZE | Errno::EIO if message.segment != 0 => {
                flow.segment_limit = flow.segment_limit.min(usize::from(message.segment) - 1);
                let within = outgoing.units.get(from).copied().unwrap_or(0);
                // A slice that was segments already in the sandbox is taken apart here.
                if within != 0 && message.slices == 1 {
                    self.send_apart(token, outgoing.slices.get(from).map_or(&[], |slice| slice), within);
                    return 1;
                }
                return 0;
            }
            _ => {}
        }
        // An error of an earlier datagram may be pending: it is reported for that one, and this one tried again.
        if std::mem::take(again) {
            self.report_queued(token);
            return 0;
        }
        *again = true;
        for slice in outgoing.slices.iter().skip(from).take(message.slices) {
            let offender = self.own(key.peer.ip());
            self.report_datagram(&key, Cause::of_errno(errno), offender, slice, slice.len());
        }
        message.slices.max(1)
    }

    fn send_apart(&mut self, token: Token, bytes: &[u8], unit: u16) {
        for payload in bytes.chunks(usize::from(unit).max(1)) {
            let Some((_, flow)) = self.datagrams.table.get(token) else { return };
            let Some((socket, destination)) = flow.way_out(&self.datagrams.published) else { return };
            let message = [Message { slices: 1, segment: 0 }];
            match datagram::send(socket, destination, &[IoSlice::new(payload)], &message) {
                Ok(_) => self.stats.datagrams_sent += 1,
                Err(_) => self.stats.datagrams_lost += 1,
            }
        }
    }

    /// Something arrived on a flow's socket.
    pub(crate) fn flow_ready(&mut self, token: Token, ready: Ready, now: Instant) {
        if ready.error || !self.receive_flow(token, now) {
            self.report_queued(token);
            self.receive_flow(token, now);
        }
    }

    /// Receives datagrams and writes them to the TUN. Whether there were any.
    pub(crate) fn receive_flow(&mut self, token: Token, now: Instant) -> bool {
        let Some((key, Flow { state: State::Open { socket }, .. })) = self.datagrams.table.get(token) else {
            return false;
        };
        let key = *key;
        let limit = self.datagrams.pace.limit(MAX_RECEIVE, self.at_once);
        // An error that is pending is told by the queue.
        let Ok(count) = self.datagrams.batch.receive(socket.as_fd(), limit, false) else { return false };
        self.datagrams.pace.got(count);
        self.datagrams.table.touch(token, true, now);
        let mut train = Train::default();
        let (mut datagrams, mut written) = (0, Ok(0));
        for (received, payload) in (0..count).filter_map(|index| self.datagrams.batch.get(index)) {
            let unit = received.segment.map_or(payload.len(), usize::from);
            if !train.add(payload, unit, received.traffic_class) {
                written = written.and(self.device.write_train(key.peer, key.guest, &mut train));
                train = Train::default();
                train.add(payload, unit, received.traffic_class);
            }
            datagrams += payload.len().div_ceil(unit.max(1)).max(1);
        }
        if !train.is_empty() {
            written = written.and(self.device.write_train(key.peer, key.guest, &mut train));
        }
        self.stats.datagrams_received += datagrams as u64;
        self.wrote(written);
        count > 0
    }
}
