//! `getsockname` and `getpeername`.

use super::accept::write_address;
use super::answers::Purpose;
use super::ports::Port;
use super::{GuestRunner, Kind, Outcome};
use crate::descriptors::Target;
use kso_sys::notify::Notification;
use kso_sys::vsock::{self, Address, State};
use kso_wire::guest::{GuestRequest, StreamCall, StreamKey};
use kso_wire::{Errno, Family};
use rustix::fs::fstat;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;

impl GuestRunner {
    pub(super) fn getsockname(&mut self, notification: Notification) -> io::Result<Outcome> {
        let (target, kind) = self.target(notification)?;
        let Kind::Vsock(port) = kind else { return Ok(Outcome::CONTINUE) };
        let shape = Port::of(port);
        if shape.listener && vsock::state(target.socket.as_fd())? == State::Listening {
            let wildcard = SocketAddr::new(unspecified(shape.family), self.inner_port(port));
            let inner = self.listener(port).map_or(wildcard, |published| published.inner);
            return Ok(name(notification, inner));
        }
        let Some(peer) = self.other_end(&target, port) else {
            // Its connection failed.
            return Ok(name(notification, SocketAddr::new(unspecified(shape.family), 0)));
        };
        let accepted = shape.listener.then(|| self.inner_port(port));
        if peer.cid == vsock::CID_LOCAL {
            let other = Port::of(peer.port);
            let mut local = Self::inside_name(shape.family, other, shape);
            local.set_port(accepted.unwrap_or(shape.tcp));
            return Ok(name(notification, local));
        }
        if shape.listener
            && let Some(bound) = self.listener(port).map(|published| published.inner)
            && !bound.ip().to_canonical().is_unspecified()
        {
            return Ok(name(notification, bound));
        }
        if let Some(local) = self.recent.get(port).and_then(|begun| begun.local) {
            return Ok(name(notification, Self::present(shape.family, local)));
        }
        let request = GuestRequest::Stream(key(port, peer), StreamCall::LocalAddress);
        self.ask(target, Purpose::Name { family: shape.family, port: accepted }, request)
    }

    pub(super) fn getpeername(&mut self, notification: Notification) -> io::Result<Outcome> {
        let (target, kind) = self.target(notification)?;
        let Kind::Vsock(port) = kind else { return Ok(Outcome::CONTINUE) };
        let peer = match vsock::state(target.socket.as_fd())? {
            State::Connected(peer) => Some(peer),
            State::ShutDown => self.other_end(&target, port),
            State::Connecting | State::Closed | State::Listening => None,
        };
        let Some(peer) = peer else { return Ok(Outcome::error(Errno::ENOTCONN)) };
        if !Port::of(port).listener
            && let Some(begun) = self.recent.get(port)
        {
            return Ok(name(notification, begun.peer));
        }
        if let Some(address) = self.peer_of(port, peer) {
            return Ok(name(notification, address));
        }
        let request = GuestRequest::Stream(key(port, peer), StreamCall::PeerAddress);
        self.ask(target, Purpose::Name { family: Port::of(port).family, port: None }, request)
    }

    /// The other end of a stream, also while it connects and once it was shut down. `None`: its connection failed.
    pub(super) fn other_end(&mut self, target: &Target, port: u32) -> Option<Address> {
        let socket = target.socket.as_fd();
        match vsock::state(socket).ok()? {
            State::Connected(peer) => Some(peer),
            State::Connecting => self.recent.get(port).map(|begun| begun.address),
            State::ShutDown if Port::of(port).listener => {
                let inode = fstat(socket).ok()?.st_ino;
                vsock::peer_by_inode(inode).ok()
            }
            State::ShutDown => match self.recent.get(port) {
                Some(begun) => Some(begun.address),
                None => vsock::peer_by_inode(fstat(socket).ok()?.st_ino).ok(),
            },
            State::Closed | State::Listening => None,
        }
    }

    /// The name of the end `of` of a connection inside, as a socket of `family` sees it; `with` is the other end.
    pub(super) fn inside_name(family: Family, with: Port, of: Port) -> SocketAddr {
        let v6 = with.inside_v6 || of.inside_v6;
        let ip = if v6 { IpAddr::V6(Ipv6Addr::LOCALHOST) } else { IpAddr::V4(Ipv4Addr::LOCALHOST) };
        Self::present(family, SocketAddr::new(ip, of.tcp))
    }
}

/// A stream as the broker knows it.
pub(super) fn key(local_port: u32, peer: Address) -> StreamKey {
    StreamKey { local_port, peer_cid: peer.cid, peer_port: peer.port }
}

fn unspecified(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// Answers with a name.
pub(super) fn name(notification: Notification, address: SocketAddr) -> Outcome {
    let [_, target, length_at, ..] = notification.args;
    match write_address(notification.tid, target, length_at, address) {
        Ok(()) => Outcome::DONE,
        Err(error) => Outcome::error(kso_sys::errno::of(&error)),
    }
}
