//! The broker's end of a provider on another kernel.
//!
//! Nothing here waits. Whoever owns a [`Client`] polls [`Client::poll_fd`], calls [`Client::receive`] until nothing comes,
//! [`Client::tick`] when it is due, and [`Client::flush`] at the end of each turn. An error is final: the provider lied,
//! fell silent or is gone, and is to be dropped with all its streams.

mod ledger;

use crate::channel::{Channel, ChannelError};
use kso_wire::provide::{
    Connect, Listen, ListenerId, Offer, PROVIDE_VERSION, Share, StreamId, Ticket, ToBroker, ToProvider,
    Welcome,
};
pub use ledger::{Ledger, Lie};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// A provider is asked whether it lives so many times in the time after which it counts as hung.
const BEATS: u32 = 4;
/// How long a provider may take to say welcome unless told: a kernel may still be starting.
const WELCOME: Duration = Duration::from_secs(20);

/// Why a provider is dropped.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// Its control stream.
    #[error("{0}")]
    Channel(#[from] ChannelError),
    /// It said something that cannot be.
    #[error("{0}")]
    Lie(#[from] Lie),
    /// It refused.
    #[error("it refused: {0}")]
    Refused(String),
    /// It speaks another version.
    #[error(
        "it speaks version {0} of the protocol, not {PROVIDE_VERSION}: use the same version of kso there"
    )]
    Version(u16),
    /// It says nothing any more.
    #[error("it did not answer for {} ms", .0.as_millis())]
    Silent(Duration),
    /// It shall have something that cannot be sent to it.
    #[error("descriptors cannot be passed to it")]
    NoDescriptors,
}

/// See the module.
#[derive(Debug)]
pub struct Client {
    channel: Channel,
    ledger: Ledger,
    patience: Duration,
    welcome_within: Duration,
    began: Instant,
    last_ping: Option<(u64, Instant)>,
    next_ping: Instant,
    pings: u64,
}

impl Client {
    /// Greets the provider behind `socket`, a connected, non-blocking stream socket. If it is silent for `patience`, it
    /// counts as hung.
    ///
    /// # Errors
    /// It is gone already.
    pub fn new(socket: OwnedFd, name: &str, patience: Duration) -> Result<Self, Fault> {
        let mut channel = Channel::new(socket);
        let name = name.chars().take(kso_wire::provide::MAX_NAME / 4).collect();
        channel.send(&ToProvider::Hello { version: PROVIDE_VERSION, name }, None)?;
        channel.flush()?;
        let began = Instant::now();
        Ok(Self {
            channel,
            ledger: Ledger::default(),
            patience,
            welcome_within: WELCOME,
            began,
            last_ping: None,
            next_ping: began,
            pings: 0,
        })
    }

    /// It may take so long to say welcome.
    pub fn welcome_within(&mut self, time: Duration) {
        self.welcome_within = time;
    }

