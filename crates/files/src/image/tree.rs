//! Requests on a directory of an image.

use super::disk::{Disk, Open, kind_bits};
use crate::abi::{
    self, Attr, AttrOut, Dirent, EntryOut, Features, InitOut, OpenOut, OpenReply, OutHeader, StatFsOut,
};
use crate::request::{self, MAX_REQUEST, Operation, Request};
use crate::service::MAX_WRITE;
use ext4_view::Metadata;
use rustix::io::Errno;
use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};
use std::time::Duration;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Nodes that a client may know.
const MOST_NODES: usize = 1 << 19;
/// Files and directories that it may have open.
const MOST_HANDLES: usize = 1 << 16;
/// Entries of the directories that it has open, together.
const MOST_LISTED: usize = 4 << 20;
/// Most bytes of a path in an image.
const MOST_PATH: usize = 64 << 10;

#[derive(Debug)]
struct Node {
    path: Vec<u8>,
    lookups: u64,
}

#[derive(Debug)]
enum Handle {
    File(Box<Open>),
    /// With the dots.
    Directory(Vec<(Vec<u8>, u32)>),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Tree {
    disk: Disk,
    nodes: HashMap<u64, Node>,
    by_path: HashMap<Vec<u8>, u64>,
    next: u64,
    handles: HashMap<u64, (u64, Handle)>,
    listed: usize,
    size: u64,
    validity: Duration,
}

/// What is to be sent.
enum Answer {
    Nothing,
    Done,
}

impl Tree {
    pub fn new(mut disk: Disk, directory: &Path, size: u64, validity: Duration) -> Result<Self, Errno> {
        let mut path = vec![b'/'];
        for part in directory.components() {
            let Component::Normal(name) = part else { continue };
            // A link on the way is not followed.
            if !disk.look(&path)?.is_dir() {
                return Err(Errno::NOTDIR);
            }
            path = join(&path, name.as_bytes());
        }
        if !disk.look(&path)?.is_dir() {
            return Err(Errno::NOTDIR);
        }
        let root = Node { path, lookups: 1 };
        Ok(Self {
            disk,
            by_path: HashMap::from([(root.path.clone(), abi::ROOT)]),
            nodes: HashMap::from([(abi::ROOT, root)]),
            next: abi::ROOT + 1,
            handles: HashMap::new(),
            listed: 0,
            size,
            validity,
        })
    }

    /// Performs a request; `false`: it has no reply.
    pub fn serve(&mut self, bytes: &[u8], reply: &mut Vec<u8>) -> bool {
        let Some(header) = request::header(bytes) else { return false };
        reply.clear();
        reply.resize(abi::OUT_HEADER, 0);
        let write = header.opcode == abi::Opcode::Write as u32;
        let answer = match bytes.get(abi::IN_HEADER..) {
            Some(body) if write || bytes.len() < MAX_REQUEST => {
                let parsed = Request::parse(header, body, false);
                parsed.and_then(|request| self.perform(&request, reply))
            }
            _ => Err(Errno::INVAL),
        };
        let error = match answer {
            Ok(Answer::Nothing) => return false,
            Ok(Answer::Done) => 0,
            Err(error) => {
                reply.truncate(abi::OUT_HEADER);
                -error.raw_os_error()
            }
        };
        let head = OutHeader { len: reply.len() as u32, error, unique: header.unique };
        if let Some(place) = reply.get_mut(..abi::OUT_HEADER) {
            place.copy_from_slice(head.as_bytes());
        }
        true
    }

