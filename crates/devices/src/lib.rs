//! vhost-user devices: how a guest reaches the broker without a NIC and without a disk.
//!
//! [`vsock`] carries its streams, [`hybrid`] those of VMMs with a vsock device of their own, [`fs`] its files. Devices move bytes between guest memory and what others
//! opened for them; they know nothing of policy, names or sessions.
#![forbid(unsafe_code)]

pub mod fs;
pub mod hybrid;
pub mod vhost;
pub mod vsock;
