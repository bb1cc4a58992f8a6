//! Files that are sent from without passing the client.

use crate::handles::Handle;
use crate::service::Service;
use rustix::fs::OFlags;
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The files of a share, for others in this process who serve the same client.
#[derive(Clone, Debug)]
pub struct Files(Arc<Service>);

/// A file, open for reading.
#[derive(Debug)]
pub struct OpenFile(Opened);

#[derive(Debug)]
enum Opened {
    /// Nobody writes to it by this share, so that what was opened once stays right.
    Kept(Arc<Handle>),
    /// Opened anew: below an overlay, a file that was opened before the first write never sees it.
    Fresh(OwnedFd),
}

impl Files {
    /// Those of this service.
    #[must_use]
    pub fn of(service: Arc<Service>) -> Self {
        Self(service)
    }

    /// Opens the file that the client knows by this number. As `OPEN` this may wait for a disk.
    ///
    /// The client may keep changes back: of files that it maps (or all of them, with `Share::writeback`). They are here
    /// before it lets go of the last handle by which they were made (`fuse_writepage_end` in fs/fuse/file.c holds it so long).
    ///
    /// # Errors
    /// The client knows none by this number, it is no regular file, or this process may not read it. `EBUSY`: it is open for
    /// writing.
    pub fn open(&self, node: u64) -> Result<OpenFile, Errno> {
        let inode = self.0.inodes.get(node)?;
        if !inode.is_file() {
            return Err(Errno::INVAL);
        }
        if inode.writers.load(Ordering::Relaxed) > 0 {
            return Err(Errno::BUSY);
        }
        if self.0.share.read_only {
            return Ok(OpenFile(Opened::Kept(self.0.implicit(&inode)?)));
        }
        let file = self.0.reopen(&inode, OFlags::RDONLY)?;
        self.0.check_private(&inode, file.as_fd())?;
        Ok(OpenFile(Opened::Fresh(file)))
    }
}

impl AsFd for OpenFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.0 {
            Opened::Kept(handle) => handle.file.as_fd(),
            Opened::Fresh(file) => file.as_fd(),
        }
    }
}
