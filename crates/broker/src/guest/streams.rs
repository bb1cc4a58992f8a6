//! The streams of guests: what is decided when one begins, and told when it ends.
//!
//! ```text
//!   request ---> connecting ---established---> open ---ended---> told, forgotten
//!      |             +---------failed------------------------------------^
//!      +--> refused
//!   accepted --> dialled -----established----> open
//!      ^             |
//!      +--rejected---+
//! ```

use super::outside::HOST_CID;
use super::{Guest, Guests, MAX_STREAMS};
use crate::broker::Broker;
use crate::streams::{Plan, Refusal, denied, open, open_outside, permitted, plan};
use kso_core::event::{self, Direction, Kind};
use kso_devices::vsock::{End, GuestId, Verdict};
use kso_provider::local_address;
use kso_wire::guest::{Prepare, StreamKey, ToGuest, address_of, cid_of};
use kso_wire::{Caller, Connect, Errno, Failure, Family, Origin, Protocol, SocketOptions};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

/// A stream of a guest.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(super) state: State,
    direction: Direction,
    caller: Caller,
    /// The other end, as the guest knows it.
    pub(super) peer: SocketAddr,
    /// Our end, outside.
    pub(super) local: Option<SocketAddr>,
    since: Instant,
    /// Of the socket, if there is one.
    cookie: Option<u64>,
    /// The other end is another guest's, or the same guest's.
    partner: Option<(GuestId, StreamKey)>,
}

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Asked for by the guest, which announced it or did not.
    Connecting { announced: bool },
    /// Offered to the guest: its listener's number, and its own in the holdback of that.
    Dialled { listener: u32, number: u64 },
    /// Up.
    Open,
}

/// A stream as `kso ps` shows it.
#[derive(Debug)]
pub(crate) struct Shown<'a> {
    pub caller: &'a Caller,
    pub inward: bool,
    pub peer: SocketAddr,
    pub local: Option<SocketAddr>,
    pub open: bool,
    pub cookie: Option<u64>,
}

/// What a connection led to.
enum Opened {
    Socket(OwnedFd),
    Joined(GuestId, StreamKey),
}

impl Stream {
    fn new(state: State, direction: Direction, caller: Caller, peer: SocketAddr) -> Self {
        Self {
            state,
            direction,
            caller,
            peer,
            local: None,
            since: Instant::now(),
            cookie: None,
            partner: None,
        }
    }

    fn with_socket(mut self, socket: BorrowedFd<'_>) -> Self {
        self.cookie = kso_sys::cookie(socket).ok();
        self
    }

    pub(super) fn dialled(
        peer: SocketAddr,
        local: SocketAddr,
        listener: u32,
        number: u64,
        socket: &OwnedFd,
    ) -> Self {
        let state = State::Dialled { listener, number };
        let new = Self::new(state, Direction::In, Caller::default(), peer).with_socket(socket.as_fd());
        Self { local: Some(local), ..new }
    }
}

/// What a request means that nothing announced: the address and port that its CID and port are.
fn unannounced(stream: StreamKey) -> Option<Connect> {
    let port = u16::try_from(stream.peer_port).ok().filter(|port| *port != 0)?;
    Some(Connect {
        peer: SocketAddr::new(address_of(stream.peer_cid)?.into(), port),
        family: Family::V4,
        local: None,
        options: SocketOptions::default(),
        origin: Origin::Intercepted,
    })
}

/// Whether an announcement is about this request: one whose request never came says nothing about a later one.
fn is_about(prepare: &Prepare, stream: StreamKey) -> bool {
    let peer = prepare.connect.peer;
    // A ticket says no more than the port.
    if stream.peer_cid == HOST_CID {
        return true;
    }
    match cid_of(peer.ip()) {
        Some(cid) => cid == stream.peer_cid && u32::from(peer.port()) == stream.peer_port,
        None => address_of(stream.peer_cid).is_none(),
    }
}

impl Guest {
    /// A name for a stream from another guest: the other's address, and a port that is not in use.
    fn free_port(&mut self, local_port: u32, peer: IpAddr) -> Option<StreamKey> {
        let peer_cid = cid_of(peer)?;
        for _ in super::FIRST_PORT..=u16::MAX {
            let port = self.next_port;
            self.next_port = if port == u16::MAX { super::FIRST_PORT } else { port + 1 };
            let key = StreamKey { local_port, peer_cid, peer_port: port.into() };
            if !self.streams.contains_key(&key) {
                return Some(key);
            }
        }
        None
    }

