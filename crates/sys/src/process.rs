//! Starting processes in new namespaces, and what a first process needs.
//!
//! Sources: clone(2), prctl(2), signalfd(2), pid_namespaces(7).

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// User, network, mount, pid, ipc and uts namespaces.
pub const ALL_NAMESPACES: u64 = (libc::CLONE_NEWUSER
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS) as u64;

/// A child.
#[derive(Debug)]
pub struct Child {
    /// Its number in our pid namespace.
    pub pid: u32,
    /// Its descriptor: readable when it has ended (pidfd_open(2)).
    pub pidfd: OwnedFd,
}

/// Forks into the namespaces of `flags` (0 for none). The child runs `body` and exits with what it returns.
///
/// # Errors
/// `EPERM`, `ENOSPC` (too many namespaces), `EUSERS`; `EDEADLK` if this process has several threads, since
/// the child of such a process may not run ordinary code (fork(2)).
pub fn fork(flags: u64, body: impl FnOnce() -> i32) -> io::Result<Child> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::from_raw_os_error(libc::EDEADLK));
    }
    let mut pidfd: libc::c_int = -1;
    // SAFETY: clone_args is plain data.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = flags | libc::CLONE_PIDFD as u64;
    arguments.pidfd = (&raw mut pidfd) as u64;
    arguments.exit_signal = libc::SIGCHLD as u64;
    // SAFETY: without CLONE_VM and with no stack given this is fork(2): the child has a copy of everything,
    // and since there is one thread only, every lock is as this thread left it.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of::<libc::clone_args>()) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let status = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).unwrap_or(125);
            // SAFETY: ends the process at once, without running what the parent has at exit.
            unsafe { libc::_exit(status) }
        }
        pid => {
            // SAFETY: the kernel stored a new descriptor (CLONE_PIDFD).
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Child { pid: pid as u32, pidfd })
        }
    }
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// With this status.
    Exited(i32),
    /// By this signal.
    Killed(i32),
}

impl Ended {
    /// The status a shell would report: 128 + n for signal n.
    #[must_use]
    pub fn shell_status(self) -> i32 {
        match self {
            Self::Exited(status) => status,
            Self::Killed(signal) => 128 + signal,
        }
    }
}

/// Waits for any child, or for `pid`. `None`: there is none.
///
/// # Errors
/// `EINTR` is retried; what else waitpid(2) says.
pub fn wait(pid: Option<u32>) -> io::Result<Option<(u32, Ended)>> {
    loop {
        let mut status = 0;
        // SAFETY: the kernel writes one int.
        let result = unsafe { libc::waitpid(pid.map_or(-1, |pid| pid as libc::pid_t), &raw mut status, 0) };
        if result < 0 {
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR) => continue,
                Some(libc::ECHILD) => return Ok(None),
                _ => return Err(error),
            }
        }
        let ended = if libc::WIFSIGNALED(status) {
            Ended::Killed(libc::WTERMSIG(status))
        } else if libc::WIFEXITED(status) {
            Ended::Exited(libc::WEXITSTATUS(status))
        } else {
            continue;
        };
        return Ok(Some((result as u32, ended)));
    }
}

