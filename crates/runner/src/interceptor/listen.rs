//! `listen`, `bind` and `getsockname`.
//!
//! A **reservation** is a port that the broker keeps outside for a socket that is bound inside: so that the
//! port a program asks for, or learns from `getsockname`, is the port outside. It ends when the program
//! listens, connects, or closes the socket; the last is seen without holding the socket open, because an epoll
//! registration does not outlive its file.

use super::connect::CLOSED;
use super::{Call, Interceptor, MAX_LISTENERS, Outcome, Publishing, Purpose, Translation};
use kso_sys::notify::{Notification, Response};
use kso_sys::{MAX_ADDRESS, RawAddress, address_from_raw, local_address, remote};
use kso_wire::{
    Answer, BrokerLink, Caller, Errno, Family, Listen, LoopbackMode, Reply, Request, RequestId, Submitted,
};
use rustix::event::epoll;
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// `TCP_LISTEN` (include/net/tcp_states.h).
const LISTENING: u8 = 10;

/// Which bound sockets have a port outside.
pub(super) struct Reservations {
    /// Watches the sockets without holding them.
    watch: OwnedFd,
    /// By cookie: the address outside.
    held: HashMap<u64, SocketAddr>,
}

impl Reservations {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { watch: epoll::create(epoll::CreateFlags::CLOEXEC)?, held: HashMap::new() })
    }

    fn add(&mut self, socket: BorrowedFd<'_>, cookie: u64, outer: SocketAddr) -> io::Result<()> {
        epoll::add(&self.watch, socket, epoll::EventData::new_u64(cookie), epoll::EventFlags::empty())?;
        self.held.insert(cookie, outer);
        Ok(())
    }

    /// Takes out the reservations whose sockets are closed.
    fn take_closed(&mut self) -> Vec<SocketAddr> {
        let path = format!("/proc/self/fdinfo/{}", self.watch.as_raw_fd());
        let Ok(text) = std::fs::read_to_string(path) else { return Vec::new() };
        let alive: Vec<u64> = text
            .lines()
            .filter_map(|line| line.split_once("data:")?.1.split_whitespace().next())
            .filter_map(|data| u64::from_str_radix(data, 16).ok())
            .collect();
        let closed = self.held.iter().filter(|(cookie, _)| !alive.contains(cookie));
        let closed: Vec<(u64, SocketAddr)> = closed.map(|(&cookie, &outer)| (cookie, outer)).collect();
        closed
            .into_iter()
            .map(|(cookie, outer)| {
                self.held.remove(&cookie);
                outer
            })
            .collect()
    }
}

impl Interceptor {
    pub(super) fn bind(
        &mut self,
        notification: Notification,
        link: &mut dyn BrokerLink,
    ) -> io::Result<Outcome> {
        let Some(call) = self.tcp_socket(notification)? else { return Ok(Outcome::CONTINUE) };
        if self.is_swapped(call.socket.as_fd())? {
            // It is bound already, by having been connected or published.
            return Ok(Outcome::error(Errno::EINVAL));
        }
        let [_, address, length, ..] = notification.args;
        let length = usize::try_from(length as i32).unwrap_or(usize::MAX).min(MAX_ADDRESS);
        let mut bytes = [0; MAX_ADDRESS];
        let bytes = bytes.get_mut(..length).unwrap_or_default();
        if remote::read_memory(notification.tid, address, bytes)? != length {
            return Ok(Outcome::CONTINUE);
        }
        let RawAddress::Inet(wanted) = address_from_raw(bytes) else { return Ok(Outcome::CONTINUE) };
        let fits = matches!(
            (call.family, wanted),
            (Family::V4, SocketAddr::V4(_)) | (Family::V6, SocketAddr::V6(_))
        );
        if !fits || !self.reserves(wanted) || call.bound().is_some() {
            return Ok(Outcome::CONTINUE);
        }
        self.release_closed(link);
        let options = kso_sys::options::read(call.socket.as_fd(), self.defaults(call.family), true);
        let request = Request::Listen(Listen { local: wanted, family: call.family, backlog: None, options });
        self.ask(call, Purpose::Reserve { wanted }, request, link)
    }

    /// Whether binding this address takes a port outside too.
    fn reserves(&self, wanted: SocketAddr) -> bool {
        let ip = wanted.ip().to_canonical();
        match self.config.loopback {
            LoopbackMode::External => ip.is_loopback() || ip.is_unspecified(),
            LoopbackMode::Private => {
                self.config.publishing == Publishing::Everything && wanted.port() == 0 && !ip.is_loopback()
            }
        }
    }

    pub(super) fn release_closed(&mut self, link: &mut dyn BrokerLink) {
        for outer in self.reservations.take_closed() {
            self.next_request += 1;
            let id = RequestId::interceptor(self.next_request);
            if let Submitted::Pending = link.submit(id, &Caller::default(), Request::Release(outer)) {
                tracing::trace!(%outer, "a reservation is given back");
            }
        }
    }

