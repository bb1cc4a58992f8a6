//! A TLS connection before it carries a stream: the handshake, and what comes with it.

use crate::engine::{Broken, Engine};
use crate::tunnel::Wire;
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv, sockopt};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

/// Bytes read at a time: handshakes are small.
const READ: usize = 16 << 10;
/// A peer that vanished is noticed: asked after so long, so often, at such intervals.
const KEEP_ALIVE: (Duration, u32, Duration) = (Duration::from_secs(30), 3, Duration::from_secs(10));

/// See the module.
#[derive(Debug)]
pub struct Greeting {
    pub tcp: OwnedFd,
    pub engine: Engine,
    /// Plaintext that came already.
    pub plain: Vec<u8>,
    is_new: bool,
}

impl Greeting {
    /// Over a non-blocking TCP socket.
    pub fn new(tcp: OwnedFd, engine: Engine) -> Self {
        // Each write here is as large as it can be.
        let _ = sockopt::set_tcp_nodelay(&tcp, true);
        let (idle, count, interval) = KEEP_ALIVE;
        let _ = sockopt::set_socket_keepalive(&tcp, true);
        let _ = sockopt::set_tcp_keepidle(&tcp, idle);
        let _ = sockopt::set_tcp_keepcnt(&tcp, count);
        let _ = sockopt::set_tcp_keepintvl(&tcp, interval);
        Self { tcp, engine, plain: Vec::new(), is_new: true }
    }

    /// Whether it was never run.
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// Sends and receives what can be, until more than `enough` plaintext is here. True: the handshake is made.
    pub fn run(&mut self, enough: usize) -> Result<bool, Broken> {
        self.is_new = false;
        let mut buffer = [0; READ];
        loop {
            self.flush()?;
            if self.plain.len() > enough || self.engine.has_ended() {
                break;
            }
            match recv(&self.tcp, &mut buffer, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(Broken::Truncated),
                Ok((count, _)) => {
                    let wire = buffer.get(..count).unwrap_or_default();
                    if let Err(broken) = self.engine.receive(wire, &mut self.plain) {
                        // The alert that says why.
                        let _ = self.flush();
                        return Err(broken);
                    }
                }
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(!self.engine.is_handshaking() && !self.engine.has_output())
    }

    /// Sends what waits, as far as there is room.
    fn flush(&mut self) -> Result<(), Broken> {
        while self.engine.has_output() {
            match self.engine.take(&mut Wire(self.tcp.as_fd())) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO).into()),
            }
        }
        Ok(())
    }
}
