//! What the client has open, and which locks it holds: enough to open and lock it again elsewhere.

use super::held::{Held, MAX_RANGES};
use super::nodes::Missing;
use crate::abi::{FileLock, LK_FLOCK, LkIn};
use crate::slots::Slots;
use rustix::fs::OFlags;
use rustix::io::Errno;
use std::collections::HashMap;

/// At most so many are open.
const MAX_FILES: usize = 1 << 16;
/// Owners of POSIX locks, of each file.
const MAX_OWNERS: usize = 4096;

/// An open file or directory.
#[derive(Clone, Debug)]
pub(super) struct File {
    pub node: u64,
    pub directory: bool,
    /// As it is opened again.
    pub flags: u32,
    /// By whom.
    pub user: (u32, u32),
    /// Its number there, and in which life.
    there: Option<(u64, u64)>,
    /// The kind of its flock(2), if there is one.
    flock: Option<u32>,
    /// What was written is lost, perhaps: the next fsync(2) tells.
    lost: bool,
    /// A lock of its could not be taken again: others may have changed what it protected.
    broken: bool,
}

impl File {
    pub fn new(node: u64, directory: bool, flags: u32, user: (u32, u32)) -> Self {
        let once =
            OFlags::TRUNC | OFlags::CREATE | OFlags::EXCL | OFlags::TMPFILE.difference(OFlags::DIRECTORY);
        let flags = flags & !once.bits();
        Self { node, directory, flags, user, there: None, flock: None, lost: false, broken: false }
    }
}

/// POSIX locks of one owner on one file.
#[derive(Debug)]
struct Owned {
    /// Through which open file they were taken: they end with it.
    file: u64,
    held: Held,
}

/// All that is open.
#[derive(Debug, Default)]
pub(super) struct Files {
    slots: Slots<File>,
    life: u64,
    /// By node and owner.
    owned: HashMap<(u64, u64), Owned>,
    /// Files with an flock.
    flocks: usize,
    /// A file system that is synced as a whole tells of all that was lost.
    lost: bool,
}

impl Files {
    /// Another performer, where none of them is open.
    pub fn begin(&mut self, life: u64) {
        self.life = life;
    }

    /// Whether another can be opened.
    pub fn has_room(&self) -> bool {
        self.slots.len() < MAX_FILES
    }

    /// One was opened, as `there`.
    pub fn opened(&mut self, mut file: File, there: u64) -> Result<u64, Errno> {
        file.there = Some((self.life, there));
        self.slots.insert(|_| file).ok_or(Errno::NFILE)
    }

    /// What the performer calls one that is open on `node`. `closing`: nothing else is done with it any more.
    pub fn there(&self, own: u64, node: u64, closing: bool) -> Result<u64, Missing> {
        let file = self.slots.get(own).filter(|file| file.node == node).ok_or(Missing::Error(Errno::BADF))?;
        match file.there.filter(|(life, _)| *life == self.life) {
            _ if file.broken && !closing => Err(Missing::Error(Errno::IO)),
            Some((_, there)) => Ok(there),
            None => Err(Missing::Lost),
        }
    }

    pub fn get(&self, own: u64) -> Option<&File> {
        self.slots.get(own)
    }

    /// One was opened again.
    pub fn reopened(&mut self, own: u64, there: u64) {
        let life = self.life;
        if let Some(file) = self.slots.get_mut(own) {
            file.there = Some((life, there));
        }
    }

    /// One of its locks is gone.
    pub fn broken(&mut self, own: u64) {
        if let Some(file) = self.slots.get_mut(own) {
            file.broken = true;
        }
    }

    /// It is closed, with the locks that were taken through it.
    pub fn close(&mut self, own: u64, node: u64) -> Result<(), Errno> {
        self.slots.get(own).filter(|file| file.node == node).ok_or(Errno::BADF)?;
        let file = self.slots.remove(own);
        self.flocks -= usize::from(file.is_some_and(|file| file.flock.is_some()));
        self.owned.retain(|_, owned| owned.file != own);
        Ok(())
    }

    /// Whether a lock may be asked for: so many can be kept.
    pub fn may_lock(&self, node: u64, lock: &LkIn) -> bool {
        lock.lk_flags & LK_FLOCK != 0
            || match self.owned.get(&(node, lock.owner)) {
                Some(owned) => owned.held.len() < MAX_RANGES,
                None => self.owned.len() < MAX_OWNERS,
            }
    }

    /// A lock was taken or dropped through a file.
    pub fn locked(&mut self, own: u64, node: u64, lock: &LkIn) {
        if lock.lk_flags & LK_FLOCK != 0 {
            if let Some(file) = self.slots.get_mut(own) {
                self.flocks -= usize::from(file.flock.is_some());
                file.flock = (lock.lk.kind != super::held::NONE).then_some(lock.lk.kind);
                self.flocks += usize::from(file.flock.is_some());
            }
            return;
        }
        if self.slots.get(own).is_none() {
            return;
        }
        let owned = self
            .owned
            .entry((node, lock.owner))
            .or_insert_with(|| Owned { file: own, held: Held::default() });
        owned.held.apply(&lock.lk);
        if owned.held.is_empty() {
            self.owned.remove(&(node, lock.owner));
        }
    }

