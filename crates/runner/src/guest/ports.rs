//! What one of our vsock ports says.
//!
//! A vsock port has 32 bits, and the runner chooses it: so that nothing need be remembered for a socket, it carries
//! what AF_VSOCK does not keep. A socket that was accepted has its listener's port.
//!
//! ```text
//!   31        30         29              28 ... 16   15 ... 0
//!   AF_INET6  listener   its peer is ::1 turn        the TCP port inside
//! ```
//!
//! The TCP port of a connection is one of the ephemeral ones: it is seen only by a peer inside.

use kso_wire::Family;

const V6: u32 = 1 << 31;
const LISTENER: u32 = 1 << 30;
const INSIDE_V6: u32 = 1 << 29;
const TURN: u32 = 0x1fff;
/// `net.ipv4.ip_local_port_range` as Linux has it.
const EPHEMERAL: std::ops::Range<u32> = 32_768..61_000;

/// A vsock port, read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port {
    /// Of the program's socket.
    pub family: Family,
    /// It is a listener's, or of what a listener accepted.
    pub listener: bool,
    /// A connection inside was made to an IPv6 address.
    pub inside_v6: bool,
    /// The TCP port that the program knows; 0: it is not in here.
    pub tcp: u16,
}

impl Port {
    /// Reads one.
    #[must_use]
    pub fn of(raw: u32) -> Self {
        Self {
            family: if raw & V6 != 0 { Family::V6 } else { Family::V4 },
            listener: raw & LISTENER != 0,
            inside_v6: raw & INSIDE_V6 != 0,
            tcp: raw as u16,
        }
    }
}

/// Gives out ports. One that is taken is passed over by asking again.
#[derive(Debug, Default)]
pub struct Ports {
    connections: u32,
    listeners: u32,
}

fn family_bit(family: Family) -> u32 {
    if family == Family::V6 { V6 } else { 0 }
}

impl Ports {
    /// The next port for a connection.
    pub fn connection(&mut self, family: Family, inside_v6: bool) -> u32 {
        let many = EPHEMERAL.end - EPHEMERAL.start;
        let (turn, tcp) = ((self.connections / many) & TURN, EPHEMERAL.start + self.connections % many);
        self.connections = self.connections.wrapping_add(1) % (many * (TURN + 1));
        family_bit(family) | if inside_v6 { INSIDE_V6 } else { 0 } | turn << 16 | tcp
    }

    /// The next port for a listener on the TCP port `tcp`.
    pub fn listener(&mut self, family: Family, tcp: u16) -> u32 {
        self.listeners = self.listeners.wrapping_add(1);
        family_bit(family) | LISTENER | (self.listeners & TURN) << 16 | u32::from(tcp)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn a_port_says_what_it_was_made_for() {
        let mut ports = Ports::default();
        for family in [Family::V4, Family::V6] {
            let listener = ports.listener(family, 80);
            assert_eq!(Port::of(listener), Port { family, listener: true, inside_v6: false, tcp: 80 });
            let connection = Port::of(ports.connection(family, family == Family::V6));
            assert!(!connection.listener && connection.tcp >= 32_768);
            assert_eq!((connection.family, connection.inside_v6), (family, family == Family::V6));
        }
    }

    #[test]
    fn ports_are_not_given_out_twice_soon_nor_reserved() {
        let mut ports = Ports::default();
        let given: HashSet<u32> = (0..100_000).map(|_| ports.connection(Family::V4, false)).collect();
        assert_eq!(given.len(), 100_000);
        assert!(given.iter().all(|&port| port >= 1024 && port != u32::MAX));
        let mut last = Ports { connections: (61_000 - 32_768) * (TURN + 1) - 1, listeners: u32::MAX };
        assert_ne!(last.connection(Family::V6, true), u32::MAX);
        assert_eq!(last.connections, 0);
        assert_ne!(last.listener(Family::V6, u16::MAX), u32::MAX);
    }
}
