//! One life of a kernel: its provider's client, and the far ends of the stand-ins that it serves.
//!
//! ```text
//!   Connect --> connecting -- Connected --> joined -- over --> gone
//!                   +-- Failed --> gone
//!   Accepted --> dialling -- the program's listener took it --> joined
//!                   +-- it is closed --> gone, and the listener with it
//!   Share   --> asked -- Shared --> who asked has our end; the other is shut down with the kernel
//!                   +-- Failed --> told
//! ```

use crate::carrier::Carrier;
use crate::exchange::{self, Exchange};
use crate::files::{self, Sharing};
use crate::worker::{Command, Connecting, Happened, Inbox, Listening, Outbox};
use kso_provider::client::{Client, Fault};
use kso_provider::relay::{self, Pair, Side, Step};
use kso_wire::Errno;
use kso_wire::provide::{self, ListenerId, StreamId, ToBroker};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::time::Timespec;
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// So many events are taken at a time.
const EVENTS: usize = 256;
/// Streams that wait at a listener for connections.
const OFFERS: usize = 16;
/// Descriptors of a connection, as the lower bits of an event's number have them.
const FAR: u64 = 0;
const STREAM: u64 = 1;
/// Numbers that are no connection's.
const CONTROL: u64 = u64::MAX;
const COMMANDS: u64 = u64::MAX - 1;
const CARRIER: u64 = u64::MAX - 2;

/// What ends a session.
enum Failed {
    Provider(Fault),
    Carrier(String),
    /// It is about to end, and has no connection left.
    Drained,
}

impl From<Fault> for Failed {
    fn from(fault: Fault) -> Self {
        Self::Provider(fault)
    }
}

enum State {
    Connecting(Connecting),
    Dialling { far: OwnedFd },
    Joined(Pair),
}

struct Connection {
    state: State,
    /// Our end of the stream; in a pair once joined.
    stream: Option<OwnedFd>,
    tag: u64,
    listener: Option<u64>,
    queued: bool,
}

struct Listener {
    spec: Listening,
    /// Streams offered and not used up.
    offers: HashMap<StreamId, OwnedFd>,
}

/// A directory that is served, or was asked for.
struct Shared {
    /// A copy of the kernel's end: a copy of ours would hide from the kernel that its reader is gone.
    theirs: OwnedFd,
    /// Our end, until it is known what becomes of it.
    asked: Option<(Sharing, OwnedFd)>,
}

/// What is left of a session.
pub(crate) struct Remains {
    /// Why it ended; `None`: it was told to.
    pub reason: Option<String>,
    /// Connections that were not up yet.
    pub connecting: Vec<Connecting>,
    /// Listeners that listened, or were to.
    pub listening: Vec<Listening>,
}

/// See the module.
pub(crate) struct Session<'a> {
    epoll: OwnedFd,
    client: Client,
    /// Makes streams, where none can be passed.
    carrier: Option<&'a mut dyn Carrier>,
    /// What came before the kernel's tickets were known.
    early: Vec<Command>,
    inbox: &'a Inbox,
    outbox: &'a Outbox,
    connections: HashMap<u64, Connection>,
    listeners: HashMap<u64, Listener>,
    shares: HashMap<u64, Shared>,
    queue: Vec<u64>,
    next: u64,
    scratch: Vec<u8>,
    writes_watched: bool,
    told_to_end: bool,
    draining: bool,
}

impl<'a> Session<'a> {
    pub fn new(
        control: OwnedFd,
        carrier: Option<&'a mut dyn Carrier>,
        name: &str,
        patience: Duration,
        inbox: &'a Inbox,
        outbox: &'a Outbox,
    ) -> Result<Self, Fault> {
        let mut client = Client::new(control, name, patience)?;
        if let Some(time) = carrier.as_ref().and_then(|carrier| carrier.welcome_within()) {
            client.welcome_within(time);
        }
        let io = |error: rustix::io::Errno| Fault::Channel(kso_provider::channel::ChannelError::Io(error));
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(io)?;
        epoll::add(&epoll, client.poll_fd(), EventData::new_u64(CONTROL), EventFlags::IN).map_err(io)?;
        epoll::add(&epoll, inbox.wake(), EventData::new_u64(COMMANDS), EventFlags::IN).map_err(io)?;
        for descriptor in carrier.iter().flat_map(|carrier| carrier.poll_fds()) {
            epoll::add(&epoll, descriptor, EventData::new_u64(CARRIER), EventFlags::IN).map_err(io)?;
        }
        Ok(Self {
            epoll,
            client,
            carrier,
            early: Vec::new(),
            inbox,
            outbox,
            connections: HashMap::new(),
            listeners: HashMap::new(),
            shares: HashMap::new(),
            queue: Vec::new(),
            next: 1,
            scratch: vec![0; relay::BUFFER],
            writes_watched: false,
            told_to_end: false,
            draining: false,
        })
    }

