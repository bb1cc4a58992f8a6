//! `Connect`, `Listen` and `Release`: what a session asks for its streams.

use crate::broker::Shared;
use crate::listeners::Listener;
use crate::publish::{self, Fate};
use crate::route::{Route, route};
use crate::session::{MAX_RESERVED, Session};
use crate::track::Tracked;
use kso_core::event::{self, Kind};
use kso_core::policy::{Reason, canonical};
use kso_provider::stock::Stock;
use kso_provider::stream::{self, Order, Place};
use kso_wire::{
    Answer, Caller, Connect, Errno, Failure, Family, Listen, LoopbackMode, Protocol, Reply, RequestId,
    SocketOptions, Submitted,
};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};

/// Why something was not done.
pub(crate) enum Refusal {
    Policy(Reason),
    Kernel(Errno),
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Self {
        Self::Kernel(errno)
    }
}

/// What a denied program is told. Programs print "Permission denied" and go on to the next address; none
/// tries for ever, as some do after ECONNREFUSED or ENETUNREACH. Landlock answers the same.
pub(crate) const DENIED: Errno = Errno::EACCES;

impl Refusal {
    pub fn failure(&self) -> Failure {
        match self {
            Self::Policy(_) => Failure::denied(DENIED),
            Self::Kernel(errno) => Failure::kernel(*errno),
        }
    }
}

fn stay_inside() -> Answer {
    Answer::plain(Ok(Reply::StayInside))
}

/// Where a connection goes.
pub(crate) enum Plan {
    /// The client kernel's own business.
    Inside,
    /// A listener of the session itself: no business of policy.
    Own(SocketAddr),
    /// To this address, if policy permits.
    Outside {
        /// Translated.
        peer: SocketAddr,
        /// It stands for the host's loopback.
        host: bool,
    },
}

pub(crate) fn plan(session: &mut Session, shared: &Shared, wanted: &Connect) -> Plan {
    let ip = canonical(wanted.peer.ip());
    let port = wanted.peer.port();
    if (ip.is_loopback() || session.tun.is_guest(ip))
        && !session.listeners.is_empty()
        && let Some(target) = session.listeners.find(ip, port, wanted.family)
    {
        return Plan::Own(target);
    }
    let external = session.loopback == LoopbackMode::External;
    let own = |ip| shared.addresses.contains(ip);
    match route(wanted.peer, &session.tun, external, own) {
        Route::Inside => Plan::Inside,
        Route::Outside { peer, host } => Plan::Outside { peer, host },
    }
}

pub(crate) fn connect(
    session: &mut Session,
    shared: &mut Shared,
    caller: &Caller,
    wanted: &Connect,
) -> Answer {
    let ip = canonical(wanted.peer.ip());
    if let Some(opened) = shared.external.as_ref().and_then(|one| one.connect_inside(session, ip, wanted)) {
        return connected(session, shared, caller, wanted.peer, opened.map_err(Refusal::Kernel));
    }
    let opened = match plan(session, shared, wanted) {
        Plan::Inside => return stay_inside(),
        Plan::Own(target) => open(session, &mut shared.stock, wanted, target).map_err(Refusal::Kernel),
        Plan::Outside { peer, host } => permitted(session, shared, wanted, host)
            .and_then(|()| open_outside(session, shared, caller, wanted, peer).map_err(Refusal::Kernel)),
    };
    connected(session, shared, caller, wanted.peer, opened)
}

/// Opens what is permitted.
pub(crate) fn open_outside(
    session: &mut Session,
    shared: &mut Shared,
    caller: &Caller,
    wanted: &Connect,
    peer: SocketAddr,
) -> Result<OwnedFd, Errno> {
    if let Some(external) = &mut shared.external
        && let Some(opened) = external.connect(session, caller, wanted, peer)
    {
        return opened;
    }
    let socket = open(session, &mut shared.stock, wanted, peer)?;
    // Programs take host.kso.internal's IPv6 address first, and few services of a host listen on ::1.
    let instead = SocketAddr::new(Ipv4Addr::LOCALHOST.to_ipv6_mapped().into(), peer.port());
    let gateway = session.tun.is_gateway(wanted.peer.ip());
    if gateway && peer.ip() == Ipv6Addr::LOCALHOST && stream::refused_already(&socket) {
        return open(session, &mut shared.stock, wanted, instead);
    }
    Ok(socket)
}

