//! The directories that a broker has.
//!
//! ```text
//!   Share --> a thread of its own: found, opened -- Shared --> FUSE on its stream -- its end --> Ended
//!                                     +-- Failed
//! ```
//!
//! A directory may be on a slow disk, so nothing of it runs in the session's loop. Each has a file service of its own: what its
//! client held ends with its stream. When the session ends so do its streams.

use super::exports::{self, Export, Found};
use kso_files::{Cache, Service, Share, ShareError};
use kso_wire::Errno;
use kso_wire::provide::{self, Caching, StreamId, ToBroker};
use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{Shutdown, shutdown};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How long a client may believe what it was told of an image, which nobody changes.
const IMAGE: Duration = Duration::from_secs(3600);

/// What threads say, for the session to pass on.
#[derive(Debug)]
struct Said {
    messages: Mutex<Vec<ToBroker>>,
    wake: OwnedFd,
}

impl Said {
    fn say(&self, message: ToBroker) {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner).push(message);
        // Full: it is awake.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Shares {
    /// Our ends of the streams, to shut them down.
    all: HashMap<StreamId, OwnedFd>,
    said: Arc<Said>,
    descriptors: usize,
}

impl Shares {
    /// Each directory may hold a part of the descriptors of this process: so many at a time may be shared.
    pub fn new(most: usize) -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let limit = kso_sys::process::open_files_limit().map_or(1024, |(soft, _)| soft);
        let descriptors = usize::try_from(limit / 2).unwrap_or(usize::MAX) / most.max(1);
        Ok(Self {
            all: HashMap::new(),
            said: Arc::new(Said { messages: Mutex::default(), wake }),
            descriptors: descriptors.max(256),
        })
    }

    pub fn count(&self) -> usize {
        self.all.len()
    }

    pub fn knows(&self, id: StreamId) -> bool {
        self.all.contains_key(&id)
    }

    /// Readable when [`Self::messages`] has some.
    pub fn poll_fd(&self) -> BorrowedFd<'_> {
        self.said.wake.as_fd()
    }

    /// What is to be told.
    pub fn messages(&mut self) -> Vec<ToBroker> {
        let _ = rustix::io::read(&self.said.wake, &mut [0_u8; 8]);
        let said = std::mem::take(&mut *self.said.messages.lock().unwrap_or_else(PoisonError::into_inner));
        for message in &said {
            if let ToBroker::Failed { stream, .. } | ToBroker::Ended { stream, .. } = message {
                self.all.remove(stream);
            }
        }
        said
    }

    /// Begins to serve a directory.
    pub fn open(
        &mut self,
        exports: Arc<[Export]>,
        order: provide::Share,
        stream: OwnedFd,
    ) -> Result<(), Errno> {
        let told = |error: &io::Error| kso_sys::errno::of(error);
        let own = stream.try_clone().map_err(|error| told(&error))?;
        let (said, descriptors, id) = (self.said.clone(), self.descriptors, order.stream);
        std::thread::Builder::new()
            .name("kso-share".into())
            .spawn(move || {
                let ended = serve(&exports, &order, stream, descriptors, &said);
                if let Err(errno) = ended {
                    said.say(ToBroker::Failed { stream: id, errno });
                }
            })
            .map_err(|error| told(&error))?;
        self.all.insert(id, own);
        Ok(())
    }

    /// Nothing more is read from them; what was is answered.
    pub fn drain(&self) {
        for stream in self.all.values() {
            let _ = shutdown(stream, Shutdown::Read);
        }
    }
}

impl Drop for Shares {
    fn drop(&mut self) {
        for stream in self.all.values() {
            let _ = shutdown(stream, Shutdown::Both);
        }
    }
}

/// Serves until the stream ends. An error: it was never served.
fn serve(
    exports: &[Export],
    order: &provide::Share,
    stream: OwnedFd,
    descriptors: usize,
    said: &Said,
) -> Result<(), Errno> {
    let path = Path::new(OsStr::from_bytes(&order.path));
    let shared = || {
        tracing::info!(path = %path.display(), "a directory is shared");
        said.say(ToBroker::Shared { stream: order.stream });
    };
    let ended = match exports::find(exports, path)? {
        Found::Directory { directory, read_only } => {
            let service = service(&directory, order, read_only, descriptors).map_err(|error| {
                tracing::warn!(path = %path.display(), %error, "a directory cannot be shared");
                Errno::EIO
            })?;
            drop(directory);
            shared();
            kso_files::stream::serve(service, stream)
        }
        Found::Image { image, path } => {
            let validity = if order.caching == Caching::None { Duration::ZERO } else { IMAGE };
            let volume = image.volume(&path, validity).map_err(crate::errno)?;
            shared();
            volume.serve(stream)
        }
    };
    let errno = ended.err().map(|error| {
        tracing::warn!(path = %path.display(), %error, "a directory is not shared any more");
        kso_sys::errno::of(&error)
    });
    said.say(ToBroker::Ended { stream: order.stream, bytes_in: 0, bytes_out: 0, errno });
    Ok(())
}

/// The file service of a directory, by its descriptor: its path may lead elsewhere by now.
fn service(
    directory: &OwnedFd,
    order: &provide::Share,
    read_only: bool,
    descriptors: usize,
) -> Result<Arc<Service>, ShareError> {
    let mut share = Share::new(format!("/proc/self/fd/{}", directory.as_raw_fd()));
    if order.read_only || read_only {
        share = share.read_only();
        share.mounted_read_only = order.read_only;
    }
    share.cache = match order.caching {
        Caching::None => Cache::None,
        Caching::Auto => Cache::Auto,
        Caching::Always => Cache::Always,
    };
    share.descriptors = Some(descriptors);
    Service::detached(share)
}
