//! Files: scattered I/O on memory that others may change, handles of inodes, locks of open file descriptions.
//!
//! Sources: readv(2), open_by_handle_at(2), fcntl(2), ioctl_iflags(2).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use vm_memory::VolatileSlice;

/// At most so many pieces are read or written by one call (`UIO_MAXIOV`).
const MAX_PIECES: usize = 1024;

/// Appends, whatever the offset is (Linux 4.16).
pub const APPEND: i32 = libc::RWF_APPEND;
/// As `O_DSYNC`, for one write.
pub const DSYNC: i32 = libc::RWF_DSYNC;
/// As `O_SYNC`, for one write.
pub const SYNC: i32 = libc::RWF_SYNC;

fn vectors(pieces: &[VolatileSlice<'_>]) -> Vec<libc::iovec> {
    let pieces = pieces.iter().take(MAX_PIECES);
    pieces
        .map(|piece| libc::iovec { iov_base: piece.ptr_guard_mut().as_ptr().cast(), iov_len: piece.len() })
        .collect()
}

fn count(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Reads from `offset` of a file into `pieces`, and tells how many bytes (preadv(2)).
///
/// # Errors
/// What the kernel says.
pub fn read_at(file: BorrowedFd<'_>, pieces: &[VolatileSlice<'_>], offset: u64) -> io::Result<usize> {
    let vectors = vectors(pieces);
    // SAFETY: each vector names memory that its slice guarantees to be mapped and writable for as long as it
    // lives; that others see it change is what a volatile slice is for.
    count(unsafe {
        libc::preadv(file.as_raw_fd(), vectors.as_ptr(), vectors.len() as i32, offset.cast_signed())
    })
}

/// Writes `pieces` at `offset` of a file, and tells how many bytes (pwritev2(2)). `flags` of [`APPEND`], [`DSYNC`], [`SYNC`].
///
/// # Errors
/// What the kernel says.
pub fn write_at(
    file: BorrowedFd<'_>,
    pieces: &[VolatileSlice<'_>],
    offset: u64,
    flags: i32,
) -> io::Result<usize> {
    let vectors = vectors(pieces);
    // SAFETY: as in `read_at`; the memory is only read.
    count(unsafe {
        libc::pwritev2(file.as_raw_fd(), vectors.as_ptr(), vectors.len() as i32, offset.cast_signed(), flags)
    })
}

/// Most bytes of a handle (`MAX_HANDLE_SZ`).
const MAX_HANDLE: usize = 128;

/// Names an inode of a file system beyond the life of a descriptor (name_to_handle_at(2)).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FileHandle {
    kind: i32,
    bytes: Box<[u8]>,
}

#[repr(C)]
struct RawHandle {
    header: libc::file_handle,
    bytes: [u8; MAX_HANDLE],
}

/// `FILEID_INO64_GEN` (include/linux/exportfs.h): of FUSE the node and its generation (`fuse_encode_fh` in fs/fuse/inode.c).
const NODE_AND_GENERATION: i32 = 0x81;

impl FileHandle {
    /// The number that the server of a FUSE file system gave the inode. The handle must be of such a file system.
    #[must_use]
    pub fn fuse_node(&self) -> Option<u64> {
        let (high, rest) = self.bytes.split_first_chunk()?;
        let (low, _generation) = rest.split_first_chunk()?;
        let word = |bytes: &[u8; 4]| u64::from(u32::from_ne_bytes(*bytes));
        (self.kind == NODE_AND_GENERATION).then(|| word(high) << 32 | word(low))
    }

    /// The handle of what `file` is open on, `O_PATH` included.
    ///
    /// # Errors
    /// `EOPNOTSUPP`: its file system has none.
    pub fn of(file: BorrowedFd<'_>) -> io::Result<Self> {
        let mut raw = RawHandle {
            header: libc::file_handle { handle_bytes: MAX_HANDLE as u32, handle_type: 0, f_handle: [] },
            bytes: [0; MAX_HANDLE],
        };
        let mut mount = 0;
        // SAFETY: the kernel writes at most `handle_bytes` bytes behind the header, where there are as many, and
        // one int.
        let result = unsafe {
            libc::name_to_handle_at(
                file.as_raw_fd(),
                c"".as_ptr(),
                (&raw mut raw).cast(),
                &raw mut mount,
                libc::AT_EMPTY_PATH,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        let length = (raw.header.handle_bytes as usize).min(MAX_HANDLE);
        let bytes = raw.bytes.get(..length).unwrap_or_default().into();
        Ok(Self { kind: raw.header.handle_type, bytes })
    }

    /// 64 bits that tell it from another: the same for the same inode in all lives of its file system, on every machine,
    /// and never 0. (File systems put the inode's generation into their handles.)
    #[must_use]
    pub fn digest(&self) -> u64 {
        digest(self.kind.to_le_bytes().iter().chain(&*self.bytes))
    }

    /// Opens the inode. `mount` is open on anything of its file system, and not `O_PATH`. Needs
    /// `CAP_DAC_READ_SEARCH`.
    ///
    /// # Errors
    /// `ESTALE`: it is gone. What open(2) says.
    pub fn open(&self, mount: BorrowedFd<'_>, flags: i32) -> io::Result<OwnedFd> {
        let mut raw = RawHandle {
            header: libc::file_handle {
                handle_bytes: self.bytes.len() as u32,
                handle_type: self.kind,
                f_handle: [],
            },
            bytes: [0; MAX_HANDLE],
        };
        for (to, from) in raw.bytes.iter_mut().zip(&self.bytes) {
            *to = *from;
        }
        // SAFETY: the kernel reads the header and the bytes that it counts, and returns a new descriptor.
        unsafe {
            let result =
                libc::open_by_handle_at(mount.as_raw_fd(), (&raw mut raw).cast(), flags | libc::O_CLOEXEC);
            if result < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(result)) }
        }
    }
}

/// FNV-1a, which will be the same in all versions, as a standard library's hasher need not be.
fn digest<'a>(bytes: impl Iterator<Item = &'a u8>) -> u64 {
    let sum = bytes
        .fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    sum.max(1)
}

