//! FUSE as the kernel speaks it: version 7.40. Source: `include/uapi/linux/fuse.h`, linux/fs/fuse/.

mod types;

pub use types::*;

use bitflags::bitflags;

/// The major version that all FUSE since 2.6.14 speaks.
pub const MAJOR: u32 = 7;
/// The minor version that this code speaks: an older kernel is answered in its own.
pub const MINOR: u32 = 40;
/// Older kernels than Linux 5.1's are not served: their replies have other sizes.
pub const OLDEST_MINOR: u32 = 29;

/// The root's node.
pub const ROOT: u64 = 1;

/// Bytes of a request's header, and of a reply's.
pub const IN_HEADER: usize = size_of::<InHeader>();
/// See [`IN_HEADER`].
pub const OUT_HEADER: usize = size_of::<OutHeader>();

macro_rules! opcodes {
    ($($name:ident = $number:literal,)*) => {
        /// What a request asks for.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(missing_docs)]
        pub enum Opcode { $($name = $number,)* }

        impl Opcode {
            /// The opcode of this number.
            #[must_use]
            pub fn of(number: u32) -> Option<Self> {
                match number { $($number => Some(Self::$name),)* _ => None }
            }
        }
    };
}

opcodes! {
    Lookup = 1, Forget = 2, GetAttr = 3, SetAttr = 4, ReadLink = 5, SymLink = 6, MkNod = 8, MkDir = 9,
    Unlink = 10, RmDir = 11, Rename = 12, Link = 13, Open = 14, Read = 15, Write = 16, StatFs = 17,
    Release = 18, Fsync = 20, SetXattr = 21, GetXattr = 22, ListXattr = 23, RemoveXattr = 24, Flush = 25,
    Init = 26, OpenDir = 27, ReadDir = 28, ReleaseDir = 29, FsyncDir = 30, GetLk = 31, SetLk = 32,
    SetLkW = 33, Access = 34, Create = 35, Interrupt = 36, Bmap = 37, Destroy = 38, Ioctl = 39, Poll = 40,
    NotifyReply = 41, BatchForget = 42, Fallocate = 43, ReadDirPlus = 44, Rename2 = 45, Lseek = 46,
    CopyFileRange = 47, SetupMapping = 48, RemoveMapping = 49, SyncFs = 50, TmpFile = 51, StatX = 52,
    CopyFileRange64 = 53,
}

