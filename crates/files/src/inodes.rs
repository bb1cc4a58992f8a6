//! Which nodes the client knows, and how each is reached.
//!
//! A node is an inode seen through a mount. It is held by an `O_PATH` descriptor, which no renaming and no link can lead
//! elsewhere; beyond the share's budget of descriptors by a handle, if this process may open by handles and the
//! file system has them. A node lives as long as the client remembers having looked it up.

use crate::handles::Handle;
use crate::passthrough::Backing;
use crate::share::Region;
use crate::slots::Slots;
use kso_sys::file::FileHandle;
use rustix::fs::{FileType, Mode, OFlags, Statx, StatxFlags};
use rustix::io::Errno;
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Locks, whatever happened to a thread that held it: every table here is consistent between statements.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub device: (u32, u32),
    pub inode: u64,
    /// A read-only bind mount of a directory is another one.
    pub mount: u64,
}

impl Key {
    pub fn of(attributes: &Statx) -> Self {
        Self {
            device: (attributes.stx_dev_major, attributes.stx_dev_minor),
            inode: attributes.stx_ino,
            mount: attributes.stx_mnt_id,
        }
    }
}

/// What the client's cached pages were true of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub modified: (i64, u32),
    pub changed: (i64, u32),
    pub size: u64,
}

/// A node.
#[derive(Debug)]
pub(crate) struct Inode {
    pub id: u64,
    pub key: Key,
    pub kind: FileType,
    pub region: Region,
    /// Tells it from other inodes that had or will have its number; 0 where that cannot be told.
    pub generation: u64,
    place: Place,
    /// POSIX locks were asked for: the client must tell each `close`.
    pub locked: AtomicBool,
    pub kept: Mutex<Option<Stamp>>,
    /// Handles by which the client may write: while there are any, it may have changes that are not here yet.
    pub writers: AtomicUsize,
    /// What is read through when the client opens without telling.
    pub implicit: Mutex<Option<Arc<Handle>>>,
    pub backing: Mutex<Backing>,
}

#[derive(Debug)]
enum Place {
    Descriptor(OwnedFd),
    Handle { handle: FileHandle, mount: Arc<OwnedFd> },
}

/// A node's descriptor, for one operation.
pub(crate) enum Descriptor<'a> {
    Held(BorrowedFd<'a>),
    Opened(OwnedFd),
}

impl AsFd for Descriptor<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Held(descriptor) => *descriptor,
            Self::Opened(descriptor) => descriptor.as_fd(),
        }
    }
}

impl Inode {
    /// A descriptor of it, `O_PATH`.
    pub fn descriptor(&self) -> Result<Descriptor<'_>, Errno> {
        match &self.place {
            Place::Descriptor(descriptor) => Ok(Descriptor::Held(descriptor.as_fd())),
            Place::Handle { handle, mount } => {
                Ok(Descriptor::Opened(by_handle(handle, mount, OFlags::PATH | OFlags::NOFOLLOW)?))
            }
        }
    }

    pub fn is_directory(&self) -> bool {
        self.kind == FileType::Directory
    }

    pub fn is_file(&self) -> bool {
        self.kind == FileType::RegularFile
    }
}

fn by_handle(handle: &FileHandle, mount: &OwnedFd, flags: OFlags) -> Result<OwnedFd, Errno> {
    handle.open(mount.as_fd(), flags.bits().cast_signed()).map_err(|error| errno(&error))
}

/// The number of an error of the standard library's.
pub(crate) fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

struct Known {
    inode: Arc<Inode>,
    lookups: u64,
}

#[derive(Default)]
struct Table {
    slots: Slots<Known>,
    keys: HashMap<Key, u64>,
    /// Something that is open on each mount of which a node is held by a handle.
    mounts: HashMap<u64, Option<Arc<OwnedFd>>>,
    descriptors: usize,
}

/// The nodes that the client knows.
pub(crate) struct Inodes {
    table: Mutex<Table>,
    budget: usize,
    handles: bool,
}

impl Inodes {
    /// Up to `budget` of them are held by descriptors. `handles`: this process may open by handles.
    pub fn new(budget: usize, handles: bool) -> Self {
        Self { table: Mutex::default(), budget, handles }
    }

    /// The node of this number.
    pub fn get(&self, id: u64) -> Result<Arc<Inode>, Errno> {
        lock(&self.table).slots.get(id).map(|known| known.inode.clone()).ok_or(Errno::STALE)
    }

    /// A node that is known already, looked up once more.
    pub fn again(&self, key: Key) -> Option<Arc<Inode>> {
        let mut table = lock(&self.table);
        let id = *table.keys.get(&key)?;
        let known = table.slots.get_mut(id)?;
        // What is held by a handle may be another inode of the same number by now.
        if !matches!(known.inode.place, Place::Descriptor(_)) {
            return None;
        }
        known.lookups = known.lookups.saturating_add(1);
        Some(known.inode.clone())
    }