/// A lock of a range of a file. `kind` is `F_RDLCK`, `F_WRLCK` or `F_UNLCK`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeLock {
    /// See above.
    pub kind: i16,
    /// First byte.
    pub start: i64,
    /// Bytes; 0 for all that follow.
    pub length: i64,
}

impl RangeLock {
    fn raw(self) -> libc::flock {
        libc::flock {
            l_type: self.kind,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: self.start,
            l_len: self.length,
            l_pid: 0,
        }
    }

    /// Takes or drops it for the open file description, without waiting (`F_OFD_SETLK`).
    ///
    /// # Errors
    /// `EAGAIN`: somebody else has it.
    pub fn set(self, file: BorrowedFd<'_>) -> io::Result<()> {
        let raw = self.raw();
        // SAFETY: the kernel reads one flock.
        let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const raw) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// A lock that is in its way (`F_OFD_GETLK`).
    ///
    /// # Errors
    /// What fcntl(2) says.
    pub fn conflict(self, file: BorrowedFd<'_>) -> io::Result<Option<Self>> {
        let mut raw = self.raw();
        // SAFETY: the kernel reads and writes one flock.
        let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut raw) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        let found = Self { kind: raw.l_type, start: raw.l_start, length: raw.l_len };
        Ok((i32::from(raw.l_type) != libc::F_UNLCK).then_some(found))
    }
}

/// The locks of ranges that an open file description holds, as /proc tells (proc_pid_fdinfo(5)); none where it is not there.
#[must_use]
pub fn range_locks(file: BorrowedFd<'_>) -> Vec<RangeLock> {
    let path = format!("/proc/self/fdinfo/{}", file.as_raw_fd());
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().filter_map(range_lock).collect()
}

/// A line like `lock:\t1: OFDLCK ADVISORY  WRITE -1 fe:00:1234 0 EOF` (lock_get_status, fs/locks.c).
fn range_lock(line: &str) -> Option<RangeLock> {
    let mut words = line.strip_prefix("lock:")?.split_whitespace().skip(1);
    if words.next()? != "OFDLCK" {
        return None;
    }
    let kind = match words.nth(1)? {
        "READ" => libc::F_RDLCK,
        "WRITE" => libc::F_WRLCK,
        _ => return None,
    };
    let start: i64 = words.nth(2)?.parse().ok()?;
    let length = match words.next()? {
        "EOF" => 0,
        end => end.parse::<i64>().ok()?.checked_sub(start)?.checked_add(1)?,
    };
    Some(RangeLock { kind: kind as i16, start, length })
}

/// `struct fsxattr` (ioctl `FS_IOC_FSGETXATTR`), as bytes: it is only passed through.
pub const FSXATTR: usize = 28;

/// Reads the inode flags of a file (`FS_IOC_GETFLAGS`).
///
/// # Errors
/// `ENOTTY`: its file system has none.
pub fn flags(file: BorrowedFd<'_>) -> io::Result<u32> {
    let mut flags: libc::c_long = 0;
    // SAFETY: the kernel writes an int; the buffer is not smaller.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::FS_IOC_GETFLAGS as _, &raw mut flags) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(flags as u32) }
}

/// Reads the extended inode flags of a file (`FS_IOC_FSGETXATTR`).
///
/// # Errors
/// `ENOTTY`: its file system has none.
pub fn extended_flags(file: BorrowedFd<'_>) -> io::Result<[u8; FSXATTR]> {
    let mut bytes = [0u32; FSXATTR / 4];
    /// `_IOR('X', 31, struct fsxattr)`.
    const FS_IOC_FSGETXATTR: u64 = 0x801c_581f;
    // SAFETY: the kernel writes one fsxattr, which has this size and the alignment of an int.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FSGETXATTR as _, bytes.as_mut_ptr()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut all = [0; FSXATTR];
    for (to, from) in all.iter_mut().zip(bytes.iter().flat_map(|word| word.to_ne_bytes())) {
        *to = from;
    }
    Ok(all)
}

