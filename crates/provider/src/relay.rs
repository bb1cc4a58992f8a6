//! Joins a TCP socket with a stream: what comes from one goes to the other.
//!
//! ```text
//!   each direction:  open -- the reader's end --> flushing -- all written --> the writer is shut down: ended
//!   both ended  --> over, in order
//!   an error, or the stream closed before both directions ended --> over, reset
//! ```
//!
//! The rule of `kso_wire::provide`: a stream that is closed early is a reset connection. poll(2) tells it from one that is
//! merely shut down in one direction by `POLLHUP`. Only when this side ended first do the orderly end of a provider and
//! its death look the same: then the broker's side ([`Pair::strict`]) waits for the provider's word. The TCP socket of a reset connection is closed with
//! `SO_LINGER` of zero, so that its peer sees a reset, too.
//!
//! Both descriptors are registered edge-triggered; at most one buffer of each direction waits here, and only while its
//! writer is full. Nothing is read that has no place.

use kso_wire::Errno;
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown, sockopt};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// Bytes read at a time.
pub const BUFFER: usize = 256 << 10;
/// Bytes that may wait in a stream.
const STREAM_BUFFER: usize = 512 << 10;
/// Bytes of one direction that are moved before others have their turn.
const TURN: usize = 1 << 20;

/// What both descriptors are registered for.
#[must_use]
pub fn interest() -> epoll::EventFlags {
    epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP | epoll::EventFlags::ET
}

/// Which of the two a readiness is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The TCP socket.
    Tcp,
    /// The stream.
    Stream,
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// Bytes that came from the TCP socket.
    pub bytes_in: u64,
    /// Bytes that were written to it.
    pub bytes_out: u64,
    /// What broke it; `ECONNRESET` also when the other side closed its stream early.
    pub errno: Option<Errno>,
}

/// What is to be done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing until a descriptor is ready.
    Wait,
    /// There is more to do, after others had their turn.
    Again,
    /// It is over. Dropping the pair closes both.
    Over(End),
}

#[derive(Debug, Default)]
struct Direction {
    waiting: Vec<u8>,
    written: usize,
    readable: bool,
    writable: bool,
    end_seen: bool,
    ended: bool,
    bytes: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Pair {
    tcp: OwnedFd,
    stream: OwnedFd,
    /// From the TCP socket to the stream.
    inward: Direction,
    /// From the stream to the TCP socket.
    outward: Direction,
    hung_up: bool,
    failed: bool,
    /// The end of the stream counts only when it was told that it is in order.
    awaits_word: bool,
    told: Option<Errno>,
}

impl Pair {
    /// Joins them. Both are non-blocking; the TCP socket is connected.
    #[must_use]
    pub fn new(tcp: OwnedFd, stream: OwnedFd) -> Self {
        // Death at any moment is a reset, until the end comes in order.
        let _ = sockopt::set_socket_linger(&tcp, Some(Duration::ZERO));
        let direction = || Direction { readable: true, writable: true, ..Direction::default() };
        Self {
            tcp,
            stream,
            inward: direction(),
            outward: direction(),
            hung_up: false,
            failed: false,
            awaits_word: false,
            told: None,
        }
    }

    /// As [`Self::new`]; an end of the stream that could be its death counts only after [`Self::told`].
    #[must_use]
    pub fn strict(tcp: OwnedFd, stream: OwnedFd) -> Self {
        Self { awaits_word: true, ..Self::new(tcp, stream) }
    }

    /// The other side told how the connection ended. [`Self::run`] is due.
    pub fn told(&mut self, errno: Option<Errno>) {
        self.awaits_word = false;
        self.told = errno;
    }

    /// The TCP socket.
    #[must_use]
    pub fn tcp(&self) -> BorrowedFd<'_> {
        self.tcp.as_fd()
    }

