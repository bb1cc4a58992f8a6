//! Files that the kernel reads and writes without asking (`FUSE_PASSTHROUGH`, Linux 6.9).

use crate::inodes::{Inode, lock};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// How the open files of a node are read and written. The kernel refuses a second backing file of one node, and files beside them
/// that are not passed through (fs/fuse/iomode.c).
#[derive(Debug, Default)]
pub(crate) struct Backing {
    number: Option<i32>,
    passed: usize,
    others: usize,
}

/// The way to tell the kernel of them.
#[derive(Debug)]
pub(crate) struct Passthrough(pub OwnedFd);

impl Passthrough {
    /// The kernel's number of the file by which all that is open of a node is read and written, `file` if it is the first;
    /// `None`: they are not passed through. Each use ends by [`Self::let_go`].
    pub fn share(&self, inode: &Inode, file: BorrowedFd<'_>) -> Option<i32> {
        let mut backing = lock(&inode.backing);
        if backing.number.is_none() && backing.others == 0 {
            backing.number = kso_sys::fuse::open_backing(self.0.as_fd(), file).ok();
        }
        match backing.number {
            Some(_) => backing.passed += 1,
            None => backing.others += 1,
        }
        backing.number
    }

    /// An open file of the node is closed, that was passed through or was not.
    pub fn let_go(&self, inode: &Inode, passed: bool) {
        let mut backing = lock(&inode.backing);
        if !passed {
            backing.others = backing.others.saturating_sub(1);
            return;
        }
        backing.passed = backing.passed.saturating_sub(1);
        if backing.passed == 0
            && let Some(number) = backing.number.take()
            && let Err(error) = kso_sys::fuse::close_backing(self.0.as_fd(), number)
        {
            tracing::debug!(%error, number, "a backing file was not known");
        }
    }
}
