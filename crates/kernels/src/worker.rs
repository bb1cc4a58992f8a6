//! The thread of a kernel: starts it, serves it, and starts it again when it dies.
//!
//! ```text
//!   starting -- Welcome --> up -- fault --> down -- after a while --> starting
//!      +-- cannot start --> down              +-- died too often --> put aside
//! ```

use crate::exchange::{Exchange, Pending};
use crate::files::{Serving, Sharing};
use crate::make;
use crate::session::{Remains, Session};
use kso_core::kernels::KernelSpec;
use kso_wire::provide::Welcome;
use kso_wire::{Errno, SocketOptions};
use rustix::event::{EventfdFlags, eventfd};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

/// The first wait before it is started again; each death doubles it.
const FIRST_WAIT: Duration = Duration::from_millis(50);
/// The longest wait.
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// It lived so long: its next death is a first one.
const LONG_LIFE: Duration = Duration::from_secs(10);
/// After so many deaths in a row it is put aside.
const MOST_DEATHS: u32 = 8;

/// A connection for a kernel to make.
#[derive(Debug)]
pub struct Connecting {
    /// Named so in events.
    pub tag: u64,
    /// Where its stand-in is.
    pub exchange: Arc<Exchange>,
    /// The stand-in.
    pub pending: Pending,
    /// Options to set on the true socket.
    pub options: SocketOptions,
}

/// A listener for a kernel to have.
#[derive(Debug, Clone)]
pub struct Listening {
    /// Named so in events; never used twice.
    pub id: u64,
    /// Where its stand-in is.
    pub exchange: Arc<Exchange>,
    /// The stand-in's address: the program's.
    pub inner: SocketAddr,
    /// Where the kernel shall listen.
    pub outer: SocketAddr,
    /// Connections that may wait there.
    pub backlog: i32,
    /// Options to set on the true socket.
    pub options: SocketOptions,
}

pub(crate) enum Command {
    Connect(Connecting),
    Listen(Listening),
    Unlisten(u64),
    Share(Sharing),
    Stop,
}

/// Something happened to a kernel.
#[derive(Debug)]
pub struct Event {
    /// Which.
    pub kernel: Arc<str>,
    /// What.
    pub what: Happened,
}

/// What happened.
#[derive(Debug)]
pub enum Happened {
    /// It serves.
    Up(Welcome),
    /// It died, or could not be started; it will be started again.
    Down {
        /// Why.
        reason: String,
        /// What has to go to another kernel.
        connecting: Vec<Connecting>,
        /// What has to go to another kernel.
        listening: Vec<Listening>,
    },
    /// It died too often, and stays down.
    Aside,
    /// It takes nothing new.
    Draining,
    /// A connection is up.
    Connected {
        /// Which.
        tag: u64,
        /// Its address on the kernel.
        local: SocketAddr,
    },
    /// A connection failed; its stand-in was told.
    Failed {
        /// Which.
        tag: u64,
        /// Why.
        errno: Errno,
    },
    /// A listener listens.
    Listening {
        /// Which.
        id: u64,
        /// Where.
        local: SocketAddr,
    },
    /// A listener cannot, or not any more.
    NotListening {
        /// Which.
        listening: Listening,
        /// Why.
        errno: Errno,
    },
    /// The program closed a listener.
    Closed {
        /// Which.
        listener: u64,
    },
    /// A connection came in.
    Accepted {
        /// At which listener.
        listener: u64,
        /// Named so from now on.
        tag: u64,
        /// From.
        peer: SocketAddr,
        /// The address on the kernel.
        local: SocketAddr,
    },
    /// A connection is over.
    Ended {
        /// Which.
        tag: u64,
        /// Bytes that the program received.
        bytes_in: u64,
        /// Bytes that the program sent.
        bytes_out: u64,
        /// What broke it.
        errno: Option<Errno>,
    },
}

/// Wakes a loop that polls it.
#[derive(Clone, Debug)]
pub(crate) struct Wake(Arc<OwnedFd>);