    /// The stream.
    #[must_use]
    pub fn stream(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Notes that a descriptor is ready.
    pub fn ready(&mut self, side: Side, events: epoll::EventFlags) {
        use epoll::EventFlags as Flags;
        let readable = events.intersects(Flags::IN | Flags::RDHUP | Flags::HUP | Flags::ERR);
        let writable = events.intersects(Flags::OUT | Flags::HUP | Flags::ERR);
        let (reads, writes) = match side {
            Side::Tcp => (&mut self.inward, &mut self.outward),
            Side::Stream => (&mut self.outward, &mut self.inward),
        };
        reads.readable |= readable;
        writes.writable |= writable;
        match side {
            Side::Tcp => self.failed |= events.contains(Flags::ERR),
            Side::Stream => self.hung_up |= events.contains(Flags::HUP),
        }
    }

    /// Moves what can be moved. `scratch` is [`BUFFER`] long.
    pub fn run(&mut self, scratch: &mut [u8]) -> Step {
        let inward = self.inward.pump(self.tcp.as_fd(), self.stream.as_fd(), scratch);
        let again = match inward {
            Ok(again) => again,
            Err(failure) => return self.broken(failure),
        };
        let outward = self.outward.pump(self.stream.as_fd(), self.tcp.as_fd(), scratch);
        let again = match outward {
            Ok(more) => again || more,
            Err(failure) => return self.broken(failure),
        };
        if let Some(errno) = self.told {
            return self.broken(errno);
        }
        if self.outward.is_at_end() {
            self.hung_up |= has_hung_up(self.stream.as_fd());
            match (self.hung_up, self.inward.ended) {
                // No mere shutdown, while the TCP socket had more to say.
                (true, false) => return self.broken(Errno::ECONNRESET),
                (true, true) if self.awaits_word => return Step::Wait,
                _ => {}
            }
            if let Err(failure) = self.outward.finish(self.tcp.as_fd()) {
                return self.broken(failure);
            }
        }
        if self.inward.is_at_end()
            && let Err(failure) = self.inward.finish(self.stream.as_fd())
        {
            return self.broken(failure);
        }
        // An error that no read will tell.
        if self.failed && self.inward.ended {
            self.failed = false;
            match kso_sys::take_error(self.tcp.as_fd()) {
                Ok(0) => {}
                Ok(raw) => return self.broken(kso_sys::errno::from_raw(raw)),
                Err(error) => return self.broken(kso_sys::errno::of(&error)),
            }
        }
        if self.inward.ended && self.outward.ended {
            // What is still on its way to the peer shall arrive.
            let _ = sockopt::set_socket_linger(&self.tcp, None);
            return self.end(None);
        }
        if again { Step::Again } else { Step::Wait }
    }

    /// Bytes so far: from the TCP socket, and to it.
    #[must_use]
    pub fn bytes(&self) -> (u64, u64) {
        (self.inward.bytes, self.outward.bytes)
    }

    fn broken(&self, errno: Errno) -> Step {
        self.end(Some(if errno == Errno::EPIPE { Errno::ECONNRESET } else { errno }))
    }

    fn end(&self, errno: Option<Errno>) -> Step {
        Step::Over(End { bytes_in: self.inward.bytes, bytes_out: self.outward.bytes, errno })
    }
}

impl Direction {
    /// Whether there is more to do at once.
    fn pump(&mut self, from: BorrowedFd<'_>, to: BorrowedFd<'_>, scratch: &mut [u8]) -> Result<bool, Errno> {
        let mut moved = 0;
        loop {
            if !self.waiting.is_empty() {
                if !self.writable {
                    return Ok(false);
                }
                let waiting = std::mem::take(&mut self.waiting);
                let rest = waiting.get(self.written..).unwrap_or_default();
                let count = self.write(to, rest)?;
                self.written += count.unwrap_or(0);
                // When all is written the memory goes, too: most directions never wait.
                if self.written < waiting.len() {
                    self.waiting = waiting;
                } else {
                    self.written = 0;
                }
                continue;
            }
            if self.end_seen {
                return Ok(false);
            }
            if !self.readable {
                return Ok(false);
            }
            if moved >= TURN {
                return Ok(true);
            }
            match recv(from, &mut *scratch, RecvFlags::DONTWAIT) {
                Ok((0, _)) => self.end_seen = true,
                Ok((count, _)) => {
                    moved += count;
                    let bytes = scratch.get(..count).unwrap_or_default();
                    let written = self.write(to, bytes)?.unwrap_or(0);
                    if let Some(rest) = bytes.get(written..).filter(|rest| !rest.is_empty()) {
                        self.waiting = rest.to_owned();
                    }
                }
                Err(rustix::io::Errno::AGAIN) => self.readable = false,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(crate::errno(error)),
            }
        }
    }

    /// Everything came and was written, and the writer does not know yet.
    fn is_at_end(&self) -> bool {
        self.end_seen && self.waiting.is_empty() && !self.ended
    }

    fn finish(&mut self, to: BorrowedFd<'_>) -> Result<(), Errno> {
        self.ended = true;
        match shutdown(to, Shutdown::Write) {
            // The other end is gone already: it wants no more.
            Ok(()) | Err(rustix::io::Errno::NOTCONN) => Ok(()),
            Err(error) => Err(crate::errno(error)),
        }
    }

    /// `None`: it is full.
    fn write(&mut self, to: BorrowedFd<'_>, bytes: &[u8]) -> Result<Option<usize>, Errno> {
        loop {
            match send(to, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(count) => {
                    self.bytes += count as u64;
                    return Ok(Some(count));
                }
                Err(rustix::io::Errno::AGAIN) => {
                    self.writable = false;
                    return Ok(None);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(crate::errno(error)),
            }
        }
    }
}

/// Whether the other end of a stream is closed, not merely shut down.
#[must_use]
pub fn has_hung_up(stream: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::from_borrowed_fd(stream, PollFlags::empty())];
    let ready = poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok();
    let [polled] = polled;
    if ready && polled.revents().intersects(PollFlags::HUP | PollFlags::ERR) {
        return true;
    }
    // A reset AF_VSOCK stream merely looks shut down; but it takes nothing any more, not even nothing
    // (vsock_connectible_sendmsg in net/vmw_vsock/af_vsock.c).
    kso_sys::vsock::is_vsock(stream)
        && send(stream, &[], SendFlags::NOSIGNAL | SendFlags::DONTWAIT) == Err(rustix::io::Errno::PIPE)
}

/// Closes a connected TCP socket so that its peer sees a reset.
pub fn reset(tcp: OwnedFd) {
    let _ = sockopt::set_socket_linger(&tcp, Some(Duration::ZERO));
    drop(tcp);
}

/// The two ends of a new stream, non-blocking.
///
/// # Errors
/// `EMFILE`.
pub fn stream_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (one, other) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    for end in [&one, &other] {
        // Beyond net.core.wmem_max with privilege; a smaller buffer is no reason to fail.
        let _ = sockopt::set_socket_send_buffer_size_force(end, STREAM_BUFFER);
    }
    Ok((one, other))
}

#[cfg(test)]
mod tests;
