//! `listen` and `bind`.
//!
//! A published listener is a vsock listener, on a port that says which TCP port the program knows. The host's listener
//! stays with the broker, which is told when ours is closed: seen, without holding it open, by [`super::watch`]. A
//! reservation is as in a sandbox: the port that a program learns before `listen` is the port outside.

use super::answers::Purpose;
use super::connect::nonblocking;
use super::ports::Port;
use super::stock;
use super::{GuestRunner, Kind, Outcome};
use crate::descriptors::Target;
use crate::interceptor::{CLOSED, Publishing, bound_address};
use kso_sys::RawAddress;
use kso_sys::notify::Notification;
use kso_sys::vsock::{self, State};
use kso_wire::guest::GuestRequest;
use kso_wire::{Errno, Failure, Family, Listen, LoopbackMode, OptionName, Protocol, SocketOptions};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// So many listeners and reservations are kept.
const MAX_LISTENERS: usize = 4096;
/// A closed listener is noticed within this time.
const SWEEP_EVERY: Duration = Duration::from_millis(250);
/// Connections wait in a queue at least this long: the queue outside has the length that the program asked for.
const MIN_BACKLOG: i32 = 128;

/// A published listener.
#[derive(Debug)]
pub(super) struct Published {
    /// Where it accepts in the guest.
    pub(super) port: u32,
    /// What the program calls it.
    pub(super) inner: SocketAddr,
    /// It takes no IPv4.
    v6_only: bool,
    /// Options it was made with and was given since.
    pub(super) options: SocketOptions,
}

/// A `listen` that the broker is asked about.
#[derive(Debug)]
pub(super) struct Listening {
    socket: OwnedFd,
    published: Published,
}

impl GuestRunner {
    pub(super) fn listen(&mut self, notification: Notification) -> io::Result<Outcome> {
        let (target, kind) = self.target(notification)?;
        let family = match kind {
            Kind::Tcp(family, CLOSED) => family,
            Kind::Vsock(port) => return self.listen_again(&target, port),
            _ => return Ok(Outcome::CONTINUE),
        };
        let inner = match (bound_address(target.socket.as_fd())?, family) {
            (Some(address), _) => address,
            (None, Family::V4) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
            (None, Family::V6) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
        };
        if !self.may_be_published(inner) {
            return Ok(Outcome::CONTINUE);
        }
        // One that was closed must not be in the way of its successor.
        self.sweep();
        if self.listeners.len() >= MAX_LISTENERS {
            return Ok(Outcome::error(Errno::ENOBUFS));
        }
        let options = self.tcp_options(&target, family)?;
        let backlog = notification.args[1] as i32;
        let (socket, port) = stock::bound(&mut self.ports, |ports| ports.listener(family, inner.port()))?;
        kso_sys::options::apply(socket.as_fd(), &options)?;
        rustix::net::listen(&socket, backlog.max(MIN_BACKLOG))?;
        let v6_only = options.get(OptionName::V6Only) == Some(1);
        let listen = Listen { local: inner, family, backlog: Some(backlog), options: options.clone() };
        let published = Published { port, inner, v6_only, options };
        let purpose = Purpose::Listen(Box::new(Listening { socket, published }));
        self.ask(target, purpose, GuestRequest::Listen { listen, vsock_port: port })
    }

    /// Another backlog.
    fn listen_again(&mut self, target: &Target, port: u32) -> io::Result<Outcome> {
        if vsock::state(target.socket.as_fd())? != State::Listening {
            return Ok(Outcome::error(Errno::EINVAL));
        }
        let backlog = target.notification.args[1] as i32;
        if let Some(published) = self.listener(port) {
            let family = Port::of(port).family;
            let options = published.options.clone();
            let listen = Listen { local: published.inner, family, backlog: Some(backlog), options };
            let _ = self.tell(GuestRequest::Listen { listen, vsock_port: port });
        }
        rustix::net::listen(&target.socket, backlog.max(MIN_BACKLOG))?;
        Ok(Outcome::DONE)
    }

    /// Whether the broker need be asked about a listener.
    fn may_be_published(&self, inner: SocketAddr) -> bool {
        if self.config.loopback == LoopbackMode::External {
            return true;
        }
        !inner.ip().to_canonical().is_loopback()
            && self.config.publish.iter().any(|publication| {
                publication.protocol == Protocol::Tcp
                    && (publication.inner_port == 0 || publication.inner_port == inner.port())
            })
    }

    pub(super) fn listening(
        &mut self,
        target: &Target,
        listening: Listening,
        outer: Result<Option<SocketAddr>, Failure>,
    ) -> io::Result<Outcome> {
        let outer = match outer {
            Ok(Some(outer)) => outer,
            Ok(None) => return Ok(Outcome::CONTINUE),
            Err(failure) => return Ok(Outcome::error(failure.errno)),
        };
        let Listening { socket, mut published } = listening;
        if published.inner.port() == 0 {
            // A listener that was never bound has no port inside: what it got outside is its port.
            published.inner.set_port(outer.port());
        }
        let port = published.port;
        let swapped = nonblocking(target.socket.as_fd()).and_then(|nonblocking| {
            self.descriptors.swap(&self.notifier, target, socket.as_fd(), nonblocking)
        });
        if !swapped.as_ref().is_ok_and(|&swapped| swapped) {
            // Another thread closed it meanwhile, or its caller is gone.
            let _ = self.tell(GuestRequest::Unlisten(port));
            return swapped.map(|_| Outcome::error(Errno::EBADF));
        }
        let cookie = kso_sys::cookie(socket.as_fd())?;
        self.listeners.add(socket.as_fd(), cookie, published)?;
        self.sweep_at.get_or_insert_with(|| Instant::now() + SWEEP_EVERY);
        Ok(Outcome::DONE)
    }

