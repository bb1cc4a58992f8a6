//! Controls of /dev/fuse. Source: include/uapi/linux/fuse.h.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `struct fuse_backing_map`.
#[repr(C)]
struct BackingMap {
    fd: i32,
    flags: u32,
    padding: u64,
}

/// `_IOR(229, 0, uint32_t)`, `_IOW(229, 1, struct fuse_backing_map)`, `_IOW(229, 2, uint32_t)`.
const CLONE: u64 = 0x8004_e500;
const BACKING_OPEN: u64 = 0x4010_e501;
const BACKING_CLOSE: u64 = 0x4004_e502;

/// Makes `device`, freshly opened, one more queue of the mount that `mounted` serves.
///
/// # Errors
/// Older than Linux 4.2.
pub fn clone(device: BorrowedFd<'_>, mounted: BorrowedFd<'_>) -> io::Result<()> {
    let mounted = mounted.as_raw_fd();
    // SAFETY: the kernel reads one 32-bit number.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), CLONE as _, &raw const mounted) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Registers a file to which reads and writes may go directly, and returns its number. Needs `CAP_SYS_ADMIN`.
///
/// # Errors
/// Older than Linux 6.9; a file system that does not serve for it.
pub fn open_backing(device: BorrowedFd<'_>, file: BorrowedFd<'_>) -> io::Result<i32> {
    let map = BackingMap { fd: file.as_raw_fd(), flags: 0, padding: 0 };
    // SAFETY: the kernel reads one fuse_backing_map.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), BACKING_OPEN as _, &raw const map) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Lets go of a registered file.
///
/// # Errors
/// There is none of this number.
pub fn close_backing(device: BorrowedFd<'_>, backing: i32) -> io::Result<()> {
    // SAFETY: the kernel reads one 32-bit number.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), BACKING_CLOSE as _, &raw const backing) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
