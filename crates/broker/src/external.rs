//! Streams that kernels other than the host's perform: which of them, and what becomes of it when one dies.
//!
//! ```text
//!   connect --> a stand-in, under way -- Connected, Failed: the stand-in itself tells the program
//!                  +-- its kernel died first --> the next kernel of the route
//!   listen  --> a stand-in that listens -- Listening --> answered; Accepted ...
//!                  +-- refused --> the next kernel of the route; answered with the errno if there is none
//!                  +-- its kernel died --> the next kernel, or itself once it is up again
//! ```
//!
//! The program holds its listener all the time: it never notices which kernel serves it.

use crate::config::BrokerError;
use crate::session::{Session, SessionId};
use kso_core::event::{self, Direction, Kind};
use kso_core::kernels::Make;
use kso_core::routes::{Asked, HOST, Routes};
use kso_kernels::{
    Connecting, Directory, Event, Exchange, FilesRoute, Happened, Kernels, KernelsConfig, Listening,
    outer_address,
};
use kso_provider::alive::Watch;
use kso_provider::stream::Place;
use kso_wire::provide::Service;
use kso_wire::{Answer, Caller, Connect, Errno, Failure, Listen, Reply, RequestId};
use std::collections::{HashMap, HashSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a kernel may take to start, at most: longer than it takes to notice that one hangs.
const START: Duration = Duration::from_secs(130);
/// Time between looks whether listeners still live.
const LOOK: Duration = Duration::from_millis(250);
/// A listener that no kernel takes is offered again after this time.
const RETRY: Duration = Duration::from_millis(500);

/// A connection on another kernel.
#[derive(Debug)]
struct Connection {
    session: u64,
    caller: Caller,
    kernel: String,
    peer: SocketAddr,
    names: Vec<String>,
    local: Option<SocketAddr>,
    direction: Direction,
    since: Instant,
}

/// A listener on another kernel.
#[derive(Debug)]
struct Listener {
    session: u64,
    caller: Caller,
    /// Unanswered, with the stand-in that goes with the answer.
    asked: Option<(RequestId, OwnedFd)>,
    place: Place,
    listening: Listening,
    kernel: String,
    /// Where it listens now.
    outer: Option<SocketAddr>,
    /// Kernels that refused it, since it last listened.
    refused: Vec<String>,
    retry_at: Option<Instant>,
}

/// A published listener, for people.
#[derive(Clone, Debug)]
pub(crate) struct Shown {
    pub session: u64,
    pub inside: SocketAddr,
    pub outside: SocketAddr,
}

/// `SO_NETNS_COOKIE` of this process's network.
fn own_network() -> std::io::Result<u64> {
    kso_sys::netns_cookie(std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0))?.as_fd())
}

/// See the module.
#[derive(Debug)]
pub(crate) struct External {
    kernels: Kernels,
    exchanges: HashMap<u64, Arc<Exchange>>,
    connections: HashMap<u64, Connection>,
    listeners: HashMap<u64, Listener>,
    watch: Watch,
    next_look: Instant,
    seed: u64,
    own_network: u64,
    /// The kernels of the routes were started: what is down now comes back by itself.
    started: bool,
    /// Answers that came late.
    pub completed: VecDeque<(SessionId, RequestId, Answer)>,
    /// Things to tell: session, who, what.
    pub seen: VecDeque<(u64, Caller, Kind)>,
}

impl External {
    pub fn new(config: KernelsConfig) -> Result<Self, BrokerError> {
        let kernel = BrokerError::kernel;
        Ok(Self {
            kernels: Kernels::new(config).map_err(kernel("cannot prepare external kernels"))?,
            exchanges: HashMap::new(),
            connections: HashMap::new(),
            listeners: HashMap::new(),
            watch: Watch::new().map_err(kernel("cannot watch listeners"))?,
            next_look: Instant::now(),
            own_network: own_network().map_err(kernel("cannot make a socket"))?,
            seed: u64::from(std::process::id()) | 1,
            started: false,
            completed: VecDeque::new(),
            seen: VecDeque::new(),
        })
    }

