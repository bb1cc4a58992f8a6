//! Joins one end of a socket pair with a TLS connection.
//!
//! ```text
//!   outward: inner --read--> Engine --> TCP      its end of file: close_notify
//!   inward:  TCP --read--> Engine --> inner      close_notify: the inner end is shut down for writing
//!   both ended --> over, in order
//!   anything else --> over, broken: both are closed as they are
//! ```
//!
//! The rule of `kso_wire::provide` holds on both: a stream that is closed before both directions were shut down was reset. So
//! an inner end that is closed early closes TCP without close_notify, and TCP that ends without close_notify closes the inner
//! end early. Who cuts the connection on the way can make a reset of it, never an end.
//!
//! Both descriptors are registered edge-triggered. At most what was read at once waits here for each direction, and only
//! while its writer is full: nothing is read that has no place.

use crate::engine::{Broken, Engine};
use crate::pump::Wake;
use kso_provider::relay::has_hung_up;
use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, recv, send, sendmsg, shutdown};
use std::io::{self, IoSlice, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Bytes read at a time.
const READ: usize = 128 << 10;
/// Bytes of one direction that are moved before others have their turn.
const TURN: usize = 1 << 20;
const WRITE: SendFlags = SendFlags::NOSIGNAL.union(SendFlags::DONTWAIT);

/// Room for what is under way in one turn; all tunnels of a thread share it.
#[derive(Debug)]
pub struct Scratch {
    read: Vec<u8>,
    plain: Vec<u8>,
}

impl Default for Scratch {
    fn default() -> Self {
        Self { read: vec![0; READ], plain: Vec::with_capacity(READ) }
    }
}

/// Which of the two descriptors a readiness is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The TLS connection.
    Tcp,
    /// The socket pair.
    Inner,
}

/// What is to be done next.
#[derive(Debug)]
pub enum Step {
    /// Nothing until a descriptor is ready.
    Wait,
    /// There is more to do, after others had their turn.
    Again,
    /// Both directions ended.
    Over,
    /// It ended otherwise.
    Broken(Broken),
}

/// What became of a stream, for who asks later.
#[derive(Debug, Default)]
pub struct Fate {
    why: Mutex<Option<String>>,
    heard: AtomicBool,
    wake: Option<Wake>,
}

impl Fate {
    /// Somebody is woken when there is news.
    pub(crate) fn waking(wake: Wake) -> Self {
        Self { wake: Some(wake), ..Self::default() }
    }

    /// Why it broke; the first reason counts.
    pub fn set(&self, why: impl Into<String>) {
        self.why.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| why.into());
    }

    /// The reason, if it broke.
    #[must_use]
    pub fn get(&self) -> Option<String> {
        self.why.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Something came by it.
    fn hear(&self) {
        if !self.heard.swap(true, Ordering::Relaxed)
            && let Some(wake) = &self.wake
        {
            wake.wake();
        }
    }

    /// Whether something came by it: so the other side accepted our certificate, which TLS 1.3 tells in no other way.
    #[must_use]
    pub fn is_heard(&self) -> bool {
        self.heard.load(Ordering::Relaxed)
    }
}

/// See the module.
#[derive(Debug)]
pub struct Tunnel {
    tcp: OwnedFd,
    inner: OwnedFd,
    engine: Engine,
    /// Plaintext that the inner end had no room for.
    waiting: Vec<u8>,
    written: usize,
    tcp_readable: bool,
    tcp_writable: bool,
    inner_readable: bool,
    inner_writable: bool,
    /// Our side sends no more.
    ended: bool,
    /// The other side's end was passed on.
    passed: bool,
    hung_up: bool,
    dialled: bool,
    fate: Option<Arc<Fate>>,
}

impl Tunnel {
    /// Joins them. Both are non-blocking; the handshake is made. `early`: plaintext that came with it.
    #[must_use]
    pub fn new(tcp: OwnedFd, engine: Engine, inner: OwnedFd, early: Vec<u8>) -> Self {
        Self {
            tcp,
            inner,
            engine,
            waiting: early,
            written: 0,
            tcp_readable: true,
            tcp_writable: true,
            inner_readable: true,
            inner_writable: true,
            ended: false,
            passed: false,
            hung_up: false,
            dialled: false,
            fate: None,
        }
    }

    /// The connection was begun from here: see [`Self::into_parting`].
    #[must_use]
    pub fn dialled(self) -> Self {
        Self { dialled: true, ..self }
    }

    /// Why it breaks is told there.
    #[must_use]
    pub fn telling(self, fate: Option<Arc<Fate>>) -> Self {
        Self { fate, ..self }
    }