    pub(super) fn has_room(&self) -> bool {
        self.streams.len() < MAX_STREAMS
    }
}

impl Guests {
    /// The streams of a guest.
    pub fn shown(&self, guest: GuestId) -> impl Iterator<Item = Shown<'_>> {
        let streams = self.all.get(&guest).into_iter().flat_map(|guest| guest.streams.values());
        streams.map(|stream| Shown {
            caller: &stream.caller,
            inward: stream.direction == Direction::In,
            peer: stream.peer,
            local: stream.local,
            open: stream.state == State::Open,
            cookie: stream.cookie,
        })
    }
}

impl Broker {
    /// Decides on a connection of a guest and begins it.
    pub(super) fn connect_guest(&mut self, id: GuestId, stream: StreamKey) -> Verdict {
        self.forget_stream(id, stream, None);
        let Some(guest) = self.guests.all.get_mut(&id) else { return Verdict::Refused(Errno::ENETDOWN) };
        let prepared = guest.prepared.take(stream.local_port).filter(|prepare| is_about(prepare, stream));
        let announced = prepared.is_some();
        let (caller, wanted) = match prepared {
            Some(Prepare { caller, connect, .. }) => (caller, connect),
            None => match unannounced(stream) {
                Some(connect) => (Caller::default(), connect),
                None => return Verdict::Refused(Errno::EADDRNOTAVAIL),
            },
        };
        let has_room = guest.has_room();
        let opened = if has_room {
            self.open_for_guest(id, &caller, &wanted)
        } else {
            Err(Refusal::Kernel(Errno::ENOBUFS))
        };
        let result = opened.as_ref().map(|_| ()).map_err(Refusal::failure);
        self.see_begin(id, &caller, &wanted, &opened);
        let Some(guest) = self.guests.all.get_mut(&id) else { return Verdict::Refused(Errno::ENETDOWN) };
        let mut record = Stream::new(State::Connecting { announced }, Direction::Out, caller, wanted.peer);
        match opened {
            Ok(Opened::Socket(socket)) => {
                guest.connecting.insert(stream.local_port, stream);
                guest.streams.insert(stream, record.with_socket(socket.as_fd()));
                Verdict::Socket(socket)
            }
            Ok(Opened::Joined(other, key)) => {
                record.partner = Some((other, key));
                let from = IpAddr::V4(guest.address);
                record.local = u16::try_from(key.peer_port).ok().map(|port| SocketAddr::new(from, port));
                let local = record.local;
                guest.connecting.insert(stream.local_port, stream);
                guest.streams.insert(stream, record);
                if let (Some(peer), Some(other)) = (local, self.guests.all.get_mut(&other)) {
                    let state = State::Connecting { announced: false };
                    let mut inward = Stream::new(state, Direction::In, Caller::default(), peer);
                    inward.local = Some(wanted.peer);
                    inward.partner = Some((id, stream));
                    other.streams.insert(key, inward);
                }
                Verdict::Guest(other, key)
            }
            Err(_) => {
                let failure = result.err().unwrap_or_else(|| Failure::kernel(Errno::ECONNREFUSED));
                let errno = failure.errno;
                if announced {
                    guest.tell(&ToGuest::Failed { local_port: stream.local_port, failure });
                }
                Verdict::Refused(errno)
            }
        }
    }

