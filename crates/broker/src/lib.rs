//! Sessions, policy, names, metrics and the host provider behind one event loop.
//!
//! A [`Broker`] serves the requests of runners and gateways (`kso_wire`): it decides what the rules of a
//! session permit (`kso_core::policy`), has the external kernel do it (`kso_provider`), resolves names, and tells
//! those who watch. It is [`Embedded`] in `kso run`, or a daemon of its own ([`serve`]).
//!
//! It knows nothing of system calls, packets or the sandbox: only of addresses and names.
#![forbid(unsafe_code)]

mod broker;
mod config;
mod control;
mod daemon;
pub mod dns;
mod embedded;
mod external;
mod eyes;
mod flows;
pub mod guest;
mod listeners;
mod metrics;
mod names;
mod peer;
mod publish;
mod report;
mod route;
mod runtime;
mod session;
mod streams;
mod totals;
mod track;

pub use broker::Broker;
pub use config::{BrokerConfig, BrokerError, Control};
pub use daemon::{ServeConfig, serve};
pub use embedded::{Embedded, Link};
pub use eyes::{Lost, Question, event_line};
pub use kso_kernels::{Directory, FilesRoute, KernelsConfig, Status, what_is_missing};
pub use report::{ConnectionReport, KernelReport, ListenerReport, Report, SessionReport};
pub use runtime::{control_sockets, runtime_directory};
pub use session::SessionId;
