//! The back end of a microVM's guest: an outsourced socket is an AF_VSOCK stream.
//!
//! ```text
//!  connect --- stays inside ----------------------------------------> CONTINUE
//!     |------- to a published listener inside: vsock loopback
//!     +------- outside: Prepare to the control stream, connect a vsock socket, swap it in
//!                 +-- the program's socket does not block ----------> EINPROGRESS
//!                 +-- it blocks: held until Established ------------> 0
//!                                        or Failed -----------------> the true errno
//!  listen ---- not published ---------------------------------------> CONTINUE
//!     +------- a vsock listener, Ask Listen; swap it in ------------> 0
//!  accept, with a place for the address ----------------------------> accepted here, handed over
//!  sendfile, from a file of the host's -----------------------------> done by the host
//!  getsockname, getpeername, getsockopt, setsockopt, FIONREAD ------> answered as TCP would
//! ```
//!
//! All of it runs on one thread, which must be the process's first, and nothing in it waits: a call that does is held
//! (`held`) while others are served. Helper threads begin connections (`connector` says why). Nothing is kept
//! for a connection; what is remembered of some for a while has a bound (`recent`, `peers`), and a vsock port tells
//! the rest (`ports`).
//!
//! CONTINUE is never what policy rests on: what a program reaches past the runner is a vsock stream to an address that the
//! broker decides on all the same, or the TUN.

mod accept;
mod answers;
mod connect;
mod connector;
mod control;
mod filter;
mod held;
mod listen;
mod names;
mod options;
mod packets;
mod peers;
mod ports;
mod recent;
mod run;
mod sendfile;
mod shares;
mod signals;
mod stock;
mod underway;
mod watch;

pub use filter::rules;

use crate::descriptors::{Descriptors, Target, recall, remember};
use crate::interceptor::Publishing;
use control::Control;
use kso_sys::notify::{Listener, Notification, Response};
use kso_sys::options::Defaults;
use kso_sys::tun::Tun;
use kso_sys::{MAX_ADDRESS, RawAddress, address_from_raw, numbers, remote, vsock};
use kso_wire::guest::{GuestRequest, ToHost};
use kso_wire::{
    Caller, Errno, Family, LoopbackMode, MAX_PENDING, Network, Protocol, Publication, SocketOptions,
    TunAddresses,
};
use rustix::event::epoll;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

/// So many sockets with rare options are remembered; with more, every socket is read in full.
const MAX_TUNED: usize = 1024;

/// What the runner has to know of its guest.
#[derive(Debug)]
pub struct GuestConfig {
    /// Its addresses.
    pub tun: TunAddresses,
    /// Where its loopback is.
    pub loopback: LoopbackMode,
    /// What is published.
    pub publish: Vec<Publication>,
    /// Networks to which connections stay inside.
    pub inside: Vec<Network>,
    /// Options of fresh TCP sockets: IPv4, IPv6.
    pub defaults: [Defaults; 2],
    /// The VMM's vsock device carries CID 2 only (Firecracker): connections go by the TUN, published listeners by
    /// vsock.
    pub hybrid: bool,
}

impl GuestConfig {
    /// What is published of TCP ports.
    #[must_use]
    pub fn publishing(publish: &[Publication], loopback: LoopbackMode) -> Publishing {
        if loopback == LoopbackMode::External {
            return Publishing::Everything;
        }
        let tcp = || publish.iter().filter(|publication| publication.protocol == Protocol::Tcp);
        if tcp().next().is_none() {
            Publishing::Nothing
        } else if tcp().any(|publication| publication.inner_port == 0) {
            Publishing::Everything
        } else {
            Publishing::Ports
        }
    }
}