    pub fn poll_fd(&self) -> BorrowedFd<'_> {
        self.kernels.poll_fd()
    }

    pub fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    /// Starts what routes name, and waits for it.
    pub fn start(&mut self, routes: &Routes) -> Result<(), BrokerError> {
        for name in routes.kernels() {
            match self.kernels.start(name, START) {
                Ok(()) => {}
                // It may come later, and meanwhile there are others.
                Err(error) if !routes.rest_on(name) => {
                    tracing::warn!(kernel = name, %error, "a kernel does not start: others take its place");
                }
                Err(error) => return Err(BrokerError::External { name: name.to_owned(), error }),
            }
        }
        self.started = true;
        Ok(())
    }

    /// Starts what the routes of a session name, unless that was done, and makes the place of its stand-ins.
    pub fn open_session(&mut self, session: &Session) -> Result<(), BrokerError> {
        if session.routes.is_empty() {
            return Ok(());
        }
        if !self.started {
            self.start(&session.routes)?;
        }
        let exchange = Exchange::new()
            .map_err(BrokerError::kernel("sockets of another kernel need root on this one"))?;
        self.exchanges.insert(session.id, Arc::new(exchange));
        Ok(())
    }

    /// The way to a directory on the first of these kernels that is up.
    pub fn files(&mut self, kernels: &[String], directory: Directory) -> Result<FilesRoute, BrokerError> {
        let name = || kernels.join(", ");
        self.kernels
            .files(kernels, directory, START)
            .map_err(|error| BrokerError::External { name: name(), error })
    }

    pub fn close_session(&mut self, id: u64) {
        self.exchanges.remove(&id);
        self.listeners.retain(|number, listener| {
            if listener.session == id {
                self.kernels.unlisten(&listener.kernel, *number);
            }
            listener.session != id
        });
    }

    /// A number that is hard to guess: xorshift, which is enough to draw lots with.
    fn lot(&mut self) -> u64 {
        let nanos = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let mut x = self.seed ^ u64::from(nanos.subsec_nanos()) << 20;
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.seed = x | 1;
        x >> 8
    }

    /// The kernels to ask; `None`: the host's, natively.
    fn choose(&mut self, session: &mut Session, asked: &Asked<'_>) -> Option<Vec<String>> {
        let lot = self.lot();
        let kernels = &self.kernels;
        session.routes.choose(asked, Instant::now(), lot, |name| kernels.is_up(name))
    }

    /// Opens a connection, unless it is the host's own business.
    pub fn connect(
        &mut self,
        session: &mut Session,
        caller: &Caller,
        wanted: &Connect,
        peer: SocketAddr,
    ) -> Option<Result<OwnedFd, Errno>> {
        // host.kso.internal is the host, whoever serves the rest.
        if session.routes.is_empty() || session.tun.is_gateway(wanted.peer.ip().to_canonical()) {
            return None;
        }
        let asked = Asked {
            service: Service::TcpConnect,
            address: peer.ip().to_canonical(),
            port: peer.port(),
            program: &caller.program,
        };
        let kernel = self.choose(session, &asked)?.into_iter().next()?;
        if kernel == HOST {
            return None;
        }
        // Never natively instead.
        let Some(exchange) = self.exchanges.get(&session.id).map(Arc::clone) else {
            return Some(Err(Errno::ENETDOWN));
        };
        Some(self.begin(session, caller, wanted, peer, kernel, exchange))
    }

    fn begin(
        &mut self,
        session: &Session,
        caller: &Caller,
        wanted: &Connect,
        peer: SocketAddr,
        kernel: String,
        exchange: Arc<Exchange>,
    ) -> Result<OwnedFd, Errno> {
        let source = self.kernels.source(&kernel, peer.ip()).ok_or(Errno::ENETUNREACH)?;
        let port = wanted.local.map_or(0, |local| local.port());
        let local = SocketAddr::new(source, port);
        let (socket, pending) = exchange.connect(wanted.family, local, peer, &wanted.options)?;
        let tag = self.kernels.tag();
        let connection = Connection {
            session: session.id,
            caller: caller.clone(),
            kernel: kernel.clone(),
            peer,
            names: session.names_for_people(peer.ip()),
            local: Some(pending.local),
            direction: Direction::Out,
            since: Instant::now(),
        };
        self.connections.insert(tag, connection);
        let options = wanted.options.clone();
        self.kernels.connect(&kernel, Connecting { tag, exchange, pending, options });
        Ok(socket)
    }

    /// A listener of the session itself, if one takes connections to `ip` (canonical) and `port` inside.
    pub fn connect_inside(
        &self,
        session: &Session,
        ip: IpAddr,
        wanted: &Connect,
    ) -> Option<Result<OwnedFd, Errno>> {
        if self.listeners.is_empty() || !(ip.is_loopback() || session.tun.is_guest(ip)) {
            return None;
        }
        let takes = |one: &&Listener| {
            let bound = one.listening.inner.ip().to_canonical();
            one.session == session.id
                && one.listening.inner.port() == wanted.peer.port()
                && (bound == ip || bound.is_unspecified() && (bound.is_ipv6() || ip.is_ipv4()))
        };
        let listener = self.listeners.values().find(takes)?;
        let target = SocketAddr::new(ip, wanted.peer.port());
        Some(listener.listening.exchange.connect_inside(wanted.family, target, &wanted.options))
    }

    /// Makes a listener: the stand-in, and its number. `None`: it is the host's own business. How it goes is told
    /// later; `asked` is answered then, or the stand-in comes back at once.
    pub fn listen(
        &mut self,
        session: &mut Session,
        caller: &Caller,
        wanted: &Listen,
        place: Place,
        asked: Option<RequestId>,
    ) -> Option<Result<Option<(OwnedFd, SocketAddr)>, Errno>> {
        let backlog = wanted.backlog?;
        let about = Asked {
            service: Service::TcpListen,
            address: wanted.local.ip().to_canonical(),
            port: wanted.local.port(),
            program: &caller.program,
        };
        if session.routes.is_native(&about) {
            return None;
        }
        let kernel = self.choose(session, &about)?.into_iter().next()?;
        // Never natively instead.
        let Some(exchange) = self.exchanges.get(&session.id).map(Arc::clone) else {
            return Some(Err(Errno::ENETDOWN));
        };
        Some(self.make_listener(session.id, caller, wanted, place, backlog, asked, kernel, exchange))
    }

    #[allow(clippy::too_many_arguments)]
    fn make_listener(
        &mut self,
        session: u64,
        caller: &Caller,
        wanted: &Listen,
        place: Place,
        backlog: i32,
        asked: Option<RequestId>,
        kernel: String,
        exchange: Arc<Exchange>,
    ) -> Result<Option<(OwnedFd, SocketAddr)>, Errno> {
        let socket = exchange.listen(wanted.family, wanted.local, backlog, &wanted.options)?;
        let inner = kso_provider::local_address(&socket)?;
        let id = self.kernels.tag();
        self.watch.add(&socket, id).map_err(|error| kso_sys::errno::of(&error))?;
        // A listener that was never bound has the same port outside.
        let port = if place.address.port() == 0 { inner.port() } else { place.address.port() };
        let place = Place { address: SocketAddr::new(place.address.ip(), port), ..place };
        let options = wanted.options.clone();
        let listening = Listening { id, exchange, inner, outer: place.address, backlog, options };
        let (asked, returned) = match asked {
            Some(request) => (Some((request, socket)), None),
            None => (None, Some((socket, place.address))),
        };
        let listener = Listener {
            session,
            caller: caller.clone(),
            asked,
            place,
            listening,
            kernel: kernel.clone(),
            outer: None,
            refused: Vec::new(),
            retry_at: None,
        };
        self.listeners.insert(id, listener);
        self.send_listener(id, kernel);
        Ok(returned)
    }

    fn send_listener(&mut self, id: u64, kernel: String) {
        let make = self.kernels.statuses().into_iter().find(|one| one.name == kernel).map(|one| one.make);
        let Some(listener) = self.listeners.get_mut(&id) else { return };
        let loopback =
            listener.place.address.ip().to_canonical().is_loopback() || listener.place.loopback_only;
        listener.listening.outer = match make {
            // There it is this host's loopback.
            Some(Make::Host) => listener.place.address,
            _ => outer_address(listener.place.address, loopback),
        };
        listener.kernel.clone_from(&kernel);
        listener.retry_at = None;
        self.kernels.listen(&kernel, listener.listening.clone());
    }

    /// The next kernel for a listener: one that did not refuse it. `None`: there is none now.
    fn next_kernel(&mut self, id: u64, sessions: &mut HashMap<u64, Session>) -> Option<String> {
        let listener = self.listeners.get(&id)?;
        let refused = listener.refused.clone();
        let program = listener.caller.program.clone();
        let local = listener.listening.inner;
        let session = sessions.get_mut(&listener.session)?;
        let about = Asked {
            service: Service::TcpListen,
            address: local.ip().to_canonical(),
            port: local.port(),
            program: &program,
        };
        let chosen = self.choose(session, &about)?;
        chosen.into_iter().find(|name| !refused.contains(name) && self.kernels.is_up(name))
    }

    fn move_listener(&mut self, id: u64, sessions: &mut HashMap<u64, Session>) {
        match self.next_kernel(id, sessions) {
            Some(kernel) => self.send_listener(id, kernel),
            None => {
                if let Some(listener) = self.listeners.get_mut(&id) {
                    listener.retry_at = Some(Instant::now() + RETRY);
                }
            }
        }
    }

    /// When [`Self::run_ready`] is due at the latest.
    pub fn next_deadline(&self) -> Option<Instant> {
        (!self.listeners.is_empty()).then_some(self.next_look)
    }

    /// Takes what the kernels told, and looks at the clock.
    pub fn run_ready(&mut self, sessions: &mut HashMap<u64, Session>) {
        while let Some(event) = self.kernels.next_event() {
            self.happened(event, sessions);
        }
        let now = Instant::now();
        if !self.listeners.is_empty() && now >= self.next_look {
            self.next_look = now + LOOK;
            self.sweep();
            let due = |one: &Listener| one.retry_at.is_some_and(|at| at <= now);
            let waiting: Vec<u64> =
                self.listeners.iter().filter(|(_, one)| due(one)).map(|(id, _)| *id).collect();
            for id in waiting {
                if let Some(listener) = self.listeners.get_mut(&id) {
                    listener.refused.clear();
                }
                self.move_listener(id, sessions);
            }
        }
    }

    /// Closes listeners that programs closed.
    fn sweep(&mut self) {
        let mut alive = HashSet::with_capacity(self.listeners.len());
        if self
            .watch
            .alive(|id| {
                alive.insert(id);
            })
            .is_err()
        {
            return;
        }
        let kernels = &self.kernels;
        self.listeners.retain(|id, listener| {
            let lives = alive.contains(id);
            if !lives {
                kernels.unlisten(&listener.kernel, *id);
            }
            lives
        });
    }

    fn happened(&mut self, event: Event, sessions: &mut HashMap<u64, Session>) {
        let kernel = event.kernel.to_string();
        match event.what {
            Happened::Up(welcome) => {
                tracing::info!(kernel, version = welcome.kernel, "a kernel is up");
                self.tell_kernel(&kernel, "up", welcome.kernel);
                let homeless: Vec<u64> = self
                    .listeners
                    .iter()
                    .filter(|(_, one)| one.retry_at.is_some())
                    .map(|(id, _)| *id)
                    .collect();
                homeless.into_iter().for_each(|id| self.move_listener(id, sessions));
            }
            Happened::Down { reason, connecting, listening } => {
                self.tell_kernel(&kernel, "down", reason);
                connecting.into_iter().for_each(|one| self.connect_elsewhere(one, sessions));
                for one in listening {
                    if let Some(listener) = self.listeners.get_mut(&one.id).filter(|one| one.kernel == kernel)
                    {
                        listener.outer = None;
                        self.move_listener(one.id, sessions);
                    }
                }
            }
            Happened::Aside => {
                self.tell_kernel(&kernel, "aside", "it died too often".into());
            }
            Happened::Draining => {
                self.tell_kernel(&kernel, "draining", "it is about to end".into());
                let there: Vec<u64> = self
                    .listeners
                    .iter()
                    .filter(|(_, one)| one.kernel == kernel)
                    .map(|(id, _)| *id)
                    .collect();
                there.into_iter().for_each(|id| self.move_listener(id, sessions));
            }
            Happened::Connected { tag, local } => {
                if let Some(connection) = self.connections.get_mut(&tag) {
                    connection.local = Some(local);
                }
            }
            Happened::Failed { tag, errno } => self.ended(tag, 0, 0, Some(errno)),
            Happened::Ended { tag, bytes_in, bytes_out, errno } => {
                self.ended(tag, bytes_in, bytes_out, errno)
            }
            Happened::Listening { id, local } => self.listening(id, local),
            Happened::NotListening { listening, errno } => {
                self.not_listening(listening.id, &kernel, errno, sessions);
            }
            Happened::Closed { listener } => {
                self.listeners.remove(&listener);
            }
            Happened::Accepted { listener, tag, peer, local } => {
                let Some(listener) = self.listeners.get(&listener) else { return };
                let connection = Connection {
                    session: listener.session,
                    caller: listener.caller.clone(),
                    kernel,
                    peer,
                    names: Vec::new(),
                    local: Some(local),
                    direction: Direction::In,
                    since: Instant::now(),
                };
                let kind = Kind::Accept(event::Accept { local, peer });
                self.seen.push_back((listener.session, listener.caller.clone(), kind));
                self.connections.insert(tag, connection);
            }
        }
    }

    fn tell_kernel(&mut self, name: &str, state: &str, detail: String) {
        let kind = Kind::Kernel(event::Kernel { kernel: name.to_owned(), state: state.to_owned(), detail });
        self.seen.push_back((0, Caller::default(), kind));
    }

    fn connect_elsewhere(&mut self, one: Connecting, sessions: &mut HashMap<u64, Session>) {
        let Some(connection) = self.connections.get(&one.tag) else { return };
        let (session, peer) = (connection.session, connection.peer);
        let program = connection.caller.program.clone();
        let Some(session) = sessions.get_mut(&session) else { return };
        let asked = Asked {
            service: Service::TcpConnect,
            address: peer.ip().to_canonical(),
            port: peer.port(),
            program: &program,
        };
        let Some(kernel) = self.choose(session, &asked).and_then(|chosen| chosen.into_iter().next()) else {
            return;
        };
        if let Some(connection) = self.connections.get_mut(&one.tag) {
            connection.kernel.clone_from(&kernel);
        }
        // Its own kernel, if there is no other: it waits there until that is up again, or the program gives up.
        self.kernels.connect(&kernel, one);
    }

    fn ended(&mut self, tag: u64, bytes_in: u64, bytes_out: u64, error: Option<Errno>) {
        let Some(connection) = self.connections.remove(&tag) else { return };
        let Connection { session, caller, peer, names, local, direction, since, .. } = connection;
        let kind = Kind::Closed(event::Closed {
            peer,
            names,
            local,
            direction,
            bytes_in,
            bytes_out,
            duration_us: since.elapsed().into(),
            error,
        });
        self.seen.push_back((session, caller, kind));
    }

    fn listening(&mut self, id: u64, local: SocketAddr) {
        let Some(listener) = self.listeners.get_mut(&id) else { return };
        listener.outer = Some(local);
        listener.refused.clear();
        let inner = listener.listening.inner;
        let kind = Kind::Listen(event::Listen { local: inner, published: Some(local), error: None });
        self.seen.push_back((listener.session, listener.caller.clone(), kind));
        if let Some((request, socket)) = listener.asked.take() {
            let answer = Answer::with(Reply::Socket { local: Some(local) }, socket);
            self.completed.push_back((SessionId(listener.session), request, answer));
        }
    }

    fn not_listening(&mut self, id: u64, kernel: &str, errno: Errno, sessions: &mut HashMap<u64, Session>) {
        let Some(listener) = self.listeners.get_mut(&id).filter(|one| one.kernel == kernel) else { return };
        listener.outer = None;
        listener.refused.push(kernel.to_owned());
        tracing::warn!(kernel, inside = %listener.listening.inner, outside = %listener.listening.outer, %errno, "cannot publish");
        if let Some(next) = self.next_kernel(id, sessions) {
            return self.send_listener(id, next);
        }
        let Some(listener) = self.listeners.get_mut(&id) else { return };
        match listener.asked.take() {
            Some((request, _)) => {
                let local = listener.listening.inner;
                let kind = Kind::Listen(event::Listen { local, published: None, error: Some(errno) });
                self.seen.push_back((listener.session, listener.caller.clone(), kind));
                let answer = Answer::plain(Err(Failure::kernel(errno)));
                self.completed.push_back((SessionId(listener.session), request, answer));
                self.listeners.remove(&id);
            }
            // It listened before: a kernel will take it again.
            None => listener.retry_at = Some(Instant::now() + RETRY),
        }
    }

    /// Listeners that are reached now, for people.
    pub fn shown(&self) -> impl Iterator<Item = Shown> + '_ {
        self.listeners.values().filter_map(|one| {
            Some(Shown { session: one.session, inside: one.listening.inner, outside: one.outer? })
        })
    }

    /// Whether a socket is a stand-in: none of this network.
    pub fn is_stand_in(&self, socket: BorrowedFd<'_>) -> bool {
        kso_sys::netns_cookie(socket).is_ok_and(|cookie| cookie != self.own_network)
    }
}
