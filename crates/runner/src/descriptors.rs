//! The descriptors of the programs that are supervised, and putting another socket in place of one.

use crate::interceptor::carry::{self, Registration, Twin};
use crate::interceptor::threads::{EpollTable, Threads, scan};
use crate::looks::Looks;
use kso_sys::notify::{Listener, Notification};
use kso_sys::{numbers, remote};
use rustix::fs::{OFlags, fcntl_setfl, fstat};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// So many sockets with several descriptors are remembered.
const MAX_DUPLICATED: usize = 1024;

/// What is known of descriptors.
#[derive(Default)]
pub(crate) struct Descriptors {
    pub(crate) threads: Threads,
    epolls: EpollTable,
    /// Cookies of sockets that have several descriptors and are not swapped yet.
    duplicated: VecDeque<u64>,
    looks: Looks,
    twin: Option<Twin>,
}

/// The socket that a call is about.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) notification: Notification,
    /// The program's number of it.
    pub(crate) number: i32,
    /// Our copy of the descriptor.
    pub(crate) socket: OwnedFd,
}

impl Descriptors {
    /// A copy of the descriptor that a call names as its first argument.
    pub(crate) fn target(&mut self, notification: Notification) -> io::Result<Target> {
        let number = notification.args[0] as i32;
        Ok(Target { notification, number, socket: self.copy(notification.tid, number)? })
    }

    /// A copy of a descriptor that a calling thread has.
    pub(crate) fn copy(&mut self, tid: u32, number: i32) -> io::Result<OwnedFd> {
        // A number that was given to another thread since is noticed here: the old one's descriptor says ESRCH.
        let known =
            self.threads.again(tid).and_then(|thread| remote::take_descriptor(thread.descriptor(), number));
        match known {
            Err(error) if error.raw_os_error() != Some(numbers::EBADF) => {
                remote::take_descriptor(self.threads.get(tid)?.descriptor(), number)
            }
            known => known,
        }
    }

    /// The process of a calling thread.
    pub(crate) fn process(&mut self, tid: u32) -> io::Result<u32> {
        Ok(self.threads.get(tid)?.process)
    }

    /// The name of what a thread runs (`comm`); empty if it is gone.
    pub(crate) fn program(&mut self, tid: u32) -> String {
        self.looks.program(tid)
    }

    /// The process made an epoll instance.
    pub(crate) fn epoll_made(&mut self, tid: u32) -> io::Result<()> {
        let process = self.process(tid)?;
        self.epolls.changed(process);
        Ok(())
    }

    /// A descriptor is copied: of an epoll instance, or of a socket (with its cookie) that could be swapped later.
    pub(crate) fn copied(&mut self, tid: u32, number: i32) -> io::Result<()> {
        let process = self.process(tid)?;
        if self.epolls.contains(process, number) {
            self.epolls.changed(process);
        }
        Ok(())
    }

    /// A socket that could be swapped later has another descriptor.
    pub(crate) fn duplicated(&mut self, cookie: u64) {
        remember(&mut self.duplicated, cookie, MAX_DUPLICATED);
    }

    /// Puts `outer` under every descriptor that the caller's process has of the target, with the blocking mode that
    /// is given, each descriptor's close-on-exec flag and its epoll registrations. Whether the caller's own
    /// descriptor was still there.
    pub(crate) fn swap(
        &mut self,
        listener: &Listener,
        target: &Target,
        outer: BorrowedFd<'_>,
        nonblocking: bool,
    ) -> io::Result<bool> {
        if nonblocking {
            // A fresh socket blocks, and has no other flag that can be set.
            fcntl_setfl(outer, OFlags::NONBLOCK)?;
        }
        let (tid, id) = (target.notification.tid, target.notification.id);
        let process = self.threads.again(tid)?.process;
        let mut numbers = vec![target.number];
        if !self.duplicated.is_empty()
            && recall(&mut self.duplicated, &kso_sys::cookie(target.socket.as_fd())?)
        {
            let link = format!("socket:[{}]", fstat(&target.socket)?.st_ino);
            numbers = scan(process, |found| found == link)?;
        }
        let registrations = self.registrations(process, &numbers, target.socket.as_fd())?;
        let mut swapped = false;
        for &number in &numbers {
            // A descriptor that was closed meanwhile must not come back.
            let Some(close_on_exec) = self.looks.closes_on_exec(tid, number) else { continue };
            listener.replace(id, outer, number.unsigned_abs(), close_on_exec)?;
            swapped |= number == target.number;
        }
        if numbers.len() > 1 {
            // It may be replaced again.
            self.duplicated(kso_sys::cookie(outer)?);
        }
        for registration in registrations {
            self.carry(tid, registration, target.socket.as_fd(), outer);
        }
        Ok(swapped)
    }

    fn carry(&mut self, tid: u32, registration: Registration, old: BorrowedFd<'_>, new: BorrowedFd<'_>) {
        if self.twin.is_none() {
            match Twin::start() {
                Ok(twin) => self.twin = Some(twin),
                Err(error) => tracing::warn!(%error, "cannot carry epoll registrations over"),
            }
        }
        if let Some(twin) = &self.twin
            && let Err(error) = twin.carry(tid, registration, old, new)
        {
            tracing::debug!(%error, ?registration, "an epoll registration was not carried over");
        }
    }

    /// The epoll registrations of `numbers` in `process`.
    fn registrations(
        &mut self,
        process: u32,
        numbers: &[i32],
        socket: BorrowedFd<'_>,
    ) -> io::Result<Vec<Registration>> {
        let mut found = Vec::new();
        let epolls = self.epolls.of(process);
        if epolls.is_empty() {
            return Ok(found);
        }
        let inode = std::cell::OnceCell::new();
        let inode = || *inode.get_or_init(|| fstat(socket).map_or(0, |stat| stat.st_ino));
        epolls.retain(|&epoll| {
            for &number in numbers {
                match remote::in_epoll(process, epoll, number) {
                    Ok(false) => continue,
                    Ok(true) => {}
                    // Without kcmp the list itself tells.
                    Err(error) if error.raw_os_error() == Some(i32::from(numbers::ENOSYS)) => {}
                    // It is no epoll descriptor any more.
                    Err(_) => return false,
                }
                let text = std::fs::read_to_string(format!("/proc/{process}/fdinfo/{epoll}"));
                found.extend(text.ok().and_then(|text| carry::parse(&text, epoll, number, inode())));
            }
            true
        });
        Ok(found)
    }
}

/// Adds to a bounded queue: the oldest falls out.
pub(crate) fn remember<T: PartialEq>(queue: &mut VecDeque<T>, value: T, limit: usize) {
    if !queue.contains(&value) {
        if queue.len() >= limit {
            queue.pop_front();
        }
        queue.push_back(value);
    }
}

/// Takes out of such a queue. Whether it was there.
pub(crate) fn recall<T: PartialEq>(queue: &mut VecDeque<T>, value: &T) -> bool {
    let before = queue.len();
    queue.retain(|other| other != value);
    queue.len() != before
}