    /// The published listener that a connection inside would reach: its vsock port.
    pub(super) fn published(&self, ip: IpAddr, port: u16) -> Option<u32> {
        let reaches = |published: &&Published| {
            let bound = published.inner.ip().to_canonical();
            let any = bound.is_unspecified()
                && match (bound, ip) {
                    (IpAddr::V4(_), IpAddr::V4(_)) | (IpAddr::V6(_), IpAddr::V6(_)) => true,
                    (IpAddr::V6(_), IpAddr::V4(_)) => !published.v6_only,
                    (IpAddr::V4(_), IpAddr::V6(_)) => ip.is_unspecified(),
                };
            published.inner.port() == port && (any || bound == ip)
        };
        self.listeners.values().find(reaches).map(|published| published.port)
    }

    /// A published listener by its vsock port.
    pub(super) fn listener(&self, port: u32) -> Option<&Published> {
        self.listeners.values().find(|published| published.port == port)
    }

    /// The TCP port of a listener, and of what it accepted.
    pub(super) fn inner_port(&self, port: u32) -> u16 {
        match Port::of(port).tcp {
            0 => self.listener(port).map_or(0, |published| published.inner.port()),
            tcp => tcp,
        }
    }

    /// Tells the broker which listeners and reservations were closed.
    pub(super) fn sweep(&mut self) {
        for published in self.listeners.take_closed() {
            let _ = self.tell(GuestRequest::Unlisten(published.port));
        }
        for outer in self.reservations.take_closed() {
            let _ = self.tell(GuestRequest::Release(outer));
        }
        let any = self.listeners.len() + self.reservations.len() > 0;
        self.sweep_at = any.then(|| Instant::now() + SWEEP_EVERY);
    }

    pub(super) fn bind(&mut self, notification: Notification) -> io::Result<Outcome> {
        let (target, kind) = self.target(notification)?;
        let family = match kind {
            // It is bound already, by having been connected or published.
            Kind::Vsock(_) => return Ok(Outcome::error(Errno::EINVAL)),
            Kind::Tcp(family, CLOSED) => family,
            _ => return Ok(Outcome::CONTINUE),
        };
        let Some(RawAddress::Inet(wanted)) = Self::address_argument(notification)? else {
            return Ok(Outcome::CONTINUE);
        };
        let fits =
            matches!((family, wanted), (Family::V4, SocketAddr::V4(_)) | (Family::V6, SocketAddr::V6(_)));
        if !fits || !self.reserves(wanted) || bound_address(target.socket.as_fd())?.is_some() {
            return Ok(Outcome::CONTINUE);
        }
        self.sweep();
        if self.reservations.len() >= MAX_LISTENERS {
            return Ok(Outcome::error(Errno::ENOBUFS));
        }
        let [v4, v6] = &self.config.defaults;
        let defaults = if family == Family::V4 { v4 } else { v6 };
        let options = kso_sys::options::read(target.socket.as_fd(), defaults, true);
        let listen = Listen { local: wanted, family, backlog: None, options };
        self.ask(target, Purpose::Reserve { wanted }, GuestRequest::Listen { listen, vsock_port: 0 })
    }

    /// Whether binding this address takes a port outside too.
    fn reserves(&self, wanted: SocketAddr) -> bool {
        let ip = wanted.ip().to_canonical();
        match self.config.loopback {
            LoopbackMode::External => ip.is_loopback() || ip.is_unspecified(),
            LoopbackMode::Private => {
                self.publishing == Publishing::Everything && wanted.port() == 0 && !ip.is_loopback()
            }
        }
    }

    pub(super) fn reserved(
        &mut self,
        target: &Target,
        wanted: SocketAddr,
        outer: Result<Option<SocketAddr>, Failure>,
    ) -> io::Result<Outcome> {
        let outer = match outer {
            Ok(Some(outer)) => outer,
            Ok(None) => return Ok(Outcome::CONTINUE),
            Err(failure) => return Ok(Outcome::error(failure.errno)),
        };
        // The kernel would read the address again: we bind it ourselves, with the port from outside.
        let address = SocketAddr::new(wanted.ip(), outer.port());
        if let Err(error) = kso_sys::bind(target.socket.as_fd(), address) {
            let _ = self.tell(GuestRequest::Release(outer));
            return Ok(Outcome::error(kso_sys::errno::of(&error)));
        }
        let cookie = kso_sys::cookie(target.socket.as_fd())?;
        self.reservations.add(target.socket.as_fd(), cookie, outer)?;
        self.sweep_at.get_or_insert_with(|| Instant::now() + SWEEP_EVERY);
        Ok(Outcome::DONE)
    }
}
