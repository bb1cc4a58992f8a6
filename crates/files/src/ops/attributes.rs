//! Attributes of nodes.

use crate::abi::{
    self, Attr, AttrOut, EntryOut, InHeader, SetAttrIn, StatX, StatXIn, StatXOut, SxTime, Valid,
};
use crate::inodes::Inode;
use crate::service::{WANTED, attributes};
use crate::worker::{Answer, Result, Worker};
use rustix::fs::{
    Access, AtFlags, Gid, Mode, OFlags, Statx, StatxAttributes, StatxFlags, StatxTimestamp, Timespec,
    Timestamps, Uid, makedev,
};
use rustix::io::Errno;
use rustix::path::DecInt;
use std::os::fd::{AsFd, BorrowedFd};

/// `UTIME_NOW` and `UTIME_OMIT` of utimensat(2).
const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW };
const OMIT: Timespec = Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT };

impl Worker {
    /// What the client is told of a node's attributes.
    pub(crate) fn attr(&self, inode: &Inode, stat: &Statx) -> Attr {
        let (uid, gid) = self.actor.seen(stat.stx_uid, stat.stx_gid);
        let mount_root = stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
        let submount = mount_root
            && inode.id != abi::ROOT
            && inode.is_directory()
            && inode.region.is_whole()
            && self.service.has(abi::Features::SUBMOUNTS);
        Attr {
            ino: self.service.number(inode.key.device, stat.stx_ino),
            size: stat.stx_size,
            blocks: stat.stx_blocks,
            atime: stat.stx_atime.tv_sec.cast_unsigned(),
            mtime: stat.stx_mtime.tv_sec.cast_unsigned(),
            ctime: stat.stx_ctime.tv_sec.cast_unsigned(),
            atimensec: stat.stx_atime.tv_nsec,
            mtimensec: stat.stx_mtime.tv_nsec,
            ctimensec: stat.stx_ctime.tv_nsec,
            mode: stat.stx_mode.into(),
            nlink: stat.stx_nlink,
            uid,
            gid,
            // The kernel's own 32-bit encoding of small numbers (include/linux/kdev_t.h, new_encode_dev).
            rdev: encode_device(stat.stx_rdev_major, stat.stx_rdev_minor),
            blksize: stat.stx_blksize,
            flags: if submount { abi::ATTR_SUBMOUNT } else { 0 },
        }
    }

    /// What the client is told of a node that it looked up.
    pub(crate) fn entry(&self, inode: &Inode, stat: &Statx) -> EntryOut {
        let valid = inode.region.validity(self.service.share.cache);
        EntryOut {
            nodeid: inode.id,
            generation: inode.generation,
            entry_valid: valid.as_secs(),
            attr_valid: valid.as_secs(),
            entry_valid_nsec: valid.subsec_nanos(),
            attr_valid_nsec: valid.subsec_nanos(),
            attr: self.attr(inode, stat),
        }
    }

    fn stat(&self, inode: &Inode, fh: Option<u64>, wanted: StatxFlags) -> Result<Statx> {
        // Where the node is held by a handle, an open file saves opening it.
        match fh.and_then(|fh| self.service.handles.get(fh, inode.id).ok()) {
            Some(handle) => attributes(handle.file.as_fd(), wanted),
            None => attributes(inode.descriptor()?.as_fd(), wanted),
        }
    }

    fn put_attributes(&mut self, inode: &Inode, stat: &Statx) -> Result {
        let valid = inode.region.validity(self.service.share.cache);
        let attr = self.attr(inode, stat);
        self.put(&AttrOut {
            attr_valid: valid.as_secs(),
            attr_valid_nsec: valid.subsec_nanos(),
            dummy: 0,
            attr,
        })
    }

    pub(crate) fn get_attributes(&mut self, node: u64, get: abi::GetAttrIn) -> Result {
        let inode = self.service.inodes.get(node)?;
        let fh = (get.getattr_flags & abi::GETATTR_FH != 0).then_some(get.fh);
        let stat = self.stat(&inode, fh, WANTED)?;
        self.put_attributes(&inode, &stat)
    }