    /// Readable when [`Self::receive`] has something.
    #[must_use]
    pub fn poll_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }

    /// What it said of itself, once it has.
    #[must_use]
    pub fn welcome(&self) -> Option<&Welcome> {
        self.ledger.welcome()
    }

    /// Connections and listeners that it has.
    #[must_use]
    pub fn load(&self) -> (usize, usize) {
        self.ledger.load()
    }

    /// The ticket of a stream that cannot be passed; `None` before welcome.
    #[must_use]
    pub fn ticket(&self, stream: StreamId) -> Option<Ticket> {
        Some(Ticket { session: self.welcome()?.session, stream })
    }

    /// Begins a connection. Its stream is passed, or comes to the provider by itself, with its [`Self::ticket`].
    ///
    /// # Errors
    /// See [`Fault`].
    pub fn connect(&mut self, order: Connect, stream: impl Into<Option<OwnedFd>>) -> Result<(), Fault> {
        self.ledger.connect(order.stream);
        self.send(&ToProvider::Connect(order), stream.into())
    }

    /// Makes it listen.
    ///
    /// # Errors
    /// See [`Fault`].
    pub fn listen(&mut self, order: Listen) -> Result<(), Fault> {
        self.ledger.listen(order.listener);
        self.send(&ToProvider::Listen(order), None)
    }

    /// Has it serve a directory on a stream.
    ///
    /// # Errors
    /// See [`Fault`].
    pub fn share(&mut self, order: Share, stream: OwnedFd) -> Result<(), Fault> {
        self.ledger.share(order.stream);
        self.send(&ToProvider::Share(order), Some(stream))
    }

    /// Gives it the stream of a connection to come, as [`Self::connect`]. The provider may give it back
    /// ([`ToBroker::Failed`]) if it did not arrive, or broke while it waited.
    ///
    /// # Errors
    /// See [`Fault`].
    pub fn offer(
        &mut self,
        listener: ListenerId,
        stream: StreamId,
        descriptor: impl Into<Option<OwnedFd>>,
    ) -> Result<(), Fault> {
        self.ledger.offer(listener, stream);
        self.send(&ToProvider::Offer(Offer { listener, stream }), descriptor.into())
    }

    /// Closes a listener.
    ///
    /// # Errors
    /// See [`Fault`].
    pub fn unlisten(&mut self, listener: ListenerId) -> Result<(), Fault> {
        if self.ledger.unlisten(listener) {
            return self.send(&ToProvider::Unlisten(listener), None);
        }
        Ok(())
    }

    fn send(&mut self, message: &ToProvider, descriptor: Option<OwnedFd>) -> Result<(), Fault> {
        if descriptor.is_some() && !self.channel.passes_descriptors() {
            return Err(Fault::NoDescriptors);
        }
        Ok(self.channel.send(message, descriptor)?)
    }

    /// Sends what waits. True: tell when the socket can be written.
    ///
    /// # Errors
    /// It is gone.
    pub fn flush(&mut self) -> Result<bool, Fault> {
        Ok(self.channel.flush()?)
    }

    /// The next thing it said, checked against what it was asked.
    ///
    /// # Errors
    /// See [`Fault`].
    pub fn receive(&mut self) -> Result<Option<ToBroker>, Fault> {
        loop {
            if let Some(message) = self.channel.next_message::<ToBroker>()? {
                // It has no descriptors to give.
                if self.channel.take_descriptor().is_some() {
                    return Err(ChannelError::Descriptors.into());
                }
                match message {
                    ToBroker::Refused(reason) => return Err(Fault::Refused(reason)),
                    ToBroker::Welcome(welcome) if welcome.version != PROVIDE_VERSION => {
                        return Err(Fault::Version(welcome.version));
                    }
                    message => {
                        self.ledger.check(&message)?;
                        if let ToBroker::Pong(number) = message {
                            self.pong(number)?;
                            continue;
                        }
                        return Ok(Some(message));
                    }
                }
            }
            if !self.channel.fill()? {
                return Ok(None);
            }
        }
    }

    fn pong(&mut self, number: u64) -> Result<(), Fault> {
        match self.last_ping {
            Some((asked, _)) if asked == number => {
                self.last_ping = None;
                Ok(())
            }
            _ => Err(Lie::Pong.into()),
        }
    }

    /// When [`Self::tick`] is due.
    #[must_use]
    pub fn next_deadline(&self) -> Instant {
        match (self.welcome(), self.last_ping) {
            (None, _) => self.began + self.welcome_within,
            (_, Some((_, since))) => since + self.patience,
            (_, None) => self.next_ping,
        }
    }

    /// Looks at the clock: asks whether it lives.
    ///
    /// # Errors
    /// [`Fault::Silent`].
    pub fn tick(&mut self, now: Instant) -> Result<(), Fault> {
        if now < self.next_deadline() {
            return Ok(());
        }
        if self.welcome().is_none() {
            return Err(Fault::Silent(self.welcome_within));
        }
        if self.last_ping.is_some() {
            return Err(Fault::Silent(self.patience));
        }
        self.pings += 1;
        self.last_ping = Some((self.pings, now));
        self.next_ping = now + self.patience / BEATS;
        self.send(&ToProvider::Ping(self.pings), None)
    }
}

#[cfg(test)]
mod tests;
