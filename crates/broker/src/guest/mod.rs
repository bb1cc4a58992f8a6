//! Guests: sessions whose programs run under a kernel of their own, and reach this broker by a vsock device.
//!
//! ```text
//!   guest's kernel      device (kso_devices::vsock)        this module
//!     REQUEST ----------> Outside::request --------------> decide, open: a socket, a service, another guest
//!     control stream ---> Outside::control --------------> Prepare, Ask
//!     <------------------ Outside::control_output <------- Established, Failed, Broken, Named, Answered
//!     <---- REQUEST ----- Order::Dial <------------------- accepted by a published listener
//! ```
//!
//! [`Broker`] is the device's [`kso_devices::vsock::Outside`]. What the broker wants of the device waits as [`Order`]s, because
//! the device is busy while it calls: whoever owns both takes them ([`Broker::next_order`]) after each turn.
//!
//! What a guest sends is hostile: each table has a bound, and a control stream that is no message ends with all that
//! the guest has.

mod calls;
mod control;
mod devices;
mod holdback;
mod listeners;
mod names;
mod outside;
mod prepared;
mod sent;
mod streams;

pub use devices::Devices;
pub(crate) use names::{GUESTS, is_guest_address};
pub(crate) use streams::Shown;

use crate::broker::{Broker, token};
use crate::config::BrokerError;
use crate::session::SessionId;
use kso_devices::hybrid::Hybrid;
use kso_devices::vsock::GuestId;
use kso_provider::stream::Holder;
use kso_wire::Hello;
use kso_wire::frame::{self, Frames};
use kso_wire::guest::{SendFile, StreamCall, StreamKey, ToGuest};
use listeners::Listener;
use prepared::Prepared;
use std::collections::{HashMap, VecDeque};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::time::Instant;
use streams::Stream;

/// Most streams of a guest at one time: each has a descriptor here.
const MAX_STREAMS: usize = 16_384;
/// Most bytes that wait for a guest on its control stream. One that does not read them is told no more, and dropped
/// when it asks for more.
const MAX_OUTPUT: usize = 1 << 20;
/// Most calls about streams that wait for the device.
const MAX_ORDERS: usize = 65_536;

/// Something for the device to do.
#[derive(Debug)]
pub enum Order {
    /// Offer the guest this connection. What waits on its control stream goes first.
    Dial(GuestId, StreamKey, OwnedFd),
    /// Give [`Broker::answer_call`] the socket of a stream.
    Call(GuestId, Call),
    /// Send a part of a file for the request of this name: [`kso_devices::vsock::Outside::sent`] tells.
    SendFile(GuestId, u64, SendFile),
    /// Send no more for the request of this name.
    StopSending(GuestId, StreamKey, u64),
    /// The guest gave up this connection, which is under way: close it.
    Abandon(GuestId, StreamKey),
    /// Bytes wait on the guest's control stream.
    Flush(GuestId),
    /// Not for the device: the guest, or its runner, is gone, and may come again. It needs another stream for its packets.
    Restarted(GuestId),
}

impl Order {
    fn guest(&self) -> GuestId {
        match self {
            Self::Dial(guest, ..)
            | Self::Call(guest, _)
            | Self::SendFile(guest, ..)
            | Self::StopSending(guest, ..)
            | Self::Abandon(guest, _)
            | Self::Flush(guest)
            | Self::Restarted(guest) => *guest,
        }
    }
}

/// What a guest asked about a stream.
#[derive(Debug)]
pub struct Call {
    id: u64,
    /// Which stream.
    pub stream: StreamKey,
    call: StreamCall,
}

#[derive(Debug)]
pub(crate) struct Guest {
    session: SessionId,
    /// Where other guests reach it.
    address: Ipv4Addr,
    /// Its control stream, if it is there.
    control: Option<StreamKey>,
    welcomed: bool,
    frames: Frames,
    output: Vec<u8>,
    prepared: Prepared,
    services: HashMap<u32, OwnedFd>,
    streams: HashMap<StreamKey, Stream>,
    /// Those under way outwards, by the guest's port.
    connecting: HashMap<u32, StreamKey>,
    /// Its VMM carries CID 2 only: streams begin with tickets.
    tickets: bool,
    /// Its TUN takes several datagrams as one packet.
    datagram_segments: bool,
    next_pseudo_cid: u32,
    next_port: u16,
}

/// The guests of a broker.
#[derive(Debug, Default)]
pub(crate) struct Guests {
    all: HashMap<GuestId, Guest>,
    /// Listeners outside, by the number under which they are watched.
    listeners: HashMap<u32, Listener>,
    next_listener: u32,
    next_address: u16,
    orders: VecDeque<Order>,
}

