//! Putting a host socket in place of the program's own.

use super::carry::{self, Registration, Twin};
use super::threads::{closes_on_exec, scan};
use super::{Call, Interceptor, recall};
use kso_sys::remote;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl, fstat};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

impl Interceptor {
    /// Puts `outer` under every descriptor that the caller's process has of the call's socket, with the
    /// socket's blocking mode, each descriptor's close-on-exec flag and its epoll registrations.
    pub(super) fn swap(&mut self, call: &Call, outer: BorrowedFd<'_>, nonblocking: bool) -> io::Result<()> {
        let flags = fcntl_getfl(outer)?;
        if flags.contains(OFlags::NONBLOCK) != nonblocking {
            fcntl_setfl(outer, flags ^ OFlags::NONBLOCK)?;
        }
        let (tid, process) = {
            let thread = self.threads.get(call.notification.tid)?;
            (thread.tid, thread.process)
        };
        let inode = fstat(&call.socket)?.st_ino;
        let cookie = kso_sys::cookie(call.socket.as_fd())?;
        let numbers = if recall(&mut self.duplicated, &cookie) {
            let link = format!("socket:[{inode}]");
            scan(process, |target| target == link)?
        } else {
            vec![call.number]
        };
        let registrations = self.registrations(process, &numbers, inode);
        for &number in &numbers {
            // A descriptor that was closed meanwhile must not come back.
            let Some(close_on_exec) = closes_on_exec(tid, number) else { continue };
            self.listener.replace(call.notification.id, outer, number.unsigned_abs(), close_on_exec)?;
        }
        for registration in registrations {
            self.carry(tid, registration, call.socket.as_fd(), outer);
        }
        Ok(())
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
    fn registrations(&mut self, process: u32, numbers: &[i32], inode: u64) -> Vec<Registration> {
        let mut found = Vec::new();
        let epolls = self.epolls.of(process);
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
        found
    }
}
