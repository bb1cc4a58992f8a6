//! A share mounted on this host: requests come from /dev/fuse.
//!
//! For a directory of this host's own kernel a bind mount is the native way; this is for shares that something else performs,
//! and it is how the service is tested without a guest.

use crate::frames::MAX_FRAME;
use crate::inodes::lock;
use crate::locks::Completer;
use crate::passthrough::Passthrough;
use crate::performer::{Performer, Server};
use crate::relay::{Dial, Relay};
use crate::service::{Service, ShareError};
use crate::worker::{Outcome, bare_reply};
use crate::{Pieces, Share};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use vm_memory::VolatileSlice;

/// How long a kernel elsewhere may take to answer the mount.
const MOUNT_LIMIT: Duration = Duration::from_secs(90);

/// How to mount.
#[derive(Clone, Copy, Debug)]
pub struct MountOptions {
    /// Threads that serve.
    pub threads: usize,
    /// Reads and writes go past the service where the kernel can do so (Linux 6.9, as root).
    pub passthrough: bool,
    /// Nothing can be written, as of a share that is read-only. (Of a share elsewhere that is not told.)
    pub read_only: bool,
    /// Set-user-id bits and device nodes mean nothing.
    pub no_privilege: bool,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self { threads: 2, passthrough: true, read_only: false, no_privilege: true }
    }
}

