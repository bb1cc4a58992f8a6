//! All connections and listeners of a kernel: frames in, frames out, events. No I/O, no clock.
//!
//! ```text
//!   input(frame) --> whose is it? --> its socket --> events: Connected, Arrived, Ready
//!   calls (connect, listen, accept, socket + touch, release, abort)
//!   run_due(now) --> who has to say something, who was silent for too long
//!   flush --> sockets send; events: Failed, Ready
//! ```
//!
//! Each connection has a socket set of its own: smoltcp looks through all sockets of a set for each packet. A segment that
//! belongs to nobody goes to the empty set, which answers it with a reset.

mod calls;
mod input;

use crate::config::{Config, ConfigError};
use crate::connection::{Connection, ConnectionId, Role};
use crate::egress::{Egress, Note, Places, Port};
use crate::frame::Kind;
use crate::listeners::Listeners;
use crate::packet::{self, Tuple};
use crate::waiting::Waiting;
use ipnet::IpNet;
use kso_wire::Errno;
use smoltcp::iface::{Interface, PollResult, SocketSet};
use smoltcp::socket::tcp::State;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

/// Segments that a connection sends before others have their turn.
const BURST: usize = 1024;
/// Packets to ourselves that are handled in a turn.
const LOOPED: usize = 256;
/// A socket that wants to be called at once, again, is called so much later.
const SOON: Duration = Duration::from_millis(1);

/// Where frames go.
pub trait Link {
    /// Sends a frame with its virtio-net header. One that cannot be sent is lost.
    fn send(&mut self, frame: &[u8]);
}

/// Something happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A connection is up.
    Connected(ConnectionId),
    /// A connection failed, and is gone.
    Failed(ConnectionId, Errno),
    /// A connection waits at this listener.
    Arrived(u64),
    /// A connection has something to read, room to write, or an end.
    Ready(ConnectionId),
}

/// See the module.
pub struct Stack {
    interface: Interface,
    egress: Egress,
    connections: HashMap<ConnectionId, Connection>,
    tuples: HashMap<Tuple, ConnectionId>,
    listeners: Listeners,
    waiting: Waiting,
    nobody: SocketSet<'static>,
    events: VecDeque<Event>,
    dirty: Vec<ConnectionId>,
    due: BTreeSet<(Instant, ConnectionId)>,
    next: u64,
    start: Instant,
}

impl std::fmt::Debug for Stack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stack").field("connections", &self.connections.len()).finish_non_exhaustive()
    }
}

