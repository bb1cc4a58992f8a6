//! Listeners and ports. Pure.
//!
//! A connection that is shaken hands with waits here until it is accepted. As long as there are more of them than the program
//! said, SYNs are not answered: their peers try again, as with a Linux.

use crate::connection::ConnectionId;
use crate::options::Options;
use crate::packet::Tuple;
use kso_wire::Errno;
use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};

/// Most connections that wait at a listener, whatever it asks for (net.core.somaxconn).
const MAX_BACKLOG: usize = 4096;
/// Ports that are given to who asks for none (net.ipv4.ip_local_port_range).
const FIRST_EPHEMERAL: u16 = 32_768;
const EPHEMERAL: u16 = 28_232;

/// See the module.
#[derive(Debug)]
pub struct Listener {
    /// Where.
    pub address: SocketAddr,
    /// For its connections.
    pub options: Options,
    backlog: usize,
    /// Those that are not yet shaken hands with.
    half_open: usize,
    waiting: VecDeque<ConnectionId>,
}

impl Listener {
    fn takes_v4(&self) -> bool {
        self.address.is_ipv4() || self.address.ip().is_unspecified() && !self.options.v6_only
    }

    fn takes(&self, local: SocketAddr) -> bool {
        let (own, other) = (self.address.ip(), local.ip());
        let any =
            own.is_unspecified() && (own.is_ipv4() == other.is_ipv4() || other.is_ipv4() && self.takes_v4());
        self.address.port() == local.port() && (own == other || any)
    }

