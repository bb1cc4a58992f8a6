//! Bytes between a sandbox's TCP connection and a socket outside.
//!
//! Each direction ends on its own: a FIN from the sandbox shuts the socket down for writing, an end of file from
//! outside closes the sandbox's side, and either way the other direction goes on. A reset goes through at
//! once. Neither side is read unless the other has room, which is all the flow control it takes.

use super::stack::End;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, shutdown, sockopt};
use smoltcp::socket::tcp::State;
use std::os::fd::OwnedFd;
use std::time::Duration;

/// The socket outside and what is known of it. Its readiness comes in edges.
#[derive(Debug)]
pub struct Outside {
    socket: OwnedFd,
    readable: bool,
    writable: bool,
    /// It sends no more.
    ended: bool,
    /// It was told that the sandbox sends no more.
    shut: bool,
}

/// What came of moving bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moved {
    /// Some were: the sandbox's side has something to say.
    Some,
    /// None could be.
    None,
    /// The stream is over.
    Over,
}

impl Outside {
    /// A connection that is established.
    pub fn new(socket: OwnedFd) -> Self {
        // What the sandbox sent was gathered there already.
        let _ = sockopt::set_tcp_nodelay(&socket, true);
        Self { socket, readable: true, writable: true, ended: false, shut: false }
    }

    /// There was an edge.
    pub fn ready(&mut self, readable: bool, writable: bool) {
        self.readable |= readable;
        self.writable |= writable;
    }

    /// Moves what can be moved.
    pub fn relay(&mut self, end: &mut End) -> Moved {
        let Ok(out) = self.outwards(end) else { return self.reset(end) };
        let Ok(back) = self.inwards(end) else { return self.reset(end) };
        let state = end.socket().state();
        match state {
            // A reset from inside, unless both sides had ended.
            State::Closed if !(self.shut && self.ended) => {
                self.abort();
                Moved::Over
            }
            State::Closed | State::TimeWait => Moved::Over,
            _ if out || back => Moved::Some,
            _ => Moved::None,
        }
    }

    /// The sandbox's side is gone: whoever is outside gets a reset.
    pub fn abort(&self) {
        let _ = sockopt::set_socket_linger(&self.socket, Some(Duration::ZERO));
    }

    /// Outside is gone: the sandbox gets a reset.
    fn reset(&mut self, end: &mut End) -> Moved {
        end.socket().abort();
        self.ended = true;
        self.shut = true;
        Moved::Over
    }

    fn outwards(&mut self, end: &mut End) -> Result<bool, Errno> {
        let socket = end.socket();
        let mut moved = false;
        while self.writable && socket.can_recv() {
            let sent = socket.recv(|bytes| {
                match rustix::net::send(&self.socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                    Ok(sent) => (sent, Ok(sent)),
                    Err(error) => (0, Err(error)),
                }
            });
            match sent {
                Ok(Ok(_)) => moved = true,
                Ok(Err(Errno::AGAIN)) => self.writable = false,
                Ok(Err(Errno::INTR)) => {}
                Ok(Err(error)) => return Err(error),
                Err(_) => break,
            }
        }
        let finished =
            matches!(socket.state(), State::CloseWait | State::LastAck | State::Closing | State::TimeWait);
        if finished && !socket.can_recv() && !self.shut {
            self.shut = true;
            shutdown(&self.socket, Shutdown::Write)?;
        }
        Ok(moved)
    }

    fn inwards(&mut self, end: &mut End) -> Result<bool, Errno> {
        let socket = end.socket();
        let mut moved = false;
        while self.readable && !self.ended && socket.can_send() {
            let received =
                socket.send(|room| match rustix::net::recv(&self.socket, &mut *room, RecvFlags::DONTWAIT) {
                    Ok((received, _)) => (received, Ok(received)),
                    Err(error) => (0, Err(error)),
                });
            match received {
                Ok(Ok(0)) => {
                    self.ended = true;
                    socket.close();
                    moved = true;
                }
                Ok(Ok(_)) => moved = true,
                Ok(Err(Errno::AGAIN)) => self.readable = false,
                Ok(Err(Errno::INTR)) => {}
                Ok(Err(error)) => return Err(error),
                Err(_) => break,
            }
        }
        Ok(moved)
    }
}