bitflags! {
    /// What both sides can do (`FUSE_INIT`): `flags` below, `flags2` in the upper half.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Features: u64 {
        /// Several reads at once.
        const ASYNC_READ = 1 << 0;
        /// POSIX locks are asked for here.
        const POSIX_LOCKS = 1 << 1;
        /// `O_TRUNC` is part of `OPEN`.
        const ATOMIC_O_TRUNC = 1 << 3;
        /// Writes of more than a page.
        const BIG_WRITES = 1 << 5;
        /// The umask is applied here.
        const DONT_MASK = 1 << 6;
        /// `flock` is asked for here.
        const FLOCK_LOCKS = 1 << 10;
        /// ioctl on directories.
        const HAS_IOCTL_DIR = 1 << 11;
        /// Cached pages are dropped when the modification time has changed.
        const AUTO_INVAL_DATA = 1 << 12;
        /// `READDIRPLUS`.
        const DO_READDIRPLUS = 1 << 13;
        /// ... when it seems useful.
        const READDIRPLUS_AUTO = 1 << 14;
        /// Direct I/O need not be waited for one by one.
        const ASYNC_DIO = 1 << 15;
        /// Writes are kept back.
        const WRITEBACK_CACHE = 1 << 16;
        /// `ENOSYS` to `OPEN` means that none is needed.
        const NO_OPEN_SUPPORT = 1 << 17;
        /// Lookups and readdirs of one directory at once.
        const PARALLEL_DIROPS = 1 << 18;
        /// ACLs are checked by the client from the attributes.
        const POSIX_ACL = 1 << 20;
        /// `InitOut::max_pages` is meant.
        const MAX_PAGES = 1 << 22;
        /// Symbolic links are cached.
        const CACHE_SYMLINKS = 1 << 23;
        /// `ENOSYS` to `OPENDIR` means that none is needed.
        const NO_OPENDIR_SUPPORT = 1 << 24;
        /// Directories can be marked as mount points.
        const SUBMOUNTS = 1 << 27;
        /// setuid bits and capabilities are cleared here.
        const HANDLE_KILLPRIV_V2 = 1 << 28;
        /// `SetXattrIn` has its second half.
        const SETXATTR_EXT = 1 << 29;
        /// `InitIn::flags2` is meant.
        const INIT_EXT = 1 << 30;
        /// A supplementary group that matters comes with what creates.
        const CREATE_SUPP_GROUP = 1 << 34;
        /// Shared mappings of files opened for direct I/O.
        const DIRECT_IO_ALLOW_MMAP = 1 << 36;
        /// Reads and writes can go past this service.
        const PASSTHROUGH = 1 << 37;
    }

    /// `OpenOut::open_flags`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct OpenReply: u32 {
        /// No pages are cached.
        const DIRECT_IO = 1 << 0;
        /// What is cached stays.
        const KEEP_CACHE = 1 << 1;
        /// The directory may be cached.
        const CACHE_DIR = 1 << 3;
        /// `close` sends no `FLUSH`.
        const NOFLUSH = 1 << 5;
        /// Direct writes to one file at once.
        const PARALLEL_DIRECT_WRITES = 1 << 6;
        /// Reads and writes go to the backing file.
        const PASSTHROUGH = 1 << 7;
    }

    /// `SetAttrIn::valid`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Valid: u32 {
        /// `mode`.
        const MODE = 1 << 0;
        /// `uid`.
        const UID = 1 << 1;
        /// `gid`.
        const GID = 1 << 2;
        /// `size`.
        const SIZE = 1 << 3;
        /// `atime`.
        const ATIME = 1 << 4;
        /// `mtime`.
        const MTIME = 1 << 5;
        /// `fh`.
        const FH = 1 << 6;
        /// The time of access is now.
        const ATIME_NOW = 1 << 7;
        /// The time of modification is now.
        const MTIME_NOW = 1 << 8;
        /// `ctime`.
        const CTIME = 1 << 10;
        /// The caller may not keep setuid and setgid bits.
        const KILL_SUIDGID = 1 << 11;
        /// Anything that a program asks to be changed.
        const CHANGES = Self::MODE.bits() | Self::UID.bits() | Self::GID.bits() | Self::SIZE.bits() | Self::ATIME.bits()
            | Self::MTIME.bits();
    }
}

/// `WriteIn::write_flags`: from the page cache; `fh` is any that is open for writing.
pub const WRITE_CACHE: u32 = 1 << 0;
/// `WriteIn::write_flags`: clear setuid and setgid bits.
pub const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// `GetAttrIn::getattr_flags`: `fh` is meant.
pub const GETATTR_FH: u32 = 1 << 0;
/// `OpenIn::open_flags`: clear setuid and setgid bits.
pub const OPEN_KILL_SUIDGID: u32 = 1 << 0;
/// `LkIn::lk_flags`: flock(2).
pub const LK_FLOCK: u32 = 1 << 0;
/// `FsyncIn::fsync_flags`: data only.
pub const FSYNC_FDATASYNC: u32 = 1 << 0;
/// `ReleaseIn::release_flags`: drop the flock.
pub const RELEASE_FLOCK_UNLOCK: u32 = 1 << 1;
/// `Attr::flags`: the root of a mount.
pub const ATTR_SUBMOUNT: u32 = 1 << 0;
/// `SetXattrIn::setxattr_flags`: clear the setgid bit with the ACL.
pub const SETXATTR_ACL_KILL_SGID: u32 = 1 << 0;
/// Extension of a request: supplementary groups.
pub const EXT_GROUPS: u32 = 32;
/// Bytes of a `SetXattrIn` without `SETXATTR_EXT`.
pub const SETXATTR_IN_SHORT: usize = 8;
