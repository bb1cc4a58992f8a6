//! The service: what all workers of one share have in common, and what was agreed on with the client.

use crate::abi::{self, Features};
use crate::handles::{Handle, Handles};
use crate::inodes::{Inode, Inodes, Key, lock};
use crate::locks::{Completer, Locks};
use crate::share::{Cache, Owner, Share, Submounts};
use kso_sys::file::FileHandle;
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, Statx, StatxFlags};
use rustix::io::Errno;
use rustix::path::DecInt;
use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Most bytes of one `WRITE`.
pub const MAX_WRITE: u32 = 1 << 20;
/// Files that are read without having been opened keep at most so many descriptors.
const MAX_IMPLICIT: usize = 1024;
/// What is asked of statx(2).
pub(crate) const WANTED: StatxFlags =
    StatxFlags::BASIC_STATS.union(StatxFlags::BTIME).union(StatxFlags::MNT_ID);
/// Upper bits of an inode number that tell its device, if it is not the root's.
const DEVICE_SHIFT: u32 = 48;

/// Why a directory cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// It cannot be opened.
    #[error("cannot share {path}: {source}")]
    Open {
        /// The directory.
        path: String,
        /// What the kernel says.
        source: std::io::Error,
    },
    /// A part of a tree cannot be written to.
    #[error("{0} is shared in part, and so only for reading")]
    PartWritable(String),
    /// /proc is needed to open a file anew.
    #[error("cannot open /proc/self/fd: {0}")]
    Proc(std::io::Error),
}

/// A share that is served.
#[derive(Debug)]
pub struct Service {
    pub(crate) share: Share,
    pub(crate) inodes: Inodes,
    pub(crate) handles: Handles,
    pub(crate) locks: Arc<Locks>,
    root: OwnedFd,
    proc: OwnedFd,
    /// The [`Features`] that both sides agreed on.
    features: AtomicU64,
    /// Devices other than the root's, by the number that their inodes carry.
    devices: Mutex<HashMap<(u32, u32), u64>>,
    root_device: (u32, u32),
    implicit: Mutex<VecDeque<Arc<Inode>>>,
    passthrough: bool,
}

impl Service {
    /// Opens the share. `completer` answers locks that were waited for.
    ///
    /// # Errors
    /// See [`ShareError`].
    pub fn new(share: Share, completer: Arc<dyn Completer>) -> Result<Arc<Self>, ShareError> {
        Self::open(share, Some(completer), false)
    }

    /// Opens the share for [`crate::stream::serve`], by which locks that were waited for are answered too.
    ///
    /// # Errors
    /// See [`ShareError`].
    pub fn detached(share: Share) -> Result<Arc<Self>, ShareError> {
        Self::open(share, None, false)
    }