/// The descriptors that a guest's init hands to its runner.
#[derive(Debug)]
pub struct GuestStreams {
    /// The filter's notifier (of the filter of [`rules`]).
    pub notifier: OwnedFd,
    /// Connected to [`kso_wire::guest::ports::CONTROL`].
    pub control: OwnedFd,
    /// The TUN, with virtio-net headers if it can, and a stream that is connected to
    /// [`kso_wire::guest::ports::PACKETS`]. Without them the guest has no datagrams, echo and names.
    pub packets: Option<(Tun, OwnedFd)>,
}

/// What to do with a call now.
enum Outcome {
    /// Answer it.
    Respond(Response),
    /// It is held, answered already, or its caller is gone.
    Later,
}

impl Outcome {
    const CONTINUE: Self = Self::Respond(Response::Continue);
    const DONE: Self = Self::Respond(Response::Value(0));

    fn error(errno: Errno) -> Self {
        Self::Respond(Response::Error(kso_sys::errno::to_raw(errno)))
    }
}

/// The socket of a call, told apart.
enum Kind {
    /// The guest's own TCP: family and state.
    Tcp(Family, u8),
    /// Outsourced: its vsock port.
    Vsock(u32),
    /// Anything else.
    Other,
}

/// What may be done about a connection.
enum Route {
    /// The guest's kernel makes it.
    Inside,
    /// To a published listener inside, by its vsock port.
    Published(u32),
    /// The broker decides.
    Outside,
}

/// See the module's documentation.
pub struct GuestRunner {
    notifier: Listener,
    config: GuestConfig,
    publishing: Publishing,
    control: Control,
    packets: packets::Packets,
    descriptors: Descriptors,
    connector: connector::Connector,
    ports: ports::Ports,
    stock: stock::Stock,
    peers: peers::Peers,
    recent: recent::Recent,
    failures: recent::Failures,
    underway: underway::Underway,
    listeners: watch::Watch<listen::Published>,
    reservations: watch::Watch<SocketAddr>,
    /// Cookies of TCP sockets on which options were set: on others only those that are set unseen are read.
    tuned: VecDeque<u64>,
    /// Some fell out of [`Self::tuned`].
    tuned_overflow: bool,
    /// Calls that wait for an answer of the broker, by its request's name.
    asked: HashMap<u64, answers::Asked>,
    next_request: u64,
    /// Calls that wait for a connection, by its vsock port.
    connecting: HashMap<u32, Vec<held::Connecting>>,
    /// Calls that wait for a connection to accept, by their listener's vsock port.
    accepting: HashMap<u32, accept::Queue>,
    /// Connections that were taken for a caller before the broker said whose they are, by the listener's vsock port and
    /// the VMM's.
    unnamed: HashMap<(u32, u32), accept::Unnamed>,
    /// `sendfile`s that the host performs, by their request's name.
    sending: HashMap<u64, sendfile::Sending>,
    /// It does, and this kernel lets it.
    sends_files: bool,
    shares: shares::Shares,
    /// Watches what held calls wait for.
    events: OwnedFd,
    /// When callers that wait are looked at next.
    look_at: Option<Instant>,
    /// When closed listeners are looked for next.
    sweep_at: Option<Instant>,
    supervising: bool,
    next_look: u32,
    /// Looks since anything happened to a caller that waits.
    quiet: u32,
    /// The control stream was seen to be lost.
    lost: bool,
    /// Until then the control stream is not looked at, unless a call waits for what it brings.
    rest_until: Option<Instant>,
    /// Where FIONREAD peeks; made when it is first asked for.
    peeked: Vec<u8>,
}

