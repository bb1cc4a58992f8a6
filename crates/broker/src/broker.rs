//! The broker: sessions, and the one loop that serves whatever is not a request.
//!
//! ```text
//!                      handle                      run_ready
//!   runner, gateway ------------> Broker <----------------------- epoll
//!                    <-- Done        |   name servers, control clients, ends of connections,
//!                    <-- completed --+   metrics, changes of addresses
//! ```
//!
//! Requests but `Resolve` are answered at once: nothing they do waits.

use crate::config::{BrokerConfig, BrokerError, Control};
use crate::control::ControlSocket;
use crate::dns::conf::ResolvConf;
use crate::dns::forward::{Done, Forwarder};
use crate::dns::hosts::Watched;
use crate::external::External;
use crate::eyes::Eyes;
use crate::guest::Guests;
use crate::metrics::{Exporter, Snapshot};
use crate::session::{Session, SessionId};
use crate::totals::Totals;
use crate::track::{Seen, Track};
use crate::{flows, publish, report, streams};
use kso_core::config::PublishLimits;
use kso_core::event::{self, Kind};
use kso_core::policy::Policy;
use kso_core::routes::Routes;
use kso_kernels::{Directory, FilesRoute};
use kso_provider::addresses::Addresses;
use kso_provider::stock::Stock;
use kso_provider::stream::Place;
use kso_wire::{
    Answer, Caller, Hello, LoopbackMode, Protocol, Publication, Request, RequestId, Submitted, VERSION,
};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::time::Timespec;
use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// So many events are taken at a time.
const EVENTS: usize = 32;
/// How long the ends of a session's last connections are waited for, while somebody watches.
const LINGER: Duration = Duration::from_millis(50);

/// What an event is about: the upper half of its number; the lower half says which one.
pub(crate) mod token {
    const fn kind(kind: u64) -> u64 {
        kind << 32
    }
    pub const ADDRESSES: u64 = kind(1);
    pub const NAMES: u64 = kind(2);
    pub const CONTROL: u64 = kind(3);
    pub const CLIENT: u64 = kind(4);
    pub const ENDS: u64 = kind(5);
    pub const METRICS: u64 = kind(6);
    pub const SCRAPE: u64 = kind(7);
    pub const GUEST_LISTENER: u64 = kind(8);
    pub const EXTERNAL: u64 = kind(15);
    pub const KIND: u64 = !0 << 32;
}

/// What all sessions share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub policy: Policy,
    limits: Option<PublishLimits>,
    pub addresses: Addresses,
    pub stock: Stock,
    pub eyes: Eyes,
    pub track: Track,
    pub totals: Totals,
    /// Other kernels than the host's, if a route names one.
    pub external: Option<External>,
}

impl Shared {
    /// Why a listener of `all` may not be published, if it may not. Others were judged when the session was
    /// opened.
    pub fn refusal(&self, session: &Session, place: Place) -> Option<String> {
        let limits = self.limits.as_ref()?;
        if !session.publish.iter().any(|one| one.inner_port == 0) || place.loopback_only {
            return None;
        }
        let (ip, port) = (place.address.ip().to_canonical(), place.address.port());
        limits.refusal(&Publication {
            address: Some(ip),
            outer_port: port,
            inner_port: port,
            protocol: Protocol::Tcp,
        })
    }
}

/// See the module.
#[derive(Debug)]
pub struct Broker {
    pub(crate) epoll: OwnedFd,
    pub(crate) config: BrokerConfig,
    pub(crate) sessions: HashMap<u64, Session>,
    pub(crate) shared: Shared,
    next_session: u64,
    pub(crate) forwarder: Forwarder,
    pub(crate) resolv_conf: Watched,
    pub(crate) hosts: Watched,
    pub(crate) completed: VecDeque<(SessionId, RequestId, Answer)>,
    control: Option<ControlSocket>,
    exporter: Option<Exporter>,
    pub(crate) guests: Guests,
}

