//! One broker: its control stream, its streams and its listeners behind one epoll instance.
//!
//! ```text
//!   new -- Hello --> open -- Connect, Listen, Offer, ... --> open -- gone, malformed, out of order --> closed
//! ```
//!
//! Whatever ends the session closes all its descriptors: the streams early, so that its connections are reset.

use super::exports::Export;
use super::listeners::Listeners;
use super::shares::Shares;
use super::streams::Streams;
use super::tickets::{Meeting, Membership};
use super::{Limits, Shared, portable};
use crate::channel::{Channel, ChannelError};
use kso_wire::provide::{
    Connect, ListenerId, Offer, PROVIDE_VERSION, Question, Reply, Service, StreamId, ToBroker, ToProvider,
    Welcome,
};
use kso_wire::{Errno, Family};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::time::Timespec;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// So many events are taken at a time.
const EVENTS: usize = 256;
/// How long a broker may take to say hello.
const HELLO: Duration = Duration::from_secs(10);
/// How often it is looked whether the process shall end.
const LOOK: Duration = Duration::from_millis(500);
/// How long streams may take to end once it shall.
const DRAIN: Duration = Duration::from_secs(30);

/// What an event is about: its upper bits; the rest is a number given by the broker.
pub(super) mod token {
    /// The control stream; or, with another number than 0, that streams came.
    pub const CONTROL: u64 = 0;
    pub const TCP: u64 = 1;
    pub const STREAM: u64 = 2;
    pub const LISTENER: u64 = 3;
    /// Of [`CONTROL`]: what the threads of shared directories say.
    pub const SHARES: u64 = 2;
    const BITS: u32 = 62;

    /// Identifiers have to fit below.
    pub fn fits(id: u64) -> bool {
        id >> BITS == 0
    }

    pub fn of(kind: u64, id: u64) -> u64 {
        kind << BITS | id
    }

    pub fn parse(data: u64) -> (u64, u64) {
        (data >> BITS, data & !(3 << BITS))
    }
}

