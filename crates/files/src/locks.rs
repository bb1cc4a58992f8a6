//! Locks that programs of several clients and of the host share.
//!
//! A POSIX lock belongs to a process of the client's; here each owner gets a descriptor of its own on the file, and the lock is
//! one of that open file description (`F_OFD_SETLK`), so that the host's kernel sees each owner apart. flock(2) goes to the
//! handle itself.
//!
//! ```text
//!   SETLKW -- taken at once ---------------------------> reply
//!     |  in the way                       ^
//!     v                                   | taken, or INTERRUPT (EINTR), or too many (ENOLCK)
//!   waiting -- retried when a lock of ours goes, and every few ms for the host's sake
//! ```

use crate::abi::FileLock;
use crate::handles::Handle;
use crate::inodes::{Inode, errno, lock};
use crate::service::Service;
use crate::worker::bare_reply;
use kso_sys::file::RangeLock;
use rustix::fs::{FlockOperation, OFlags};
use rustix::io::Errno;
use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::Duration;

/// At most so many wait.
const MAX_WAITING: usize = 1024;
/// Owners of locks, each of which has a descriptor.
const MAX_OWNERS: usize = 4096;
/// Locks of the host's programs go without telling.
const RETRY: Duration = Duration::from_millis(10);

/// Sends the replies of requests that had to wait.
pub trait Completer: Send + Sync + std::fmt::Debug {
    /// The request whose outcome was `Outcome::Later(ticket)` is answered by these bytes, header and all. They may come
    /// before the outcome did.
    fn reply(&self, ticket: u64, reply: &[u8]);

    /// The same with nothing but an error of Linux's number, or 0. The ticket is the request's `unique`.
    fn complete(&self, unique: u64, error: i32) {
        self.reply(unique, &bare_reply(unique, error));
    }
}

/// Where nobody waits, or not yet.
#[derive(Debug)]
struct Nobody;

impl Completer for Nobody {
    fn reply(&self, ticket: u64, _: &[u8]) {
        tracing::debug!(ticket, "nobody waits for a lock");
    }
}

/// A lock that is asked for.
#[derive(Debug)]
pub(crate) enum Wanted {
    Range(Arc<OwnedFd>, RangeLock),
    Whole(Arc<Handle>, FlockOperation),
}

impl Wanted {
    /// Takes it, if nothing is in the way.
    pub fn attempt(&self) -> Result<(), Errno> {
        match self {
            Self::Range(file, range) => range.set(file.as_fd()).map_err(|error| errno(&error)),
            Self::Whole(handle, operation) => rustix::fs::flock(&handle.file, *operation),
        }
    }
}

/// What an owner holds its locks of a file by, and the client's process that took one last.
#[derive(Debug)]
struct Owned {
    file: Arc<OwnedFd>,
    process: u32,
}

#[derive(Debug, Default)]
struct State {
    /// By file and owner.
    owners: HashMap<(u64, u64), Owned>,
    waiting: Vec<(u64, Wanted)>,
    running: bool,
}

/// The locks of a share.
#[derive(Debug)]
pub(crate) struct Locks {
    state: Mutex<State>,
    changed: Condvar,
    completer: Mutex<Arc<dyn Completer>>,
}

/// The range of a request, whose end is part of it.
pub(crate) fn range(lock: &FileLock) -> Result<RangeLock, Errno> {
    let start = i64::try_from(lock.start).map_err(|_| Errno::INVAL)?;
    let kind = i16::try_from(lock.kind).map_err(|_| Errno::INVAL)?;
    let length = match i64::try_from(lock.end) {
        Ok(i64::MAX) | Err(_) => 0,
        Ok(end) if end >= start => end - start + 1,
        Ok(_) => return Err(Errno::INVAL),
    };
    Ok(RangeLock { kind, start, length })
}

impl Locks {
    pub fn new(completer: Option<Arc<dyn Completer>>) -> Arc<Self> {
        let completer = completer.unwrap_or_else(|| Arc::new(Nobody));
        Arc::new(Self { state: Mutex::default(), changed: Condvar::new(), completer: Mutex::new(completer) })
    }

    /// From now on replies go there.
    pub fn attach(&self, completer: Arc<dyn Completer>) {
        *lock(&self.completer) = completer;
    }

    /// Nobody waits for replies any more.
    pub fn detach(&self) {
        self.attach(Arc::new(Nobody));
    }

    fn complete(&self, unique: u64, error: i32) {
        let completer = lock(&self.completer).clone();
        completer.complete(unique, error);
    }

