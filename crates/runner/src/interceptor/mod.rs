//! Answers the system calls that the filter hands over.
//!
//! ```text
//!  connect --- not TCP, or stays inside ----------------------------> CONTINUE
//!     |
//!     +------- broker: a host socket whose connection is under way
//!                 |  swap it in: under every descriptor, with its epoll registrations
//!                 +-- the program's socket blocks --> CONTINUE: the kernel waits for the connection
//!                 +-- it does not -----------------> EINPROGRESS
//!  listen ---- not published ---------------------------------------> CONTINUE
//!     +------- broker: a host listener; swap it in -----------------> 0
//! ```
//!
//! A `connect` on a socket whose connection is under way only waits for it, whatever address it names
//! (`__inet_stream_connect` in net/ipv4/af_inet.c): so time-outs, signals and errors are the kernel's own, and
//! nothing is kept here for a connection. CONTINUE is never what policy rests on: a sandbox has no way out but
//! the TUN, and each host socket that a program holds is locked to what was approved (`kso_sys::lock`).
//!
//! All of it runs on one thread, which must be the process's first (the twin of `carry` reads its descriptors),
//! and nothing in it waits.

pub(crate) mod carry;
mod connect;
mod filter;
mod listen;
mod swap;
pub(crate) mod threads;

pub(crate) use connect::{CLOSED, NAME_SERVICE, bound_address};
pub use filter::rules;

use kso_sys::notify::{Listener, Notification, Response};
use kso_sys::options::Defaults;
use kso_sys::{RawAddress, numbers, remote};
use kso_wire::{
    Answer, BrokerLink, Caller, Errno, Family, LoopbackMode, MAX_PENDING, Request, RequestId, SocketOptions,
    Submitted, TunAddresses,
};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use threads::{EpollTable, Threads};

/// So many sockets with several descriptors are remembered.
const MAX_DUPLICATED: usize = 1024;
/// So many sockets with rare options are remembered; with more, every socket is read in full.
const MAX_TUNED: usize = 1024;
/// So many listeners are remembered for `getsockname`.
const MAX_LISTENERS: usize = 1024;
/// So many interrupted calls are remembered.
const MAX_INTERRUPTED: usize = 64;

/// What is published of a sandbox's TCP ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Publishing {
    /// Nothing.
    Nothing,
    /// Some ports.
    Ports,
    /// Each port on which a program listens.
    Everything,
}

/// What the interceptor has to know of its sandbox.
#[derive(Debug)]
pub struct InterceptorConfig {
    /// Its addresses.
    pub tun: TunAddresses,
    /// Where its loopback is.
    pub loopback: LoopbackMode,
    /// What is published.
    pub publishing: Publishing,
    /// `SO_NETNS_COOKIE` of the sandbox's network.
    pub netns: u64,
    /// Options of its fresh TCP sockets: IPv4, IPv6.
    pub defaults: [Defaults; 2],
}

/// What to do with a call now.
enum Outcome {
    /// Answer it.
    Respond(Response),
    /// The broker will answer.
    Later,
    /// Its caller is gone.
    Gone,
}

impl Outcome {
    const CONTINUE: Self = Self::Respond(Response::Continue);

    fn error(errno: Errno) -> Self {
        Self::Respond(Response::Error(kso_sys::errno::to_raw(errno)))
    }
}

/// A call that was taken apart: who, on which socket.
struct Call {
    notification: Notification,
    /// The program's number of the socket.
    number: i32,
    /// Our copy of its descriptor.
    socket: OwnedFd,
    family: Family,
    /// Its address, all zero if it has none.
    local: SocketAddr,
    /// The state that it had when the call was taken apart (`kso_sys::tcp_state`).
    state: u8,
}

impl Call {
    /// The address the program bound, if it did.
    fn bound(&self) -> Option<SocketAddr> {
        (self.local.port() != 0 || !self.local.ip().is_unspecified()).then_some(self.local)
    }
}

/// What a broker's answer is for.
enum Purpose {
    Connect,
    Listen { inner: SocketAddr },
    Reserve { wanted: SocketAddr },
}

struct Pending {
    call: Call,
    purpose: Purpose,
}

/// A listener that was swapped: what the program calls it, what it is outside.
struct Translation {
    cookie: u64,
    inner: SocketAddr,
    outer: SocketAddr,
}

/// See the module's documentation.
pub struct Interceptor {
    listener: Listener,
    config: InterceptorConfig,
    threads: Threads,
    epolls: EpollTable,
    /// Cookies of sockets that have several descriptors and are not swapped yet.
    duplicated: VecDeque<u64>,
    /// Cookies of sockets on which rare options were set and that are not swapped yet.
    tuned: VecDeque<u64>,
    /// Some fell out of [`Self::tuned`].
    tuned_overflow: bool,
    /// Cookies of swapped sockets whose caller was interrupted before it heard `EINPROGRESS`.
    interrupted: VecDeque<u64>,
    translations: VecDeque<Translation>,
    reservations: listen::Reservations,
    pending: HashMap<RequestId, Pending>,
    next_request: u64,
    twin: Option<carry::Twin>,
}

