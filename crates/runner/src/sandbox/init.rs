//! The first process of the sandbox: prepares it, starts the program, reaps, and ends with it.

use super::channel::{Channel, Message};
use super::{SandboxConfig, mounts, volumes};
use kso_sys::process::{self, Child, Signals};
use kso_sys::{notify, tun};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Exit status when the sandbox could not be made, as `docker run` has it.
const FAILED: i32 = 125;
/// Exit status when the program could not be executed.
const NOT_EXECUTABLE: i32 = 126;
/// Exit status when the program was not found.
const NOT_FOUND: i32 = 127;

/// The TUN's name.
const TUN: &str = "kso0";
/// Its MTU: the largest datagram is one packet.
const MTU: u32 = 65_535;

pub(super) fn main(config: &SandboxConfig, channel: &Channel, signals: &Signals) -> i32 {
    let child = match prepare(config, channel).and_then(|()| start(config, channel, signals)) {
        Ok(child) => child,
        Err(text) => {
            let _ = channel.send(Message::Failed(text), &[]);
            return FAILED;
        }
    };
    loop {
        match process::wait(None) {
            Ok(Some((pid, ended))) if pid == child.pid => return ended.shell_status(),
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => return FAILED,
        }
    }
}

/// Names what failed, for a person.
fn step<T>(what: &str, result: io::Result<T>) -> Result<T, String> {
    result.map_err(|error| format!("cannot {what}: {error}"))
}

fn prepare(config: &SandboxConfig, channel: &Channel) -> Result<(), String> {
    step("tie the sandbox's life to kso's", process::die_with_parent())?;
    // If kso died before that, nobody answers here.
    match channel.receive() {
        Ok(Some((Message::Mapped, _))) => {}
        _ => return Err("kso went away".into()),
    }
    let _ = rustix::thread::set_name(c"kso-init");
    step("make mounts private", mounts::make_private())?;
    volumes::bind(&config.volumes)?;
    step("arrange /etc/resolv.conf", mounts::arrange(&config.resolv_conf, &config.hidden))?;
    if let Err(error) = mounts::proc() {
        tracing::warn!(%error, "/proc inside is the host's: it cannot be mounted anew here");
    }
    let tun = open_tun()?;
    step("set up the network", tun::configure(TUN, &config.tun, MTU))?;
    sysctls();
    let fresh = |family| {
        step(
            "make a socket",
            socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None).map_err(Into::into),
        )
    };
    let (v4, v6): (OwnedFd, OwnedFd) = (fresh(AddressFamily::INET)?, fresh(AddressFamily::INET6)?);
    // Last: nobody answers yet who looks below them.
    for device in volumes::mount_others(&config.volumes)? {
        step("report", channel.send(Message::Mounted, &[device.as_fd()]))?;
    }
    step("report", channel.send(Message::Ready, &[tun.as_fd(), v4.as_fd(), v6.as_fd()]))
}

fn open_tun() -> Result<OwnedFd, String> {
    tun::create(TUN).map_err(|error| {
        let advice = match error.kind() {
            io::ErrorKind::NotFound => {
                "\nload the tun module: modprobe tun (in a container: --device /dev/net/tun)"
            }
            io::ErrorKind::PermissionDenied => {
                "\nthis user may not open /dev/net/tun: chmod 0666 /dev/net/tun, as most systems have it"
            }
            _ => "",
        };
        format!("cannot make the sandbox's TUN: {error}{advice}")
    })
}

/// Lets any user of the sandbox ping and listen on low ports: the network is theirs alone.
fn sysctls() {
    // A range of groups that are not mapped is refused: then only our own.
    let own = rustix::process::getgid().as_raw();
    let range = "/proc/sys/net/ipv4/ping_group_range";
    if fs::write(range, "0 2147483647").is_err() {
        let _ = fs::write(range, format!("{own} {own}"));
    }
    let _ = fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0");
}

fn start(config: &SandboxConfig, channel: &Channel, signals: &Signals) -> Result<Child, String> {
    let child = step("start the program", process::fork(0, || run(config, channel, signals)))?;
    step("report", channel.send(Message::Started, &[child.pidfd.as_fd()]))?;
    Ok(child)
}

/// Becomes the program.
fn run(config: &SandboxConfig, channel: &Channel, signals: &Signals) -> i32 {
    let Some((program, arguments)) = config.command.split_first() else { return FAILED };
    let filtered = notify::install(&config.filter)
        .and_then(|notifier| channel.send(Message::Filtered, &[notifier.as_fd()]));
    if let Err(error) = filtered {
        let text = format!("cannot install the seccomp filter: {error}");
        let _ = channel.send(Message::Failed(text), &[]);
        return FAILED;
    }
    match channel.receive() {
        Ok(Some((Message::Go, _))) => {}
        _ => return FAILED,
    }
    let (soft, hard) = config.open_files;
    let _ = process::set_open_files_limit(soft, hard);
    let mut command = Command::new(program);
    command.args(arguments).envs(config.environment.iter().map(|(name, value)| (name, value)));
    if let Some(directory) = &config.directory {
        command.current_dir(directory);
    }
    process::default_sigpipe();
    signals.restore_mask();
    let error = command.exec();
    eprintln!("kso: cannot run {}: {error}", program.display());
    not_executed(&error)
}

/// The status to end with when a program could not be executed.
pub(crate) fn not_executed(error: &io::Error) -> i32 {
    if error.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { NOT_EXECUTABLE }
}