    fn open_for_guest(&mut self, id: GuestId, caller: &Caller, wanted: &Connect) -> Result<Opened, Refusal> {
        let session = self.guests.all.get(&id).and_then(|guest| self.sessions.get_mut(&guest.session.0));
        let session = session.ok_or(Refusal::Kernel(Errno::ENETDOWN))?;
        if session.names_may_be_old() {
            self.hosts.look(Instant::now());
            session.load_hosts(&self.hosts);
        }
        let shared = &mut self.shared;
        let peer = wanted.peer;
        if super::is_guest_address(peer.ip()) {
            permitted(session, shared, wanted, false)?;
            session.may_reach_guest(peer.ip(), peer.port()).map_err(Refusal::Policy)?;
            let other = self.guests.at(peer.ip()).ok_or(Refusal::Kernel(Errno::EHOSTUNREACH))?;
            let (port, outer) = self
                .guests
                .listening_inside(other, peer.port())
                .ok_or(Refusal::Kernel(Errno::ECONNREFUSED))?;
            if self.guests.can_join(id, other) {
                return self.guests.join(id, other, port).ok_or(Refusal::Kernel(Errno::EADDRNOTAVAIL));
            }
            return Ok(Opened::Socket(open(session, &mut shared.stock, wanted, outer)?));
        }
        let target = match plan(session, shared, wanted) {
            // Its runner keeps what is its own; nothing here stands for it.
            Plan::Inside => return Err(Refusal::Kernel(Errno::ECONNREFUSED)),
            Plan::Own(target) => target,
            Plan::Outside { peer, host } => {
                permitted(session, shared, wanted, host)?;
                peer
            }
        };
        if let Some((other, port)) = self.guests.listening_at(target)
            && self.guests.can_join(id, other)
        {
            return self.guests.join(id, other, port).ok_or(Refusal::Kernel(Errno::EADDRNOTAVAIL));
        }
        let own = session.listeners.known().iter().any(|one| one.outer == target);
        let socket = if own {
            open(session, &mut shared.stock, wanted, target)?
        } else {
            open_outside(session, shared, caller, wanted, target)?
        };
        Ok(Opened::Socket(socket))
    }

    /// Counts a beginning, and tells those who watch.
    fn see_begin(
        &mut self,
        id: GuestId,
        caller: &Caller,
        wanted: &Connect,
        opened: &Result<Opened, Refusal>,
    ) {
        let session = self.guests.all.get(&id).and_then(|guest| self.sessions.get_mut(&guest.session.0));
        let Some(session) = session else { return };
        session.counts.connects += 1;
        if let Err(refusal) = opened {
            let failure = refusal.failure();
            session.counts.denied += u64::from(failure.denied);
            session.counts.failed += u64::from(!failure.denied);
            self.shared.totals.connected(&Err(failure));
        }
        if !self.shared.eyes.tells() {
            return;
        }
        let peer = wanted.peer;
        let names = session.names_for_people(peer.ip());
        let connect =
            |local, error| Kind::Connect(event::Connect { peer, names: names.clone(), local, error });
        let kind = match opened {
            Ok(Opened::Socket(socket)) => connect(local_address(socket).ok(), None),
            Ok(Opened::Joined(..)) => connect(None, None),
            Err(Refusal::Kernel(errno)) => connect(None, Some(*errno)),
            Err(Refusal::Policy(reason)) => {
                denied(Some(peer.ip()), Some(peer.port()), Protocol::Tcp, names, reason)
            }
        };
        self.shared.eyes.see(session.id, &session.name, caller, kind);
    }

    /// A stream is up.
    pub(super) fn stream_is_up(&mut self, id: GuestId, key: StreamKey, socket: Option<BorrowedFd<'_>>) {
        let Some(guest) = self.guests.all.get_mut(&id) else { return };
        let Some(stream) = guest.streams.get_mut(&key) else { return };
        let before = std::mem::replace(&mut stream.state, State::Open);
        match before {
            State::Connecting { announced } => {
                guest.connecting.remove(&key.local_port);
                if let Some(socket) = socket {
                    stream.local = kso_sys::local_address(socket).ok().and_then(|address| match address {
                        kso_sys::RawAddress::Inet(address) => Some(address),
                        _ => None,
                    });
                }
                let local = stream.local;
                let inward = stream.direction == Direction::In;
                if announced && let Some(local) = local {
                    guest.tell(&ToGuest::Established { local_port: key.local_port, local });
                }
                if inward { self.see_accept(id, key) } else { self.shared.totals.connected(&Ok(())) }
            }
            State::Dialled { listener, .. } => {
                if let Some(listener) = self.guests.listeners.get_mut(&listener) {
                    listener.held.taken();
                }
                self.see_accept(id, key);
                self.dial_waiting(match before {
                    State::Dialled { listener, .. } => listener,
                    _ => return,
                });
            }
            State::Open => {}
        }
    }

    fn see_accept(&mut self, id: GuestId, key: StreamKey) {
        self.shared.totals.accepts += 1;
        if !self.shared.eyes.tells() {
            return;
        }
        let Some(guest) = self.guests.all.get(&id) else { return };
        let (Some(stream), Some(session)) = (guest.streams.get(&key), self.sessions.get(&guest.session.0))
        else {
            return;
        };
        let kind =
            Kind::Accept(event::Accept { local: stream.local.unwrap_or(stream.peer), peer: stream.peer });
        self.shared.eyes.see(session.id, &session.name, &Caller::default(), kind);
    }