    /// Whether a connection could be for either of them.
    fn overlaps(&self, address: SocketAddr, v6_only: bool) -> bool {
        let (own, other) = (self.address.ip(), address.ip());
        let takes_v4 = address.is_ipv4() || other.is_unspecified() && !v6_only;
        let same_family = own.is_ipv4() == other.is_ipv4() || takes_v4 && self.takes_v4();
        let any = own.is_unspecified() || other.is_unspecified();
        self.address.port() == address.port() && (own == other || any && same_family)
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct Listeners {
    all: HashMap<u64, Listener>,
    ports: HashMap<u16, Vec<u64>>,
    last: u16,
}

impl Listeners {
    /// None yet; ports are given from `last` on. After a restart others than before should be.
    pub fn new(last: u16) -> Self {
        Self { last, ..Self::default() }
    }

    /// Opens one. Where it listens comes back.
    pub fn open(
        &mut self,
        id: u64,
        mut address: SocketAddr,
        backlog: i32,
        options: Options,
    ) -> Result<SocketAddr, Errno> {
        if address.port() == 0 {
            let free = self.ephemeral(|port| {
                let place = SocketAddr::new(address.ip(), port);
                self.is_free(place, options.v6_only)
            });
            address.set_port(free.ok_or(Errno::EADDRINUSE)?);
        } else if !self.is_free(address, options.v6_only) {
            return Err(Errno::EADDRINUSE);
        }
        self.last = address.port();
        // Linux takes one more than it is told (sk_acceptq_is_full).
        let backlog = usize::try_from(backlog).unwrap_or(MAX_BACKLOG).min(MAX_BACKLOG) + 1;
        let listener = Listener { address, options, backlog, half_open: 0, waiting: VecDeque::new() };
        self.all.insert(id, listener);
        self.ports.entry(address.port()).or_default().push(id);
        Ok(address)
    }

    fn is_free(&self, address: SocketAddr, v6_only: bool) -> bool {
        self.at(address.port()).all(|(_, listener)| !listener.overlaps(address, v6_only))
    }

    fn at(&self, port: u16) -> impl Iterator<Item = (u64, &Listener)> {
        let ids = self.ports.get(&port).into_iter().flatten();
        ids.filter_map(|id| Some((*id, self.all.get(id)?)))
    }

    /// The first port for which `is_free`, beginning anywhere.
    fn ephemeral(&self, is_free: impl Fn(u16) -> bool) -> Option<u16> {
        let begin = self.last.wrapping_sub(FIRST_EPHEMERAL) % EPHEMERAL;
        let mut ports = (1..=EPHEMERAL).map(|step| FIRST_EPHEMERAL + (begin + step) % EPHEMERAL);
        ports.find(|port| is_free(*port))
    }

    /// A port for a connection from `ip`; `wanted` if it can be. `is_used` tells of connections to the same peer.
    pub fn port_for(&mut self, ip: IpAddr, wanted: u16, is_used: impl Fn(u16) -> bool) -> Option<u16> {
        let is_free = |port: u16| {
            let local = SocketAddr::new(ip, port);
            !is_used(port) && !self.at(port).any(|(_, listener)| listener.takes(local))
        };
        if wanted != 0 && is_free(wanted) {
            return Some(wanted);
        }
        let port = self.ephemeral(is_free)?;
        self.last = port;
        Some(port)
    }

    /// Closes one. Those that waited come back.
    pub fn close(&mut self, id: u64) -> VecDeque<ConnectionId> {
        let Some(listener) = self.all.remove(&id) else { return VecDeque::new() };
        let port = listener.address.port();
        if let Some(ids) = self.ports.get_mut(&port) {
            ids.retain(|other| *other != id);
            if ids.is_empty() {
                self.ports.remove(&port);
            }
        }
        listener.waiting
    }

    /// Who takes a connection with these ends: the listener of the address, or else that of all.
    pub fn find(&self, tuple: &Tuple) -> Option<(u64, &Listener)> {
        let takes = self.at(tuple.local.port()).filter(|(_, listener)| listener.takes(tuple.local));
        takes.max_by_key(|(_, listener)| listener.address.ip() == tuple.local.ip())
    }

    /// A SYN came. False: there is no room, it shall come again.
    pub fn begin(&mut self, id: u64) -> bool {
        let Some(listener) = self.all.get_mut(&id) else { return false };
        let room = listener.half_open + listener.waiting.len() < listener.backlog;
        listener.half_open += usize::from(room);
        room
    }

    /// A connection that began is none after all.
    pub fn undo(&mut self, id: u64, connection: ConnectionId, was_waiting: bool) {
        let Some(listener) = self.all.get_mut(&id) else { return };
        if was_waiting {
            listener.waiting.retain(|other| *other != connection);
        } else {
            listener.half_open = listener.half_open.saturating_sub(1);
        }
    }

    /// A connection that began is established. False: nobody waits for it any more.
    pub fn arrived(&mut self, id: u64, connection: ConnectionId) -> bool {
        let Some(listener) = self.all.get_mut(&id) else { return false };
        listener.half_open = listener.half_open.saturating_sub(1);
        listener.waiting.push_back(connection);
        true
    }

    /// The connection that waits longest.
    pub fn accept(&mut self, id: u64) -> Option<ConnectionId> {
        self.all.get_mut(&id)?.waiting.pop_front()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn open(listeners: &mut Listeners, id: u64, address: &str) -> Result<SocketAddr, Errno> {
        listeners.open(id, address.parse().unwrap(), 2, Options::default())
    }

    fn tuple(local: &str) -> Tuple {
        Tuple { local: local.parse().unwrap(), remote: "192.0.2.9:5000".parse().unwrap() }
    }

    #[test]
    fn ports_clash_where_a_connection_could_be_for_both() {
        let mut listeners = Listeners::default();
        open(&mut listeners, 1, "10.0.0.1:80").unwrap();
        assert_eq!(open(&mut listeners, 2, "10.0.0.1:80"), Err(Errno::EADDRINUSE));
        assert_eq!(open(&mut listeners, 2, "0.0.0.0:80"), Err(Errno::EADDRINUSE));
        assert_eq!(open(&mut listeners, 2, "[::]:80"), Err(Errno::EADDRINUSE));
        let mut alone = Options::default();
        alone.v6_only = true;
        listeners.open(2, "[::]:80".parse().unwrap(), 2, alone).unwrap();
        open(&mut listeners, 3, "10.0.0.2:80").unwrap();
        open(&mut listeners, 4, "0.0.0.0:81").unwrap();
        listeners.close(1);
        open(&mut listeners, 5, "10.0.0.1:80").unwrap();
        let any = open(&mut listeners, 6, "0.0.0.0:0").unwrap();
        let other = open(&mut listeners, 7, "0.0.0.0:0").unwrap();
        assert!(any.port() >= FIRST_EPHEMERAL && any != other);
        // A connection takes none of them.
        assert_ne!(listeners.port_for([10, 0, 0, 1].into(), 80, |_| false), Some(80));
        assert_eq!(listeners.port_for([10, 0, 0, 1].into(), 82, |_| false), Some(82));
        assert_eq!(listeners.port_for([10, 0, 0, 1].into(), 0, |_| true), None);
    }

    #[test]
    fn the_nearest_listener_takes_a_connection() {
        let mut listeners = Listeners::default();
        open(&mut listeners, 1, "[::]:80").unwrap();
        let find = |listeners: &Listeners, local| listeners.find(&tuple(local)).map(|(id, _)| id);
        assert_eq!(find(&listeners, "10.0.0.1:80"), Some(1));
        listeners.close(1);
        open(&mut listeners, 2, "10.0.0.1:80").unwrap();
        assert_eq!(find(&listeners, "10.0.0.1:80"), Some(2));
        assert_eq!((find(&listeners, "10.0.0.2:80"), find(&listeners, "10.0.0.1:81")), (None, None));
    }

    #[test]
    fn the_backlog_has_an_end() {
        let mut listeners = Listeners::default();
        open(&mut listeners, 1, "0.0.0.0:80").unwrap();
        let id = ConnectionId;
        assert!(listeners.begin(1) && listeners.begin(1) && listeners.begin(1));
        assert!(!listeners.begin(1));
        assert!(listeners.arrived(1, id(7)) && listeners.arrived(1, id(8)));
        assert!(!listeners.begin(1), "those that wait count");
        listeners.undo(1, id(9), false);
        listeners.undo(1, id(7), true);
        assert!(listeners.begin(1) && listeners.begin(1) && !listeners.begin(1));
        assert_eq!((listeners.accept(1), listeners.accept(1)), (Some(id(8)), None));
        assert!(listeners.close(1).is_empty() && !listeners.begin(1) && !listeners.arrived(1, id(9)));
    }
}
