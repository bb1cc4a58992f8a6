//! Streams: outgoing connections and listeners.
//!
//! ```text
//!   socket -- lock to the peer -- options -- [bind] -- connect (not waited for) --> handed out
//!   socket -- options -- bind --> reserved -- options -- lock -- listen --> handed out
//! ```
//!
//! A socket that a program will hold is locked (`kso_sys::lock`) before it can be of any use, so that it can
//! be used for what was permitted and for nothing else. One that stays outside needs no lock.

use crate::{domain, errno, family_of};
use kso_sys::{lock, options};
use kso_wire::{Errno, Family, SocketOptions};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SocketFlags, SocketType, sockopt};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};

/// From here on the kernel gives out ports by itself (`net.ipv4.ip_local_port_range`, ip(7)).
const FIRST_EPHEMERAL: u16 = 32_768;
/// Ports below need a privilege (`net.ipv4.ip_unprivileged_port_start`, ip(7)).
const FIRST_UNPRIVILEGED: u16 = 1024;

/// An outgoing connection.
#[derive(Clone, Copy, Debug)]
pub struct Order<'a> {
    /// Where to, translated.
    pub peer: SocketAddr,
    /// The family of the program's socket: an `AF_INET6` socket stays one also for a mapped address.
    pub family: Family,
    /// A port that the program bound.
    pub port: Option<u16>,
    /// Its options.
    pub options: &'a SocketOptions,
    /// Who will hold it.
    pub holder: Holder,
}

/// Who holds a socket in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    /// A program: it is locked to what was approved.
    Program,
    /// The broker or a device: nobody else can do anything with it.
    Outside,
}

fn fresh(family: Family) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(domain(family), SocketType::STREAM, flags, None).map_err(errno)
}

fn apply(socket: &OwnedFd, wanted: &SocketOptions) -> Result<(), Errno> {
    if wanted.is_empty() {
        return Ok(());
    }
    options::apply(socket.as_fd(), wanted).map_err(|error| kso_sys::errno::of(&error))
}

fn unspecified(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// Opens a socket and begins to connect it; it is non-blocking.
///
/// # Errors
/// What `socket`, `bind` or `connect` said at once. Later errors are the socket's own.
pub fn connect(order: &Order<'_>) -> Result<OwnedFd, Errno> {
    let socket = fresh(order.family)?;
    lock(&socket, order)?;
    connect_locked(&socket, order)?;
    Ok(socket)
}

/// A socket for a program that can be connected to `peer` and to nothing else; it is non-blocking.
pub(crate) fn locked(family: Family, peer: SocketAddr) -> Result<OwnedFd, Errno> {
    let socket = fresh(family)?;
    lock_to(&socket, peer)?;
    Ok(socket)
}

/// Begins to connect a socket that is locked already, if it has to be.
pub(crate) fn connect_locked(socket: &OwnedFd, order: &Order<'_>) -> Result<(), Errno> {
    apply(socket, order.options)?;
    if let Some(port) = order.port {
        bind_source(socket, order.family, port)?;
    }
    start(socket, order.peer)
}

/// Begins to connect a socket that is there (a reserved one).
///
/// # Errors
/// As [`connect`].
pub fn connect_reserved(socket: &OwnedFd, order: &Order<'_>) -> Result<(), Errno> {
    apply(socket, order.options)?;
    lock(socket, order)?;
    start(socket, order.peer)
}

/// As [`connect`], on behalf of a kernel elsewhere. It sends at once what it is given: the program's own kernel gathered
/// already what is to be gathered. The port is a demand.
///
/// # Errors
/// As [`connect`].
pub fn connect_relayed(order: &Order<'_>) -> Result<OwnedFd, Errno> {
    let socket = fresh(order.family)?;
    apply(&socket, order.options)?;
    sockopt::set_tcp_nodelay(&socket, true).map_err(errno)?;
    if let Some(port) = order.port {
        // Connections of the same port to other peers, and those in TIME_WAIT, are no obstacle.
        sockopt::set_socket_reuseaddr(&socket, true).map_err(errno)?;
        rustix::net::bind(&socket, &SocketAddr::new(unspecified(order.family), port)).map_err(errno)?;
    }
    lock(&socket, order)?;
    start(&socket, order.peer)?;
    Ok(socket)
}

fn lock(socket: &OwnedFd, order: &Order<'_>) -> Result<(), Errno> {
    match order.holder {
        Holder::Program => lock_to(socket, order.peer),
        Holder::Outside => Ok(()),
    }
}

fn lock_to(socket: &OwnedFd, peer: SocketAddr) -> Result<(), Errno> {
    lock::lock_to_peer(socket.as_fd(), peer).map_err(|error| kso_sys::errno::of(&error))
}

fn start(socket: &OwnedFd, peer: SocketAddr) -> Result<(), Errno> {
    match rustix::net::connect(socket, &peer) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(()),
        Err(error) => Err(errno(error)),
    }
}

/// The program bound a port on its own kernel; the same is taken here. A port that its kernel chose for it
/// may be in use here: then another does.
fn bind_source(socket: &OwnedFd, family: Family, port: u16) -> Result<(), Errno> {
    if port < FIRST_UNPRIVILEGED {
        return Ok(());
    }
    match rustix::net::bind(socket, &SocketAddr::new(unspecified(family), port)) {
        Err(rustix::io::Errno::ADDRINUSE) if port >= FIRST_EPHEMERAL => Ok(()),
        other => other.map_err(errno),
    }
}

/// Whether a connection on loopback failed already: what listens there answers before `connect` returns.
#[must_use]
pub fn refused_already(socket: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(socket, PollFlags::empty())];
    let ready = poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok();
    let [polled] = polled;
    ready && polled.revents().contains(PollFlags::ERR)
}

