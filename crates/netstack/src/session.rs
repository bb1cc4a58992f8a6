//! The broker's session: its control stream, its streams and the interface behind one epoll instance.
//!
//! ```text
//!   new -- Hello --> open -- Connect, Listen, Offer, ... --> open -- gone, malformed, out of order --> closed
//! ```
//!
//! Whatever ends the session resets its connections. A panic of its thread does, too: the streams are closed early.

mod streams;

use crate::config::{Config, ConfigError};
use crate::frame::MAX_FRAME;
use crate::options::Options;
use crate::stack::Stack;
use crate::tap::{Tap, random};
use kso_provider::channel::{Channel, ChannelError};
use kso_wire::Errno;
use kso_wire::provide::{
    MAX_LISTENERS, Offer, PROVIDE_VERSION, Question, Reply, Service, StreamId, ToBroker, ToProvider, Welcome,
};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::time::Timespec;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};
use streams::Streams;

/// So many events are taken at a time.
const EVENTS: usize = 256;
/// Frames that are read before others have their turn.
const FRAMES: usize = 64;
/// How long the broker may take to say hello.
const HELLO: Duration = Duration::from_secs(10);
/// The longest sleep.
const LOOK: Duration = Duration::from_secs(5);
/// What an event is about: the interface, the control stream, or else the stream of a connection.
const TAP: u64 = u64::MAX;
const CONTROL: u64 = u64::MAX - 1;
/// As it is told: the version is that of Cargo.toml.
const KERNEL: &str = "smoltcp 0.14";

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
    /// It is set up wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The interface is gone.
    #[error("the network interface is gone: {0}")]
    Interface(std::io::Error),
    /// The host's kernel fails it.
    #[error("cannot serve: {0}")]
    Kernel(#[from] std::io::Error),
}

impl From<rustix::io::Errno> for Fault {
    fn from(error: rustix::io::Errno) -> Self {
        Self::Kernel(error.into())
    }
}

/// See the module.
#[derive(Debug)]
pub struct Session {
    epoll: OwnedFd,
    channel: Channel,
    tap: Tap,
    stack: Stack,
    streams: Streams,
    addresses: Vec<IpAddr>,
    greeted: bool,
    began: Instant,
    writes_watched: bool,
    frame: Vec<u8>,
}

impl Session {
    /// Serves the broker behind `control`, a connected stream.
    ///
    /// # Errors
    /// The configuration cannot be, or `EMFILE`.
    pub fn new(control: OwnedFd, tap: Tap, config: &Config) -> Result<Self, Fault> {
        let now = Instant::now();
        let stack = Stack::new(config, tap.hardware(), random(), now)?;
        rustix::io::ioctl_fionbio(&control, true)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let channel = Channel::new(control);
        epoll::add(&epoll, &channel, EventData::new_u64(CONTROL), EventFlags::IN)?;
        epoll::add(&epoll, &tap, EventData::new_u64(TAP), EventFlags::IN)?;
        Ok(Self {
            epoll,
            channel,
            tap,
            stack,
            streams: Streams::default(),
            addresses: config.addresses.iter().map(ipnet::IpNet::addr).collect(),
            greeted: false,
            began: now,
            writes_watched: false,
            frame: vec![0; MAX_FRAME],
        })
    }

    /// Serves until the broker is gone.
    ///
    /// # Errors
    /// See [`Fault`]. That the broker closed its end is none.
    pub fn run(mut self) -> Result<(), Fault> {
        let ended = loop {
            match self.turn() {
                Ok(()) => {}
                Err(Fault::Channel(ChannelError::Closed)) => break Ok(()),
                Err(fault) => {
                    let _ = self.channel.send(&ToBroker::Refused(fault.to_string()), None);
                    let _ = self.channel.flush();
                    break Err(fault);
                }
            }
        };
        self.stack.abort_all();
        self.stack.flush(&mut self.tap, Instant::now());
        ended
    }

    fn wait(&self) -> Duration {
        if self.streams.has_more_to_do() {
            return Duration::ZERO;
        }
        let deadline = self.stack.next_deadline();
        deadline.map_or(LOOK, |at| at.saturating_duration_since(Instant::now()).min(LOOK))
    }

