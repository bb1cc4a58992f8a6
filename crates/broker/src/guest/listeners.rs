//! Listeners of guests outside: accepted here, offered to the guest.

use super::streams::{State, Stream};
use super::{Guests, Order, holdback::Holdback};
use crate::broker::Broker;
use crate::streams::listen;
use kso_core::policy::canonical;
use kso_devices::vsock::GuestId;
use kso_wire::guest::{FIRST_NAMED_CID, GuestReply, LAST_PSEUDO_CID, StreamKey, ToGuest, cid_of};
use kso_wire::{Caller, Errno, Failure, Listen, Reply};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::net::SocketFlags;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// Most listeners of all guests.
const MAX_LISTENERS: usize = 16_384;
/// Connections of one listener that are accepted before others have their turn.
const TURN: usize = 32;
/// After this time it is tried again to accept, when descriptors or memory were short.
const SHORTAGE: Duration = Duration::from_millis(100);

/// A listener of a guest.
#[derive(Debug)]
pub(super) struct Listener {
    pub guest: GuestId,
    vsock_port: u32,
    /// Who listens.
    caller: Caller,
    /// As the program bound it.
    inner: SocketAddr,
    /// As it is bound outside.
    outer: SocketAddr,
    socket: OwnedFd,
    pub held: Holdback<(SocketAddr, OwnedFd)>,
    /// The loop tells when there is somebody to accept.
    watched: bool,
    /// It is not accepted before.
    not_before: Option<Instant>,
}

impl Drop for Listener {
    /// Connections that were not taken are reset, as TCP does (inet_csk_listen_stop).
    fn drop(&mut self) {
        for (_, socket) in self.held.drain() {
            let _ = socket2::SockRef::from(&socket).set_linger(Some(Duration::ZERO));
        }
    }
}

impl Listener {
    pub fn deadline(&self) -> Option<Instant> {
        [self.held.deadline(), self.not_before].into_iter().flatten().min()
    }
}

impl Guests {
    /// Where a guest accepts what comes to a port inside, if it is published; and where that is reached on this host.
    pub(super) fn listening_inside(&self, guest: GuestId, port: u16) -> Option<(u32, SocketAddr)> {
        let one = self.listeners.values().find(|one| one.guest == guest && one.inner.port() == port)?;
        let loopback: IpAddr = match one.outer.ip() {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        };
        let ip = if one.outer.ip().is_unspecified() { loopback } else { one.outer.ip() };
        Some((one.vsock_port, SocketAddr::new(ip, one.outer.port())))
    }

    /// The guest that has a listener at an address outside.
    pub(super) fn listening_at(&self, target: SocketAddr) -> Option<(GuestId, u32)> {
        let ip = canonical(target.ip());
        let serves = |one: &Listener| {
            let bound = one.outer.ip().to_canonical();
            one.outer.port() == target.port()
                && (bound == ip || bound.is_unspecified() && (bound.is_ipv6() || ip.is_ipv4()))
        };
        self.listeners.values().find(|one| serves(one)).map(|one| (one.guest, one.vsock_port))
    }

    /// The program that listens at an address outside.
    pub fn listener_program(&self, guest: GuestId, outer: SocketAddr) -> Option<&str> {
        let one = self.listeners.values().find(|one| one.guest == guest && one.outer == outer)?;
        Some(&one.caller.program)
    }

    fn number(&self, guest: GuestId, vsock_port: u32) -> Option<u32> {
        let mut all = self.listeners.iter();
        all.find(|(_, one)| one.guest == guest && one.vsock_port == vsock_port).map(|(number, _)| *number)
    }

    /// A name for a stream that is to be dialled, and whether its CID does not tell the address.
    fn name_for(&mut self, guest: GuestId, local_port: u32, peer: SocketAddr) -> Option<(StreamKey, bool)> {
        let guest = self.all.get_mut(&guest)?;
        let peer_port = u32::from(peer.port());
        if let Some(peer_cid) = cid_of(peer.ip()) {
            let key = StreamKey { local_port, peer_cid, peer_port };
            // A peer can connect to two addresses of a listener from one port of its own.
            if !guest.streams.contains_key(&key) {
                return Some((key, false));
            }
        }
        for _ in 0..=super::MAX_STREAMS {
            let peer_cid = guest.next_pseudo_cid;
            guest.next_pseudo_cid =
                if peer_cid + 1 >= LAST_PSEUDO_CID { FIRST_NAMED_CID } else { peer_cid + 1 };
            let key = StreamKey { local_port, peer_cid, peer_port };
            if !guest.streams.contains_key(&key) {
                return Some((key, true));
            }
        }
        None
    }
}

