//! Beginning connections of vsock sockets.
//!
//! A *non-blocking* `connect` of AF_VSOCK keeps its socket in memory until the time for connecting has run out, even
//! when it succeeded and was closed long since (`vsock_connect` takes a reference for its timer); a blocking one does
//! not. TCP's patience is two minutes, so a busy client would pile up hundreds of megabytes. So helper threads make
//! blocking calls: once one is under way, the file is made non-blocking for the program, which the call does not see.
//!
//! ```text
//!   main:    job ------------> yield until SYN_SENT --- swap, O_NONBLOCK, answer
//!   helper:        connect() ........................................... returns: next job
//! ```
//!
//! A call that fails takes the socket's error with it, and who polls the socket would not see one: a helper puts an
//! error back, by a connection inside that nobody takes. Which error it was, the broker says.
//!
//! When every helper waits for some slow peer, a connection is begun without one, with less patience.

use kso_sys::{process, vsock};
use kso_wire::Errno;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_setfl};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Most helpers.
const MAX_HELPERS: usize = 64;
/// A helper that had nothing to do for so long ends.
const IDLE: Duration = Duration::from_secs(10);
/// The host's TCP gives up before that (tcp(7), `tcp_syn_retries`: 127 s), and says why.
pub(super) const PATIENCE: Duration = Duration::from_secs(180);
/// Patience without a helper.
const SHORT_PATIENCE: Duration = Duration::from_secs(30);
/// A port of the guest on which nobody listens: programs cannot, and we do not.
const NOBODY: u32 = 1;
/// It is refused at once.
const INSIDE_PATIENCE: Duration = Duration::from_millis(10);
/// A helper enters its call within so many turns of this thread, unless something is very wrong.
const MAX_TURNS: usize = 100_000;

struct Job {
    socket: Arc<OwnedFd>,
    to: vsock::Address,
    /// The program does not wait in its call.
    polled: bool,
    /// [`RUNNING`], [`OVER`], or the number of an error.
    result: Arc<AtomicI32>,
}

const RUNNING: i32 = -1;
const OVER: i32 = 0;

#[derive(Default)]
struct Shared {
    jobs: Mutex<VecDeque<Job>>,
    wake: Condvar,
    /// Helpers that wait for a job, less the jobs that wait for them.
    idle: AtomicUsize,
    alive: AtomicUsize,
}

/// The helpers.
#[derive(Default)]
pub(super) struct Connector(Arc<Shared>);

impl Connector {
    /// Begins a connection. The socket is in blocking mode and has its [`PATIENCE`]; its state is `Connecting` or beyond
    /// afterwards.
    ///
    /// # Errors
    /// It could not be begun.
    pub(super) fn begin(&self, socket: &Arc<OwnedFd>, to: vsock::Address, polled: bool) -> io::Result<()> {
        if !self.reserve() {
            vsock::set_connect_timeout(socket.as_fd(), SHORT_PATIENCE)?;
            fcntl_setfl(socket, OFlags::NONBLOCK)?;
            let begun = vsock::connect(socket.as_fd(), to);
            fcntl_setfl(socket, OFlags::empty())?;
            return match begun {
                Err(error) if kso_sys::errno::of(&error) == Errno::EINPROGRESS => Ok(()),
                done => done,
            };
        }
        let result = Arc::new(AtomicI32::new(RUNNING));
        let job = Job { socket: Arc::clone(socket), to, polled, result: Arc::clone(&result) };
        self.0.jobs.lock().unwrap_or_else(PoisonError::into_inner).push_back(job);
        self.0.wake.notify_one();
        for _ in 0..MAX_TURNS {
            // Not before it is under way: until then the socket looks writable.
            match result.load(Ordering::Acquire) {
                RUNNING if is_writable(socket.as_fd()) => {}
                RUNNING | OVER => return Ok(()),
                error => return Err(io::Error::from_raw_os_error(error)),
            }
            std::thread::yield_now();
        }
        Err(io::ErrorKind::TimedOut.into())
    }

    /// Sets a helper aside for one job.
    fn reserve(&self) -> bool {
        let taken = self.0.idle.fetch_update(Ordering::AcqRel, Ordering::Acquire, |idle| idle.checked_sub(1));
        if taken.is_ok() {
            return true;
        }
        if self.0.alive.load(Ordering::Acquire) >= MAX_HELPERS {
            return false;
        }
        let shared = Arc::clone(&self.0);
        shared.alive.fetch_add(1, Ordering::AcqRel);
        let helper = std::thread::Builder::new().name("kso-connect".into()).stack_size(64 * 1024);
        if helper.spawn(move || help(&shared)).is_err() {
            self.0.alive.fetch_sub(1, Ordering::AcqRel);
            return false;
        }
        true
    }
}

/// The socket has an error again, and whoever waits for it is woken.
fn put_error_back(socket: BorrowedFd<'_>) -> io::Result<()> {
    vsock::set_connect_timeout(socket, INSIDE_PATIENCE)?;
    vsock::connect(socket, vsock::Address { cid: vsock::CID_LOCAL, port: NOBODY })
}

/// The other end refused, or did not answer.
fn refused(error: &io::Error) -> bool {
    matches!(kso_sys::errno::of(error), Errno::ECONNRESET | Errno::EPROTO | Errno::ETIMEDOUT | Errno::EINTR)
}

fn is_writable(socket: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::from_borrowed_fd(socket, PollFlags::OUT)];
    let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
    !matches!(poll(&mut polled, Some(&zero)), Ok(0))
}

fn help(shared: &Shared) {
    process::block_signals();
    while let Some(job) = next_job(shared) {
        // What came of it is seen on the socket, and told by the broker.
        // What the kernel itself refuses (no transport, no memory) is told at once.
        let result = match vsock::connect(job.socket.as_fd(), job.to) {
            Err(error) if !refused(&error) => error.raw_os_error().unwrap_or(OVER),
            Err(_) if job.polled => {
                let _ = put_error_back(job.socket.as_fd());
                OVER
            }
            _ => OVER,
        };
        job.result.store(result, Ordering::Release);
        drop(job);
        shared.idle.fetch_add(1, Ordering::AcqRel);
    }
    shared.alive.fetch_sub(1, Ordering::AcqRel);
}

/// The next job; `None` if there was none for long.
fn next_job(shared: &Shared) -> Option<Job> {
    let mut jobs = shared.jobs.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        if let Some(job) = jobs.pop_front() {
            return Some(job);
        }
        let (waited, result) = shared.wake.wait_timeout(jobs, IDLE).unwrap_or_else(PoisonError::into_inner);
        jobs = waited;
        // Whoever was set aside must stay: a job is on its way.
        if result.timed_out()
            && jobs.is_empty()
            && shared
                .idle
                .fetch_update(Ordering::AcqRel, Ordering::Acquire, |idle| idle.checked_sub(1))
                .is_ok()
        {
            return None;
        }
    }
}
