//! Memory and descriptors of another process.
//!
//! Sources: pidfd_open(2), pidfd_getfd(2), process_vm_readv(2), kcmp(2).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// `PIDFD_THREAD`: a descriptor of a thread that is no group leader (Linux 6.9).
const PIDFD_THREAD: libc::c_uint = libc::O_EXCL as libc::c_uint;
/// `KCMP_EPOLL_TFD` of `include/uapi/linux/kcmp.h`.
const KCMP_EPOLL_TFD: libc::c_int = 7;

fn descriptor(result: libc::c_long) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the calls whose results come here return a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(result as RawFd) })
}

/// A descriptor of a thread.
///
/// # Errors
/// `ESRCH`; `EINVAL` for a thread that is no leader before Linux 6.9.
pub fn open_thread(tid: u32) -> io::Result<OwnedFd> {
    // SAFETY: no memory is involved.
    descriptor(unsafe { libc::syscall(libc::SYS_pidfd_open, tid, PIDFD_THREAD) })
}

/// A descriptor of a process, named by its leader.
///
/// # Errors
/// `ESRCH`, `EINVAL` for another thread than the leader.
pub fn open_process(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: no memory is involved.
    descriptor(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// A copy of the descriptor that `process` has under `number`.
///
/// # Errors
/// `EBADF`: it has none; `ESRCH`: it is gone; `EPERM`.
pub fn take_descriptor(process: BorrowedFd<'_>, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: no memory is involved.
    descriptor(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) })
}

/// Sends a signal to the process behind a descriptor.
///
/// # Errors
/// `ESRCH`, `EPERM`.
pub fn signal(process: BorrowedFd<'_>, number: i32) -> io::Result<()> {
    // SAFETY: the siginfo pointer may be null (pidfd_send_signal(2)).
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_raw_fd(),
            number,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sends a signal to a thread of a process (tgkill(2)).
///
/// # Errors
/// `ESRCH`, `EPERM`.
pub fn signal_thread(process: u32, tid: u32, number: i32) -> io::Result<()> {
    // SAFETY: no memory is involved.
    let result = unsafe { libc::syscall(libc::SYS_tgkill, process, tid, number) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Reads memory of a thread at `address` into `buffer`, up to the first byte that is not readable.
///
/// # Errors
/// `EFAULT`, `ESRCH`, `EPERM`.
pub fn read_memory(tid: u32, address: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let local = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: buffer.len() };
    // SAFETY: the kernel writes into `buffer` only; the remote address is checked by the kernel.
    let read =
        unsafe { libc::process_vm_readv(tid as libc::pid_t, &raw const local, 1, &raw const remote, 1, 0) };
    if read < 0 { Err(io::Error::last_os_error()) } else { Ok(read as usize) }
}

/// Writes `bytes` to memory of a thread at `address`.
///
/// # Errors
/// `EFAULT` (also when only a part is writable), `ESRCH`, `EPERM`.
pub fn write_memory(tid: u32, address: u64, bytes: &[u8]) -> io::Result<()> {
    let local = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: bytes.len() };
    // SAFETY: the kernel only reads `bytes`; the remote address is checked by the kernel.
    let written =
        unsafe { libc::process_vm_writev(tid as libc::pid_t, &raw const local, 1, &raw const remote, 1, 0) };
    match usize::try_from(written) {
        Err(_) => Err(io::Error::last_os_error()),
        Ok(count) if count < bytes.len() => Err(io::Error::from_raw_os_error(libc::EFAULT)),
        Ok(_) => Ok(()),
    }
}

/// Whether descriptor `number` of `pid` is registered, as that number, in its epoll instance `epoll`.
///
/// # Errors
/// `EBADF`/`EINVAL`: `epoll` is no epoll descriptor (any more); `ENOSYS`: a kernel without kcmp(2).
pub fn in_epoll(pid: u32, epoll: RawFd, number: RawFd) -> io::Result<bool> {
    /// `struct kcmp_epoll_slot`.
    #[repr(C)]
    struct Slot {
        epoll: u32,
        target: u32,
        offset: u64,
    }
    // The same number can be registered for several files; the one wanted is rarely not the first.
    for offset in 0..8 {
        let slot = Slot { epoll: epoll.unsigned_abs(), target: number.unsigned_abs(), offset };
        // SAFETY: the kernel reads one `kcmp_epoll_slot`.
        let result =
            unsafe { libc::syscall(libc::SYS_kcmp, pid, pid, KCMP_EPOLL_TFD, number, &raw const slot) };
        if result == 0 {
            return Ok(true);
        }
        if result < 0 {
            let error = io::Error::last_os_error();
            return if error.raw_os_error() == Some(libc::ENOENT) { Ok(false) } else { Err(error) };
        }
    }
    Ok(false)
}
