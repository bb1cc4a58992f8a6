//! `OpenDatagram`, `BindDatagram` and `OpenEcho`: what a session asks for its datagrams.

use crate::broker::Shared;
use crate::publish;
use crate::route::{Route, route};
use crate::session::Session;
use crate::streams::{Refusal, denied};
use kso_core::event::{self, Kind};
use kso_provider::{datagram, echo, family_of};
use kso_wire::{
    Answer, BindDatagram, Caller, Errno, Failure, Family, OpenDatagram, OpenEcho, Protocol, Reply,
};
use std::net::SocketAddr;

pub(crate) fn open_datagram(
    session: &mut Session,
    shared: &mut Shared,
    caller: &Caller,
    wanted: &OpenDatagram,
) -> Answer {
    let own = |ip| shared.addresses.contains(ip);
    // Loopback never comes by the TUN: --loopback external is for streams alone.
    let opened = match route(wanted.peer, &session.tun, false, own) {
        Route::Inside => Err(Refusal::Kernel(Errno::ENETUNREACH)),
        Route::Outside { peer, host } => {
            let ip = wanted.peer.ip();
            session
                .decide(&shared.policy, ip, wanted.peer.port(), Protocol::Udp, host)
                .map_err(Refusal::Policy)
                .and_then(|()| Ok(datagram::open(&mut session.ports, wanted.guest, peer)?))
        }
    };
    session.counts.flows += 1;
    let result = opened.as_ref().map(|_| ()).map_err(Refusal::failure);
    session.counts.denied += u64::from(matches!(&result, Err(failure) if failure.denied));
    shared.totals.flow(&result);
    if shared.eyes.open() {
        let names = session.names_for_people(wanted.peer.ip());
        let kind = match &opened {
            Err(Refusal::Policy(reason)) => {
                denied(Some(wanted.peer.ip()), Some(wanted.peer.port()), Protocol::Udp, names, reason)
            }
            other => Kind::Datagram(event::Datagram {
                local: wanted.guest,
                peer: wanted.peer,
                names,
                error: match other {
                    Err(Refusal::Kernel(errno)) => Some(*errno),
                    _ => None,
                },
                ended: None,
            }),
        };
        shared.eyes.see(session.id, &session.name, caller, kind);
    }
    match opened {
        Ok(socket) => {
            let local = kso_provider::local_address(&socket).ok();
            Answer::with(Reply::Socket { local }, socket)
        }
        Err(refusal) => Answer::plain(Err(refusal.failure())),
    }
}

pub(crate) fn bind_datagram(session: &Session, wanted: &BindDatagram) -> Answer {
    let publication = usize::try_from(wanted.publication).ok().and_then(|at| session.publish.get(at));
    let Some(publication) = publication.filter(|one| one.protocol == Protocol::Udp) else {
        return Answer::plain(Err(Failure::kernel(Errno::EINVAL)));
    };
    let of_family = |address: &SocketAddr| family_of(*address) == wanted.family;
    let Some(address) = publish::claims(publication).into_iter().find(of_family) else {
        return Answer::plain(Err(Failure::kernel(Errno::EADDRNOTAVAIL)));
    };
    match datagram::bind(address) {
        Ok(socket) => {
            let local = kso_provider::local_address(&socket).ok();
            Answer::with(Reply::Socket { local }, socket)
        }
        Err(errno) => {
            // A host without IPv6 publishes on IPv4 alone.
            if wanted.family == Family::V4 || errno != Errno::EADDRNOTAVAIL {
                tracing::warn!(%address, %errno, "cannot publish this datagram port");
            }
            Answer::plain(Err(Failure::kernel(errno)))
        }
    }
}

pub(crate) fn open_echo(
    session: &mut Session,
    shared: &mut Shared,
    caller: &Caller,
    wanted: &OpenEcho,
) -> Answer {
    let own = |ip| shared.addresses.contains(ip);
    let opened = match route(SocketAddr::new(wanted.peer, 0), &session.tun, false, own) {
        Route::Inside => Err(Refusal::Kernel(Errno::ENETUNREACH)),
        Route::Outside { peer, host } => session
            .decide(&shared.policy, wanted.peer, 0, Protocol::Icmp, host)
            .map_err(Refusal::Policy)
            .and_then(|()| Ok(echo::open(peer.ip())?)),
    };
    session.counts.echoes += 1;
    session.counts.denied += u64::from(matches!(&opened, Err(Refusal::Policy(_))));
    shared.totals.echo(opened.is_ok());
    if shared.eyes.open() {
        let names = session.names_for_people(wanted.peer);
        let kind = match &opened {
            Err(Refusal::Policy(reason)) => denied(Some(wanted.peer), None, Protocol::Icmp, names, reason),
            Err(Refusal::Kernel(errno)) => {
                Kind::Echo(event::Echo { peer: wanted.peer, names, error: Some(*errno) })
            }
            Ok(_) => Kind::Echo(event::Echo { peer: wanted.peer, names, error: None }),
        };
        shared.eyes.see(session.id, &session.name, caller, kind);
    }
    match opened {
        Ok((socket, raw)) => Answer::with(Reply::Echo { raw }, socket),
        Err(refusal) => Answer::plain(Err(refusal.failure())),
    }
}
