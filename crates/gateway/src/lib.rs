//! The TUN gateway of a sandbox: what its programs send as packets is performed on sockets of the external
//! kernel.
#![forbid(unsafe_code)]

mod dns;
mod packet;
mod reassembly;
mod table;

use kso_sys::tun::Tun;
use kso_wire::{Answer, BrokerLink, Publication, RequestId, TunAddresses};
use rustix::event::epoll;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

/// What a gateway is told at its start.
#[derive(Clone, Debug)]
pub struct GatewayConfig {
    /// The addresses of the TUN network.
    pub addresses: TunAddresses,
    /// The session's publications, in the order of `Hello::publish`; those of UDP are the gateway's.
    pub publish: Vec<Publication>,
}

/// Why a gateway could not start.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// The descriptor is not a TUN device's, or epoll failed.
    #[error("cannot use the TUN device: {0}")]
    Tun(#[source] std::io::Error),
    /// A published UDP port could not be opened.
    #[error("cannot publish UDP port {port}: {errno}")]
    Publish {
        /// The port outside.
        port: u16,
        /// Why not.
        errno: kso_wire::Errno,
    },
}

/// Counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GatewayStats {
    /// Packets read from the TUN.
    pub packets_in: u64,
}

/// See the crate.
#[derive(Debug)]
pub struct Gateway {
    #[allow(dead_code)]
    tun: Tun,
    epoll: OwnedFd,
    stats: GatewayStats,
}

impl Gateway {
    /// Takes the TUN descriptor of a sandbox.
    ///
    /// # Errors
    /// It is not one.
    pub fn new(tun: OwnedFd, _config: GatewayConfig) -> Result<Self, GatewayError> {
        let tun = Tun::from_fd(tun).map_err(GatewayError::Tun)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|e| GatewayError::Tun(e.into()))?;
        Ok(Self { tun, epoll, stats: GatewayStats::default() })
    }

    /// Opens the published UDP ports.
    ///
    /// # Errors
    /// One is taken.
    pub fn start(&mut self, _link: &mut dyn BrokerLink) -> Result<(), GatewayError> {
        Ok(())
    }

    /// Readable when [`Self::run_ready`] has something to do.
    #[must_use]
    pub fn poll_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Does a bounded amount of what is ready.
    pub fn run_ready(&mut self, _now: Instant, _link: &mut dyn BrokerLink) {}

    /// A late answer.
    pub fn answered(&mut self, _id: RequestId, _answer: Answer, _now: Instant, _link: &mut dyn BrokerLink) {}

    /// When [`Self::expire`] wants to be called.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        None
    }

    /// Drops what has been idle too long.
    pub fn expire(&mut self, _now: Instant, _link: &mut dyn BrokerLink) {}

    /// What happened so far.
    #[must_use]
    pub fn stats(&self) -> GatewayStats {
        self.stats
    }
}
