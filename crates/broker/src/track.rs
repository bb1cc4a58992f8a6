//! What connections carried, told by the kernel when they end.
//!
//! Data paths are native, so nothing here sees a byte of them. While somebody watches, the kernel's
//! notifications of sockets that end (`kso_provider::diagnostics`) are matched by socket cookie with the
//! connections that were opened. Connections *to* published listeners are accepted natively, too: they are
//! found by a look at the kernel's sockets now and then, or, when they were shorter than that, by their end.
//!
//! ```text
//!   opened --> tracked -- its end --> Closed
//!   a look --> Accept, tracked -- its end --> Closed
//!   an end at a listener of ours, not tracked --> Accept, Closed
//! ```

use crate::session::Session;
use kso_core::event::{self, Direction, Kind};
use kso_provider::diagnostics::{self, Ends, Socket};
use kso_provider::stream::Holder;
use kso_wire::{Caller, Errno};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::{HashMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

/// At most so many connections are tracked; the ends of others are not told.
const MAX_TRACKED: usize = 65_536;
/// Time between looks.
const LOOK: Duration = Duration::from_millis(250);
/// Least time between looks for connections whose ends were lost.
const PRUNE: Duration = Duration::from_secs(10);
/// A connection attempt that ended after this time without an answer timed out; before, the program gave up
/// (`tcp_syn_retries`, tcp(7): 127 s by default, programs set less).
const PATIENCE: Duration = Duration::from_secs(20);

/// A connection whose end is awaited.
#[derive(Clone, Debug)]
pub(crate) struct Tracked {
    pub session: u64,
    pub caller: Caller,
    peer: SocketAddr,
    names: Vec<String>,
    local: Option<SocketAddr>,
    direction: Direction,
    since: Instant,
}

impl Tracked {
    pub fn out(
        session: u64,
        caller: &Caller,
        peer: SocketAddr,
        names: &[String],
        local: Option<SocketAddr>,
    ) -> Self {
        let (caller, names) = (caller.clone(), names.to_vec());
        Self { session, caller, peer, names, local, direction: Direction::Out, since: Instant::now() }
    }

    fn accepted(session: u64, socket: &Socket) -> Self {
        Self {
            session,
            caller: Caller::default(),
            peer: plain(socket.peer),
            names: Vec::new(),
            local: Some(plain(socket.local)),
            direction: Direction::In,
            since: Instant::now(),
        }
    }

    /// It was shorter than the time between looks: how short, nobody knows.
    fn closed_unseen(self, socket: &Socket) -> Seen {
        self.ended(socket, Duration::ZERO)
    }

    fn closed(self, socket: &Socket) -> Seen {
        let lasted = self.since.elapsed();
        self.ended(socket, lasted)
    }

    fn ended(self, socket: &Socket, lasted: Duration) -> Seen {
        let traffic = socket.traffic;
        let error = match (self.direction, traffic.established) {
            (Direction::In, _) | (_, true) => None,
            _ if traffic.segments_in > 0 => Some(Errno::ECONNREFUSED),
            _ if lasted >= PATIENCE => Some(Errno::ETIMEDOUT),
            _ => Some(Errno::ECONNABORTED),
        };
        let kind = Kind::Closed(event::Closed {
            peer: self.peer,
            names: self.names,
            local: self.local,
            direction: self.direction,
            bytes_in: traffic.bytes_in,
            bytes_out: traffic.bytes_out,
            duration_us: lasted.into(),
            error,
        });
        Seen { session: self.session, caller: self.caller, kind }
    }
}

/// Something to tell.
pub(crate) struct Seen {
    pub session: u64,
    pub caller: Caller,
    pub kind: Kind,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Track {
    ends: Option<Ends>,
    by_cookie: HashMap<u64, Tracked>,
    next_look: Option<Instant>,
    pruned: Option<Instant>,
}

impl Track {
    /// Begins to listen to the kernel, and, if events are told one by one (`look`), to look at its sockets.
    /// What it returns is polled from now on.
    pub fn start(&mut self, look: bool) -> io::Result<Option<BorrowedFd<'_>>> {
        self.next_look = look.then(|| self.next_look.unwrap_or_else(Instant::now));
        if self.ends.is_some() {
            return Ok(None);
        }
        let ends = self.ends.insert(Ends::subscribe()?);
        Ok(Some(ends.poll_fd()))
    }

    /// Nobody watches any more.
    pub fn stop(&mut self) {
        *self = Self::default();
    }

    pub fn next_deadline(&self) -> Option<Instant> {
        self.next_look
    }

    pub fn add(&mut self, cookie: u64, tracked: Tracked) {
        if self.ends.is_none() {
            return;
        }
        if self.by_cookie.len() >= MAX_TRACKED {
            self.prune();
        }
        if self.by_cookie.len() < MAX_TRACKED {
            self.by_cookie.insert(cookie, tracked);
        }
    }

    /// Forgets connections whose ends were not told.
    fn prune(&mut self) {
        let now = Instant::now();
        if self.pruned.is_some_and(|last| now.duration_since(last) < PRUNE) {
            return;
        }
        self.pruned = Some(now);
        let mut live = HashSet::new();
        let looked = diagnostics::sockets(|socket| {
            live.insert(socket.cookie);
        });
        if looked.is_ok() {
            self.by_cookie.retain(|cookie, _| live.contains(cookie));
        }
    }

    /// Waits a moment for the ends of what a session had open: the kernel tells them a little later
    /// (sock_diag_broadcast_destroy queues them).
    pub fn linger(&self, session: u64, until: Instant) -> bool {
        let Some(ends) = &self.ends else { return false };
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() || !self.by_cookie.values().any(|tracked| tracked.session == session) {
            return false;
        }
        let mut polled = [PollFd::from_borrowed_fd(ends.poll_fd(), PollFlags::IN)];
        let timeout = Timespec { tv_sec: 0, tv_nsec: left.subsec_nanos().into() };
        matches!(poll(&mut polled, Some(&timeout)), Ok(1))
    }

    /// Reads the ends that the kernel told.
    pub fn run_ready(&mut self, sessions: &HashMap<u64, Session>, seen: &mut Vec<Seen>) {
        let Some(ends) = &mut self.ends else { return };
        let by_cookie = &mut self.by_cookie;
        let result = ends.run_ready(|socket| {
            if let Some(tracked) = by_cookie.remove(&socket.cookie) {
                seen.push(tracked.closed(&socket));
            } else if socket.traffic.established
                && let Some(session) = listener_of(sessions, &socket)
            {
                let tracked = Tracked::accepted(session, &socket);
                seen.push(accept(&tracked));
                seen.push(tracked.closed_unseen(&socket));
            }
        });
        if let Err(error) = result {
            tracing::debug!(%error, "ends of connections were not told");
            self.prune();
        }
    }

    /// Looks for connections that came in, when it is time.
    pub fn look(&mut self, sessions: &HashMap<u64, Session>, now: Instant, seen: &mut Vec<Seen>) {
        if self.next_look.is_none_or(|next| next > now) {
            return;
        }
        self.next_look = Some(now + LOOK);
        if sessions.values().all(|session| session.listeners.is_empty()) {
            return;
        }
        let result = diagnostics::sockets(|socket| {
            if socket.listens()
                || self.by_cookie.contains_key(&socket.cookie)
                || self.by_cookie.len() >= MAX_TRACKED
            {
                return;
            }
            if let Some(session) = listener_of(sessions, &socket) {
                let tracked = Tracked::accepted(session, &socket);
                seen.push(accept(&tracked));
                self.by_cookie.insert(socket.cookie, tracked);
            }
        });
        if let Err(error) = result {
            tracing::debug!(%error, "the kernel's sockets cannot be read");
        }
    }
}

fn accept(tracked: &Tracked) -> Seen {
    let local = tracked.local.unwrap_or(tracked.peer);
    let kind = Kind::Accept(event::Accept { local, peer: tracked.peer });
    Seen { session: tracked.session, caller: Caller::default(), kind }
}

/// The session at whose listener a connection came in.
fn listener_of(sessions: &HashMap<u64, Session>, socket: &Socket) -> Option<u64> {
    if socket.peer.port() == 0 {
        return None;
    }
    let local = plain(socket.local);
    let serves = |outer: SocketAddr| {
        let ip = outer.ip().to_canonical();
        outer.port() == local.port() && (ip.is_unspecified() || ip == local.ip())
    };
    sessions
        .values()
        // What comes to a guest is told by its device.
        .filter(|session| session.holder == Holder::Program)
        .find(|session| session.listeners.known().iter().any(|one| serves(one.outer)))
        .map(|session| session.id)
}

/// Without the mapping that a dual-stack socket shows.
fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
