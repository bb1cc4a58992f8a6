//! The guest's files: the host's, under an overlay in guest memory, and what a Linux system has besides.
//!
//! ```text
//!   /                 overlay: host's root (virtiofs, read-only) below, guest memory above
//!     dev proc sys    the guest's own
//!     run tmp         guest memory
//!     (others)        virtiofs, as told
//! ```

use crate::boot::{self, mount_at};
use kso_wire::job::{Mount, Start};
use rustix::mount::{MountFlags, mount_move};
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

/// Where the parts of the root are until it is one.
const LOWER: &str = "/kso/lower";
const MEMORY: &str = "/kso/memory";
const ROOT: &str = "/kso/root";

/// A word of the kernel's command line: stay in the initramfs, for tests without a file system.
const INITRAMFS: &str = "kso.root=initramfs";

const PLAIN: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);

/// Makes the file tree and enters it. Without a mount of `/` the initramfs stays the root, which has next to nothing in it.
pub fn arrange(start: &Start) -> Result<(), String> {
    let shared: &[Mount] = if boot::has_word(INITRAMFS) { &[] } else { &start.mounts };
    let root = match shared.iter().find(|mount| mount.target == b"/") {
        Some(mount) => {
            overlay(mount)?;
            Path::new(ROOT)
        }
        None => Path::new("/"),
    };
    for place in ["dev", "proc", "sys", "run", "tmp"] {
        make_directory(&root.join(place))?;
    }
    if root != Path::new("/") {
        for place in ["dev", "proc", "sys"] {
            let from = Path::new("/").join(place);
            mount_move(&from, root.join(place))
                .map_err(|error| format!("cannot move {}: {error}", from.display()))?;
        }
    }
    devices(&root.join("dev"))?;
    run_directory(&root.join("run"))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    mount_at("tmpfs", &root.join("tmp"), "tmpfs", flags, Some(c"mode=1777"))?;
    // Absent from a kernel without control groups.
    let _ = mount_at("cgroup2", &root.join("sys/fs/cgroup"), "cgroup2", PLAIN, None);
    for mount in shared.iter().filter(|mount| mount.target != b"/") {
        share(root, mount)?;
    }
    settings(&root.join("etc"), start)?;
    enter(root)
}

fn overlay(mount: &Mount) -> Result<(), String> {
    for place in [LOWER, MEMORY, ROOT] {
        make_directory(Path::new(place))?;
    }
    mount_at(&mount.tag, Path::new(LOWER), "virtiofs", MountFlags::RDONLY, None)?;
    mount_at("tmpfs", Path::new(MEMORY), "tmpfs", MountFlags::empty(), Some(c"mode=755"))?;
    for place in ["upper", "work"] {
        make_directory(&Path::new(MEMORY).join(place))?;
    }
    let options = c"lowerdir=/kso/lower,upperdir=/kso/memory/upper,workdir=/kso/memory/work";
    mount_at("overlay", Path::new(ROOT), "overlay", MountFlags::empty(), Some(options))
}

fn share(root: &Path, mount: &Mount) -> Result<(), String> {
    let target = inside(root, &mount.target)?;
    make_directory(&target)?;
    let flags = if mount.read_only { PLAIN | MountFlags::RDONLY } else { PLAIN };
    mount_at(&mount.tag, &target, "virtiofs", flags, None)
}

/// Where a path of the guest is before its root is entered.
fn inside(root: &Path, path: &[u8]) -> Result<PathBuf, String> {
    let path = Path::new(OsStr::from_bytes(path));
    let parts = path.strip_prefix("/").map_err(|_| format!("{}: not an absolute path", path.display()))?;
    Ok(root.join(parts))
}

fn make_directory(path: &Path) -> Result<(), String> {
    fs::create_dir_all(path).map_err(|error| format!("cannot make {}: {error}", path.display()))
}

fn devices(dev: &Path) -> Result<(), String> {
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        let _ = symlink(target, dev.join(name));
    }
    for place in ["pts", "shm"] {
        make_directory(&dev.join(place))?;
    }
    let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
    mount_at("devpts", &dev.join("pts"), "devpts", flags, Some(c"gid=5,mode=620,ptmxmode=666"))?;
    mount_at("tmpfs", &dev.join("shm"), "tmpfs", PLAIN, Some(c"mode=1777"))
}

/// Servers expect their directories there: those of the host are made anew, empty.
fn run_directory(run: &Path) -> Result<(), String> {
    let directories: Vec<_> = fs::read_dir(run)
        .map(|entries| {
            let entries = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            entries.filter_map(|entry| Some((entry.file_name(), entry.metadata().ok()?))).collect()
        })
        .unwrap_or_default();
    mount_at("tmpfs", run, "tmpfs", PLAIN, Some(c"mode=755"))?;
    for (name, like) in directories {
        let path = run.join(name);
        let made = fs::create_dir(&path)
            .and_then(|()| std::os::unix::fs::chown(&path, Some(like.uid()), Some(like.gid())))
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(like.mode() & 0o7777)));
        made.map_err(|error| format!("cannot make {}: {error}", path.display()))?;
    }
    Ok(())
}

/// Files of the guest that tell of itself.
fn settings(etc: &Path, start: &Start) -> Result<(), String> {
    make_directory(etc)?;
    let name = &start.hostname;
    let mut hosts = fs::read_to_string(etc.join("hosts"))
        .unwrap_or_else(|_| "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".into());
    if !hosts.split_whitespace().any(|word| word == name) {
        if !hosts.is_empty() && !hosts.ends_with('\n') {
            hosts.push('\n');
        }
        hosts.push_str(&format!("127.0.0.1\t{name}\n"));
    }
    let files: [(&str, &[u8]); 3] = [
        ("resolv.conf", &start.resolv_conf),
        ("hosts", hosts.as_bytes()),
        ("hostname", &[name.as_bytes(), b"\n"].concat()),
    ];
    for (name, text) in files {
        let path = etc.join(name);
        replace(&path, text).map_err(|error| format!("cannot write {}: {error}", path.display()))?;
    }
    Ok(())
}

/// Writes a file anew: what it was may be a link to somewhere else.
fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::write(path, text)
}

/// Makes `root` the root (switch_root(8), without looking for what is left behind: the initramfs holds only ourselves).
fn enter(root: &Path) -> Result<(), String> {
    if root == Path::new("/") {
        return Ok(());
    }
    let entered = std::env::set_current_dir(root)
        .and_then(|()| Ok(mount_move(".", "/")?))
        .and_then(|()| Ok(rustix::process::chroot(".")?))
        .and_then(|()| std::env::set_current_dir("/"));
    entered.map_err(|error| format!("cannot enter the root: {error}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_absolute_and_links_are_replaced() {
        assert_eq!(inside(Path::new("/kso/root"), b"/srv/a").unwrap(), Path::new("/kso/root/srv/a"));
        assert!(inside(Path::new("/kso/root"), b"srv").is_err());
        let directory = tempfile::tempdir().unwrap();
        let (link, other) = (directory.path().join("resolv.conf"), directory.path().join("other"));
        fs::write(&other, "theirs").unwrap();
        symlink(&other, &link).unwrap();
        replace(&link, b"ours").unwrap();
        assert_eq!(fs::read_to_string(&other).unwrap(), "theirs");
        assert_eq!(fs::read_to_string(&link).unwrap(), "ours");
    }
}
