//! The provider's side: takes connections in, one thread for all of them.
//!
//! ```text
//!   accepted --> greeting -- handshake --> waiting -- first bytes --> a control stream, or a ticket: an arrival
//!                   |                         +-- nothing for SILENCE --> closed
//!                   +-- refused: told why --> parting --> closed
//!                   +-- unfinished for HANDSHAKE --> closed
//! ```
//!
//! Who stands here is a stranger: they are bounded in number, for each address and for all; the one that has been here
//! longest goes first. Streams run on another thread and are none the slower for them. Brokers keep some connections
//! waiting that are ready to be used.

use crate::engine::{Broken, Engine};
use crate::greeting::Greeting;
use crate::pump::{Pump, Wake, has_ended, wait};
use crate::tunnel::Tunnel;
use kso_provider::relay::{interest, stream_pair};
use kso_wire::provide::Ticket;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::net::{SocketAddrAny, SocketFlags, acceptfrom_with, sockopt};
use rustls::ServerConfig;
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long a connection may be kept ready and not used. Brokers use or replace theirs sooner.
const SILENCE: Duration = Duration::from_secs(90);
/// How long somebody who is refused has to read why.
const PARTING: Duration = Duration::from_secs(2);
/// Unfinished handshakes of one address.
const MOST_OF_ONE: usize = 128;
/// Connections in one state, of all.
const MOST: usize = 1024;
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 1024;
/// Accepted in one turn, so that those who are here have theirs.
const BATCH: usize = 32;
/// How often those that are late are looked for.
const LOOK: Duration = Duration::from_millis(500);
/// How long nobody is let in when descriptors have run out.
const PAUSE: Duration = Duration::from_millis(100);
/// So many refusals are told one by one in such a time.
const MOST_TOLD: u32 = 10;
const TELL: Duration = Duration::from_secs(5);
/// A control stream whose peer acknowledges nothing for so long is dead: with it go all streams of its session.
const DEAD: u32 = 30_000;
/// Events that are no connection's.
const WAKE: u64 = u64::MAX;
const LISTENER: u64 = u64::MAX - 1;

/// Somebody with a certificate came.
#[derive(Debug)]
pub enum Arrival {
    /// A broker: its control stream, from the first byte.
    Control(OwnedFd, SocketAddr),
    /// A stream, from the first byte after its ticket.
    Stream(Ticket, OwnedFd),
}

/// See the module. Dropped, it is closed; what came through goes on.
#[derive(Debug)]
pub struct Gate {
    shut: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
    wake: Wake,
    thread: Option<JoinHandle<()>>,
}

impl Gate {
    /// Lets in who comes to `listener`; `arrived` is told of each, on the gate's thread, and must not wait.
    ///
    /// # Errors
    /// `EMFILE`, or no more threads.
    pub fn open(
        listener: TcpListener,
        config: Arc<ServerConfig>,
        pump: Arc<Pump>,
        arrived: impl Fn(Arrival) + Send + 'static,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        // Brokers come with many connections at once.
        rustix::net::listen(&listener, BACKLOG)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = Wake::new(&epoll, WAKE)?;
        epoll::add(&epoll, &listener, EventData::new_u64(LISTENER), EventFlags::IN)?;
        let (shut, ended) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let state = Loop {
            epoll,
            wake: wake.clone(),
            listener: Some(listener),
            config,
            pump,
            arrived: Box::new(arrived),
            shut: Arc::clone(&shut),
            ended: Arc::clone(&ended),
            guests: HashMap::new(),
            next: 0,
            pause: None,
            tally: Tally::default(),
        };
        let thread = std::thread::Builder::new().name("kso-gate".into()).spawn(|| state.run())?;
        Ok(Self { shut, ended, wake, thread: Some(thread) })
    }

    /// Takes nobody new in. Connections that wait to be used still can be.
    pub fn shut(&self) {
        self.shut.store(true, Ordering::Relaxed);
        self.wake.wake();
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        self.wake.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Greeting,
    Waiting,
    Parting,
}

struct Guest {
    greeting: Greeting,
    phase: Phase,
    peer: SocketAddr,
    until: Instant,
}

/// What its first bytes make of a connection.
#[derive(Debug, PartialEq, Eq)]
enum Begun {
    Unknown,
    Control,
    Stream(Ticket),
}

fn begun(plain: &[u8]) -> Begun {
    match (plain.first_chunk::<4>(), plain.first_chunk::<{ Ticket::SIZE }>()) {
        (Some(first), _) if !Ticket::is_begun_by(*first) => Begun::Control,
        (_, Some(bytes)) => Ticket::parse(bytes).map_or(Begun::Control, Begun::Stream),
        _ => Begun::Unknown,
    }
}

/// What the log is told of refusals: some, and then how many more there were.
#[derive(Debug, Default)]
struct Tally {
    told: u32,
    untold: u64,
    since: Option<Instant>,
}

impl Tally {
    fn refused(&mut self, peer: SocketAddr, why: &str) {
        self.since.get_or_insert_with(Instant::now);
        if self.told < MOST_TOLD {
            self.told += 1;
            tracing::warn!(%peer, why, "a connection is refused");
        } else {
            self.untold += 1;
        }
    }

