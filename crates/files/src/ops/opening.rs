//! Opening, making and closing files.

use crate::abi::{self, CreateIn, Features, FlushIn, InHeader, OpenIn, OpenOut, OpenReply, ReleaseIn};
use crate::handles::Handle;
use crate::inodes::{Inode, Stamp, lock};
use crate::passthrough::Passthrough;
use crate::request::{Name, Request};
use crate::service::{WANTED, attributes};
use crate::share::Cache;
use crate::worker::{Answer, Result, Worker};
use rustix::fs::{Mode, OFlags, Statx};
use rustix::io::Errno;
use rustix::path::DecInt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// A file that changed so lately may change again without its times telling: clocks of file systems tick every 1 to 10 ms.
const GRAIN: Duration = Duration::from_millis(20);

impl Worker {
    /// Which flags a file is opened with here. Direct I/O, synchronous writes and appending are a matter of each write.
    fn flags(&self, flags: u32) -> Result<OFlags> {
        let asked = OFlags::from_bits_retain(flags);
        let mut access = match asked & OFlags::RWMODE {
            OFlags::RDONLY => OFlags::RDONLY,
            OFlags::WRONLY => OFlags::WRONLY,
            OFlags::RDWR => OFlags::RDWR,
            _ => return Err(Errno::INVAL),
        };
        if access != OFlags::RDONLY || asked.contains(OFlags::TRUNC) {
            self.writable()?;
        }
        // Parts of pages are read before they are kept back.
        if access == OFlags::WRONLY && self.service.has(Features::WRITEBACK_CACHE) {
            access = OFlags::RDWR;
        }
        Ok(access | (asked & (OFlags::TRUNC | OFlags::NOATIME)))
    }

    pub(crate) fn open(&mut self, header: &InHeader, open: OpenIn) -> Result {
        if self.service.has(Features::NO_OPEN_SUPPORT) {
            return Err(Errno::NOSYS);
        }
        let inode = self.service.inodes.get(header.nodeid)?;
        let flags = self.flags(open.flags)?;
        self.actor.act(header.uid, header.gid, open.open_flags & abi::OPEN_KILL_SUIDGID == 0)?;
        let file = self.open_node(&inode, flags)?;
        self.service.check_private(&inode, file.as_fd())?;
        let stat = match self.service.share.cache {
            Cache::Auto => Some(attributes(file.as_fd(), WANTED)?),
            _ => None,
        };
        let out = self.opened(inode, file, flags, stat.as_ref())?;
        self.put(&out)
    }

    fn open_node(&self, inode: &Inode, flags: OFlags) -> Result<OwnedFd> {
        match self.service.reopen(inode, flags) {
            // Only the owner may ask for it, and who that is the client has looked at.
            Err(Errno::PERM) if flags.contains(OFlags::NOATIME) => {
                self.service.reopen(inode, flags.difference(OFlags::NOATIME))
            }
            // A host's own pages are what was written last; where they cannot be read, neither can they be kept back.
            Err(Errno::ACCESS)
                if flags.contains(OFlags::RDWR) && self.service.has(Features::WRITEBACK_CACHE) =>
            {
                self.service.reopen(inode, flags.difference(OFlags::RDWR) | OFlags::WRONLY)
            }
            result => result,
        }
    }

    /// Gives an open file a number, and says what the client may do with it.
    fn opened(
        &mut self,
        inode: Arc<Inode>,
        file: OwnedFd,
        flags: OFlags,
        stat: Option<&Statx>,
    ) -> Result<OpenOut> {
        let mut reply = OpenReply::empty();
        match self.service.share.cache {
            Cache::None => reply |= OpenReply::DIRECT_IO,
            Cache::Always => reply |= OpenReply::KEEP_CACHE,
            Cache::Auto => {
                if stat.is_some_and(|stat| unchanged(&inode, stat, flags)) {
                    reply |= OpenReply::KEEP_CACHE;
                }
            }
        }
        // What is written is here when write(2) returns, so a close has nothing to tell but that locks end.
        let locked = self.service.has(Features::POSIX_LOCKS) && inode.is_locked();
        if !(self.service.has(Features::WRITEBACK_CACHE) || locked) {
            reply |= OpenReply::NOFLUSH;
        }
        let backing = self.passing().and_then(|passthrough| passthrough.share(&inode, file.as_fd()));
        if backing.is_some() {
            reply = OpenReply::PASSTHROUGH | (reply & OpenReply::NOFLUSH);
        }
        let handle = Handle::new(inode, file);
        let handle = if flags & OFlags::RWMODE == OFlags::RDONLY { handle } else { handle.writing() };
        let handle = Arc::new(handle);
        *lock(&handle.backing) = backing;
        let fh = self.service.handles.insert(handle.clone()).inspect_err(|_| self.let_go(&handle))?;
        Ok(OpenOut { fh, open_flags: reply.bits(), backing_id: backing.unwrap_or(0) })
    }

    /// How the kernel is told of files that reads and writes can go to directly, if it wants to know.
    fn passing(&self) -> Option<&Passthrough> {
        self.passthrough.as_deref().filter(|_| self.service.passes_through())
    }

    fn let_go(&self, handle: &Handle) {
        if let Some(passthrough) = self.passing()
            && handle.inode.is_file()
        {
            passthrough.let_go(&handle.inode, lock(&handle.backing).take().is_some());
        }
    }

