//! Joins a stream with a connection: what comes from one goes to the other, without a copy between their buffers.
//!
//! ```text
//!   each direction:  open -- the reader's end, all written --> the writer is told: ended
//!   both ended  --> over, in order
//!   a reset, or the stream closed before both directions ended --> over, reset
//! ```
//!
//! The rules are those of `kso_provider::relay`: a stream that is closed early is a reset connection.

use crate::connection::ConnectionId;
use crate::stack::Stack;
use kso_provider::relay;
use kso_wire::Errno;
use kso_wire::provide::StreamId;
use rustix::event::epoll::EventFlags;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use smoltcp::socket::tcp::{RecvError, Socket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Bytes of one direction that are moved before others have their turn.
const TURN: usize = 1 << 20;

/// What is to be done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing until one of them is ready.
    Wait,
    /// There is more to do, after others had their turn.
    Again,
    /// It is over; what broke it, if something did.
    Over(Option<Errno>),
}

/// What a direction came to.
enum Moved {
    /// The reader has no more, or the writer no room.
    All,
    /// There is more.
    Part,
}

/// See the module.
#[derive(Debug)]
pub struct Joint {
    /// As the broker calls it.
    pub id: StreamId,
    stream: OwnedFd,
    /// Bytes that the peer sent.
    pub bytes_in: u64,
    /// Bytes that the peer was sent.
    pub bytes_out: u64,
    /// It is in the queue of those with something to do.
    pub queued: bool,
    /// The connection is up.
    pub up: bool,
    readable: bool,
    writable: bool,
    hung_up: bool,
    inward_ended: bool,
    outward_ended: bool,
}

impl Joint {
    /// For a stream, non-blocking.
    pub fn new(id: StreamId, stream: OwnedFd, up: bool) -> Self {
        Self {
            id,
            stream,
            bytes_in: 0,
            bytes_out: 0,
            queued: false,
            up,
            readable: true,
            writable: true,
            hung_up: false,
            inward_ended: false,
            outward_ended: false,
        }
    }

    /// Notes that the stream is ready.
    pub fn ready(&mut self, events: EventFlags) {
        use EventFlags as Flags;
        self.readable |= events.intersects(Flags::IN | Flags::RDHUP | Flags::HUP | Flags::ERR);
        self.writable |= events.intersects(Flags::OUT | Flags::HUP | Flags::ERR);
        self.hung_up |= events.contains(Flags::HUP);
    }

    /// Whether the program gave up.
    pub fn is_given_up(&self) -> bool {
        self.hung_up || relay::has_hung_up(self.stream.as_fd())
    }

    /// Moves what can be moved.
    pub fn run(&mut self, stack: &mut Stack, connection: ConnectionId) -> Step {
        let before = (self.bytes_in, self.bytes_out, self.outward_ended);
        let Some(socket) = stack.socket(connection) else { return Step::Over(Some(Errno::ECONNRESET)) };
        let moved = self.inward(socket).and_then(|inward| Ok((inward, self.outward(socket)?)));
        if before != (self.bytes_in, self.bytes_out, self.outward_ended) {
            stack.touch(connection, self.bytes_out != before.1);
        }
        match moved {
            Err(errno) => Step::Over(Some(errno.unwrap_or_else(|| stack.error(connection)))),
            Ok(_) if self.inward_ended && self.outward_ended => Step::Over(None),
            Ok((Moved::All, Moved::All)) => Step::Wait,
            Ok(_) => Step::Again,
        }
    }

    /// From the peer to the stream. An error of `None` is one that the stack knows.
    fn inward(&mut self, socket: &mut Socket<'static>) -> Result<Moved, Option<Errno>> {
        let mut moved = 0;
        while !self.inward_ended && self.writable {
            if moved >= TURN {
                return Ok(Moved::Part);
            }
            let stream = self.stream.as_fd();
            let written = socket.recv(|bytes| {
                if bytes.is_empty() {
                    return (0, Ok(None));
                }
                let written = write(stream, bytes);
                (written.unwrap_or(Some(0)).unwrap_or(0), written)
            });
            match written {
                Ok(Ok(None)) if !socket.can_recv() => return Ok(Moved::All),
                Ok(Ok(None)) => self.writable = false,
                Ok(Ok(Some(count))) => {
                    moved += count;
                    self.bytes_in += count as u64;
                }
                Ok(Err(errno)) => return Err(Some(errno)),
                Err(RecvError::Finished) => {
                    self.inward_ended = true;
                    match shutdown(&self.stream, Shutdown::Write) {
                        // The other end is gone already: it wants no more.
                        Ok(()) | Err(rustix::io::Errno::NOTCONN) => {}
                        Err(error) => return Err(Some(errno(error))),
                    }
                }
                Err(RecvError::InvalidState) => return Err(None),
            }
        }
        Ok(Moved::All)
    }

    /// From the stream to the peer.
    fn outward(&mut self, socket: &mut Socket<'static>) -> Result<Moved, Option<Errno>> {
        let mut moved = 0;
        while !self.outward_ended {
            if !socket.may_send() {
                return Err(None);
            }
            if !self.readable || !socket.can_send() {
                return Ok(Moved::All);
            }
            if moved >= TURN {
                return Ok(Moved::Part);
            }
            let stream = self.stream.as_fd();
            let read = socket.send(|room| {
                let read = read(stream, room);
                (read.unwrap_or(Some(0)).unwrap_or(0), read)
            });
            match read {
                Ok(Ok(Some(0))) => self.end_outward(socket)?,
                Ok(Ok(Some(count))) => {
                    moved += count;
                    self.bytes_out += count as u64;
                }
                Ok(Ok(None)) => self.readable = false,
                Ok(Err(errno)) => return Err(Some(errno)),
                Err(_) => return Err(None),
            }
        }
        Ok(Moved::All)
    }

    /// The program says no more; or it is gone.
    fn end_outward(&mut self, socket: &mut Socket<'static>) -> Result<(), Option<Errno>> {
        // No mere shutdown, while the peer had more to say.
        if self.is_given_up() && !self.inward_ended {
            return Err(Some(Errno::ECONNRESET));
        }
        socket.close();
        self.outward_ended = true;
        Ok(())
    }
}

/// `None`: it is full.
fn write(stream: BorrowedFd<'_>, bytes: &[u8]) -> Result<Option<usize>, Errno> {
    loop {
        match send(stream, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(count) => return Ok(Some(count)),
            Err(rustix::io::Errno::AGAIN) => return Ok(None),
            Err(rustix::io::Errno::INTR) => {}
            // It was closed.
            Err(rustix::io::Errno::PIPE) => return Err(Errno::ECONNRESET),
            Err(error) => return Err(errno(error)),
        }
    }
}

/// `None`: there is nothing. 0 bytes: its end.
fn read(stream: BorrowedFd<'_>, room: &mut [u8]) -> Result<Option<usize>, Errno> {
    loop {
        match recv(stream, &mut *room, RecvFlags::DONTWAIT) {
            Ok((count, _)) => return Ok(Some(count)),
            Err(rustix::io::Errno::AGAIN) => return Ok(None),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(errno(error)),
        }
    }
}

fn errno(error: rustix::io::Errno) -> Errno {
    kso_sys::errno::from_raw(error.raw_os_error())
}
