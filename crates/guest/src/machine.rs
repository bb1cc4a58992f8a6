//! What a guest is besides its files: name, clock, network, limits.

use kso_sys::options::Defaults;
use kso_sys::{process, tun};
use kso_wire::Family;
use kso_wire::job::Start;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use rustix::time::{ClockId, Timespec};
use std::fs;
use std::os::fd::{AsFd, OwnedFd};

/// The TUN's name.
pub const TUN: &str = "kso0";
/// Its MTU: the largest datagram is one packet.
pub const MTU: u32 = 65_535;

/// Settings of the kernel, and why they are not what it has by itself. One that it lacks is left out.
const SETTINGS: &[(&str, &str)] = &[
    // The network is the program's alone: any user may ping, and listen on any port.
    ("net/ipv4/ping_group_range", "0 2147483647"),
    ("net/ipv4/ip_unprivileged_port_start", "0"),
    // As large as a server asks for; a guest with little memory would allow less.
    ("net/core/somaxconn", "65535"),
    ("fs/file-max", "1000000"),
    ("vm/max_map_count", "262144"),
    ("kernel/threads-max", "65536"),
    ("kernel/pid_max", "65536"),
];

/// Gives the kernel its settings, its name and its clock.
pub fn settle(start: &Start) -> Result<(), String> {
    settings();
    let (_, hard) = start.open_files;
    let highest =
        fs::read_to_string("/proc/sys/fs/nr_open").ok().and_then(|text| text.trim().parse::<u64>().ok());
    if highest.is_some_and(|highest| highest < hard) {
        let _ = fs::write("/proc/sys/fs/nr_open", hard.to_string());
    }
    rustix::system::sethostname(start.hostname.as_bytes())
        .map_err(|error| format!("cannot set the host name: {error}"))?;
    let (seconds, nanoseconds) = start.time;
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() };
    // It has a clock of its own, which is right to the second.
    if let Err(error) = rustix::time::clock_settime(ClockId::Realtime, time) {
        tracing::warn!(%error, "the clock could not be set");
    }
    // Init's own: it handles as many descriptors as programs have.
    let most = hard.max(start.open_files.0);
    if let Err(error) = process::set_open_files_limit(most, most) {
        tracing::debug!(%error, most, "the limit of open files stays");
    }
    Ok(())
}

/// Gives the kernel its settings.
pub fn settings() {
    for (name, value) in SETTINGS {
        let _ = fs::write(format!("/proc/sys/{name}"), value);
    }
}

/// The guest's network.
pub struct Network {
    /// The TUN.
    pub tun: OwnedFd,
    /// Options of fresh TCP sockets: IPv4, IPv6.
    pub defaults: [Defaults; 2],
}

/// Brings up loopback and the TUN.
pub fn network(start: &Start) -> Result<Network, String> {
    let tun = tun::create(TUN).map_err(|error| format!("cannot make the TUN: {error}"))?;
    tun::configure(TUN, &start.tun, MTU).map_err(|error| format!("cannot set up the network: {error}"))?;
    Ok(Network { tun, defaults: defaults()? })
}

/// The options of fresh TCP sockets: IPv4, IPv6. A kernel without IPv6 has no programs that use it.
pub fn defaults() -> Result<[Defaults; 2], String> {
    let fresh = |family| socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None);
    let v4 = fresh(AddressFamily::INET).map_err(|error| format!("cannot make a socket: {error}"))?;
    let v6 = fresh(AddressFamily::INET6).or_else(|_| fresh(AddressFamily::INET));
    let v6 = v6.map_err(|error| format!("cannot make a socket: {error}"))?;
    Ok([Defaults::of(v4.as_fd(), Family::V4), Defaults::of(v6.as_fd(), Family::V6)])
}
