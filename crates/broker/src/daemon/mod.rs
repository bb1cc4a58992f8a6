//! `kso broker`: sessions of other processes, on a unix socket.

mod standing;

use crate::broker::Broker;
use crate::config::{BrokerConfig, BrokerError};
use crate::control::{remove_stale, stranger};
use crate::guest::Devices;
use crate::peer::{BUFFER, Peer, PeerError, Received};
use crate::session::SessionId;
use kso_core::config::Guest;
use kso_devices::vsock::{Endpoint, GuestId};
use kso_sys::process::Signals;
use kso_wire::{GuestHello, Hello, Submitted, ToBroker, ToRunner, VERSION, Welcome};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::time::Timespec;
use standing::Standing;
use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Messages of one runner that are served before the next has its turn.
const TURN: usize = 64;
const EVENTS: usize = 32;
const BACKLOG: i32 = 128;

const SIGNALS: u64 = 0;
const LISTENER: u64 = 1;
const BROKER: u64 = 2;
/// Runners are numbered from here.
const FIRST_PEER: u64 = 16;

/// How the daemon listens.
#[derive(Clone, Debug)]
pub struct ServeConfig {
    /// Its broker.
    pub broker: BrokerConfig,
    /// Its socket.
    pub socket: PathBuf,
    /// A group that may use it, and the sockets of devices, besides its owner.
    pub group: Option<u32>,
    /// Guests that something else starts.
    pub guests: Vec<Guest>,
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// It cannot be set up, or the kernel fails it.
pub fn serve(config: ServeConfig) -> Result<(), BrokerError> {
    use rustix::process::Signal;
    let signals = Signals::take(&[Signal::TERM.as_raw(), Signal::INT.as_raw()])
        .map_err(BrokerError::kernel("cannot take signals"))?;
    let mut broker = Broker::new(config.broker)?;
    broker.start_all_kernels()?;
    let mut devices = Devices::new()?;
    let mut standing = Standing::default();
    for guest in &config.guests {
        standing.add(&mut broker, &mut devices, guest, config.group)?;
    }
    let socket_error = |source| BrokerError::Socket { path: config.socket.clone(), source };
    let listener = bind(&config.socket, config.group, SocketType::SEQPACKET).map_err(socket_error)?;
    let events = epoll::create(epoll::CreateFlags::CLOEXEC)
        .map_err(|error| BrokerError::kernel("cannot wait for events")(error.into()))?;
    tracing::info!(socket = %config.socket.display(), "broker ready");
    let daemon = Daemon {
        events,
        signals,
        listener,
        broker,
        devices,
        standing,
        peers: HashMap::new(),
        next: FIRST_PEER,
        buffer: Vec::new(),
    };
    let result = daemon.run().map_err(BrokerError::kernel("cannot wait for events"));
    let _ = fs::remove_file(&config.socket);
    tracing::info!("broker ended");
    result
}

/// A unix socket that listens, for its owner and perhaps a group.
fn bind(path: &Path, group: Option<u32>, kind: SocketType) -> io::Result<OwnedFd> {
    if let Some(directory) = path.parent().filter(|directory| !directory.exists()) {
        crate::runtime::prepare(directory)?;
    }
    remove_stale(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    // Nobody can connect before listen: the mode is set in time.
    let mode = if group.is_some() { 0o660 } else { 0o600 };
    if group.is_some() {
        std::os::unix::fs::chown(path, None, group)?;
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Tells a client why there is no session for it. It is over then.
fn refuse(peer: &mut Peer, error: &BrokerError) -> Result<bool, PeerError> {
    tracing::info!(%error, "a session was refused");
    let mut reason = error.to_string();
    reason.truncate(reason.floor_char_boundary(4096));
    peer.send(&ToRunner::Refused(reason), None)?;
    Ok(true)
}

struct Daemon {
    events: OwnedFd,
    signals: Signals,
    listener: OwnedFd,
    broker: Broker,
    devices: Devices,
    standing: Standing,
    peers: HashMap<u64, Peer>,
    next: u64,
    buffer: Vec<u8>,
}

impl Daemon {
    fn run(mut self) -> io::Result<()> {
        self.buffer.resize(BUFFER, 0);
        let watch = |descriptor, token| {
            epoll::add(&self.events, descriptor, EventData::new_u64(token), EventFlags::IN)
        };
        watch(self.signals.as_fd(), SIGNALS)?;
        watch(self.listener.as_fd(), LISTENER)?;
        watch(self.broker.poll_fd(), BROKER)?;
        loop {
            let (ready, others) = self.devices.wait(self.events.as_fd(), self.broker.next_deadline())?;
            self.devices.run_ready(&mut self.broker, ready);
            let mut events = Vec::with_capacity(EVENTS);
            let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
            if others {
                let _ = epoll::wait(&self.events, rustix::buffer::spare_capacity(&mut events), Some(&zero));
            }
            let mut ready = self.broker.next_deadline().is_some_and(|at| at <= Instant::now());
            for event in events {
                match event.data.u64() {
                    SIGNALS => {
                        if self.signals.next().is_some() {
                            self.end();
                            return Ok(());
                        }
                    }
                    LISTENER => self.accept(),
                    BROKER => ready = true,
                    peer => self.serve(peer),
                }
            }
            if ready {
                self.broker.run_ready();
            }
            self.deliver();
            self.devices.serve_orders(&mut self.broker);
        }
    }

    /// Every session ends; what programs hold goes on to work.
    fn end(&mut self) {
        self.standing.end(&mut self.broker, &mut self.devices);
        for (_, peer) in self.peers.drain() {
            if let Some(guest) = peer.guest {
                self.devices.remove(&mut self.broker, guest);
            } else if let Some(session) = peer.session {
                self.broker.close_session(session);
            }
        }
    }

    fn accept(&mut self) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        while let Ok(socket) = rustix::net::accept_with(&self.listener, flags) {
            let mut peer = Peer::new(socket);
            if let Some(reason) = stranger(peer.as_fd()) {
                tracing::warn!(reason, "a session was refused");
                let reason = format!("only programs outside a sandbox may open sessions: {reason}");
                let _ = peer.send(&ToRunner::Refused(reason), None);
                continue;
            }
            // As many as sessions, and some that have not said hello: more wait in the backlog's place.
            if self.peers.len() >= self.broker.max_sessions().saturating_add(64) {
                let _ = peer.send(&ToRunner::Refused("too many connections".into()), None);
                continue;
            }
            let flags = EventFlags::IN | EventFlags::RDHUP;
            if epoll::add(&self.events, peer.as_fd(), EventData::new_u64(self.next), flags).is_ok() {
                self.peers.insert(self.next, peer);
                self.next += 1;
            }
        }
    }

    fn serve(&mut self, key: u64) {
        let mut buffer = std::mem::take(&mut self.buffer);
        let result = self.messages(key, &mut buffer);
        self.buffer = buffer;
        self.settle(key, result);
    }

    /// Ends a session that is over, and waits to write for one that has answers left.
    fn settle(&mut self, key: u64, result: Result<bool, PeerError>) {
        let over = match result {
            Ok(over) => over,
            Err(error) => {
                tracing::warn!(session = self.number(key), %error, "the session is closed");
                true
            }
        };
        if over && let Some(peer) = self.peers.remove(&key) {
            if let Some(guest) = peer.guest {
                self.devices.remove(&mut self.broker, guest);
            } else if let Some(session) = peer.session {
                self.broker.close_session(session);
            }
        }
        if let Some(peer) = self.peers.get_mut(&key)
            && let Some(wanted) = peer.wants_out()
        {
            let out = if wanted { EventFlags::OUT } else { EventFlags::empty() };
            let flags = EventFlags::IN | EventFlags::RDHUP | out;
            let _ = epoll::modify(&self.events, peer.as_fd(), EventData::new_u64(key), flags);
        }
    }

    fn number(&self, key: u64) -> Option<u64> {
        self.peers.get(&key).and_then(|peer| peer.session).map(SessionId::number)
    }

    /// Serves the messages of a runner. True: it is gone.
    fn messages(&mut self, key: u64, buffer: &mut [u8]) -> Result<bool, PeerError> {
        let Some(peer) = self.peers.get_mut(&key) else { return Ok(false) };
        peer.flush()?;
        for _ in 0..TURN {
            let (message, descriptors) = match peer.receive(buffer)? {
                Received::Message(message, descriptors) => (message, descriptors),
                Received::Nothing => return Ok(false),
                Received::Gone => return Ok(true),
            };
            match (peer.session, message) {
                (None, ToBroker::Hello(hello)) => match self.broker.open_session(&hello) {
                    Ok(session) => {
                        peer.session = Some(session);
                        let welcome = Welcome { version: VERSION, session: session.number() };
                        peer.send(&ToRunner::Welcome(welcome), None)?;
                    }
                    Err(error) => return refuse(peer, &error),
                },
                (None, ToBroker::Guest(GuestHello { hello, ports })) => {
                    let opened =
                        Self::open_guest(&mut self.devices, &mut self.broker, &hello, ports, descriptors);
                    match opened {
                        Ok((guest, session)) => {
                            (peer.session, peer.guest) = (Some(session), Some(guest));
                            let welcome = Welcome { version: VERSION, session: session.number() };
                            peer.send(&ToRunner::Welcome(welcome), None)?;
                        }
                        Err(error) => return refuse(peer, &error),
                    }
                }
                (Some(session), ToBroker::Request { id, caller, request }) => {
                    if !peer.begin(id)? {
                        peer.refuse_busy(id)?;
                    } else if let Submitted::Done(answer) = self.broker.handle(session, id, &caller, request)
                    {
                        peer.answer(id, answer)?;
                    }
                }
                (Some(session), ToBroker::Forget(id)) => {
                    peer.forget(id);
                    self.broker.forget(session, id);
                }
                _ => return Err(PeerError::OutOfOrder),
            }
        }
        Ok(false)
    }

    /// Serves the device of a launcher's guest.
    fn open_guest(
        devices: &mut Devices,
        broker: &mut Broker,
        hello: &Hello,
        ports: Vec<u32>,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(GuestId, SessionId), BrokerError> {
        let mut descriptors = descriptors.into_iter();
        let (Some(vmm), true) = (descriptors.next(), descriptors.len() == ports.len()) else {
            return Err(BrokerError::Descriptors);
        };
        let endpoint = Endpoint::Connected(vmm.into());
        let guest = devices.add(broker, endpoint, hello, ports.into_iter().zip(descriptors).collect())?;
        let session = broker.session_of(guest).ok_or(BrokerError::Descriptors)?;
        Ok((guest, session))
    }

    /// Sends the answers that came late.
    fn deliver(&mut self) {
        while let Some((session, id, answer)) = self.broker.completed() {
            let Some(answer) = self.devices.answered(&mut self.broker, session, id, answer) else { continue };
            let found = self.peers.iter_mut().find(|(_, peer)| peer.session == Some(session));
            let Some((&key, peer)) = found else { continue };
            let result = peer.answer(id, answer).map(|()| false);
            self.settle(key, result);
        }
    }
}