    fn perform(&mut self, request: &Request<'_>, reply: &mut Vec<u8>) -> Result<Answer, Errno> {
        let node = request.header.nodeid;
        match request.operation {
            Operation::Init { init, more } => return self.init(init, more, reply),
            Operation::Forget(count) => {
                self.forget(node, count);
                return Ok(Answer::Nothing);
            }
            Operation::BatchForget(bytes) => {
                for one in bytes.chunks_exact(size_of::<abi::ForgetOne>()) {
                    if let Ok(one) = abi::ForgetOne::read_from_bytes(one) {
                        self.forget(one.nodeid, one.nlookup);
                    }
                }
                return Ok(Answer::Nothing);
            }
            Operation::Interrupt(_) => return Ok(Answer::Nothing),
            Operation::Destroy | Operation::Flush(_) | Operation::Fsync(_) | Operation::FsyncDir(_) => {}
            Operation::Lookup(name) => {
                let entry = self.look_up(node, name.bytes())?;
                put(reply, &entry);
            }
            Operation::GetAttr(_) => {
                let path = self.path(node)?;
                let found = self.disk.look(&path)?;
                let attr = Self::attr(&path, &found);
                let (attr_valid, attr_valid_nsec) = (self.validity.as_secs(), self.validity.subsec_nanos());
                put(reply, &AttrOut { attr_valid, attr_valid_nsec, dummy: 0, attr });
            }
            Operation::ReadLink => {
                let path = self.path(node)?;
                reply.extend(self.disk.read_link(&path)?);
            }
            Operation::Open(open) => {
                if open.flags & (open_flags::WRITE | open_flags::TRUNCATE) != 0 {
                    return Err(Errno::ROFS);
                }
                let path = self.path(node)?;
                // Its reader would follow a link.
                if self.disk.look(&path)?.is_symlink() {
                    return Err(Errno::LOOP);
                }
                let file = self.disk.open_file(&path)?;
                self.opened(node, Handle::File(Box::new(file)), reply)?;
            }
            Operation::OpenDir(_) => {
                let path = self.path(node)?;
                if !self.disk.look(&path)?.is_dir() {
                    return Err(Errno::NOTDIR);
                }
                let entries = self.disk.list(&path)?;
                if self.listed.saturating_add(entries.len()) > MOST_LISTED {
                    return Err(Errno::NFILE);
                }
                self.listed += entries.len();
                self.opened(node, Handle::Directory(entries), reply)?;
            }
            Operation::Read(read) => self.read(node, read, reply)?,
            Operation::ReadDir(read) => self.read_directory(node, read, false, reply)?,
            Operation::ReadDirPlus(read) => self.read_directory(node, read, true, reply)?,
            Operation::Release(release) | Operation::ReleaseDir(release) => self.close(release.fh),
            Operation::StatFs => {
                let blocks = self.size / 4096;
                put(
                    reply,
                    &StatFsOut { blocks, bsize: 4096, frsize: 4096, namelen: 255, ..StatFsOut::default() },
                );
            }
            // The client then does without, and does not ask again.
            Operation::StatX(_)
            | Operation::Access(_)
            | Operation::GetXattr(..)
            | Operation::ListXattr(_)
            | Operation::GetLk(_)
            | Operation::SetLk(_)
            | Operation::SetLkW(_)
            | Operation::Ioctl(..)
            | Operation::Lseek(_)
            | Operation::SyncFs
            | Operation::CopyFileRange(..)
            | Operation::Other => return Err(Errno::NOSYS),
            Operation::SetAttr(_)
            | Operation::MkNod(..)
            | Operation::MkDir(..)
            | Operation::Unlink(_)
            | Operation::RmDir(_)
            | Operation::Rename { .. }
            | Operation::Link(..)
            | Operation::SymLink { .. }
            | Operation::Create(..)
            | Operation::TmpFile(_)
            | Operation::Write(_)
            | Operation::SetXattr { .. }
            | Operation::RemoveXattr(_)
            | Operation::Fallocate(_) => return Err(Errno::ROFS),
        }
        Ok(Answer::Done)
    }

