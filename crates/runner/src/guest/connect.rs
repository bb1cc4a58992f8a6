//! `connect`.

use super::ports::Port;
use super::recent::Begun;
use super::stock::{self, Ready};
use super::{GuestRunner, Kind, Outcome, Route};
use crate::descriptors::Target;
use crate::interceptor::{CLOSED, NAME_SERVICE, Publishing, bound_address};
use kso_sys::notify::{Notification, Response};
use kso_sys::vsock::{self, Address, State};
use kso_sys::{RawAddress, errno};
use kso_wire::guest::{Prepare, ToHost};
use kso_wire::{Connect, Errno, Family, LoopbackMode, OptionName, Origin, SocketOptions};
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

/// What a vsock socket buffers: the window of its stream.
pub(super) const BUFFER: u64 = 4 << 20;
/// A connection inside is answered at once.
const INSIDE_PATIENCE: Duration = Duration::from_secs(1);

impl GuestRunner {
    pub(super) fn connect(&mut self, notification: Notification) -> io::Result<Outcome> {
        let Some(address) = Self::address_argument(notification)? else { return Ok(Outcome::CONTINUE) };
        let (target, kind) = self.target(notification)?;
        match (kind, address) {
            (Kind::Tcp(family, CLOSED), RawAddress::Inet(peer)) => self.connect_tcp(target, family, peer),
            (Kind::Tcp(..) | Kind::Other, _) => Ok(Outcome::CONTINUE),
            // Never CONTINUE on a vsock socket: its address would be a vsock address.
            (Kind::Vsock(port), RawAddress::Inet(peer)) => self.connect_vsock(target, port, peer),
            (Kind::Vsock(port), RawAddress::Unspecified) => {
                self.restore(&target, port)?;
                Ok(Outcome::DONE)
            }
            (Kind::Vsock(_), RawAddress::Other) => Ok(Outcome::error(Errno::EAFNOSUPPORT)),
        }
    }

    fn connect_tcp(&mut self, target: Target, family: Family, peer: SocketAddr) -> io::Result<Outcome> {
        let fits =
            matches!((family, peer), (Family::V4, SocketAddr::V4(_)) | (Family::V6, SocketAddr::V6(_)));
        let route = self.route(peer);
        if !fits || matches!(route, Route::Inside) {
            return Ok(Outcome::CONTINUE);
        }
        let options = self.tcp_options(&target, family)?;
        if options.get(OptionName::V6Only) == Some(1) && peer.ip().to_canonical().is_ipv4() {
            return Ok(Outcome::CONTINUE);
        }
        let bound = bound_address(target.socket.as_fd())?;
        self.begin(target, family, peer, bound, options, &route)
    }

    /// On a socket that was swapped before.
    fn connect_vsock(&mut self, target: Target, port: u32, peer: SocketAddr) -> io::Result<Outcome> {
        let family = Port::of(port).family;
        if matches!((family, peer), (Family::V4, SocketAddr::V6(_)) | (Family::V6, SocketAddr::V4(_))) {
            return Ok(Outcome::error(Errno::EAFNOSUPPORT));
        }
        // What the broker said before this call is to be known.
        self.receive_control();
        let socket = target.socket.as_fd();
        match vsock::state(socket)? {
            // Its error is being put back on it: see `connector`.
            State::Connecting if self.recent.get(port).is_some_and(|begun| begun.failed) => {}
            State::Connecting => {
                if !nonblocking(socket)? {
                    return self.wait_for_connection(target.notification, Arc::new(target.socket), port);
                }
                let interrupted =
                    self.recent.get_mut(port).is_some_and(|begun| std::mem::take(&mut begun.interrupted));
                return Ok(Outcome::error(if interrupted { Errno::EINPROGRESS } else { Errno::EALREADY }));
            }
            State::Connected(_) | State::ShutDown => {
                let unheard =
                    self.recent.get_mut(port).is_some_and(|begun| std::mem::take(&mut begun.unheard));
                return Ok(if unheard { Outcome::DONE } else { Outcome::error(Errno::EISCONN) });
            }
            State::Listening => return Ok(Outcome::error(Errno::EISCONN)),
            State::Closed => {}
        }
        if let Some(errno) = self.failures.take(port, None) {
            return Ok(Outcome::error(errno));
        }
        let route = self.route(peer);
        if matches!(route, Route::Inside) {
            // The program reads its address again, on a socket of the guest's own.
            self.restore(&target, port)?;
            return Ok(Outcome::CONTINUE);
        }
        let options = self.recent.get(port).map(|begun| begun.options.clone()).unwrap_or_default();
        self.begin(target, family, peer, None, options, &route)
    }

    /// Where a connection goes. What is the guest's own stays inside; behind a VMM that carries CID 2 only everything
    /// does: the TUN takes it out.
    fn route(&mut self, peer: SocketAddr) -> Route {
        match self.route_of(peer) {
            Route::Outside if self.config.hybrid => Route::Inside,
            route => route,
        }
    }

