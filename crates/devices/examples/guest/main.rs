//! The vsock device with a real guest: boots a stock kernel under QEMU with this program as /init, and has the two
//! check each other.
//!
//! ```console
//! # KSO_KERNEL=DIR cargo run --release -p kso-devices --example guest -- [check|bench|...]
//! ```
//!
//! DIR is an unpacked Debian kernel package (`dpkg -x linux-image-*-cloud-amd64_*.deb DIR`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

mod host;
mod image;
mod init;
mod pattern;
mod services;

fn main() {
    if std::process::id() == 1 {
        init::run();
    }
    let mode = std::env::args().nth(1).unwrap_or_else(|| "check".into());
    std::process::exit(host::run(&mode));
}
