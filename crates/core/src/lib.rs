//! What a session may do and what it did, as pure values.
//!
//! [`policy`] decides whether a destination may be reached, [`names`] remembers which names the session
//! resolved to which addresses so that rules can be written with names, [`publish`] reads `-p`, [`config`]
//! reads `kso.toml`, [`kernels`] and [`routes`] say which kernel serves what, [`files`] which directories a program sees, and
//! [`event`] is what `kso trace` prints.
//!
//! It performs no I/O, reads no clock (time is an argument) and has no unsafe code. Every text it reads may
//! come from an adversary: parsing is bounded and answers with an error that shows the place.
#![forbid(unsafe_code)]

pub mod config;
pub mod event;
pub mod files;
pub mod kernels;
pub mod names;
pub mod place;
pub mod policy;
pub mod publish;
pub mod routes;
