//! Streams to a provider somewhere else, over mutual TLS 1.3.
//!
//! ```text
//!   the broker's process                                            kso provide --listen tcp:ADDRESS:PORT
//!     Dialer: dials, handshakes, keeps some ready                    Gate: accepts, handshakes, reads the first bytes
//!        |                                                              |
//!     Pump: socket pair <-- Tunnel --> TCP  ==== TLS, one for ====== TCP <-- Tunnel --> socket pair :Pump
//!             |                                  each stream                                 |
//!     relay, control stream                                                     session, registry of tickets
//! ```
//!
//! Each stream has a TLS connection of its own, and so TCP's own flow control: a slow one stalls no other. To what is above
//! it is one end of a socket pair, as a stream is everywhere in kso; a [`Tunnel`] carries bytes, half-closes and resets between
//! that and the TLS connection ([`Engine`], pure). All tunnels of a kernel share one thread, the [`Pump`]. Handshakes are made on
//! another, so that strangers who begin one cost the streams nothing.
//!
//! Both sides show a certificate of the same authority ([`identity`]); nothing can switch that off. [`certs`] makes
//! one. This crate knows nothing of what the streams carry but a [`kso_wire::provide::Ticket`] at their beginning.
#![forbid(unsafe_code)]

pub mod certs;
mod dialer;
mod engine;
mod gate;
mod greeting;
pub mod identity;
mod pump;
#[cfg(test)]
mod testing;
mod tunnel;

pub use dialer::{Dialer, Target};
pub use engine::{Broken, Engine};
pub use gate::{Arrival, Gate};
pub use pump::Pump;
pub use tunnel::{Fate, Tunnel};
