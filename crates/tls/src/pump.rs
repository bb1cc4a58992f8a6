//! The thread on which all tunnels run.
//!
//! ```text
//!   join --> running -- over --> parting (only who dialled, until the other side closed) --> gone
//!               +-- broken --> gone
//! ```

use crate::tunnel::{Scratch, Side, Step, Tunnel};
use kso_provider::relay;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustix::time::Timespec;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// So many events are taken at a time.
const EVENTS: usize = 256;
/// The number of an event that is no tunnel's.
const WAKE: u64 = u64::MAX;
/// How long the other side may take to close a connection that is over.
const PARTING: Duration = Duration::from_secs(5);
/// Connections that wait so at one time.
const MOST_PARTING: usize = 4096;

enum Command {
    Join(Box<Tunnel>),
    Stop,
}

/// Wakes a thread that polls it.
#[derive(Clone, Debug)]
pub(crate) struct Wake(Arc<OwnedFd>);

impl Wake {
    /// Registered with `epoll` as `number`.
    pub fn new(epoll: &OwnedFd, number: u64) -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(epoll, &wake, EventData::new_u64(number), EventFlags::IN)?;
        Ok(Self(Arc::new(wake)))
    }

    pub fn wake(&self) {
        // Full: it is awake.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    pub fn quiet(&self) {
        let _ = rustix::io::read(&self.0, &mut [0_u8; 8]);
    }
}

/// Waits for events, at most until `deadline`.
pub(crate) fn wait(epoll: &OwnedFd, events: &mut Vec<epoll::Event>, deadline: Option<Instant>) {
    let left = deadline.map(|until| until.saturating_duration_since(Instant::now()));
    let left = left.map(|left| Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 }));
    events.clear();
    events.reserve(EVENTS);
    // EINTR: the next turn comes at once.
    let _ = epoll::wait(epoll, rustix::buffer::spare_capacity(events), left.as_ref());
}

/// See the module. Dropped, its tunnels are closed as they are.
#[derive(Debug)]
pub struct Pump {
    commands: Sender<Command>,
    wake: Wake,
    load: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl Pump {
    /// Starts the thread.
    ///
    /// # Errors
    /// `EMFILE`, or no more threads.
    pub fn start() -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = Wake::new(&epoll, WAKE)?;
        let (commands, received) = mpsc::channel();
        let load = Arc::new(AtomicUsize::new(0));
        let state = Loop {
            epoll,
            wake: wake.clone(),
            commands: received,
            load: Arc::clone(&load),
            entries: HashMap::new(),
            queue: Vec::new(),
            parting: VecDeque::new(),
            next: 0,
            scratch: Scratch::default(),
        };
        let thread = std::thread::Builder::new().name("kso-tls".into()).spawn(|| state.run())?;
        Ok(Self { commands, wake, load, thread: Some(thread) })
    }

    /// Runs a tunnel to its end.
    pub fn join(&self, tunnel: Tunnel) {
        self.load.fetch_add(1, Ordering::Relaxed);
        if self.commands.send(Command::Join(Box::new(tunnel))).is_ok() {
            self.wake.wake();
        }
    }

    /// Tunnels now.
    #[must_use]
    pub fn load(&self) -> usize {
        self.load.load(Ordering::Relaxed)
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Stop);
        self.wake.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

enum Entry {
    Running { tunnel: Box<Tunnel>, queued: bool },
    Parting(OwnedFd),
}

struct Loop {
    epoll: OwnedFd,
    wake: Wake,
    commands: Receiver<Command>,
    load: Arc<AtomicUsize>,
    entries: HashMap<u64, Entry>,
    /// Those with something to do.
    queue: Vec<u64>,
    /// In the order in which they are given up.
    parting: VecDeque<(Instant, u64)>,
    next: u64,
    scratch: Scratch,
}

impl Loop {
    fn run(mut self) {
        let mut events = Vec::new();
        loop {
            let deadline = match self.queue.is_empty() {
                true => self.parting.front().map(|(until, _)| *until),
                false => Some(Instant::now()),
            };
            wait(&self.epoll, &mut events, deadline);
            for event in &events {
                match event.data.u64() {
                    WAKE => {
                        if self.obey() {
                            return;
                        }
                    }
                    data => self.ready(data, event.flags),
                }
            }
            self.run_queue();
            let now = Instant::now();
            while let Some((until, id)) = self.parting.front().copied()
                && (until <= now || self.parting.len() > MOST_PARTING)
            {
                self.parting.pop_front();
                self.entries.remove(&id);
            }
        }
    }

    /// True: it is to end.
    fn obey(&mut self) -> bool {
        self.wake.quiet();
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Join(tunnel) => self.join(tunnel),
                Command::Stop => return true,
            }
        }
        false
    }

    fn join(&mut self, tunnel: Box<Tunnel>) {
        self.next += 1;
        let id = self.next;
        for (kind, side) in [Side::Tcp, Side::Inner].into_iter().enumerate() {
            let data = EventData::new_u64(id << 1 | kind as u64);
            if let Err(error) = epoll::add(&self.epoll, tunnel.descriptor(side), data, relay::interest()) {
                tracing::warn!(%error, "a stream cannot be watched");
                self.load.fetch_sub(1, Ordering::Relaxed);
                return;
            }
        }
        self.entries.insert(id, Entry::Running { tunnel, queued: true });
        self.queue.push(id);
    }

    fn ready(&mut self, data: u64, flags: EventFlags) {
        let (id, side) = (data >> 1, if data & 1 == 0 { Side::Tcp } else { Side::Inner });
        match self.entries.get_mut(&id) {
            Some(Entry::Running { tunnel, queued }) => {
                tunnel.ready(side, flags);
                if !std::mem::replace(queued, true) {
                    self.queue.push(id);
                }
            }
            Some(Entry::Parting(tcp)) if has_ended(tcp) => {
                self.entries.remove(&id);
            }
            _ => {}
        }
    }

    fn run_queue(&mut self) {
        for id in std::mem::take(&mut self.queue) {
            let Some(Entry::Running { tunnel, queued }) = self.entries.get_mut(&id) else { continue };
            *queued = false;
            match tunnel.run(&mut self.scratch) {
                Step::Wait => {}
                Step::Again => {
                    *queued = true;
                    self.queue.push(id);
                }
                Step::Over => self.part(id),
                Step::Broken(broken) => {
                    tracing::debug!(%broken, "a stream is reset");
                    self.entries.remove(&id);
                    self.load.fetch_sub(1, Ordering::Relaxed);
                }
            }
        }
    }

    fn part(&mut self, id: u64) {
        self.load.fetch_sub(1, Ordering::Relaxed);
        let Some(Entry::Running { tunnel, .. }) = self.entries.remove(&id) else { return };
        // Closed already, the other side was faster: epoll tells a change only.
        if let Some(tcp) = tunnel.into_parting()
            && !has_ended(&tcp)
        {
            self.entries.insert(id, Entry::Parting(tcp));
            self.parting.push_back((Instant::now() + PARTING, id));
        }
    }
}

/// Whether the other side closed the connection. What it still sends is of no interest.
pub(crate) fn has_ended(tcp: &OwnedFd) -> bool {
    use rustix::event::{PollFd, PollFlags, poll};
    let mut polled = [PollFd::from_borrowed_fd(tcp.as_fd(), PollFlags::RDHUP)];
    let ready = poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok();
    let [polled] = polled;
    ready && !polled.revents().is_empty()
}