impl GuestRunner {
    /// Introduces the guest to the broker and waits until it is welcome.
    ///
    /// # Errors
    /// The broker refuses, is of another version, or does not answer; `EMFILE`.
    pub fn new(streams: GuestStreams, config: GuestConfig) -> io::Result<Self> {
        let notifier = Listener::new(streams.notifier);
        notifier.synchronous_wake_up();
        let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let segments = streams.packets.as_ref().is_some_and(|(tun, _)| tun.segments_datagrams());
        let control = Control::open(streams.control, segments)?;
        Ok(Self {
            notifier,
            publishing: GuestConfig::publishing(&config.publish, config.loopback),
            config,
            control,
            packets: packets::Packets::new(streams.packets),
            descriptors: Descriptors::default(),
            connector: connector::Connector::default(),
            ports: ports::Ports::default(),
            stock: stock::Stock::default(),
            peers: peers::Peers::default(),
            recent: recent::Recent::default(),
            failures: recent::Failures::default(),
            underway: underway::Underway::default(),
            listeners: watch::Watch::new()?,
            reservations: watch::Watch::new()?,
            tuned: VecDeque::new(),
            tuned_overflow: false,
            asked: HashMap::new(),
            next_request: 0,
            connecting: HashMap::new(),
            accepting: HashMap::new(),
            unnamed: HashMap::new(),
            sending: HashMap::new(),
            sends_files: sendfile::can_hold(&rustix::system::uname().release().to_string_lossy()),
            shares: shares::Shares::default(),
            events,
            look_at: None,
            sweep_at: None,
            supervising: true,
            next_look: 0,
            quiet: 0,
            lost: false,
            rest_until: None,
            peeked: Vec::new(),
        })
    }

    fn handle(&mut self, notification: Notification) {
        let outcome = match notification.call {
            numbers::CONNECT => self.connect(notification),
            numbers::ACCEPT | numbers::ACCEPT4 => self.accept(notification),
            numbers::LISTEN => self.listen(notification),
            numbers::BIND => self.bind(notification),
            numbers::GETSOCKNAME => self.getsockname(notification),
            numbers::GETPEERNAME => self.getpeername(notification),
            numbers::SETSOCKOPT => self.setsockopt(notification),
            numbers::GETSOCKOPT => self.getsockopt(notification),
            numbers::IOCTL => self.ioctl(notification),
            numbers::SENDFILE => self.sendfile(notification),
            numbers::EPOLL_CREATE1 => self.epoll_made(notification),
            #[cfg(target_arch = "x86_64")]
            numbers::EPOLL_CREATE => self.epoll_made(notification),
            // dup, dup2, dup3, fcntl(F_DUPFD): the first argument is the descriptor.
            _ => self.duplicate(notification),
        };
        // A target that vanished, or that cannot be looked into, gets what its own kernel says.
        let outcome = outcome.unwrap_or_else(|error| {
            tracing::debug!(%error, call = notification.call, tid = notification.tid, "a call is left to the kernel");
            Outcome::CONTINUE
        });
        self.conclude(notification.id, &outcome);
    }

    fn conclude(&self, id: u64, outcome: &Outcome) {
        if let Outcome::Respond(response) = *outcome {
            self.respond(id, response);
        }
    }

    fn respond(&self, id: u64, response: Response) {
        if self.notifier.respond(id, response).is_err() {
            tracing::trace!(id, "the caller is gone");
        }
    }

    /// The socket that a call names as its first argument.
    fn target(&mut self, notification: Notification) -> io::Result<(Target, Kind)> {
        let target = self.descriptors.target(notification)?;
        let socket = target.socket.as_fd();
        let kind = match kso_sys::domain(socket) {
            Ok(numbers::AF_VSOCK) => Kind::Vsock(vsock::local(socket)?.port),
            // Only TCP has a state; asking for it tells the protocol too.
            Ok(domain @ (numbers::AF_INET | numbers::AF_INET6)) => match kso_sys::tcp_state(socket) {
                Ok(state) if domain == numbers::AF_INET => Kind::Tcp(Family::V4, state),
                Ok(state) => Kind::Tcp(Family::V6, state),
                Err(_) => Kind::Other,
            },
            _ => Kind::Other,
        };
        Ok((target, kind))
    }

