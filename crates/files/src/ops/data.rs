//! What is in files.

use crate::abi::{
    self, CopyFileRangeIn, FallocateIn, Features, FsyncIn, InHeader, IoctlIn, LseekIn, ReadIn, WriteIn,
};
use crate::buffers::Pieces;
use crate::handles::Handle;
use crate::inodes::errno;
use crate::service::MAX_WRITE;
use crate::worker::{Answer, Result, WRITE_HEAD, Worker};
use kso_sys::file;
use rustix::fs::{FallocateFlags, OFlags, SeekFrom};
use rustix::io::Errno;
use std::os::fd::AsFd;
use std::sync::Arc;
use vm_memory::VolatileSlice;

/// `FS_IOC_GETFLAGS` and `FS_IOC_FSGETXATTR`: what chattr(1) and xfs_io(8) read.
const GET_FLAGS: u32 = 0x8008_6601;
const GET_FLAGS_32: u32 = 0x8004_6601;
const GET_EXTENDED_FLAGS: u32 = 0x801c_581f;

impl Worker {
    /// The open file that is meant: one that the client opened, or what stands for it if it did not have to.
    pub(crate) fn handle(&self, node: u64, fh: u64) -> Result<Arc<Handle>> {
        if fh == 0 && self.service.share.read_only {
            return self.service.implicit(&self.service.inodes.get(node)?);
        }
        self.service.handles.get(fh, node)
    }

    pub(crate) fn read(&mut self, header: &InHeader, read: ReadIn, writable: Pieces<'_>) -> Result {
        let handle = self.handle(header.nodeid, read.fh)?;
        if !handle.inode.is_file() {
            return Err(Errno::ISDIR);
        }
        let mut pieces = Vec::with_capacity(writable.slices().len());
        writable.window(abi::OUT_HEADER, read.size as usize, &mut pieces);
        let count = transfer(&pieces, read.offset, |pieces, offset| {
            file::read_at(handle.file.as_fd(), pieces, offset)
        })?;
        Ok(Answer::Written(count))
    }

    pub(crate) fn write(&mut self, header: &InHeader, write: WriteIn, readable: Pieces<'_>) -> Result {
        self.writable()?;
        let handle = self.service.handles.get(write.fh, header.nodeid)?;
        if !handle.inode.is_file() {
            return Err(Errno::BADF);
        }
        if write.size > MAX_WRITE || readable.len() - WRITE_HEAD < write.size as usize {
            return Err(Errno::INVAL);
        }
        self.actor.act(header.uid, header.gid, write.write_flags & abi::WRITE_KILL_SUIDGID == 0)?;
        // Pages that were kept back have their place already, and are written by nobody's wish.
        let mut flags = 0;
        if write.write_flags & abi::WRITE_CACHE == 0 {
            let asked = OFlags::from_bits_retain(write.flags);
            if asked.contains(OFlags::APPEND) && !self.service.has(Features::WRITEBACK_CACHE) {
                flags |= file::APPEND;
            }
            if asked.contains(OFlags::SYNC) {
                flags |= file::SYNC;
            } else if asked.contains(OFlags::DSYNC) {
                flags |= file::DSYNC;
            }
        }
        let mut pieces = Vec::with_capacity(readable.slices().len());
        readable.window(WRITE_HEAD, write.size as usize, &mut pieces);
        let written = transfer(&pieces, write.offset, |pieces, offset| {
            file::write_at(handle.file.as_fd(), pieces, offset, flags)
        });
        let count = match written {
            Err(Errno::NOTSUP) if flags != 0 => self.write_in_steps(&handle, &pieces, write.offset, flags)?,
            written => written?,
        };
        self.put(&abi::WriteOut { size: count as u32, padding: 0 })
    }