    pub(crate) fn create(&mut self, request: &Request<'_>, create: CreateIn, name: Name<'_>) -> Result {
        let parent = self.changing(request.header.nodeid)?;
        let flags = self.flags(create.flags)?;
        self.making(request, create.umask)?;
        let mode = Mode::from_raw_mode(create.mode & 0o7777);
        let directory = parent.descriptor()?;
        // Never without O_EXCL: what is there may be something that opening has effects on.
        let make = flags.difference(OFlags::TRUNC) | OFlags::CREATE | OFlags::EXCL;
        let file = self.service.open_beneath(directory.as_fd(), name.as_c_str(), make, mode);
        let (inode, stat, file) = match file {
            Ok(file) => {
                let (inode, stat) = self.admit(&parent, self.path_of(&file)?, parent.region.clone())?;
                (inode, stat, file)
            }
            Err(Errno::EXIST) if !OFlags::from_bits_retain(create.flags).contains(OFlags::EXCL) => {
                // Somebody else made it since the client looked, and for a file that CREATE opens the client asks no
                // permission: it looks again, and asks. Root needs none.
                if request.header.uid != 0 {
                    return Err(Errno::STALE);
                }
                let (inode, stat) = self.find(&parent, name.as_c_str())?;
                let opened = self.actor.act(
                    request.header.uid,
                    request.header.gid,
                    create.open_flags & abi::OPEN_KILL_SUIDGID == 0,
                );
                match opened.and_then(|()| self.open_node(&inode, flags)) {
                    Ok(file) => (inode, stat, file),
                    Err(error) => {
                        self.service.inodes.forget(inode.id, 1);
                        // The client looks again, and sees what it is.
                        return Err(if error == Errno::NXIO { Errno::STALE } else { error });
                    }
                }
            }
            Err(error) => return Err(error),
        };
        self.put_created(inode, &stat, file, flags)
    }

    pub(crate) fn temporary(&mut self, request: &Request<'_>, create: CreateIn) -> Result {
        let parent = self.changing(request.header.nodeid)?;
        let flags = self.flags(create.flags)?;
        self.making(request, create.umask)?;
        let mode = Mode::from_raw_mode(create.mode & 0o7777);
        let exclusive = OFlags::from_bits_retain(create.flags) & OFlags::EXCL;
        let make = (flags & OFlags::RWMODE) | OFlags::TMPFILE | exclusive | OFlags::CLOEXEC;
        let name = DecInt::from_fd(parent.descriptor()?.as_fd());
        let file = rustix::fs::openat(self.service.proc(), name.as_c_str(), make, mode)?;
        let (inode, stat) = self.admit(&parent, self.path_of(&file)?, parent.region.clone())?;
        self.put_created(inode, &stat, file, flags)
    }

    fn put_created(&mut self, inode: Arc<Inode>, stat: &Statx, file: OwnedFd, flags: OFlags) -> Result {
        let entry = self.entry(&inode, stat);
        let id = inode.id;
        match self.opened(inode, file, flags, None) {
            Ok(out) => {
                self.put(&entry)?;
                self.put(&out)
            }
            Err(error) => {
                self.service.inodes.forget(id, 1);
                Err(error)
            }
        }
    }

    /// A node's own descriptor: an open file would keep others from executing it.
    fn path_of(&self, file: &OwnedFd) -> Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let name = DecInt::from_fd(file.as_fd());
        rustix::fs::openat(self.service.proc(), name.as_c_str(), flags, Mode::empty())
    }

    pub(crate) fn flush(&mut self, node: u64, flush: FlushIn) -> Result {
        if self.service.has(Features::NO_OPEN_SUPPORT) {
            // Nothing was opened, and nothing written: no more of these.
            return Err(Errno::NOSYS);
        }
        let handle = self.service.handles.get(flush.fh, node)?;
        self.service.locks.release(&handle.inode, flush.lock_owner);
        // Errors that the host's file system has kept for close(2) come from closing a copy.
        if handle.inode.is_file() {
            rustix::io::dup(&handle.file).map(drop)?;
        }
        Ok(Answer::Done)
    }

    pub(crate) fn release(&mut self, node: u64, release: ReleaseIn) -> Result {
        if release.fh == 0 {
            return Ok(Answer::Done);
        }
        let handle = self.service.handles.remove(release.fh, node)?;
        // Locks of open file descriptions end here, and what a close that sent no FLUSH has left.
        for owner in std::mem::take(&mut *lock(&handle.owners)) {
            self.service.locks.release(&handle.inode, owner);
        }
        self.let_go(&handle);
        drop(handle);
        self.service.locks.retry();
        Ok(Answer::Done)
    }
}

/// Whether the client's cached pages are still what is in the file, and takes note of what they will be.
pub(super) fn unchanged(inode: &Inode, stat: &Statx, flags: OFlags) -> bool {
    let stamp = Stamp {
        modified: (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
        changed: (stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec),
        size: stat.stx_size,
    };
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let changed = Duration::new(u64::try_from(stamp.changed.0).unwrap_or(0), stamp.changed.1);
    let settled = now > changed + GRAIN && !flags.contains(OFlags::TRUNC);
    let mut kept = lock(&inode.kept);
    let same = *kept == Some(stamp);
    *kept = settled.then_some(stamp);
    same && settled
}