    /// The descriptor by which an owner holds its locks of a file, for `process` to take one.
    pub fn owned(
        &self,
        service: &Service,
        inode: &Inode,
        owner: u64,
        process: u32,
    ) -> Result<Arc<OwnedFd>, Errno> {
        let key = (inode.id, owner);
        if let Some(owned) = lock(&self.state).owners.get_mut(&key) {
            owned.process = process;
            return Ok(owned.file.clone());
        }
        let file = match service.reopen(inode, OFlags::RDWR) {
            Err(Errno::ACCESS | Errno::PERM | Errno::ROFS | Errno::TXTBSY) => {
                service.reopen(inode, OFlags::RDONLY)?
            }
            result => result?,
        };
        let mut state = lock(&self.state);
        if state.owners.len() >= MAX_OWNERS {
            return Err(Errno::NOLCK);
        }
        let owned = state.owners.entry(key).or_insert_with(|| Owned { file: Arc::new(file), process });
        Ok(owned.file.clone())
    }

    /// A lock that is in the way of what `owner` wants, and the client's process that has it: 0 if none of them does.
    /// Whoever only asks needs no descriptor of its own, which nobody would close: `handle` has no such lock.
    pub fn conflict(
        &self,
        handle: &Handle,
        owner: u64,
        wanted: RangeLock,
    ) -> Result<Option<(RangeLock, u32)>, Errno> {
        let node = handle.inode.id;
        let own = lock(&self.state).owners.get(&(node, owner)).map(|owned| owned.file.clone());
        let file = own.as_deref().unwrap_or(&handle.file);
        let found = wanted.conflict(file.as_fd()).map_err(|error| errno(&error))?;
        // What the kernel tells of it is a process of the host's, or nothing: of an open file description of ours either.
        Ok(found.map(|found| (found, self.holder(node, owner, found))))
    }

    /// The client's process whose owner holds a lock: its descriptor tells (proc_pid_fdinfo(5)).
    fn holder(&self, node: u64, except: u64, found: RangeLock) -> u32 {
        let state = lock(&self.state);
        let mut others = state.owners.iter().filter(|((file, owner), _)| *file == node && *owner != except);
        let holds = |owned: &Owned| kso_sys::file::range_locks(owned.file.as_fd()).contains(&found);
        others.find(|(_, owned)| holds(owned)).map_or(0, |(_, owned)| owned.process)
    }

    /// All locks of an owner on a file end.
    pub fn release(self: &Arc<Self>, inode: &Inode, owner: u64) {
        let mut state = lock(&self.state);
        let owned = state.owners.remove(&(inode.id, owner));
        let waiting = !state.waiting.is_empty();
        drop(state);
        drop(owned);
        if waiting {
            self.changed.notify_one();
        }
    }

    /// Something that was in the way may be gone.
    pub fn retry(&self) {
        if !lock(&self.state).waiting.is_empty() {
            self.changed.notify_one();
        }
    }

    /// The request waits. Without limit this would hold memory of ours, and slots of the queue.
    pub fn wait(self: &Arc<Self>, unique: u64, wanted: Wanted) -> Result<(), Errno> {
        let mut state = lock(&self.state);
        if state.waiting.len() >= MAX_WAITING {
            return Err(Errno::NOLCK);
        }
        state.waiting.push((unique, wanted));
        if !state.running {
            let locks = Arc::downgrade(self);
            std::thread::Builder::new()
                .name("kso-locks".into())
                .spawn(move || serve(&locks))
                .map_err(|error| errno(&error))?;
            state.running = true;
        }
        drop(state);
        self.changed.notify_one();
        Ok(())
    }

    /// A signal came for the one who waits.
    pub fn interrupt(&self, unique: u64) {
        let mut state = lock(&self.state);
        let Some(at) = state.waiting.iter().position(|(waiting, _)| *waiting == unique) else { return };
        let wanted = state.waiting.swap_remove(at);
        drop(state);
        drop(wanted);
        self.complete(unique, Errno::INTR.raw_os_error());
    }

    /// The client is gone.
    pub fn clear(&self) {
        let mut state = lock(&self.state);
        let before = (std::mem::take(&mut state.owners), std::mem::take(&mut state.waiting));
        drop(state);
        drop(before);
        self.changed.notify_one();
    }

    /// Tries all that wait, and tells whether some still do.
    fn attempt_all(&self) -> bool {
        let mut done = Vec::new();
        let mut state = lock(&self.state);
        state.waiting.retain(|(unique, wanted)| match wanted.attempt() {
            Err(Errno::AGAIN | Errno::ACCESS) => true,
            result => {
                done.push((*unique, result.err().map_or(0, Errno::raw_os_error)));
                false
            }
        });
        let more = !state.waiting.is_empty();
        state.running = more;
        drop(state);
        for (unique, error) in done {
            self.complete(unique, error);
        }
        more
    }
}

/// A thread that lives as long as somebody waits.
fn serve(locks: &Weak<Locks>) {
    while let Some(locks) = locks.upgrade() {
        if !locks.attempt_all() {
            return;
        }
        let state = lock(&locks.state);
        drop(locks.changed.wait_timeout(state, RETRY));
    }
}
