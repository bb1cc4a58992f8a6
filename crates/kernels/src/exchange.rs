//! Stand-ins: TCP sockets of this kernel that stand for sockets of another.
//!
//! A program that is served by another kernel holds a real TCP socket of a network namespace in which *every address is
//! local* (`kso_provider::everywhere`). The far end of that socket is ours and is joined with the stream to the provider. Since
//! every address is local, the far end is bound to the true peer's address, and the program's to the address that
//! its connection has on the other kernel: `getsockname`, `getpeername`, `accept`, every option, `epoll`, SO_ERROR
//! and `TCP_INFO` are the kernel's own answers, and the runner does not know the difference.
//!
//! ```text
//!   program's socket                     far end                      provider
//!     connect: SYN, dropped (deaf) ...                                 connecting
//!                        <-- hears again, SYN ---- bind(peer), connect <-- Connected    simultaneous open
//!                        <-- hears again, ICMP error ------------------ <-- Failed      carries the errno
//!     listen, accept     <-- SYN ----------------- bind(peer), connect <-- Accepted
//! ```
//!
//! The namespace has no interface but `lo`: whatever a program does with its socket, it reaches its own listeners and
//! nobody else. Each session has one of its own.

use crate::icmp;
use kso_provider::family_of;
use kso_sys::{options, standin};
use kso_wire::{Errno, Family, SocketOptions};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, ipproto, sockopt};
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Sockets made at a time: a namespace is entered for it.
const BATCH: usize = 32;
/// A program that closed its socket is found out so late, if its peer says nothing.
const KEEP_ALIVE: Duration = Duration::from_secs(30);
/// Scope of link-local addresses: `lo`, the only device.
const LOOPBACK_SCOPE: u32 = 1;

/// What the namespace is set to; where the kernel lacks one, it goes without.
const SETTINGS: &[(&str, &str)] = &[
    // Nothing is lost or late on loopback: TIME_WAIT would only use up ports.
    ("net/ipv4/tcp_max_tw_buckets", "0"),
    ("net/ipv4/tcp_tw_reuse", "1"),
    // Echo requests are never for us.
    ("net/ipv4/icmp_echo_ignore_all", "1"),
];

#[derive(Debug, Default)]
struct Pool {
    v4: Vec<OwnedFd>,
    v6: Vec<OwnedFd>,
}

/// See the module.
#[derive(Debug)]
pub struct Exchange {
    namespace: OwnedFd,
    pool: Mutex<Pool>,
    icmp_v4: OwnedFd,
    icmp_v6: Option<OwnedFd>,
}

/// A stand-in whose connection is under way.
#[derive(Debug)]
pub struct Pending {
    /// The program's socket, to see it through. Dropped as soon as its fate is known.
    pub socket: OwnedFd,
    /// Its address.
    pub local: SocketAddr,
    /// The peer, as the program's socket names it.
    pub peer: SocketAddr,
}

impl Exchange {
    /// Makes the namespace.
    ///
    /// # Errors
    /// `EPERM`: it takes root.
    pub fn new() -> io::Result<Self> {
        let (namespace, (icmp_v4, icmp_v6)) = standin::new_network(|| {
            kso_provider::everywhere::make()?;
            for (name, value) in SETTINGS {
                if let Err(error) = fs::write(format!("/proc/sys/{name}"), value) {
                    tracing::debug!(name, %error, "not set for stand-ins");
                }
            }
            let raw = |family, protocol| {
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                rustix::net::socket_with(family, SocketType::RAW, flags, Some(protocol))
            };
            let v4 = raw(AddressFamily::INET, ipproto::ICMP)?;
            Ok((v4, raw(AddressFamily::INET6, ipproto::ICMPV6).ok()))
        })?;
        Ok(Self { namespace, pool: Mutex::default(), icmp_v4, icmp_v6 })
    }

    fn fresh(&self, family: Family) -> Result<OwnedFd, Errno> {
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        let sockets = match family {
            Family::V4 => &mut pool.v4,
            Family::V6 => &mut pool.v6,
        };
        if sockets.is_empty() {
            *sockets = self.batch(family).map_err(|error| kso_sys::errno::of(&error))?;
        }
        sockets.pop().ok_or(Errno::ENOBUFS)
    }