/// How a listener is bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Address and port; port 0 is any.
    pub address: SocketAddr,
    /// The address is a wildcard that shall be reached on the loopback device only.
    pub loopback_only: bool,
    /// `SO_REUSEADDR` whatever the program set: connections of an earlier sandbox that linger (TIME_WAIT) do
    /// not keep a published port. Two listeners still cannot share it (socket(7)).
    pub reuse: bool,
}

/// A socket bound to `place`, not yet listening.
///
/// # Errors
/// What `bind` said.
pub fn reserve(place: Place, wanted: &SocketOptions) -> Result<OwnedFd, Errno> {
    let socket = fresh(family_of(place.address))?;
    apply(&socket, wanted)?;
    if place.reuse {
        sockopt::set_socket_reuseaddr(&socket, true).map_err(errno)?;
    }
    if place.loopback_only {
        // Needs no privilege since Linux 5.7, as long as the socket has no device yet (socket(7)).
        let socket = socket2::SockRef::from(&socket);
        socket.bind_device(Some(b"lo")).map_err(|error| kso_sys::errno::of(&error))?;
    }
    rustix::net::bind(&socket, &place.address).map_err(errno)?;
    Ok(socket)
}

/// Makes a [`reserve`]d socket listen. It is non-blocking.
///
/// # Errors
/// What `listen` said.
pub fn listen(socket: &OwnedFd, backlog: i32, wanted: &SocketOptions, holder: Holder) -> Result<(), Errno> {
    apply(socket, wanted)?;
    if holder == Holder::Program {
        lock::lock_listener(socket.as_fd()).map_err(|error| kso_sys::errno::of(&error))?;
    }
    rustix::net::listen(socket, backlog).map_err(errno)
}

/// Why `address` could not be listened on, if it could not. Nothing stays bound.
#[must_use]
pub fn trouble(address: SocketAddr) -> Option<Errno> {
    let attempt = || {
        let socket = fresh(family_of(address))?;
        if address.is_ipv6() {
            sockopt::set_ipv6_v6only(&socket, true).map_err(errno)?;
        }
        sockopt::set_socket_reuseaddr(&socket, true).map_err(errno)?;
        rustix::net::bind(&socket, &address).map_err(errno)
    };
    attempt().err()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::local_address;
    use kso_wire::OptionName;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    fn order(peer: SocketAddr, family: Family, options: &SocketOptions) -> Order<'_> {
        Order { peer, family, port: None, options, holder: Holder::Program }
    }

    #[test]
    fn a_connection_carries_bytes_and_keeps_its_family() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut options = SocketOptions::default();
        options.push(OptionName::NoDelay, 1);
        let mapped: SocketAddr = format!("[::ffff:127.0.0.1]:{port}").parse().unwrap();
        for (peer, family) in [(listener.local_addr().unwrap(), Family::V4), (mapped, Family::V6)] {
            let mut stream = TcpStream::from(connect(&order(peer, family, &options)).unwrap());
            let (mut accepted, _) = listener.accept().unwrap();
            stream.set_nonblocking(false).unwrap();
            accepted.write_all(b"kso").unwrap();
            let mut read = [0; 3];
            stream.read_exact(&mut read).unwrap();
            assert_eq!(&read, b"kso");
            assert!(stream.nodelay().unwrap());
            assert_eq!(stream.peer_addr().unwrap(), peer);
        }
    }

    #[test]
    fn a_bound_port_is_the_source_port() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = {
            let probe = TcpListener::bind("127.0.0.1:0").unwrap();
            probe.local_addr().unwrap().port()
        };
        let options = SocketOptions::default();
        let peer = listener.local_addr().unwrap();
        let socket = connect(&Order { port: Some(port), ..order(peer, Family::V4, &options) }).unwrap();
        assert_eq!(local_address(&socket).unwrap().port(), port);
    }

    #[test]
    fn a_listener_accepts_and_its_port_is_taken() {
        let place = Place { address: "127.0.0.1:0".parse().unwrap(), loopback_only: false, reuse: true };
        let socket = reserve(place, &SocketOptions::default()).unwrap();
        let address = local_address(&socket).unwrap();
        assert_eq!(trouble(address), None);
        listen(&socket, 16, &SocketOptions::default(), Holder::Program).unwrap();
        assert_eq!(trouble(address), Some(Errno::EADDRINUSE));
        let second = reserve(Place { address, ..place }, &SocketOptions::default());
        assert_eq!(second.unwrap_err(), Errno::EADDRINUSE);
        TcpStream::connect(address).unwrap();
        TcpListener::from(socket).accept().unwrap();
    }

    #[test]
    fn a_wildcard_on_loopback_only_takes_both_families() {
        let place = Place { address: "[::]:0".parse().unwrap(), loopback_only: true, reuse: false };
        let mut options = SocketOptions::default();
        options.push(OptionName::V6Only, 0);
        let socket = reserve(place, &options).unwrap();
        listen(&socket, 16, &options, Holder::Program).unwrap();
        let port = local_address(&socket).unwrap().port();
        TcpStream::connect(("127.0.0.1", port)).unwrap();
        TcpStream::connect(("::1", port)).unwrap();
    }

    #[test]
    fn what_fails_at_once_says_why() {
        let options = SocketOptions::default();
        let broadcast = order("255.255.255.255:1".parse().unwrap(), Family::V4, &options);
        assert!(matches!(connect(&broadcast), Err(Errno::ENETUNREACH | Errno::EACCES)));
    }

    #[test]
    fn a_refusal_on_loopback_is_seen_at_once() {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let options = SocketOptions::default();
        let peer = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        if let Ok(socket) = connect(&order(peer, Family::V4, &options)) {
            assert!(refused_already(&socket));
        }
    }
}
