//! All external kernels of a broker, as its loop sees them.

use crate::files::{Directory, FilesRoute, Place};
use crate::make::{self, StartError};
use crate::netstack;
use crate::network::default_addresses;
use crate::worker::{Command, Connecting, Event, Happened, Inbox, Listening, Load, Outbox, Wake, Worker};
use kso_core::kernels::{KernelSpec, Make};
use kso_core::routes::HOST;
use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

/// How kernels are set up.
#[derive(Clone, Debug, Default)]
pub struct KernelsConfig {
    /// Those there are, besides `host`.
    pub kernels: Vec<KernelSpec>,
    /// The kso command, to run inside; `None`: this program itself.
    pub program: Option<PathBuf>,
}

/// How a kernel is.
#[derive(Clone, Debug)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// Its make.
    pub make: Make,
    /// `idle`, `starting`, `up`, `draining`, `down` or `aside`.
    pub state: &'static str,
    /// Its version, once it was up.
    pub version: String,
    /// What it serves, once it was up.
    pub services: Vec<&'static str>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Connections now.
    pub streams: usize,
    /// Listeners now.
    pub listeners: usize,
    /// Since when it is up.
    pub up_since: Option<Instant>,
    /// How often it died.
    pub deaths: u64,
    /// When and why it died last.
    pub last_death: Option<(SystemTime, String)>,
}

#[derive(Debug)]
struct Entry {
    spec: KernelSpec,
    status: Status,
    load: Arc<Load>,
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    commands: Sender<Command>,
    wake: Wake,
    thread: JoinHandle<()>,
}

/// See the module.
#[derive(Debug)]
pub struct Kernels {
    entries: BTreeMap<String, Entry>,
    events: Receiver<Event>,
    sender: Sender<Event>,
    wake: Wake,
    tags: Arc<AtomicU64>,
    program: PathBuf,
    /// Taken while somebody waited for a kernel.
    early: std::collections::VecDeque<Event>,
}

impl Kernels {
    /// Starts none yet.
    ///
    /// # Errors
    /// `EMFILE`.
    pub fn new(config: KernelsConfig) -> io::Result<Self> {
        let (sender, events) = mpsc::channel();
        let program = match config.program {
            Some(program) => program,
            None => std::env::current_exe()?,
        };
        let mut kernels = Self {
            entries: BTreeMap::new(),
            events,
            sender,
            wake: Wake::new()?,
            tags: Arc::new(AtomicU64::new(1)),
            program,
            early: std::collections::VecDeque::new(),
        };
        if let Ok(host) = KernelSpec::parse(HOST) {
            kernels.add(host);
        }
        for spec in config.kernels {
            kernels.add(spec);
        }
        Ok(kernels)
    }

    fn add(&mut self, mut spec: KernelSpec) {
        if matches!(spec.make, Make::Gvisor | Make::Vm) && spec.addresses.is_empty() {
            (spec.addresses, spec.gateways) = default_addresses(self.entries.len());
        }
        if spec.make == Make::Netstack && spec.addresses.is_empty() {
            (spec.addresses, spec.gateways) = netstack::default_addresses();
        }
        let status = Status {
            name: spec.name.clone(),
            make: spec.make,
            state: "idle",
            version: String::new(),
            services: Vec::new(),
            addresses: spec.addresses.iter().map(ipnet::IpNet::addr).collect(),
            streams: 0,
            listeners: 0,
            up_since: None,
            deaths: 0,
            last_death: None,
        };
        let entry = Entry { spec, status, load: Arc::default(), running: None };
        self.entries.insert(entry.spec.name.clone(), entry);
    }

