//! External kernels: started, watched, restarted and put aside; with stand-ins for the sockets that programs have on them.
//!
//! ```text
//!   broker's loop                     a thread for each kernel                       the kernel
//!     Kernels -- Command ----------->  Worker: provider's client, relays ---------->  provider
//!             <----------- Event ----    |  far ends of stand-ins <== streams ====>    its sockets
//!     Exchange: stand-ins, one for each session
//! ```
//!
//! The thread owns everything of its kernel; the broker's loop chooses kernels by the routes of a session
//! ([`kso_core::routes`]), hands stand-ins to programs, and sends what a dead kernel left behind to the next.
//! Files go past it: a [`FilesRoute`] asks the thread for a stream to a directory, and the requests on it are between the two
//! ends. This crate knows nothing of sessions or policy.
#![forbid(unsafe_code)]

mod carrier;
mod exchange;
mod files;
mod gvisor;
mod icmp;
mod kernels;
mod make;
mod netstack;
mod network;
mod remote;
mod session;
mod vm;
mod worker;

pub use carrier::Carrier;
pub use exchange::{Exchange, Pending};
pub use files::{Directory, FilesError, FilesRoute};
pub use gvisor::find_runsc;
pub use kernels::{Kernels, KernelsConfig, Status, outer_address, what_is_missing};
pub use make::{StartError, missing};
pub use worker::{Connecting, Event, Happened, Listening};
