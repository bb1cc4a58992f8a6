//! A thread that serves requests, one after the other.

use crate::abi::{self, OutHeader};
use crate::actor::Actor;
use crate::buffers::Pieces;
use crate::passthrough::Passthrough;
use crate::request::{self, MAX_REQUEST, Operation, Request};
use crate::service::Service;
use rustix::io::Errno;
use rustix::thread::CapabilitySet;
use std::marker::PhantomData;
use std::sync::Arc;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Bytes of a `WRITE` without its data.
pub(crate) const WRITE_HEAD: usize = abi::IN_HEADER + size_of::<abi::WriteIn>();

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The reply has so many bytes, in the memory that was given for it.
    Reply(usize),
    /// There is none.
    Silent,
    /// The reply comes later, by [`crate::Completer`], which names this ticket. A service's is the request's `unique`.
    Later(u64),
}

/// What an operation gives.
pub(crate) enum Answer {
    /// Nothing but success.
    Done,
    /// The bytes of `Worker::out`.
    Out,
    /// So many bytes that are in the reply's memory already, behind the header.
    Written(usize),
    /// No reply.
    None,
    /// A reply that comes later.
    Later,
}

pub(crate) type Result<T = Answer> = std::result::Result<T, Errno>;

/// Serves requests of a share in one thread.
#[derive(Debug)]
pub struct Worker {
    pub(crate) service: Arc<Service>,
    pub(crate) actor: Actor,
    /// What a reply consists of, but for data.
    pub(crate) out: Vec<u8>,
    /// The request, but for data.
    scratch: Vec<u8>,
    /// How the kernel is told of files that need no worker.
    pub(crate) passthrough: Option<Arc<Passthrough>>,
    /// Its identity is the thread's.
    _thread: PhantomData<*const ()>,
}

impl Worker {
    /// Makes the calling thread one that serves: **for the rest of its life** it has its own umask, and if it is root's, no
    /// capabilities but those that files need.
    ///
    /// # Errors
    /// The thread's identity could not be changed.
    pub fn new(service: Arc<Service>) -> std::io::Result<Self> {
        let mut more = CapabilitySet::empty();
        more.set(CapabilitySet::MKNOD, service.share.devices);
        more.set(CapabilitySet::SYS_ADMIN, service.passes_backing());
        let actor = Actor::new(service.owner(), more)?;
        Ok(Self {
            service,
            actor,
            out: Vec::new(),
            scratch: Vec::new(),
            passthrough: None,
            _thread: PhantomData,
        })
    }

    /// Serves the request in `readable`, and writes the reply to `writable`.
    pub fn serve(&mut self, readable: Pieces<'_>, writable: Pieces<'_>) -> Outcome {
        let mut head = [0; abi::IN_HEADER];
        if readable.read(&mut head) < head.len() {
            return Outcome::Silent;
        }
        let Some(header) = request::header(&head) else { return Outcome::Silent };
        let total = readable.len();
        // Of most requests this is all; of a WRITE the data are not copied.
        let mut scratch = std::mem::take(&mut self.scratch);
        let write = header.opcode == abi::Opcode::Write as u32;
        scratch.resize(total.min(if write { WRITE_HEAD } else { MAX_REQUEST }), 0);
        let got = readable.read(&mut scratch);
        scratch.truncate(got);
        let answer = self.answer(header, &scratch, total, readable, writable);
        self.scratch = scratch;
        match answer {
            Ok(Answer::None) => Outcome::Silent,
            Ok(Answer::Later) => Outcome::Later(header.unique),
            Ok(Answer::Done) => reply(writable, header.unique, 0, &[], 0),
            Ok(Answer::Out) => reply(writable, header.unique, 0, &self.out, 0),
            Ok(Answer::Written(count)) => reply(writable, header.unique, 0, &[], count),
            Err(error) => reply(writable, header.unique, -error.raw_os_error(), &[], 0),
        }
    }

    fn answer(
        &mut self,
        header: abi::InHeader,
        bytes: &[u8],
        total: usize,
        readable: Pieces<'_>,
        writable: Pieces<'_>,
    ) -> Result {
        if header.len as usize != total || bytes.len() >= MAX_REQUEST {
            return Err(Errno::INVAL);
        }
        let body = bytes.get(abi::IN_HEADER..).ok_or(Errno::INVAL)?;
        let request = Request::parse(header, body, self.service.has(abi::Features::SETXATTR_EXT))?;
        self.out.clear();
        self.perform(request, readable, writable)
    }

