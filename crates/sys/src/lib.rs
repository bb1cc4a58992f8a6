//! Every unsafe line of kso.
//!
//! The crates above forbid unsafe code; what they need from the kernel and neither `std`, rustix nor socket2
//! offers safely is here, behind types that own their descriptors: the seccomp notifier ([`notify`]), memory
//! and descriptors of other processes ([`remote`]), processes in namespaces ([`process`]), socket options by portable
//! name ([`options`]), locks on sockets ([`lock`]), the TUN ([`tun`]), a guest's streams ([`vsock`]) and
//! memory ([`guest_memory`]), and batches of datagrams ([`datagram`]).
//! Sockets of another kernel have stand-ins here ([`standin`]). For the file service there are [`mod@file`] and [`fuse`], for
//! directories of a sandbox there is [`mod@mount`].
//! It takes no decisions.

pub mod datagram;
pub mod errno;
pub mod file;
pub mod fuse;
pub mod guest_memory;
pub mod launch;
pub mod link;
pub mod lock;
pub mod mount;
pub mod notify;
pub mod numbers;
pub mod options;
pub mod process;
pub mod provide;
pub mod remote;
pub mod standin;
pub mod tap;
pub mod tun;
pub mod vsock;

mod socket;
pub use socket::{
    MAX_ADDRESS, RawAddress, address_bytes, address_from_raw, address_to_raw, bind, cookie, domain,
    local_address, netns_cookie, out_queue, peer_address, take_error, tcp_info, tcp_state,
};
