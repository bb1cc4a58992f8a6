//! The harness of kso's end-to-end tests.
//!
//! Each test has a [`World`] of its own: a network namespace that plays the host (kso runs there) and one that
//! plays the outside (origin servers, peers, the name server). No packet leaves them. The same guest program
//! is run natively in the host namespace and under `kso run`, and the two outputs are compared.
//!
//! ```text
//!   namespace "host"                     namespace "origin"
//!   kso run -- PROGRAM                   dnsmasq, HTTP(S) origin, echo servers, peers
//!   10.77.0.1  fd77::1  <--- veth --->   10.77.0.2 .3 .4  fd77::2 ::3  169.254.169.254
//! ```
//!
//! With `KSO_TEST_CLIENT=vm` the programs run in a microVM instead ([`Client`]).
//!
//! Namespaces need root: `make test` says how to run the tests.

#![forbid(unsafe_code)]

mod client;
mod command;
pub mod conformance;
mod external;
mod leaks;
mod netns;
mod origin;
mod programs;
mod pty;
pub mod semantics;
mod tls;
mod world;

pub use client::Client;
pub use command::{Cmd, Output, Running, argv, sh};
pub use external::{Death, External, has_gvisor};
pub use leaks::{Resources, marked_processes, wait_gone};
pub use netns::Netns;
pub use origin::{EchoServer, FullBacklog, HttpOrigin, UdpEcho};
pub use programs::{c_program, go_program, java_program, program};
pub use pty::Pty;
pub use tls::Authority;
pub use world::{World, kso_binary};

use std::time::{Duration, Instant};

/// Waits until `ready` says so, at most `limit`; panics with `what` when it never does.
pub fn wait_until(what: &str, limit: Duration, mut ready: impl FnMut() -> bool) {
    let start = Instant::now();
    while !ready() {
        assert!(start.elapsed() < limit, "waited {limit:?} in vain: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Whole seconds, for brevity.
pub const fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}
