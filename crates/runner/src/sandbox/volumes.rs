//! Directories that the program sees elsewhere than they are, or that another kernel performs.
//!
//! Those of this host are bound natively. For the others a FUSE file system is mounted here, because its mount belongs to
//! the user namespace of who opened /dev/fuse (fs/fuse/inode.c); its requests are answered outside, from the descriptor that is
//! handed over. Until they are, whoever touches it waits.

use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags, mount, move_mount, open_tree};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

/// A directory that the program sees. Paths are absolute, and without links.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Where it is on this host; `None`: another kernel performs it.
    pub source: Option<PathBuf>,
    /// Where the program sees it.
    pub target: PathBuf,
    /// Nothing is to be written.
    pub read_only: bool,
}

/// Binds what is this host's. All of them are taken before the first is in place: a source means what it means outside.
pub(super) fn bind(volumes: &[Volume]) -> Result<(), String> {
    let mut trees = Vec::new();
    for volume in volumes {
        let Some(source) = &volume.source else { continue };
        let what = |error: io::Error| format!("cannot bind {}: {error}", source.display());
        let flags =
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
        let tree = open_tree(CWD, source, flags).map_err(|error| what(error.into()))?;
        if volume.read_only {
            kso_sys::mount::set_read_only(tree.as_fd()).map_err(what)?;
        }
        trees.push((tree, &volume.target));
    }
    for (tree, target) in trees {
        move_mount(&tree, c"", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .map_err(|error| format!("cannot mount on {}: {}", target.display(), io::Error::from(error)))?;
    }
    Ok(())
}

/// Mounts what another kernel performs: one descriptor for each, in order.
pub(super) fn mount_others(volumes: &[Volume]) -> Result<Vec<OwnedFd>, String> {
    volumes.iter().filter(|volume| volume.source.is_none()).map(mount_one).collect()
}

fn mount_one(volume: &Volume) -> Result<OwnedFd, String> {
    let device = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|error| {
        let error = io::Error::from(error);
        format!("cannot open /dev/fuse: {error}\nload the fuse module: modprobe fuse (in a container: --device /dev/fuse)")
    })?;
    let user = rustix::process::geteuid().as_raw();
    let group = rustix::process::getegid().as_raw();
    let data = format!(
        "fd={},rootmode=40000,user_id={user},group_id={group},default_permissions,allow_other",
        device.as_raw_fd()
    );
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV;
    flags.set(MountFlags::RDONLY, volume.read_only);
    place(&volume.target, flags, &data)
        .map_err(|error| format!("cannot mount on {}: {error}", volume.target.display()))?;
    Ok(device)
}

fn place(target: &Path, flags: MountFlags, data: &str) -> io::Result<()> {
    let data = CString::new(data)?;
    Ok(mount("kso", target, "fuse", flags, data.as_c_str())?)
}