    /// Whether there is a kernel of this name.
    #[must_use]
    pub fn knows(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// Whether it serves now.
    #[must_use]
    pub fn is_up(&self, name: &str) -> bool {
        self.entries.get(name).is_some_and(|entry| entry.status.state == "up")
    }

    /// How they are.
    #[must_use]
    pub fn statuses(&self) -> Vec<Status> {
        let load = |entry: &Entry| Status {
            streams: entry.load.streams.load(Ordering::Relaxed),
            listeners: entry.load.listeners.load(Ordering::Relaxed),
            ..entry.status.clone()
        };
        self.entries.values().map(load).collect()
    }

    /// Starts a kernel, unless it runs, and waits until it serves.
    ///
    /// # Errors
    /// It does not.
    pub fn start(&mut self, name: &str, wait: Duration) -> Result<(), StartError> {
        let Some(entry) = self.entries.get_mut(name) else {
            let hint = "name it with --kernel, or in kso.toml as [kernel.NAME]";
            return Err(StartError::Missing { what: format!("the kernel `{name}`"), hint });
        };
        if entry.running.is_none() {
            let (commands, received) = mpsc::channel();
            let wake = Wake::new().map_err(StartError::step("start a kernel"))?;
            let worker = Worker {
                spec: entry.spec.clone(),
                program: self.program.clone(),
                inbox: Inbox { commands: received, wake: wake.clone() },
                outbox: Outbox {
                    kernel: name.into(),
                    events: self.sender.clone(),
                    wake: self.wake.clone(),
                    tags: Arc::clone(&self.tags),
                    load: Arc::clone(&entry.load),
                },
            };
            let thread = std::thread::Builder::new()
                .name(format!("kso-{name}").chars().take(15).collect())
                .spawn(move || worker.run())
                .map_err(StartError::step("start a thread"))?;
            entry.status.state = "starting";
            entry.running = Some(Running { commands, wake, thread });
        }
        let until = Instant::now() + wait;
        while !self.is_up(name) {
            let left = until.saturating_duration_since(Instant::now());
            let Ok(event) = self.events.recv_timeout(left) else {
                let said = "it did not become ready in time".to_owned();
                return Err(StartError::Command { command: format!("kernel {name}"), said });
            };
            self.note(&event);
            let failed = match &event.what {
                Happened::Down { reason, .. } if &*event.kernel == name => Some(reason.clone()),
                Happened::Aside if &*event.kernel == name => Some("it died too often".to_owned()),
                _ => None,
            };
            self.early.push_back(event);
            if let Some(said) = failed {
                return Err(StartError::Command { command: format!("kernel {name}"), said });
            }
        }
        Ok(())
    }

    /// The address from which its connections to `peer` come.
    #[must_use]
    pub fn source(&self, name: &str, peer: IpAddr) -> Option<IpAddr> {
        let own = &self.entries.get(name)?.status.addresses;
        let peer = peer.to_canonical();
        if peer.is_loopback() {
            return Some(peer);
        }
        own.iter().copied().find(|own| own.is_ipv4() == peer.is_ipv4())
    }

    /// A name for a connection or listener.
    #[must_use]
    pub fn tag(&self) -> u64 {
        self.tags.fetch_add(1, Ordering::Relaxed)
    }

    /// Has a connection made. Its fate is told by events, and by the stand-in itself.
    pub fn connect(&self, name: &str, connecting: Connecting) {
        self.send(name, Command::Connect(connecting));
    }

    /// Has a listener made: [`Happened::Listening`] or [`Happened::NotListening`].
    pub fn listen(&self, name: &str, listening: Listening) {
        self.send(name, Command::Listen(listening));
    }

    /// Has a listener closed.
    pub fn unlisten(&self, name: &str, id: u64) {
        self.send(name, Command::Unlisten(id));
    }

    /// The way to a directory that each of these kernels can perform: the first that is up does. They are started.
    ///
    /// # Errors
    /// None of them starts.
    pub fn files(
        &mut self,
        names: &[String],
        directory: Directory,
        wait: Duration,
    ) -> Result<FilesRoute, StartError> {
        let (mut failed, mut places) = (None, Vec::new());
        let mut started = false;
        for name in names {
            match self.start(name, wait) {
                Ok(()) => started = true,
                Err(error) => {
                    // It may come later, and meanwhile there are others.
                    tracing::warn!(kernel = name, %error, "a kernel does not start: others take its place");
                    failed = Some(error);
                }
            }
            if let Some((entry, running)) =
                self.entries.get(name).and_then(|entry| Some((entry, entry.running.as_ref()?)))
            {
                places.push(Place {
                    name: name.as_str().into(),
                    commands: running.commands.clone(),
                    wake: running.wake.clone(),
                    load: Arc::clone(&entry.load),
                });
            }
        }
        match failed {
            Some(error) if !started => Err(error),
            _ => Ok(FilesRoute::new(places, directory)),
        }
    }

    fn send(&self, name: &str, command: Command) {
        let Some(running) = self.entries.get(name).and_then(|entry| entry.running.as_ref()) else { return };
        if running.commands.send(command).is_ok() {
            running.wake.wake();
        }
    }

    /// Readable when [`Self::next_event`] has something.
    #[must_use]
    pub fn poll_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// The next event.
    pub fn next_event(&mut self) -> Option<Event> {
        if let Some(event) = self.early.pop_front() {
            return Some(event);
        }
        let event = match self.events.try_recv() {
            Ok(event) => event,
            Err(_) => {
                self.wake.quiet();
                // One may have come in between.
                self.events.try_recv().ok()?
            }
        };
        self.note(&event);
        Some(event)
    }

    fn note(&mut self, event: &Event) {
        let Some(Entry { spec, status, .. }) = self.entries.get_mut(&*event.kernel) else { return };
        match &event.what {
            Happened::Up(welcome) => {
                status.state = "up";
                status.up_since = Some(Instant::now());
                status.version.clone_from(&welcome.kernel);
                status.services = welcome.services.iter().map(|service| service.name()).collect();
                if spec.addresses.is_empty() {
                    status.addresses.clone_from(&welcome.addresses);
                }
            }
            Happened::Down { reason, .. } => {
                if status.state == "up" || status.state == "draining" {
                    status.deaths += 1;
                }
                if status.state != "aside" {
                    status.state = "down";
                }
                status.up_since = None;
                status.last_death = Some((SystemTime::now(), reason.clone()));
            }
            Happened::Aside => status.state = "aside",
            Happened::Draining => status.state = "draining",
            _ => {}
        }
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        let running: Vec<Running> =
            self.entries.values_mut().filter_map(|entry| entry.running.take()).collect();
        for one in &running {
            let _ = one.commands.send(Command::Stop);
            one.wake.wake();
        }
        for one in running {
            let _ = one.thread.join();
        }
    }
}

/// What each make of kernel needs here and does not have.
#[must_use]
pub fn what_is_missing() -> Vec<(Make, Vec<String>)> {
    Make::ALL.into_iter().map(|make| (make, make::missing(make))).collect()
}

/// Where a listener listens on a kernel that is not the host's: its network is its own, so what is published on loopback
/// here is published on its addresses there.
#[must_use]
pub fn outer_address(published: SocketAddr, is_loopback: bool) -> SocketAddr {
    if !is_loopback {
        return published;
    }
    let any: IpAddr = match published.ip() {
        IpAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    SocketAddr::new(any, published.port())
}
