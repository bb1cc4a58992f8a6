//! The sandbox: a process tree in namespaces of its own.
//!
//! ```text
//!   supervisor (this process)          init (pid 1 inside)            program
//!     | -- clone3, new namespaces ------> |
//!     | -- Mapped ----------------------> |   (the id maps are written from outside)
//!     |                                   |   mounts, network, TUN
//!     | <----- Mounted + /dev/fuse        |   for each directory that another kernel performs
//!     | <----- Ready + TUN, two sockets   |
//!     |                                   | -- fork --> |
//!     | <----- Started + its pidfd        |             |  installs the filter
//!     | <----------------------------- Filtered + the notifier
//!     | -- Go ------------------------------------------> |  exec
//! ```
//!
//! Init dies with the supervisor, and with init every process of its pid namespace: whatever is killed, and
//! how, nothing stays behind.

pub(crate) mod channel;
mod identity;
pub(crate) mod init;
mod mounts;
pub(crate) mod volumes;

pub use mounts::own_resolv_conf;

use channel::{Channel, Message};
use kso_sys::notify::Rule;
use kso_sys::process::{self, Child, Ended, Signals};
use kso_wire::TunAddresses;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
pub use volumes::Volume;

/// What to run, and in what surroundings.
#[derive(Debug)]
pub struct SandboxConfig {
    /// Program and arguments.
    pub command: Vec<OsString>,
    /// Its working directory; `None`: ours.
    pub directory: Option<PathBuf>,
    /// Environment variables to add.
    pub environment: Vec<(OsString, OsString)>,
    /// The sandbox's addresses.
    pub tun: TunAddresses,
    /// The text of `/etc/resolv.conf` inside.
    pub resolv_conf: String,
    /// Directories hidden inside, if they exist: sockets of name services and of kso.
    pub hidden: Vec<PathBuf>,
    /// Directories that the program sees; what is below another comes after it.
    pub volumes: Vec<Volume>,
    /// The filter.
    pub filter: Vec<Rule>,
    /// Soft and hard limit of open files of the program.
    pub open_files: (u64, u64),
}

/// Why no sandbox could be made.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The namespaces were refused.
    #[error("cannot make the sandbox's namespaces: {source}\n{}", advice(.source))]
    Namespaces {
        /// What clone3 said.
        source: io::Error,
    },
    /// User and group ids could not be mapped.
    #[error("cannot map user ids into the sandbox: {0}")]
    Identity(#[source] io::Error),
    /// A step inside failed.
    #[error("{0}")]
    Inside(String),
    /// Init went away.
    #[error("the sandbox ended before its program started")]
    Lost,
    /// Something between us failed.
    #[error("cannot talk to the sandbox's init: {0}")]
    Channel(#[from] io::Error),
}

fn advice(error: &io::Error) -> &'static str {
    use kso_wire::Errno;
    match kso_sys::errno::of(error) {
        Errno::EPERM | Errno::EACCES => {
            "user namespaces are forbidden to this user. One of these allows them:\n  \
             sysctl -w kernel.unprivileged_userns_clone=1            (Debian's older kernels)\n  \
             sysctl -w kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu)\n  \
             in a container: --security-opt seccomp=unconfined, or run kso as root with CAP_SYS_ADMIN"
        }
        Errno::ENOSPC => {
            "the limit of namespaces is reached, or is 0: raise it with\n  \
             sysctl -w user.max_user_namespaces=10000 (and user.max_net_namespaces)"
        }
        Errno::EINVAL | Errno::ENOSYS => {
            "this kernel lacks a kind of namespace (CONFIG_USER_NS, CONFIG_NET_NS)"
        }
        _ => "see user_namespaces(7)",
    }
}

/// A sandbox whose program is about to start, or runs.
#[derive(Debug)]
pub struct Sandbox {
    init: Child,
    channel: Channel,
    /// The program's first process (pidfd).
    pub program: OwnedFd,
    /// The filter's other end.
    pub notifier: Option<OwnedFd>,
    /// The TUN.
    pub tun: Option<OwnedFd>,
    /// Mounts whose requests have to be answered: one for each volume without a source, in order.
    pub mounts: Vec<OwnedFd>,
    /// Fresh TCP sockets of the sandbox's network: IPv4, IPv6.
    pub fresh: [OwnedFd; 2],
}

impl Sandbox {
    /// Makes the sandbox; the program waits for [`Self::go`].
    ///
    /// # Errors
    /// See [`SandboxError`].
    pub fn start(config: &SandboxConfig, signals: &Signals) -> Result<Self, SandboxError> {
        let (ours, theirs) = Channel::pair()?;
        let init = process::fork(process::ALL_NAMESPACES, || init::main(config, &theirs, signals))
            .map_err(|source| SandboxError::Namespaces { source })?;
        drop(theirs);
        identity::write_maps(init.pid).map_err(SandboxError::Identity)?;
        ours.send(Message::Mapped, &[])?;

        let (mut tun, mut fresh, mut program, mut notifier) = (None, None, None, None);
        let mut mounts = Vec::new();
        while tun.is_none() || program.is_none() || notifier.is_none() {
            let (message, mut descriptors) = ours.receive()?.ok_or(SandboxError::Lost)?;
            let mut next = || descriptors.pop_front().ok_or(SandboxError::Lost);
            match message {
                Message::Ready => {
                    tun = Some(next()?);
                    fresh = Some([next()?, next()?]);
                }
                Message::Mounted => mounts.push(next()?),
                Message::Started => program = Some(next()?),
                Message::Filtered => notifier = Some(next()?),
                Message::Failed(text) => {
                    let _ = process::wait(Some(init.pid));
                    return Err(SandboxError::Inside(text));
                }
                Message::Mapped | Message::Go => {}
            }
        }
        let program = program.ok_or(SandboxError::Lost)?;
        let fresh = fresh.ok_or(SandboxError::Lost)?;
        Ok(Self { init, channel: ours, program, notifier, tun, mounts, fresh })
    }

    /// Lets the program start.
    ///
    /// # Errors
    /// It is gone.
    pub fn go(&self) -> Result<(), SandboxError> {
        Ok(self.channel.send(Message::Go, &[])?)
    }

    /// Readable when the sandbox has ended.
    #[must_use]
    pub fn ended_fd(&self) -> BorrowedFd<'_> {
        self.init.pidfd.as_fd()
    }

    /// The number of init, as the host has it.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.init.pid
    }

    /// Passes a signal on to the program.
    pub fn signal(&self, number: i32) {
        if let Err(error) = kso_sys::remote::signal(self.program.as_fd(), number) {
            tracing::debug!(%error, number, "the program did not get a signal");
        }
    }

    /// Waits for the end and tells the program's status as a shell would.
    ///
    /// # Errors
    /// waitpid(2) failed.
    pub fn wait(&self) -> io::Result<i32> {
        // Init ends with its program's status.
        Ok(match process::wait(Some(self.init.pid))? {
            Some((_, ended @ Ended::Exited(_))) => ended.shell_status(),
            Some((_, ended @ Ended::Killed(_))) => ended.shell_status(),
            None => 0,
        })
    }
}
