//! A share mounted on this host: requests come from /dev/fuse.
//!
//! For a directory of this host's own kernel a bind mount is the native way; this is for shares that something else performs,
//! and it is how the service is tested without a guest.

use crate::locks::Completer;
use crate::passthrough::Passthrough;
use crate::service::{MAX_WRITE, Service, ShareError};
use crate::worker::{Outcome, Worker, bare_reply};
use crate::{Pieces, Share};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use vm_memory::VolatileSlice;

/// Room for the headers of the longest request.
const HEADERS: usize = 4096;

/// How to mount.
#[derive(Clone, Copy, Debug)]
pub struct MountOptions {
    /// Threads that serve.
    pub threads: usize,
    /// Reads and writes go past the service where the kernel can do so (Linux 6.9, as root).
    pub passthrough: bool,
    /// Set-user-id bits and device nodes mean nothing.
    pub no_privilege: bool,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self { threads: 2, passthrough: true, no_privilege: true }
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
    /// A thread.
    #[error("cannot start a thread: {0}")]
    Thread(#[source] io::Error),
}

/// A mounted share. Dropped, it is unmounted.
#[derive(Debug)]
pub struct Mounted {
    target: PathBuf,
    threads: Vec<JoinHandle<()>>,
}

/// Replies of locks that were waited for.
#[derive(Debug)]
struct Replies(OwnedFd);

impl Completer for Replies {
    fn complete(&self, unique: u64, error: i32) {
        if let Err(error) = rustix::io::write(&self.0, &bare_reply(unique, error)) {
            tracing::debug!(%error, "nobody waits for a lock any more");
        }
    }
}

/// Mounts `share` on `target`.
///
/// # Errors
/// See [`MountError`].
pub fn mount(share: Share, target: &Path, options: MountOptions) -> Result<Mounted, MountError> {
    let device = open_device().map_err(MountError::Device)?;
    let copy = || device.try_clone().map_err(MountError::Device);
    let service = Service::with_passthrough(share, Arc::new(Replies(copy()?)), options.passthrough)?;
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
    flags.set(MountFlags::RDONLY, service.share.read_only);
    let data = CString::new(data).map_err(|_| failed(Errno::INVAL))?;
    rustix::mount::mount("kso", target, "fuse", flags, data.as_c_str()).map_err(failed)?;
    let mut mounted = Mounted { target: target.to_owned(), threads: Vec::new() };
    for index in 0..options.threads.max(1) {
        let own = if index == 0 { copy()? } else { another(&device).map_err(MountError::Device)? };
        let control = copy()?;
        let service = service.clone();
        let thread = std::thread::Builder::new().name("kso-files".into()).spawn(move || {
            if let Err(error) = serve(service, &own, control) {
                tracing::error!(%error, "a mount is not served any more");
            }
        });
        mounted.threads.push(thread.map_err(MountError::Thread)?);
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

fn serve(service: Arc<Service>, device: &OwnedFd, control: OwnedFd) -> io::Result<()> {
    let passthrough = service.passes_backing();
    let mut worker = Worker::new(service)?;
    worker.passthrough = passthrough.then(|| Arc::new(Passthrough(control)));
    let mut request = vec![0; MAX_WRITE as usize + HEADERS];
    let mut reply = vec![0; MAX_WRITE as usize + HEADERS];
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
        let outcome = worker.serve(Pieces::new(&readable), Pieces::new(&writable));
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
        // Aborts what is still asked: a thread that waits for the last user would wait for ever.
        if let Err(error) = rustix::mount::unmount(&self.target, UnmountFlags::FORCE | UnmountFlags::DETACH) {
            tracing::debug!(%error, target = %self.target.display(), "was not mounted any more");
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
