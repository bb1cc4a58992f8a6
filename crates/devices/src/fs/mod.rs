//! The file system device: virtiofs (virtio 1.2, 5.11) whose requests a [`kso_files::Service`] performs, or another kernel.
//!
//! ```text
//!   VMM == unix socket ==> the mount's thread: FrontEnd -- Started(i, Queue) --> a thread for each queue
//!                                                                                 |  Ring: pop, push, signal
//!                                                            kso_files::Server <--+
//!   locks that were waited for: a thread of the service's --> Late: push, signal
//!   replies of another kernel: a thread of the relay's -----> Late
//! ```
//!
//! Files may block, so none of this runs in the broker's loop. A mount's threads end when its VMM is gone and nobody else can
//! come, or when its [`FsMount`] is dropped.

mod chain;
mod late;
mod queue;
mod spin;

use crate::vhost::{Change, FrontEnd, Spec};
use kso_files::relay::{Dial, Relay};
use kso_files::{Files, Performer, Service, Share, ShareError};
use late::Late;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread::JoinHandle;

/// Bytes of a tag (`struct virtio_fs_config`).
pub const MAX_TAG: usize = 36;
/// Queues besides the first: requests of the guest.
pub const REQUEST_QUEUES: usize = 4;

/// Where VMMs come from.
#[derive(Debug)]
pub enum Source {
    /// A connection, or the other end of a socketpair that the VMM was given.
    Stream(UnixStream),
    /// One after the other.
    Listener(UnixListener),
}

/// Why a directory is not served.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// It cannot be shared.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// Its tag is too long.
    #[error("the tag {0:?} has more than {MAX_TAG} bytes")]
    Tag(String),
    /// Descriptors or threads ran out.
    #[error("cannot serve files: {0}")]
    Io(#[from] io::Error),
}

/// A directory that is served to a VMM. Dropped, it is served no more.
#[derive(Debug)]
pub struct FsMount {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
    files: Option<Files>,
}

impl FsMount {
    /// Serves `share` to the VMM, whose guest mounts it by `tag`. (The tag is the VMM's to tell the guest: all of them take
    /// it, and the number of queues, on their own command line.)
    ///
    /// # Errors
    /// See [`FsError`].
    pub fn serve(source: Source, tag: &str, share: Share) -> Result<Self, FsError> {
        let late = Arc::new(Late::default());
        let performer = Performer::Local(Service::new(share, late.clone())?);
        Self::perform(source, tag, performer, late)
    }

    /// The same of a share that another kernel performs. It is dialled when the guest mounts.
    ///
    /// # Errors
    /// See [`FsError`].
    pub fn relay(source: Source, tag: &str, dial: Arc<dyn Dial>) -> Result<Self, FsError> {
        let late = Arc::new(Late::default());
        let performer = Performer::Relayed(Relay::new(dial, late.clone())?);
        Self::perform(source, tag, performer, late)
    }

    fn perform(source: Source, tag: &str, performer: Performer, late: Arc<Late>) -> Result<Self, FsError> {
        if tag.len() > MAX_TAG {
            return Err(FsError::Tag(tag.to_owned()));
        }
        let stop =
            Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(io::Error::from)?);
        let files = match &performer {
            Performer::Local(service) => Some(Files::of(service.clone())),
            Performer::Relayed(_) => None,
        };
        let mount = Mount {
            spec: Spec { features: 0, queues: REQUEST_QUEUES + 1, config: Vec::new() },
            performer,
            late,
            stop: stop.clone(),
        };
        let thread =
            std::thread::Builder::new().name(format!("fs-{tag}")).spawn(move || mount.run(source))?;
        Ok(Self { stop, thread: Some(thread), files })
    }

    /// Its files, for a [`crate::vsock::Hub`] that sends from them; `None`: another kernel has them.
    #[must_use]
    pub fn files(&self) -> Option<Files> {
        self.files.clone()
    }

    /// Whether it is served still.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }
}

impl Drop for FsMount {
    fn drop(&mut self) {
        wake(&self.stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Makes an eventfd readable.
fn wake(event: &OwnedFd) {
    // A full counter is readable already.
    let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
}

struct Mount {
    spec: Spec,
    performer: Performer,
    late: Arc<Late>,
    stop: Arc<OwnedFd>,
}

/// A queue that runs.
struct Running {
    index: usize,
    stop: Arc<OwnedFd>,
    thread: JoinHandle<()>,
}

impl Mount {
    fn run(&self, source: Source) {
        match source {
            Source::Stream(stream) => self.connection(stream),
            Source::Listener(listener) => {
                while self.readable(&listener) {
                    match listener.accept() {
                        Ok((stream, _)) => self.connection(stream),
                        Err(error) => tracing::warn!(%error, "a VMM could not be accepted"),
                    }
                }
            }
        }
    }

    /// Waits for a descriptor. `false`: it is time to stop.
    fn readable(&self, descriptor: &impl AsFd) -> bool {
        loop {
            let mut polled = [PollFd::new(&self.stop, PollFlags::IN), PollFd::new(descriptor, PollFlags::IN)];
            match poll(&mut polled, None) {
                Ok(_) => return polled.first().is_some_and(|stop| stop.revents().is_empty()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "poll");
                    return false;
                }
            }
        }
    }

    fn connection(&self, stream: UnixStream) {
        let mut front = match FrontEnd::new(stream, self.spec.clone()) {
            Ok(front) => front,
            Err(error) => return tracing::warn!(%error, "a VMM cannot be served"),
        };
        let mut running = Vec::new();
        while self.readable(&front) {
            match front.handle() {
                Ok(changes) => self.apply(changes, &mut running),
                Err(error) => {
                    tracing::debug!(%error, "a VMM is gone");
                    break;
                }
            }
        }
        if matches!(self.performer, Performer::Relayed(_)) {
            // Threads that wait for another kernel wait no more.
            self.performer.disconnect();
        }
        self.apply(front.close(), &mut running);
        running.drain(..).for_each(Running::end);
        self.performer.disconnect();
        self.late.clear();
    }

    fn apply(&self, changes: Vec<Change>, running: &mut Vec<Running>) {
        for change in changes {
            match change {
                Change::Started(index, queue) => {
                    match queue::start(index, queue, self.performer.clone(), self.late.clone()) {
                        Ok((stop, thread)) => running.push(Running { index, stop, thread }),
                        Err(error) => tracing::error!(%error, index, "a queue cannot be served"),
                    }
                }
                Change::Stopped(index) => {
                    while let Some(at) = running.iter().position(|running| running.index == index) {
                        running.swap_remove(at).end();
                    }
                }
            }
        }
    }
}

impl Running {
    fn end(self) {
        wake(&self.stop);
        let _ = self.thread.join();
    }
}
