//! External kernels.
#![forbid(unsafe_code)]

pub mod exchange;
mod icmp;