    /// On a thread of its own: this one stays where it is, whatever fails.
    fn batch(&self, family: Family) -> io::Result<Vec<OwnedFd>> {
        let domain = match family {
            Family::V4 => AddressFamily::INET,
            Family::V6 => AddressFamily::INET6,
        };
        let make = || {
            standin::enter_network(self.namespace.as_fd())?;
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            (0..BATCH)
                .map(|_| Ok(rustix::net::socket_with(domain, SocketType::STREAM, flags, None)?))
                .collect::<io::Result<Vec<_>>>()
        };
        std::thread::scope(|scope| {
            scope.spawn(make).join().map_err(|_| io::Error::other("a thread panicked"))?
        })
    }

    fn prepared(&self, family: Family, wanted: &SocketOptions) -> Result<OwnedFd, Errno> {
        let socket = self.fresh(family)?;
        standin::free_bind(socket.as_fd(), family).map_err(|error| kso_sys::errno::of(&error))?;
        options::apply(socket.as_fd(), wanted).map_err(|error| kso_sys::errno::of(&error))?;
        Ok(socket)
    }

    /// The socket for a program that connects to `peer`, as from `local`. It is under way until [`Self::establish`] or
    /// [`Self::fail`].
    ///
    /// # Errors
    /// What `bind` or `connect` said.
    pub fn connect(
        &self,
        family: Family,
        local: SocketAddr,
        peer: SocketAddr,
        wanted: &SocketOptions,
    ) -> Result<(OwnedFd, Pending), Errno> {
        let socket = self.prepared(family, wanted)?;
        standin::deafen(socket.as_fd()).map_err(|error| kso_sys::errno::of(&error))?;
        let local = in_family(local, family).ok_or(Errno::EAFNOSUPPORT)?;
        rustix::net::bind(&socket, &local).map_err(errno)?;
        match rustix::net::connect(&socket, &scoped(peer)) {
            Ok(()) | Err(rustix::io::Errno::INPROGRESS) => {}
            Err(error) => return Err(errno(error)),
        }
        let local = kso_provider::local_address(&socket)?;
        let copy = socket.try_clone().map_err(|error| kso_sys::errno::of(&error))?;
        Ok((socket, Pending { socket: copy, local, peer }))
    }

