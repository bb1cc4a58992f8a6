//! The broker's side: makes connections, one thread for all handshakes of a provider.
//!
//! ```text
//!   an order, or the pool has room:  dialling --> greeting -- handshake --> a tunnel, or ready in the pool
//!                                        +-- failed -----+--> again, a few times; then the stream is reset
//! ```
//!
//! A stream takes a connection from the pool, so that `connect` pays for no handshake; another is made in its place. When the
//! pool is empty an order is dialled for it. The first order is the control stream: it settles which of the provider's addresses
//! is used, and what becomes of it is told ([`Dialer::fate`]).

use crate::engine::Engine;
use crate::greeting::Greeting;
use crate::identity::{self, Files, IdentityError};
use crate::pump::{Pump, Wake, wait};
use crate::tunnel::{Fate, Tunnel};
use kso_provider::relay::{interest, stream_pair};
use rustix::event::epoll::{self, EventData};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Connections that are kept ready.
const READY: usize = 8;
/// Under way at one time: less than a provider lets one address have.
const MOST: usize = 32;
/// So long one is kept ready: less than a provider waits for its first bytes.
const STALE: Duration = Duration::from_secs(40);
/// How long connecting and the handshake may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// So often a stream is dialled.
const TRIES: u32 = 3;
/// After a failure nothing is dialled for so long.
const PAUSE: Duration = Duration::from_millis(200);
/// The number of an event that is no connection's.
const WAKE: u64 = u64::MAX;

/// Where a provider is, and who is to be found there.
#[derive(Clone, Debug)]
pub struct Target {
    addresses: Vec<SocketAddr>,
    name: ServerName<'static>,
    config: Arc<ClientConfig>,
}

impl Target {
    /// At the first of these addresses that answers; its certificate has to be for `name`.
    ///
    /// # Errors
    /// See [`IdentityError`].
    pub fn new(addresses: Vec<SocketAddr>, name: &str, files: &Files) -> Result<Self, IdentityError> {
        let server =
            ServerName::try_from(name.to_owned()).map_err(|_| IdentityError::Name(name.to_owned()))?;
        Ok(Self { addresses, name: server, config: identity::client(files)? })
    }
}

/// A stream that wants a connection.
#[derive(Debug)]
struct Order {
    inner: OwnedFd,
    is_control: bool,
    tries: u32,
}

/// A connection that waits to be used.
#[derive(Debug)]
struct Ready {
    id: u64,
    greeting: Greeting,
    since: Instant,
}

#[derive(Debug, Default)]
struct Desk {
    orders: VecDeque<Order>,
    pool: VecDeque<Ready>,
}

#[derive(Debug)]
struct Shared {
    epoll: OwnedFd,
    wake: Wake,
    pump: Pump,
    desk: Mutex<Desk>,
    fate: Arc<Fate>,
    ended: AtomicBool,
}

impl Shared {
    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn carry(&self, greeting: Greeting, order: Order) {
        let fate = order.is_control.then(|| Arc::clone(&self.fate));
        let Greeting { tcp, engine, plain, .. } = greeting;
        let _ = epoll::delete(&self.epoll, &tcp);
        self.pump.join(Tunnel::new(tcp, engine, order.inner, plain).dialled().telling(fate));
    }
}