/// Why a session ended other than by the broker's wish.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// Its control stream.
    #[error("the broker is dropped: {0}")]
    Channel(#[from] ChannelError),
    /// It speaks another version.
    #[error(
        "the broker speaks version {0} of the protocol, not {PROVIDE_VERSION}: use the same version of kso"
    )]
    Version(u16),
    /// It sent something at the wrong time.
    #[error("the broker is dropped: {0}")]
    OutOfOrder(&'static str),
    /// There are enough.
    #[error("there are {0} brokers already, and no more are permitted")]
    TooManySessions(usize),
    /// The kernel fails it.
    #[error("cannot serve: {0}")]
    Kernel(#[from] std::io::Error),
}

impl From<rustix::io::Errno> for Fault {
    fn from(error: rustix::io::Errno) -> Self {
        Self::Kernel(error.into())
    }
}

/// What a stream is for.
#[derive(Debug)]
enum Purpose {
    Connect(Connect),
    Offer(ListenerId),
}

/// Where no descriptor can be passed: the streams that begin with tickets.
#[derive(Debug)]
struct Tickets {
    member: Membership,
    meeting: Meeting<OwnedFd, Purpose>,
}

/// See the module.
#[derive(Debug)]
pub struct Session {
    epoll: OwnedFd,
    pub(super) channel: Channel,
    streams: Streams,
    listeners: Listeners,
    tickets: Option<Tickets>,
    shares: Shares,
    exports: Arc<[Export]>,
    limits: Limits,
    shared: Shared,
    greeted: bool,
    began: Instant,
    draining_since: Option<Instant>,
    writes_watched: bool,
}

impl Session {
    /// Serves a connected stream.
    ///
    /// # Errors
    /// `EMFILE`.
    pub fn new(channel: Channel, limits: Limits, shared: Shared) -> Result<Self, Fault> {
        rustix::io::ioctl_fionbio(&channel, true)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &channel, EventData::new_u64(token::CONTROL), EventFlags::IN)?;
        let tickets = match channel.passes_descriptors() {
            true => None,
            false => Some(Tickets { member: shared.tickets.join()?, meeting: Meeting::new() }),
        };
        if let Some(tickets) = &tickets {
            let data = EventData::new_u64(token::of(token::CONTROL, 1));
            epoll::add(&epoll, tickets.member.wake(), data, EventFlags::IN)?;
        }
        let shares = Shares::new(limits.shares)?;
        let data = EventData::new_u64(token::of(token::CONTROL, token::SHARES));
        epoll::add(&epoll, shares.poll_fd(), data, EventFlags::IN)?;
        Ok(Self {
            epoll,
            channel,
            tickets,
            streams: Streams::new(),
            listeners: Listeners::default(),
            shares,
            exports: shared.exports.clone().into(),
            limits,
            shared,
            greeted: false,
            began: Instant::now(),
            draining_since: None,
            writes_watched: false,
        })
    }

    /// Serves until the broker is gone.
    ///
    /// # Errors
    /// See [`Fault`]. That the broker closed its end is none.
    pub fn run(mut self) -> Result<(), Fault> {
        loop {
            let wait = if self.streams.has_more_to_do() { Duration::ZERO } else { LOOK };
            match self.turn(wait) {
                Ok(true) => {}
                Ok(false) | Err(Fault::Channel(ChannelError::Closed)) => return Ok(()),
                Err(fault) => {
                    let _ = self.channel.send(&ToBroker::Refused(fault.to_string()), None);
                    let _ = self.channel.flush();
                    return Err(fault);
                }
            }
        }
    }

    /// Waits once and serves what is ready. False: it has drained.
    fn turn(&mut self, wait: Duration) -> Result<bool, Fault> {
        let mut events = Vec::with_capacity(EVENTS);
        let wait = Timespec::try_from(wait).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 0 });
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&wait)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        for event in events {
            let (kind, id) = token::parse(event.data.u64());
            match kind {
                token::CONTROL if id == token::SHARES => {
                    for message in self.shares.messages() {
                        self.tell(&message)?;
                    }
                }
                token::CONTROL if id == 0 => self.control()?,
                token::CONTROL => self.streams_came()?,
                token::LISTENER => {
                    self.listeners.ready(id);
                    self.accept(id)?;
                }
                _ => self.streams.ready(kind == token::TCP, StreamId(id), event.flags),
            }
        }
        self.streams.run(&mut self.channel)?;
        self.look()?;
        let waits = self.channel.flush()?;
        if waits != self.writes_watched {
            self.writes_watched = waits;
            let flags = if waits { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
            epoll::modify(&self.epoll, &self.channel, EventData::new_u64(token::CONTROL), flags)?;
        }
        // What ended here is not all there yet: the broker leaves when it has no connection left.
        let drained = self.draining_since.is_some_and(|since| since.elapsed() > DRAIN);
        Ok(!drained)
    }

    /// Looks at the clock, and whether the process shall end.
    fn look(&mut self) -> Result<(), Fault> {
        if !self.greeted && self.began.elapsed() > HELLO {
            return Err(Fault::OutOfOrder("it said nothing"));
        }
        if self.draining_since.is_none() && self.shared.draining.load(Ordering::Relaxed) {
            self.draining_since = Some(Instant::now());
            self.listeners.clear();
            self.channel.send(&ToBroker::Draining, None)?;
            // Their client has them opened again elsewhere, or here by and by.
            self.shares.drain();
        }
        if let Some(tickets) = &mut self.tickets {
            for (stream, _) in tickets.meeting.expire(Instant::now()) {
                self.channel.send(&ToBroker::Failed { stream, errno: Errno::ETIMEDOUT }, None)?;
            }
        }
        Ok(())
    }

    /// Streams came that began with tickets.
    fn streams_came(&mut self) -> Result<(), Fault> {
        let Some(tickets) = &mut self.tickets else { return Ok(()) };
        let now = Instant::now();
        let mut joined = Vec::new();
        for (id, stream) in tickets.member.arrived() {
            if let Some((stream, purpose)) = tickets.meeting.came(id, stream, now) {
                joined.push((id, stream, purpose));
            }
        }
        joined.into_iter().try_for_each(|(id, stream, purpose)| self.begin(id, stream, purpose))
    }

    /// A message named a stream.
    fn named(&mut self, id: StreamId, purpose: Purpose) -> Result<(), Fault> {
        self.check_stream(id)?;
        let Some(tickets) = &mut self.tickets else {
            let stream = self.descriptor()?;
            return self.begin(id, stream, purpose);
        };
        if tickets.meeting.awaited() >= self.limits.streams {
            return self.tell(&ToBroker::Failed { stream: id, errno: Errno::ENOBUFS });
        }
        match tickets.meeting.named(id, purpose, Instant::now()) {
            Some((stream, purpose)) => self.begin(id, stream, purpose),
            None => Ok(()),
        }
    }

    /// A stream is here and its purpose is known.
    fn begin(&mut self, id: StreamId, stream: OwnedFd, purpose: Purpose) -> Result<(), Fault> {
        rustix::io::ioctl_fionbio(&stream, true)?;
        match purpose {
            Purpose::Connect(order) => {
                let opened = if self.shared.files_only {
                    Err(Errno::EOPNOTSUPP)
                } else if self.is_full() {
                    Err(Errno::ENOBUFS)
                } else {
                    self.streams.connect(self.epoll.as_fd(), &order, stream)
                };
                match opened {
                    Ok(()) => Ok(()),
                    Err(errno) => self.tell(&ToBroker::Failed { stream: id, errno }),
                }
            }
            Purpose::Offer(listener) => {
                self.listeners.offer(listener, id, stream)?;
                self.accept(listener.0)
            }
        }
    }

    /// The offers of a listener that have not come are not wanted any more.
    fn forget_offers(&mut self, listener: ListenerId) {
        if let Some(tickets) = &mut self.tickets {
            tickets.meeting.forget(|purpose| matches!(purpose, Purpose::Offer(of) if *of == listener));
        }
    }

    fn control(&mut self) -> Result<(), Fault> {
        while self.channel.fill()? {
            while let Some(message) = self.channel.next_message::<ToProvider>()? {
                self.handle(message)?;
            }
        }
        Ok(())
    }

    fn handle(&mut self, message: ToProvider) -> Result<(), Fault> {
        match (message, self.greeted) {
            (ToProvider::Hello { version, name }, false) => self.greet(version, &name),
            (ToProvider::Hello { .. }, true) => Err(Fault::OutOfOrder("it said hello twice")),
            (_, false) => Err(Fault::OutOfOrder("it did not say hello first")),
            (ToProvider::Connect(order), true) => self.named(order.stream, Purpose::Connect(order)),
            (ToProvider::Listen(order), true) => {
                if !token::fits(order.listener.0) || self.listeners.knows(order.listener) {
                    return Err(Fault::OutOfOrder("it used the name of a listener twice"));
                }
                let full = self.draining_since.is_some() || self.listeners.count() >= self.limits.listeners;
                let opened = if self.shared.files_only {
                    Err(Errno::EOPNOTSUPP)
                } else if full {
                    Err(Errno::ENOBUFS)
                } else {
                    self.listeners.open(self.epoll.as_fd(), &order)
                };
                let listener = order.listener;
                self.tell(&match opened {
                    Ok(local) => ToBroker::Listening { listener, local },
                    Err(errno) => ToBroker::NotListening { listener, errno },
                })
            }
            (ToProvider::Offer(Offer { listener, stream }), true) => {
                self.named(stream, Purpose::Offer(listener))
            }
            (ToProvider::Unlisten(listener), true) => {
                self.listeners.close(listener);
                self.forget_offers(listener);
                self.tell(&ToBroker::Unlistened(listener))
            }
            (ToProvider::Ask { id, stream, question }, true) => {
                let result = self.answer(stream, question);
                self.tell(&ToBroker::Answered { id, result })
            }
            // Not offered in Welcome.
            (ToProvider::Resolve { id, .. }, true) => {
                self.tell(&ToBroker::Answered { id, result: Err(Errno::EOPNOTSUPP) })
            }
            (ToProvider::Ping(number), true) => self.tell(&ToBroker::Pong(number)),
            (ToProvider::Share(order), true) => {
                let descriptor = self.descriptor()?;
                self.check_stream(order.stream)?;
                let stream = order.stream;
                let full = self.draining_since.is_some() || self.shares.count() >= self.limits.shares;
                let opened = if full {
                    Err(Errno::ENOBUFS)
                } else {
                    self.shares.open(self.exports.clone(), order, descriptor)
                };
                match opened {
                    Ok(()) => Ok(()),
                    Err(errno) => self.tell(&ToBroker::Failed { stream, errno }),
                }
            }
        }
    }

    fn greet(&mut self, version: u16, name: &str) -> Result<(), Fault> {
        if version != PROVIDE_VERSION {
            return Err(Fault::Version(version));
        }
        self.greeted = true;
        tracing::info!(broker = name, "a broker came");
        let told = &self.shared.addresses;
        let addresses = if told.is_empty() { own_addresses() } else { told.clone() };
        let mut services = Vec::new();
        if !self.shared.files_only {
            services.extend([Service::TcpConnect, Service::TcpListen]);
        }
        if !self.exports.is_empty() {
            services.push(Service::Files);
        }
        self.tell(&ToBroker::Welcome(Welcome {
            version: PROVIDE_VERSION,
            kernel: kernel(),
            services,
            addresses,
            // No stream begins with a ticket where descriptors are passed.
            session: self.tickets.as_ref().map_or(0, |tickets| tickets.member.number),
        }))
    }

    fn tell(&mut self, message: &ToBroker) -> Result<(), Fault> {
        Ok(self.channel.send(message, None)?)
    }

    fn descriptor(&mut self) -> Result<OwnedFd, Fault> {
        let descriptor = self.channel.take_descriptor();
        descriptor.ok_or(Fault::OutOfOrder("it named a stream and did not pass it"))
    }

    fn check_stream(&self, id: StreamId) -> Result<(), Fault> {
        let awaited = self.tickets.as_ref().is_some_and(|tickets| tickets.meeting.awaits(id));
        if !token::fits(id.0)
            || awaited
            || self.streams.knows(id)
            || self.listeners.knows_stream(id)
            || self.shares.knows(id)
        {
            return Err(Fault::OutOfOrder("it used the name of a stream twice"));
        }
        Ok(())
    }

    fn is_full(&self) -> bool {
        self.draining_since.is_some() || self.streams.count() >= self.limits.streams
    }

    /// Takes the connections that wait at a listener, as many as there are streams for.
    fn accept(&mut self, listener: u64) -> Result<(), Fault> {
        while !self.is_full() {
            if self.tickets.is_some() {
                // They came by connections of their own, which may have broken since.
                for stream in self.listeners.drop_broken(ListenerId(listener)) {
                    self.tell(&ToBroker::Failed { stream, errno: Errno::ECONNRESET })?;
                }
            }
            match self.listeners.accept(listener) {
                Ok(Some((accepted, socket, stream))) => {
                    let joined = self.streams.join(self.epoll.as_fd(), accepted.stream, socket, stream);
                    let ToBrokerAccepted { listener, stream, peer, local } = accepted;
                    self.tell(&ToBroker::Accepted { listener, stream, peer, local })?;
                    if let Err(errno) = joined {
                        let errno = Some(errno);
                        self.tell(&ToBroker::Ended { stream, bytes_in: 0, bytes_out: 0, errno })?;
                    }
                }
                Ok(None) => return Ok(()),
                Err((listener, errno)) => {
                    self.forget_offers(listener);
                    self.tell(&ToBroker::NotListening { listener, errno })?;
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn answer(&self, stream: StreamId, question: Question) -> Result<Reply, Errno> {
        let socket = self.streams.socket(stream).ok_or(Errno::ENOTCONN)?;
        match question {
            Question::LocalAddress => {
                match kso_sys::local_address(socket).map_err(|error| portable(&error))? {
                    kso_sys::RawAddress::Inet(address) => Ok(Reply::Address(address)),
                    _ => Err(Errno::EOPNOTSUPP),
                }
            }
            Question::PeerAddress => match kso_sys::peer_address(socket).map_err(|error| portable(&error))? {
                kso_sys::RawAddress::Inet(address) => Ok(Reply::Address(address)),
                _ => Err(Errno::ENOTCONN),
            },
            Question::GetOption(name) => {
                kso_sys::options::get_one(socket, name).map(Reply::Value).map_err(|error| portable(&error))
            }
            Question::SetOption(name, value) => kso_sys::options::set_one(socket, name, value)
                .map(|()| Reply::Done)
                .map_err(|error| portable(&error)),
        }
    }
}

/// A connection that came in.
pub(super) struct ToBrokerAccepted {
    pub listener: kso_wire::provide::ListenerId,
    pub stream: StreamId,
    pub peer: std::net::SocketAddr,
    pub local: std::net::SocketAddr,
}

/// As uname(2) has it: system and release.
fn kernel() -> String {
    let name = rustix::system::uname();
    let text = format!("{} {}", name.sysname().to_string_lossy(), name.release().to_string_lossy());
    text.chars().take(kso_wire::provide::MAX_NAME / 4).collect()
}

/// The addresses of the kernel that are not on loopback, those of IPv4 first.
fn own_addresses() -> Vec<IpAddr> {
    let mut own: Vec<IpAddr> = crate::addresses::all().unwrap_or_default();
    own.retain(|address| !address.is_loopback() && !is_link_local(*address));
    own.sort_by_key(|address| (crate::family_of((*address, 0).into()) == Family::V6, *address));
    own.truncate(kso_wire::provide::MAX_ADDRESSES);
    own
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}
