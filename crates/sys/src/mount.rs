//! What rustix lacks of mounts.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `struct mount_attr` (include/uapi/linux/mount.h).
#[repr(C)]
#[derive(Default)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

/// `MOUNT_ATTR_RDONLY`.
const READ_ONLY: u64 = 1;
/// `AT_RECURSIVE` (include/uapi/linux/fcntl.h).
const RECURSIVE: libc::c_int = 0x8000;

/// Makes a tree of mounts read-only, each of them and without a change of what else they are. (mount_setattr(2): a remount would
/// have to name every flag that another user namespace has locked.)
///
/// # Errors
/// Older than Linux 5.12; not a mount's own descriptor.
pub fn set_read_only(tree: BorrowedFd<'_>) -> io::Result<()> {
    let attributes = MountAttributes { set: READ_ONLY, ..MountAttributes::default() };
    // SAFETY: the kernel reads the empty path and as many bytes of the structure as it has.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | RECURSIVE,
            &raw const attributes,
            size_of::<MountAttributes>(),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
