//! What the client has open.

use crate::inodes::{Inode, lock};
use crate::slots::Slots;
use rustix::io::Errno;
use std::collections::VecDeque;
use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

/// An entry of a directory.
#[derive(Debug)]
pub(crate) struct Entry {
    pub name: CString,
    pub inode: u64,
    pub kind: rustix::fs::FileType,
    /// Where the next one is.
    pub next: u64,
}

/// How far a directory was read.
#[derive(Debug, Default)]
pub(crate) struct Stream {
    /// Read, and not yet asked for.
    pub ahead: VecDeque<Entry>,
    /// Where the first one ahead is, or the descriptor stands.
    pub position: u64,
}

/// An open file or directory.
#[derive(Debug)]
pub(crate) struct Handle {
    pub inode: Arc<Inode>,
    pub file: OwnedFd,
    pub stream: Mutex<Stream>,
    /// Who took POSIX or OFD locks through it.
    pub owners: Mutex<Vec<u64>>,
    /// The kernel's number of the backing file, if reads and writes go there (/dev/fuse only).
    pub backing: Mutex<Option<i32>>,
    /// It is counted among [`Inode::writers`].
    writes: bool,
}

impl Handle {
    pub fn new(inode: Arc<Inode>, file: OwnedFd) -> Self {
        let (stream, owners, backing) = (Mutex::default(), Mutex::default(), Mutex::default());
        Self { inode, file, stream, owners, backing, writes: false }
    }

    /// By which the client may write.
    pub fn writing(mut self) -> Self {
        self.inode.writers.fetch_add(1, Ordering::Relaxed);
        self.writes = true;
        self
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if self.writes {
            self.inode.writers.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// All of them.
#[derive(Debug)]
pub(crate) struct Handles {
    slots: Mutex<Slots<Arc<Handle>>>,
    limit: usize,
}

impl Handles {
    pub fn new(limit: usize) -> Self {
        Self { slots: Mutex::default(), limit }
    }

    /// Gives it a number.
    pub fn insert(&self, handle: Arc<Handle>) -> Result<u64, Errno> {
        let mut slots = lock(&self.slots);
        if slots.len() >= self.limit {
            return Err(Errno::NFILE);
        }
        slots.insert(|_| handle).ok_or(Errno::NFILE)
    }

    /// The one of this number, which must be open on `node`.
    pub fn get(&self, number: u64, node: u64) -> Result<Arc<Handle>, Errno> {
        lock(&self.slots).get(number).filter(|handle| handle.inode.id == node).cloned().ok_or(Errno::BADF)
    }

    /// Takes the one of this number out.
    pub fn remove(&self, number: u64, node: u64) -> Result<Arc<Handle>, Errno> {
        let mut slots = lock(&self.slots);
        slots.get(number).filter(|handle| handle.inode.id == node).ok_or(Errno::BADF)?;
        slots.remove(number).ok_or(Errno::BADF)
    }

    /// Closes all.
    pub fn clear(&self) {
        let before = std::mem::take(&mut *lock(&self.slots));
        drop(before);
    }
}
