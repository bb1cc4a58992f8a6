//! All guests of a process behind one descriptor.
//!
//! ```text
//!   run_ready: epoll (VMMs, kicks, sockets) -> transmit (guest to outside) -> receive (outside to guest)
//!        ^                    |                                                     |
//!        +--- polls while traffic flows --------------------------------------------+
//!        then: interrupts that were put off, kicks switched on, sleep
//! ```

use super::guest::{Endpoint, Fault, Guest, RX, TX};
use super::outside::{GuestId, Outside};
use super::sender::Senders;
use super::spin::Spin;
use super::stream::{Phase, Stream};
use super::table::{Far, Id, Table};
use crate::vhost::{Change, FrontEnd};
use kso_wire::guest::StreamKey;
use rustix::event::Timespec;
use rustix::event::epoll::{self, Event, EventData, EventFlags};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Most streams of a guest, unless [`Limits`] says otherwise.
pub const MAX_STREAMS: usize = 65_536;
/// Longest turn of [`Hub::run_ready`]; then the caller's other descriptors have theirs.
const TURN: Duration = Duration::from_micros(500);
/// Longest turn without work.
const IDLE_TURN: Duration = Duration::from_micros(20);
/// How long an interrupt for returned packets may be put off: the guest only wants the memory back.
const PUT_OFF: Duration = Duration::from_millis(10);
/// Events taken at once.
const EVENTS: usize = 128;

/// What a guest may have.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Streams, orphans included.
    pub streams: usize,
    /// Streams that are not open yet.
    pub half_open: usize,
    /// Bytes held for far ends that are slow. Windows are small until a far end proves fast: this is for attacks.
    pub held: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { streams: MAX_STREAMS, half_open: 8192, held: 256 << 20 }
    }
}

/// The vsock device of any number of guests.
pub struct Hub {
    epoll: OwnedFd,
    pub(super) guests: Vec<Option<Guest>>,
    pub(super) table: Table,
    pub(super) limits: Limits,
    /// See [`Hub::pass_resets`].
    pub(super) passes_resets: bool,
    /// Streams whose other end, in a guest too, is gone.
    pub(super) severed: Vec<Id>,
    /// Guests that were given something and not interrupted for it yet.
    pub(super) touched: Vec<usize>,
    /// When to send the interrupts for returned packets that were put off.
    pub(super) interrupts: Option<Instant>,
    /// Closed streams that still hold something, and until when they may.
    pub(super) orphans: VecDeque<(Instant, Id)>,
    /// Threads that send files, and the streams that wait for one.
    pub(super) senders: Senders,
    pub(super) turns: VecDeque<Id>,
    events: Vec<Event>,
    spin: Spin,
}

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hub").field("guests", &self.guests).finish_non_exhaustive()
    }
}

/// What an event of epoll is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    Listener(usize),
    Front(usize),
    Kick(usize),
    Stream(Id),
    Senders,
}

impl Token {
    fn data(self) -> EventData {
        let (tag, high, low) = match self {
            Token::Listener(guest) => (0_u64, 0, guest as u64),
            Token::Front(guest) => (1, 0, guest as u64),
            Token::Kick(guest) => (2, 0, guest as u64),
            Token::Stream(id) => (3, id.generation, id.index.into()),
            Token::Senders => (4, 0, 0),
        };
        EventData::new_u64(tag << 56 | u64::from(high) << 32 | low)
    }

    fn of(data: u64) -> Token {
        let (generation, index) = ((data >> 32) as u32 & 0x00ff_ffff, data as u32);
        match data >> 56 {
            0 => Token::Listener(index as usize),
            1 => Token::Front(index as usize),
            2 => Token::Kick(index as usize),
            4 => Token::Senders,
            _ => Token::Stream(Id { index, generation }),
        }
    }
}