impl Guest {
    /// Puts a message on the control stream. Without one nobody would read it.
    fn tell(&mut self, message: &ToGuest) {
        if !self.welcomed || self.output.len() > MAX_OUTPUT {
            return;
        }
        if let Err(error) = frame::append(message, &mut self.output) {
            tracing::warn!(%error, "a message to a guest was left out");
        }
    }

    /// Nothing of its programs is left.
    fn reset(&mut self) {
        self.control = None;
        self.welcomed = false;
        self.frames = Frames::default();
        self.output = Vec::new();
        self.prepared = Prepared::default();
        self.streams.clear();
        self.connecting.clear();
    }
}

impl Guests {
    fn order(&mut self, order: Order) {
        self.orders.push_back(order);
    }

    /// Tells a guest something while the device is not looking.
    fn tell(&mut self, id: GuestId, message: &ToGuest) {
        let Some(guest) = self.all.get_mut(&id) else { return };
        guest.tell(message);
        self.order(Order::Flush(id));
    }

    /// When something is to be dialled again, or a listener is to be looked at again.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.listeners.values().filter_map(Listener::deadline).min()
    }

    /// The guest of a session.
    pub fn of_session(&self, session: SessionId) -> Option<GuestId> {
        self.all.iter().find(|(_, guest)| guest.session == session).map(|(id, _)| *id)
    }
}

impl Broker {
    /// Opens a session for a guest. Its programs come by the device, as `guest`.
    ///
    /// # Errors
    /// As [`Self::open_session`]; the guest is there already, or there are too many.
    pub fn open_guest(&mut self, guest: GuestId, hello: &Hello) -> Result<SessionId, BrokerError> {
        if self.guests.all.contains_key(&guest) {
            return Err(BrokerError::TooManySessions(self.guests.all.len()));
        }
        let address = self.guests.free_address();
        let address = address.ok_or(BrokerError::TooManySessions(self.guests.all.len()))?;
        let id = self.open_session(hello)?;
        if let Some(session) = self.sessions.get_mut(&id.0) {
            session.holder = Holder::Outside;
        }
        let new = Guest {
            session: id,
            address,
            control: None,
            welcomed: false,
            frames: Frames::default(),
            output: Vec::new(),
            prepared: Prepared::default(),
            services: HashMap::new(),
            streams: HashMap::new(),
            connecting: HashMap::new(),
            tickets: Hybrid::has(guest),
            datagram_segments: false,
            next_pseudo_cid: kso_wire::guest::FIRST_NAMED_CID,
            next_port: FIRST_PORT,
        };
        self.guests.all.insert(guest, new);
        Ok(id)
    }

    /// Ends a guest's session. The device has to be told by the caller.
    pub fn close_guest(&mut self, guest: GuestId) {
        self.clear_guest(guest);
        if let Some(guest) = self.guests.all.remove(&guest) {
            self.close_session(guest.session);
        }
    }

    /// Registers what serves one of [`kso_wire::guest::ports`] of a guest: one stream, given to the first who asks.
    pub fn serve_port(&mut self, guest: GuestId, port: u32, socket: OwnedFd) {
        if let Some(guest) = self.guests.all.get_mut(&guest) {
            guest.services.insert(port, socket);
        }
    }

    /// The session of a guest.
    #[must_use]
    pub fn session_of(&self, guest: GuestId) -> Option<SessionId> {
        self.guests.all.get(&guest).map(|guest| guest.session)
    }

    /// Whether a guest's TUN takes several UDP datagrams of a flow as one packet.
    #[must_use]
    pub fn takes_segments(&self, guest: GuestId) -> bool {
        self.guests.all.get(&guest).is_some_and(|guest| guest.datagram_segments)
    }

    /// The next thing for the device to do, if there is one.
    pub fn next_order(&mut self) -> Option<Order> {
        loop {
            let order = self.guests.orders.pop_front()?;
            // A new connection of the same name has taken the place of what was given up.
            let replaced = match &order {
                Order::Abandon(guest, key) => {
                    self.guests.all.get(guest).is_some_and(|guest| guest.streams.contains_key(key))
                }
                _ => false,
            };
            if !replaced {
                return Some(order);
            }
        }
    }

    /// Closes what a guest has; its session goes on.
    fn clear_guest(&mut self, guest: GuestId) {
        let streams: Vec<_> =
            self.guests.all.get(&guest).into_iter().flat_map(|guest| guest.streams.keys()).copied().collect();
        for stream in streams {
            self.forget_stream(guest, stream, None);
        }
        self.unlisten_all(guest);
        self.guests.orders.retain(|order| order.guest() != guest);
        if let Some(guest) = self.guests.all.get_mut(&guest) {
            guest.reset();
        }
    }

    pub(crate) fn guest_listener_token(id: u32) -> u64 {
        token::GUEST_LISTENER | u64::from(id)
    }
}

/// Ports of guests' own ends of streams to other guests (`net.ipv4.ip_local_port_range`, ip(7)).
const FIRST_PORT: u16 = 32_768;