impl Broker {
    pub(super) fn listen_for_guest(
        &mut self,
        id: GuestId,
        caller: &Caller,
        wanted: &Listen,
        vsock_port: u32,
    ) -> Result<GuestReply, Failure> {
        let known = self.guests.number(id, vsock_port).filter(|_| wanted.backlog.is_some());
        if let Some(one) = known.and_then(|number| self.guests.listeners.get(&number)) {
            // listen(2) again: another backlog.
            let _ = rustix::net::listen(&one.socket, wanted.backlog.unwrap_or(0));
            return Ok(GuestReply::Listening(one.outer));
        }
        if self.guests.listeners.len() >= MAX_LISTENERS {
            return Err(Failure::kernel(Errno::ENOBUFS));
        }
        let session = self.guests.all.get(&id).and_then(|guest| self.sessions.get_mut(&guest.session.0));
        let session = session.ok_or(Failure::kernel(Errno::ENETDOWN))?;
        let answer = listen(session, &mut self.shared, caller, wanted);
        let outer = match answer.result? {
            Reply::StayInside => return Ok(GuestReply::StayInside),
            Reply::Socket { local: Some(outer) } => outer,
            _ => return Err(Failure::kernel(Errno::EINVAL)),
        };
        let (Some(socket), Some(backlog)) = (answer.descriptor, wanted.backlog) else {
            return Ok(GuestReply::Listening(outer));
        };
        let number = self.guests.next_listener;
        self.guests.next_listener = number.wrapping_add(1);
        let data = EventData::new_u64(Self::guest_listener_token(number));
        epoll::add(&self.epoll, &socket, data, EventFlags::IN)
            .map_err(|error| Failure::kernel(kso_sys::errno::from_raw(error.raw_os_error())))?;
        let port = if wanted.local.port() == 0 { outer.port() } else { wanted.local.port() };
        let listener = Listener {
            guest: id,
            vsock_port,
            caller: caller.clone(),
            inner: SocketAddr::new(wanted.local.ip(), port),
            outer,
            socket,
            held: Holdback::new(backlog),
            watched: true,
            not_before: None,
        };
        self.guests.listeners.insert(number, listener);
        Ok(GuestReply::Listening(outer))
    }

    /// Closes a listener: its port is free at once.
    pub(super) fn unlisten(&mut self, id: GuestId, vsock_port: u32) {
        if let Some(number) = self.guests.number(id, vsock_port) {
            self.guests.listeners.remove(&number);
        }
    }

    /// Closes all listeners of a guest.
    pub(super) fn unlisten_all(&mut self, id: GuestId) {
        self.guests.listeners.retain(|_, listener| listener.guest != id);
    }

    /// Somebody is to be accepted.
    pub(crate) fn guest_accept(&mut self, number: u32) {
        let Some(listener) = self.guests.listeners.get_mut(&number) else { return };
        for _ in 0..TURN {
            if !listener.held.has_room() {
                break;
            }
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            match rustix::net::acceptfrom_with(&listener.socket, flags) {
                Ok((socket, peer)) => {
                    let peer = peer.and_then(|peer| SocketAddr::try_from(peer).ok());
                    if let Some(peer) = peer {
                        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
                        listener.held.push((peer, socket));
                    }
                }
                Err(rustix::io::Errno::AGAIN) => break,
                Err(
                    rustix::io::Errno::MFILE
                    | rustix::io::Errno::NFILE
                    | rustix::io::Errno::NOBUFS
                    | rustix::io::Errno::NOMEM,
                ) => {
                    tracing::warn!(listener = %listener.outer, "no descriptor or memory to accept with");
                    listener.not_before = Some(Instant::now() + SHORTAGE);
                    break;
                }
                // Of the connection, not of the listener (accept(2)).
                Err(_) => {}
            }
        }
        self.dial_waiting(number);
    }

    /// Offers the guest what waits, and goes on accepting if there is room.
    pub(super) fn dial_waiting(&mut self, number: u32) {
        let now = Instant::now();
        while let Some(listener) = self.guests.listeners.get_mut(&number)
            && let Some((place, (peer, socket))) = listener.held.next(now)
        {
            let (id, vsock_port, outer) = (listener.guest, listener.vsock_port, listener.outer);
            let room = self.guests.all.get(&id).is_some_and(super::Guest::has_room);
            let name = if room { self.guests.name_for(id, vsock_port, peer) } else { None };
            let Some((key, unnamed)) = name else {
                if let Some(listener) = self.guests.listeners.get_mut(&number) {
                    listener.held.rejected(place, (peer, socket), now);
                }
                break;
            };
            let local = kso_provider::local_address(&socket).unwrap_or(outer);
            let record = Stream::dialled(peer, local, number, place, &socket);
            if let Some(guest) = self.guests.all.get_mut(&id) {
                guest.streams.insert(key, record);
                if unnamed {
                    guest.tell(&ToGuest::Named { stream: key, address: peer });
                }
            }
            self.guests.order(Order::Dial(id, key, socket));
        }
        self.watch_listener(number, now);
    }

    /// Has the loop tell of new connections, or not.
    fn watch_listener(&mut self, number: u32, now: Instant) {
        let epoll = self.epoll.as_fd();
        let Some(listener) = self.guests.listeners.get_mut(&number) else { return };
        if listener.not_before.is_some_and(|at| at <= now) {
            listener.not_before = None;
        }
        let wanted = listener.held.has_room() && listener.not_before.is_none();
        if wanted != listener.watched {
            let flags = if wanted { EventFlags::IN } else { EventFlags::empty() };
            let data = EventData::new_u64(Self::guest_listener_token(number));
            if epoll::modify(epoll, &listener.socket, data, flags).is_ok() {
                listener.watched = wanted;
            }
        }
    }

    /// The guest did not take what was dialled.
    pub(super) fn dial_rejected(&mut self, id: GuestId, key: StreamKey, socket: OwnedFd) {
        let Some(guest) = self.guests.all.get_mut(&id) else { return };
        let Some(stream) = guest.streams.remove(&key) else { return };
        let State::Dialled { listener, number } = stream.state else { return };
        // Without a listener it is closed: so is what waits in a queue whose listener is closed.
        if let Some(one) = self.guests.listeners.get_mut(&listener) {
            one.held.rejected(number, (stream.peer, socket), Instant::now());
            self.watch_listener(listener, Instant::now());
        }
    }

    /// Dials what is due.
    pub(crate) fn expire_guests(&mut self, now: Instant) {
        let due = |one: &Listener| one.deadline().is_some_and(|at| at <= now);
        let numbers: Vec<u32> =
            self.guests.listeners.iter().filter(|(_, one)| due(one)).map(|(number, _)| *number).collect();
        for number in numbers {
            self.dial_waiting(number);
        }
    }
}
