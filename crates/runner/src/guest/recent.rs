//! What is remembered of streams for a while: bounded, the oldest fall out, and then the broker or the kernel is asked.

use kso_sys::vsock::Address;
use kso_wire::{Errno, SocketOptions};
use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;

/// So many connections are remembered.
const MAX_RECENT: usize = 1024;
/// So many errors are kept until they are asked for.
const MAX_FAILURES: usize = 1024;

/// A connection that was begun.
#[derive(Clone, Debug)]
pub struct Begun {
    /// What the program called the peer.
    pub peer: SocketAddr,
    /// What the guest's kernel calls it.
    pub address: Address,
    /// Its local address outside, once it is up.
    pub local: Option<SocketAddr>,
    /// The options it was begun with and was given since: a failed socket keeps them.
    pub options: SocketOptions,
    /// The program has not heard that it is up: its next `connect` returns 0 (`__inet_stream_connect`).
    pub unheard: bool,
    /// Its caller was interrupted before it heard `EINPROGRESS`.
    pub interrupted: bool,
    /// The broker said that it failed.
    pub failed: bool,
}

/// Connections by vsock port.
#[derive(Debug, Default)]
pub struct Recent {
    begun: HashMap<u32, Begun>,
    order: VecDeque<u32>,
}

impl Recent {
    /// Remembers one.
    pub fn insert(&mut self, port: u32, begun: Begun) {
        if self.begun.insert(port, begun).is_none() {
            self.order.push_back(port);
        }
        while self.order.len() > MAX_RECENT {
            if let Some(oldest) = self.order.pop_front() {
                self.begun.remove(&oldest);
            }
        }
    }

    /// What is known of one.
    pub fn get(&self, port: u32) -> Option<&Begun> {
        self.begun.get(&port)
    }

    /// What is known of one.
    pub fn get_mut(&mut self, port: u32) -> Option<&mut Begun> {
        self.begun.get_mut(&port)
    }
}

/// Errors that were not asked for yet.
#[derive(Debug, Default)]
pub struct Failures(VecDeque<(u32, Option<Address>, Errno)>);

impl Failures {
    /// A stream failed: one that was connected from here, or, with a peer, one that was accepted.
    pub fn add(&mut self, port: u32, peer: Option<Address>, errno: Errno) {
        if self.0.len() >= MAX_FAILURES {
            self.0.pop_front();
        }
        self.0.push_back((port, peer, errno));
    }

    /// Whether a stream of this port may have one.
    pub fn has(&self, port: u32) -> bool {
        self.0.iter().any(|&(of, ..)| of == port)
    }

    /// Takes the error of a stream.
    pub fn take(&mut self, port: u32, peer: Option<Address>) -> Option<Errno> {
        let at = self.0.iter().rposition(|&(of, with, _)| of == port && (with.is_none() || with == peer))?;
        self.0.remove(at).map(|(_, _, errno)| errno)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_told_once_and_to_its_own_stream() {
        let mut failures = Failures::default();
        let [one, two] = [1, 2].map(|port| Address { cid: 9, port });
        failures.add(7, None, Errno::ECONNREFUSED);
        failures.add(8, Some(one), Errno::ECONNRESET);
        assert_eq!(failures.take(8, Some(two)), None);
        assert_eq!(failures.take(8, Some(one)), Some(Errno::ECONNRESET));
        assert_eq!(failures.take(8, Some(one)), None);
        assert_eq!(failures.take(7, None), Some(Errno::ECONNREFUSED));
        for port in 0..5000 {
            failures.add(port, None, Errno::EIO);
        }
        assert_eq!(failures.0.len(), MAX_FAILURES);
    }
}