    /// Waits once and serves what is ready.
    fn turn(&mut self) -> Result<(), Fault> {
        let mut events = Vec::with_capacity(EVENTS);
        let wait = Timespec::try_from(self.wait()).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 0 });
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&wait)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut now = Instant::now();
        for event in events {
            match event.data.u64() {
                TAP => self.receive(now)?,
                CONTROL => self.control(now)?,
                number => self.streams.ready(number, event.flags),
            }
        }
        self.stack.run_due(&mut self.tap, now);
        self.streams.hear(self.epoll.as_fd(), &mut self.stack, &mut self.channel)?;
        self.streams.run(&mut self.stack, &mut self.channel)?;
        now = Instant::now();
        self.stack.flush(&mut self.tap, now);
        if !self.greeted && now.saturating_duration_since(self.began) > HELLO {
            return Err(Fault::OutOfOrder("it said nothing"));
        }
        let waits = self.channel.flush()?;
        if waits != self.writes_watched {
            self.writes_watched = waits;
            let flags = if waits { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
            epoll::modify(&self.epoll, &self.channel, EventData::new_u64(CONTROL), flags)?;
        }
        Ok(())
    }

    fn receive(&mut self, now: Instant) -> Result<(), Fault> {
        for _ in 0..FRAMES {
            match self.tap.receive(&mut self.frame) {
                Ok(Some(frame)) => self.stack.input(frame, &mut self.tap, now),
                Ok(None) => return Ok(()),
                Err(error) => return Err(Fault::Interface(error)),
            }
        }
        Ok(())
    }

    fn control(&mut self, now: Instant) -> Result<(), Fault> {
        while self.channel.fill()? {
            while let Some(message) = self.channel.next_message::<ToProvider>()? {
                self.handle(message, now)?;
            }
        }
        Ok(())
    }

    fn handle(&mut self, message: ToProvider, now: Instant) -> Result<(), Fault> {
        match (message, self.greeted) {
            (ToProvider::Hello { version, name }, false) => self.greet(version, &name),
            (ToProvider::Hello { .. }, true) => Err(Fault::OutOfOrder("it said hello twice")),
            (_, false) => Err(Fault::OutOfOrder("it did not say hello first")),
            (ToProvider::Connect(order), true) => {
                let descriptor = self.descriptor()?;
                self.check_stream(order.stream)?;
                let begun = self.stack.connect(order.peer, order.port, Options::from(&order.options), now);
                let added = begun.and_then(|(connection, _)| {
                    let epoll = self.epoll.as_fd();
                    let added = self.streams.add(epoll, connection, order.stream, descriptor, false);
                    added.inspect_err(|_| self.stack.abort(connection))
                });
                match added {
                    Ok(()) => Ok(()),
                    Err(errno) => self.tell(&ToBroker::Failed { stream: order.stream, errno }),
                }
            }
            (ToProvider::Listen(order), true) => {
                let listener = order.listener;
                if self.streams.knows_listener(listener) {
                    return Err(Fault::OutOfOrder("it used the name of a listener twice"));
                }
                let opened = if self.streams.listeners() >= MAX_LISTENERS {
                    Err(Errno::ENOBUFS)
                } else {
                    let options = Options::from(&order.options);
                    self.stack.listen(listener.0, order.address, order.backlog, options)
                };
                if opened.is_ok() {
                    self.streams.listen(listener);
                }
                self.tell(&match opened {
                    Ok(local) => ToBroker::Listening { listener, local },
                    Err(errno) => ToBroker::NotListening { listener, errno },
                })
            }
            (ToProvider::Offer(Offer { listener, stream }), true) => {
                let descriptor = self.descriptor()?;
                self.check_stream(stream)?;
                self.streams.offer(listener, stream, descriptor)?;
                self.streams.accept(self.epoll.as_fd(), &mut self.stack, &mut self.channel, listener)
            }
            (ToProvider::Unlisten(listener), true) => {
                if self.streams.unlisten(listener) {
                    self.stack.unlisten(listener.0);
                }
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
            (ToProvider::Share(order), true) => {
                drop(self.descriptor()?);
                self.tell(&ToBroker::Failed { stream: order.stream, errno: Errno::EOPNOTSUPP })
            }
            (ToProvider::Ping(number), true) => self.tell(&ToBroker::Pong(number)),
        }
    }

    fn greet(&mut self, version: u16, name: &str) -> Result<(), Fault> {
        if version != PROVIDE_VERSION {
            return Err(Fault::Version(version));
        }
        self.greeted = true;
        tracing::debug!(broker = name, "a broker came");
        self.tell(&ToBroker::Welcome(Welcome {
            version: PROVIDE_VERSION,
            kernel: KERNEL.into(),
            services: vec![Service::TcpConnect, Service::TcpListen],
            addresses: self.addresses.clone(),
            // No stream begins with a ticket where descriptors are passed.
            session: 0,
        }))
    }

    fn tell(&mut self, message: &ToBroker) -> Result<(), Fault> {
        Ok(self.channel.send(message, None)?)
    }

    fn descriptor(&mut self) -> Result<OwnedFd, Fault> {
        let descriptor = self.channel.take_descriptor();
        let descriptor = descriptor.ok_or(Fault::OutOfOrder("it named a stream and did not pass it"))?;
        rustix::io::ioctl_fionbio(&descriptor, true)?;
        Ok(descriptor)
    }

    fn check_stream(&self, id: StreamId) -> Result<(), Fault> {
        if self.streams.knows(id) {
            return Err(Fault::OutOfOrder("it used the name of a stream twice"));
        }
        Ok(())
    }

    fn answer(&mut self, stream: StreamId, question: Question) -> Result<Reply, Errno> {
        let connection = self.streams.connection(stream).ok_or(Errno::ENOTCONN)?;
        let ends = self.stack.ends(connection).ok_or(Errno::ENOTCONN)?;
        match question {
            Question::LocalAddress => Ok(Reply::Address(ends.local)),
            Question::PeerAddress => Ok(Reply::Address(ends.remote)),
            Question::GetOption(name) => self.stack.option(connection, name).map(Reply::Value),
            Question::SetOption(name, value) => {
                self.stack.set_option(connection, name, value).map(|()| Reply::Done)
            }
        }
    }
}

#[cfg(test)]
mod tests;
