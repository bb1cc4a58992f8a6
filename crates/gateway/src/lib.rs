//! The TUN gateway of a sandbox: what its programs send as packets is performed on sockets of the external
//! kernel.
//!
//! A sandbox's network namespace has a TUN and nothing else that leads out. Streams do not come this way (the
//! runner swaps descriptors); datagrams, ICMP echo, names, and TCP that no one intercepted do. The gateway reads
//! IP packets, finds or opens the flow of each, and moves its bytes between the TUN and a socket that the
//! broker opened under its policy. It opens nothing itself and decides nothing.
//!
//! ```text
//!                 +--> datagrams: one connected UDP socket per flow <--> peers
//!   TUN -> ingress|--> echoes: one ping socket per flow             <--> peers
//!   (checks,      |--> queries at gateway:53 -> Resolve             <--> broker
//!   reassembly)   +--> streams: smoltcp <-> one TCP socket each     <--> peers
//! ```
//!
//! [`Gateway`] is the shell: it owns the descriptors and does a bounded amount of work per call, never waiting.
//! What is pure (packets, reassembly, the flow table, DNS messages) is below it and takes the time as an
//! argument. Everything a packet says is hostile: checked, bounded, and answered as a router would, or
//! dropped and counted.
#![forbid(unsafe_code)]

mod datagrams;
mod device;
mod dns;
mod echoes;
mod errors;
mod framed;
mod gateway;
mod ingress;
mod outgoing;
mod pace;
mod packet;
mod published;
mod queries;
mod reassembly;
mod streams;
mod table;
mod watch;

pub use gateway::Gateway;
#[doc(hidden)]
pub use ingress::fuzz_packet;

use kso_wire::{Errno, Publication, TunAddresses};
use std::time::Duration;

/// What a gateway is told at its start.
#[derive(Clone, Debug)]
pub struct GatewayConfig {
    /// The addresses of the TUN network.
    pub addresses: TunAddresses,
    /// The session's publications, in the order of `Hello::publish`; those of UDP are the gateway's.
    pub publish: Vec<Publication>,
    /// At most so many datagram flows; each has a descriptor.
    pub max_flows: usize,
    /// How long a flow that was not answered is kept.
    pub idle: Duration,
    /// How long a flow that was answered is kept.
    pub idle_answered: Duration,
}

impl Default for GatewayConfig {
    fn default() -> Self {
        Self {
            addresses: TunAddresses::standard(),
            publish: Vec::new(),
            max_flows: 4096,
            idle: Duration::from_secs(60),
            idle_answered: Duration::from_secs(300),
        }
    }
}

/// Why a gateway cannot start.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// The descriptor is not a TUN's, or there are too many open files.
    #[error("cannot use the sandbox's TUN: {0}")]
    Tun(#[source] std::io::Error),
    /// A published UDP port could not be opened.
    #[error("cannot publish UDP port {port}: {errno}")]
    Publish {
        /// The port outside.
        port: u16,
        /// Why not.
        errno: Errno,
    },
}

/// What happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GatewayStats {
    /// Packets read from the TUN.
    pub packets_in: u64,
    /// Packets written to it.
    pub packets_out: u64,
    /// Packets that could not be written to it.
    pub packets_lost: u64,
    /// Datagrams sent outside.
    pub datagrams_sent: u64,
    /// Datagrams received from outside.
    pub datagrams_received: u64,
    /// Datagrams dropped because a socket's or a queue's room was used up.
    pub datagrams_lost: u64,
    /// ICMP errors told to the sandbox.
    pub errors_reported: u64,
    /// Flows that gave way to others.
    pub evicted: u64,
    /// Dropped: too short, or contradicting itself.
    pub malformed: u64,
    /// Dropped: a wrong checksum.
    pub bad_checksum: u64,
    /// Dropped: from an address that is not the sandbox's.
    pub spoofed: u64,
    /// Dropped: to a group, to everybody, or nowhere.
    pub not_unicast: u64,
    /// Dropped: a protocol that is not carried.
    pub unsupported: u64,
    /// Datagram flows now.
    pub flows: usize,
    /// Echo flows now.
    pub echoes: usize,
    /// Streams now.
    pub streams: usize,
}