    /// Looks at the clock: begins anew when it is time.
    fn look(&mut self, now: Instant) {
        if self.since.is_some_and(|since| since + TELL <= now) {
            if self.untold > 0 {
                tracing::warn!(connections = self.untold, "more were refused");
            }
            *self = Self::default();
        }
    }
}

struct Loop {
    epoll: OwnedFd,
    wake: Wake,
    listener: Option<TcpListener>,
    config: Arc<ServerConfig>,
    pump: Arc<Pump>,
    arrived: Box<dyn Fn(Arrival) + Send>,
    shut: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
    guests: HashMap<u64, Guest>,
    next: u64,
    /// Nobody is let in until then.
    pause: Option<Instant>,
    tally: Tally,
}

impl Loop {
    fn run(mut self) {
        let mut events = Vec::new();
        while !self.ended.load(Ordering::Relaxed) {
            let looks = !self.guests.is_empty() || self.tally.since.is_some();
            let look = looks.then(|| Instant::now() + LOOK);
            wait(&self.epoll, &mut events, self.pause.into_iter().chain(look).min());
            for event in &events {
                match event.data.u64() {
                    WAKE => self.wake.quiet(),
                    LISTENER => self.accept(),
                    id => self.ready(id),
                }
            }
            if self.shut.load(Ordering::Relaxed) {
                self.listener = None;
            }
            self.look(Instant::now());
        }
    }

    /// Looks at the clock.
    fn look(&mut self, now: Instant) {
        self.tally.look(now);
        if self.pause.is_some_and(|until| until <= now) {
            self.pause = None;
            self.watch_listener(EventFlags::IN);
        }
        let late: Vec<u64> =
            self.guests.iter().filter(|(_, guest)| guest.until <= now).map(|(id, _)| *id).collect();
        for id in late {
            let Some(guest) = self.guests.remove(&id) else { continue };
            if guest.phase == Phase::Greeting {
                self.tally.refused(guest.peer, "it did not finish its handshake");
            }
        }
    }

    fn watch_listener(&self, flags: EventFlags) {
        if let Some(listener) = &self.listener {
            let _ = epoll::modify(&self.epoll, listener, EventData::new_u64(LISTENER), flags);
        }
    }

    fn accept(&mut self) {
        for _ in 0..BATCH {
            let Some(listener) = &self.listener else { return };
            match acceptfrom_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok((tcp, peer)) => self.admit(tcp, peer),
                Err(rustix::io::Errno::AGAIN) => return,
                Err(
                    error @ (rustix::io::Errno::MFILE
                    | rustix::io::Errno::NFILE
                    | rustix::io::Errno::NOBUFS
                    | rustix::io::Errno::NOMEM),
                ) => {
                    tracing::warn!(%error, "no connection can be taken in for a moment");
                    self.pause = Some(Instant::now() + PAUSE);
                    self.watch_listener(EventFlags::empty());
                    return;
                }
                // Of the connection, not of the listener (accept(2), "Error handling").
                Err(_) => {}
            }
        }
    }