/// Why a share was not mounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// It cannot be shared.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// /dev/fuse.
    #[error("cannot open /dev/fuse: {0} (modprobe fuse; in a container, give it the device)")]
    Device(#[source] io::Error),
    /// mount(2).
    #[error("cannot mount on {target}: {source}")]
    Mount {
        /// Where.
        target: String,
        /// What the kernel says.
        source: io::Error,
    },
    /// There is no file service elsewhere, or it does not do what is wanted.
    #[error("the kernel that is to perform these files cannot be had: {0}")]
    Unreachable(#[source] io::Error),
    /// A thread.
    #[error("cannot start a thread: {0}")]
    Thread(#[source] io::Error),
}

/// A mounted share. Dropped, it is unmounted.
#[derive(Debug)]
pub struct Mounted {
    target: PathBuf,
    threads: Vec<JoinHandle<()>>,
    relay: Option<Arc<Relay>>,
}

/// Replies that come late.
#[derive(Debug, Default)]
struct Replies {
    /// A request is known by the one from which it was read only.
    devices: Mutex<Vec<OwnedFd>>,
}

impl Replies {
    fn add(&self, device: OwnedFd) {
        lock(&self.devices).push(device);
    }

    fn write(&self, reply: &[u8]) -> Result<(), Errno> {
        let devices = lock(&self.devices);
        let mut result = Err(Errno::NOENT);
        for device in devices.iter() {
            result = rustix::io::write(device, reply).map(drop);
            if result != Err(Errno::NOENT) {
                break;
            }
        }
        result
    }
}

impl Completer for Replies {
    fn reply(&self, ticket: u64, reply: &[u8]) {
        match self.write(reply) {
            Ok(()) => {}
            Err(Errno::INVAL) => {
                // The kernel takes no such answer, and somebody waits.
                tracing::warn!(ticket, length = reply.len(), "a reply was refused");
                let unique = reply
                    .get(8..)
                    .and_then(|rest| rest.first_chunk())
                    .map_or(0, |own| u64::from_ne_bytes(*own));
                let _ = self.write(&bare_reply(unique, Errno::IO.raw_os_error()));
            }
            Err(error) => tracing::debug!(%error, "nobody waits for a reply any more"),
        }
    }
}

/// Mounts `share` on `target`.
///
/// # Errors
/// See [`MountError`].
pub fn mount(share: Share, target: &Path, options: MountOptions) -> Result<Mounted, MountError> {
    let replies = Arc::new(Replies::default());
    let service = Service::open(share, Some(replies.clone()), options.passthrough)?;
    let options = MountOptions { read_only: options.read_only || service.share.read_only, ..options };
    serve_at(target, options, Performer::Local(service), &replies)
}

/// Mounts on `target` what another kernel performs. (Nothing then goes past that kernel: `options.passthrough` is ignored.)
///
/// # Errors
/// See [`MountError`]. Without a performer nothing is mounted.
pub fn mount_relayed(
    dial: Arc<dyn Dial>,
    target: &Path,
    options: MountOptions,
) -> Result<Mounted, MountError> {
    let replies = Arc::new(Replies::default());
    let relay = Relay::new(dial, replies.clone()).map_err(MountError::Thread)?;
    relay.reach().map_err(MountError::Unreachable)?;
    let options = MountOptions { passthrough: false, ..options };
    let mounted = serve_at(target, options, Performer::Relayed(relay.clone()), &replies)?;
    relay.mounted(MOUNT_LIMIT).map_err(MountError::Unreachable)?;
    Ok(mounted)
}

/// A mount that was made elsewhere and is served here. Dropped, it is served no more, and whoever asks gets errors; it is
/// unmounted where it was mounted.
#[derive(Debug)]
pub struct Served {
    relay: Arc<Relay>,
}

impl Drop for Served {
    fn drop(&mut self) {
        // Its threads end with the mount: until then they answer.
        self.relay.close();
    }
}

/// Serves `device`, a /dev/fuse that was mounted already, in another mount and user namespace perhaps, by what another kernel
/// performs. (The mount belongs to the user namespace in which the device was opened, so it cannot be made from here.)
///
/// # Errors
/// See [`MountError`]. Then nobody answers, and the mount fails when the device is closed.
pub fn serve_relayed(dial: Arc<dyn Dial>, device: &OwnedFd, threads: usize) -> Result<Served, MountError> {
    let copy = || device.try_clone().map_err(MountError::Device);
    let replies = Arc::new(Replies::default());
    replies.add(copy()?);
    let relay = Relay::new(dial, replies).map_err(MountError::Thread)?;
    let served = Served { relay: relay.clone() };
    relay.reach().map_err(MountError::Unreachable)?;
    for _ in 0..threads.max(1) {
        // All replies come late, so it does not matter which thread has read a request.
        let (own, performer) = (copy()?, Performer::Relayed(relay.clone()));
        start(performer, own, copy()?)?;
    }
    relay.mounted(MOUNT_LIMIT).map_err(MountError::Unreachable)?;
    Ok(served)
}

/// A thread that serves a mount.
fn start(performer: Performer, own: OwnedFd, control: OwnedFd) -> Result<JoinHandle<()>, MountError> {
    let thread = std::thread::Builder::new().name("kso-files".into()).spawn(move || {
        if let Err(error) = serve(&performer, &own, control) {
            tracing::error!(%error, "a mount is not served any more");
        }
    });
    thread.map_err(MountError::Thread)
}

fn serve_at(
    target: &Path,
    options: MountOptions,
    performer: Performer,
    replies: &Replies,
) -> Result<Mounted, MountError> {
    let device = open_device().map_err(MountError::Device)?;
    let copy = || device.try_clone().map_err(MountError::Device);
    let failed =
        |source: Errno| MountError::Mount { target: target.display().to_string(), source: source.into() };
    let data = format!(
        "fd={},rootmode=40000,user_id={},group_id={},default_permissions,allow_other",
        device.as_raw_fd(),
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw()
    );
    let mut flags = MountFlags::empty();
    flags.set(MountFlags::NOSUID | MountFlags::NODEV, options.no_privilege);
    flags.set(MountFlags::RDONLY, options.read_only);
    let data = CString::new(data).map_err(|_| failed(Errno::INVAL))?;
    replies.add(copy()?);
    rustix::mount::mount("kso", target, "fuse", flags, data.as_c_str()).map_err(failed)?;
    let relay = match &performer {
        Performer::Local(_) => None,
        Performer::Relayed(relay) => Some(relay.clone()),
    };
    let mut mounted = Mounted { target: target.to_owned(), threads: Vec::new(), relay };
    for index in 0..options.threads.max(1) {
        // All replies of a relay come late: they need not be tried in several places.
        let own = if index == 0 || mounted.relay.is_some() {
            copy()?
        } else {
            let own = another(&device).map_err(MountError::Device)?;
            replies.add(own.try_clone().map_err(MountError::Device)?);
            own
        };
        mounted.threads.push(start(performer.clone(), own, copy()?)?);
    }
    Ok(mounted)
}

fn open_device() -> io::Result<OwnedFd> {
    Ok(rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?)
}

fn another(device: &OwnedFd) -> io::Result<OwnedFd> {
    let own = open_device()?;
    kso_sys::fuse::clone(own.as_fd(), device.as_fd())?;
    Ok(own)
}

fn serve(performer: &Performer, device: &OwnedFd, control: OwnedFd) -> io::Result<()> {
    let mut server = performer.server()?;
    if let (Performer::Local(service), Server::Local(worker)) = (performer, &mut server) {
        worker.passthrough = service.passes_backing().then(|| Arc::new(Passthrough(control)));
    }
    let mut request = vec![0; MAX_FRAME];
    let mut reply = vec![0; MAX_FRAME];
    loop {
        let length = match rustix::io::read(device, &mut request) {
            Ok(length) => length,
            // A request was withdrawn.
            Err(Errno::INTR | Errno::NOENT | Errno::AGAIN) => continue,
            // Unmounted.
            Err(Errno::NODEV | Errno::CONNABORTED) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let readable = [VolatileSlice::from(request.get_mut(..length).unwrap_or_default())];
        let writable = [VolatileSlice::from(reply.as_mut_slice())];
        let outcome = server.serve(Pieces::new(&readable), Pieces::new(&writable));
        if let Outcome::Reply(length) = outcome {
            match rustix::io::write(device, reply.get(..length).unwrap_or_default()) {
                // Who asked was killed.
                Ok(_) | Err(Errno::NOENT) => {}
                Err(Errno::NODEV) => return Ok(()),
                Err(error) => tracing::warn!(%error, length, "a reply was refused"),
            }
        }
    }
}

impl Mounted {
    /// Waits until somebody unmounts it.
    pub fn wait(mut self) {
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.threads.is_empty() {
            return;
        }
        if let Some(relay) = &self.relay {
            relay.close();
        }
        // Aborts what is still asked: a thread that waits for the last user would wait for ever.
        if let Err(error) = rustix::mount::unmount(&self.target, UnmountFlags::FORCE | UnmountFlags::DETACH) {
            tracing::debug!(%error, target = %self.target.display(), "was not mounted any more");
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