    /// A connection that the guest asked for failed.
    pub(super) fn stream_failed(&mut self, id: GuestId, key: StreamKey, errno: Errno) {
        let Some(guest) = self.guests.all.get_mut(&id) else { return };
        let Some(stream) = guest.streams.get(&key) else {
            // The device did not even ask.
            if guest.prepared.take(key.local_port).is_some() {
                let failure = Failure::kernel(errno);
                guest.tell(&ToGuest::Failed { local_port: key.local_port, failure });
            }
            return;
        };
        if stream.state == (State::Connecting { announced: true }) {
            let failure = Failure::kernel(errno);
            guest.tell(&ToGuest::Failed { local_port: key.local_port, failure });
        }
        let partner = stream_partner(guest, key);
        let session = guest.session.0;
        if let Some(session) = self.sessions.get_mut(&session) {
            session.counts.failed += 1;
        }
        self.shared.totals.connected(&Err(Failure::kernel(errno)));
        self.forget_stream(id, key, Some(End { bytes_out: 0, bytes_in: 0, errno: Some(errno) }));
        // What never was accepted is not told of the other.
        if let Some((other, key)) = partner {
            self.forget_stream(other, key, None);
        }
    }

    /// A stream that was dialled got another name, which does not tell who it is from.
    pub(super) fn rename_stream(&mut self, id: GuestId, from: StreamKey, to: StreamKey) {
        let Some(guest) = self.guests.all.get_mut(&id) else { return };
        let Some(stream) = guest.streams.remove(&from) else { return };
        guest.tell(&ToGuest::Named { stream: to, address: stream.peer });
        guest.streams.insert(to, stream);
    }

    /// A stream is over.
    pub(super) fn stream_ended(&mut self, id: GuestId, key: StreamKey, end: End) {
        if let Some(guest) = self.guests.all.get_mut(&id)
            && let Some(errno) = end.errno
            && guest.streams.get(&key).is_some_and(|stream| stream.state == State::Open)
        {
            guest.tell(&ToGuest::Broken { stream: key, errno });
        }
        self.forget_stream(id, key, Some(end));
    }

    /// Forgets a stream. With an end, it is counted and told.
    pub(super) fn forget_stream(&mut self, id: GuestId, key: StreamKey, end: Option<End>) {
        let Some(guest) = self.guests.all.get_mut(&id) else { return };
        let Some(stream) = guest.streams.remove(&key) else { return };
        if guest.connecting.get(&key.local_port) == Some(&key) {
            guest.connecting.remove(&key.local_port);
        }
        if let State::Dialled { listener, .. } = stream.state
            && let Some(listener) = self.guests.listeners.get_mut(&listener)
        {
            listener.held.taken();
        }
        let Some(end) = end else { return };
        self.shared.totals.bytes_in += end.bytes_in;
        self.shared.totals.bytes_out += end.bytes_out;
        if !self.shared.eyes.tells() {
            return;
        }
        let Some(session) = self.sessions.get(&guest.session.0) else { return };
        let kind = Kind::Closed(event::Closed {
            peer: stream.peer,
            names: session.names_for_people(stream.peer.ip()),
            local: stream.local,
            direction: stream.direction,
            bytes_in: end.bytes_in,
            bytes_out: end.bytes_out,
            duration_us: stream.since.elapsed().into(),
            error: end.errno,
        });
        self.shared.eyes.see(session.id, &session.name, &stream.caller, kind);
    }
}

fn stream_partner(guest: &Guest, key: StreamKey) -> Option<(GuestId, StreamKey)> {
    guest.streams.get(&key).and_then(|stream| stream.partner)
}

impl Guests {
    /// Whether bytes can go from memory to memory: both are a hub's.
    fn can_join(&self, from: GuestId, to: GuestId) -> bool {
        [from, to].iter().all(|id| self.all.get(id).is_some_and(|guest| !guest.tickets))
    }

    /// A stream of `from` to a listener of `to` (perhaps the same guest).
    fn join(&mut self, from: GuestId, to: GuestId, vsock_port: u32) -> Option<Opened> {
        let address = self.all.get(&from)?.address;
        let other = self.all.get_mut(&to).filter(|other| other.has_room())?;
        let key = other.free_port(vsock_port, address.into())?;
        Some(Opened::Joined(to, key))
    }
}