    fn perform(&mut self, request: Request<'_>, readable: Pieces<'_>, writable: Pieces<'_>) -> Result {
        let header = &request.header;
        let node = header.nodeid;
        match request.operation {
            Operation::Init { init, more } => {
                let out = self.service.init(init, more)?;
                self.put(&out)
            }
            Operation::Destroy => {
                self.service.reset()?;
                Ok(Answer::Done)
            }
            Operation::Forget(count) => {
                self.service.inodes.forget(node, count);
                Ok(Answer::None)
            }
            Operation::BatchForget(bytes) => {
                for one in bytes.chunks_exact(size_of::<abi::ForgetOne>()) {
                    if let Ok(one) = abi::ForgetOne::read_from_bytes(one) {
                        self.service.inodes.forget(one.nodeid, one.nlookup);
                    }
                }
                Ok(Answer::None)
            }
            Operation::Interrupt(unique) => {
                self.service.locks.interrupt(unique);
                Ok(Answer::None)
            }
            Operation::Lookup(name) => self.lookup(header, name),
            Operation::GetAttr(get) => self.get_attributes(node, get),
            Operation::StatX(get) => self.statx(node, get),
            Operation::SetAttr(set) => self.set_attributes(header, set),
            Operation::Access(access) => self.access(header, access.mask),
            Operation::ReadLink => self.read_link(node),
            Operation::SymLink { name, target } => self.symlink(&request, name, target),
            Operation::MkNod(make, name) => self.make_node(&request, make, name),
            Operation::MkDir(make, name) => self.make_directory(&request, make, name),
            Operation::Unlink(name) => self.unlink(header, name, rustix::fs::AtFlags::empty()),
            Operation::RmDir(name) => self.unlink(header, name, rustix::fs::AtFlags::REMOVEDIR),
            Operation::Rename { parent, flags, old, new } => self.rename(header, parent, flags, old, new),
            Operation::Link(source, name) => self.link(header, source, name),
            Operation::Open(open) => self.open(header, open),
            Operation::Create(create, name) => self.create(&request, create, name),
            Operation::TmpFile(create) => self.temporary(&request, create),
            Operation::Read(read) => self.read(header, read, writable),
            Operation::Write(write) => self.write(header, write, readable),
            Operation::Flush(flush) => self.flush(node, flush),
            Operation::Release(release) => self.release(node, release),
            Operation::ReleaseDir(release) => self.release(node, release),
            Operation::Fsync(sync) => self.fsync(node, sync),
            Operation::FsyncDir(sync) => self.fsync(node, sync),
            Operation::SyncFs => self.sync_all(node),
            Operation::Fallocate(allocate) => self.allocate(header, allocate),
            Operation::Lseek(seek) => self.seek(node, seek),
            Operation::CopyFileRange(copy, wide) => self.copy_range(header, copy, wide),
            Operation::StatFs => self.statfs(node),
            Operation::OpenDir(_) => self.open_directory(node),
            Operation::ReadDir(read) => self.read_directory(header, read, writable.len(), false),
            Operation::ReadDirPlus(read) => self.read_directory(header, read, writable.len(), true),
            Operation::GetXattr(size, name) => self.get_xattr(node, name, size),
            Operation::ListXattr(size) => self.list_xattrs(node, size),
            Operation::SetXattr { flags, extra, name, value } => {
                self.set_xattr(header, name, value, flags, extra)
            }
            Operation::RemoveXattr(name) => self.remove_xattr(header, name),
            Operation::GetLk(lock) => self.get_lock(node, lock),
            Operation::SetLk(lock) => self.set_lock(header, lock, false),
            Operation::SetLkW(lock) => self.set_lock(header, lock, true),
            Operation::Ioctl(ioctl, _) => self.ioctl(node, ioctl),
            Operation::Other => Err(Errno::NOSYS),
        }
    }

    /// Answers with one structure.
    pub(crate) fn put<T: IntoBytes + Immutable>(&mut self, value: &T) -> Result {
        self.out.extend_from_slice(value.as_bytes());
        Ok(Answer::Out)
    }

    /// What changes anything is refused on a share that is read-only.
    pub(crate) fn writable(&self) -> Result<()> {
        if self.service.share.read_only { Err(Errno::ROFS) } else { Ok(()) }
    }
}

/// Writes a reply: the header and `bytes`. `written` more bytes are behind the header already.
pub(crate) fn reply(writable: Pieces<'_>, unique: u64, error: i32, bytes: &[u8], written: usize) -> Outcome {
    let mut length = abi::OUT_HEADER + bytes.len() + written;
    let room = writable.len();
    if room < abi::OUT_HEADER {
        // The client does not care.
        return Outcome::Silent;
    }
    let (mut error, mut bytes) = (error, bytes);
    if room < length {
        (length, error, bytes) = (abi::OUT_HEADER, -Errno::IO.raw_os_error(), &[]);
    }
    let header = OutHeader { len: length as u32, error, unique };
    if bytes.is_empty() {
        writable.write(header.as_bytes());
    } else {
        let mut all = [0; 512];
        match all.get_mut(..length) {
            // One copy for what is small, and that is nearly all.
            Some(all) => {
                let (front, back) = all.split_at_mut(abi::OUT_HEADER);
                front.copy_from_slice(header.as_bytes());
                back.copy_from_slice(bytes);
                writable.write(all);
            }
            None => {
                writable.write(header.as_bytes());
                writable.write_behind(abi::OUT_HEADER, bytes);
            }
        }
    }
    Outcome::Reply(length)
}

/// A reply that is nothing but a header, as bytes.
#[must_use]
pub fn bare_reply(unique: u64, error: i32) -> [u8; abi::OUT_HEADER] {
    let header = OutHeader { len: abi::OUT_HEADER as u32, error: -error, unique };
    let mut bytes = [0; abi::OUT_HEADER];
    bytes.copy_from_slice(header.as_bytes());
    bytes
}
