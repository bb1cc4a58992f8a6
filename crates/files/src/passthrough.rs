//! Files that the kernel reads and writes without asking (`FUSE_PASSTHROUGH`, Linux 6.9).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// The way to tell the kernel of them.
#[derive(Debug)]
pub(crate) struct Passthrough(pub OwnedFd);

impl Passthrough {
    /// The kernel's number of a file, if it takes it.
    pub fn register(&self, file: BorrowedFd<'_>) -> Option<i32> {
        kso_sys::fuse::open_backing(self.0.as_fd(), file).ok()
    }

    /// No open file uses it any more.
    pub fn unregister(&self, backing: i32) {
        if let Err(error) = kso_sys::fuse::close_backing(self.0.as_fd(), backing) {
            tracing::debug!(%error, backing, "a backing file was not known");
        }
    }
}