impl Interceptor {
    /// An interceptor for the filter behind `listener`.
    ///
    /// # Errors
    /// `EMFILE`.
    pub fn new(listener: OwnedFd, config: InterceptorConfig) -> io::Result<Self> {
        let listener = Listener::new(listener);
        if !listener.synchronous_wake_up() {
            tracing::debug!("this kernel has no synchronous wake-up of supervisors (Linux 6.6 has)");
        }
        Ok(Self {
            listener,
            config,
            threads: Threads::default(),
            epolls: EpollTable::default(),
            duplicated: VecDeque::new(),
            tuned: VecDeque::new(),
            tuned_overflow: false,
            interrupted: VecDeque::new(),
            translations: VecDeque::new(),
            reservations: listen::Reservations::new()?,
            pending: HashMap::new(),
            next_request: 0,
            twin: None,
        })
    }

    /// Readable when a call waits. Poll it directly (not through epoll): then the kernel can hand over on the
    /// caller's core.
    pub fn poll_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Answers one call that waits. One at a time, so that nothing else of the loop starves.
    pub fn serve(&mut self, link: &mut dyn BrokerLink) {
        match self.listener.receive() {
            Ok(Some(notification)) => self.handle(notification, link),
            Ok(None) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => tracing::warn!(%error, "cannot receive a notification"),
        }
    }

    /// Takes an answer of the broker that came late.
    pub fn answered(&mut self, id: RequestId, answer: Answer) {
        let Some(Pending { call, purpose }) = self.pending.remove(&id) else { return };
        let notification = call.notification;
        // Others may have pushed it out of the table meanwhile.
        let known = self.threads.get(notification.tid).map(drop);
        let outcome = known.map_or(Outcome::CONTINUE, |()| self.conclude(&call, &purpose, answer));
        self.respond(notification, &outcome);
    }

    /// When [`Self::expire`] is due.
    pub fn next_deadline(&self) -> Option<std::time::Instant> {
        self.threads.next_deadline()
    }

    /// Forgets what has ended.
    pub fn expire(&mut self) {
        self.threads.forget_ended();
    }

    fn handle(&mut self, notification: Notification, link: &mut dyn BrokerLink) {
        let outcome = match notification.call {
            numbers::CONNECT => self.connect(notification, link),
            numbers::LISTEN => self.listen(notification, link),
            numbers::BIND => self.bind(notification, link),
            numbers::GETSOCKNAME => self.getsockname(notification),
            numbers::SETSOCKOPT => self.tune(notification),
            numbers::EPOLL_CREATE1 => self.epoll_made(notification),
            #[cfg(target_arch = "x86_64")]
            numbers::EPOLL_CREATE => self.epoll_made(notification),
            // dup, dup2, dup3, fcntl(F_DUPFD): the first argument is the descriptor.
            _ => self.duplicate(notification),
        };
        // A target that vanished, or that cannot be looked into, gets what its own kernel says.
        let outcome = outcome.unwrap_or(Outcome::CONTINUE);
        self.respond(notification, &outcome);
    }

    fn respond(&self, notification: Notification, outcome: &Outcome) {
        if let Outcome::Respond(response) = *outcome
            && self.listener.respond(notification.id, response).is_err()
        {
            // It calls again, or does not care.
            tracing::trace!(tid = notification.tid, "the caller was interrupted");
        }
    }

    /// The socket that a call names as its first argument, if it is a TCP socket.
    fn tcp_socket(&mut self, notification: Notification) -> io::Result<Option<Call>> {
        let number = notification.args[0] as i32;
        let tid = notification.tid;
        let socket = match remote::take_descriptor(self.threads.unchecked(tid)?.descriptor(), number) {
            Err(error) if error.raw_os_error() == Some(numbers::ESRCH) => {
                remote::take_descriptor(self.threads.get(tid)?.descriptor(), number)?
            }
            taken => taken?,
        };
        // An address tells the family too, bound or not.
        let Ok(RawAddress::Inet(local)) = kso_sys::local_address(socket.as_fd()) else { return Ok(None) };
        let family = if local.is_ipv4() { Family::V4 } else { Family::V6 };
        // Only TCP has a state; asking for it tells the protocol too.
        let state = kso_sys::tcp_state(socket.as_fd()).ok();
        Ok(state.map(|state| Call { notification, number, socket, family, local, state }))
    }

    /// Whether a socket is of another network than the sandbox's: it was swapped.
    fn is_swapped(&self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        Ok(kso_sys::netns_cookie(socket)? != self.config.netns)
    }

