//! The session's broker: in this process, or behind a socket.

use crate::commands::volumes;
use anyhow::{Result, bail};
use kso_broker::{Broker, BrokerConfig, Embedded, FilesRoute};
use kso_core::files::Volume;
use kso_runner::RemoteLink;
use kso_wire::{BrokerLink, Hello};
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// Either.
pub enum Session {
    /// Served by this process.
    Embedded(Box<Embedded>),
    /// Served by `kso broker`.
    Remote(Box<RemoteLink>),
}

impl Session {
    pub fn embedded(config: BrokerConfig, hello: &Hello) -> Result<Self> {
        let mut broker = Broker::new(config)?;
        let session = broker.open_session(hello)?;
        Ok(Self::Embedded(Box::new(Embedded::new(broker, session))))
    }

    pub fn remote(path: &Path, hello: Hello) -> Result<Self> {
        let (link, _) = RemoteLink::open(path, hello)?;
        Ok(Self::Remote(Box::new(link)))
    }

    /// Tells under which process the sandbox's programs are found.
    pub fn started(&mut self, pid: u32) {
        if let Self::Embedded(link) = self {
            let session = link.session();
            link.broker_mut().set_pid(session, pid);
        }
    }

    /// Starts the external kernels that it needs. The sandbox is made before: that takes a process without threads.
    pub fn start_kernels(&mut self) -> Result<()> {
        if let Self::Embedded(link) = self {
            let session = link.session();
            link.broker_mut().start_kernels(session)?;
        }
        Ok(())
    }

    /// The way to a directory that another kernel performs.
    pub fn files(&mut self, volume: &Volume) -> Result<Arc<FilesRoute>> {
        match self {
            Self::Embedded(link) => volumes::route(link.broker_mut(), volume),
            // Refused when it was read.
            Self::Remote(_) => bail!("{}: not by another process's broker", volumes::name(volume)),
        }
    }

    pub fn link(&mut self) -> &mut dyn BrokerLink {
        match self {
            Self::Embedded(link) => link.as_mut(),
            Self::Remote(link) => link.as_mut(),
        }
    }

    pub fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Embedded(link) => link.poll_fd(),
            Self::Remote(link) => link.poll_fd(),
        }
    }

    pub fn next_deadline(&self) -> Option<Instant> {
        match self {
            Self::Embedded(link) => link.broker().next_deadline(),
            Self::Remote(_) => None,
        }
    }

    /// Serves what is ready in the broker itself.
    pub fn run_ready(&mut self) {
        if let Self::Embedded(link) = self {
            link.broker_mut().run_ready();
        }
    }
}