/// See the module. Dropped, all its streams are closed as they are.
#[derive(Debug)]
pub struct Dialer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Dialer {
    /// Begins with the control stream, which comes back: what is written to it is sent when there is a connection.
    ///
    /// # Errors
    /// `EMFILE`, or no more threads.
    pub fn start(target: Target) -> io::Result<(Self, OwnedFd)> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = Wake::new(&epoll, WAKE)?;
        let (control, inner) = stream_pair()?;
        let order = Order { inner, is_control: true, tries: 0 };
        let desk = Desk { orders: VecDeque::from([order]), pool: VecDeque::new() };
        let fate = Arc::new(Fate::waking(wake.clone()));
        let shared = Arc::new(Shared {
            epoll,
            wake,
            pump: Pump::start()?,
            desk: Mutex::new(desk),
            fate,
            ended: AtomicBool::new(false),
        });
        let state = Loop {
            shared: Arc::clone(&shared),
            candidates: target.addresses.iter().copied().collect(),
            target,
            address: None,
            dials: HashMap::new(),
            next: 0,
            pause: None,
        };
        let thread = std::thread::Builder::new().name("kso-dialer".into()).spawn(|| state.run())?;
        shared.wake.wake();
        Ok((Self { shared, thread: Some(thread) }, control))
    }

    /// A new stream. It can be written to at once.
    ///
    /// # Errors
    /// `EMFILE`.
    pub fn open(&self) -> io::Result<OwnedFd> {
        let (own, inner) = stream_pair()?;
        let order = Order { inner, is_control: false, tries: 0 };
        let mut desk = self.shared.desk();
        match desk.pool.pop_front() {
            Some(ready) => self.shared.carry(ready.greeting, order),
            None => desk.orders.push_back(order),
        }
        drop(desk);
        self.shared.wake.wake();
        Ok(own)
    }

    /// Why there is no control stream any more.
    #[must_use]
    pub fn fate(&self) -> Option<String> {
        self.shared.fate.get()
    }

    /// Connections that are ready to be used.
    #[must_use]
    pub fn ready(&self) -> usize {
        self.shared.desk().pool.len()
    }
}