    /// Serves until the kernel fails, or is to end.
    pub fn run(mut self) -> Remains {
        let reason = loop {
            match self.turn() {
                Ok(()) if self.told_to_end => break None,
                Ok(()) => {}
                Err(fault) => break Some(self.reason(&fault)),
            }
        };
        let (mut connecting, mut listening) = (Vec::new(), Vec::new());
        for command in self.early {
            match command {
                Command::Connect(spec) => connecting.push(spec),
                Command::Listen(spec) => listening.push(spec),
                Command::Unlisten(id) => listening.retain(|spec: &Listening| spec.id != id),
                // Who asked is answered by its end.
                Command::Share(_) | Command::Stop => {}
            }
        }
        for shared in self.shares.values() {
            // A kernel that hangs holds its own end.
            let _ = rustix::net::shutdown(&shared.theirs, rustix::net::Shutdown::Both);
        }
        for connection in self.connections.into_values() {
            match connection.state {
                State::Connecting(spec) => connecting.push(spec),
                State::Dialling { far } => relay::reset(far),
                // Its end was made abrupt when it was joined: the program sees a reset.
                State::Joined(pair) => {
                    let (bytes_in, bytes_out) = pair.bytes();
                    let errno = Some(Errno::ECONNRESET);
                    self.outbox.tell(Happened::Ended { tag: connection.tag, bytes_in, bytes_out, errno });
                }
            }
        }
        listening.extend(self.listeners.into_values().map(|listener| listener.spec));
        Remains { reason, connecting, listening }
    }

    /// Why the kernel is dropped, as far as it is known.
    fn reason(&mut self, fault: &Failed) -> String {
        match fault {
            Failed::Carrier(reason) => reason.clone(),
            Failed::Drained => "it was told to end".into(),
            Failed::Provider(fault) => {
                let gone = matches!(fault, Fault::Channel(_));
                let more = self.carrier.as_mut().and_then(|carrier| carrier.explain(gone));
                more.unwrap_or_else(|| fault.to_string())
            }
        }
    }

