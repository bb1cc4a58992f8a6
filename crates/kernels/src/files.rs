//! Directories that other kernels perform: which of them, and a stream to it.
//!
//! ```text
//!   the relay's thread                       the kernel's thread                  the kernel
//!     FilesRoute::dial -- Command::Share ---->  Share + stream ------------------->  opens the directory
//!                      <-- our end of it -----  <------------------- Shared, Failed
//!                           +-- down, refused --> the next kernel of the route
//! ```
//!
//! A stream is shut down when its kernel dies or falls silent: whoever reads it dials again, and gets one to the next kernel, or
//! to the same once it is up again.

use crate::worker::{Command, Load, Wake};
use kso_files::relay::Dial;
use kso_wire::Errno;
use kso_wire::provide::{Caching, Service, Welcome};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair, sockopt};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

/// Bytes that may wait in a stream: a few of the largest requests.
const STREAM_BUFFER: usize = 4 << 20;
/// How long one of the kernels is waited for to come up.
const COMING: Duration = Duration::from_secs(5);
/// How often it is looked whether one has.
const LOOK: Duration = Duration::from_millis(20);
/// How long a kernel that lives may take to open a directory: its disk may be asleep.
const OPENING: Duration = Duration::from_secs(20);

/// Whether a kernel serves files now.
#[derive(Debug, Default)]
pub(crate) struct Serving(AtomicU8);

const COMING_UP: u8 = 0;
const SERVING: u8 = 1;
const ASIDE: u8 = 2;
const NO_FILES: u8 = 3;

impl Serving {
    pub fn welcomed(&self, welcome: &Welcome) {
        let files = welcome.services.contains(&Service::Files);
        self.0.store(if files { SERVING } else { NO_FILES }, Ordering::Release);
    }

    pub fn down(&self) {
        self.0.store(COMING_UP, Ordering::Release);
    }

    pub fn aside(&self) {
        self.0.store(ASIDE, Ordering::Release);
    }
}

/// A directory that is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directory {
    /// Its path on the kernel.
    pub path: Vec<u8>,
    /// Nothing is to be written.
    pub read_only: bool,
    /// What the client remembers.
    pub caching: Caching,
}

/// A directory for a kernel to serve on a stream.
pub(crate) struct Sharing {
    pub directory: Directory,
    /// Gets our end of the stream. Dropped: the kernel is down.
    pub answer: Sender<Result<OwnedFd, Errno>>,
}

/// Why there is no stream. Each says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FilesError {
    /// No kernel of the route is up.
    #[error("none of its kernels is up: {kernels} (kso ps says why)")]
    Down {
        /// All of them.
        kernels: String,
    },
    /// A kernel does not serve files.
    #[error(
        "the kernel `{kernel}` shares no directory: start its provider with --share DIR, or give it share=DIR in --external or kso.toml"
    )]
    NoFiles {
        /// Which.
        kernel: String,
    },
    /// A kernel refused.
    #[error("the kernel `{kernel}` does not serve {path}: {}", refusal(*.errno))]
    Refused {
        /// Which.
        kernel: String,
        /// What.
        path: String,
        /// Why.
        errno: Errno,
    },
}

fn refusal(errno: Errno) -> String {
    match errno {
        Errno::EACCES => {
            "it is not in a directory that it shares (--share DIR of its provider, or share=DIR)".into()
        }
        Errno::ENOENT => "there is no such directory there".into(),
        Errno::ENOTDIR => "it is no directory there".into(),
        Errno::ENOBUFS => "it shares as many directories as it may, or is about to end".into(),
        other => other.to_string(),
    }
}

impl From<FilesError> for io::Error {
    fn from(error: FilesError) -> Self {
        let kind = match &error {
            FilesError::Down { .. } => io::ErrorKind::NotConnected,
            FilesError::NoFiles { .. } => io::ErrorKind::Unsupported,
            FilesError::Refused { errno: Errno::ENOENT | Errno::ENOTDIR, .. } => io::ErrorKind::NotFound,
            FilesError::Refused { .. } => io::ErrorKind::PermissionDenied,
        };
        Self::new(kind, error)
    }
}

/// A kernel of a route.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub name: Arc<str>,
    pub commands: Sender<Command>,
    pub wake: Wake,
    pub load: Arc<Load>,
}

/// The way to a directory. See the module.
#[derive(Debug)]
pub struct FilesRoute {
    places: Vec<Place>,
    directory: Directory,
}

impl FilesRoute {
    pub(crate) fn new(places: Vec<Place>, directory: Directory) -> Self {
        Self { places, directory }
    }

    /// A stream to the first kernel that is up and serves it. If none is up, one is waited for a little.
    ///
    /// # Errors
    /// See [`FilesError`].
    pub fn open(&self) -> Result<OwnedFd, FilesError> {
        let until = Instant::now() + COMING;
        loop {
            let mut refused = None;
            for place in &self.places {
                match self.ask(place) {
                    Ok(Some(stream)) => return Ok(stream),
                    Ok(None) => {}
                    Err(error) => refused = Some(error),
                }
            }
            if let Some(error) = refused {
                return Err(error);
            }
            let lost = self.places.iter().all(|place| place.load.serving.0.load(Ordering::Acquire) == ASIDE);
            if lost || Instant::now() >= until {
                let names: Vec<_> = self.places.iter().map(|place| &*place.name).collect();
                return Err(FilesError::Down { kernels: names.join(", ") });
            }
            std::thread::sleep(LOOK);
        }
    }