impl Drop for Dialer {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        self.shared.wake.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

enum Stage {
    Dialling(OwnedFd),
    Greeting(Box<Greeting>),
}

struct Dial {
    stage: Stage,
    address: SocketAddr,
    order: Option<Order>,
    until: Instant,
}

struct Loop {
    shared: Arc<Shared>,
    target: Target,
    /// Addresses that the control stream was not tried at yet.
    candidates: VecDeque<SocketAddr>,
    /// Where it is.
    address: Option<SocketAddr>,
    dials: HashMap<u64, Dial>,
    next: u64,
    pause: Option<Instant>,
}

impl Loop {
    fn run(mut self) {
        let mut events = Vec::new();
        while !self.shared.ended.load(Ordering::Relaxed) {
            wait(&self.shared.epoll, &mut events, self.deadline());
            for event in &events {
                match event.data.u64() {
                    WAKE => self.shared.wake.quiet(),
                    id => self.ready(id),
                }
            }
            self.look(Instant::now());
            self.begin();
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let stale = self.shared.desk().pool.iter().map(|ready| ready.since + STALE).min();
        self.dials.values().map(|dial| dial.until).chain(stale).chain(self.pause).min()
    }

    /// Looks at the clock.
    fn look(&mut self, now: Instant) {
        self.shared.desk().pool.retain(|ready| now < ready.since + STALE);
        self.pause = self.pause.filter(|until| now < *until);
        let late: Vec<u64> =
            self.dials.iter().filter(|(_, dial)| dial.until <= now).map(|(id, _)| *id).collect();
        for id in late {
            if let Some(dial) = self.dials.remove(&id) {
                self.failed(dial.order, dial.address, "it does not answer");
            }
        }
    }

    /// Dials what is ordered, and what the pool lacks.
    fn begin(&mut self) {
        while self.pause.is_none() && self.dials.len() < MOST {
            let unordered = self.dials.values().filter(|dial| dial.order.is_none()).count();
            let mut desk = self.shared.desk();
            // A provider that refuses us is asked once.
            let lacks = self.shared.fate.is_heard() && desk.pool.len() + unordered < READY;
            let order = match desk.orders.front() {
                // Streams have to be where the control stream is.
                Some(order) if order.is_control || self.address.is_some() => desk.orders.pop_front(),
                _ => None,
            };
            drop(desk);
            let address = match &order {
                Some(order) if order.is_control => self.candidates.pop_front(),
                None if !lacks => return,
                _ => self.address,
            };
            let Some(address) = address else {
                // Of no address at all.
                if order.is_some_and(|order| order.is_control) {
                    self.shared.fate.set("it has no address");
                }
                return;
            };
            self.dial(address, order);
        }
    }

    fn dial(&mut self, address: SocketAddr, order: Option<Order>) {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        self.next += 1;
        let id = self.next;
        let begun = socket_with(family, SocketType::STREAM, flags, None).and_then(|tcp| {
            match rustix::net::connect(&tcp, &address) {
                Ok(()) | Err(Errno::INPROGRESS) => {}
                Err(error) => return Err(error),
            }
            epoll::add(&self.shared.epoll, &tcp, EventData::new_u64(id), interest())?;
            Ok(tcp)
        });
        match begun {
            Ok(tcp) => {
                let until = Instant::now() + PATIENCE;
                self.dials.insert(id, Dial { stage: Stage::Dialling(tcp), address, order, until });
            }
            Err(error) => self.failed(order, address, &error.to_string()),
        }
    }

    fn failed(&mut self, order: Option<Order>, address: SocketAddr, why: &str) {
        let Some(order) = order else {
            tracing::debug!(%address, why, "no connection can be kept ready");
            self.pause = Some(Instant::now() + PAUSE);
            return;
        };
        if order.is_control {
            tracing::info!(%address, why, "a provider cannot be reached");
            if self.candidates.is_empty() {
                // Dropped: its end is closed.
                let is_one = self.target.addresses.len() == 1;
                self.shared.fate.set(if is_one { why.to_owned() } else { format!("{address}: {why}") });
            } else {
                self.shared.desk().orders.push_front(order);
            }
            return;
        }
        self.pause = Some(Instant::now() + PAUSE);
        let tries = order.tries + 1;
        if tries < TRIES {
            self.shared.desk().orders.push_front(Order { tries, ..order });
        } else {
            tracing::warn!(%address, why, "a stream cannot be opened");
        }
    }

    fn ready(&mut self, id: u64) {
        let Some(Dial { stage, address, order, until }) = self.dials.remove(&id) else {
            return self.look_at_pool(id);
        };
        let stage = match stage {
            Stage::Dialling(tcp) => self.connected(tcp),
            Stage::Greeting(mut greeting) => match greeting.run(0) {
                Ok(true) => return self.greeted(id, *greeting, address, order),
                Ok(false) => Ok(Stage::Greeting(greeting)),
                Err(broken) => Err(broken.to_string()),
            },
        };
        let again = matches!(stage, Ok(Stage::Greeting(ref greeting)) if greeting.is_new());
        match stage {
            Ok(stage) => {
                self.dials.insert(id, Dial { stage, address, order, until });
            }
            Err(why) => self.failed(order, address, &why),
        }
        if again {
            // It has a first word to say.
            self.ready(id);
        }
    }

    /// Whether a connection is up, and what comes next.
    fn connected(&self, tcp: OwnedFd) -> Result<Stage, String> {
        match kso_sys::take_error(tcp.as_fd()) {
            Ok(0) if kso_sys::peer_address(tcp.as_fd()).is_err() => Ok(Stage::Dialling(tcp)),
            Ok(0) => {
                let engine = Engine::client(&self.target.config, &self.target.name);
                let engine = engine.map_err(|broken| broken.to_string())?;
                Ok(Stage::Greeting(Box::new(Greeting::new(tcp, engine))))
            }
            Ok(raw) => Err(io::Error::from_raw_os_error(raw).to_string()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// The handshake is made.
    fn greeted(&mut self, id: u64, greeting: Greeting, address: SocketAddr, order: Option<Order>) {
        if order.as_ref().is_some_and(|order| order.is_control) {
            self.address = Some(address);
        }
        let mut desk = self.shared.desk();
        // Whoever waits longest has it.
        match order.or_else(|| desk.orders.pop_front()) {
            Some(order) => self.shared.carry(greeting, order),
            None => desk.pool.push_back(Ready { id, greeting, since: Instant::now() }),
        }
    }

    /// Something came on a connection that is ready: session tickets, or its end.
    fn look_at_pool(&mut self, id: u64) {
        let mut desk = self.shared.desk();
        let Some(index) = desk.pool.iter().position(|ready| ready.id == id) else { return };
        let is_good = desk.pool.get_mut(index).is_some_and(|ready| {
            let greeting = &mut ready.greeting;
            let well = greeting.run(0).inspect_err(|broken| {
                tracing::debug!(%broken, "a connection that was ready is lost");
            });
            well.is_ok() && greeting.plain.is_empty() && !greeting.engine.has_ended()
        });
        if !is_good {
            desk.pool.remove(index);
            self.pause = Some(Instant::now() + PAUSE);
        }
    }
}
