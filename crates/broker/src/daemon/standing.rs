//! Guests of the configuration: something else starts their VMMs, which find their devices on sockets of ours.

use super::bind;
use crate::broker::Broker;
use crate::config::BrokerError;
use crate::guest::Devices;
use kso_core::config::{Guest, VsockSocket};
use kso_devices::fs::{FsMount, Source};
use kso_devices::vsock::{Endpoint, GuestId};
use kso_files::Share;
use kso_wire::{Hello, LoopbackMode, TunAddresses, VERSION};
use rustix::net::SocketType;
use std::fs;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// Guests, for as long as the broker runs.
#[derive(Debug, Default)]
pub(super) struct Standing {
    guests: Vec<GuestId>,
    /// Served by threads of their own until they are dropped.
    mounts: Vec<FsMount>,
    sockets: Vec<PathBuf>,
}

impl Standing {
    pub fn add(
        &mut self,
        broker: &mut Broker,
        devices: &mut Devices,
        guest: &Guest,
        group: Option<u32>,
    ) -> Result<(), BrokerError> {
        let hello = Hello {
            version: VERSION,
            name: guest.name.clone(),
            command: String::new(),
            pid: 0,
            rules: guest.rules.clone(),
            no_net: guest.no_net,
            publish: guest.publish.clone(),
            loopback: LoopbackMode::Private,
            tun: TunAddresses::standard(),
        };
        let added = match &guest.vsock {
            VsockSocket::VhostUser(path) => {
                let endpoint = Endpoint::Listener(self.listen(path, group)?);
                devices.add(broker, endpoint, &hello, Vec::new())?
            }
            VsockSocket::Hybrid(path) => devices.add_hybrid(broker, path, &hello)?,
        };
        self.guests.push(added);
        for share in &guest.shares {
            let listener = self.listen(&share.socket, group)?;
            let what = Share::new(&share.directory);
            let what = if share.read_only { what.read_only() } else { what };
            let mount = FsMount::serve(Source::Listener(listener), &share.tag, what).map_err(|error| {
                BrokerError::Socket { path: share.socket.clone(), source: io::Error::other(error) }
            })?;
            if let Some(files) = mount.files() {
                devices.offer_files(added, &share.tag, files);
            }
            self.mounts.push(mount);
        }
        Ok(())
    }

    fn listen(&mut self, path: &Path, group: Option<u32>) -> Result<UnixListener, BrokerError> {
        let listener = bind(path, group, SocketType::STREAM)
            .map_err(|source| BrokerError::Socket { path: path.to_owned(), source })?;
        self.sockets.push(path.to_owned());
        Ok(listener.into())
    }

    pub fn end(&mut self, broker: &mut Broker, devices: &mut Devices) {
        for guest in self.guests.drain(..) {
            devices.remove(broker, guest);
        }
        self.mounts.clear();
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        for path in &self.sockets {
            let _ = fs::remove_file(path);
        }
    }
}
