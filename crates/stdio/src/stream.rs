//! A descriptor that may be anything a user redirects to, read and written without waiting.
//!
//! Making the user's own file non-blocking would make it so for every process that shares it, the shell included. So
//! pipes and terminals are opened anew, sockets have a flag for each call, and where neither works a call is made only
//! when poll(2) promises that it will not wait.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags, major, minor};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// So much fits into a pipe that says it is writable (pipe(7), `PIPE_BUF`), bytes; a terminal takes less without waiting.
const PROMISED: usize = 512;

/// The device /dev/ptmx (Documentation/admin-guide/devices.txt).
const PTMX: (u32, u32) = (5, 2);

/// What is done with a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// It is read.
    Read,
    /// It is written.
    Write,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Calls never wait: our own non-blocking file, or one that is always ready.
    Direct,
    /// Calls carry a flag.
    Socket,
    /// Calls wait unless poll(2) is asked first.
    Careful,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Stream {
    descriptor: OwnedFd,
    way: Way,
}

impl Stream {
    /// A socket.
    #[must_use]
    pub fn socket(descriptor: OwnedFd) -> Self {
        Self { descriptor, way: Way::Socket }
    }

    /// A file of our own, which is made non-blocking.
    ///
    /// # Errors
    /// fcntl(2).
    pub fn own(descriptor: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&descriptor, true)?;
        Ok(Self { descriptor, way: Way::Direct })
    }

    /// A file that others may share: one of the user's standard streams.
    ///
    /// # Errors
    /// fstat(2); no descriptors are left.
    pub fn shared(descriptor: BorrowedFd<'_>, direction: Direction) -> io::Result<Self> {
        let status = rustix::fs::fstat(descriptor)?;
        let kind = FileType::from_raw_mode(status.st_mode);
        let way = match kind {
            FileType::RegularFile | FileType::BlockDevice | FileType::Directory => Way::Direct,
            FileType::Socket => Way::Socket,
            // Opening the master of a terminal makes another terminal.
            FileType::CharacterDevice if (major(status.st_rdev), minor(status.st_rdev)) == PTMX => {
                Way::Careful
            }
            _ if kind == FileType::Fifo || rustix::termios::isatty(descriptor) => {
                if let Some(descriptor) = open_anew(descriptor, direction) {
                    return Ok(Self { descriptor, way: Way::Direct });
                }
                Way::Careful
            }
            _ => Way::Careful,
        };
        Ok(Self { descriptor: descriptor.try_clone_to_owned()?, way })
    }

    pub(crate) fn read(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        match self.way {
            Way::Direct => rustix::io::read(&self.descriptor, buffer),
            Way::Socket => {
                rustix::net::recv(&self.descriptor, buffer, RecvFlags::DONTWAIT).map(|(count, _)| count)
            }
            Way::Careful => {
                self.promise(PollFlags::IN)?;
                rustix::io::read(&self.descriptor, buffer)
            }
        }
    }

    pub(crate) fn write(&self, bytes: &[u8]) -> Result<usize, Errno> {
        match self.way {
            Way::Direct => rustix::io::write(&self.descriptor, bytes),
            Way::Socket => {
                rustix::net::send(&self.descriptor, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
            }
            Way::Careful => {
                self.promise(PollFlags::OUT)?;
                rustix::io::write(&self.descriptor, bytes.get(..PROMISED).unwrap_or(bytes))
            }
        }
    }

    /// Nothing more is written.
    pub(crate) fn finish_writing(&self) {
        if self.way == Way::Socket {
            let _ = rustix::net::shutdown(&self.descriptor, rustix::net::Shutdown::Write);
        }
    }

    fn promise(&self, wanted: PollFlags) -> Result<(), Errno> {
        let mut polled = [PollFd::new(&self.descriptor, wanted)];
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        // An error or the end is for the call to find out.
        if poll(&mut polled, Some(&zero))? == 0 { Err(Errno::AGAIN) } else { Ok(()) }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// The same pipe or terminal as a file of our own, if we may open it.
fn open_anew(descriptor: BorrowedFd<'_>, direction: Direction) -> Option<OwnedFd> {
    let access = match direction {
        Direction::Read => OFlags::RDONLY,
        Direction::Write => OFlags::WRONLY,
    };
    let path = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
    rustix::fs::open(path, access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty()).ok()
}