    pub(crate) fn statx(&mut self, node: u64, get: StatXIn) -> Result {
        let inode = self.service.inodes.get(node)?;
        let fh = (get.getattr_flags & abi::GETATTR_FH != 0).then_some(get.fh);
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME | StatxFlags::MNT_ID;
        let stat = self.stat(&inode, fh, wanted)?;
        let attr = self.attr(&inode, &stat);
        let valid = inode.region.validity(self.service.share.cache);
        let out = StatXOut {
            attr_valid: valid.as_secs(),
            attr_valid_nsec: valid.subsec_nanos(),
            flags: 0,
            spare: [0; 2],
            stat: StatX {
                mask: stat.stx_mask & (StatxFlags::BASIC_STATS | StatxFlags::BTIME).bits(),
                blksize: attr.blksize,
                attributes: 0,
                nlink: attr.nlink,
                uid: attr.uid,
                gid: attr.gid,
                mode: stat.stx_mode,
                ino: attr.ino,
                size: attr.size,
                blocks: attr.blocks,
                atime: time(stat.stx_atime),
                btime: time(stat.stx_btime),
                ctime: time(stat.stx_ctime),
                mtime: time(stat.stx_mtime),
                rdev_major: stat.stx_rdev_major,
                rdev_minor: stat.stx_rdev_minor,
                dev_major: stat.stx_dev_major,
                dev_minor: stat.stx_dev_minor,
                ..StatX::default()
            },
        };
        self.put(&out)
    }

    pub(crate) fn set_attributes(&mut self, header: &InHeader, set: SetAttrIn) -> Result {
        self.writable()?;
        let inode = self.service.inodes.get(header.nodeid)?;
        let valid = Valid::from_bits_retain(set.valid);
        self.actor.act(header.uid, header.gid, !valid.contains(Valid::KILL_SUIDGID))?;
        let descriptor = inode.descriptor()?;
        let descriptor = descriptor.as_fd();
        let handle = match valid.contains(Valid::FH) {
            true => Some(self.service.handles.get(set.fh, inode.id)?),
            false => None,
        };
        if !valid.intersects(Valid::CHANGES) {
            self.clear_bits(header, descriptor)?;
        }
        if valid.intersects(Valid::UID | Valid::GID) {
            let user = valid.contains(Valid::UID).then_some(set.uid);
            let group = valid.contains(Valid::GID).then_some(set.gid);
            let (user, group) = self.actor.meant(user, group);
            let (user, group) = (user.map(uid).transpose()?, group.map(gid).transpose()?);
            rustix::fs::chownat(descriptor, c"", user, group, AtFlags::EMPTY_PATH)?;
        }
        if valid.contains(Valid::MODE) {
            let mode = Mode::from_raw_mode(set.mode & 0o7777);
            match &handle {
                Some(handle) => rustix::fs::fchmod(&handle.file, mode)?,
                None => self.by_path(&inode, |worker, name| {
                    rustix::fs::chmodat(worker.service.proc(), name, mode, AtFlags::empty())
                })?,
            }
        }
        if valid.contains(Valid::SIZE) {
            match &handle {
                Some(handle) => rustix::fs::ftruncate(&handle.file, set.size)?,
                None => {
                    let file = self.service.reopen(&inode, OFlags::WRONLY)?;
                    rustix::fs::ftruncate(&file, set.size)?;
                }
            }
        }
        if valid.intersects(Valid::ATIME | Valid::MTIME) {
            let moment = |is_set: bool, now: bool, seconds: u64, nanoseconds: u32| match (is_set, now) {
                (false, _) => OMIT,
                (true, true) => NOW,
                (true, false) => Timespec { tv_sec: seconds.cast_signed(), tv_nsec: nanoseconds.into() },
            };
            if set.atimensec >= 1_000_000_000 || set.mtimensec >= 1_000_000_000 {
                return Err(Errno::INVAL);
            }
            let times = Timestamps {
                last_access: moment(
                    valid.contains(Valid::ATIME),
                    valid.contains(Valid::ATIME_NOW),
                    set.atime,
                    set.atimensec,
                ),
                last_modification: moment(
                    valid.contains(Valid::MTIME),
                    valid.contains(Valid::MTIME_NOW),
                    set.mtime,
                    set.mtimensec,
                ),
            };
            match rustix::fs::utimensat(descriptor, c"", &times, AtFlags::EMPTY_PATH) {
                // Linux before 5.8, and gVisor.
                Err(Errno::INVAL) => self.by_path(&inode, |worker, name| {
                    rustix::fs::utimensat(worker.service.proc(), name, &times, AtFlags::empty())
                })?,
                result => result?,
            }
        }
        let stat = attributes(descriptor, WANTED)?;
        self.put_attributes(&inode, &stat)
    }