    pub(super) fn reserved(
        &mut self,
        call: &Call,
        wanted: SocketAddr,
        answer: Answer,
    ) -> io::Result<Outcome> {
        let outer = match answer.result {
            Ok(Reply::Socket { local: Some(outer) }) => outer,
            Ok(_) => return Ok(Outcome::CONTINUE),
            Err(failure) => return Ok(Outcome::error(failure.errno)),
        };
        // The kernel would read the address again: we bind it ourselves, with the port from outside.
        let address = SocketAddr::new(wanted.ip(), outer.port());
        if let Err(error) = kso_sys::bind(call.socket.as_fd(), address) {
            return Ok(Outcome::error(kso_sys::errno::of(&error)));
        }
        let cookie = kso_sys::cookie(call.socket.as_fd())?;
        self.reservations.add(call.socket.as_fd(), cookie, outer)?;
        Ok(Outcome::Respond(Response::Value(0)))
    }

    pub(super) fn listen(
        &mut self,
        notification: Notification,
        link: &mut dyn BrokerLink,
    ) -> io::Result<Outcome> {
        if self.config.publishing == Publishing::Nothing && self.config.loopback == LoopbackMode::Private {
            return Ok(Outcome::CONTINUE);
        }
        let Some(call) = self.tcp_socket(notification)? else { return Ok(Outcome::CONTINUE) };
        let socket = call.socket.as_fd();
        if call.state != CLOSED || self.is_swapped(socket)? {
            return Ok(Outcome::CONTINUE);
        }
        let inner = match (call.bound(), call.family) {
            (Some(address), _) => address,
            (None, Family::V4) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
            (None, Family::V6) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
        };
        let options = self.options(&call, false)?;
        let backlog = Some(notification.args[1] as i32);
        let request = Request::Listen(Listen { local: inner, family: call.family, backlog, options });
        self.ask(call, Purpose::Listen { inner }, request, link)
    }

    pub(super) fn listening(
        &mut self,
        call: &Call,
        inner: SocketAddr,
        answer: Answer,
    ) -> io::Result<Outcome> {
        match answer.result {
            Ok(Reply::Socket { .. }) => {}
            Ok(_) => return Ok(Outcome::CONTINUE),
            Err(failure) => return Ok(Outcome::error(failure.errno)),
        }
        let Some(outer) = answer.descriptor else { return Ok(Outcome::error(Errno::EPROTO)) };
        if let RawAddress::Inet(address) = local_address(outer.as_fd())? {
            // A listener that was never bound has no port inside: what it got outside is its port.
            let port = if inner.port() == 0 { address.port() } else { inner.port() };
            let inner = SocketAddr::new(inner.ip(), port);
            let cookie = kso_sys::cookie(outer.as_fd())?;
            self.translations.retain(|known| known.outer != address);
            if self.translations.len() >= MAX_LISTENERS {
                self.translations.pop_front();
            }
            self.translations.push_back(Translation { cookie, inner, outer: address });
        }
        if self.swap(call, outer.as_fd())?.is_none() {
            // Another thread closed it meanwhile.
            return Ok(Outcome::error(Errno::EBADF));
        }
        Ok(Outcome::Respond(Response::Value(0)))
    }

    /// A published listener, and what it accepts, has the address inside that the program gave it.
    pub(super) fn getsockname(&mut self, notification: Notification) -> io::Result<Outcome> {
        let Some(call) = self.tcp_socket(notification)? else { return Ok(Outcome::CONTINUE) };
        let socket = call.socket.as_fd();
        if !self.is_swapped(socket)? {
            return Ok(Outcome::CONTINUE);
        }
        let outer = call.local;
        let inner = if call.state == LISTENING {
            let cookie = kso_sys::cookie(socket)?;
            self.translations.iter().find(|known| known.cookie == cookie).map(|known| known.inner)
        } else {
            self.translations
                .iter()
                .find(|known| serves(known.outer, outer))
                .map(|known| SocketAddr::new(outer.ip(), known.inner.port()))
        };
        match inner {
            Some(inner) if inner != outer => write_address(notification, inner),
            _ => Ok(Outcome::CONTINUE),
        }
    }
}

/// Whether a connection with the local address `local` came by a listener on `listener`.
fn serves(listener: SocketAddr, local: SocketAddr) -> bool {
    let any = |ip: IpAddr| ip.to_canonical().is_unspecified();
    listener.port() == local.port()
        && (any(listener.ip()) || listener.ip().to_canonical() == local.ip().to_canonical())
}

/// Answers a `getsockname` with `address`: as much as fits, and the length it has (getsockname(2)).
fn write_address(notification: Notification, address: SocketAddr) -> io::Result<Outcome> {
    let [_, target, length_at, ..] = notification.args;
    let mut room = [0; 4];
    if remote::read_memory(notification.tid, length_at, &mut room)? != room.len() {
        return Ok(Outcome::error(Errno::EFAULT));
    }
    let Ok(room) = usize::try_from(i32::from_ne_bytes(room)) else {
        return Ok(Outcome::error(Errno::EINVAL));
    };
    let bytes = kso_sys::address_bytes(address);
    let part = bytes.get(..room).unwrap_or(&bytes);
    let length = (bytes.len() as u32).to_ne_bytes();
    let written = remote::write_memory(notification.tid, target, part)
        .and_then(|()| remote::write_memory(notification.tid, length_at, &length));
    Ok(match written {
        Ok(()) => Outcome::Respond(Response::Value(0)),
        Err(error) => Outcome::error(kso_sys::errno::of(&error)),
    })
}
