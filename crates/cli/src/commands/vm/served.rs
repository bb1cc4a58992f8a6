//! Who serves the guest's device: this process, or a broker behind a socket.

use crate::commands::volumes;
use anyhow::{Context, Result, bail};
use kso_broker::guest::Devices;
use kso_broker::{Broker, BrokerConfig, FilesRoute};
use kso_core::files::Volume;
use kso_devices::vsock::{Endpoint, GuestId};
use kso_files::Files;
use kso_wire::{GuestHello, Hello, MAX_MESSAGE, ToBroker, ToRunner, decode, encode};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The broker must welcome a guest within this time.
const PATIENCE: Duration = Duration::from_secs(10);

/// See the module.
pub enum Served {
    /// Here.
    Here(Box<Here>),
    /// By `kso broker`, which ends the guest's network when this socket is closed.
    Broker(OwnedFd),
}

/// A broker in this process.
pub struct Here {
    broker: Broker,
    devices: Devices,
    guest: Option<GuestId>,
}

impl Served {
    /// A broker in this process, without a guest yet.
    pub fn here(config: BrokerConfig) -> Result<Self> {
        Ok(Self::Here(Box::new(Here { broker: Broker::new(config)?, devices: Devices::new()?, guest: None })))
    }

    /// The broker that listens at `path`.
    pub fn broker(path: &Path) -> Result<Self> {
        let hint = || {
            let path = path.display();
            format!("no broker answers at {path} (start one with: kso broker --listen {path})")
        };
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        let address = SocketAddrUnix::new(path).with_context(hint)?;
        rustix::net::connect(&socket, &address).with_context(hint)?;
        Ok(Self::Broker(socket))
    }

    /// Opens the guest's session; the VMM comes by `vmm`.
    pub fn open(&mut self, vmm: UnixStream, hello: &Hello, streams: Vec<(u32, OwnedFd)>) -> Result<()> {
        match self {
            Self::Here(here) => {
                let guest = here.devices.add(&mut here.broker, Endpoint::Connected(vmm), hello, streams)?;
                here.guest = Some(guest);
                Ok(())
            }
            Self::Broker(socket) => ask(socket, vmm, hello, streams),
        }
    }

    /// The way to a directory that another kernel performs.
    pub fn files(&mut self, volume: &Volume) -> Result<Arc<FilesRoute>> {
        match self {
            Self::Here(here) => volumes::route(&mut here.broker, volume),
            // Refused when it was read.
            Self::Broker(_) => bail!("{}: not by another process's broker", volumes::name(volume)),
        }
    }

    /// Lets the guest send from the files of a share without their passing it. A broker in another process has no files.
    pub fn offer_files(&mut self, share: &str, files: Files) {
        if let Self::Here(here) = self
            && let Some(guest) = here.guest
        {
            here.devices.offer_files(guest, share, files);
        }
    }

    /// A descriptor that is rarely readable: then [`Self::run_rare`] has something to do.
    pub fn rare_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Here(here) => here.broker.poll_fd(),
            Self::Broker(socket) => socket.as_fd(),
        }
    }

    /// Waits until something is ready, serves the device, and tells whether `others` is readable.
    pub fn wait(&mut self, others: BorrowedFd<'_>, deadline: Option<Instant>) -> io::Result<bool> {
        match self {
            Self::Here(here) => {
                let deadline = [here.broker.next_deadline(), deadline].into_iter().flatten().min();
                let (ready, others) = here.devices.wait(others, deadline)?;
                here.devices.run_ready(&mut here.broker, ready);
                if here.broker.next_deadline().is_some_and(|deadline| deadline <= Instant::now()) {
                    here.broker.run_ready();
                }
                here.settle();
                Ok(others)
            }
            Self::Broker(_) => {
                let timeout = deadline.map(|at| at.saturating_duration_since(Instant::now()));
                let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
                let mut polled = [PollFd::from_borrowed_fd(others, PollFlags::IN)];
                match poll(&mut polled, timeout.as_ref()) {
                    Ok(ready) => Ok(ready > 0),
                    Err(rustix::io::Errno::INTR) => Ok(false),
                    Err(error) => Err(error.into()),
                }
            }
        }
    }

    /// Serves what is rare. False: the broker is gone.
    pub fn run_rare(&mut self) -> bool {
        match self {
            Self::Here(here) => {
                here.broker.run_ready();
                here.settle();
                true
            }
            Self::Broker(socket) => {
                let mut message = [0; 16];
                let received = rustix::net::recv(&*socket, &mut message, RecvFlags::DONTWAIT);
                matches!(received, Ok((1.., _)) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR))
            }
        }
    }

    /// The VMM is gone: what the guest said before is still on its way.
    pub fn run_last(&mut self) {
        if let Self::Here(here) = self {
            here.devices.run_ready(&mut here.broker, [true, false]);
        }
    }
}

impl Here {
    /// What the broker has for the device and the gateway.
    fn settle(&mut self) {
        while let Some((session, id, answer)) = self.broker.completed() {
            self.devices.answered(&mut self.broker, session, id, answer);
        }
        self.devices.serve_orders(&mut self.broker);
    }
}

impl Drop for Here {
    fn drop(&mut self) {
        if let Some(guest) = self.guest {
            self.devices.remove(&mut self.broker, guest);
        }
    }
}

fn ask(socket: &OwnedFd, vmm: UnixStream, hello: &Hello, streams: Vec<(u32, OwnedFd)>) -> Result<()> {
    let ports = streams.iter().map(|(port, _)| *port).collect();
    let message = encode(&ToBroker::Guest(GuestHello { hello: hello.clone(), ports }))?;
    let descriptors: Vec<_> =
        std::iter::once(vmm.as_fd()).chain(streams.iter().map(|(_, end)| end.as_fd())).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(9))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        bail!("too many streams for one message");
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(&message)], &mut ancillary, SendFlags::NOSIGNAL)
        .context("cannot speak to the broker")?;
    let timeout = Timespec { tv_sec: PATIENCE.as_secs().cast_signed(), tv_nsec: 0 };
    let mut polled = [PollFd::new(socket, PollFlags::IN)];
    if poll(&mut polled, Some(&timeout)).context("cannot wait for the broker")? == 0 {
        bail!("the broker did not answer within {} s", PATIENCE.as_secs());
    }
    let mut answer = vec![0; MAX_MESSAGE];
    let (count, _) =
        rustix::net::recv(socket, &mut *answer, RecvFlags::empty()).context("cannot hear the broker")?;
    match answer.get(..count).filter(|answer| !answer.is_empty()).map(decode) {
        Some(Ok(ToRunner::Welcome(_))) => Ok(()),
        Some(Ok(ToRunner::Refused(reason))) => bail!("the broker refused the guest: {reason}"),
        Some(_) => bail!("the broker is of another version of kso"),
        None => bail!("the broker closed the connection: it may be of another version of kso"),
    }
}