    /// The true connection is up: so is the stand-in's. Its far end comes back.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn establish(&self, pending: &Pending) -> Result<OwnedFd, Errno> {
        let far = self.far_end(family_of(pending.local), pending.peer)?;
        standin::hear(pending.socket.as_fd()).map_err(|error| kso_sys::errno::of(&error))?;
        match rustix::net::connect(&far, &scoped(pending.local)) {
            // All of the handshake is done within the call: loopback.
            Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(far),
            Err(error) => Err(errno(error)),
        }
    }

    /// The true connection failed: so does the stand-in's.
    pub fn fail(&self, pending: &Pending, errno: Errno) {
        // Both began to wait at the same time, with the same patience.
        if errno == Errno::ETIMEDOUT {
            return;
        }
        let told = standin::syn_number(pending.socket.as_fd()).and_then(|number| {
            standin::hear(pending.socket.as_fd())?;
            let error = icmp::unreachable(pending.local, pending.peer, number, errno);
            let target = scoped(SocketAddr::new(pending.local.ip().to_canonical(), 0));
            let socket = match (target.is_ipv4(), &self.icmp_v6) {
                (true, _) => &self.icmp_v4,
                (false, Some(socket)) => socket,
                (false, None) => return Err(io::ErrorKind::Unsupported.into()),
            };
            rustix::net::sendto(socket, &error, SendFlags::NOSIGNAL, &target)?;
            Ok(())
        });
        if let Err(error) = told {
            // It hears again: the answer to its next SYN is a refusal.
            let _ = standin::hear(pending.socket.as_fd());
            tracing::debug!(%error, "a failed connection ends late");
        }
    }

    /// The socket for a program that listens on `inner`.
    ///
    /// # Errors
    /// What `bind` or `listen` said.
    pub fn listen(
        &self,
        family: Family,
        inner: SocketAddr,
        backlog: i32,
        wanted: &SocketOptions,
    ) -> Result<OwnedFd, Errno> {
        let socket = self.prepared(family, wanted)?;
        sockopt::set_socket_reuseaddr(&socket, true).map_err(errno)?;
        rustix::net::bind(&socket, &scoped(inner)).map_err(errno)?;
        rustix::net::listen(&socket, backlog).map_err(errno)?;
        Ok(socket)
    }

    /// The socket for a program that connects to a listener of its own session.
    ///
    /// # Errors
    /// What `connect` said.
    pub fn connect_inside(
        &self,
        family: Family,
        target: SocketAddr,
        wanted: &SocketOptions,
    ) -> Result<OwnedFd, Errno> {
        let socket = self.prepared(family, wanted)?;
        let target = in_family(target, family).ok_or(Errno::EAFNOSUPPORT)?;
        match rustix::net::connect(&socket, &scoped(target)) {
            Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(socket),
            Err(error) => Err(errno(error)),
        }
    }

    /// The far end of a connection from `peer` to a program's listener on `inner`, which took it at `local` elsewhere. It is
    /// under way: a full queue makes it wait.
    ///
    /// # Errors
    /// What `bind` or `connect` said.
    pub fn dial(&self, inner: SocketAddr, local: SocketAddr, peer: SocketAddr) -> Result<OwnedFd, Errno> {
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        let bound = inner.ip().to_canonical();
        let address = if bound.is_unspecified() { local.ip().to_canonical() } else { bound };
        let address = match (address, peer.ip()) {
            (address, other) if address.is_ipv4() == other.is_ipv4() => address,
            (_, IpAddr::V4(_)) => Ipv4Addr::LOCALHOST.into(),
            (_, IpAddr::V6(_)) => Ipv6Addr::LOCALHOST.into(),
        };
        let far = self.far_end(family_of(peer), peer)?;
        match rustix::net::connect(&far, &scoped(SocketAddr::new(address, inner.port()))) {
            Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(far),
            Err(error) => Err(errno(error)),
        }
    }

    fn far_end(&self, family: Family, address: SocketAddr) -> Result<OwnedFd, Errno> {
        let socket = self.prepared(family, &SocketOptions::default())?;
        sockopt::set_socket_reuseaddr(&socket, true).map_err(errno)?;
        sockopt::set_tcp_nodelay(&socket, true).map_err(errno)?;
        // A program that closed its socket is forgotten by its kernel after a while, without a word to us.
        sockopt::set_socket_keepalive(&socket, true).map_err(errno)?;
        sockopt::set_tcp_keepidle(&socket, KEEP_ALIVE).map_err(errno)?;
        rustix::net::bind(&socket, &scoped(address)).map_err(errno)?;
        Ok(socket)
    }
}

/// Whether a socket that was connecting is connected; its error.
///
/// # Errors
/// What became of the connection.
pub fn connected(socket: &OwnedFd) -> Result<bool, Errno> {
    let mut polled = [PollFd::new(socket, PollFlags::OUT)];
    poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).map_err(errno)?;
    let [polled] = polled;
    if polled.revents().is_empty() {
        return Ok(false);
    }
    match kso_sys::take_error(socket.as_fd()) {
        Ok(0) => Ok(true),
        Ok(raw) => Err(kso_sys::errno::from_raw(raw)),
        Err(error) => Err(kso_sys::errno::of(&error)),
    }
}

fn errno(error: rustix::io::Errno) -> Errno {
    kso_sys::errno::from_raw(error.raw_os_error())
}

/// `address` as a socket of `family` has it.
fn in_family(address: SocketAddr, family: Family) -> Option<SocketAddr> {
    let ip = match (address.ip().to_canonical(), family) {
        (IpAddr::V4(ip), Family::V4) => IpAddr::V4(ip),
        (IpAddr::V4(ip), Family::V6) => IpAddr::V6(ip.to_ipv6_mapped()),
        (IpAddr::V6(ip), Family::V6) => IpAddr::V6(ip),
        (IpAddr::V6(_), Family::V4) => return None,
    };
    Some(SocketAddr::new(ip, address.port()))
}

/// A link-local address is one of a device.
fn scoped(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V6(v6) if v6.ip().is_unicast_link_local() => {
            SocketAddrV6::new(*v6.ip(), v6.port(), 0, LOOPBACK_SCOPE).into()
        }
        other => SocketAddr::new(other.ip(), other.port()),
    }
}

#[cfg(test)]
mod tests;
