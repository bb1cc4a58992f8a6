//! The namespaces in which everything is measured.
//!
//! `kso-bench run` starts itself again below `unshare`, in new user, network, mount and pid namespaces: the "host"
//! of all the sandboxes. No packet can leave it, nothing need be root, and when the inner process ends the kernel
//! ends every process in it (pid_namespaces(7)). Rootless is also how pasta and slirp4netns are meant to be used.
//!
//! ```text
//!   kso-bench run ---pipe---> unshare --fork ---> kso-bench run --inside   (pid 1; ends when the pipe does)
//! ```

use std::env;
use std::fs;
use std::io::Read;
use std::process::{Command, Stdio, exit};
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The address by which pasta knows the host; on a veth pair whose other end is idle.
const HOST: &str = "10.77.0.1/24";
/// The gateway that pasta maps to the host's loopback.
pub const PASTA_GATEWAY: &str = "10.77.0.254";
/// Descriptors wanted: two ends of 10,000 connections live in different processes, with room to spare.
const DESCRIPTORS: u64 = 65_536;

/// Runs this program again with `--inside` appended, and gives its exit status.
pub fn enter(as_root: bool) -> Result<()> {
    raise_descriptor_limit();
    let program = env::current_exe()?;
    let status = {
        let mut child = Command::new("unshare")
            .args(if as_root { &[][..] } else { &["--user", "--map-root-user"] })
            .args(["--net", "--mount", "--pid", "--fork", "--kill-child"])
            .args(["--mount-proc", "--"])
            .arg(program)
            .args(env::args_os().skip(1))
            .arg("--inside")
            .stdin(Stdio::piped())
            .spawn()
            .context("cannot start unshare (util-linux)")?;
        // Held until the child has ended: std's wait() would close it before it waits.
        let pipe = child.stdin.take();
        let status = child.wait();
        drop(pipe);
        status?
    };
    exit(status.code().unwrap_or(1))
}

/// Root may raise the hard limit; others get what they have.
fn raise_descriptor_limit() {
    let had = getrlimit(Resource::Nofile);
    let wanted = Rlimit { current: Some(DESCRIPTORS), maximum: Some(DESCRIPTORS) };
    let enough = had.maximum.is_none_or(|maximum| maximum >= DESCRIPTORS);
    if enough || setrlimit(Resource::Nofile, wanted).is_err() {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: had.maximum, maximum: had.maximum });
    }
}

/// To be called first by the inner process.
pub fn prepare() -> Result<()> {
    thread::spawn(|| {
        let mut rest = Vec::new();
        let _ = std::io::stdin().read_to_end(&mut rest);
        exit(1);
    });
    ensure!(
        rustix::process::getpid().is_init(),
        "--inside is for the program itself: it must be the first process of its namespace"
    );
    for arguments in [
        &["link", "set", "lo", "up"][..],
        &["link", "add", "bench0", "type", "veth", "peer", "name", "bench1"],
        &["address", "add", HOST, "dev", "bench0"],
        &["link", "set", "bench0", "up"],
        &["link", "set", "bench1", "up"],
        &["route", "add", "default", "via", PASTA_GATEWAY, "dev", "bench0"],
    ] {
        ip(arguments)?;
    }
    // More room for the source ports of the 10,000 held connections; the same for all that is compared.
    fs::write("/proc/sys/net/ipv4/ip_local_port_range", "10240 65535")
        .context("cannot set ip_local_port_range")?;
    Ok(())
}

pub fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(arguments).output().context("cannot start ip (iproute2)")?;
    if !output.status.success() {
        bail!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