impl Wake {
    pub fn new() -> std::io::Result<Self> {
        Ok(Self(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)))
    }

    pub fn wake(&self) {
        // Full: it is awake.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    pub fn quiet(&self) {
        let _ = rustix::io::read(&self.0, &mut [0_u8; 8]);
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What a kernel is told.
pub(crate) struct Inbox {
    pub commands: Receiver<Command>,
    pub wake: Wake,
}

impl Inbox {
    pub fn wake(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    pub fn quiet(&self) {
        self.wake.quiet();
    }

    pub fn next(&self) -> Option<Command> {
        self.commands.try_recv().ok()
    }
}

/// Connections and listeners now, and whether it serves files.
#[derive(Debug, Default)]
pub(crate) struct Load {
    pub streams: AtomicUsize,
    pub listeners: AtomicUsize,
    pub serving: Serving,
}

/// What a kernel tells.
pub(crate) struct Outbox {
    pub kernel: Arc<str>,
    pub events: Sender<Event>,
    pub wake: Wake,
    pub tags: Arc<AtomicU64>,
    pub load: Arc<Load>,
}

impl Outbox {
    pub fn tell(&self, what: Happened) {
        match &what {
            Happened::Up(welcome) => self.load.serving.welcomed(welcome),
            Happened::Down { .. } | Happened::Draining => self.load.serving.down(),
            Happened::Aside => self.load.serving.aside(),
            _ => {}
        }
        if self.events.send(Event { kernel: Arc::clone(&self.kernel), what }).is_ok() {
            self.wake.wake();
        }
    }

    /// A name for a connection.
    pub fn tag(&self) -> u64 {
        self.tags.fetch_add(1, Ordering::Relaxed)
    }

    pub fn set_load(&self, (streams, listeners): (usize, usize)) {
        self.load.streams.store(streams, Ordering::Relaxed);
        self.load.listeners.store(listeners, Ordering::Relaxed);
    }
}

/// See the module.
pub(crate) struct Worker {
    pub spec: KernelSpec,
    pub program: PathBuf,
    pub inbox: Inbox,
    pub outbox: Outbox,
}

impl Worker {
    pub fn run(self) {
        let mut deaths = 0_u32;
        for number in 0.. {
            let began = Instant::now();
            if !self.live(number) {
                return;
            }
            deaths = if began.elapsed() > LONG_LIFE { 1 } else { deaths + 1 };
            if deaths >= MOST_DEATHS {
                tracing::error!(kernel = %self.spec.name, deaths, "a kernel died too often and is put aside");
                self.outbox.tell(Happened::Aside);
                return self.stay_aside();
            }
            let wait = LONGEST_WAIT.min(FIRST_WAIT * 2_u32.saturating_pow(deaths - 1));
            if self.pause(wait) {
                return;
            }
        }
    }

    /// One life. False: it was told to end.
    fn live(&self, number: u64) -> bool {
        let make::Started { control, mut keep } = match make::start(&self.spec, &self.program, number) {
            Ok(started) => started,
            Err(error) => {
                self.down(error.to_string(), Vec::new(), Vec::new());
                return true;
            }
        };
        let name = format!("kso[{}]", std::process::id());
        let session =
            Session::new(control, keep.carrier(), &name, self.spec.patience, &self.inbox, &self.outbox);
        // What came while it was down is looked at first.
        self.inbox.wake.wake();
        let ended = match session {
            Ok(session) => {
                let Remains { reason, connecting, listening } = session.run();
                reason.map(|reason| (reason, connecting, listening))
            }
            Err(fault) => Some((fault.to_string(), Vec::new(), Vec::new())),
        };
        // Told first: ending what hangs takes a while, and its listeners are wanted elsewhere now.
        let died = ended.is_some();
        if let Some((reason, connecting, listening)) = ended {
            self.down(reason, connecting, listening);
        }
        keep.end(!died);
        died
    }

    fn down(&self, reason: String, connecting: Vec<Connecting>, listening: Vec<Listening>) {
        self.outbox.set_load((0, 0));
        tracing::warn!(kernel = %self.spec.name, reason, "a kernel is down");
        self.outbox.tell(Happened::Down { reason, connecting, listening });
    }

    /// Waits; true: it was told to end. Other commands stay for the next life.
    fn pause(&self, wait: Duration) -> bool {
        let until = Instant::now() + wait;
        let (mut connecting, mut listening) = (Vec::new(), Vec::new());
        let stop = loop {
            match self.inbox.commands.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(Command::Stop) | Err(RecvTimeoutError::Disconnected) => break true,
                Ok(Command::Connect(one)) => connecting.push(one),
                Ok(Command::Listen(one)) => listening.push(one),
                Ok(Command::Unlisten(id)) => listening.retain(|one: &Listening| one.id != id),
                // Who asked goes to the next kernel.
                Ok(Command::Share(_)) => {}
                Err(RecvTimeoutError::Timeout) => break false,
            }
        };
        if !connecting.is_empty() || !listening.is_empty() {
            // By now there may be another choice; if not, they come back here.
            let reason = "it is being started again".into();
            self.outbox.tell(Happened::Down { reason, connecting, listening });
        }
        stop
    }

    /// Gives back whatever it is told to do.
    fn stay_aside(&self) {
        while let Ok(command) = self.inbox.commands.recv() {
            match command {
                Command::Stop => return,
                Command::Connect(one) => {
                    one.exchange.fail(&one.pending, Errno::ENETUNREACH);
                    self.outbox.tell(Happened::Failed { tag: one.tag, errno: Errno::ENETUNREACH });
                }
                Command::Listen(listening) => {
                    self.outbox.tell(Happened::NotListening { listening, errno: Errno::ENETDOWN });
                }
                Command::Unlisten(_) | Command::Share(_) => {}
            }
        }
    }
}
