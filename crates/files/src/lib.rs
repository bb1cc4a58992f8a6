//! The file service: FUSE requests performed on directories of the kernel it runs on.
//!
//! ```text
//!   transport (virtio queue, /dev/fuse) --- request, room for the reply ---> Worker (one for each thread)
//!                                                                             |
//!                            Request::parse: bytes -> Operation               v
//!                            Service: nodes, handles, locks of one share --- ops --> the host's files
//! ```
//!
//! Instead of a `Worker` there can be an [`relay::Asker`], which has another kernel perform: there, [`stream::serve`] is the transport.
//!
//! Everything is reached by a descriptor of a node that was looked up, component by component, from the share's root: no path of
//! the client's is ever resolved. The crate knows nothing of virtqueues, nor of policy.
#![forbid(unsafe_code)]

pub mod abi;
mod actor;
mod buffers;
mod frames;
mod handles;
mod hello;
pub mod image;
mod inodes;
mod locks;
pub mod mount;
mod ops;
mod passthrough;
mod performer;
pub mod relay;
mod request;
mod sending;
mod service;
mod share;
mod slots;
pub mod stream;
mod worker;

pub use buffers::Pieces;
pub use locks::Completer;
pub use performer::{Performer, Server};
pub use request::{MAX_REQUEST, Name, Operation, Request};
pub use sending::{Files, OpenFile};
pub use service::{MAX_WRITE, Service, ShareError};
pub use share::{Cache, Owner, Share, Submounts, View};
pub use worker::{Outcome, Worker, bare_reply};
