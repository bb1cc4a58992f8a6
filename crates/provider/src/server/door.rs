//! Where connections come to a provider: each is a broker's control stream, or a stream that begins with a ticket.
//!
//! ```text
//!   admit --> its first bytes --> no ticket: a session, on a thread of its own
//!                 |          +--> a ticket: joined with the session that it is of
//!                 +-- nothing within PATIENCE, too many that say nothing --> closed
//! ```

use super::{Limits, Shared};
use kso_wire::provide::Ticket;
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::net::{RecvFlags, recv};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// So long a connection may say nothing.
const PATIENCE: Duration = Duration::from_secs(10);
/// So many may say nothing at one time.
const MAX_SILENT: usize = 1024;
/// So many events are taken at a time.
const EVENTS: usize = 64;

/// What the first bytes of a connection tell.
enum Begun {
    /// Nothing yet.
    Silent,
    /// It is closed.
    Gone,
    /// A stream.
    Stream(Ticket),
    /// A control stream.
    Session,
}

/// See the module.
#[derive(Debug)]
pub struct Door {
    epoll: OwnedFd,
    shared: Shared,
    limits: Limits,
    silent: HashMap<u64, (Instant, OwnedFd)>,
    next: u64,
}

impl Door {
    /// For the sessions of `shared`, each with these limits.
    ///
    /// # Errors
    /// `EMFILE`.
    pub fn new(shared: Shared, limits: Limits) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Self { epoll, shared, limits, silent: HashMap::new(), next: 0 })
    }

    /// Readable when [`Self::run_ready`] has something to do.
    #[must_use]
    pub fn poll_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// When [`Self::run_ready`] is due at the latest.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        self.silent.values().map(|(since, _)| *since + PATIENCE).min()
    }

    /// A connection came.
    pub fn admit(&mut self, socket: OwnedFd) {
        if rustix::io::ioctl_fionbio(&socket, true).is_err() {
            return;
        }
        match begun(&socket) {
            Begun::Silent => {}
            begun => return self.let_in(begun, socket),
        }
        if self.silent.len() >= MAX_SILENT {
            tracing::warn!("too many connections say nothing: one is closed");
            return;
        }
        let id = self.next;
        self.next += 1;
        // Edges: its bytes stay where they are until there are enough.
        let flags = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
        if let Err(error) = epoll::add(&self.epoll, &socket, EventData::new_u64(id), flags) {
            tracing::warn!(%error, "a connection cannot be watched");
            return;
        }
        self.silent.insert(id, (Instant::now(), socket));
    }

    /// Looks at those that said something, and at the clock.
    pub fn run_ready(&mut self) {
        let mut events = Vec::with_capacity(EVENTS);
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let _ = epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&zero));
        for event in events {
            let id = event.data.u64();
            let begun = match self.silent.get(&id).map(|(_, socket)| begun(socket)) {
                None | Some(Begun::Silent) => continue,
                Some(begun) => begun,
            };
            let Some((_, socket)) = self.silent.remove(&id) else { continue };
            // Others have it from here on, and their own events.
            if epoll::delete(&self.epoll, &socket).is_ok() {
                self.let_in(begun, socket);
            }
        }
        let now = Instant::now();
        self.silent.retain(|_, (since, _)| now.saturating_duration_since(*since) < PATIENCE);
    }

    fn let_in(&self, begun: Begun, socket: OwnedFd) {
        match begun {
            Begun::Silent | Begun::Gone => {}
            Begun::Session => self.serve(socket),
            Begun::Stream(ticket) => {
                if let Err(error) = self.shared.claim(ticket, socket) {
                    tracing::info!(%error, "a stream is closed again");
                }
            }
        }
    }

    fn serve(&self, socket: OwnedFd) {
        let (shared, limits) = (self.shared.clone(), self.limits);
        let started = std::thread::Builder::new().name("kso-provider".into()).spawn(move || {
            if let Err(fault) = shared.serve(socket, limits) {
                tracing::warn!(%fault, "a broker is dropped");
            }
        });
        if let Err(error) = started {
            tracing::warn!(%error, "a broker cannot be served");
        }
    }
}

/// Looks at the first bytes, and takes a whole ticket.
fn begun(socket: &OwnedFd) -> Begun {
    let mut bytes = [0; Ticket::SIZE];
    let count = match recv(socket, &mut bytes, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((0, _)) => return Begun::Gone,
        Ok((count, _)) => count,
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Begun::Silent,
        Err(_) => return Begun::Gone,
    };
    let Some(first) = bytes.get(..count).and_then(<[u8]>::first_chunk::<4>) else { return Begun::Silent };
    if !Ticket::is_begun_by(*first) {
        return Begun::Session;
    }
    if count < Ticket::SIZE {
        return Begun::Silent;
    }
    // They are there: this takes as many.
    match (recv(socket, &mut bytes, RecvFlags::DONTWAIT), Ticket::parse(&bytes)) {
        (Ok((Ticket::SIZE, _)), Some(ticket)) => Begun::Stream(ticket),
        _ => Begun::Gone,
    }
}

#[cfg(test)]
mod tests;
