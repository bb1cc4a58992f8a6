//! Messages between runner, broker and provider.
//!
//! This crate says *what* crosses a boundary between kernels and how it looks in bytes: requests and replies
//! ([`message`]), socket options by portable names ([`options`]), error numbers that mean the same on every
//! kernel ([`errno`]), and the bounded, versioned framing ([`codec`]; [`frame`] on byte streams). [`link`] is the seam behind
//! which a broker is reached in the same process or over a socket; a guest's runner speaks [`guest`], its init
//! [`job`]; a provider on another kernel [`provide`]
//! (one in a virtual machine is told what it is by [`machine`]).
//!
//! It performs no I/O, knows no kernel's constants and has no unsafe code.
#![forbid(unsafe_code)]

pub mod codec;
pub mod errno;
pub mod frame;
pub mod guest;
pub mod job;
pub mod link;
pub mod machine;
pub mod message;
pub mod network;
pub mod options;
pub mod provide;

pub use codec::{CodecError, MAX_MESSAGE, VERSION, decode, encode};
pub use errno::Errno;
pub use link::{Answer, BrokerLink, Submitted};
pub use message::*;
pub use network::Network;
pub use options::{CONGESTION_CONTROLS, OptionName, OptionValue, SocketOption, SocketOptions};
