//! ICMP echo: a ping socket for each peer and identifier. Its life is that of a datagram flow.
//!
//! A datagram ping socket has an identifier of its own (the kernel replaces that of each request, icmp(7)); a
//! raw one carries the program's, and hears the answers to others too. In either case what is written into the
//! sandbox has the program's identifier.

use crate::GatewayConfig;
use crate::gateway::Gateway;
use crate::packet::checksum::Sum;
use crate::packet::icmp::{Cause, Quoted};
use crate::packet::ip::{self, HOPS, Header, header_length};
use crate::packet::transport::{
    ECHO_HEADER, ECHO_REPLY, ECHO_REPLY_6, ECHO_REQUEST, ECHO_REQUEST_6, echo_header,
};
use crate::packet::{protocol, put, u16_at};
use crate::table::{Table, Token};
use crate::watch::{Ready, Source, Waiting};
use kso_sys::datagram::{self, MAX_RECEIVE};
use kso_wire::{Answer, BrokerLink, Errno, Family, OpenEcho, Reply, Request, RequestId};
use rustix::net::SendFlags;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// At most so many flows.
const MAX_ECHOES: usize = 256;
/// Requests of one flow that wait until it is open.
const MAX_HELD: usize = 4;
/// How long a refusal is remembered.
const REFUSAL: Duration = Duration::from_secs(1);
/// Errors that are taken off a queue at one time.
const MAX_ERRORS: usize = 32;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct EchoKey {
    guest: IpAddr,
    peer: IpAddr,
    identifier: u16,
}

#[derive(Debug)]
struct Held {
    sequence: u16,
    payload: Vec<u8>,
    marks: (u8, u8),
}

#[derive(Debug)]
enum State {
    Opening { id: Option<RequestId>, held: Vec<Held> },
    Open { socket: OwnedFd, raw: bool, marks: (u8, u8) },
    Refused { cause: Cause, until: Instant },
}

/// The echo flows of a gateway.
#[derive(Debug)]
pub struct Echoes {
    table: Table<EchoKey, State>,
    scratch: Vec<u8>,
}

impl Echoes {
    pub(crate) fn new(config: &GatewayConfig) -> Self {
        Self { table: Table::new(MAX_ECHOES, config.idle, config.idle), scratch: Vec::new() }
    }

    pub(crate) fn len(&self) -> usize {
        self.table.len()
    }

    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.table.next_deadline()
    }
}

fn family(address: IpAddr) -> Family {
    if address.is_ipv4() { Family::V4 } else { Family::V6 }
}

impl Gateway {
    /// Carries an echo request of the sandbox.
    pub(crate) fn echo(
        &mut self,
        header: &Header,
        identifier: u16,
        sequence: u16,
        payload: &[u8],
        now: Instant,
        link: &mut dyn BrokerLink,
    ) {
        let key = EchoKey { guest: header.source, peer: header.destination, identifier };
        if self.addresses.is_gateway(key.peer) {
            return self.write_reply(&key, sequence, payload);
        }
        let marks = (header.hops, header.traffic_class);
        let held = || Held { sequence, payload: payload.to_vec(), marks };
        let Some(token) = self.echoes.table.find(&key) else {
            return self.open_echo(key, held(), now, link);
        };
        match self.echoes.table.get_mut(token).map(|(_, state)| state) {
            Some(State::Open { .. }) => self.send_echo(token, sequence, payload, marks, now),
            Some(State::Opening { held: waiting, .. }) if waiting.len() < MAX_HELD => waiting.push(held()),
            Some(State::Refused { until, .. }) if *until <= now => {
                self.echoes.table.remove(token);
                self.open_echo(key, held(), now, link);
            }
            Some(State::Refused { cause, .. }) => {
                let cause = *cause;
                let offender = self.own(key.peer);
                self.report_echo(&key, cause, offender, sequence, payload);
            }
            Some(State::Opening { .. }) | None => self.stats.datagrams_lost += 1,
        }
    }

