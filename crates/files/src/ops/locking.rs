//! Requests about locks.

use crate::abi::{self, FileLock, InHeader, LkIn, LkOut};
use crate::inodes::lock;
use crate::locks::{Wanted, range};
use crate::worker::{Answer, Result, Worker};
use rustix::fs::FlockOperation;
use rustix::io::Errno;

/// `F_RDLCK`, `F_WRLCK`, `F_UNLCK` (fcntl(2)).
const READ: u32 = 0;
const WRITE: u32 = 1;
const NONE: u32 = 2;

impl Worker {
    pub(crate) fn get_lock(&mut self, node: u64, wanted: LkIn) -> Result {
        if self.service.share.read_only {
            return Err(Errno::NOSYS);
        }
        let handle = self.service.handles.get(wanted.fh, node)?;
        let found = self.service.locks.conflict(&handle, wanted.owner, range(&wanted.lk)?)?;
        let lk = match found {
            Some((found, process)) => FileLock {
                start: found.start.cast_unsigned(),
                end: match found.length {
                    0 => i64::MAX as u64,
                    length => (found.start + length - 1).cast_unsigned(),
                },
                kind: u32::from(found.kind.cast_unsigned()),
                pid: process,
            },
            None => FileLock { kind: NONE, ..wanted.lk },
        };
        self.put(&LkOut { lk })
    }

    pub(crate) fn set_lock(&mut self, header: &InHeader, wanted: LkIn, wait: bool) -> Result {
        if self.service.share.read_only {
            return Err(Errno::NOSYS);
        }
        let handle = self.service.handles.get(wanted.fh, header.nodeid)?;
        let releases = wanted.lk.kind == NONE;
        let wanted = if wanted.lk_flags & abi::LK_FLOCK != 0 {
            let operation = match wanted.lk.kind {
                READ => FlockOperation::NonBlockingLockShared,
                WRITE => FlockOperation::NonBlockingLockExclusive,
                NONE => FlockOperation::NonBlockingUnlock,
                _ => return Err(Errno::INVAL),
            };
            Wanted::Whole(handle, operation)
        } else {
            handle.inode.mark_locked();
            let mut owners = lock(&handle.owners);
            if !releases && !owners.contains(&wanted.owner) {
                owners.push(wanted.owner);
            }
            drop(owners);
            let (owner, process) = (wanted.owner, wanted.lk.pid);
            let file = self.service.locks.owned(&self.service, &handle.inode, owner, process)?;
            Wanted::Range(file, range(&wanted.lk)?)
        };
        match wanted.attempt() {
            Ok(()) => {
                if releases {
                    self.service.locks.retry();
                }
                Ok(Answer::Done)
            }
            Err(Errno::AGAIN | Errno::ACCESS) if wait => {
                self.service.locks.wait(header.unique, wanted)?;
                Ok(Answer::Later)
            }
            Err(error) => Err(error),
        }
    }
}