    fn turn(&mut self) -> Result<(), Failed> {
        let wait = if self.queue.is_empty() {
            let carrier = self.carrier.as_ref().and_then(|carrier| carrier.next_deadline());
            let deadline = self.client.next_deadline();
            carrier.map_or(deadline, |at| at.min(deadline)).saturating_duration_since(Instant::now())
        } else {
            Duration::ZERO
        };
        let wait = Timespec::try_from(wait).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
        let mut events = Vec::with_capacity(EVENTS);
        // EINTR: the next turn comes at once.
        let _ = epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&wait));
        if let Some(carrier) = &mut self.carrier
            && (events.iter().any(|event| event.data.u64() == CARRIER)
                || carrier.next_deadline().is_some_and(|at| at <= Instant::now()))
        {
            carrier.run_ready().map_err(Failed::Carrier)?;
        }
        for event in events {
            match event.data.u64() {
                CONTROL => self.listen_to_provider()?,
                COMMANDS => self.obey()?,
                CARRIER => {}
                data => self.ready(data, event.flags),
            }
        }
        self.run_queue()?;
        self.client.tick(Instant::now())?;
        let waits = self.client.flush()?;
        if waits != self.writes_watched {
            self.writes_watched = waits;
            let flags = if waits { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
            let _ = epoll::modify(&self.epoll, self.client.poll_fd(), EventData::new_u64(CONTROL), flags);
        }
        self.outbox.set_load(self.client.load());
        if self.draining && self.connections.is_empty() { Err(Failed::Drained) } else { Ok(()) }
    }

    fn obey(&mut self) -> Result<(), Fault> {
        self.inbox.quiet();
        while let Some(command) = self.inbox.next() {
            if self.carrier.is_some() && self.client.welcome().is_none() && !matches!(command, Command::Stop)
            {
                self.early.push(command);
                continue;
            }
            self.do_this(command)?;
        }
        Ok(())
    }

    fn do_this(&mut self, command: Command) -> Result<(), Fault> {
        match command {
            Command::Connect(spec) => self.connect(spec)?,
            Command::Listen(spec) => self.listen(spec)?,
            Command::Unlisten(id) => self.unlisten(id)?,
            Command::Share(sharing) => self.share(sharing)?,
            Command::Stop => self.told_to_end = true,
        }
        Ok(())
    }

    /// A new stream: our end, and the other, unless that comes to the provider by itself.
    fn stream(&mut self, id: u64) -> io::Result<(OwnedFd, Option<OwnedFd>)> {
        match &mut self.carrier {
            None => relay::stream_pair().map(|(own, given)| (own, Some(given))),
            Some(carrier) => {
                let ticket = self.client.ticket(StreamId(id)).ok_or(io::ErrorKind::NotConnected)?;
                Ok((carrier.open(ticket)?, None))
            }
        }
    }

    fn connect(&mut self, spec: Connecting) -> Result<(), Fault> {
        let id = self.number();
        let Ok((own, given)) = self.stream(id) else {
            spec.exchange.fail(&spec.pending, Errno::ENOBUFS);
            self.outbox.tell(Happened::Failed { tag: spec.tag, errno: Errno::ENOBUFS });
            return Ok(());
        };
        let peer = SocketAddr::new(spec.pending.peer.ip().to_canonical(), spec.pending.peer.port());
        let order = provide::Connect {
            stream: StreamId(id),
            peer,
            family: kso_provider::family_of(peer),
            port: spec.pending.local.port(),
            options: spec.options.clone(),
        };
        let tag = spec.tag;
        let state = State::Connecting(spec);
        let connection = Connection { state, stream: Some(own), tag, listener: None, queued: false };
        self.connections.insert(id, connection);
        self.client.connect(order, given)
    }

    fn listen(&mut self, spec: Listening) -> Result<(), Fault> {
        let order = provide::Listen {
            listener: ListenerId(spec.id),
            address: spec.outer,
            backlog: spec.backlog,
            options: spec.options.clone(),
        };
        self.listeners.insert(spec.id, Listener { spec, offers: HashMap::new() });
        self.client.listen(order)
    }

    fn unlisten(&mut self, id: u64) -> Result<(), Fault> {
        self.listeners.remove(&id);
        self.client.unlisten(ListenerId(id))
    }

    fn share(&mut self, sharing: Sharing) -> Result<(), Fault> {
        if self.carrier.is_some() {
            // Requests and replies are whole frames on a unix socket, which does not get there.
            let _ = sharing.answer.send(Err(Errno::EOPNOTSUPP));
            return Ok(());
        }
        let made = files::stream().and_then(|(own, given)| Ok((own, given.try_clone()?, given)));
        let (own, theirs, given) = match made {
            Ok(ends) => ends,
            Err(error) => {
                let _ = sharing.answer.send(Err(kso_sys::errno::of(&error)));
                return Ok(());
            }
        };
        let id = self.number();
        let files::Directory { path, read_only, caching } = sharing.directory.clone();
        let order = provide::Share { stream: StreamId(id), path, read_only, caching };
        self.shares.insert(id, Shared { theirs, asked: Some((sharing, own)) });
        self.client.share(order, given)
    }

    /// Who asked gets the stream, or the reason why there is none.
    fn shared(&mut self, id: u64, outcome: Result<(), Errno>) {
        let Some(shared) = self.shares.get_mut(&id) else { return };
        let failed = outcome.is_err();
        if let Some((sharing, own)) = shared.asked.take() {
            // If nobody waits any more our end is closed, and the kernel told by that.
            let _ = sharing.answer.send(outcome.map(|()| own));
        }
        if failed {
            self.shares.remove(&id);
        }
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn offer(&mut self, id: u64) -> Result<(), Fault> {
        while self.listeners.get(&id).is_some_and(|listener| listener.offers.len() < OFFERS) {
            let number = self.number();
            let Ok((own, given)) = self.stream(number) else { return Ok(()) };
            let stream = StreamId(number);
            if let Some(listener) = self.listeners.get_mut(&id) {
                listener.offers.insert(stream, own);
            }
            self.client.offer(ListenerId(id), stream, given)?;
        }
        Ok(())
    }

    /// A stream that was offered did not reach the provider.
    fn offer_another(&mut self, stream: StreamId) -> Result<(), Fault> {
        let found = self.listeners.iter_mut().find_map(|(id, listener)| {
            listener.offers.remove(&stream)?;
            Some(*id)
        });
        found.map_or(Ok(()), |id| self.offer(id))
    }

    fn listen_to_provider(&mut self) -> Result<(), Fault> {
        while let Some(message) = self.client.receive()? {
            match message {
                ToBroker::Welcome(welcome) => {
                    self.outbox.tell(Happened::Up(welcome));
                    for command in std::mem::take(&mut self.early) {
                        self.do_this(command)?;
                    }
                }
                ToBroker::Connected { stream, local } => self.connected(stream.0, local),
                ToBroker::Shared { stream } => self.shared(stream.0, Ok(())),
                ToBroker::Failed { stream, errno } if self.shares.contains_key(&stream.0) => {
                    self.shared(stream.0, Err(errno));
                }
                ToBroker::Failed { stream, errno } => {
                    if let Some(Connection { state: State::Connecting(spec), tag, .. }) =
                        self.connections.remove(&stream.0)
                    {
                        spec.exchange.fail(&spec.pending, errno);
                        self.outbox.tell(Happened::Failed { tag, errno });
                    } else {
                        self.offer_another(stream)?;
                    }
                }
                ToBroker::Listening { listener, local } => {
                    self.outbox.tell(Happened::Listening { id: listener.0, local });
                    self.offer(listener.0)?;
                }
                ToBroker::NotListening { listener, errno } => {
                    if let Some(listener) = self.listeners.remove(&listener.0) {
                        self.outbox.tell(Happened::NotListening { listening: listener.spec, errno });
                    }
                }
                ToBroker::Accepted { listener, stream, peer, local } => {
                    self.accepted(listener.0, stream, peer, local)?;
                }
                ToBroker::Ended { stream, errno, .. } => {
                    // With the last copy of the kernel's end, ours ends too.
                    self.shares.remove(&stream.0);
                    if let Some(connection) = self.connections.get_mut(&stream.0) {
                        if let State::Joined(pair) = &mut connection.state {
                            pair.told(errno);
                        }
                        Self::enqueue(&mut self.queue, connection, stream.0);
                    }
                }
                ToBroker::Draining => {
                    self.draining = true;
                    self.outbox.tell(Happened::Draining);
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn connected(&mut self, id: u64, local: SocketAddr) {
        let Some(Connection { state: State::Connecting(spec), stream: Some(stream), tag, .. }) =
            self.connections.remove(&id)
        else {
            return;
        };
        match spec.exchange.establish(&spec.pending) {
            Ok(far) => {
                self.outbox.tell(Happened::Connected { tag, local });
                self.join(id, far, stream, tag, None);
            }
            Err(errno) => {
                spec.exchange.fail(&spec.pending, errno);
                self.outbox.tell(Happened::Failed { tag, errno });
            }
        }
    }

    fn accepted(
        &mut self,
        id: u64,
        stream: StreamId,
        peer: SocketAddr,
        local: SocketAddr,
    ) -> Result<(), Fault> {
        // A listener that was closed meanwhile: the stream is closed, so the connection is reset.
        let Some(listener) = self.listeners.get_mut(&id) else { return Ok(()) };
        let Some(own) = listener.offers.remove(&stream) else { return Ok(()) };
        let exchange: Arc<Exchange> = Arc::clone(&listener.spec.exchange);
        let far = match exchange.dial(listener.spec.inner, local, peer) {
            Ok(far) => far,
            Err(Errno::ECONNREFUSED) => return self.closed(id),
            Err(errno) => {
                tracing::debug!(%peer, %errno, "a connection cannot be passed on");
                return self.offer(id);
            }
        };
        let tag = self.outbox.tag();
        self.outbox.tell(Happened::Accepted { listener: id, tag, peer, local });
        match exchange::connected(&far) {
            Ok(true) => self.join(stream.0, far, own, tag, Some(id)),
            Ok(false) => {
                let data = EventData::new_u64(stream.0 << 1 | FAR);
                if epoll::add(&self.epoll, &far, data, relay::interest()).is_ok() {
                    let state = State::Dialling { far };
                    let connection =
                        Connection { state, stream: Some(own), tag, listener: Some(id), queued: false };
                    self.connections.insert(stream.0, connection);
                }
            }
            Err(Errno::ECONNREFUSED) => return self.closed(id),
            Err(_) => {}
        }
        self.offer(id)
    }

    /// The program closed its listener.
    fn closed(&mut self, id: u64) -> Result<(), Fault> {
        self.outbox.tell(Happened::Closed { listener: id });
        self.unlisten(id)
    }

    fn join(&mut self, id: u64, far: OwnedFd, stream: OwnedFd, tag: u64, listener: Option<u64>) {
        // A far end that was dialling is registered already: anew, so that nothing is missed.
        let _ = epoll::delete(&self.epoll, &far);
        let watched =
            [(FAR, far.as_fd()), (STREAM, stream.as_fd())].into_iter().try_for_each(|(kind, one)| {
                epoll::add(&self.epoll, one, EventData::new_u64(id << 1 | kind), relay::interest())
            });
        if let Err(error) = watched {
            tracing::warn!(%error, "a connection cannot be watched");
            return relay::reset(far);
        }
        let state = State::Joined(Pair::strict(far, stream));
        let mut connection = Connection { state, stream: None, tag, listener, queued: false };
        Self::enqueue(&mut self.queue, &mut connection, id);
        self.connections.insert(id, connection);
    }

    fn enqueue(queue: &mut Vec<u64>, connection: &mut Connection, id: u64) {
        if !connection.queued {
            connection.queued = true;
            queue.push(id);
        }
    }

    fn ready(&mut self, data: u64, flags: EventFlags) {
        let id = data >> 1;
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if let State::Joined(pair) = &mut connection.state {
            pair.ready(if data & 1 == FAR { Side::Tcp } else { Side::Stream }, flags);
        }
        Self::enqueue(&mut self.queue, connection, id);
    }

    fn run_queue(&mut self) -> Result<(), Fault> {
        for id in std::mem::take(&mut self.queue) {
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            connection.queued = false;
            match &mut connection.state {
                State::Connecting(_) => {}
                State::Dialling { far } => match exchange::connected(far) {
                    Ok(false) => {}
                    outcome => self.dialled(id, outcome)?,
                },
                State::Joined(pair) => match pair.run(&mut self.scratch) {
                    Step::Wait => {}
                    Step::Again => Self::enqueue(&mut self.queue, connection, id),
                    Step::Over(end) => {
                        let (bytes_in, bytes_out) = (end.bytes_out, end.bytes_in);
                        let tag = connection.tag;
                        self.connections.remove(&id);
                        self.outbox.tell(Happened::Ended { tag, bytes_in, bytes_out, errno: end.errno });
                    }
                },
            }
        }
        Ok(())
    }

    fn dialled(&mut self, id: u64, outcome: Result<bool, Errno>) -> Result<(), Fault> {
        let Some(Connection { state: State::Dialling { far }, stream: Some(stream), tag, listener, .. }) =
            self.connections.remove(&id)
        else {
            return Ok(());
        };
        match outcome {
            Ok(_) => self.join(id, far, stream, tag, listener),
            Err(Errno::ECONNREFUSED) => {
                if let Some(listener) = listener {
                    return self.closed(listener);
                }
            }
            Err(errno) => tracing::debug!(%errno, "a connection was not taken"),
        }
        Ok(())
    }
}
