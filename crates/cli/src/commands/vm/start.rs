//! What the guest's init is told, and which directories it sees.

use super::VmArgs;
use crate::commands::program::resolv_conf;
use anyhow::{Context, Result, bail};
use kso_wire::Hello;
use kso_wire::job::{Mount, Start};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// A directory of this host that the guest sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directory {
    /// The name by which it is mounted.
    pub tag: String,
    /// Where it is here.
    pub host: PathBuf,
    /// Where it is in the guest.
    pub target: PathBuf,
    /// No writing.
    pub read_only: bool,
}

/// The directories: the root first.
pub fn directories(args: &VmArgs) -> Result<Vec<Directory>> {
    let root = match &args.root {
        Some(root) => existing(root).with_context(|| format!("--root {}", root.display()))?,
        None => PathBuf::from("/"),
    };
    let directory = |host, target, read_only| Directory { tag: String::new(), host, target, read_only };
    let mut all = vec![directory(root, PathBuf::from("/"), true)];
    let here = std::env::current_dir().context("the current directory cannot be told")?;
    // The root itself is under the overlay already.
    if args.root.is_none() && here != Path::new("/") {
        all.push(directory(here.clone(), here, false));
    }
    for text in &args.volume {
        let volume = volume(text).with_context(|| format!("-v {}", text.display()))?;
        all.retain(|other| other.target == Path::new("/") || other.target != volume.target);
        all.push(volume);
    }
    // What is below another is mounted after it.
    all.sort_by_key(|one| one.target.components().count());
    for (place, one) in all.iter_mut().enumerate() {
        one.tag = format!("kso{place}");
    }
    Ok(all)
}

fn existing(path: &Path) -> Result<PathBuf> {
    let found = path.canonicalize()?;
    if !found.is_dir() {
        bail!("it is not a directory");
    }
    Ok(found)
}

/// `HOST:GUEST[:ro]`.
fn volume(text: &OsStr) -> Result<Directory> {
    let form = "the form is HOST:GUEST or HOST:GUEST:ro";
    let bytes = text.as_bytes();
    let (bytes, read_only) = match bytes.strip_suffix(b":ro") {
        Some(rest) => (rest, true),
        None => (bytes.strip_suffix(b":rw").unwrap_or(bytes), false),
    };
    let at = bytes.iter().rposition(|&byte| byte == b':').context(form)?;
    let (host, target) = bytes.split_at(at);
    let target = target.get(1..).unwrap_or_default();
    if host.is_empty() || target.is_empty() {
        bail!(form);
    }
    let target = PathBuf::from(OsStr::from_bytes(target));
    let plain = target.components().all(|part| !matches!(part, std::path::Component::ParentDir));
    if !target.is_absolute() || !plain || target == Path::new("/") {
        bail!(
            "{}: in the guest it needs an absolute path without .., and the root is --root's",
            target.display()
        );
    }
    let host = existing(Path::new(OsStr::from_bytes(host)))?;
    Ok(Directory { tag: String::new(), host, target: target.components().collect(), read_only })
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
        target: one.target.as_os_str().as_bytes().to_vec(),
        read_only: one.read_only,
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_read() {
        let of = |text: &str| volume(OsStr::new(text)).map(|one| (one.host, one.target, one.read_only));
        let tmp = || PathBuf::from("/tmp").canonicalize().unwrap();
        assert_eq!(of("/tmp:/srv").unwrap(), (tmp(), "/srv".into(), false));
        assert_eq!(of("/tmp:/srv/:ro").unwrap(), (tmp(), "/srv".into(), true));
        assert_eq!(of("/tmp:/srv:rw").unwrap(), (tmp(), "/srv".into(), false));
        for wrong in [
            "/tmp",
            ":/srv",
            "/tmp:",
            "/tmp:srv",
            "/tmp:/",
            "/tmp:/a/../b",
            "/nonexistent:/srv",
            "/dev/null:/srv",
        ] {
            assert!(of(wrong).is_err(), "{wrong}");
        }
    }
}