    /// A descriptor.
    #[must_use]
    pub fn descriptor(&self, side: Side) -> BorrowedFd<'_> {
        match side {
            Side::Tcp => self.tcp.as_fd(),
            Side::Inner => self.inner.as_fd(),
        }
    }

    /// Notes that a descriptor is ready.
    pub fn ready(&mut self, side: Side, events: epoll::EventFlags) {
        use epoll::EventFlags as Flags;
        let readable = events.intersects(Flags::IN | Flags::RDHUP | Flags::HUP | Flags::ERR);
        let writable = events.intersects(Flags::OUT | Flags::HUP | Flags::ERR);
        match side {
            Side::Tcp => {
                self.tcp_readable |= readable;
                self.tcp_writable |= writable;
            }
            Side::Inner => {
                self.inner_readable |= readable;
                self.inner_writable |= writable;
                // Once the other side's end was passed on, a mere shutdown looks the same.
                self.hung_up |= events.contains(Flags::HUP) && !self.passed;
            }
        }
    }

    /// Moves what can be moved.
    pub fn run(&mut self, scratch: &mut Scratch) -> Step {
        let moved = self.inward(scratch).and_then(|more| match self.outward(scratch) {
            Ok(again) => Ok(more || again),
            // What the other side complained of may lie there to be read.
            Err(Broken::Io(error)) => {
                self.tcp_readable = true;
                Err(match self.inward(scratch) {
                    Err(told @ Broken::Tls(_)) => told,
                    _ => Broken::Io(error),
                })
            }
            Err(broken) => Err(broken),
        });
        match moved {
            Ok(_) if self.ended && self.passed && !self.engine.has_output() => Step::Over,
            Ok(true) => Step::Again,
            Ok(false) => Step::Wait,
            Err(broken) => self.broken(broken),
        }
    }

    fn broken(&mut self, broken: Broken) -> Step {
        // An alert says why; if there is no room for it, it stays unsaid.
        if let Broken::Tls(_) = broken {
            while self.engine.has_output() && self.engine.take(&mut Wire(self.tcp.as_fd())).is_ok() {}
        }
        if self.engine.has_output() {
            // What waits for a slow peer would keep the connection for minutes.
            let _ = rustix::net::sockopt::set_socket_linger(&self.tcp, Some(Duration::ZERO));
        }
        if let Some(fate) = &self.fate {
            fate.set(broken.to_string());
        }
        Step::Broken(broken)
    }

    /// The TCP socket of a tunnel that is over, if this side is to wait until the other one closes it: who closes first cannot
    /// use the port again for a minute, and the ports of the side that dials are few.
    #[must_use]
    pub fn into_parting(self) -> Option<OwnedFd> {
        self.dialled.then_some(self.tcp)
    }

    /// From TLS to the inner end. Whether there is more to do at once.
    fn inward(&mut self, scratch: &mut Scratch) -> Result<bool, Broken> {
        let mut moved = 0;
        loop {
            if let Some(rest) = self.waiting.get(self.written..).filter(|rest| !rest.is_empty()) {
                if !self.inner_writable {
                    return Ok(false);
                }
                match send(&self.inner, rest, WRITE) {
                    Ok(count) => self.written += count,
                    Err(Errno::AGAIN) => self.inner_writable = false,
                    Err(Errno::INTR) => {}
                    Err(_) => return Err(Broken::Local),
                }
                continue;
            }
            // The memory goes, too: most tunnels never wait.
            (self.waiting, self.written) = (Vec::new(), 0);
            if self.engine.has_ended() {
                if !self.passed {
                    self.passed = true;
                    let _ = shutdown(&self.inner, Shutdown::Write);
                }
                return Ok(false);
            }
            if !self.tcp_readable {
                return Ok(false);
            }
            if moved >= TURN {
                return Ok(true);
            }
            match recv(&self.tcp, &mut *scratch.read, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(Broken::Truncated),
                Ok((count, _)) => {
                    moved += count;
                    scratch.plain.clear();
                    let wire = scratch.read.get(..count).unwrap_or_default();
                    let received = self.engine.receive(wire, &mut scratch.plain);
                    self.deliver(&scratch.plain)?;
                    received?;
                }
                Err(Errno::AGAIN) => self.tcp_readable = false,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Writes at once what there is room for, and keeps the rest.
    fn deliver(&mut self, plain: &[u8]) -> Result<(), Broken> {
        if plain.is_empty() {
            return Ok(());
        }
        if let Some(fate) = &self.fate {
            fate.hear();
        }
        let written = match send(&self.inner, plain, WRITE) {
            Ok(count) => count,
            Err(Errno::AGAIN) => {
                self.inner_writable = false;
                0
            }
            Err(Errno::INTR) => 0,
            Err(_) => return Err(Broken::Local),
        };
        if let Some(rest) = plain.get(written..).filter(|rest| !rest.is_empty()) {
            self.waiting = rest.to_owned();
        }
        Ok(())
    }

    /// From the inner end to TLS. Whether there is more to do at once.
    fn outward(&mut self, scratch: &mut Scratch) -> Result<bool, Broken> {
        let mut moved = 0;
        loop {
            if self.engine.has_output() {
                if !self.tcp_writable {
                    return self.wait_outward();
                }
                match self.engine.take(&mut Wire(self.tcp.as_fd())) {
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.tcp_writable = false,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO).into()),
                }
                continue;
            }
            if self.ended || !self.inner_readable {
                return self.wait_outward();
            }
            if moved >= TURN {
                return Ok(true);
            }
            match recv(&self.inner, &mut *scratch.read, RecvFlags::DONTWAIT) {
                Ok((0, _)) if !self.passed && has_hung_up(self.inner.as_fd()) => return Err(Broken::Local),
                Ok((0, _)) => {
                    self.ended = true;
                    self.engine.end();
                }
                Ok((count, _)) => {
                    moved += count;
                    self.engine.send(scratch.read.get(..count).unwrap_or_default())?;
                }
                Err(Errno::AGAIN) => self.inner_readable = false,
                Err(Errno::INTR) => {}
                Err(_) => return Err(Broken::Local),
            }
        }
    }

    /// Nothing more goes out now: an inner end that is closed early need not be waited for.
    fn wait_outward(&self) -> Result<bool, Broken> {
        if self.hung_up && !self.passed { Err(Broken::Local) } else { Ok(false) }
    }
}

/// Where ciphertext goes.
pub(crate) struct Wire<'a>(pub BorrowedFd<'a>);

impl Write for Wire<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(send(self.0, bytes, WRITE)?)
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        Ok(sendmsg(self.0, parts, &mut SendAncillaryBuffer::default(), WRITE)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