    /// What `descriptor` (`O_PATH`) is open on, looked up once.
    pub fn insert(
        &self,
        descriptor: OwnedFd,
        attributes: &Statx,
        region: Region,
    ) -> Result<Arc<Inode>, Errno> {
        let key = Key::of(attributes);
        let generation = generation(descriptor.as_fd(), attributes);
        let mut table = lock(&self.table);
        let held = if self.handles && table.descriptors >= self.budget {
            self.by_handle(&mut table, descriptor, key)?
        } else {
            Place::Descriptor(descriptor)
        };
        if let Some(id) = table.keys.get(&key).copied()
            && let Some(known) = table.slots.get_mut(id)
        {
            let same = match (&known.inode.place, &held) {
                (Place::Handle { handle: one, .. }, Place::Handle { handle: other, .. }) => one == other,
                (Place::Handle { handle, .. }, Place::Descriptor(other)) => {
                    FileHandle::of(other.as_fd()).is_ok_and(|other| other == *handle)
                }
                (Place::Descriptor(_), _) => true,
            };
            if same {
                known.lookups = known.lookups.saturating_add(1);
                return Ok(known.inode.clone());
            }
        }
        let counted = usize::from(matches!(held, Place::Descriptor(_)));
        if counted == 1 && !self.handles && table.descriptors >= self.budget {
            return Err(Errno::NFILE);
        }
        let kind = FileType::from_raw_mode(attributes.stx_mode.into());
        let mut made = None;
        let id = table.slots.insert(|id| {
            let inode = Arc::new(Inode {
                id,
                key,
                kind,
                region,
                generation,
                place: held,
                locked: AtomicBool::new(false),
                kept: Mutex::new(None),
                writers: AtomicUsize::new(0),
                implicit: Mutex::new(None),
                backing: Mutex::default(),
            });
            made = Some(inode.clone());
            Known { inode, lookups: 1 }
        });
        let (Some(id), Some(inode)) = (id, made) else { return Err(Errno::NFILE) };
        table.keys.insert(key, id);
        table.descriptors += counted;
        Ok(inode)
    }

    /// A place beyond the budget: by a handle, unless the file system has none.
    fn by_handle(&self, table: &mut Table, descriptor: OwnedFd, key: Key) -> Result<Place, Errno> {
        let handle = FileHandle::of(descriptor.as_fd());
        let mount = table.mounts.entry(key.mount).or_insert_with(|| reopen_mount(&descriptor));
        match (handle, mount) {
            (Ok(handle), Some(mount)) => Ok(Place::Handle { handle, mount: mount.clone() }),
            _ if table.descriptors >= self.budget.saturating_mul(2) => Err(Errno::NFILE),
            _ => Ok(Place::Descriptor(descriptor)),
        }
    }

    /// The client forgets having looked up a node so many times.
    pub fn forget(&self, id: u64, count: u64) {
        let mut table = lock(&self.table);
        let Some(known) = table.slots.get_mut(id) else { return };
        known.lookups = known.lookups.saturating_sub(count);
        if known.lookups > 0 || id == crate::abi::ROOT {
            return;
        }
        let Some(known) = table.slots.remove(id) else { return };
        if table.keys.get(&known.inode.key) == Some(&id) {
            table.keys.remove(&known.inode.key);
        }
        table.descriptors -= usize::from(matches!(known.inode.place, Place::Descriptor(_)));
        drop(table);
        drop(lock(&known.inode.implicit).take());
    }

    /// Forgets all.
    pub fn clear(&self) {
        let before = std::mem::take(&mut *lock(&self.table));
        drop(before);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        lock(&self.table).slots.len()
    }
}

/// What the file system says of the inode's identity beyond its number, as 64 bits. It is asked once in a node's life: where
/// only the time of birth can be had, that of overlayfs changes when a file is copied up.
fn generation(descriptor: BorrowedFd<'_>, attributes: &Statx) -> u64 {
    match FileHandle::of(descriptor) {
        Ok(handle) => handle.digest(),
        Err(_) if attributes.stx_mask & StatxFlags::BTIME.bits() != 0 => {
            let time = attributes.stx_btime;
            let seconds = time.tv_sec.cast_unsigned();
            (seconds << 30 | u64::from(time.tv_nsec) & ((1 << 30) - 1)).max(1)
        }
        Err(_) => 0,
    }
}

/// Opens a mount by the way of something in it that can be opened without side effects.
fn reopen_mount(descriptor: &OwnedFd) -> Option<Arc<OwnedFd>> {
    use std::os::fd::AsRawFd;
    let kind = FileType::from_raw_mode(rustix::fs::fstat(descriptor).ok()?.st_mode);
    if !matches!(kind, FileType::Directory | FileType::RegularFile) {
        return None;
    }
    let path = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    rustix::fs::open(path, flags, Mode::empty()).ok().map(Arc::new)
}

impl std::fmt::Debug for Inodes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inodes").field("len", &self.len()).finish_non_exhaustive()
    }
}

impl Inode {
    /// POSIX locks are in play from now on.
    pub fn mark_locked(&self) {
        self.locked.store(true, Ordering::Relaxed);
    }

    /// Whether they are.
    pub fn is_locked(&self) -> bool {
        self.locked.load(Ordering::Relaxed)
    }
}
