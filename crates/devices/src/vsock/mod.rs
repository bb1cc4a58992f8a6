//! The vsock device.

mod outside;

pub use outside::{End, GuestId, Outside, Verdict};