    fn init(&mut self, init: abi::InitIn, more: u32, reply: &mut Vec<u8>) -> Result<Answer, Errno> {
        if init.major != abi::MAJOR || init.minor < abi::OLDEST_MINOR {
            return Err(Errno::PROTO);
        }
        self.reset();
        let mut offered = u64::from(init.flags);
        if offered & Features::INIT_EXT.bits() != 0 {
            offered |= u64::from(more) << 32;
        }
        let wanted = Features::ASYNC_READ
            | Features::DO_READDIRPLUS
            | Features::READDIRPLUS_AUTO
            | Features::PARALLEL_DIROPS
            | Features::MAX_PAGES
            | Features::CACHE_SYMLINKS
            | Features::INIT_EXT;
        let bits = (wanted & Features::from_bits_truncate(offered)).bits();
        put(
            reply,
            &InitOut {
                major: abi::MAJOR,
                minor: abi::MINOR.min(init.minor),
                max_readahead: init.max_readahead,
                flags: bits as u32,
                flags2: (bits >> 32) as u32,
                max_background: 64,
                congestion_threshold: 48,
                max_write: MAX_WRITE,
                time_gran: 1,
                max_pages: (MAX_WRITE / 4096) as u16,
                ..InitOut::default()
            },
        );
        Ok(Answer::Done)
    }

    fn reset(&mut self) {
        self.nodes.retain(|id, _| *id == abi::ROOT);
        self.by_path.retain(|_, id| *id == abi::ROOT);
        self.handles.clear();
        self.listed = 0;
    }

    fn path(&self, node: u64) -> Result<Vec<u8>, Errno> {
        self.nodes.get(&node).map(|node| node.path.clone()).ok_or(Errno::STALE)
    }

    fn look_up(&mut self, parent: u64, name: &[u8]) -> Result<EntryOut, Errno> {
        if name.len() > 255 {
            return Err(Errno::NAMETOOLONG);
        }
        let directory = self.path(parent)?;
        if !self.disk.look(&directory)?.is_dir() {
            return Err(Errno::NOTDIR);
        }
        let path = join(&directory, name);
        if path.len() > MOST_PATH {
            return Err(Errno::NAMETOOLONG);
        }
        let found = self.disk.look(&path)?;
        let attr = Self::attr(&path, &found);
        let nodeid = match self.by_path.get(&path) {
            Some(&id) => id,
            None if self.nodes.len() >= MOST_NODES => return Err(Errno::NFILE),
            None => {
                let id = self.next;
                self.next += 1;
                self.by_path.insert(path.clone(), id);
                self.nodes.insert(id, Node { path, lookups: 0 });
                id
            }
        };
        if let Some(node) = self.nodes.get_mut(&nodeid) {
            node.lookups = node.lookups.saturating_add(1);
        }
        let (seconds, nanoseconds) = (self.validity.as_secs(), self.validity.subsec_nanos());
        Ok(EntryOut {
            nodeid,
            generation: 0,
            entry_valid: seconds,
            attr_valid: seconds,
            entry_valid_nsec: nanoseconds,
            attr_valid_nsec: nanoseconds,
            attr,
        })
    }

    fn forget(&mut self, id: u64, count: u64) {
        let Some(node) = self.nodes.get_mut(&id).filter(|_| id != abi::ROOT) else { return };
        node.lookups = node.lookups.saturating_sub(count);
        if node.lookups == 0
            && let Some(node) = self.nodes.remove(&id)
        {
            self.by_path.remove(&node.path);
        }
    }

