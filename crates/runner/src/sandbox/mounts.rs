//! What the sandbox sees of files otherwise than the host does.

use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, unmount,
};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Mounts made here stay here.
pub(super) fn make_private() -> io::Result<()> {
    Ok(mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?)
}

/// Gives this process, which has one thread, mounts of its own with this text as `/etc/resolv.conf`. What is mounted outside
/// later is seen here, too, and not the other way.
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN`.
pub fn own_resolv_conf(text: &str) -> io::Result<()> {
    kso_sys::process::own_mounts()?;
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?;
    arrange(text, &[])
}

/// Puts `resolv_conf` over `/etc/resolv.conf` and hides the directories of `hidden` that exist.
pub(super) fn arrange(resolv_conf: &str, hidden: &[PathBuf]) -> io::Result<()> {
    // Following the link first: what it points to may lie in a directory that is hidden.
    let target = fs::canonicalize("/etc/resolv.conf").ok();
    for directory in hidden.iter().filter(|directory| directory.is_dir()) {
        empty(directory)?;
    }
    let Some(target) = target else {
        tracing::warn!("there is no /etc/resolv.conf on this host: programs will not find the name service");
        return Ok(());
    };
    if !target.exists() {
        // It was hidden: the link leads into an empty directory of ours.
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        return fs::write(target, resolv_conf);
    }
    // A file of our own to bind: in a file system that is seen by nobody and gone at once. /proc is a
    // directory that is always there.
    empty(Path::new("/proc"))?;
    let bound = fs::write("/proc/resolv.conf", resolv_conf)
        .and_then(|()| Ok(mount_bind("/proc/resolv.conf", &target)?));
    unmount("/proc", UnmountFlags::DETACH)?;
    bound
}

fn empty(directory: &Path) -> io::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    Ok(mount("tmpfs", directory, "tmpfs", flags, c"size=64k,mode=755")?)
}

/// A `/proc` of the new pid namespace. Where the outer one is masked (containers) the kernel refuses; then
/// the outer one stays, and shows numbers of the outer namespace.
pub(super) fn proc() -> io::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    Ok(mount("proc", "/proc", "proc", flags, None)?)
}
