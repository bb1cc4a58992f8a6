//! Threads that called, and what is known of their processes.
//!
//! A thread is named by its number only while it lives, so a look-up asks its descriptor whether it still does, or
//! the first thing that is done with the descriptor tells: a number that was given to another thread since is
//! opened anew. All tables have bounds; what falls out of one is looked up again.

use kso_sys::remote;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, open, openat};
use std::collections::{HashMap, VecDeque};
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// So many threads are remembered, two descriptors each.
const MAX_THREADS: usize = 64;
/// So many files of a thread's `fdinfo` are kept open: opening one costs more than all else that is done with it.
const MAX_INFOS: usize = 4;
/// Threads that ended are looked for so long after one called.
const SWEEP_AFTER: Duration = Duration::from_millis(100);
/// So many processes are remembered.
const MAX_PROCESSES: usize = 256;

/// A thread of the sandbox.
#[derive(Debug)]
pub struct Thread {
    /// The number of its process, in our pid namespace.
    pub process: u32,
    descriptor: OwnedFd,
    /// `/proc/TID/fdinfo`.
    fdinfo: OwnedFd,
    /// Files in it. Reading one again tells of what has the number by then (`seq_show` in fs/proc/fd.c).
    infos: VecDeque<(i32, OwnedFd)>,
    used: u64,
}

impl Thread {
    fn open(tid: u32) -> io::Result<Self> {
        // Only a leader can be opened as a process: that also tells whether it is one.
        let (descriptor, process) = match remote::open_process(tid) {
            Ok(descriptor) => (descriptor, tid),
            Err(_) => {
                let process = process_of(tid)?;
                (remote::open_thread(tid).or_else(|_| remote::open_process(process))?, process)
            }
        };
        let fdinfo = directory(&format!("/proc/{tid}/fdinfo"))?;
        Ok(Self { process, descriptor, fdinfo, infos: VecDeque::new(), used: 0 })
    }

    /// The thread's descriptor (pidfd_open(2)).
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }

    /// The flags of a descriptor of the thread: of its file, and whether it closes on exec. `None`: it has no such
    /// descriptor.
    pub fn flags(&mut self, number: i32) -> Option<OFlags> {
        let mut bytes = [0; 64];
        let length = rustix::io::pread(self.info(number)?, &mut bytes, 0).ok()?;
        // The flags are in the second line: proc_pid_fdinfo(5).
        let text = std::str::from_utf8(bytes.get(..length)?).ok()?;
        let flags = text.lines().find_map(|line| line.strip_prefix("flags:"))?;
        Some(OFlags::from_bits_retain(u32::from_str_radix(flags.trim(), 8).ok()?))
    }

    fn info(&mut self, number: i32) -> Option<BorrowedFd<'_>> {
        let known = self.infos.iter().position(|(other, _)| *other == number);
        let at = match known {
            Some(at) => at,
            None => {
                let info = openat(&self.fdinfo, number.to_string(), READ, Mode::empty()).ok()?;
                self.infos.truncate(MAX_INFOS - 1);
                self.infos.push_front((number, info));
                0
            }
        };
        self.infos.get(at).map(|(_, info)| info.as_fd())
    }

    fn has_ended(&self) -> bool {
        let mut polled = [PollFd::new(&self.descriptor, PollFlags::IN)];
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        !matches!(poll(&mut polled, Some(&zero)), Ok(0))
    }
}

const READ: OFlags = OFlags::RDONLY.union(OFlags::CLOEXEC);

fn directory(path: &str) -> io::Result<OwnedFd> {
    Ok(open(path, READ | OFlags::DIRECTORY, Mode::empty())?)
}

fn process_of(tid: u32) -> io::Result<u32> {
    let status = fs::read_to_string(format!("/proc/{tid}/status"))?;
    status
        .lines()
        .find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok())
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

/// The name of what a thread runs (`comm`); empty if it is gone.
pub fn name_of(tid: u32) -> String {
    let mut name = fs::read(format!("/proc/{tid}/comm"))
        .map(|bytes| String::from_utf8_lossy(&bytes).trim_end().to_owned())
        .unwrap_or_default();
    while name.len() > kso_wire::MAX_PROGRAM {
        name.pop();
    }
    name
}

/// The threads that called lately.
#[derive(Debug, Default)]
pub struct Threads {
    known: HashMap<u32, Thread>,
    clock: u64,
    /// When to look who has ended: some time after one called.
    sweep_at: Option<Instant>,
}