    /// With `passthrough` the transport is one by which reads and writes can pass the service by.
    pub(crate) fn open(
        share: Share,
        completer: Option<Arc<dyn Completer>>,
        passthrough: bool,
    ) -> Result<Arc<Self>, ShareError> {
        let path = share.directory.display().to_string();
        if !share.view.is_whole() && !share.read_only {
            return Err(ShareError::PartWritable(path));
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open = || -> rustix::io::Result<_> {
            let root = rustix::fs::open(&share.directory, flags, Mode::empty())?;
            let attributes = rustix::fs::statx(&root, c"", AtFlags::EMPTY_PATH, WANTED)?;
            Ok((root, attributes))
        };
        let (root, attributes) = open().map_err(|source| ShareError::Open { path, source: source.into() })?;
        let proc = rustix::fs::open("/proc/self/fd", OFlags::PATH | flags, Mode::empty())
            .map_err(|source| ShareError::Proc(source.into()))?;
        let by_handle = FileHandle::of(root.as_fd())
            .and_then(|handle| handle.open(root.as_fd(), OFlags::PATH.bits().cast_signed()))
            .is_ok();
        let budget = share.descriptors.unwrap_or_else(|| {
            let limit = kso_sys::process::open_files_limit().map_or(1024, |(soft, _)| soft);
            usize::try_from(limit / 2).unwrap_or(usize::MAX)
        });
        let root_device = Key::of(&attributes).device;
        let service = Self {
            inodes: Inodes::new(budget / 3 * 2, by_handle),
            handles: Handles::new(budget / 3),
            locks: Locks::new(completer),
            root,
            proc,
            features: AtomicU64::new(0),
            devices: Mutex::default(),
            root_device,
            implicit: Mutex::default(),
            passthrough,
            share,
        };
        service.reset().map_err(|source| ShareError::Open {
            path: service.share.directory.display().to_string(),
            source: source.into(),
        })?;
        Ok(Arc::new(service))
    }

    /// Forgets everything of the client: it begins anew, or is gone.
    pub(crate) fn reset(&self) -> Result<(), Errno> {
        self.locks.clear();
        self.handles.clear();
        for inode in std::mem::take(&mut *lock(&self.implicit)) {
            *lock(&inode.implicit) = None;
        }
        self.inodes.clear();
        self.features.store(0, Ordering::Relaxed);
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(&self.root, c".", flags, Mode::empty())?;
        let attributes = rustix::fs::statx(&root, c"", AtFlags::EMPTY_PATH, WANTED)?;
        let root = self.inodes.insert(root, &attributes, self.share.view.0.clone())?;
        debug_assert_eq!(root.id, abi::ROOT);
        Ok(())
    }

    /// The client is gone: its locks, files and nodes are let go of.
    pub fn disconnect(&self) {
        if let Err(error) = self.reset() {
            tracing::warn!(%error, "the root of a share is gone");
        }
    }

    pub(crate) fn has(&self, feature: Features) -> bool {
        Features::from_bits_retain(self.features.load(Ordering::Relaxed)).contains(feature)
    }

    /// What both sides can do, of what the client offers.
    fn agree(&self, offered: Features) -> Features {
        let mut wanted = Features::ASYNC_READ
            | Features::BIG_WRITES
            | Features::ATOMIC_O_TRUNC
            | Features::DO_READDIRPLUS
            | Features::READDIRPLUS_AUTO
            | Features::ASYNC_DIO
            | Features::PARALLEL_DIROPS
            | Features::MAX_PAGES
            | Features::HANDLE_KILLPRIV_V2
            | Features::SETXATTR_EXT
            | Features::INIT_EXT
            | Features::CREATE_SUPP_GROUP;
        match self.share.cache {
            Cache::None => wanted |= Features::DIRECT_IO_ALLOW_MMAP,
            Cache::Auto => wanted |= Features::AUTO_INVAL_DATA | Features::CACHE_SYMLINKS,
            Cache::Always => wanted |= Features::CACHE_SYMLINKS,
        }
        if self.share.read_only {
            // Locks then are the client's own: held here, they would be in the way of those who write.
            if self.share.cache != Cache::None && self.share.mounted_read_only {
                wanted |= Features::NO_OPEN_SUPPORT | Features::NO_OPENDIR_SUPPORT;
            }
        } else {
            wanted |= Features::POSIX_LOCKS | Features::FLOCK_LOCKS;
            if self.share.writeback && self.share.cache != Cache::None {
                wanted |= Features::WRITEBACK_CACHE;
            }
        }
        if self.share.acl {
            wanted |= Features::POSIX_ACL | Features::DONT_MASK;
        }
        if self.share.submounts == Submounts::Announced {
            wanted |= Features::SUBMOUNTS;
        }
        if self.passthrough {
            wanted |= Features::PASSTHROUGH;
            wanted.remove(Features::WRITEBACK_CACHE);
        }
        wanted & offered
    }

    /// Answers `INIT`.
    pub(crate) fn init(&self, init: abi::InitIn, more: u32) -> Result<abi::InitOut, Errno> {
        if init.major != abi::MAJOR || init.minor < abi::OLDEST_MINOR {
            tracing::error!(
                init.major,
                init.minor,
                "this FUSE is too old: Linux 5.1 is the oldest that is served"
            );
            return Err(Errno::PROTO);
        }
        self.reset()?;
        let mut offered = u64::from(init.flags);
        if offered & Features::INIT_EXT.bits() != 0 {
            offered |= u64::from(more) << 32;
        }
        let features = self.agree(Features::from_bits_truncate(offered));
        self.features.store(features.bits(), Ordering::Relaxed);
        tracing::debug!(init.minor, ?features, "a client mounts");
        let bits = features.bits();
        Ok(abi::InitOut {
            major: abi::MAJOR,
            minor: abi::MINOR.min(init.minor),
            max_readahead: init.max_readahead,
            flags: bits as u32,
            flags2: (bits >> 32) as u32,
            max_background: 256,
            congestion_threshold: 192,
            max_write: MAX_WRITE,
            time_gran: 1,
            max_pages: (MAX_WRITE / 4096) as u16,
            // The file systems of shares may themselves be stacked once.
            max_stack_depth: u32::from(features.contains(Features::PASSTHROUGH)),
            ..abi::InitOut::default()
        })
    }

    /// As whom files are touched.
    pub(crate) fn owner(&self) -> Owner {
        self.share.owner
    }

    /// The transport is one by which reads and writes may pass.
    pub(crate) fn passes_backing(&self) -> bool {
        self.passthrough
    }

    pub(crate) fn passes_through(&self) -> bool {
        self.has(Features::PASSTHROUGH)
    }

    pub(crate) fn proc(&self) -> BorrowedFd<'_> {
        self.proc.as_fd()
    }