impl Broker {
    /// Sets up a broker without sessions.
    ///
    /// # Errors
    /// A rule cannot be read, metrics cannot be served, or the kernel lacks something.
    pub fn new(config: BrokerConfig) -> Result<Self, BrokerError> {
        let policy = Policy::new(&config.rules, config.no_net, LoopbackMode::Private)?;
        let kernel = BrokerError::kernel;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)
            .map_err(|error| kernel("cannot wait for events")(error.into()))?;
        let addresses = Addresses::new().map_err(kernel("cannot read the host's addresses"))?;
        epoll::add(&epoll, addresses.poll_fd(), EventData::new_u64(token::ADDRESSES), EventFlags::IN)
            .map_err(|error| kernel("cannot wait for events")(error.into()))?;
        let control = match ControlSocket::new(epoll.as_fd(), &config, token::CONTROL) {
            Ok(control) => control,
            // A sandbox works without: it is only not seen.
            Err(error) => {
                tracing::info!(%error, "kso ps and kso trace will not see this");
                None
            }
        };
        let exporter = match &config.metrics {
            Some(address) => Some(Exporter::new(epoll.as_fd(), address, (token::METRICS, token::SCRAPE))?),
            None => None,
        };
        let resolv_conf = Watched::new(config.resolv_conf.clone());
        let conf = servers(&config, &resolv_conf);
        let next_session = match config.control {
            Control::Run => u64::from(std::process::id()),
            Control::Broker | Control::Hidden => 1,
        };
        // A kernel without a route is idle, and shown.
        let external = match config.routes.is_empty() && config.kernels.kernels.is_empty() {
            true => None,
            false => Some(External::new(config.kernels.clone())?),
        };
        if let Some(external) = &external {
            epoll::add(&epoll, external.poll_fd(), EventData::new_u64(token::EXTERNAL), EventFlags::IN)
                .map_err(|error| kernel("cannot wait for events")(error.into()))?;
        }
        let mut broker = Self {
            epoll,
            sessions: HashMap::new(),
            shared: Shared {
                policy,
                limits: config.publish.clone(),
                addresses,
                stock: Stock::default(),
                eyes: Eyes::new(config.trace, config.metrics.is_some(), token::CLIENT),
                track: Track::default(),
                totals: Totals::default(),
                external,
            },
            next_session,
            forwarder: Forwarder::new(conf, token::NAMES),
            resolv_conf,
            hosts: Watched::new(config.hosts.clone()),
            completed: VecDeque::new(),
            control,
            exporter,
            guests: Guests::default(),
            config,
        };
        broker.watch_ends();
        Ok(broker)
    }

    /// Opens a session: its rules are compiled, and the ports that it publishes are free.
    ///
    /// # Errors
    /// See [`BrokerError`]: each says what to do.
    pub fn open_session(&mut self, hello: &Hello) -> Result<SessionId, BrokerError> {
        if hello.version != VERSION {
            return Err(BrokerError::Version { ours: VERSION, theirs: hello.version });
        }
        if self.sessions.len() >= self.config.max_sessions {
            return Err(BrokerError::TooManySessions(self.sessions.len()));
        }
        let mut session = Session::new(self.next_session, hello, &self.config.routes)?;
        for publication in &hello.publish {
            self.check(publication, &session)?;
        }
        if let Some(external) = self.shared.external.as_mut().filter(|_| !self.config.kernels_later) {
            external.open_session(&session)?;
        }
        self.hosts.look(Instant::now());
        session.names.load_hosts(&self.hosts.text);
        session.hosts_version = self.hosts.version;
        let id = SessionId(self.next_session);
        self.next_session += 1;
        self.shared.totals.sessions_opened += 1;
        tracing::debug!(session = id.0, name = session.name, "session opened");
        let start = event::SessionStart { name: session.name.clone(), command: session.command.clone() };
        let caller = Caller { pid: session.pid, program: String::new() };
        self.shared.eyes.see(id.0, &session.name, &caller, Kind::SessionStart(start));
        self.sessions.insert(id.0, session);
        Ok(id)
    }

    /// Starts the external kernels that a session needs.
    ///
    /// # Errors
    /// [`BrokerError::External`], or without root.
    pub fn start_kernels(&mut self, id: SessionId) -> Result<(), BrokerError> {
        match (&mut self.shared.external, self.sessions.get(&id.0)) {
            (Some(external), Some(session)) => external.open_session(session),
            _ => Ok(()),
        }
    }

    /// Starts the external kernels of all routes before there are sessions, and waits for them once: a daemon's loop
    /// may not wait for a kernel while it serves others.
    ///
    /// # Errors
    /// [`BrokerError::External`]: a route rests on a kernel that does not start.
    pub fn start_all_kernels(&mut self) -> Result<(), BrokerError> {
        match &mut self.shared.external {
            Some(external) => external.start(&Routes::new(self.config.routes.clone())),
            None => Ok(()),
        }
    }

    /// The way to a directory that other kernels perform, in this order. They are started.
    ///
    /// # Errors
    /// [`BrokerError::External`]: none of them starts.
    pub fn files(&mut self, kernels: &[String], directory: Directory) -> Result<FilesRoute, BrokerError> {
        match &mut self.shared.external {
            Some(external) => external.files(kernels, directory),
            None => Err(BrokerError::NoKernels),
        }
    }

    pub(crate) fn max_sessions(&self) -> usize {
        self.config.max_sessions
    }

    /// Whether a publication is permitted and its port free.
    fn check(&self, publication: &Publication, session: &Session) -> Result<(), BrokerError> {
        let text = || kso_core::publish::text(publication);
        if let Some(reason) = self.shared.limits.as_ref().and_then(|limits| limits.refusal(publication)) {
            return Err(BrokerError::NotPublished { publication: text(), reason });
        }
        if publish::is_elsewhere(publication, &session.routes) {
            return Ok(());
        }
        for address in publish::claims(publication) {
            let clashes = |other: &Publication| {
                other.protocol == publication.protocol
                    && publish::claims(other).iter().any(|claimed| {
                        let (one, two) = (claimed.ip(), address.ip());
                        claimed.port() == address.port()
                            && (one == two || one.is_unspecified() || two.is_unspecified())
                            && one.is_ipv4() == two.is_ipv4()
                    })
            };
            if let Some(other) = self.sessions.values().find(|other| other.publish.iter().any(clashes)) {
                return Err(BrokerError::Published { publication: text(), address, session: other.id });
            }
            let trouble = match publication.protocol {
                Protocol::Udp => kso_provider::datagram::bind(address).err(),
                _ => kso_provider::stream::trouble(address),
            };
            match trouble {
                None => {}
                // A host without IPv6 publishes on IPv4 alone.
                Some(kso_wire::Errno::EADDRNOTAVAIL | kso_wire::Errno::EAFNOSUPPORT)
                    if address.is_ipv6() && publication.address.is_none_or(|wanted| wanted.is_ipv4()) => {}
                Some(errno) => {
                    let hint = match errno {
                        kso_wire::Errno::EADDRINUSE => ": something listens there already (see ss -ltnp)",
                        kso_wire::Errno::EACCES => {
                            ": ports below net.ipv4.ip_unprivileged_port_start need a privilege; choose a higher one"
                        }
                        kso_wire::Errno::EADDRNOTAVAIL => ": the host does not have this address",
                        _ => "",
                    };
                    return Err(BrokerError::Publish { publication: text(), address, errno, hint });
                }
            }
        }
        Ok(())
    }

    /// Ends a session. What programs still hold goes on to work until they close it.
    pub fn close_session(&mut self, id: SessionId) {
        // Of the only session of this process the last ends are worth a moment; others are not held up.
        let until = Instant::now() + LINGER;
        while self.config.control == Control::Run && self.shared.track.linger(id.0, until) {
            self.read_ends();
        }
        self.read_ends();
        let Some(session) = self.sessions.remove(&id.0) else { return };
        self.forwarder.forget_session(id.0);
        if let Some(external) = &mut self.shared.external {
            external.close_session(id.0);
        }
        self.completed.retain(|(other, ..)| *other != id);
        let end =
            event::SessionEnd { name: session.name.clone(), duration_us: session.started.elapsed().into() };
        let caller = Caller { pid: session.pid, program: String::new() };
        self.shared.eyes.see(id.0, &session.name, &caller, Kind::SessionEnd(end));
        tracing::debug!(session = id.0, "session closed");
    }

    /// Sets the process under which `kso ps` looks for the session's programs.
    pub fn set_pid(&mut self, id: SessionId, pid: u32) {
        if let Some(session) = self.sessions.get_mut(&id.0) {
            session.pid = pid;
        }
    }

    /// Decides and does. All but `Resolve` is done at once.
    pub fn handle(
        &mut self,
        id: SessionId,
        request: RequestId,
        caller: &Caller,
        asked: Request,
    ) -> Submitted {
        let Some(session) = self.sessions.get_mut(&id.0) else {
            return Submitted::Done(Answer::plain(Err(kso_wire::Failure::kernel(kso_wire::Errno::ENETDOWN))));
        };
        let shared = &mut self.shared;
        Submitted::Done(match asked {
            Request::Connect(wanted) => {
                if session.names_may_be_old() {
                    self.hosts.look(Instant::now());
                    session.load_hosts(&self.hosts);
                }
                streams::connect(session, shared, caller, &wanted)
            }
            Request::Listen(wanted) => {
                return streams::listen_for(session, shared, caller, &wanted, Some(request));
            }
            Request::Release(address) => streams::release(session, address),
            Request::OpenDatagram(wanted) => flows::open_datagram(session, shared, caller, &wanted),
            Request::BindDatagram(wanted) => flows::bind_datagram(session, &wanted),
            Request::OpenEcho(wanted) => flows::open_echo(session, shared, caller, &wanted),
            Request::Resolve(query) => return self.resolve(id, request, caller, query),
        })
    }

    /// Closes a socket, elsewhere if that costs less.
    pub(crate) fn discard(&self, socket: OwnedFd) {
        self.shared.stock.discard(socket);
    }

    /// Whether somebody traces.
    pub(crate) fn is_watched(&self) -> bool {
        self.shared.eyes.open() || self.config.routes.iter().any(|route| route.program.is_some())
    }

    /// The answer to `request` is no longer wanted.
    pub fn forget(&mut self, id: SessionId, request: RequestId) {
        self.forwarder.forget((id.0, request));
        self.completed.retain(|(session, other, _)| (*session, *other) != (id, request));
    }

    /// Readable when [`Self::run_ready`] has something to do.
    #[must_use]
    pub fn poll_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// The next answer that came late.
    pub fn completed(&mut self) -> Option<(SessionId, RequestId, Answer)> {
        self.completed.pop_front()
    }

    /// When [`Self::run_ready`] has something to do at the latest.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        let guests = self.guests.next_deadline();
        let external = self.shared.external.as_ref().and_then(External::next_deadline);
        let own = [self.forwarder.next_deadline(), self.shared.track.next_deadline(), guests, external];
        own.into_iter().flatten().min()
    }

    /// Serves what is ready. Never waits.
    pub fn run_ready(&mut self) {
        let mut events = Vec::with_capacity(EVENTS);
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let _ = epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&zero));
        for event in events {
            let data = event.data.u64();
            self.serve(data & token::KIND, u32::try_from(data & !token::KIND).unwrap_or(0));
        }
        let now = Instant::now();
        let mut done = Vec::new();
        self.forwarder.expire(self.epoll.as_fd(), now, &mut done);
        done.into_iter().for_each(|done| self.resolved(done));
        self.expire_guests(now);
        self.look_at_external();
        let mut seen = Vec::new();
        self.shared.track.look(&self.sessions, now, &mut seen);
        self.tell(seen);
    }

    fn serve(&mut self, kind: u64, which: u32) {
        match kind {
            token::ADDRESSES => self.shared.addresses.run_ready(),
            token::NAMES => {
                let slot = usize::try_from(which).unwrap_or(usize::MAX);
                let done: Option<Done> = self.forwarder.ready(self.epoll.as_fd(), slot, Instant::now());
                done.into_iter().for_each(|done| self.resolved(done));
            }
            token::CONTROL => {
                while let Some(client) = self.control.as_ref().and_then(ControlSocket::accept) {
                    self.shared.eyes.add(self.epoll.as_fd(), client);
                }
            }
            token::CLIENT => {
                if self.shared.eyes.ready(which) {
                    let mut report = report::report(&mut self.sessions, &self.guests);
                    if let Some(external) = &self.shared.external {
                        report.add_external(external);
                    }
                    self.shared.eyes.tell(which, &report);
                }
                self.watch_ends();
            }
            token::GUEST_LISTENER => self.guest_accept(which),
            token::ENDS => self.read_ends(),
            token::METRICS => {
                if let Some(exporter) = &mut self.exporter {
                    exporter.accept(self.epoll.as_fd());
                }
            }
            token::SCRAPE => {
                self.read_ends();
                let listeners =
                    self.sessions.values_mut().map(|session| session.listeners.live().len()).sum();
                let kernels = self.shared.external.as_ref().map(|one| one.kernels().statuses());
                let snapshot = Snapshot {
                    totals: &self.shared.totals,
                    sessions: self.sessions.len(),
                    listeners,
                    kernels: kernels.unwrap_or_default(),
                };
                if let Some(exporter) = &mut self.exporter {
                    exporter.ready(which, &snapshot);
                }
            }
            _ => {}
        }
    }

    /// What other kernels told.
    fn look_at_external(&mut self) {
        let Some(external) = &mut self.shared.external else { return };
        external.run_ready(&mut self.sessions);
        self.completed.extend(external.completed.drain(..));
        let seen: Vec<Seen> =
            external.seen.drain(..).map(|(session, caller, kind)| Seen { session, caller, kind }).collect();
        self.tell(seen);
    }

    /// Listens to the kernel's notifications while somebody watches, and not otherwise.
    fn watch_ends(&mut self) {
        if !self.shared.eyes.open() {
            self.shared.track.stop();
            return;
        }
        match self.shared.track.start(self.shared.eyes.tells()) {
            Ok(None) => {}
            Ok(Some(descriptor)) => {
                let data = EventData::new_u64(token::ENDS);
                if let Err(error) = epoll::add(&self.epoll, descriptor, data, EventFlags::IN) {
                    tracing::warn!(%error, "ends of connections will not be told");
                }
            }
            Err(error) => tracing::warn!(%error, "ends of connections will not be told"),
        }
    }

    fn read_ends(&mut self) {
        let mut seen = Vec::new();
        self.shared.track.run_ready(&self.sessions, &mut seen);
        self.tell(seen);
    }

    fn tell(&mut self, seen: Vec<Seen>) {
        for Seen { session, caller, kind } in seen {
            let totals = &mut self.shared.totals;
            match &kind {
                Kind::Closed(closed) => {
                    totals.bytes_in += closed.bytes_in;
                    totals.bytes_out += closed.bytes_out;
                }
                Kind::Accept(_) => totals.accepts += 1,
                _ => {}
            }
            let name = self.sessions.get(&session).map_or("", |session| &session.name);
            self.shared.eyes.see(session, name, &caller, kind);
        }
    }

    pub(crate) fn look_at_files(&mut self, now: Instant) {
        self.hosts.look(now);
        let before = self.resolv_conf.version;
        self.resolv_conf.look(now);
        if self.resolv_conf.version != before {
            self.forwarder.configure(servers(&self.config, &self.resolv_conf));
        }
    }
}

fn servers(config: &BrokerConfig, file: &Watched) -> ResolvConf {
    let mut conf = ResolvConf::parse(&file.text);
    if let Some(servers) = &config.name_servers {
        conf.servers.clone_from(servers);
    }
    conf
}
