//! Carrying epoll registrations over a swap.
//!
//! An epoll instance knows a registration by (open file, number): after a swap the old file is gone, and with
//! it the registration. So the registration is read (`/proc/PID/fdinfo`), deleted, and made again for the new
//! file *under the program's number*, because that is what the program will name it by. epoll_ctl(2) takes the
//! number from the caller's own table: a helper thread, the **twin**, has a descriptor table of its own in
//! which any number is free.

use kso_sys::{process, remote};
use rustix::event::epoll;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

/// A registration found before the swap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registration {
    /// The epoll descriptor, as the program numbers it.
    pub epoll: RawFd,
    /// The number under which the socket is registered.
    pub number: RawFd,
    /// Events asked for, flags included.
    pub events: u32,
    /// The program's own word.
    pub data: u64,
}

/// Reads the registration of `number` for the socket `inode` from the text of an epoll instance's fdinfo
/// (proc_pid_fdinfo(5)): `tfd: 5 events: 1d data: 5  pos:0 ino:6df sdev:8`.
#[must_use]
pub fn parse(fdinfo: &str, epoll: RawFd, number: RawFd, inode: u64) -> Option<Registration> {
    fdinfo.lines().filter_map(|line| line.trim_start().strip_prefix("tfd:")).find_map(|line| {
        let mut words = line.split_whitespace();
        let target: RawFd = words.next()?.parse().ok()?;
        let (mut events, mut data, mut ino) = (None, None, None);
        while let Some(word) = words.next() {
            // The value follows its label, with or without a space.
            let (label, value) = word.split_once(':')?;
            let value = if value.is_empty() { words.next()? } else { value };
            match label {
                "events" => events = u32::from_str_radix(value, 16).ok(),
                "data" => data = u64::from_str_radix(value, 16).ok(),
                "ino" => ino = u64::from_str_radix(value, 16).ok(),
                _ => {}
            }
        }
        (target == number && ino.is_none_or(|ino| ino == inode)).then_some(Registration {
            epoll,
            number,
            events: events?,
            data: data?,
        })
    })
}

struct Job {
    tid: u32,
    registration: Registration,
    /// Descriptors of the main thread.
    old: RawFd,
    new: RawFd,
}

/// The thread with a descriptor table of its own.
pub struct Twin {
    jobs: SyncSender<Job>,
    results: Receiver<io::Result<()>>,
}

impl Twin {
    /// Starts it. Must be called, and used, on the main thread: the twin reads the descriptors it is given
    /// from that thread's table.
    ///
    /// # Errors
    /// No thread could be started, or `close_range` is missing (Linux 5.9).
    pub fn start() -> io::Result<Self> {
        let (jobs, inbox) = sync_channel::<Job>(1);
        let (outbox, results) = sync_channel(1);
        std::thread::Builder::new().name("kso-twin".into()).stack_size(64 * 1024).spawn(move || {
            let ready = process::private_descriptors();
            let failed = ready.is_err();
            if outbox.send(ready).is_err() || failed {
                return;
            }
            for job in inbox {
                if outbox.send(perform(&job)).is_err() {
                    return;
                }
            }
        })?;
        let twin = Self { jobs, results };
        twin.result()?;
        Ok(twin)
    }

    /// Moves a registration from the file `old` to the file `new`.
    ///
    /// # Errors
    /// The program closed something meanwhile, or `number` is beyond our limit of open files.
    pub fn carry(
        &self,
        tid: u32,
        registration: Registration,
        old: BorrowedFd<'_>,
        new: BorrowedFd<'_>,
    ) -> io::Result<()> {
        let job = Job { tid, registration, old: old.as_raw_fd(), new: new.as_raw_fd() };
        self.jobs.send(job).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        self.result()
    }

    fn result(&self) -> io::Result<()> {
        self.results.recv().unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::BrokenPipe)))
    }
}

impl std::fmt::Debug for Twin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Twin")
    }
}

fn perform(job: &Job) -> io::Result<()> {
    let number = job.registration.number;
    let (instance, old, new) = {
        let target = remote::open_thread(job.tid).or_else(|_| remote::open_process(job.tid))?;
        let main = remote::open_process(std::process::id())?;
        (
            elsewhere(remote::take_descriptor(target.as_fd(), job.registration.epoll)?, number)?,
            elsewhere(remote::take_descriptor(main.as_fd(), job.old)?, number)?,
            elsewhere(remote::take_descriptor(main.as_fd(), job.new)?, number)?,
        )
    };
    let placed = process::place(old.as_fd(), number)?;
    // It may be gone: the program had time to delete it.
    epoll::delete(&instance, &placed)?;
    drop(placed);
    let placed = process::place(new.as_fd(), number)?;
    let flags = epoll::EventFlags::from_bits_retain(job.registration.events);
    epoll::add(&instance, &placed, epoll::EventData::new_u64(job.registration.data), flags)?;
    Ok(())
}

/// The same file under another number than `number`.
fn elsewhere(descriptor: OwnedFd, number: RawFd) -> io::Result<OwnedFd> {
    if descriptor.as_raw_fd() == number { descriptor.try_clone() } else { Ok(descriptor) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const FDINFO: &str = "pos:\t0\nflags:\t02000002\nmnt_id:\t15\nino:\t1057\n\
        tfd:        5 events:       1d data:                5  pos:0 ino:6df sdev:8\n\
        tfd:        7 events: 8000201d data: 7ffe00000007  pos:0 ino:61af sdev:8\n";

    #[test]
    fn a_registration_is_found_by_number_and_inode() {
        let found = parse(FDINFO, 3, 7, 0x61af).unwrap();
        assert_eq!(found, Registration { epoll: 3, number: 7, events: 0x8000_201d, data: 0x7ffe_0000_0007 });
        assert_eq!(parse(FDINFO, 3, 7, 1), None);
        assert_eq!(parse(FDINFO, 3, 6, 0x61af), None);
        assert_eq!(parse("tfd: x\ntfd:\ntfd: 7 events", 3, 7, 1), None);
    }

    #[test]
    fn the_twin_moves_a_registration() {
        // A test's thread is not the leader: take the descriptors from the test's own process all the same,
        // since test threads share their table with the leader.
        let instance = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let old = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let new = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        epoll::add(&instance, &old, epoll::EventData::new_u64(77), epoll::EventFlags::IN).unwrap();
        let registration = Registration {
            epoll: instance.as_raw_fd(),
            number: old.as_raw_fd(),
            events: epoll::EventFlags::IN.bits(),
            data: 77,
        };
        let twin = Twin::start().unwrap();
        twin.carry(std::process::id(), registration, old.as_fd(), new.as_fd()).unwrap();
        let fdinfo = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", instance.as_raw_fd())).unwrap();
        let inode = rustix::fs::fstat(&new).unwrap().st_ino;
        assert!(parse(&fdinfo, instance.as_raw_fd(), old.as_raw_fd(), inode).is_some(), "{fdinfo}");
    }
}
