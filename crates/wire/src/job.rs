//! What a launcher tells a guest's init to run, and what it hears of it.
//!
//! Frames of [`crate::frame`] on a vsock stream to [`crate::guest::ports::JOB`]. The standard streams are vsock streams of
//! their own, so that each has its own back-pressure.
//!
//! ```text
//!   init                                  launcher
//!     | -- Ready -----------------------> |      modules are loaded, nothing is mounted
//!     | <------------------------- Start  |
//!     | -- Started | Failed ------------> |
//!     | <--------------- Signal, Resize   |      any number
//!     | -- Ended -----------------------> |      once its output is on its way and its streams are shut down
//!     |                                   |      the launcher closes the stream when it has the rest: init powers off
//! ```

use crate::{LoopbackMode, Network, Publication, TunAddresses};
use serde::{Deserialize, Serialize};

/// Most words of a command line, variables of an environment, or mounts.
pub const MAX_WORDS: usize = 65_536;

/// Bytes of a path, a word or a variable: they need not be UTF-8.
pub type Bytes = Vec<u8>;

/// A directory of the host that the guest mounts by virtiofs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// The virtiofs tag.
    pub tag: String,
    /// Where in the guest. `/` is the root: it is mounted read-only under an overlay in guest memory.
    pub target: Bytes,
    /// No writing.
    pub read_only: bool,
}

/// A terminal's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// Everything that a guest is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// The program and its arguments.
    pub command: Vec<Bytes>,
    /// Its whole environment.
    pub environment: Vec<(Bytes, Bytes)>,
    /// Its working directory; made if it is missing.
    pub directory: Bytes,
    /// User, group and further groups.
    pub user: u32,
    /// See [`Self::user`].
    pub group: u32,
    /// See [`Self::user`].
    pub groups: Vec<u32>,
    /// It gets a terminal of this size; then its standard streams are one stream, STDIN's, in both directions.
    pub terminal: Option<WindowSize>,
    /// Its standard error is a stream of its own (STDERR's) even with a terminal.
    pub error_apart: bool,
    /// The guest's host name.
    pub hostname: String,
    /// What is mounted, in order.
    pub mounts: Vec<Mount>,
    /// Text of `/etc/resolv.conf`.
    pub resolv_conf: Bytes,
    /// The addresses of the TUN.
    pub tun: TunAddresses,
    /// The session's publications.
    pub publish: Vec<Publication>,
    /// Where loopback is.
    pub loopback: LoopbackMode,
    /// Connections to these stay inside: networks of NICs that the guest has beside kso's.
    pub inside: Vec<Network>,
    /// io_uring is permitted.
    pub io_uring: bool,
    /// Limit of open files, soft and hard.
    pub open_files: (u64, u64),
    /// Seconds and nanoseconds since the epoch, to set the guest's clock.
    pub time: (i64, u32),
    /// Log level of the guest's runner (`tracing`), for its console.
    pub log: String,
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ended {
    /// `exit` with this status.
    Exited(u8),
    /// By this signal (Linux's number).
    Killed(u8),
}

/// From the launcher.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToInit {
    /// Run this.
    Start(Box<Start>),
    /// Send the program a signal.
    Signal {
        /// Linux's number.
        number: u8,
        /// To its whole process group, as a key of a terminal does.
        group: bool,
    },
    /// The terminal has another size.
    Resize(WindowSize),
}

/// From init.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToLauncher {
    /// Tell me what to run.
    Ready {
        /// [`crate::VERSION`].
        version: u16,
        /// The guest kernel's release (`uname -r`).
        kernel: String,
    },
    /// It runs.
    Started,
    /// It could not be run: why, and the status to end with (125, 126 or 127, as `docker run`).
    Failed {
        /// For a person.
        reason: String,
        /// Exit status.
        status: u8,
    },
    /// It ended.
    Ended(Ended),
}