pub(crate) fn permitted(
    session: &Session,
    shared: &Shared,
    wanted: &Connect,
    host: bool,
) -> Result<(), Refusal> {
    let (ip, port) = (wanted.peer.ip().to_canonical(), wanted.peer.port());
    session.decide(&shared.policy, ip, port, Protocol::Tcp, host).map_err(Refusal::Policy)?;
    let bound_inside = wanted.local.is_some_and(|local| local.ip().to_canonical().is_loopback());
    if bound_inside && !canonical(ip).is_loopback() {
        // As Linux does: a socket on loopback reaches nothing else (ip_route_output_key_hash_rcu).
        return Err(Refusal::Kernel(Errno::EINVAL));
    }
    Ok(())
}

pub(crate) fn open(
    session: &mut Session,
    stock: &mut Stock,
    wanted: &Connect,
    peer: SocketAddr,
) -> Result<OwnedFd, Errno> {
    let order = Order {
        peer,
        family: wanted.family,
        port: wanted.local.map(|local| local.port()).filter(|port| *port != 0),
        options: &wanted.options,
        holder: session.holder,
    };
    if let Some(local) = wanted.local
        && let Some(at) = reserved_at(session, local)
    {
        // The program's socket leaves this port: what was kept for it is used, or given up.
        let (kept, socket) = session.reserved.swap_remove(at);
        if canonical(peer.ip()).is_loopback() && canonical(kept.ip()).is_loopback() {
            stream::connect_reserved(&socket, &order)?;
            return Ok(socket);
        }
    }
    stock.connect(&order)
}

/// The reservation that stands for the address `local` inside.
fn reserved_at(session: &Session, local: SocketAddr) -> Option<usize> {
    let same = |kept: &SocketAddr| kept.port() == local.port() && kept.is_ipv4() == local.is_ipv4();
    let exact = session.reserved.iter().position(|(kept, _)| *kept == local);
    exact.or_else(|| session.reserved.iter().position(|(kept, _)| same(kept)))
}

fn connected(
    session: &mut Session,
    shared: &mut Shared,
    caller: &Caller,
    peer: SocketAddr,
    opened: Result<OwnedFd, Refusal>,
) -> Answer {
    let result = match &opened {
        Ok(_) => Ok(()),
        Err(refusal) => Err(refusal.failure()),
    };
    session.counts.connects += 1;
    shared.totals.connected(&result);
    match &result {
        Ok(()) => {}
        Err(failure) if failure.denied => session.counts.denied += 1,
        Err(_) => session.counts.failed += 1,
    }
    if shared.eyes.open() {
        see_connect(session, shared, caller, peer, &opened);
    }
    match opened {
        Ok(socket) => Answer::with(Reply::Socket { local: None }, socket),
        Err(refusal) => Answer::plain(Err(refusal.failure())),
    }
}

/// Tells of a connection, and notes it so that its end can be told.
#[cold]
fn see_connect(
    session: &Session,
    shared: &mut Shared,
    caller: &Caller,
    peer: SocketAddr,
    opened: &Result<OwnedFd, Refusal>,
) {
    let names = session.names_for_people(peer.ip());
    let kind = match opened {
        Ok(socket) => {
            let local = kso_provider::local_address(socket).ok();
            let elsewhere = shared.external.as_ref().is_some_and(|one| one.is_stand_in(socket.as_fd()));
            // Of a stand-in its kernel tells the end.
            if !elsewhere && let Ok(cookie) = kso_sys::cookie(socket.as_fd()) {
                shared.track.add(cookie, Tracked::out(session.id, caller, peer, &names, local));
            }
            Kind::Connect(event::Connect { peer, names, local, error: None })
        }
        Err(Refusal::Kernel(errno)) => {
            Kind::Connect(event::Connect { peer, names, local: None, error: Some(*errno) })
        }
        Err(Refusal::Policy(reason)) => {
            denied(Some(peer.ip()), Some(peer.port()), Protocol::Tcp, names, reason)
        }
    };
    shared.eyes.see(session.id, &session.name, caller, kind);
}

pub(crate) fn denied(
    address: Option<IpAddr>,
    port: Option<u16>,
    protocol: Protocol,
    names: Vec<String>,
    reason: &Reason,
) -> Kind {
    Kind::Denied(event::Denied { address, port, protocol, names, error: DENIED, reason: reason.to_string() })
}

/// For a guest: what another kernel makes of it is not waited for.
pub(crate) fn listen(session: &mut Session, shared: &mut Shared, caller: &Caller, wanted: &Listen) -> Answer {
    match listen_for(session, shared, caller, wanted, None) {
        Submitted::Done(answer) => answer,
        Submitted::Pending => Answer::plain(Err(Failure::kernel(Errno::EAGAIN))),
    }
}

