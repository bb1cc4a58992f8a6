//! Extended attributes, by the node's name in /proc: an `O_PATH` descriptor has none, and opening a node may have effects.

use crate::abi::{self, GetXattrOut, InHeader};
use crate::inodes::Inode;
use crate::request::MAX_XATTR;
use crate::worker::{Answer, Result, Worker};
use rustix::fs::XattrFlags;
use rustix::io::Errno;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd};

impl Worker {
    fn with_name<T>(&self, inode: &Inode, what: impl FnOnce(&CStr) -> rustix::io::Result<T>) -> Result<T> {
        let descriptor = inode.descriptor()?;
        let path = format!("/proc/self/fd/{}", descriptor.as_fd().as_raw_fd());
        what(&CString::new(path).map_err(|_| Errno::INVAL)?)
    }

    /// Answers with so many bytes of `out`, or with how many there are if the client gave no room.
    fn put_value(&mut self, room: u32, got: usize) -> Result {
        if room == 0 {
            self.out.clear();
            return self.put(&GetXattrOut { size: got as u32, padding: 0 });
        }
        if got > room as usize {
            return Err(Errno::RANGE);
        }
        self.out.truncate(got);
        Ok(Answer::Out)
    }

    pub(crate) fn get_xattr(&mut self, node: u64, name: &CStr, room: u32) -> Result {
        let inode = self.service.inodes.get(node)?;
        let mut out = std::mem::take(&mut self.out);
        out.resize((room as usize).min(MAX_XATTR), 0);
        let got = self.with_name(&inode, |path| rustix::fs::getxattr(path, name, out.as_mut_slice()));
        self.out = out;
        let got = match got {
            // The client checks ACLs whatever file system this is, and takes any other error for a refusal
            // (fs/fuse/acl.c).
            Err(Errno::NOTSUP) if name.to_bytes().starts_with(b"system.posix_acl_") => Err(Errno::NODATA),
            got => got,
        };
        self.put_value(room, got?)
    }

    pub(crate) fn list_xattrs(&mut self, node: u64, room: u32) -> Result {
        let inode = self.service.inodes.get(node)?;
        let mut out = std::mem::take(&mut self.out);
        out.resize((room as usize).min(MAX_XATTR), 0);
        let got = self.with_name(&inode, |path| rustix::fs::listxattr(path, out.as_mut_slice()));
        self.out = out;
        self.put_value(room, got?)
    }

    pub(crate) fn set_xattr(
        &mut self,
        header: &InHeader,
        name: &CStr,
        value: &[u8],
        flags: u32,
        extra: u32,
    ) -> Result {
        self.writable()?;
        let inode = self.service.inodes.get(header.nodeid)?;
        let kill = extra & abi::SETXATTR_ACL_KILL_SGID != 0;
        self.actor.act(header.uid, header.gid, !kill)?;
        let flags = XattrFlags::from_bits_retain(flags);
        self.with_name(&inode, |path| rustix::fs::setxattr(path, name, value, flags))?;
        Ok(Answer::Done)
    }

    pub(crate) fn remove_xattr(&mut self, header: &InHeader, name: &CStr) -> Result {
        self.writable()?;
        let inode = self.service.inodes.get(header.nodeid)?;
        self.actor.act(header.uid, header.gid, true)?;
        self.with_name(&inode, |path| rustix::fs::removexattr(path, name))?;
        Ok(Answer::Done)
    }
}