impl Threads {
    /// The thread of this number.
    ///
    /// # Errors
    /// `ESRCH`: it is gone.
    pub fn get(&mut self, tid: u32) -> io::Result<&mut Thread> {
        if self.known.get(&tid).is_some_and(Thread::has_ended) {
            self.known.remove(&tid);
        }
        self.unchecked(tid)
    }

    /// The thread that had this number when it was first looked up, if it is remembered. What is done with its
    /// descriptor fails with `ESRCH` if that has ended.
    ///
    /// # Errors
    /// `ESRCH`: it is gone.
    pub fn unchecked(&mut self, tid: u32) -> io::Result<&mut Thread> {
        self.clock += 1;
        if !self.known.contains_key(&tid) {
            self.forget_ended();
            if self.known.len() >= MAX_THREADS {
                self.forget_oldest();
            }
            self.known.insert(tid, Thread::open(tid)?);
        }
        self.sweep_at.get_or_insert_with(|| Instant::now() + SWEEP_AFTER);
        let thread = self.known.get_mut(&tid).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        thread.used = self.clock;
        Ok(thread)
    }

    /// The thread of this number, which was looked up for the same call.
    ///
    /// # Errors
    /// `ENOENT`: it fell out of the table meanwhile.
    pub fn again(&mut self, tid: u32) -> io::Result<&mut Thread> {
        match self.known.get_mut(&tid) {
            Some(thread) => Ok(thread),
            None => Err(io::Error::from_raw_os_error(kso_sys::errno::to_raw(kso_wire::Errno::ENOENT))),
        }
    }

    /// When [`Self::forget_ended`] is due.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.sweep_at
    }

    /// Drops the threads that have ended.
    pub fn forget_ended(&mut self) {
        self.sweep_at = None;
        let mut polled: Vec<_> =
            self.known.values().map(|thread| PollFd::new(&thread.descriptor, PollFlags::IN)).collect();
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        if !matches!(poll(&mut polled, Some(&zero)), Ok(1..)) {
            return;
        }
        // A map that is not changed keeps its order.
        let ended: Vec<bool> = polled.iter().map(|polled| !polled.revents().is_empty()).collect();
        let mut ended = ended.into_iter();
        self.known.retain(|_, _| !ended.next().unwrap_or(false));
    }

    /// Drops the older half: one pass makes room for many.
    fn forget_oldest(&mut self) {
        let mut ages: Vec<u64> = self.known.values().map(|thread| thread.used).collect();
        ages.sort_unstable();
        if let Some(&median) = ages.get(ages.len() / 2) {
            self.known.retain(|_, thread| thread.used > median);
        }
    }
}

/// Which descriptors of a process are epoll instances.
#[derive(Debug, Default)]
pub struct EpollTable {
    known: HashMap<u32, Vec<i32>>,
}

impl EpollTable {
    /// The process made one, or copied a descriptor of one: look again.
    pub fn changed(&mut self, process: u32) {
        self.known.remove(&process);
    }

    /// Whether the process has this epoll descriptor, as far as is known.
    pub fn contains(&self, process: u32, number: i32) -> bool {
        self.known.get(&process).is_some_and(|numbers| numbers.contains(&number))
    }

    /// The epoll descriptors of a process. Scanned once; kept until [`Self::changed`].
    pub fn of(&mut self, process: u32) -> &mut Vec<i32> {
        if self.known.len() >= MAX_PROCESSES && !self.known.contains_key(&process) {
            self.known.clear();
        }
        self.known
            .entry(process)
            .or_insert_with(|| scan(process, |target| target == "anon_inode:[eventpoll]").unwrap_or_default())
    }
}

/// The descriptors of `process` whose link in `/proc/PID/fd` satisfies `wanted`, in ascending order.
///
/// # Errors
/// The process is gone.
pub fn scan(process: u32, wanted: impl Fn(&str) -> bool) -> io::Result<Vec<i32>> {
    let path = format!("/proc/{process}/fd");
    let directory = directory(&path)?;
    let mut numbers = Vec::new();
    for entry in fs::read_dir(&path)? {
        let name = entry?.file_name();
        let Some(number) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        // A descriptor closed meanwhile has no link: pass over it.
        if let Ok(target) = rustix::fs::readlinkat(&directory, &name, Vec::new())
            && target.to_str().is_ok_and(&wanted)
        {
            numbers.push(number);
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}
