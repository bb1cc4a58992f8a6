//! Putting a host socket in place of the program's own.

use super::carry::{self, Registration, Twin};
use super::threads::scan;
use super::{Call, Interceptor, recall};
use kso_sys::remote;
use rustix::fs::{OFlags, fcntl_setfl, fstat};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

impl Interceptor {
    /// Puts `outer`, which is non-blocking, under every descriptor that the caller's process has of the call's
    /// socket, with the socket's blocking mode, each descriptor's close-on-exec flag and its epoll registrations.
    /// Whether the caller's socket is non-blocking; `None` if its own descriptor was not there any more.
    pub(super) fn swap(&mut self, call: &Call, outer: BorrowedFd<'_>) -> io::Result<Option<bool>> {
        let tid = call.notification.tid;
        let process = self.threads.again(tid)?.process;
        let mut numbers = vec![call.number];
        if !self.duplicated.is_empty() && recall(&mut self.duplicated, &kso_sys::cookie(call.socket.as_fd())?)
        {
            let link = format!("socket:[{}]", fstat(&call.socket)?.st_ino);
            numbers = scan(process, |target| target == link)?;
        }
        let registrations = self.registrations(process, &numbers, call.socket.as_fd())?;
        let thread = self.threads.again(tid)?;
        let mut mode = None;
        let mut swapped = false;
        for &number in &numbers {
            // A descriptor that was closed meanwhile must not come back.
            let Some(flags) = thread.flags(number) else { continue };
            if mode.is_none() {
                let nonblocking = flags.contains(OFlags::NONBLOCK);
                if !nonblocking {
                    // A fresh socket has no other flag that can be set.
                    fcntl_setfl(outer, OFlags::empty())?;
                }
                mode = Some(nonblocking);
            }
            let close_on_exec = flags.contains(OFlags::CLOEXEC);
            self.listener.replace(call.notification.id, outer, number.unsigned_abs(), close_on_exec)?;
            swapped |= number == call.number;
        }
        for registration in registrations {
            self.carry(tid, registration, call.socket.as_fd(), outer);
        }
        Ok(mode.filter(|_| swapped))
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
        let inode = fstat(socket)?.st_ino;
        epolls.retain(|&epoll| {
            for &number in numbers {
                match remote::in_epoll(process, epoll, number) {
                    Ok(false) => continue,
                    Ok(true) => {}
                    // Without kcmp the list itself tells.
                    Err(error) if error.raw_os_error() == Some(kso_sys::numbers::ENOSYS.into()) => {}
                    // It is no epoll descriptor any more.
                    Err(_) => return false,
                }
                let text = std::fs::read_to_string(format!("/proc/{process}/fdinfo/{epoll}"));
                found.extend(text.ok().and_then(|text| carry::parse(&text, epoll, number, inode)));
            }
            true
        });
        Ok(found)
    }
}
