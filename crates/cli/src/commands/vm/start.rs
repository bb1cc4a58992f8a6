//! What the guest's init is told, and which directories it sees.

use super::VmArgs;
use crate::commands::program::resolv_conf;
use crate::commands::volumes::existing;
use anyhow::{Context, Result, bail};
use kso_core::files::Volume;
use kso_wire::Hello;
use kso_wire::job::{Mount, Start};
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// A directory that the guest sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directory {
    /// The name by which it is mounted.
    pub tag: String,
    /// Where it is, who performs it, and where it is in the guest: at the root, too.
    pub volume: Volume,
}

/// The directories: the root first, and what is below another after it.
pub fn directories(args: &VmArgs, volumes: &[Volume]) -> Result<Vec<Directory>> {
    let root = match &args.root {
        Some(root) => existing(root).with_context(|| format!("--root {}", root.display()))?,
        None => PathBuf::from("/"),
    };
    let of_host =
        |source, target, read_only| Volume { kernels: Vec::new(), source, target, read_only, caching: None };
    let mut all = vec![of_host(root, PathBuf::from("/"), true)];
    let here = std::env::current_dir().context("the current directory cannot be told")?;
    let named = |target: &Path| volumes.iter().any(|volume| volume.target == target);
    // The root itself is under the overlay already.
    if args.root.is_none() && here != Path::new("/") && !named(&here) {
        all.push(of_host(here.clone(), here, false));
    }
    all.extend(volumes.iter().cloned());
    all.sort_by_key(|volume| volume.target.components().count());
    let tagged = all.into_iter().enumerate();
    Ok(tagged.map(|(place, volume)| Directory { tag: format!("kso{place}"), volume }).collect())
}

/// What init is told.
pub fn start(
    args: &VmArgs,
    hello: &Hello,
    directories: &[Directory],
    open_files: (u64, u64),
) -> Result<Start> {
    let bytes = |text: &OsString| text.clone().into_vec();
    let mut environment: Vec<(OsString, OsString)> = std::env::vars_os().collect();
    for (name, value) in args.program.variables()? {
        environment.retain(|(other, _)| *other != name);
        environment.push((name, value));
    }
    let here = match (&args.program.workdir, &args.root) {
        (Some(directory), _) => directory.clone(),
        (None, Some(_)) => "/".into(),
        (None, None) => std::env::current_dir().context("the current directory cannot be told")?,
    };
    if !here.is_absolute() {
        bail!("-w {}: in the guest it needs an absolute path", here.display());
    }
    let groups = rustix::process::getgroups().context("the groups of this user cannot be told")?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let mount = |one: &Directory| Mount {
        tag: one.tag.clone(),
        target: one.volume.target.as_os_str().as_bytes().to_vec(),
        read_only: one.volume.read_only,
    };
    Ok(Start {
        command: args.program.command.iter().map(bytes).collect(),
        environment: environment.iter().map(|(name, value)| (bytes(name), bytes(value))).collect(),
        directory: here.into_os_string().into_vec(),
        user: rustix::process::geteuid().as_raw(),
        group: rustix::process::getegid().as_raw(),
        groups: groups.into_iter().map(rustix::process::Gid::as_raw).collect(),
        terminal: None,
        error_apart: false,
        hostname: args.program.name.clone().unwrap_or_else(|| "kso".into()),
        mounts: directories.iter().map(mount).collect(),
        resolv_conf: resolv_conf(&hello.tun).into_bytes(),
        tun: hello.tun,
        publish: hello.publish.clone(),
        loopback: hello.loopback,
        inside: args.inside.clone(),
        io_uring: args.program.io_uring,
        open_files,
        time: (now.as_secs().try_into().unwrap_or(0), now.subsec_nanos()),
        log: std::env::var("KSO_LOG").unwrap_or_else(|_| log_level(args.verbose).into()),
    })
}

fn log_level(verbosity: u8) -> &'static str {
    match verbosity {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    }
}
