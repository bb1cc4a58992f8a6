//! Reading directories.

use crate::abi::{self, Dirent, EntryOut, InHeader, OpenOut, OpenReply, ReadIn};
use crate::handles::{Entry, Handle, Stream};
use crate::inodes::{Inode, lock};
use crate::service::{WANTED, attributes};
use crate::share::Cache;
use crate::worker::{Answer, Result, Worker};
use rustix::fs::{OFlags, RawDir, SeekFrom};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use zerocopy::IntoBytes;

/// Most bytes of one reply.
const MAX_REPLY: usize = 128 * 1024;
/// Bytes of entries that are read ahead.
const AHEAD: usize = 32 * 1024;

impl Worker {
    pub(crate) fn open_directory(&mut self, node: u64) -> Result {
        if self.service.has(abi::Features::NO_OPENDIR_SUPPORT) {
            return Err(Errno::NOSYS);
        }
        let inode = self.service.inodes.get(node)?;
        if !inode.is_directory() {
            return Err(Errno::NOTDIR);
        }
        let file = self.service.reopen(&inode, OFlags::RDONLY)?;
        let mut reply = OpenReply::empty();
        match self.service.share.cache {
            Cache::None => {}
            Cache::Always => reply |= OpenReply::CACHE_DIR | OpenReply::KEEP_CACHE,
            Cache::Auto => {
                reply |= OpenReply::CACHE_DIR;
                let stat = attributes(file.as_fd(), WANTED)?;
                if super::opening::unchanged(&inode, &stat, OFlags::empty()) {
                    reply |= OpenReply::KEEP_CACHE;
                }
            }
        }
        let fh = self.service.handles.insert(Arc::new(Handle::new(inode, file)))?;
        self.put(&OpenOut { fh, open_flags: reply.bits(), backing_id: 0 })
    }

    pub(crate) fn read_directory(
        &mut self,
        header: &InHeader,
        read: ReadIn,
        room: usize,
        plus: bool,
    ) -> Result {
        let handle = self.handle(header.nodeid, read.fh)?;
        if !handle.inode.is_directory() {
            return Err(Errno::NOTDIR);
        }
        let room = room.saturating_sub(abi::OUT_HEADER).min(read.size as usize).min(MAX_REPLY);
        let mut stream = lock(&handle.stream);
        if stream.position != read.offset {
            stream.ahead.clear();
            rustix::fs::seek(&handle.file, SeekFrom::Start(read.offset))?;
            stream.position = read.offset;
        }
        loop {
            let Some(entry) = stream.ahead.front() else {
                if !read_ahead(&handle, &mut stream)? {
                    return Ok(Answer::Out);
                }
                continue;
            };
            if !self.put_entry(&handle.inode, entry, room, plus) {
                break;
            }
            stream.position = entry.next;
            stream.ahead.pop_front();
        }
        // Not even one: the buffer is too small for what has to be told.
        if self.out.is_empty() { Err(Errno::INVAL) } else { Ok(Answer::Out) }
    }

    /// Appends an entry to the reply. `false`: there is no room for it.
    fn put_entry(&mut self, directory: &Inode, entry: &Entry, room: usize, plus: bool) -> bool {
        let name = entry.name.to_bytes();
        let dots = matches!(name, b"." | b"..");
        if !dots && directory.region.child(OsStr::from_bytes(name)).is_none() {
            return true;
        }
        let head = if plus { size_of::<EntryOut>() } else { 0 } + size_of::<Dirent>();
        let length = (head + name.len()).next_multiple_of(8);
        if self.out.len() + length > room {
            return false;
        }
        let start = self.out.len();
        if plus {
            // An entry of node 0 is looked up when it is wanted.
            let found = if dots { None } else { self.find(directory, &entry.name).ok() };
            let out = found.map_or_else(EntryOut::default, |(inode, stat)| self.entry(&inode, &stat));
            self.out.extend_from_slice(out.as_bytes());
        }
        let dirent = Dirent {
            ino: self.service.number(directory.key.device, entry.inode),
            off: entry.next,
            namelen: name.len() as u32,
            kind: entry.kind.as_raw_mode() >> 12,
        };
        self.out.extend_from_slice(dirent.as_bytes());
        self.out.extend_from_slice(name);
        self.out.resize(start + length, 0);
        true
    }
}

/// Reads more entries. `false`: there are no more.
fn read_ahead(handle: &Handle, stream: &mut Stream) -> Result<bool> {
    let mut buffer = [MaybeUninit::uninit(); AHEAD];
    let mut directory = RawDir::new(&handle.file, &mut buffer);
    while let Some(entry) = directory.next() {
        let entry = entry?;
        stream.ahead.push_back(Entry {
            name: entry.file_name().to_owned(),
            inode: entry.ino(),
            kind: entry.file_type(),
            next: entry.next_entry_cookie(),
        });
        if directory.is_buffer_empty() {
            break;
        }
    }
    Ok(!stream.ahead.is_empty())
}