impl Hub {
    /// A hub without guests.
    ///
    /// # Errors
    /// Descriptors ran out.
    pub fn new(limits: Limits) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let spin = Spin::new(Instant::now());
        let senders = Senders::new()?;
        epoll::add(&epoll, senders.event(), Token::Senders.data(), EventFlags::IN)?;
        Ok(Hub {
            epoll,
            guests: Vec::new(),
            table: Table::default(),
            limits,
            passes_resets: false,
            severed: Vec::new(),
            touched: Vec::new(),
            interrupts: None,
            orphans: VecDeque::new(),
            senders,
            turns: VecDeque::new(),
            events: Vec::with_capacity(EVENTS),
            spin,
        })
    }

    /// A unix socket that is closed, not merely shut down, is a stream that was reset: the guest is told so (RST) instead of
    /// the end of the stream.
    pub fn pass_resets(&mut self) {
        self.passes_resets = true;
    }

    /// Becomes readable when [`Self::run_ready`] has something to do.
    #[must_use]
    pub fn poll_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// When to call [`Self::run_ready`] even if nothing is readable. In the past: at once, after a look at other
    /// descriptors.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        if !self.spin.sleeping() {
            return Some(Instant::now());
        }
        let orphan = self.orphans.front().map(|(deadline, _)| *deadline);
        [orphan, self.interrupts].into_iter().flatten().min()
    }

    /// A guest whose VMM comes from `endpoint`.
    ///
    /// # Errors
    /// Descriptors ran out.
    pub fn add_guest(&mut self, endpoint: Endpoint) -> io::Result<GuestId> {
        let vacant = self.guests.iter().position(Option::is_none);
        let index = vacant.unwrap_or(self.guests.len());
        let mut guest = Guest::default();
        match endpoint {
            Endpoint::Listener(listener) => {
                listener.set_nonblocking(true)?;
                self.watch(&listener, Token::Listener(index), EventFlags::IN)?;
                guest.listener = Some(listener);
            }
            Endpoint::Connected(stream) => guest.front = Some(self.front(index, stream)?),
            Endpoint::Queues(rx, tx) => {
                let flags = EventFlags::IN | EventFlags::ET;
                self.watch(rx.kick(), Token::Kick(index), flags)?;
                self.watch(tx.kick(), Token::Kick(index), flags)?;
                (guest.rx, guest.tx) = (Some(Arc::new(rx)), Some(Arc::new(tx)));
                guest.alive = true;
            }
        }
        let id = GuestId(u32::try_from(index).map_err(io::Error::other)?);
        if vacant.is_none() {
            self.guests.push(None);
        }
        if let Some(slot) = self.guests.get_mut(index) {
            *slot = Some(guest);
        }
        Ok(id)
    }

    fn front(&self, index: usize, stream: UnixStream) -> io::Result<FrontEnd> {
        let front = FrontEnd::new(stream, Guest::spec())?;
        self.watch(&front, Token::Front(index), EventFlags::IN)?;
        Ok(front)
    }

    fn watch(&self, fd: impl AsFd, token: Token, flags: EventFlags) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, token.data(), flags)?)
    }

    pub(super) fn watch_socket(&self, socket: &OwnedFd, id: Id) -> io::Result<()> {
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        self.watch(socket, Token::Stream(id), flags)
    }

    /// Drops a guest: its VMM's connection and its streams. [`Outside::gone`] is not called.
    pub fn remove_guest(&mut self, guest: GuestId) {
        let index = guest.0 as usize;
        self.drop_streams(index);
        if let Some(slot) = self.guests.get_mut(index) {
            *slot = None;
        }
    }

    pub(super) fn guest(&mut self, index: usize) -> Option<&mut Guest> {
        self.guests.get_mut(index)?.as_mut()
    }

    /// The socket of a stream, to ask it for options and addresses.
    #[must_use]
    pub fn socket(&self, guest: GuestId, stream: StreamKey) -> Option<BorrowedFd<'_>> {
        let id = self.guests.get(guest.0 as usize)?.as_ref()?.names.get(&stream)?;
        match &self.table.get(*id)?.far {
            Far::Socket(socket) => Some(socket.as_fd()),
            _ => None,
        }
    }

    /// Asks the guest to take a stream from (`stream.peer_cid`, `stream.peer_port`) on its `stream.local_port`:
    /// [`Outside::established`] or [`Outside::rejected`] will tell. What was written to the control output before
    /// goes first.
    ///
    /// # Errors
    /// The socket, if there is no such guest, the name is taken, or there are too many streams.
    pub fn dial(&mut self, guest: GuestId, stream: StreamKey, socket: OwnedFd) -> Result<(), OwnedFd> {
        let index = guest.0 as usize;
        if !self.may_add(index, stream) {
            return Err(socket);
        }
        let id = self.add(index, Stream::dialled(stream), Far::Socket(socket));
        self.consider(id);
        self.wake();
        Ok(())
    }

    /// There is something to do.
    pub(super) fn wake(&mut self) {
        self.spin.wake(Instant::now());
    }

    /// The guest gave up a connection that is under way: it is closed, and nothing is told of it.
    pub fn abandon(&mut self, guest: GuestId, stream: StreamKey) {
        let id = self.guest(guest.0 as usize).and_then(|guest| guest.names.get(&stream).copied());
        let Some(id) = id else { return };
        if self.table.get(id).is_some_and(|entry| entry.stream.phase() == Phase::Opening) {
            self.sever(id);
        }
    }

    /// Drops all that a guest has, as if it had broken the rules. Its device is dead until its VMM resets it.
    pub fn evict(&mut self, guest: GuestId, outside: &mut dyn Outside) {
        self.reset(guest.0 as usize, outside);
    }

    /// Sends what was written to control outputs, and what waits behind it.
    pub fn flush(&mut self, outside: &mut dyn Outside) {
        for index in 0..self.guests.len() {
            self.receive(index, outside);
        }
    }

    /// Does what there is to do, and polls for more while there is traffic; returns after a while in any case.
    pub fn run_ready(&mut self, outside: &mut dyn Outside) {
        let start = Instant::now();
        if self.spin.sleeping() {
            (0..self.guests.len()).for_each(|index| self.suppress(index));
            self.spin.wake(start);
        }
        let mut idle_since = start;
        loop {
            let worked = self.round(outside);
            let now = Instant::now();
            if worked {
                self.spin.worked(now);
                idle_since = now;
                if now.duration_since(start) >= TURN {
                    return;
                }
                continue;
            }
            if self.spin.over(now) {
                let late = self.interrupts.is_some_and(|at| at <= now);
                let awake = (0..self.guests.len()).fold(false, |awake, index| self.rest(index, late) | awake);
                if !awake {
                    let owed = self.guests.iter().flatten().any(|guest| guest.unsignalled > 0);
                    self.interrupts =
                        owed.then(|| self.interrupts.filter(|_| !late).unwrap_or(now + PUT_OFF));
                    self.spin.sleep(now);
                    return;
                }
                if now.duration_since(start) >= TURN {
                    return;
                }
                continue;
            }
            if now.duration_since(idle_since) >= IDLE_TURN || now.duration_since(start) >= TURN {
                return;
            }
            // The VMM's thread that is to interrupt the guest may wait for this very core.
            std::thread::yield_now();
            self.spin.yielded(now, Instant::now());
        }
    }

    fn round(&mut self, outside: &mut dyn Outside) -> bool {
        let mut worked = self.events(outside);
        for index in 0..self.guests.len() {
            worked |= self.transmit(index, outside);
            worked |= self.receive(index, outside);
        }
        self.settle(outside);
        worked
    }

    fn events(&mut self, outside: &mut dyn Outside) -> bool {
        let mut events = std::mem::take(&mut self.events);
        events.clear();
        let none = Timespec::default();
        let buffer = rustix::buffer::spare_capacity(&mut events);
        if epoll::wait(&self.epoll, buffer, Some(&none)).is_err() {
            events.clear();
        }
        let worked = !events.is_empty();
        for event in &events {
            // The structure is packed.
            let (data, flags) = (event.data, event.flags);
            match Token::of(data.u64()) {
                Token::Listener(index) => self.accept(index),
                Token::Front(index) => self.front_ready(index, outside),
                // The queues are looked at in any case.
                Token::Kick(_) => {}
                Token::Stream(id) => self.socket_ready(id, flags, outside),
                Token::Senders => self.threads_ready(outside),
            }
        }
        self.events = events;
        worked
    }

    fn accept(&mut self, index: usize) {
        let Some(guest) = self.guest(index) else { return };
        let Some(Ok((stream, _))) = guest.listener.as_ref().map(std::os::unix::net::UnixListener::accept)
        else {
            return;
        };
        if guest.front.is_some() {
            tracing::warn!(
                guest = index,
                "a second VMM came to the socket of a guest's vsock device: refused"
            );
            return;
        }
        match self.front(index, stream) {
            Ok(front) => {
                if let Some(guest) = self.guest(index) {
                    guest.front = Some(front);
                }
            }
            Err(error) => tracing::warn!(guest = index, %error, "a VMM could not be served"),
        }
    }

    fn front_ready(&mut self, index: usize, outside: &mut dyn Outside) {
        // What the guest sent before its VMM stops is still to go out.
        self.transmit(index, outside);
        let Some(front) = self.guest(index).and_then(|guest| guest.front.as_mut()) else { return };
        let (changes, over) = match front.handle() {
            Ok(changes) => (changes, None),
            Err(error) => (front.close(), Some(error)),
        };
        for change in changes {
            self.changed(index, change, outside);
        }
        if let Some(error) = over {
            tracing::debug!(guest = index, %error, "the VMM of a guest's vsock device is gone");
            self.reset(index, outside);
            if let Some(guest) = self.guest(index) {
                guest.front = None;
            }
        }
    }

    fn changed(&mut self, index: usize, change: Change, outside: &mut dyn Outside) {
        match change {
            Change::Started(which @ (RX | TX), queue) => {
                let flags = EventFlags::IN | EventFlags::ET;
                if let Err(error) = self.watch(queue.kick(), Token::Kick(index), flags) {
                    tracing::warn!(guest = index, %error, "a queue of a guest cannot be watched");
                    return;
                }
                let Some(guest) = self.guest(index) else { return };
                guest.alive = true;
                *(if which == RX { &mut guest.rx } else { &mut guest.tx }) = Some(queue);
            }
            Change::Stopped(RX | TX) => self.reset(index, outside),
            Change::Started(..) | Change::Stopped(_) => {}
        }
    }

    /// The guest's device starts anew, or never again.
    pub(super) fn reset(&mut self, index: usize, outside: &mut dyn Outside) {
        self.drop_streams(index);
        let Some(guest) = self.guest(index) else { return };
        (guest.rx, guest.tx) = (None, None);
        if std::mem::take(&mut guest.alive) {
            outside.gone(GuestId(u32::try_from(index).unwrap_or(u32::MAX)));
        }
    }

    pub(super) fn fault(&mut self, index: usize, fault: &Fault, outside: &mut dyn Outside) {
        tracing::warn!(guest = index, %fault, "a guest broke the rules of vsock: its streams are dropped");
        self.reset(index, outside);
    }

    /// Kicks are not needed while it is polled.
    fn suppress(&mut self, index: usize) {
        let Some(guest) = self.guest(index) else { return };
        for queue in [&guest.tx, &guest.rx].into_iter().flatten() {
            if let Some(mut ring) = queue.lock() {
                // If it cannot be written, the next look at it says so.
                let _ = ring.suppress_kicks();
            }
        }
    }

    /// Before sleeping: interrupts that were put off for long, and kicks on. True: there is something to do after all.
    fn rest(&mut self, index: usize, late: bool) -> bool {
        let blocked = self.blocked(index);
        let Some(guest) = self.guest(index) else { return false };
        let mut awake = false;
        if let Some(mut ring) = guest.tx.as_ref().and_then(|queue| queue.lock()) {
            if late && std::mem::take(&mut guest.unsignalled) > 0 {
                let _ = ring.signal();
            }
            awake |= !blocked && ring.await_kicks().unwrap_or(false);
        }
        if guest.starved
            && let Some(mut ring) = guest.rx.as_ref().and_then(|queue| queue.lock())
        {
            awake |= ring.await_kicks().unwrap_or(false);
        }
        awake
    }
}

pub(super) fn guest_id(index: usize) -> GuestId {
    GuestId(u32::try_from(index).unwrap_or(u32::MAX))
}