    fn open_echo(&mut self, key: EchoKey, first: Held, now: Instant, link: &mut dyn BrokerLink) {
        let state = State::Opening { id: None, held: vec![first] };
        let (token, replaced) = self.echoes.table.insert(key, state, now);
        if let Some((_, state)) = replaced {
            self.stats.evicted += 1;
            self.drop_echo(state, link);
        }
        let request = Request::OpenEcho(OpenEcho { peer: key.peer, identifier: key.identifier });
        match self.ask(Waiting::Echo(token), request, link) {
            Ok(answer) => self.echo_answered(token, answer, now, link),
            Err(asked) => {
                if let Some((_, State::Opening { id, .. })) = self.echoes.table.get_mut(token) {
                    *id = Some(asked);
                }
            }
        }
    }

    pub(crate) fn echo_answered(
        &mut self,
        token: Token,
        answer: Answer,
        now: Instant,
        _link: &mut dyn BrokerLink,
    ) {
        let Some((key, state)) = self.echoes.table.get_mut(token) else { return };
        let key = *key;
        let State::Opening { held, .. } = state else { return };
        let held = std::mem::take(held);
        *state = match (answer.result, answer.descriptor) {
            (Ok(Reply::Echo { raw }), Some(socket)) => {
                // The queue of errors; the rest is of no use on a ping socket and does no harm.
                let prepared = datagram::prepare(socket.as_fd(), family(key.peer), true);
                match prepared.and(self.watch.add(&socket, Source::Echo(token)).map_err(Into::into)) {
                    Ok(()) => State::Open { socket, raw, marks: (HOPS, 0) },
                    Err(_) => State::Refused { cause: Cause::Host, until: now + REFUSAL },
                }
            }
            (Err(failure), _) => State::Refused { cause: Self::cause(&failure), until: now + REFUSAL },
            (Ok(_), _) => State::Refused { cause: Cause::Host, until: now + REFUSAL },
        };
        let refused = match state {
            State::Refused { cause, .. } => Some(*cause),
            _ => None,
        };
        for Held { sequence, payload, marks } in held {
            match refused {
                None => self.send_echo(token, sequence, &payload, marks, now),
                Some(cause) => {
                    let offender = self.own(key.peer);
                    self.report_echo(&key, cause, offender, sequence, &payload);
                }
            }
        }
    }

    fn drop_echo(&mut self, state: State, link: &mut dyn BrokerLink) {
        if let State::Opening { id: Some(id), .. } = state {
            self.requests.take(id);
            link.forget(id);
        }
    }

    pub(crate) fn expire_echoes(&mut self, now: Instant, link: &mut dyn BrokerLink) {
        while let Some((_, state)) = self.echoes.table.expire(now) {
            self.drop_echo(state, link);
        }
    }

    fn send_echo(&mut self, token: Token, sequence: u16, payload: &[u8], wanted: (u8, u8), now: Instant) {
        self.echoes.table.touch(token, false, now);
        let mut again = true;
        loop {
            let Some((key, State::Open { socket, marks, .. })) = self.echoes.table.get_mut(token) else {
                return;
            };
            let key = *key;
            if marks.0 != wanted.0 {
                let _ = datagram::set_hops(socket.as_fd(), family(key.peer), wanted.0);
            }
            if marks.1 != wanted.1 {
                let _ = datagram::set_traffic_class(socket.as_fd(), family(key.peer), wanted.1);
            }
            *marks = wanted;
            let kind = if key.peer.is_ipv4() { ECHO_REQUEST } else { ECHO_REQUEST_6 };
            let message = &mut self.echoes.scratch;
            message.clear();
            message.extend_from_slice(&echo_header(kind, key.identifier, sequence));
            message.extend_from_slice(payload);
            // ICMPv6's covers addresses outside: the kernel computes it (RFC 3542, 3.1).
            if key.peer.is_ipv4() {
                let sum = Sum::default().bytes(message).finish();
                put(message, 2, &sum);
            }
            let errno = match rustix::net::send(&*socket, message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
            {
                Ok(_) => {
                    self.stats.datagrams_sent += 1;
                    return;
                }
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::NOBUFS) => {
                    self.stats.datagrams_lost += 1;
                    return;
                }
                Err(error) => kso_sys::errno::from_raw(error.raw_os_error()),
            };
            if std::mem::take(&mut again) {
                self.report_queued_echoes(token);
                continue;
            }
            let cause = if errno == Errno::EMSGSIZE { Cause::TooBig(0) } else { Cause::of_errno(errno) };
            let offender = self.own(key.peer);
            return self.report_echo(&key, cause, offender, sequence, payload);
        }
    }

