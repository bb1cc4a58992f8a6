//! How a broker is set up, and why it cannot be.

use kso_core::config::PublishLimits;
use kso_core::routes::Route;
use kso_kernels::{KernelsConfig, StartError};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

/// How a broker is set up. The default is that of `kso run`: no rules but the session's, everything may be
/// published, seen by `kso ps` and `kso trace`.
#[derive(Clone, Debug)]
pub struct BrokerConfig {
    /// Rules for every session, in the form of `kso_core::policy::Policy::new`. They only take away.
    pub rules: Vec<(bool, String)>,
    /// No session reaches anything.
    pub no_net: bool,
    /// What sessions may publish; `None`: anything.
    pub publish: Option<PublishLimits>,
    /// At most so many sessions at one time.
    pub max_sessions: usize,
    /// Prints each event to standard error.
    pub trace: bool,
    /// Where metrics are read: `ADDRESS:PORT` or `unix:PATH`.
    pub metrics: Option<String>,
    /// External kernels, besides the host's own.
    pub kernels: KernelsConfig,
    /// External kernels are started by [`crate::Broker::start_kernels`], not with their first session: whoever has to
    /// fork first may not have threads yet.
    pub kernels_later: bool,
    /// Which kernel serves what; what no route fits is the host's.
    pub routes: Vec<Route>,
    /// Under which name `kso ps` and `kso trace` find it.
    pub control: Control,
    /// Where its control socket is.
    pub runtime_directory: PathBuf,
    /// The host's name servers (`resolv.conf(5)`).
    pub resolv_conf: PathBuf,
    /// The host's names (`hosts(5)`).
    pub hosts: PathBuf,
    /// Name servers in place of those of [`Self::resolv_conf`].
    pub name_servers: Option<Vec<SocketAddr>>,
}

/// The name of a control socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// `run-PID.sock`; the session has the number of the process.
    Run,
    /// `broker-PID.sock`; sessions are numbered from 1.
    Broker,
    /// None: it is not seen.
    Hidden,
}

impl Default for BrokerConfig {
    fn default() -> Self {
        Self {
            rules: Vec::new(),
            no_net: false,
            publish: None,
            max_sessions: 1024,
            trace: false,
            metrics: None,
            kernels: KernelsConfig::default(),
            kernels_later: false,
            routes: Vec::new(),
            control: Control::Run,
            runtime_directory: crate::runtime::runtime_directory(),
            resolv_conf: "/etc/resolv.conf".into(),
            hosts: "/etc/hosts".into(),
            name_servers: None,
        }
    }
}

/// Why there is no broker, or no session.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// A rule cannot be read.
    #[error(transparent)]
    Rule(#[from] kso_core::policy::RuleError),
    /// The other side speaks another version.
    #[error("this broker speaks version {ours} of the protocol, not {theirs}: use the same version of kso")]
    Version {
        /// Of this broker.
        ours: u16,
        /// Of the client.
        theirs: u16,
    },
    /// There are enough.
    #[error("there are {0} sessions already, and no more are permitted")]
    TooManySessions(usize),
    /// A port cannot be published.
    #[error("cannot publish {publication} on {address}: {errno}{hint}")]
    Publish {
        /// As `-p` has it.
        publication: String,
        /// Where.
        address: SocketAddr,
        /// Why.
        errno: kso_wire::Errno,
        /// What to do.
        hint: &'static str,
    },
    /// A port is another session's.
    #[error("cannot publish {publication}: {address} is published by session {session} already")]
    Published {
        /// As `-p` has it.
        publication: String,
        /// Where.
        address: SocketAddr,
        /// Whose.
        session: u64,
    },
    /// The broker's configuration does not permit it.
    #[error("cannot publish {publication}: {reason}")]
    NotPublished {
        /// As `-p` has it.
        publication: String,
        /// Why.
        reason: String,
    },
    /// An external kernel does not start.
    #[error("the kernel `{name}` cannot be used: {error}")]
    External {
        /// Its name.
        name: String,
        /// Why.
        error: StartError,
    },
    /// Files of another kernel are wanted, and there is none.
    #[error("this broker has no external kernels: describe one with --external NAME=MAKE")]
    NoKernels,
    /// Metrics cannot be served there.
    #[error("cannot serve metrics at {address}: {reason}")]
    Metrics {
        /// Where.
        address: String,
        /// Why.
        reason: String,
    },
    /// A socket cannot be made.
    #[error("cannot listen on {path}: {source}")]
    Socket {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A launcher's message is not as it should be.
    #[error("a guest's session needs the socket of its VMM and one stream for each port")]
    Descriptors,
    /// A guest's packets cannot be carried.
    #[error(transparent)]
    Gateway(#[from] kso_gateway::GatewayError),
    /// Something of the kernel is not there.
    #[error("{what}: {source}")]
    Kernel {
        /// What.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl BrokerError {
    pub(crate) fn kernel(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Kernel { what, source }
    }
}