/// The user and group by which the calling thread's access to files is judged (setfsuid(2)).
///
/// # Errors
/// `EPERM`: the kernel did not take them.
pub fn act_as(user: u32, group: u32) -> io::Result<()> {
    // SAFETY: no memory is involved; both calls are of the thread only. They return the value of before, and
    // a second call with an impossible value tells what was set.
    let (now_group, now_user) = unsafe {
        libc::setfsgid(group);
        libc::setfsuid(user);
        (libc::setfsgid(u32::MAX), libc::setfsuid(u32::MAX))
    };
    if now_group.cast_unsigned() == group && now_user.cast_unsigned() == user {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(libc::EPERM))
    }
}

/// The same by effective ids, for kernels that know no others (gVisor). If the user was root's, the thread's effective
/// capabilities go; its permitted ones stay, because its real ids do.
///
/// # Errors
/// `EPERM`: the kernel did not take them.
pub fn act_effectively_as(user: u32, group: u32) -> io::Result<()> {
    const SAME: u32 = u32::MAX;
    if user == SAME || group == SAME {
        return Err(io::Error::from_raw_os_error(libc::EPERM));
    }
    // The C library would change all threads.
    // SAFETY: no memory is involved; both calls are of the thread only.
    let result = unsafe {
        match libc::syscall(libc::SYS_setresgid, SAME, group, SAME) {
            0 => libc::syscall(libc::SYS_setresuid, SAME, user, SAME),
            failed => failed,
        }
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Gives the calling thread an umask and a working directory of its own (unshare(2), `CLONE_FS`).
///
/// # Errors
/// None known.
pub fn own_umask() -> io::Result<()> {
    // SAFETY: what this thread no longer shares is no memory.
    let result = unsafe { libc::unshare(libc::CLONE_FS) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_digest_never_changes() {
        let handle = FileHandle { kind: 1, bytes: [1, 2, 3, 4, 5, 6, 7, 8].into() };
        assert_eq!(handle.digest(), 0x16eb_1c14_fc16_607c);
        assert_ne!(handle.digest(), FileHandle { kind: 2, ..handle }.digest());
    }

    #[test]
    fn an_inode_has_one_digest_however_it_is_opened() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let file = std::fs::File::create(&path).unwrap();
        // Not every file system has handles.
        let Ok(handle) = FileHandle::of(file.as_fd()) else { return };
        std::fs::hard_link(&path, directory.path().join("link")).unwrap();
        std::fs::rename(&path, directory.path().join("moved")).unwrap();
        for name in ["link", "moved"] {
            let again = std::fs::File::open(directory.path().join(name)).unwrap();
            assert_eq!(FileHandle::of(again.as_fd()).unwrap().digest(), handle.digest());
        }
        let other = std::fs::File::create(&path).unwrap();
        assert_ne!(FileHandle::of(other.as_fd()).unwrap().digest(), handle.digest());
    }

    #[test]
    fn a_description_tells_its_locks_of_ranges() {
        let path = std::env::temp_dir().join(format!("kso-range-locks-{}", std::process::id()));
        let file = std::fs::File::create(&path).unwrap();
        let other = std::fs::File::options().write(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(range_locks(file.as_fd()), []);
        let write = RangeLock { kind: libc::F_WRLCK as i16, start: 5, length: 7 };
        let rest = RangeLock { kind: libc::F_WRLCK as i16, start: 100, length: 0 };
        write.set(file.as_fd()).unwrap();
        rest.set(file.as_fd()).unwrap();
        assert_eq!(range_locks(file.as_fd()), [write, rest]);
        assert_eq!(range_locks(other.as_fd()), []);
        assert_eq!(RangeLock { start: 0, length: 50, ..write }.conflict(other.as_fd()).unwrap(), Some(write));
        assert_eq!(RangeLock { start: 50, length: 0, ..write }.conflict(other.as_fd()).unwrap(), Some(rest));
    }

    #[test]
    fn other_lines_tell_of_no_lock_of_a_range() {
        for line in [
            "pos:\t0",
            "lock:\t1: FLOCK  ADVISORY  WRITE 7 fe:00:12 0 EOF",
            "lock:\t1: POSIX  ADVISORY  WRITE 7 fe:00:12 0 EOF",
            "lock:\t1: OFDLCK ADVISORY  WRITE -1 fe:00:12 9 x",
            "lock:\t1: OFDLCK",
            "lock:",
        ] {
            assert_eq!(range_lock(line), None, "{line}");
        }
        let line = "lock:\t1: OFDLCK ADVISORY  READ  -1 fe:00:12 3 3";
        assert_eq!(range_lock(line), Some(RangeLock { kind: libc::F_RDLCK as i16, start: 3, length: 1 }));
    }
}
