//! TCP that came by the TUN: from io_uring, or from anything that was not intercepted.
//!
//! ```text
//!            SYN             socket from broker         established outside
//!   (none) -------> Asking ---------------------> Connecting ------------------> Open ---> (none)
//!     |                |                               |                           both ended,
//!     |                +------- refused, failed -------+---> RST or ICMP, (none)   or reset
//!     +--SYN to gateway:53--> Names ---> (none)
//! ```
//!
//! The SYN is kept back until the connection outside is established, and only then given to the TCP of the
//! sandbox's side: so a program's connect succeeds when the true one did, and fails as it did.

mod names;
mod relay;
mod stack;

use crate::gateway::Gateway;
use crate::packet::icmp::{Cause, Quoted};
use crate::packet::ip::{Header, header_length};
use crate::packet::protocol;
use crate::packet::transport::Segment;
use crate::queries;
use crate::table::{Table, Token};
use crate::watch::{Ready, Source, Waiting};
use kso_wire::{
    Answer, BrokerLink, Connect, Errno, Family, Origin, Reply, Request, RequestId, SocketOptions,
    TunAddresses,
};
use names::Names;
use relay::{Moved, Outside};
use rustix::net::sockopt;
use stack::{End, Stack};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// At most so many streams; one more is reset.
const MAX_STREAMS: usize = 1024;
/// How long a stream may take to be established; longer than Linux tries (tcp_syn_retries).
const CONNECT_LIMIT: Duration = Duration::from_secs(180);
/// How long an established stream may be silent (RFC 5382, REQ-5 asks for two hours at least).
const IDLE_LIMIT: Duration = Duration::from_secs(5 * 24 * 3600);
/// The longest SYN that is kept: headers with all their options, bytes.
const MAX_SYN: usize = 256;
/// Rounds of moving bytes of one stream before others have their turn.
const ROUNDS: usize = 8;

/// A stream's ends as the sandbox sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StreamKey {
    guest: SocketAddr,
    peer: SocketAddr,
}

#[derive(Debug)]
enum Phase {
    Asking { id: Option<RequestId>, syn: Vec<u8> },
    Connecting { socket: OwnedFd, syn: Vec<u8> },
    Open { end: End, outside: Outside },
    Names { end: End, names: Names },
}

#[derive(Debug)]
struct Stream {
    phase: Phase,
    /// When its TCP wants to be called.
    due: Option<Instant>,
}

/// The streams of a gateway.
#[derive(Debug)]
pub struct Streams {
    table: Table<StreamKey, Stream>,
    stack: Stack,
    due: BTreeSet<(Instant, u64)>,
}

impl Streams {
    pub(crate) fn new(addresses: &TunAddresses, offload: bool) -> Self {
        Self {
            table: Table::new(MAX_STREAMS, CONNECT_LIMIT, IDLE_LIMIT),
            stack: Stack::new(addresses, offload),
            due: BTreeSet::new(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.table.len()
    }

    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let due = self.due.first().map(|(due, _)| *due);
        [due, self.table.next_deadline()].into_iter().flatten().min()
    }

    fn set_due(&mut self, token: Token, due: Option<Instant>) {
        let Some((_, stream)) = self.table.get_mut(token) else { return };
        if stream.due == due {
            return;
        }
        if let Some(before) = stream.due {
            self.due.remove(&(before, token.to_bits()));
        }
        stream.due = due;
        if let Some(due) = due {
            self.due.insert((due, token.to_bits()));
        }
    }

    fn remove(&mut self, token: Token) -> Option<Stream> {
        self.set_due(token, None);
        self.table.remove(token).map(|(_, stream)| stream)
    }
}

impl Gateway {
    /// A segment came from the sandbox.
    pub(crate) fn segment(
        &mut self,
        guest: SocketAddr,
        peer: SocketAddr,
        segment: Segment,
        packet: &[u8],
        now: Instant,
        link: &mut dyn BrokerLink,
    ) {
        let key = StreamKey { guest, peer };
        if let Some(token) = self.streams.table.find(&key) {
            return self.serve_stream(token, Some(packet), now, link);
        }
        if segment == Segment::Other || packet.len() > MAX_SYN || self.streams.table.is_full() {
            return self.streams.stack.refuse(&mut self.device, packet, now);
        }
        if self.addresses.is_gateway(peer.ip()) && peer.port() == queries::PORT {
            return self.open_names(key, packet, now, link);
        }
        let stream = Stream { phase: Phase::Asking { id: None, syn: packet.to_vec() }, due: None };
        let (token, _) = self.streams.table.insert(key, stream, now);
        let request = Request::Connect(Connect {
            peer,
            family: if peer.is_ipv4() { Family::V4 } else { Family::V6 },
            local: None,
            options: SocketOptions::default(),
            origin: Origin::Tun,
        });
        match self.ask(Waiting::Stream(token), request, link) {
            Ok(answer) => self.stream_answered(token, answer, now, link),
            Err(asked) => {
                if let Some((_, Stream { phase: Phase::Asking { id, .. }, .. })) =
                    self.streams.table.get_mut(token)
                {
                    *id = Some(asked);
                }
            }
        }
    }

