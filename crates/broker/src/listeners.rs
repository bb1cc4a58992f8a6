//! The listeners that a session has outside, and which of them still live.
//!
//! They belong to the program; here they are only watched (`kso_provider::alive`). A connection inside to a
//! published port goes to the listener outside, but only while it is this session's: the port may have
//! been closed since, and taken by a stranger.

use crate::route::in_family;
use kso_provider::alive::Watch;
use kso_wire::Family;
use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;

/// Most listeners of a session outside.
const MAX_LISTENERS: usize = 4096;

/// A listener of the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Listener {
    /// As the program bound it.
    pub inner: SocketAddr,
    /// Takes IPv6 only.
    pub v6_only: bool,
    /// As it is bound outside.
    pub outer: SocketAddr,
    /// Its cookie.
    pub cookie: u64,
}

impl Listener {
    /// Whether a connection inside to `ip` (canonical) reaches it.
    fn is_reached_by(&self, ip: IpAddr) -> bool {
        let bound = self.inner.ip();
        let family = match ip {
            IpAddr::V4(_) => bound.is_ipv4() || !self.v6_only,
            IpAddr::V6(_) => bound.is_ipv6(),
        };
        family && (bound.is_unspecified() || bound.to_canonical() == ip)
    }

    /// Where a socket of `family` connects to it, on its way to `ip` inside.
    fn target(&self, ip: IpAddr, family: Family) -> Option<SocketAddr> {
        let outer = self.outer.ip().to_canonical();
        let target = match (outer, ip) {
            (outer, IpAddr::V6(_)) if outer.is_unspecified() && outer.is_ipv6() => Ipv6Addr::LOCALHOST.into(),
            (outer, _) if outer.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
            (outer, _) => outer,
        };
        in_family(SocketAddr::new(target, self.outer.port()), family)
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Listeners {
    watch: Watch,
    all: Vec<Listener>,
}

impl Listeners {
    pub fn new() -> io::Result<Self> {
        Ok(Self { watch: Watch::new()?, all: Vec::new() })
    }

    /// Adds a listener. With too many it is not remembered: it works, but is not reached from inside.
    pub fn add(&mut self, socket: impl AsFd, listener: Listener) -> io::Result<()> {
        if self.all.len() >= MAX_LISTENERS {
            self.sweep();
        }
        if self.all.len() >= MAX_LISTENERS {
            return Err(io::Error::other("too many listeners"));
        }
        self.watch.add(socket, listener.cookie)?;
        self.all.push(listener);
        Ok(())
    }

    /// Where a connection to `ip` (canonical) and `port` inside goes, if a listener outside serves it.
    pub fn find(&mut self, ip: IpAddr, port: u16, family: Family) -> Option<SocketAddr> {
        let meant = |one: &Listener| one.inner.port() == port && one.is_reached_by(ip);
        if !self.all.iter().any(meant) {
            return None;
        }
        self.sweep();
        self.all.iter().find(|one| meant(one)).and_then(|one| one.target(ip, family))
    }

    /// Those that live.
    pub fn live(&mut self) -> &[Listener] {
        self.sweep();
        &self.all
    }

    /// Those that lived when it was last looked at.
    pub fn known(&self) -> &[Listener] {
        &self.all
    }

    /// Whether there may be any.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    fn sweep(&mut self) {
        if self.all.is_empty() {
            return;
        }
        let mut alive = HashSet::with_capacity(self.all.len());
        match self.watch.alive(|cookie| {
            alive.insert(cookie);
        }) {
            Ok(()) => self.all.retain(|one| alive.contains(&one.cookie)),
            // Better inside than to a stranger.
            Err(error) => {
                tracing::warn!(%error, "published listeners cannot be watched");
                self.all.clear();
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn listener(inner: &str, outer: &str, v6_only: bool) -> Listener {
        Listener { inner: inner.parse().unwrap(), outer: outer.parse().unwrap(), v6_only, cookie: 1 }
    }

    #[test]
    fn families_meet_as_they_do_natively() {
        let v4 = Ipv4Addr::LOCALHOST.into();
        let v6 = Ipv6Addr::LOCALHOST.into();
        let both = listener("[::]:80", "[::ffff:127.0.0.1]:8080", false);
        assert!(both.is_reached_by(v4) && both.is_reached_by(v6));
        assert_eq!(both.target(v4, Family::V4).unwrap().to_string(), "127.0.0.1:8080");
        assert_eq!(both.target(v6, Family::V6).unwrap().to_string(), "[::ffff:127.0.0.1]:8080");
        let only = listener("[::]:80", "[::1]:8080", true);
        assert!(!only.is_reached_by(v4) && only.is_reached_by(v6));
        let old = listener("0.0.0.0:80", "0.0.0.0:8080", false);
        assert!(old.is_reached_by(v4) && !old.is_reached_by(v6));
        assert_eq!(old.target(v4, Family::V6).unwrap().to_string(), "[::ffff:127.0.0.1]:8080");
    }

    #[test]
    fn a_closed_listener_is_not_found() {
        let mut listeners = Listeners::new().unwrap();
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let outer = socket.local_addr().unwrap();
        let inner = "0.0.0.0:80".parse().unwrap();
        listeners.add(&socket, Listener { inner, v6_only: false, outer, cookie: 99 }).unwrap();
        let ip = Ipv4Addr::LOCALHOST.into();
        assert_eq!(listeners.find(ip, 80, Family::V4), Some(outer));
        assert_eq!(listeners.find(ip, 81, Family::V4), None);
        drop(socket);
        assert_eq!(listeners.find(ip, 80, Family::V4), None);
        assert!(listeners.is_empty());
    }
}
