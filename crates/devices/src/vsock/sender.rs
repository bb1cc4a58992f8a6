//! Threads that send parts of files: reading one may wait for a disk, for which the hub's loop must not.

use super::table::Id;
use kso_files::{Files, OpenFile};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Most threads, and so most files that are read at a time.
const THREADS: usize = 8;
/// Bytes of one call: so often a thread looks whether it is to stop.
const CHUNK: u64 = 4 << 20;
/// Bytes after which others have their turn.
const TURN: u64 = 64 << 20;
/// How long a thread waits for room in a socket before it has somebody else wait: what it saves is two changes of threads.
const LINGER: Duration = Duration::from_millis(2);
/// The same for somebody who does not want to wait: only behind so many bytes, so that who has many slow peers does
/// not wait for each, and no longer than this in all.
const LINGER_BRIEFLY: Duration = Duration::from_millis(1);
const FAST: u64 = 512 << 10;
const IMPATIENT: Duration = Duration::from_millis(4);

/// A part of a file, to be sent.
#[derive(Debug)]
pub(super) struct Job {
    pub id: Id,
    /// Does not block.
    pub socket: OwnedFd,
    pub files: Files,
    pub node: u64,
    pub offset: u64,
    pub count: u64,
    /// Who asked waits until all is sent.
    pub waits: bool,
    pub stop: Arc<AtomicBool>,
}

/// Why a thread sends no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// All is sent, or the file ends.
    Finished,
    /// The socket has no room.
    Full,
    /// It is somebody else's turn, or it was stopped.
    Paused,
    /// The file cannot be read.
    Unreadable,
    /// The socket broke.
    Broke(Errno),
}

/// What came of a [`Job`].
#[derive(Debug)]
pub(super) struct Done {
    pub id: Id,
    pub sent: u64,
    pub why: Why,
}

#[derive(Debug)]
struct Shared {
    jobs: Mutex<Receiver<Job>>,
    done: Mutex<Vec<Done>>,
    /// Readable when something is done.
    event: OwnedFd,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The threads. They are started when they are needed, and end when this is dropped.
#[derive(Debug)]
pub(super) struct Senders {
    jobs: Sender<Job>,
    shared: Arc<Shared>,
    threads: usize,
    running: usize,
}

impl Senders {
    pub fn new() -> io::Result<Self> {
        let (jobs, receiver) = mpsc::channel();
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let shared = Shared { jobs: Mutex::new(receiver), done: Mutex::default(), event };
        Ok(Self { jobs, shared: Arc::new(shared), threads: 0, running: 0 })
    }

    /// Readable when [`Self::take_done`] has something.
    pub fn event(&self) -> BorrowedFd<'_> {
        self.shared.event.as_fd()
    }

    /// No more can be started now.
    pub fn busy(&self) -> bool {
        self.running >= THREADS
    }

    /// Starts one, if not [`Self::busy`]. False: there is no thread for it.
    pub fn start(&mut self, job: Job) -> bool {
        if self.running >= self.threads {
            let shared = self.shared.clone();
            let thread = std::thread::Builder::new().name("sendfile".into()).spawn(move || work(&shared));
            if let Err(error) = thread {
                tracing::warn!(%error, "a thread that sends files cannot be started");
                if self.threads == 0 {
                    return false;
                }
            } else {
                self.threads += 1;
            }
        }
        self.running += 1;
        // The receiver lives as long as this.
        self.jobs.send(job).is_ok()
    }

    /// What was done since.
    pub fn take_done(&mut self) -> Vec<Done> {
        let _ = rustix::io::read(&self.shared.event, &mut [0; 8]);
        let done = std::mem::take(&mut *lock(&self.shared.done));
        self.running = self.running.saturating_sub(done.len());
        done
    }
}

fn work(shared: &Shared) {
    loop {
        // One waits for a job, the others wait for that one.
        let job = lock(&shared.jobs).recv();
        let Ok(job) = job else { return };
        let done = perform(job);
        lock(&shared.done).push(done);
        // A full counter is readable already.
        let _ = rustix::io::write(&shared.event, &1_u64.to_ne_bytes());
    }
}

fn perform(job: Job) -> Done {
    // Opened for each turn: a peer that is slow holds no descriptor.
    match job.files.open(job.node) {
        Ok(file) => send(&job, &file),
        Err(error) => {
            tracing::debug!(%error, node = job.node, "a file cannot be sent from");
            Done { id: job.id, sent: 0, why: Why::Unreadable }
        }
    }
}

fn send(job: &Job, file: &OpenFile) -> Done {
    let (mut offset, mut sent, mut patience) = (job.offset, 0, None);
    let why = loop {
        if sent >= job.count {
            break Why::Finished;
        }
        if sent >= TURN || job.stop.load(Ordering::Relaxed) {
            break Why::Paused;
        }
        let most = usize::try_from((job.count - sent).min(CHUNK)).unwrap_or(usize::MAX);
        match rustix::fs::sendfile(&job.socket, file, Some(&mut offset), most) {
            Ok(0) => break Why::Finished,
            Ok(more) => sent += more as u64,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let until = *patience.get_or_insert_with(|| Instant::now() + IMPATIENT);
                let hurry = !job.waits && (sent < FAST || Instant::now() >= until);
                if hurry || !has_room(&job.socket, if job.waits { LINGER } else { LINGER_BRIEFLY }) {
                    break Why::Full;
                }
            }
            Err(error) if is_of_socket(error) => break Why::Broke(error),
            Err(error) => {
                tracing::debug!(%error, "a file cannot be sent from");
                break Why::Unreadable;
            }
        }
    };
    Done { id: job.id, sent, why }
}

/// Whether a socket has room, or has it within a moment.
pub(super) fn has_room(socket: &OwnedFd, moment: Duration) -> bool {
    let Ok(timeout) = Timespec::try_from(moment) else { return false };
    let mut polled = [PollFd::new(socket, PollFlags::OUT)];
    matches!(poll(&mut polled, Some(&timeout)), Ok(1..))
}

/// Whether an error of sendfile(2) is the socket's (tcp(7), ip(7)), and not the file's.
fn is_of_socket(error: Errno) -> bool {
    matches!(
        error,
        Errno::PIPE
            | Errno::CONNRESET
            | Errno::CONNABORTED
            | Errno::CONNREFUSED
            | Errno::NOTCONN
            | Errno::TIMEDOUT
            | Errno::HOSTUNREACH
            | Errno::HOSTDOWN
            | Errno::NETUNREACH
            | Errno::NETDOWN
            | Errno::NETRESET
            | Errno::PROTO
            | Errno::ACCESS
            | Errno::PERM
    )
}