/// `request` is answered later if another kernel listens.
pub(crate) fn listen_for(
    session: &mut Session,
    shared: &mut Shared,
    caller: &Caller,
    wanted: &Listen,
    request: Option<RequestId>,
) -> Submitted {
    let place = match publish::fate(wanted, &session.publish, session.loopback) {
        Fate::Outside(place) if wanted.backlog.is_some() => place,
        _ => return Submitted::Done(listen_natively(session, shared, caller, wanted)),
    };
    if shared.refusal(session, place).is_none()
        && let Some(external) = &mut shared.external
        && let Some(made) = external.listen(session, caller, wanted, place, request)
    {
        return match made {
            Ok(None) => Submitted::Pending,
            Ok(Some((socket, outer))) => {
                Submitted::Done(Answer::with(Reply::Socket { local: Some(outer) }, socket))
            }
            Err(errno) => Submitted::Done(Answer::plain(Err(Failure::kernel(errno)))),
        };
    }
    Submitted::Done(listen_natively(session, shared, caller, wanted))
}

fn listen_natively(session: &mut Session, shared: &mut Shared, caller: &Caller, wanted: &Listen) -> Answer {
    let place = match publish::fate(wanted, &session.publish, session.loopback) {
        Fate::Outside(place) => place,
        _ if wanted.backlog.is_none() => return stay_inside(),
        fate => {
            match fate {
                Fate::Unfit => tracing::warn!(
                    listener = %wanted.local,
                    "published on an address of the other family: the listener stays inside"
                ),
                Fate::OnLoopback => tracing::warn!(
                    listener = %wanted.local,
                    "its port is published, but on loopback it stays inside: let the program listen on 0.0.0.0"
                ),
                Fate::Inside | Fate::Outside(_) => {}
            }
            let kind = Kind::Listen(event::Listen { local: wanted.local, published: None, error: None });
            shared.eyes.see(session.id, &session.name, caller, kind);
            return stay_inside();
        }
    };
    if let Some(reason) = shared.refusal(session, place) {
        tracing::warn!(address = %place.address, reason, "not published");
        return Answer::plain(Err(Failure::denied(DENIED)));
    }
    let Some(backlog) = wanted.backlog else { return reserve(session, place, &wanted.options) };
    let opened = open_listener(session, wanted, place, backlog);
    let (published, error) = match &opened {
        Ok((_, outer)) => (Some(*outer), None),
        Err(errno) => (None, Some(*errno)),
    };
    if let Some(errno) = error {
        tracing::warn!(inside = %wanted.local, outside = %place.address, %errno, "cannot publish");
    }
    let kind = Kind::Listen(event::Listen { local: wanted.local, published, error });
    shared.eyes.see(session.id, &session.name, caller, kind);
    match opened {
        Ok((socket, outer)) => Answer::with(Reply::Socket { local: Some(outer) }, socket),
        Err(errno) => Answer::plain(Err(Failure::kernel(errno))),
    }
}

fn reserve(session: &mut Session, place: Place, options: &SocketOptions) -> Answer {
    let reserved = || {
        if session.reserved.len() >= MAX_RESERVED {
            return Err(Errno::ENOBUFS);
        }
        let socket = stream::reserve(place, options)?;
        let outer = kso_provider::local_address(&socket)?;
        session.reserved.push((outer, socket));
        Ok(Reply::Socket { local: Some(outer) })
    };
    Answer::plain({ reserved }().map_err(Failure::kernel))
}

fn open_listener(
    session: &mut Session,
    wanted: &Listen,
    place: Place,
    backlog: i32,
) -> Result<(OwnedFd, SocketAddr), Errno> {
    let kept = session.reserved.iter().position(|(kept, _)| *kept == place.address);
    let socket = match kept {
        Some(at) => session.reserved.swap_remove(at).1,
        None => stream::reserve(place, &wanted.options)?,
    };
    let outer = kso_provider::local_address(&socket)?;
    if let Err(errno) = stream::listen(&socket, backlog, &wanted.options, session.holder) {
        if kept.is_some() {
            session.reserved.push((outer, socket));
        }
        return Err(errno);
    }
    // A listener that was never bound inside has the port that it got outside.
    let port = if wanted.local.port() == 0 { outer.port() } else { wanted.local.port() };
    let listener = Listener {
        inner: SocketAddr::new(wanted.local.ip(), port),
        v6_only: wanted.family == Family::V6 && publish::v6_only(wanted),
        outer,
        cookie: kso_sys::cookie(socket.as_fd()).map_err(|error| kso_sys::errno::of(&error))?,
    };
    if let Err(error) = session.listeners.add(&socket, listener) {
        tracing::warn!(%error, listener = %wanted.local, "the listener is not reached from inside");
    }
    Ok((socket, outer))
}

pub(crate) fn release(session: &mut Session, address: SocketAddr) -> Answer {
    if let Some(at) = session.reserved.iter().position(|(kept, _)| *kept == address) {
        session.reserved.swap_remove(at);
    }
    stay_inside()
}