    fn defaults(&self, family: Family) -> &Defaults {
        let [v4, v6] = &self.config.defaults;
        match family {
            Family::V4 => v4,
            Family::V6 => v6,
        }
    }

    /// Asks the broker, and concludes the call if it answers at once.
    fn ask(
        &mut self,
        call: Call,
        purpose: Purpose,
        request: Request,
        link: &mut dyn BrokerLink,
    ) -> io::Result<Outcome> {
        if self.pending.len() >= MAX_PENDING {
            return Ok(Outcome::error(Errno::ENOBUFS));
        }
        // What was read from memory came from this caller only if it waits still.
        if !self.listener.is_valid(call.notification.id) {
            return Ok(Outcome::Gone);
        }
        let tid = call.notification.tid;
        let program = if link.wants_program() { threads::name_of(tid) } else { String::new() };
        let caller = Caller { pid: self.threads.again(tid)?.process, program };
        self.next_request += 1;
        let id = RequestId::interceptor(self.next_request);
        Ok(match link.submit(id, &caller, request) {
            Submitted::Done(answer) => {
                let outcome = self.conclude(&call, &purpose, answer);
                // A port that it holds inside must be free as soon as the program closes the socket.
                if call.bound().is_none() {
                    link.discard(call.socket);
                }
                outcome
            }
            Submitted::Pending => {
                self.pending.insert(id, Pending { call, purpose });
                Outcome::Later
            }
        })
    }

    fn conclude(&mut self, call: &Call, purpose: &Purpose, answer: Answer) -> Outcome {
        let result = match purpose {
            Purpose::Connect => self.connected(call, answer),
            Purpose::Listen { inner } => self.listening(call, *inner, answer),
            Purpose::Reserve { wanted } => self.reserved(call, *wanted, answer),
        };
        result.unwrap_or_else(|error| {
            // Unswapped, the socket goes by the TUN: slower, but under the same policy.
            tracing::debug!(%error, tid = call.notification.tid, "a socket could not be swapped");
            Outcome::CONTINUE
        })
    }

    /// Remembers that a socket has several descriptors, if it could be swapped later.
    fn duplicate(&mut self, notification: Notification) -> io::Result<Outcome> {
        let number = notification.args[0] as i32;
        let process = self.threads.get(notification.tid)?.process;
        if self.epolls.contains(process, number) {
            self.epolls.changed(process);
        }
        if let Some(cookie) = self.outsourceable(notification)? {
            remember(&mut self.duplicated, cookie, MAX_DUPLICATED);
        }
        Ok(Outcome::CONTINUE)
    }

    /// Remembers that a socket has options that are rarely set.
    fn tune(&mut self, notification: Notification) -> io::Result<Outcome> {
        if let Some(cookie) = self.outsourceable(notification)? {
            self.tuned_overflow |= self.tuned.len() >= MAX_TUNED;
            remember(&mut self.tuned, cookie, MAX_TUNED);
        }
        Ok(Outcome::CONTINUE)
    }

    /// The cookie of the socket that a call names, if it may be swapped later.
    fn outsourceable(&mut self, notification: Notification) -> io::Result<Option<u64>> {
        let Some(call) = self.tcp_socket(notification)? else { return Ok(None) };
        let socket = call.socket.as_fd();
        let fresh = call.state == connect::CLOSED && !self.is_swapped(socket)?;
        if fresh { kso_sys::cookie(socket).map(Some) } else { Ok(None) }
    }

    /// The options of a call's socket that a fresh one does not have.
    fn options(&mut self, call: &Call, swapped: bool) -> io::Result<SocketOptions> {
        let socket = call.socket.as_fd();
        // A swapped socket may have been tuned since, and is not remembered.
        let all = swapped
            || self.tuned_overflow
            || (!self.tuned.is_empty() && recall(&mut self.tuned, &kso_sys::cookie(socket)?));
        Ok(kso_sys::options::read(socket, self.defaults(call.family), all))
    }

    fn epoll_made(&mut self, notification: Notification) -> io::Result<Outcome> {
        let process = self.threads.get(notification.tid)?.process;
        self.epolls.changed(process);
        Ok(Outcome::CONTINUE)
    }
}

/// Adds to a bounded queue: the oldest falls out.
fn remember<T: PartialEq>(queue: &mut VecDeque<T>, value: T, limit: usize) {
    if !queue.contains(&value) {
        if queue.len() >= limit {
            queue.pop_front();
        }
        queue.push_back(value);
    }
}

/// Takes out of such a queue. Whether it was there.
fn recall<T: PartialEq>(queue: &mut VecDeque<T>, value: &T) -> bool {
    let before = queue.len();
    queue.retain(|other| other != value);
    queue.len() != before
}