    pub(crate) fn stream_answered(
        &mut self,
        token: Token,
        answer: Answer,
        now: Instant,
        _link: &mut dyn BrokerLink,
    ) {
        let Some((_, stream)) = self.streams.table.get_mut(token) else { return };
        let Phase::Asking { syn, .. } = &mut stream.phase else { return };
        match (answer.result, answer.descriptor) {
            (Ok(Reply::Socket { .. }), Some(socket)) => {
                // Whatever has happened to it already is an edge too.
                if self.watch.add_stream(&socket, Source::Stream(token)).is_err() {
                    return self.refuse_stream(token, None, now);
                }
                stream.phase = Phase::Connecting { socket, syn: std::mem::take(syn) };
            }
            (Err(failure), _) => {
                let scarce = matches!(failure.errno, Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS);
                let reset = !failure.denied && (scarce || failure.errno == Errno::ECONNREFUSED);
                let cause = (!reset).then(|| Self::cause(&failure));
                self.refuse_stream(token, cause, now);
            }
            (Ok(_), _) => self.refuse_stream(token, None, now),
        }
    }

    /// The connection cannot be: an ICMP error if there is a cause for one, else a reset.
    fn refuse_stream(&mut self, token: Token, cause: Option<Cause>, now: Instant) {
        let Some(stream) = self.streams.remove(token) else { return };
        let (Phase::Asking { syn, .. } | Phase::Connecting { syn, .. }) = stream.phase else { return };
        let Some(cause) = cause else { return self.streams.stack.refuse(&mut self.device, &syn, now) };
        let Ok(header) = Header::parse(&syn) else { return };
        // Eight bytes of the TCP header are quoted at least: ports and sequence number.
        let quoted = Quoted {
            source: header.source,
            destination: header.destination,
            protocol: protocol::TCP,
            head: &[],
            payload: syn.get(header.payload.start.max(header_length(header.source))..).unwrap_or_default(),
        };
        let offender = self.own(header.source);
        self.report(cause, offender, &quoted);
    }

    pub(crate) fn stream_ready(
        &mut self,
        token: Token,
        ready: Ready,
        now: Instant,
        link: &mut dyn BrokerLink,
    ) {
        let Some((key, stream)) = self.streams.table.get_mut(token) else { return };
        let peer = key.peer;
        match &mut stream.phase {
            Phase::Connecting { socket, .. } => {
                match sockopt::socket_error(&*socket) {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) | Err(error) => {
                        let errno = kso_sys::errno::from_raw(error.raw_os_error());
                        let cause = (errno != Errno::ECONNREFUSED && errno != Errno::ECONNRESET)
                            .then(|| Cause::of_errno(errno));
                        return self.refuse_stream(token, cause, now);
                    }
                }
                if !ready.writable || rustix::net::getpeername(&*socket).is_err() {
                    return;
                }
                let Some(end) = End::listening(peer) else { return self.refuse_stream(token, None, now) };
                // The old phase is taken out by a new one that lasts as long as this statement.
                let before =
                    std::mem::replace(&mut stream.phase, Phase::Asking { id: None, syn: Vec::new() });
                let Phase::Connecting { socket, syn } = before else { return };
                stream.phase = Phase::Open { end, outside: Outside::new(socket) };
                self.streams.table.touch(token, true, now);
                self.serve_stream(token, Some(&syn), now, link);
            }
            Phase::Open { outside, .. } => {
                outside.ready(ready.readable || ready.error, ready.writable || ready.error);
                self.serve_stream(token, None, now, link);
            }
            Phase::Asking { .. } | Phase::Names { .. } => {}
        }
    }

