//! The control socket, by which `kso ps` and `kso trace` find a broker, and who may speak to it.

use crate::config::{BrokerConfig, BrokerError, Control};
use crate::runtime;
use kso_provider::processes;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::net::SocketFlags;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// See the module.
#[derive(Debug)]
pub(crate) struct ControlSocket {
    listener: OwnedFd,
    path: PathBuf,
}

impl ControlSocket {
    /// Makes the socket in the runtime directory; sockets that dead brokers left there are removed.
    pub fn new(
        epoll: BorrowedFd<'_>,
        config: &BrokerConfig,
        token: u64,
    ) -> Result<Option<Self>, BrokerError> {
        let kind = match config.control {
            Control::Run => "run",
            Control::Broker => "broker",
            Control::Hidden => return Ok(None),
        };
        let directory = &config.runtime_directory;
        let path = directory.join(format!("{kind}-{}.sock", std::process::id()));
        let make = || -> io::Result<Self> {
            runtime::prepare(directory)?;
            runtime::sweep(directory);
            // Left by a process of the same number.
            remove_stale(&path)?;
            let listener = UnixListener::bind(&path)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
            listener.set_nonblocking(true)?;
            epoll::add(epoll, &listener, EventData::new_u64(token), EventFlags::IN)?;
            Ok(Self { listener: listener.into(), path: path.clone() })
        };
        make().map(Some).map_err(|source| BrokerError::Socket { path: path.clone(), source })
    }

    /// The next client, if one waits that may be one.
    pub fn accept(&self) -> Option<OwnedFd> {
        loop {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = rustix::net::accept_with(self.listener.as_fd(), flags).ok()?;
            match stranger(socket.as_fd()) {
                None => return Some(socket),
                Some(reason) => tracing::warn!(reason, "a client of the control socket was refused"),
            }
        }
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Why the other end of a unix socket may not speak to this broker, if it may not. A sandboxed program can
/// reach sockets in directories it shares with the host: it lives in another user namespace than the
/// broker, and what is behind this socket would lead out of its sandbox.
pub(crate) fn stranger(socket: BorrowedFd<'_>) -> Option<String> {
    let Ok(peer) = rustix::net::sockopt::socket_peercred(socket) else {
        return Some("its credentials cannot be read".into());
    };
    let pid = peer.pid.as_raw_nonzero().get().cast_unsigned();
    match processes::in_our_user_namespace(pid) {
        Some(true) => None,
        Some(false) => Some(format!("process {pid} is in another user namespace (a sandbox)")),
        None => Some(format!("process {pid} cannot be looked at")),
    }
}

/// Removes a socket on which nobody listens any more. Anything else is left, and in the way.
pub(crate) fn remove_stale(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => {}
        _ => return Ok(()),
    }
    // A seqpacket listener refuses a stream with EPROTOTYPE: somebody is there.
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        _ => Ok(()),
    }
}
