//! What runs inside a guest.
//!
//! ```text
//!   kernel --> /init = kso --> boot: /dev, /proc, /sys, modules
//!                               |
//!                              JOB (vsock) -- Ready --> <-- Start
//!                               |
//!                              machine: root (virtiofs under an overlay), mounts, /etc, TUN, limits
//!                               |
//!                              program under the filter -- its streams --> STDIN, STDOUT, STDERR (vsock)
//!                               |
//!                              loop: runner, streams, signals, children --> Ended --> restart, which ends the machine
//! ```
//!
//! In a guest that is somebody else's, [`resident`] runs one program beside whatever else there is.
//!
//! With `kso.provide` on the kernel's command line ([`kso_wire::machine`]) the guest is no place for programs but an external
//! kernel: a network card, disks, and a provider that a broker on the host commands.
//!
//! It takes no decision of policy: everything here is as hostile to the outside as the guest's programs may make it.
#![forbid(unsafe_code)]

mod boot;
mod host;
mod init;
mod job;
mod machine;
mod mounts;
mod provider;
pub mod resident;
mod streams;

use std::panic;
use std::path::Path;

/// Whether this process is the first of a guest, started by its kernel as `/init`: then [`main`] is to be called, and nothing
/// else.
#[must_use]
pub fn is_init() -> bool {
    std::process::id() == 1
        && std::env::args_os().next().is_some_and(|name| Path::new(&name) == Path::new("/init"))
}

/// Init. Whatever happens, the machine ends with it. `logs` starts the log on the console, at this level.
pub fn main(logs: fn(&str)) -> ! {
    if let Ok(Err(error)) = panic::catch_unwind(|| init::run(logs)) {
        // The console: the launcher tells its last lines.
        eprintln!("kso: {error}");
    }
    boot::restart()
}
