//! A provider somewhere else, over mutual TLS: each stream is a connection of its own that begins with a ticket.

use crate::carrier::Carrier;
use crate::make::StartError;
use kso_core::kernels::KernelSpec;
use kso_tls::identity::Files;
use kso_tls::{Dialer, Target};
use kso_wire::provide::Ticket;
use rustix::net::{SendFlags, send};
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;

/// See the module.
#[derive(Debug)]
pub(crate) struct Remote {
    dialer: Dialer,
    /// As the user calls it.
    address: String,
}

impl Remote {
    /// Begins to connect; whether that comes to something, the control stream tells.
    pub fn start(spec: &KernelSpec) -> Result<(Self, OwnedFd), StartError> {
        let Some(spec) = &spec.remote else {
            let hint = "NAME=remote,address=HOST:PORT,ca=FILE,cert=FILE,key=FILE";
            return Err(StartError::Missing { what: "where the provider is".into(), hint });
        };
        let address = match spec.host.contains(':') {
            true => format!("[{}]:{}", spec.host, spec.port),
            false => format!("{}:{}", spec.host, spec.port),
        };
        let addresses: Vec<SocketAddr> = (spec.host.as_str(), spec.port)
            .to_socket_addrs()
            .map_err(StartError::step(format!("find the address of {}", spec.host)))?
            .collect();
        let files = Files { ca: spec.ca.clone(), cert: spec.cert.clone(), key: spec.key.clone() };
        let target = Target::new(addresses, &spec.server_name, &files).map_err(Box::new)?;
        let (dialer, control) = Dialer::start(target).map_err(StartError::step("dial a provider"))?;
        Ok((Self { dialer, address }, control))
    }
}

impl Carrier for Remote {
    fn open(&mut self, ticket: Ticket) -> io::Result<OwnedFd> {
        let stream = self.dialer.open()?;
        // The stream is new: there is room for so little.
        send(&stream, &ticket.bytes(), SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?;
        Ok(stream)
    }

    fn explain(&mut self, gone: bool) -> Option<String> {
        // What it said before it went is the better reason.
        let why = self.dialer.fate().filter(|_| gone)?;
        Some(format!("the provider at {}: {why}", self.address))
    }
}
