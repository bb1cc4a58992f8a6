//! A session: one sandbox, its rules, and what it has outside.

use crate::config::BrokerError;
use crate::listeners::Listeners;
use kso_core::names::{HOST_NAME, NameMemory};
use kso_core::policy::{Decision, Policy, Reason, Target};
use kso_core::routes::{Route, Routes};
use kso_provider::datagram::Ports;
use kso_provider::stream::Holder;
use kso_wire::{Hello, LoopbackMode, Protocol, Publication, TunAddresses};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Instant, SystemTime};

/// Most answers that are remembered of a session, pairs of name and address.
const MAX_NAMES: usize = 16_384;
/// Most ports that are reserved at one time.
pub(crate) const MAX_RESERVED: usize = 1024;
/// Most senders of datagrams whose ports are remembered.
const MAX_SENDERS: usize = 4096;

/// Names a session of a broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub(crate) u64);

impl SessionId {
    /// Its number, as `kso ps` shows it.
    #[must_use]
    pub fn number(self) -> u64 {
        self.0
    }
}

/// What a session did, for `kso ps`.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub connects: u64,
    pub failed: u64,
    pub denied: u64,
    pub flows: u64,
    pub echoes: u64,
    pub queries: u64,
}

#[derive(Debug)]
pub(crate) struct Session {
    pub id: u64,
    pub name: String,
    pub command: String,
    pub pid: u32,
    pub publish: Vec<Publication>,
    pub loopback: LoopbackMode,
    pub tun: TunAddresses,
    pub policy: Policy,
    /// Which kernel serves what.
    pub routes: Routes,
    pub names: NameMemory,
    /// Which state of the host's names `names` has, and when it was looked at.
    pub hosts_version: u64,
    pub hosts_looked: Instant,
    pub listeners: Listeners,
    /// Bound outside and not used yet: address and socket.
    pub reserved: Vec<(SocketAddr, OwnedFd)>,
    pub ports: Ports,
    /// Who holds its sockets: its programs, or, for a guest, the device beside this broker.
    pub holder: Holder,
    pub started: Instant,
    pub started_at: SystemTime,
    pub counts: Counts,
}

impl Session {
    pub fn new(id: u64, hello: &Hello, routes: &[Route]) -> Result<Self, BrokerError> {
        Ok(Self {
            id,
            name: hello.name.clone(),
            command: hello.command.clone(),
            pid: hello.pid,
            publish: hello.publish.clone(),
            loopback: hello.loopback,
            tun: hello.tun,
            policy: Policy::new(&hello.rules, hello.no_net, hello.loopback)?,
            routes: Routes::after(routes.to_vec(), id),
            names: NameMemory::new(MAX_NAMES),
            hosts_version: 0,
            hosts_looked: Instant::now(),
            listeners: Listeners::new().map_err(BrokerError::kernel("cannot watch listeners"))?,
            reserved: Vec::new(),
            ports: Ports::new(MAX_SENDERS),
            holder: Holder::Program,
            started: Instant::now(),
            started_at: SystemTime::now(),
            counts: Counts::default(),
        })
    }

    /// Whether a destination is permitted; why not, if it is not.
    pub fn decide(
        &self,
        broker: &Policy,
        address: IpAddr,
        port: u16,
        protocol: Protocol,
        host: bool,
    ) -> Result<(), Reason> {
        let mut names = Vec::new();
        self.names_into(address, &mut names);
        let target = Target { address, port, protocol, names: &names, host };
        match Policy::both(broker, &self.policy, &target) {
            Decision::Allow => Ok(()),
            Decision::Deny(reason) => Err(reason),
        }
    }

    /// Whether a rule of this session names a guest, by its name or address: `*` is not meant to.
    pub fn may_reach_guest(&self, address: IpAddr, port: u16) -> Result<(), Reason> {
        let mut names = Vec::new();
        self.names_into(address, &mut names);
        let target = Target { address, port, protocol: Protocol::Tcp, names: &names, host: false };
        if self.policy.singles_out(&target) { Ok(()) } else { Err(Reason::NotAllowed) }
    }

    fn names_into<'a>(&'a self, address: IpAddr, names: &mut Vec<&'a str>) {
        if self.tun.is_gateway(address) {
            names.push(HOST_NAME);
        } else {
            self.names.names_of(address, Instant::now(), names);
        }
    }

    /// The names of an address, for people.
    pub fn names_for_people(&self, address: IpAddr) -> Vec<String> {
        let mut names = Vec::new();
        self.names_into(address, &mut names);
        names.into_iter().map(str::to_owned).collect()
    }
}
