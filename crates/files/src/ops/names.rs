//! Names in directories.

use super::attributes::decode_device;
use crate::abi::{self, EntryOut, InHeader, MkDirIn, MkNodIn};
use crate::inodes::{Inode, Key};
use crate::request::{Name, Request};
use crate::service::{WANTED, attributes};
use crate::share::{Cache, Region, Submounts};
use crate::worker::{Answer, Result, Worker};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, Statx, StatxAttributes};
use rustix::io::Errno;
use rustix::path::DecInt;
use std::ffi::{CStr, OsStr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

/// Longest name that a file system of Linux has (`NAME_MAX`).
const NAME_MAX: usize = 255;

/// Types of file systems (include/uapi/linux/magic.h) by which the host's kernel speaks: never shown.
const INTERFACES: &[u64] = &[
    0x9fa0,      // proc
    0x6265_6572, // sysfs
    0x6462_6720, // debugfs
    0x7472_6163, // tracefs
    0x7363_6673, // securityfs
    0x6265_6570, // configfs
    0x1cd1,      // devpts
    0x0027_e0eb, // cgroup
    0x6367_7270, // cgroup2
    0xcafe_4a11, // bpf
    0xde5e_81e4, // efivarfs
    0x6165_676c, // pstore
    0xf97c_ff8c, // selinux
    0x1980_0202, // mqueue
    0x4249_4e4d, // binfmt_misc
    0x6573_5543, // fusectl
    0x6e73_6673, // nsfs
];

impl Worker {
    pub(crate) fn lookup(&mut self, header: &InHeader, name: Name<'_>) -> Result {
        let parent = self.service.inodes.get(header.nodeid)?;
        match self.find(&parent, name.as_c_str()) {
            Ok((inode, stat)) => {
                let entry = self.entry(&inode, &stat);
                self.put(&entry)
            }
            // Node 0: there is none, and that may be remembered.
            Err(Errno::NOENT) if self.service.share.cache != Cache::None => {
                let valid = parent.region.validity(self.service.share.cache);
                self.put(&EntryOut {
                    entry_valid: valid.as_secs(),
                    entry_valid_nsec: valid.subsec_nanos(),
                    ..EntryOut::default()
                })
            }
            Err(error) => Err(error),
        }
    }

    /// Looks a name up; the node then counts as looked up once more.
    pub(crate) fn find(&self, parent: &Inode, name: &CStr) -> Result<(Arc<Inode>, Statx)> {
        let bytes = name.to_bytes();
        if bytes.len() > NAME_MAX {
            return Err(Errno::NAMETOOLONG);
        }
        let region = parent.region.child(OsStr::from_bytes(bytes)).ok_or(Errno::NOENT)?;
        let directory = parent.descriptor()?;
        let directory = directory.as_fd();
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let stat = rustix::fs::statx(directory, name, flags, WANTED)?;
        if let Some(inode) = self.service.inodes.again(Key::of(&stat)) {
            return Ok((inode, stat));
        }
        let descriptor = self.service.open_beneath(directory, name, OFlags::PATH, Mode::empty())?;
        self.admit(parent, descriptor, region)
    }

    /// Makes a node of what was opened (`O_PATH`) in `parent`.
    pub(crate) fn admit(
        &self,
        parent: &Inode,
        descriptor: OwnedFd,
        region: Region,
    ) -> Result<(Arc<Inode>, Statx)> {
        let stat = attributes(descriptor.as_fd(), WANTED)?;
        let crossed = stat.stx_mnt_id != parent.key.mount
            && stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)
            && FileType::from_raw_mode(stat.stx_mode.into()) == FileType::Directory;
        let region = if crossed && !self.enters(descriptor.as_fd())? { Region::empty() } else { region };
        Ok((self.service.inodes.insert(descriptor, &stat, region)?, stat))
    }

    /// Whether what is in this mount is shown.
    fn enters(&self, mount: BorrowedFd<'_>) -> Result<bool> {
        if self.service.share.submounts == Submounts::Hidden {
            return Ok(false);
        }
        let kind = rustix::fs::fstatfs(mount)?.f_type as u64;
        Ok(!INTERFACES.contains(&kind))
    }

    /// A directory in which something is to be changed.
    pub(crate) fn changing(&mut self, node: u64) -> Result<Arc<Inode>> {
        self.writable()?;
        let inode = self.service.inodes.get(node)?;
        // What is hidden (another mount) can neither be seen nor be changed.
        if inode.region.is_whole() { Ok(inode) } else { Err(Errno::ROFS) }
    }

    /// The thread becomes the caller who makes something.
    pub(crate) fn making(&mut self, request: &Request<'_>, umask: u32) -> Result<()> {
        let header = &request.header;
        self.actor.act(header.uid, header.gid, header.uid == 0)?;
        self.actor.with_group(request.group)?;
        // Without ACLs the client has applied it.
        self.actor.with_umask(if self.service.has(abi::Features::DONT_MASK) { umask } else { 0 });
        Ok(())
    }

    /// Answers with what was made under `name`.
    fn made(&mut self, parent: &Inode, name: &CStr) -> Result {
        let (inode, stat) = self.find(parent, name)?;
        let entry = self.entry(&inode, &stat);
        self.put(&entry)
    }

    pub(crate) fn make_directory(&mut self, request: &Request<'_>, make: MkDirIn, name: Name<'_>) -> Result {
        let parent = self.changing(request.header.nodeid)?;
        self.making(request, make.umask)?;
        let mode = Mode::from_raw_mode(make.mode & 0o7777);
        rustix::fs::mkdirat(parent.descriptor()?, name.as_c_str(), mode)?;
        self.made(&parent, name.as_c_str())
    }

    pub(crate) fn make_node(&mut self, request: &Request<'_>, make: MkNodIn, name: Name<'_>) -> Result {
        let parent = self.changing(request.header.nodeid)?;
        let kind = FileType::from_raw_mode(make.mode);
        match kind {
            FileType::RegularFile | FileType::Fifo | FileType::Socket => {}
            // A whiteout of overlayfs is no device.
            FileType::CharacterDevice if make.rdev == 0 => {}
            FileType::CharacterDevice | FileType::BlockDevice if self.service.share.devices => {}
            FileType::CharacterDevice | FileType::BlockDevice => return Err(Errno::PERM),
            _ => return Err(Errno::INVAL),
        }
        self.making(request, make.umask)?;
        let mode = Mode::from_raw_mode(make.mode & 0o7777);
        let device = decode_device(make.rdev);
        rustix::fs::mknodat(parent.descriptor()?, name.as_c_str(), kind, mode, device)?;
        self.made(&parent, name.as_c_str())
    }

    pub(crate) fn symlink(&mut self, request: &Request<'_>, name: Name<'_>, target: &CStr) -> Result {
        let parent = self.changing(request.header.nodeid)?;
        self.making(request, 0)?;
        rustix::fs::symlinkat(target, parent.descriptor()?, name.as_c_str())?;
        self.made(&parent, name.as_c_str())
    }

    pub(crate) fn read_link(&mut self, node: u64) -> Result {
        let inode = self.service.inodes.get(node)?;
        if inode.kind != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        let out = std::mem::take(&mut self.out);
        let target = rustix::fs::readlinkat(inode.descriptor()?, c"", out)?;
        self.out = target.into_bytes();
        Ok(Answer::Out)
    }

    pub(crate) fn unlink(&mut self, header: &InHeader, name: Name<'_>, flags: AtFlags) -> Result {
        let parent = self.changing(header.nodeid)?;
        self.actor.act(header.uid, header.gid, true)?;
        rustix::fs::unlinkat(parent.descriptor()?, name.as_c_str(), flags)?;
        Ok(Answer::Done)
    }

    pub(crate) fn rename(
        &mut self,
        header: &InHeader,
        new_parent: u64,
        flags: u32,
        old: Name<'_>,
        new: Name<'_>,
    ) -> Result {
        let flags = RenameFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let old_parent = self.changing(header.nodeid)?;
        let new_parent = self.changing(new_parent)?;
        self.actor.act(header.uid, header.gid, true)?;
        let (from, to) = (old_parent.descriptor()?, new_parent.descriptor()?);
        if flags.is_empty() {
            rustix::fs::renameat(from, old.as_c_str(), to, new.as_c_str())?;
        } else {
            rustix::fs::renameat_with(from, old.as_c_str(), to, new.as_c_str(), flags)?;
        }
        Ok(Answer::Done)
    }

    pub(crate) fn link(&mut self, header: &InHeader, source: u64, name: Name<'_>) -> Result {
        let parent = self.changing(header.nodeid)?;
        let inode = self.service.inodes.get(source)?;
        if inode.is_directory() {
            return Err(Errno::PERM);
        }
        self.actor.act(header.uid, header.gid, true)?;
        let descriptor = inode.descriptor()?;
        let path = DecInt::from_fd(descriptor.as_fd());
        let directory = parent.descriptor()?;
        // Follows no link but the magic one: also of a symbolic link it is the node itself that gets a name.
        rustix::fs::linkat(
            self.service.proc(),
            path.as_c_str(),
            directory,
            name.as_c_str(),
            AtFlags::SYMLINK_FOLLOW,
        )?;
        self.made(&parent, name.as_c_str())
    }
}