    pub(crate) fn echo_ready(&mut self, token: Token, ready: Ready, now: Instant) {
        if ready.error {
            self.report_queued_echoes(token);
        }
        let Some((key, State::Open { socket, raw, .. })) = self.echoes.table.get(token) else { return };
        let (key, raw) = (*key, *raw);
        let batch = &mut self.datagrams.batch;
        let received = batch
            .receive(socket.as_fd(), MAX_RECEIVE, false)
            .or_else(|_| batch.receive(socket.as_fd(), MAX_RECEIVE, false));
        let Ok(count) = received else { return };
        self.echoes.table.touch(token, true, now);
        let batch = std::mem::take(&mut self.datagrams.batch);
        for (_, message) in (0..count).filter_map(|index| batch.get(index)) {
            if let Some((sequence, payload)) = reply(&key, raw, message) {
                self.stats.datagrams_received += 1;
                self.write_reply(&key, sequence, payload);
            }
        }
        self.datagrams.batch = batch;
    }

    fn write_reply(&mut self, key: &EchoKey, sequence: u16, payload: &[u8]) {
        let v4 = key.peer.is_ipv4();
        let (kind, number) = if v4 { (ECHO_REPLY, protocol::ICMP) } else { (ECHO_REPLY_6, protocol::ICMP6) };
        let length = ECHO_HEADER + payload.len();
        let start = header_length(key.peer);
        let packet = &mut self.echoes.scratch;
        packet.clear();
        packet.resize(start, 0);
        if ip::write(packet, key.peer, key.guest, number, 0, length).is_none() {
            return;
        }
        packet.extend_from_slice(&echo_header(kind, key.identifier, sequence));
        packet.extend_from_slice(payload);
        let sum =
            if v4 { Sum::default() } else { Sum::default().pseudo(key.peer, key.guest, number, length) };
        let sum = sum.bytes(packet.get(start..).unwrap_or_default()).finish();
        put(packet, start + 2, &sum);
        let written = self.device.write(packet);
        self.wrote(written.map(|()| 1));
    }

    fn report_queued_echoes(&mut self, token: Token) {
        let mut buffer = [0; 1280];
        for _ in 0..MAX_ERRORS {
            let Some((key, State::Open { socket, .. })) = self.echoes.table.get(token) else { return };
            let key = *key;
            let Ok(Some(error)) = datagram::next_error(socket.as_fd(), &mut buffer) else { return };
            let (cause, offender) = self.judge(&error, key.peer);
            let message = buffer.get(..error.length).unwrap_or_default();
            let sequence = u16_at(message, 6).unwrap_or(0);
            let payload = message.get(ECHO_HEADER..).unwrap_or_default();
            self.report_echo(&key, cause, offender, sequence, payload);
        }
    }

    fn report_echo(&mut self, key: &EchoKey, cause: Cause, offender: IpAddr, sequence: u16, payload: &[u8]) {
        let v4 = key.peer.is_ipv4();
        let (kind, number) =
            if v4 { (ECHO_REQUEST, protocol::ICMP) } else { (ECHO_REQUEST_6, protocol::ICMP6) };
        let head = echo_header(kind, key.identifier, sequence);
        let quoted =
            Quoted { source: key.guest, destination: key.peer, protocol: number, head: &head, payload };
        self.report(cause, offender, &quoted);
    }
}

/// Sequence number and payload of a message read from a ping socket, if it answers this flow.
fn reply<'a>(key: &EchoKey, raw: bool, message: &'a [u8]) -> Option<(u16, &'a [u8])> {
    let v4 = key.peer.is_ipv4();
    let message = if raw && v4 {
        // raw(7): the IPv4 header is there.
        message.get(usize::from(message.first()? & 0xf) * 4..)?
    } else {
        message
    };
    let kind = if v4 { ECHO_REPLY } else { ECHO_REPLY_6 };
    if message.first() != Some(&kind) || raw && u16_at(message, 4) != Some(key.identifier) {
        return None;
    }
    Some((u16_at(message, 6)?, message.get(ECHO_HEADER..)?))
}