    /// For kernels whose writes have no flags of their own (gVisor): by a descriptor that has them.
    fn write_in_steps(
        &self,
        handle: &Handle,
        pieces: &[VolatileSlice<'_>],
        offset: u64,
        flags: i32,
    ) -> Result<usize> {
        let mut own = OFlags::WRONLY;
        own.set(OFlags::APPEND, flags & file::APPEND != 0);
        own.set(OFlags::SYNC, flags & file::SYNC != 0);
        own.set(OFlags::DSYNC, flags & file::DSYNC != 0);
        let opened = self.service.reopen(&handle.inode, own)?;
        transfer(pieces, offset, |pieces, offset| file::write_at(opened.as_fd(), pieces, offset, 0))
    }

    pub(crate) fn fsync(&mut self, node: u64, sync: FsyncIn) -> Result {
        let handle = self.handle(node, sync.fh)?;
        if self.service.share.read_only {
            return Ok(Answer::Done);
        }
        match sync.fsync_flags & abi::FSYNC_FDATASYNC != 0 {
            true => rustix::fs::fdatasync(&handle.file)?,
            false => rustix::fs::fsync(&handle.file)?,
        }
        Ok(Answer::Done)
    }

    pub(crate) fn sync_all(&mut self, node: u64) -> Result {
        let inode = self.service.inodes.get(node)?;
        if !self.service.share.read_only {
            rustix::fs::syncfs(self.service.reopen(&inode, OFlags::RDONLY)?)?;
        }
        Ok(Answer::Done)
    }

    pub(crate) fn allocate(&mut self, header: &InHeader, allocate: FallocateIn) -> Result {
        self.writable()?;
        let handle = self.service.handles.get(allocate.fh, header.nodeid)?;
        // The client does not say whether bits are to be cleared; a caller who is not root may not keep them.
        self.actor.act(header.uid, header.gid, header.uid == 0)?;
        let mode = FallocateFlags::from_bits_retain(allocate.mode);
        rustix::fs::fallocate(&handle.file, mode, allocate.offset, allocate.length)?;
        Ok(Answer::Done)
    }

    pub(crate) fn seek(&mut self, node: u64, seek: LseekIn) -> Result {
        /// `SEEK_DATA` and `SEEK_HOLE` (lseek(2)); the client knows the others itself.
        const DATA: u32 = 3;
        const HOLE: u32 = 4;
        let handle = self.handle(node, seek.fh)?;
        let from = match seek.whence {
            DATA => SeekFrom::Data(seek.offset),
            HOLE => SeekFrom::Hole(seek.offset),
            _ => return Err(Errno::INVAL),
        };
        let offset = rustix::fs::seek(&handle.file, from)?;
        self.put(&abi::LseekOut { offset })
    }

    pub(crate) fn copy_range(&mut self, header: &InHeader, copy: CopyFileRangeIn, wide: bool) -> Result {
        self.writable()?;
        let from = self.service.handles.get(copy.fh_in, header.nodeid)?;
        let to = self.service.handles.get(copy.fh_out, copy.nodeid_out)?;
        if copy.flags != 0 {
            return Err(Errno::INVAL);
        }
        self.actor.act(header.uid, header.gid, header.uid == 0)?;
        let (mut from_offset, mut to_offset) = (copy.off_in, copy.off_out);
        // The kernel copies at most this in one call anyway (MAX_RW_COUNT).
        let length = copy.len.min(0x7fff_f000) as usize;
        let count = rustix::fs::copy_file_range(
            &from.file,
            Some(&mut from_offset),
            &to.file,
            Some(&mut to_offset),
            length,
        )?;
        if wide {
            return self.put(&abi::CopyFileRangeOut { bytes_copied: count as u64 });
        }
        self.put(&abi::WriteOut { size: count as u32, padding: 0 })
    }

    pub(crate) fn ioctl(&mut self, node: u64, ioctl: IoctlIn) -> Result {
        let handle = self.service.handles.get(ioctl.fh, node).map_err(|_| Errno::NOTTY)?;
        let file = handle.file.as_fd();
        let data = match ioctl.cmd {
            GET_FLAGS | GET_FLAGS_32 => {
                file::flags(file).map_err(|error| errno(&error))?.to_ne_bytes().to_vec()
            }
            GET_EXTENDED_FLAGS => file::extended_flags(file).map_err(|error| errno(&error))?.to_vec(),
            _ => return Err(Errno::NOTTY),
        };
        self.put(&abi::IoctlOut::default())?;
        let room = ioctl.out_size as usize;
        self.out.extend(data.into_iter().chain(std::iter::repeat(0)).take(room.min(64)));
        Ok(Answer::Out)
    }
}

/// Moves all of `pieces`, or as much as there is: a reply that is short means that the file ends there.
fn transfer(
    pieces: &[VolatileSlice<'_>],
    offset: u64,
    mut once: impl FnMut(&[VolatileSlice<'_>], u64) -> std::io::Result<usize>,
) -> Result<usize> {
    let pieces = Pieces::new(pieces);
    let total = pieces.len();
    let mut rest = Vec::new();
    let mut done = 0;
    while done < total {
        // To pwritev2(2) an offset of -1 is where the file stands.
        let position = offset.checked_add(done as u64).filter(|position| *position <= i64::MAX as u64);
        let position = position.ok_or(Errno::INVAL)?;
        let left = if done == 0 {
            pieces.slices()
        } else {
            pieces.window(done, total - done, &mut rest);
            &rest
        };
        match once(left, position) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) if done > 0 => break,
            Err(error) => return Err(errno(&error)),
        }
    }
    Ok(done)
}