    /// A request to change nothing. It is chown(2) to nobody, which clears setuid and setgid bits as any other (`chown_common`,
    /// fs/open.c), and what Linux sends before some writes. The owner and root may do the first; others must not fail at the
    /// second, whose own request clears the bits, unless it passes the service by.
    fn clear_bits(&mut self, header: &InHeader, descriptor: BorrowedFd<'_>) -> Result<()> {
        let stat = attributes(descriptor, WANTED)?;
        let (owner, _) = self.actor.seen(stat.stx_uid, stat.stx_gid);
        if header.uid == 0 || header.uid == owner || self.service.passes_through() {
            self.actor.act(header.uid, header.gid, header.uid == 0)?;
            rustix::fs::chownat(descriptor, c"", None, None, AtFlags::EMPTY_PATH)?;
        }
        Ok(())
    }

    /// Performs what needs a name: the node's in /proc/self/fd, which the kernel resolves to the node itself.
    pub(crate) fn by_path<T>(
        &self,
        inode: &Inode,
        what: impl FnOnce(&Self, &std::ffi::CStr) -> rustix::io::Result<T>,
    ) -> Result<T> {
        let descriptor = inode.descriptor()?;
        what(self, DecInt::from_fd(descriptor.as_fd()).as_c_str())
    }

    pub(crate) fn access(&mut self, header: &InHeader, mask: u32) -> Result {
        let inode = self.service.inodes.get(header.nodeid)?;
        let mask = Access::from_bits_truncate(mask);
        if mask.contains(Access::WRITE_OK) {
            self.writable()?;
        }
        if mask == Access::EXISTS {
            return Ok(Answer::Done);
        }
        // By the mode alone: capabilities of this thread say nothing of the caller's.
        let stat = attributes(inode.descriptor()?.as_fd(), WANTED)?;
        let (user, group) = self.actor.seen(stat.stx_uid, stat.stx_gid);
        let mode = u32::from(stat.stx_mode);
        let granted = match (header.uid, header.gid) {
            (0, _) if inode.is_directory() || mode & 0o111 != 0 => 7,
            (0, _) => 6,
            (caller, _) if caller == user => mode >> 6,
            (_, caller) if caller == group => mode >> 3,
            _ => mode,
        };
        if mask.bits() & 7 & !granted == 0 { Ok(Answer::Done) } else { Err(Errno::ACCESS) }
    }

    pub(crate) fn statfs(&mut self, node: u64) -> Result {
        let inode = self.service.inodes.get(node)?;
        let stat = rustix::fs::fstatvfs(inode.descriptor()?)?;
        let size = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        self.put(&abi::StatFsOut {
            blocks: stat.f_blocks,
            bfree: stat.f_bfree,
            bavail: stat.f_bavail,
            files: stat.f_files,
            ffree: stat.f_ffree,
            bsize: size(stat.f_bsize),
            namelen: size(stat.f_namemax),
            frsize: size(stat.f_frsize),
            ..abi::StatFsOut::default()
        })
    }
}

pub(crate) fn uid(raw: u32) -> Result<Uid> {
    if raw == u32::MAX { Err(Errno::INVAL) } else { Ok(Uid::from_raw(raw)) }
}

pub(crate) fn gid(raw: u32) -> Result<Gid> {
    if raw == u32::MAX { Err(Errno::INVAL) } else { Ok(Gid::from_raw(raw)) }
}

fn time(time: StatxTimestamp) -> SxTime {
    SxTime { seconds: time.tv_sec, nanoseconds: time.tv_nsec, reserved: 0 }
}

fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// The device that the kernel encoded (`new_decode_dev`).
pub(crate) fn decode_device(encoded: u32) -> rustix::fs::Dev {
    makedev((encoded & 0xf_ff00) >> 8, (encoded & 0xff) | ((encoded >> 12) & 0xf_ff00))
}