    /// An owner has closed a descriptor of a file: its POSIX locks end.
    pub fn flushed(&mut self, node: u64, owner: u64) {
        self.owned.remove(&(node, owner));
    }

    /// The locks to take again through a file, as they are asked for; the performer's number of the file is left out.
    pub fn locks(&self, own: u64) -> Vec<LkIn> {
        let ranges =
            self.owned.iter().filter(|(_, owned)| owned.file == own).flat_map(|((_, owner), owned)| {
                owned.held.iter().map(|lk| LkIn { owner: *owner, lk, ..LkIn::default() })
            });
        let flock = self.slots.get(own).and_then(|file| file.flock).map(|kind| LkIn {
            owner: own,
            lk: FileLock { start: 0, end: i64::MAX as u64, kind, pid: 0 },
            lk_flags: LK_FLOCK,
            ..LkIn::default()
        });
        ranges.chain(flock).collect()
    }

    /// Whether any holds locks.
    pub fn has_locks(&self) -> bool {
        self.flocks > 0 || !self.owned.is_empty()
    }

    /// Files that hold locks.
    pub fn with_locks(&mut self) -> Vec<u64> {
        let mut files: Vec<u64> = self.owned.values().map(|owned| owned.file).collect();
        files.extend(self.slots.iter_mut().filter(|(_, file)| file.flock.is_some()).map(|(own, _)| own));
        files.sort_unstable();
        files.dedup();
        files
    }

    /// The kernel there began anew: what was not on disk (`dirty` nodes) is lost, and each open file tells it once.
    pub fn lose(&mut self, dirty: impl Fn(u64) -> bool) {
        for file in self.slots.values_mut().filter(|file| dirty(file.node)) {
            file.lost = true;
            self.lost = true;
        }
    }

    /// Whether this fsync(2) has to tell of a loss. It is told once.
    pub fn tell_loss(&mut self, own: u64) -> bool {
        self.slots.get_mut(own).is_some_and(|file| std::mem::take(&mut file.lost))
    }

    /// The same of syncfs(2).
    pub fn tell_any_loss(&mut self) -> bool {
        std::mem::take(&mut self.lost)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn lock(owner: u64, start: u64, end: u64, kind: u32) -> LkIn {
        LkIn { owner, lk: FileLock { start, end, kind, pid: 9 }, ..LkIn::default() }
    }

    #[test]
    fn locks_end_with_their_file_or_a_close() {
        let mut files = Files::default();
        let flags = (OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::TRUNC | OFlags::APPEND).bits();
        let file = File::new(7, false, flags, (1, 2));
        assert_eq!(file.flags, (OFlags::RDWR | OFlags::APPEND).bits());
        let one = files.opened(file.clone(), 70).unwrap();
        let other = files.opened(file, 71).unwrap();
        files.locked(one, 7, &lock(100, 0, 9, 1));
        files.locked(one, 7, &lock(101, 20, 29, 0));
        files.locked(other, 7, &LkIn { lk_flags: LK_FLOCK, ..lock(1, 0, 0, 1) });
        assert_eq!(files.with_locks(), [one, other]);
        assert_eq!(files.locks(one).len(), 2);
        assert_eq!(files.locks(other).first().map(|lock| (lock.lk.kind, lock.lk_flags)), Some((1, LK_FLOCK)));
        files.flushed(7, 100);
        assert_eq!(
            files.locks(one).first().map(|lock| lock.lk),
            Some(lock(101, 20, 29, 0).lk).map(|lk| FileLock { pid: 0, ..lk })
        );
        assert_eq!(files.close(one, 8), Err(Errno::BADF));
        assert_eq!(files.close(one, 7), Ok(()));
        assert_eq!(files.with_locks(), [other]);
        files.locked(other, 7, &LkIn { lk_flags: LK_FLOCK, ..lock(1, 0, 0, 2) });
        assert!(files.with_locks().is_empty() && !files.has_locks());
        files.begin(1);
        assert_eq!(files.there(other, 7, false), Err(Missing::Lost));
        assert_eq!(files.close(other, 7), Ok(()));
    }

    #[test]
    fn a_loss_is_told_once_by_each() {
        let mut files = Files::default();
        let one = files.opened(File::new(7, false, 2, (0, 0)), 70).unwrap();
        let other = files.opened(File::new(7, false, 2, (0, 0)), 71).unwrap();
        let clean = files.opened(File::new(8, false, 2, (0, 0)), 72).unwrap();
        files.lose(|node| node == 7);
        let told: Vec<_> =
            [one, other, clean, one, other].iter().map(|file| files.tell_loss(*file)).collect();
        assert_eq!(told, [true, true, false, false, false]);
        assert_eq!((files.tell_any_loss(), files.tell_any_loss()), (true, false));
    }
}