/// Asks the kernel to kill this process when its parent dies (prctl(2), `PR_SET_PDEATHSIG`).
///
/// # Errors
/// None known.
pub fn die_with_parent() -> io::Result<()> {
    // SAFETY: no memory is involved.
    let result = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong, 0, 0, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// From now on processes below this one that lose their parents become its children (prctl(2),
/// `PR_SET_CHILD_SUBREAPER`).
///
/// # Errors
/// None known.
pub fn adopt_orphans() -> io::Result<()> {
    // SAFETY: no memory is involved.
    let result = unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1 as libc::c_ulong, 0, 0, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Gives this process, which has one thread, mounts of its own: a copy of those it had (mount_namespaces(7)).
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN`.
pub fn own_mounts() -> io::Result<()> {
    // SAFETY: no memory is involved.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNS) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Gives the calling thread a descriptor table of its own with nothing but the standard streams in it
/// (close_range(2), `CLOSE_RANGE_UNSHARE`).
///
/// # Errors
/// `ENOSYS` before Linux 5.9.
pub fn private_descriptors() -> io::Result<()> {
    // SAFETY: the other threads keep their table. This one loses its copies: a type that owns a descriptor
    // and is moved here afterwards would name another file, which breaks its I/O, not memory.
    let result = unsafe { libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_UNSHARE as i32) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A copy of a descriptor that this process was started with.
///
/// # Errors
/// `EBADF`: it was not.
pub fn inherited(number: i32) -> io::Result<OwnedFd> {
    // SAFETY: no memory is involved, and the copy is new: whoever owns `number` keeps it.
    let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Puts a copy of `descriptor` at exactly `number` of this thread's table, whatever was there before.
///
/// # Errors
/// `EBADF`: `number` is beyond the limit of open files.
pub fn place(descriptor: BorrowedFd<'_>, number: i32) -> io::Result<OwnedFd> {
    if descriptor.as_raw_fd() == number {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: dup3 makes `number` a new descriptor, which the caller now owns. A caller that overwrites a
    // descriptor somebody else owns breaks that owner's I/O, not memory.
    unsafe {
        if libc::dup3(descriptor.as_raw_fd(), number, libc::O_CLOEXEC) < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(number))
    }
}

/// Signals that are taken as messages from a descriptor instead of interrupting.
#[derive(Debug)]
pub struct Signals {
    descriptor: OwnedFd,
    before: libc::sigset_t,
}

/// A signal that came.
#[derive(Clone, Copy, Debug)]
pub struct Signal {
    /// Its number.
    pub number: i32,
    /// Whether the kernel sent it to the whole foreground process group (a key on the terminal).
    pub from_terminal: bool,
}

impl Signals {
    /// Blocks `numbers` in this thread and reads them from a descriptor.
    ///
    /// # Errors
    /// `EMFILE`, `EINVAL`.
    pub fn take(numbers: &[i32]) -> io::Result<Self> {
        let mut set = MaybeUninit::<libc::sigset_t>::zeroed();
        let mut before = MaybeUninit::<libc::sigset_t>::zeroed();
        // SAFETY: both sets are initialised before they are read; signalfd returns a new descriptor.
        unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for &number in numbers {
                libc::sigaddset(set.as_mut_ptr(), number);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), before.as_mut_ptr());
            let raw = libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if raw < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Self { descriptor: OwnedFd::from_raw_fd(raw), before: before.assume_init() })
        }
    }

    /// The next signal, if one is there.
    #[must_use]
    pub fn next(&self) -> Option<Signal> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::zeroed();
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: the kernel writes whole records of this size; it is plain data and was zeroed.
        let info = unsafe {
            if libc::read(self.descriptor.as_raw_fd(), info.as_mut_ptr().cast(), size) != size as isize {
                return None;
            }
            info.assume_init()
        };
        Some(Signal { number: info.ssi_signo as i32, from_terminal: info.ssi_code == libc::SI_KERNEL })
    }

    /// Puts the mask of before back: a child does so before it runs a program.
    pub fn restore_mask(&self) {
        // SAFETY: the set was filled by pthread_sigmask.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, std::ptr::null_mut()) };
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// Blocks every signal in the calling thread: a helper's system calls are not to be interrupted.
pub fn block_signals() {
    let mut set = MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: the set is initialised before it is read.
    unsafe {
        libc::sigfillset(set.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
    }
}

/// Gives `SIGPIPE` its default action back, which Rust's runtime ignores: a program expects it.
pub fn default_sigpipe() {
    // SAFETY: sets a disposition, no handler.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// The limit of open files: soft and hard (getrlimit(2)).
///
/// # Errors
/// None known.
pub fn open_files_limit() -> io::Result<(u64, u64)> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one rlimit.
    let result = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok((limit.rlim_cur, limit.rlim_max)) }
}

/// Sets the limit of open files.
///
/// # Errors
/// `EPERM`: above the hard limit without `CAP_SYS_RESOURCE`.
pub fn set_open_files_limit(soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit { rlim_cur: soft, rlim_max: hard };
    // SAFETY: the kernel reads one rlimit.
    let result = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