    /// `None`: it is down.
    fn ask(&self, place: &Place) -> Result<Option<OwnedFd>, FilesError> {
        match place.load.serving.0.load(Ordering::Acquire) {
            SERVING => {}
            NO_FILES => return Err(FilesError::NoFiles { kernel: place.name.to_string() }),
            _ => return Ok(None),
        }
        let (answer, answered) = mpsc::channel();
        let sharing = Sharing { directory: self.directory.clone(), answer };
        if place.commands.send(Command::Share(sharing)).is_err() {
            return Ok(None);
        }
        place.wake.wake();
        let refused = |errno| FilesError::Refused {
            kernel: place.name.to_string(),
            path: String::from_utf8_lossy(&self.directory.path).into_owned(),
            errno,
        };
        match answered.recv_timeout(OPENING) {
            Ok(Ok(stream)) => Ok(Some(stream)),
            Ok(Err(Errno::EOPNOTSUPP)) => Err(FilesError::NoFiles { kernel: place.name.to_string() }),
            Ok(Err(errno)) => Err(refused(errno)),
            Err(RecvTimeoutError::Timeout) => Err(refused(Errno::ETIMEDOUT)),
            Err(RecvTimeoutError::Disconnected) => Ok(None),
        }
    }
}

impl Dial for FilesRoute {
    fn dial(&self) -> io::Result<OwnedFd> {
        Ok(self.open()?)
    }
}

/// A stream of requests and replies: ours and the kernel's end.
pub(crate) fn stream() -> io::Result<(OwnedFd, OwnedFd)> {
    let (own, given) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    for end in [&own, &given] {
        // Beyond net.core.wmem_max with privilege; a smaller buffer is no reason to fail.
        let _ = sockopt::set_socket_send_buffer_size_force(end, STREAM_BUFFER)
            .or_else(|_| sockopt::set_socket_send_buffer_size(end, STREAM_BUFFER));
    }
    Ok((own, given))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::Kernels;
    use kso_core::kernels::KernelSpec;
    use kso_provider::server::{Export, Limits, Shared};
    use std::io::Read;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::path::Path;

    /// A provider that shares a directory with those who come to a socket.
    fn provide(socket: &Path, exports: Vec<Export>) {
        let listener = UnixListener::bind(socket).unwrap();
        std::thread::spawn(move || {
            let mut shared = Shared::default();
            shared.exports = exports;
            while let Ok((stream, _)) = listener.accept() {
                let shared = shared.clone();
                std::thread::spawn(move || shared.serve(stream.into(), Limits::default()));
            }
        });
    }

    fn kernels(sockets: &[(&str, &Path)]) -> Kernels {
        let spec = |(name, path): &(&str, &Path)| {
            KernelSpec::parse(&format!("{name}=provider,path={}", path.display())).unwrap()
        };
        let kernels = sockets.iter().map(spec).collect();
        Kernels::new(crate::KernelsConfig { kernels, program: None }).unwrap()
    }

    fn directory(path: &Path) -> Directory {
        let path = path.as_os_str().as_encoded_bytes().to_vec();
        Directory { path, read_only: false, caching: Caching::Auto }
    }

    #[test]
    fn a_route_leads_to_the_first_kernel_that_serves_and_says_why_none_does() {
        let place = tempfile::tempdir().unwrap();
        let (shares, nothing) = (place.path().join("one"), place.path().join("two"));
        let inner = place.path().join("inner");
        std::fs::create_dir(&inner).unwrap();
        provide(&shares, vec![Export::open(&inner, false).unwrap()]);
        provide(&nothing, Vec::new());
        let missing = place.path().join("missing");
        let mut kernels = kernels(&[("shares", &shares), ("nothing", &nothing), ("missing", &missing)]);
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let wait = Duration::from_secs(20);
        let mut route = |of: &[&str], path: &Path| kernels.files(&names(of), directory(path), wait);
        route(&["shares"], &inner).unwrap().open().unwrap();
        route(&["missing", "shares"], &inner).unwrap().open().unwrap();
        route(&["nothing", "shares"], &inner).unwrap().open().unwrap();
        let refused = route(&["shares"], place.path()).unwrap().open().unwrap_err().to_string();
        assert!(refused.contains("--share DIR"), "{refused}");
        let refused = route(&["shares"], &inner.join("no")).unwrap().open().unwrap_err().to_string();
        assert!(refused.contains("no such directory there"), "{refused}");
        let refused = route(&["nothing"], &inner).unwrap().open().unwrap_err();
        assert_eq!(refused, FilesError::NoFiles { kernel: "nothing".into() });
        assert!(route(&["missing"], &inner).is_err());
        assert!(route(&["unknown"], &inner).unwrap_err().to_string().contains("unknown"));
    }

    #[test]
    fn a_stream_ends_with_its_kernel() {
        let place = tempfile::tempdir().unwrap();
        let socket = place.path().join("one");
        provide(&socket, vec![Export::open(place.path(), false).unwrap()]);
        let mut kernels = kernels(&[("one", &socket)]);
        let route = kernels.files(&["one".to_owned()], directory(place.path()), Duration::from_secs(20));
        let stream = route.unwrap().open().unwrap();
        drop(kernels);
        let (mut stream, mut said) = (UnixStream::from(stream), Vec::new());
        stream.read_to_end(&mut said).unwrap();
        // It may have ended before it said anything.
        assert!(said.is_empty() || said.starts_with(b"ksofiles"));
    }
}