    fn open_names(&mut self, key: StreamKey, syn: &[u8], now: Instant, link: &mut dyn BrokerLink) {
        let Some(end) = End::listening(key.peer) else { return };
        let stream = Stream { phase: Phase::Names { end, names: Names::default() }, due: None };
        let (token, _) = self.streams.table.insert(key, stream, now);
        self.serve_stream(token, Some(syn), now, link);
    }

    pub(crate) fn stream_query_answered(
        &mut self,
        token: Token,
        key: &StreamKey,
        query: [u8; 2],
        answer: Answer,
        now: Instant,
        link: &mut dyn BrokerLink,
    ) {
        let Some((of, Stream { phase: Phase::Names { names, .. }, .. })) = self.streams.table.get_mut(token)
        else {
            return;
        };
        if of == key {
            names.answer(&queries::answer_or_failure(&query, answer));
            self.serve_stream(token, None, now, link);
        }
    }

    /// Gives a stream its packet and moves its bytes until nothing moves.
    fn serve_stream(
        &mut self,
        token: Token,
        mut packet: Option<&[u8]>,
        now: Instant,
        link: &mut dyn BrokerLink,
    ) {
        // A packet or an edge is a use; what is established stays so.
        self.streams.table.touch(token, false, now);
        for round in 0.. {
            let Streams { table, stack, .. } = &mut self.streams;
            let Some((key, stream)) = table.get_mut(token) else { return };
            let key = *key;
            let (end, moved) = match &mut stream.phase {
                // The SYN again: the first is being seen to.
                Phase::Asking { .. } | Phase::Connecting { .. } => return,
                Phase::Open { end, outside } => {
                    stack.poll(&mut self.device, end, packet.take(), now);
                    let moved = outside.relay(end);
                    (end, moved)
                }
                Phase::Names { end, names } => {
                    stack.poll(&mut self.device, end, packet.take(), now);
                    let mut asked = Vec::new();
                    let moved = names.relay(end, |query| asked.push(query));
                    if !asked.is_empty() {
                        self.ask_names(token, key, asked, link);
                        continue;
                    }
                    (end, moved)
                }
            };
            let due = stack.poll(&mut self.device, end, None, now);
            match moved {
                Moved::Over => {
                    self.streams.remove(token);
                    return;
                }
                Moved::Some if round < ROUNDS => {}
                // Others have their turn first.
                Moved::Some => return self.streams.set_due(token, Some(now)),
                Moved::None => return self.streams.set_due(token, due),
            }
        }
    }

    fn ask_names(&mut self, token: Token, key: StreamKey, asked: Vec<Vec<u8>>, link: &mut dyn BrokerLink) {
        for query in asked {
            let identification = query.first_chunk().copied().unwrap_or_default();
            let waiting = Waiting::StreamQuery { stream: token, key, identification };
            let Ok(answer) = self.ask(waiting, Request::Resolve(query.clone()), link) else { continue };
            if let Some((_, Stream { phase: Phase::Names { names, .. }, .. })) =
                self.streams.table.get_mut(token)
            {
                names.answer(&queries::answer_or_failure(&query, answer));
            }
        }
    }

    pub(crate) fn expire_streams(&mut self, now: Instant, link: &mut dyn BrokerLink) {
        // Those that are due again at once have their turn when this is called next.
        for _ in 0..self.streams.due.len() {
            let Some((due, bits)) = self.streams.due.first().copied() else { break };
            if due > now {
                break;
            }
            let token = Token::from_bits(bits);
            self.streams.set_due(token, None);
            // A name of a stream that is gone would otherwise be due for ever.
            self.streams.due.remove(&(due, bits));
            self.serve_stream(token, None, now, link);
        }
        while let Some((_, stream)) = self.streams.table.expire(now) {
            match stream.phase {
                Phase::Asking { id: Some(id), .. } => {
                    self.requests.take(id);
                    link.forget(id);
                }
                Phase::Open { mut end, outside } => {
                    outside.abort();
                    end.socket().abort();
                    self.streams.stack.poll(&mut self.device, &mut end, None, now);
                }
                Phase::Names { mut end, .. } => {
                    end.socket().abort();
                    self.streams.stack.poll(&mut self.device, &mut end, None, now);
                }
                Phase::Asking { .. } | Phase::Connecting { .. } => {}
            }
        }
    }
}