    fn route_of(&mut self, peer: SocketAddr) -> Route {
        let ip = peer.ip().to_canonical();
        if self.config.tun.is_gateway(ip) && peer.port() == NAME_SERVICE {
            // The gateway itself answers names, by the TUN.
            return Route::Inside;
        }
        if self.config.inside.iter().any(|network| network.contains(ip)) {
            return Route::Inside;
        }
        let loopback = ip.is_loopback() || ip.is_unspecified();
        if !loopback && !self.config.tun.is_guest(ip) {
            return Route::Outside;
        }
        if loopback && self.config.loopback == LoopbackMode::External {
            return Route::Outside;
        }
        if self.publishing == Publishing::Nothing {
            return Route::Inside;
        }
        self.published(ip, peer.port()).map_or(Route::Inside, Route::Published)
    }

    fn begin(
        &mut self,
        target: Target,
        family: Family,
        peer: SocketAddr,
        local: Option<SocketAddr>,
        options: SocketOptions,
        route: &Route,
    ) -> io::Result<Outcome> {
        let nonblocking = nonblocking(target.socket.as_fd())?;
        let inside = matches!(route, Route::Published(_));
        let inside_v6 = inside && peer.ip().to_canonical().is_ipv6();
        let Ready { socket, port, inode } = if inside {
            let (socket, port) = stock::bound(&mut self.ports, |ports| ports.connection(family, inside_v6))?;
            Ready { socket: Arc::new(socket), port, inode: 0 }
        } else {
            self.stock.take(family, &mut self.ports)?
        };
        // Those that vsock knows hold inside too.
        kso_sys::options::apply(socket.as_fd(), &options)?;
        let ip = peer.ip().to_canonical();
        let to = match *route {
            Route::Published(listener) => Address { cid: vsock::CID_LOCAL, port: listener },
            _ => Address { cid: self.peers.cid(ip), port: peer.port().into() },
        };
        let begun = Begun {
            peer,
            address: to,
            local: None,
            options: options.clone(),
            unheard: true,
            interrupted: false,
            failed: false,
        };
        if inside {
            vsock::set_connect_timeout(socket.as_fd(), INSIDE_PATIENCE)?;
            if vsock::connect(socket.as_fd(), to).is_err() {
                return Ok(Outcome::error(Errno::ECONNREFUSED));
            }
        } else {
            let connect = Connect { peer, family, local, options, origin: Origin::Intercepted };
            let caller = self.caller(target.notification)?;
            // What was read from memory came from this caller only if it waits still.
            if !self.notifier.is_valid(target.notification.id) {
                return Ok(Outcome::Later);
            }
            let prepare = Prepare { local_port: port, caller, connect };
            if let Err(errno) = self.control.send_now(&ToHost::Prepare(prepare)) {
                return Ok(Outcome::error(errno));
            }
            if let Err(error) = self.connector.begin(&socket, to, nonblocking) {
                return Ok(Outcome::error(errno::of(&error)));
            }
        }
        self.recent.insert(port, begun);
        if !inside {
            self.is_underway(port, inode);
        }
        if !self.descriptors.swap(&self.notifier, &target, socket.as_fd(), nonblocking)? {
            // Another thread closed it meanwhile.
            return Ok(Outcome::error(Errno::EBADF));
        }
        if !nonblocking {
            return self.wait_for_connection(target.notification, socket, port);
        }
        let response = Response::Error(errno::to_raw(Errno::EINPROGRESS));
        if self.notifier.respond(target.notification.id, response).is_err()
            && let Some(begun) = self.recent.get_mut(port)
        {
            // Interrupted after the swap: the call will be made again, and must not hear EALREADY.
            begun.interrupted = true;
        }
        Ok(Outcome::Later)
    }

    /// Gives the program a fresh TCP socket of the guest's own in place of one that was outsourced.
    pub(super) fn restore(&mut self, target: &Target, port: u32) -> io::Result<()> {
        let family = match Port::of(port).family {
            Family::V4 => AddressFamily::INET,
            Family::V6 => AddressFamily::INET6,
        };
        let fresh = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        if let Some(begun) = self.recent.get(port) {
            kso_sys::options::apply(fresh.as_fd(), &begun.options)?;
            self.tuned(&Target {
                notification: target.notification,
                number: target.number,
                socket: fresh.try_clone()?,
            })?;
        }
        let nonblocking = nonblocking(target.socket.as_fd())?;
        self.descriptors.swap(&self.notifier, target, fresh.as_fd(), nonblocking)?;
        Ok(())
    }

    /// The address of a peer in the family of the program's socket.
    pub(super) fn present(family: Family, address: SocketAddr) -> SocketAddr {
        match (family, address.ip().to_canonical()) {
            (Family::V6, IpAddr::V4(v4)) => SocketAddr::new(v4.to_ipv6_mapped().into(), address.port()),
            (_, ip) => SocketAddr::new(ip, address.port()),
        }
    }
}

pub(super) fn nonblocking(socket: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(fcntl_getfl(socket)?.contains(OFlags::NONBLOCK))
}