impl Stack {
    /// With these addresses, on a link where it is called `hardware`. Sequence numbers come from `seed`.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn new(config: &Config, hardware: [u8; 6], seed: u64, now: Instant) -> Result<Self, ConfigError> {
        config.check()?;
        let hardware = EthernetAddress(hardware);
        let local = |address: IpAddr, prefix| IpNet::new(address, prefix).ok();
        let mut own = config.addresses.clone();
        own.extend(local(Places::link_local(hardware).into(), 64));
        own.extend(local(Ipv4Addr::LOCALHOST.into(), 8));
        own.extend(local(Ipv6Addr::LOCALHOST.into(), 128));
        let places = Places { hardware, own, gateways: config.gateways.clone() };
        let mut egress = Egress::new(places, config.mtu, config.offload);
        let mut note = Note::default();
        let mut port = Port { packet: None, egress: &mut egress, link: &mut Nowhere, note: &mut note, now };
        let mut settings = smoltcp::iface::Config::new(HardwareAddress::Ip);
        settings.random_seed = seed;
        let mut interface = Interface::new(settings, &mut port, smoltcp::time::Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            for own in &egress.places.own {
                // There is room: see MAX_ADDRESSES, and the features of smoltcp.
                let _ = addresses.push(IpCidr::new(own.addr().into(), own.prefix_len()));
            }
        });
        Ok(Self {
            interface,
            egress,
            connections: HashMap::new(),
            tuples: HashMap::new(),
            listeners: Listeners::new(seed as u16),
            waiting: Waiting::default(),
            nobody: SocketSet::new(Vec::new()),
            events: VecDeque::new(),
            dirty: Vec::new(),
            due: BTreeSet::new(),
            next: 1,
            start: now,
        })
    }

    fn insert(&mut self, connection: Connection) -> ConnectionId {
        let id = ConnectionId(self.next);
        self.next += 1;
        self.tuples.insert(connection.tuple, id);
        self.connections.insert(id, connection);
        self.mark(id);
        id
    }

    fn fail(&mut self, id: ConnectionId, errno: Errno) {
        self.remove(id);
        self.events.push_back(Event::Failed(id, errno));
    }

    fn remove(&mut self, id: ConnectionId) -> Option<Connection> {
        self.set_due(id, None);
        let connection = self.connections.remove(&id)?;
        self.tuples.remove(&connection.tuple);
        Some(connection)
    }

    fn mark(&mut self, id: ConnectionId) {
        if let Some(connection) = self.connections.get_mut(&id)
            && !std::mem::replace(&mut connection.dirty, true)
        {
            self.dirty.push(id);
        }
    }

    fn announce(&mut self, id: ConnectionId) {
        if let Some(connection) = self.connections.get_mut(&id)
            && !std::mem::replace(&mut connection.announced, true)
        {
            self.events.push_back(Event::Ready(id));
        }
    }

    /// What its state means for its role.
    fn look_at(&mut self, id: ConnectionId) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let state = connection.look().state();
        let begins = matches!(state, State::Listen | State::SynSent | State::SynReceived | State::Closed);
        match connection.role {
            Role::Connecting if !begins => {
                connection.role = Role::Open;
                self.events.push_back(Event::Connected(id));
                self.announce(id);
            }
            Role::HalfOpen(listener) if !begins => {
                connection.role = Role::Waiting(listener);
                if self.listeners.arrived(listener, id) {
                    self.events.push_back(Event::Arrived(listener));
                } else {
                    self.abort(id);
                }
            }
            Role::Open => self.announce(id),
            _ => {}
        }
    }

    /// After it said what it had to say: whether it is gone.
    fn look_whether_gone(&mut self, id: ConnectionId, now: Instant) {
        let Some(connection) = self.connections.get(&id) else { return };
        let state = connection.look().state();
        match connection.role {
            Role::Connecting if state == State::Closed => {
                let errno = connection.error.unwrap_or(Errno::ETIMEDOUT);
                self.fail(id, errno);
            }
            Role::HalfOpen(listener) if matches!(state, State::Listen | State::Closed) => {
                self.listeners.undo(listener, id, false);
                self.remove(id);
            }
            Role::Waiting(listener) if state == State::Closed => {
                self.listeners.undo(listener, id, true);
                self.remove(id);
            }
            Role::Orphan if state == State::Closed => {
                self.remove(id);
            }
            Role::Orphan if connection.is_over() => {
                self.waiting.insert(connection.tuple, now);
                self.remove(id);
            }
            _ => {}
        }
    }

    fn set_due(&mut self, id: ConnectionId, due: Option<Instant>) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if connection.due == due {
            return;
        }
        if let Some(before) = std::mem::replace(&mut connection.due, due) {
            self.due.remove(&(before, id));
        }
        if let Some(due) = due {
            self.due.insert((due, id));
        }
    }

    /// Does what time brought.
    pub fn run_due(&mut self, link: &mut dyn Link, now: Instant) {
        while let Some((_, id)) = self.due.first().copied().filter(|(due, _)| *due <= now) {
            self.set_due(id, None);
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            let patience = connection.options.patience(connection.look(), connection.role == Role::Orphan);
            let until = connection.silent_since.zip(patience).map(|(since, patience)| since + patience);
            if until.is_some_and(|until| until <= now) {
                connection.error.get_or_insert(Errno::ETIMEDOUT);
                connection.socket().abort();
            }
            self.mark(id);
        }
        if self.egress.neighbours.next_deadline().is_none_or(|next| next > now) {
            return;
        }
        let due = self.egress.neighbours.run_due(now);
        due.ask.iter().for_each(|wanted| self.egress.ask(link, *wanted));
        for gone in due.failed {
            let lost: Vec<ConnectionId> = self
                .connections
                .iter()
                .filter(|(_, connection)| connection.role == Role::Connecting)
                .filter(|(_, one)| self.egress.places.next_hop(one.tuple.remote.ip()) == Some(gone))
                .map(|(id, _)| *id)
                .collect();
            lost.into_iter().for_each(|id| self.fail(id, Errno::EHOSTUNREACH));
        }
    }

    /// Sends what connections have to say.
    pub fn flush(&mut self, link: &mut dyn Link, now: Instant) {
        let mut looped = 0;
        loop {
            for id in std::mem::take(&mut self.dirty) {
                self.send(id, link, now);
            }
            // The rest waits for the next turn.
            if looped >= LOOPED {
                break;
            }
            let Some(bytes) = self.egress.take_looped() else { break };
            looped += 1;
            let kind = if bytes.first().is_some_and(|first| first >> 4 == 4) { Kind::V4 } else { Kind::V6 };
            let places = &self.egress.places;
            if let Some(read) = packet::parse(kind, &bytes, true, |address| places.is_own(address)) {
                self.packet(read, &bytes, link, now);
            }
        }
        // Those who wait for somebody on the link: asked at once.
        if self.egress.neighbours.next_deadline().is_some_and(|next| next <= now) {
            self.run_due(link, now);
        }
    }

    fn send(&mut self, id: ConnectionId, link: &mut dyn Link, now: Instant) {
        let time = self.time(now);
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.dirty = false;
        let mut port = Port { packet: None, egress: &mut self.egress, link, note: &mut connection.note, now };
        let mut sent = 0;
        while sent < BURST
            && self.interface.poll_egress(time, &mut port, &mut connection.set) != PollResult::None
        {
            sent += 1;
        }
        connection.sent();
        let wanted = self.interface.poll_at(time, &connection.set).map(|at| {
            let micros = u64::try_from(at.total_micros()).unwrap_or(0);
            (self.start + Duration::from_micros(micros)).max(now + SOON)
        });
        let patience = connection.options.patience(connection.look(), connection.role == Role::Orphan);
        connection.silent_since = patience.and(connection.silent_since.or(Some(now)));
        let until = connection.silent_since.zip(patience).map(|(since, patience)| since + patience);
        let due = [wanted, until].into_iter().flatten().min();
        let closed = connection.look().state() == State::Closed;
        self.set_due(id, due);
        if closed {
            self.look_at(id);
        }
        self.look_whether_gone(id, now);
    }

    fn time(&self, now: Instant) -> smoltcp::time::Instant {
        let since = now.saturating_duration_since(self.start);
        smoltcp::time::Instant::from_micros(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
    }
}

/// A link for a time when nothing is sent.
struct Nowhere;

impl Link for Nowhere {
    fn send(&mut self, _: &[u8]) {}
}

#[cfg(test)]
mod tests;
