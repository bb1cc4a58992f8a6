//! Streams to the host.

use kso_sys::vsock;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// The device shows up within this time.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often it is looked for.
const PAUSE: Duration = Duration::from_millis(10);

/// The host answers within this time, also a busy one under emulation. The kernel's own is 2 s.
const ANSWER: Duration = Duration::from_secs(20);

/// Connects to a port of `kso_wire::guest::ports`.
pub fn connect(port: u32) -> io::Result<OwnedFd> {
    let socket = vsock::socket()?;
    vsock::set_connect_timeout(socket.as_fd(), ANSWER)?;
    vsock::connect(socket.as_fd(), vsock::Address { cid: vsock::CID_HOST, port })?;
    Ok(socket)
}

/// The same, where the device may not be there yet.
pub fn connect_first(port: u32) -> io::Result<OwnedFd> {
    let until = Instant::now() + PATIENCE;
    loop {
        match connect(port) {
            Err(error) if error.raw_os_error() == Some(NO_DEVICE) && Instant::now() < until => {
                std::thread::sleep(PAUSE);
            }
            done => return done,
        }
    }
}

/// `ENODEV`: the kernel has no vsock device.
pub const NO_DEVICE: i32 = rustix::io::Errno::NODEV.raw_os_error();