    fn attr(path: &[u8], found: &Metadata) -> Attr {
        let (accessed, modified) = (found.accessed(), found.modified());
        Attr {
            ino: number(path),
            size: found.len(),
            blocks: found.len().div_ceil(512),
            atime: accessed.seconds().cast_unsigned(),
            mtime: modified.seconds().cast_unsigned(),
            // The reader does not tell.
            ctime: modified.seconds().cast_unsigned(),
            atimensec: accessed.nanoseconds(),
            mtimensec: modified.nanoseconds(),
            ctimensec: modified.nanoseconds(),
            mode: kind_bits(found.file_type()) | u32::from(found.mode()) & 0o7777,
            nlink: if found.is_dir() { 2 } else { 1 },
            uid: found.uid(),
            gid: found.gid(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    fn opened(&mut self, node: u64, handle: Handle, reply: &mut Vec<u8>) -> Result<(), Errno> {
        if self.handles.len() >= MOST_HANDLES {
            return Err(Errno::NFILE);
        }
        let fh = self.next;
        self.next += 1;
        self.handles.insert(fh, (node, handle));
        let flags = match self.validity {
            Duration::ZERO => OpenReply::DIRECT_IO,
            _ => OpenReply::KEEP_CACHE | OpenReply::CACHE_DIR,
        };
        put(reply, &OpenOut { fh, open_flags: (flags | OpenReply::NOFLUSH).bits(), backing_id: 0 });
        Ok(())
    }

    fn close(&mut self, fh: u64) {
        if let Some((_, Handle::Directory(entries))) = self.handles.remove(&fh) {
            self.listed = self.listed.saturating_sub(entries.len());
        }
    }

    fn read(&mut self, node: u64, read: abi::ReadIn, reply: &mut Vec<u8>) -> Result<(), Errno> {
        let Some((of, Handle::File(file))) = self.handles.get_mut(&read.fh) else { return Err(Errno::BADF) };
        if *of != node {
            return Err(Errno::BADF);
        }
        reply.resize(abi::OUT_HEADER + read.size.min(MAX_WRITE) as usize, 0);
        let into = reply.get_mut(abi::OUT_HEADER..).unwrap_or_default();
        let count = self.disk.read(file, read.offset, into)?;
        reply.truncate(abi::OUT_HEADER + count);
        Ok(())
    }

    fn read_directory(
        &mut self,
        node: u64,
        read: abi::ReadIn,
        plus: bool,
        reply: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let Some((of, Handle::Directory(entries))) = self.handles.get(&read.fh) else {
            return Err(Errno::BADF);
        };
        if *of != node {
            return Err(Errno::BADF);
        }
        let directory = self.path(node)?;
        let room = abi::OUT_HEADER + read.size.min(MAX_WRITE) as usize;
        let first = usize::try_from(read.offset).unwrap_or(usize::MAX);
        // As many as could fit at best: the table of nodes is wanted while they are told.
        let most = room / size_of::<Dirent>();
        let entries: Vec<_> = entries.iter().skip(first).take(most).cloned().collect();
        for ((name, kind), position) in entries.into_iter().zip(read.offset.saturating_add(1)..) {
            let head = if plus { size_of::<EntryOut>() } else { 0 } + size_of::<Dirent>();
            let length = (head + name.len()).next_multiple_of(8);
            let start = reply.len();
            if start + length > room {
                break;
            }
            if plus {
                let dots = matches!(&*name, b"." | b"..");
                // An entry of node 0 is looked up when it is wanted.
                let entry = if dots { None } else { self.look_up(node, &name).ok() };
                put(reply, &entry.unwrap_or_default());
            }
            let (ino, namelen) = (number(&join(&directory, &name)), name.len() as u32);
            put(reply, &Dirent { ino, off: position, namelen, kind: kind >> 12 });
            reply.extend_from_slice(&name);
            reply.resize(start + length, 0);
        }
        Ok(())
    }
}

/// `O_WRONLY | O_RDWR`, `O_TRUNC`, as FUSE passes them on.
mod open_flags {
    pub const WRITE: u32 = 3;
    pub const TRUNCATE: u32 = 0o1000;
}

fn put<T: IntoBytes + Immutable>(reply: &mut Vec<u8>, value: &T) {
    reply.extend_from_slice(value.as_bytes());
}

fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    let between: &[u8] = if directory.ends_with(b"/") { b"" } else { b"/" };
    [directory, between, name].concat()
}

/// A number for an inode, the same whenever its image is served: FNV-1a of its path. (1 is the root's, 0 is none.)
fn number(path: &[u8]) -> u64 {
    let sum = path
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    sum.max(2)
}