    /// The address that a call gives. `None`: the kernel shall judge what it says.
    fn address_argument(notification: Notification) -> io::Result<Option<RawAddress>> {
        let [_, address, length, ..] = notification.args;
        // As the kernel does: `int addrlen`, no longer than a sockaddr_storage (move_addr_to_kernel).
        let length = usize::try_from(length as i32).unwrap_or(usize::MAX);
        let mut bytes = [0; MAX_ADDRESS];
        let Some(bytes) = bytes.get_mut(..length) else { return Ok(None) };
        if remote::read_memory(notification.tid, address, bytes)? != length {
            return Ok(None);
        }
        Ok(Some(address_from_raw(bytes)))
    }

    /// The options of a TCP socket that a fresh one does not have.
    fn tcp_options(&mut self, target: &Target, family: Family) -> io::Result<SocketOptions> {
        let socket = target.socket.as_fd();
        let tuned = self.tuned_overflow
            || (!self.tuned.is_empty() && recall(&mut self.tuned, &kso_sys::cookie(socket)?));
        let [v4, v6] = &self.config.defaults;
        let defaults = if family == Family::V4 { v4 } else { v6 };
        Ok(if tuned {
            kso_sys::options::read(socket, defaults, true)
        } else {
            kso_sys::options::read_these(socket, defaults, filter::UNSEEN)
        })
    }

    fn caller(&mut self, notification: Notification) -> io::Result<Caller> {
        let program = self.descriptors.program(notification.tid);
        Ok(Caller { pid: self.descriptors.threads.again(notification.tid)?.process, program })
    }

    /// Asks the broker, and holds the call until it answers.
    fn ask(
        &mut self,
        target: Target,
        purpose: answers::Purpose,
        request: GuestRequest,
    ) -> io::Result<Outcome> {
        let notification = target.notification;
        if self.asked.len() >= MAX_PENDING {
            return Ok(Outcome::error(Errno::ENOBUFS));
        }
        let caller = self.caller(notification)?;
        // What was read from memory came from this caller only if it waits still.
        if !self.notifier.is_valid(notification.id) {
            return Ok(Outcome::Later);
        }
        self.next_request += 1;
        let id = self.next_request;
        if let Err(errno) = self.control.send(&ToHost::Ask { id, caller, request }) {
            return Ok(Outcome::error(errno));
        }
        self.asked.insert(id, answers::Asked { target, purpose, since: Instant::now() });
        self.look_soon();
        Ok(Outcome::Later)
    }

    /// Has the broker do something whose answer does not matter.
    fn tell(&mut self, request: GuestRequest) -> Result<(), Errno> {
        self.next_request += 1;
        let id = self.next_request;
        self.control.send(&ToHost::Ask { id, caller: Caller::default(), request })
    }

    fn duplicate(&mut self, notification: Notification) -> io::Result<Outcome> {
        self.descriptors.copied(notification.tid, notification.args[0] as i32)?;
        let (target, kind) = self.target(notification)?;
        let swappable = match kind {
            Kind::Tcp(_, state) => state == crate::interceptor::CLOSED,
            // A failed one is replaced when it connects again.
            Kind::Vsock(_) => matches!(
                vsock::state(target.socket.as_fd()),
                Ok(vsock::State::Closed | vsock::State::Connecting)
            ),
            Kind::Other => false,
        };
        if swappable {
            self.descriptors.duplicated(kso_sys::cookie(target.socket.as_fd())?);
        }
        Ok(Outcome::CONTINUE)
    }

    /// Remembers that options were set on a TCP socket.
    fn tuned(&mut self, target: &Target) -> io::Result<()> {
        let cookie = kso_sys::cookie(target.socket.as_fd())?;
        self.tuned_overflow |= self.tuned.len() >= MAX_TUNED;
        remember(&mut self.tuned, cookie, MAX_TUNED);
        Ok(())
    }

    fn epoll_made(&mut self, notification: Notification) -> io::Result<Outcome> {
        self.descriptors.epoll_made(notification.tid)?;
        Ok(Outcome::CONTINUE)
    }
}