    fn admit(&mut self, tcp: OwnedFd, peer: Option<SocketAddrAny>) {
        let peer = peer.and_then(|peer| SocketAddr::try_from(peer).ok());
        let peer = peer.unwrap_or_else(|| SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0));
        self.make_room(Phase::Greeting, Some(peer.ip()), MOST_OF_ONE);
        self.make_room(Phase::Greeting, None, MOST);
        let engine = match Engine::server(&self.config) {
            Ok(engine) => engine,
            Err(broken) => return self.tally.refused(peer, &broken.to_string()),
        };
        self.next += 1;
        let id = self.next;
        if let Err(error) = epoll::add(&self.epoll, &tcp, EventData::new_u64(id), interest()) {
            return self.tally.refused(peer, &error.to_string());
        }
        let until = Instant::now() + HANDSHAKE;
        let greeting = Greeting::new(tcp, engine);
        self.guests.insert(id, Guest { greeting, phase: Phase::Greeting, peer, until });
        self.ready(id);
    }

    /// Closes the oldest one of those in a phase (of an address) if there are as many as may be.
    fn make_room(&mut self, phase: Phase, address: Option<IpAddr>, most: usize) {
        let counted =
            |guest: &&Guest| guest.phase == phase && address.is_none_or(|address| guest.peer.ip() == address);
        if self.guests.values().filter(counted).count() < most {
            return;
        }
        let oldest = self.guests.iter().filter(|(_, guest)| counted(guest)).min_by_key(|(id, _)| **id);
        let oldest = oldest.map(|(id, _)| *id);
        if let Some(guest) = oldest.and_then(|id| self.guests.remove(&id)) {
            self.tally.refused(guest.peer, "too many connections are unused or unfinished");
        }
    }

    fn ready(&mut self, id: u64) {
        let Some(guest) = self.guests.get_mut(&id) else { return };
        if guest.phase == Phase::Parting {
            if has_ended(&guest.greeting.tcp) {
                self.guests.remove(&id);
            }
            return;
        }
        match guest.greeting.run(Ticket::SIZE) {
            Ok(false) => {}
            Ok(true) => self.greeted(id),
            Err(broken) => self.refuse(id, &broken),
        }
    }

    fn refuse(&mut self, id: u64, broken: &Broken) {
        let Some(guest) = self.guests.get_mut(&id) else { return };
        let peer = guest.peer;
        match (guest.phase, broken) {
            // A broker that keeps less connections ready, or is gone.
            (Phase::Waiting, Broken::Truncated | Broken::Io(_)) => {
                self.guests.remove(&id);
                return;
            }
            // It shall get to read the alert: closing now, with bytes of its unread, would reset the connection.
            (_, Broken::Tls(_)) => {
                guest.phase = Phase::Parting;
                guest.until = Instant::now() + PARTING;
                let _ = rustix::net::shutdown(&guest.greeting.tcp, rustix::net::Shutdown::Write);
                self.make_room(Phase::Parting, None, MOST);
            }
            _ => {
                self.guests.remove(&id);
            }
        }
        self.tally.refused(peer, &broken.to_string());
    }

    /// The handshake is made.
    fn greeted(&mut self, id: u64) {
        let Some(guest) = self.guests.get_mut(&id) else { return };
        match begun(&guest.greeting.plain) {
            Begun::Unknown if guest.greeting.engine.has_ended() => {
                self.guests.remove(&id);
            }
            Begun::Unknown if guest.phase == Phase::Greeting => {
                guest.phase = Phase::Waiting;
                guest.until = Instant::now() + SILENCE;
                self.make_room(Phase::Waiting, None, MOST);
            }
            Begun::Unknown => {}
            Begun::Control => self.let_in(id, None),
            Begun::Stream(ticket) => self.let_in(id, Some(ticket)),
        }
    }

    fn let_in(&mut self, id: u64, ticket: Option<Ticket>) {
        let Some(Guest { greeting, peer, .. }) = self.guests.remove(&id) else { return };
        let Greeting { tcp, engine, mut plain, .. } = greeting;
        let (own, inner) = match stream_pair() {
            Ok(pair) => pair,
            Err(error) => return self.tally.refused(peer, &error.to_string()),
        };
        let _ = epoll::delete(&self.epoll, &tcp);
        let arrival = match ticket {
            Some(ticket) => {
                plain.drain(..Ticket::SIZE.min(plain.len()));
                Arrival::Stream(ticket, own)
            }
            None => {
                let _ = sockopt::set_tcp_user_timeout(&tcp, DEAD);
                Arrival::Control(own, peer)
            }
        };
        self.pump.join(Tunnel::new(tcp, engine, inner, plain));
        (self.arrived)(arrival);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use kso_wire::provide::StreamId;

    #[test]
    fn the_first_bytes_tell_what_it_is() {
        let ticket = Ticket { session: 7, stream: StreamId(9) };
        let bytes = ticket.bytes();
        for count in 0..Ticket::SIZE {
            assert_eq!(begun(bytes.get(..count).unwrap()), Begun::Unknown, "{count}");
        }
        assert_eq!(begun(&bytes), Begun::Stream(ticket));
        assert_eq!(begun(&[12, 0, 0, 0]), Begun::Control);
        assert_eq!(begun(&[12, 0, 0]), Begun::Unknown);
    }
}
