//! What can be asked of a stack.

use super::{Event, Stack};
use crate::connection::{Connection, ConnectionId, MAX, Role, room};
use crate::options::Options;
use crate::packet::Tuple;
use kso_wire::{Errno, OptionName, OptionValue};
use smoltcp::socket::tcp;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Instant;

impl Stack {
    /// Begins a connection: [`Event::Connected`] or [`Event::Failed`]. Its own address comes back.
    ///
    /// # Errors
    /// `ENETUNREACH` where there is no way, `EADDRNOTAVAIL` without a free port, `ENOBUFS` with too many connections.
    pub fn connect(
        &mut self,
        peer: SocketAddr,
        port: u16,
        options: Options,
        now: Instant,
    ) -> Result<(ConnectionId, SocketAddr), Errno> {
        let ip = match peer.ip().to_canonical() {
            // As on any Unix: this host.
            IpAddr::V4(v4) if v4.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(v6) if v6.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
            IpAddr::V4(v4) if v4.is_broadcast() => return Err(Errno::ENETUNREACH),
            ip if ip.is_multicast() => return Err(Errno::ENETUNREACH),
            ip => ip,
        };
        let places = &self.egress.places;
        if peer.port() == 0 || ip.is_loopback() && !places.is_own(ip) {
            return Err(Errno::ECONNREFUSED);
        }
        if places.next_hop(ip).is_none() {
            return Err(Errno::ENETUNREACH);
        }
        let source = places.source(ip).ok_or(Errno::ENETUNREACH)?;
        if self.connections.len() >= MAX {
            return Err(Errno::ENOBUFS);
        }
        let remote = SocketAddr::new(ip, peer.port());
        let (tuples, waiting) = (&self.tuples, &self.waiting);
        let is_used = |port: u16| {
            let tuple = Tuple { local: SocketAddr::new(source, port), remote };
            tuples.contains_key(&tuple) || waiting.contains(&tuple, now)
        };
        let port = self.listeners.port_for(source, port, is_used).ok_or(Errno::EADDRNOTAVAIL)?;
        let local = SocketAddr::new(source, port);
        let tuple = Tuple { local, remote };
        let mut connection = Connection::new(tuple, Role::Connecting, options, room(self.connections.len()));
        let begun = connection.socket().connect(self.interface.context(), remote, local);
        begun.map_err(|_| Errno::EADDRNOTAVAIL)?;
        Ok((self.insert(connection), local))
    }

    /// Listens as `id`, which is not used twice. Where it does comes back.
    ///
    /// # Errors
    /// `EADDRINUSE`, `EADDRNOTAVAIL`.
    pub fn listen(
        &mut self,
        id: u64,
        address: SocketAddr,
        backlog: i32,
        options: Options,
    ) -> Result<SocketAddr, Errno> {
        let address = SocketAddr::new(address.ip().to_canonical(), address.port());
        if !address.ip().is_unspecified() && !self.egress.places.is_own(address.ip()) {
            return Err(Errno::EADDRNOTAVAIL);
        }
        self.listeners.open(id, address, backlog, options)
    }

    /// Ends a listener; who waits at it is reset.
    pub fn unlisten(&mut self, id: u64) {
        for connection in self.listeners.close(id) {
            self.abort(connection);
        }
    }

    /// The next connection that waits at a listener.
    pub fn accept(&mut self, listener: u64) -> Option<(ConnectionId, Tuple)> {
        loop {
            let id = self.listeners.accept(listener)?;
            if let Some(connection) = self.connections.get_mut(&id) {
                connection.role = Role::Open;
                let tuple = connection.tuple;
                self.announce(id);
                return Some((id, tuple));
            }
        }
    }

    /// The socket of a connection. After a change, [`Self::touch`] it.
    pub fn socket(&mut self, id: ConnectionId) -> Option<&mut tcp::Socket<'static>> {
        self.connections.get_mut(&id).map(Connection::socket)
    }

    /// Something changed at a socket: it may have something to say. `wrote`: the program did.
    pub fn touch(&mut self, id: ConnectionId, wrote: bool) {
        if let Some(connection) = self.connections.get_mut(&id).filter(|_| wrote) {
            connection.talked();
        }
        self.mark(id);
    }

    /// What broke a connection.
    #[must_use]
    pub fn error(&self, id: ConnectionId) -> Errno {
        self.connections.get(&id).and_then(|one| one.error).unwrap_or(Errno::ECONNRESET)
    }

    /// The ends of a connection.
    #[must_use]
    pub fn ends(&self, id: ConnectionId) -> Option<Tuple> {
        self.connections.get(&id).map(|one| one.tuple)
    }

    /// `getsockopt`.
    ///
    /// # Errors
    /// `ENOPROTOOPT`: there is none here.
    pub fn option(&self, id: ConnectionId, name: OptionName) -> Result<OptionValue, Errno> {
        let connection = self.connections.get(&id).ok_or(Errno::ENOTCONN)?;
        connection.options.get(name, connection.look())
    }

    /// `setsockopt`.
    ///
    /// # Errors
    /// `ENOPROTOOPT`: there is none here; `EINVAL`.
    pub fn set_option(
        &mut self,
        id: ConnectionId,
        name: OptionName,
        value: OptionValue,
    ) -> Result<(), Errno> {
        let connection = self.connections.get_mut(&id).ok_or(Errno::ENOTCONN)?;
        connection.options.set(name, value)?;
        let options = connection.options;
        options.apply(connection.socket());
        self.mark(id);
        Ok(())
    }

    /// Both directions are at their end: what is on its way shall arrive.
    pub fn release(&mut self, id: ConnectionId) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.role = Role::Orphan;
            connection.silent_since = None;
            self.mark(id);
        }
    }

    /// Resets a connection.
    pub fn abort(&mut self, id: ConnectionId) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.socket().abort();
            connection.role = Role::Orphan;
            self.mark(id);
        }
    }

    /// Resets all connections.
    pub fn abort_all(&mut self) {
        let all: Vec<ConnectionId> = self.connections.keys().copied().collect();
        all.into_iter().for_each(|id| self.abort(id));
    }

    /// The next thing that happened.
    pub fn next_event(&mut self) -> Option<Event> {
        let event = self.events.pop_front()?;
        if let Event::Ready(id) = event
            && let Some(connection) = self.connections.get_mut(&id)
        {
            connection.announced = false;
        }
        Some(event)
    }

    /// When [`Stack::run_due`] is due, at the latest. `None`: when a frame came, or something was touched.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        if !self.events.is_empty() || !self.dirty.is_empty() || self.egress.has_looped() {
            return Some(self.start);
        }
        let due = self.due.first().map(|(due, _)| *due);
        [due, self.egress.neighbours.next_deadline()].into_iter().flatten().min()
    }

    /// Connections of any kind.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.connections.len()
    }
}