    /// Opens a regular file or a directory anew. Of nothing else: opening may have effects.
    pub(crate) fn reopen(&self, inode: &Inode, flags: OFlags) -> Result<OwnedFd, Errno> {
        let flags = match (inode.is_file(), inode.is_directory()) {
            // Whatever else it was looked up as: O_NONBLOCK, lest a lease or a mandatory lock holds the thread.
            (true, _) => flags | OFlags::NONBLOCK,
            (_, true) => flags | OFlags::DIRECTORY,
            _ => return Err(Errno::NXIO),
        };
        let descriptor = inode.descriptor()?;
        let name = DecInt::from_fd(descriptor.as_fd());
        // Here the magic link is what is wanted, and its target has been looked up beneath the share.
        rustix::fs::openat(&self.proc, name.as_c_str(), flags | OFlags::CLOEXEC, Mode::empty())
    }

    /// Opens a name in a directory, and nothing but what it names.
    pub(crate) fn open_beneath(
        &self,
        directory: BorrowedFd<'_>,
        name: &std::ffi::CStr,
        flags: OFlags,
        mode: Mode,
    ) -> Result<OwnedFd, Errno> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        loop {
            match rustix::fs::openat2(directory, name, flags, mode, resolve) {
                // The kernel could not tell whether a rename elsewhere mattered (openat2(2)).
                Err(Errno::AGAIN) => {}
                // gVisor. A name is one component and never `..` ([`crate::Name`]), and no link is followed: it cannot lead out.
                Err(Errno::NOSYS) => return rustix::fs::openat(directory, name, flags, mode),
                result => return result,
            }
        }
    }

    /// An inode's number as the client sees it: unique though devices differ.
    pub(crate) fn number(&self, device: (u32, u32), inode: u64) -> u64 {
        if device == self.root_device || self.has(Features::SUBMOUNTS) {
            return inode;
        }
        let mut devices = lock(&self.devices);
        let next = devices.len() as u64 + 1;
        let index = *devices.entry(device).or_insert(next);
        // Numbers of more than 48 bits are not seen on file systems of disks; there they are folded.
        let low = inode & ((1 << DEVICE_SHIFT) - 1);
        (low ^ (inode >> DEVICE_SHIFT)) | (index << DEVICE_SHIFT)
    }

    /// What a node is read through that the client did not open (see `NO_OPEN_SUPPORT`).
    pub(crate) fn implicit(&self, inode: &Arc<Inode>) -> Result<Arc<Handle>, Errno> {
        let mut slot = lock(&inode.implicit);
        if let Some(handle) = &*slot {
            return Ok(handle.clone());
        }
        let file = self.reopen(inode, OFlags::RDONLY)?;
        self.check_private(inode, file.as_fd())?;
        // The two keep each other alive: who forgets the node drops this handle.
        let handle = Arc::new(Handle::new(inode.clone(), file));
        *slot = Some(handle.clone());
        drop(slot);
        let evicted = {
            let mut implicit = lock(&self.implicit);
            implicit.push_back(inode.clone());
            if implicit.len() > MAX_IMPLICIT { implicit.pop_front() } else { None }
        };
        if let Some(evicted) = evicted {
            lock(&evicted.implicit).take();
        }
        Ok(handle)
    }

    /// In a view of the system, files that not everyone may read stay unread.
    pub(crate) fn check_private(&self, inode: &Inode, file: BorrowedFd<'_>) -> Result<(), Errno> {
        if inode.region.private || inode.is_directory() {
            return Ok(());
        }
        let mode = Mode::from_raw_mode(rustix::fs::fstat(file)?.st_mode);
        if mode.contains(Mode::ROTH) { Ok(()) } else { Err(Errno::ACCESS) }
    }
}

/// Asks for a node's attributes.
pub(crate) fn attributes(descriptor: BorrowedFd<'_>, wanted: StatxFlags) -> Result<Statx, Errno> {
    rustix::fs::statx(descriptor, c"", AtFlags::EMPTY_PATH, wanted)
}
