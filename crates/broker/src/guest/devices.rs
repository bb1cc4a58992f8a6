//! What serves guests beside the broker: the vsock device, and a gateway for each guest's packets.
//!
//! ```text
//!   poll: devices' two descriptors, the broker's --> run_ready --> Hub::run_ready, Gateway::run_ready
//!                                                                  orders of the broker --> the hub
//!   late answers of the broker ---> answered --> the session's gateway
//! ```

use super::Order;
use crate::broker::Broker;
use crate::config::BrokerError;
use crate::embedded::Link;
use crate::session::SessionId;
use kso_devices::hybrid::Hybrid;
use kso_devices::vsock::{Endpoint, GuestId, Hub, Limits, Outside};
use kso_files::Files;
use kso_gateway::{Gateway, GatewayConfig};
use kso_wire::guest::ports;
use kso_wire::{Answer, Errno, Hello, RequestId};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

/// The event of guests whose VMM has a device of its own.
const HYBRID: u64 = u64::MAX;
/// So many gateways are served at a time.
const EVENTS: usize = 64;

/// See the module.
#[derive(Debug)]
pub struct Devices {
    hub: Hub,
    hybrid: Hybrid,
    gateways: Gateways,
    /// Guests whose VMM can come again.
    coming: HashMap<GuestId, Hello>,
    events: OwnedFd,
}

type Gateways = HashMap<GuestId, (SessionId, Gateway)>;

impl Devices {
    /// Without guests.
    ///
    /// # Errors
    /// Descriptors ran out.
    pub fn new() -> Result<Self, BrokerError> {
        let kernel = || BrokerError::kernel("cannot make the vsock device");
        let new = Self {
            hub: Hub::new(Limits::default()).map_err(kernel())?,
            hybrid: Hybrid::new().map_err(kernel())?,
            gateways: HashMap::new(),
            coming: HashMap::new(),
            events: epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|error| kernel()(error.into()))?,
        };
        epoll::add(&new.events, new.hybrid.poll_fd(), EventData::new_u64(HYBRID), EventFlags::IN)
            .map_err(|error| kernel()(error.into()))?;
        Ok(new)
    }

    /// Opens a guest's session and serves its device to the VMM at `endpoint`. `streams` serve ports of the host.
    ///
    /// # Errors
    /// See [`BrokerError`].
    pub fn add(
        &mut self,
        broker: &mut Broker,
        endpoint: Endpoint,
        hello: &Hello,
        streams: Vec<(u32, OwnedFd)>,
    ) -> Result<GuestId, BrokerError> {
        let comes_again = matches!(endpoint, Endpoint::Listener(_));
        let guest = self.hub.add_guest(endpoint).map_err(BrokerError::kernel("cannot serve the guest"))?;
        self.open(broker, guest, hello, comes_again, streams)
    }

    /// As [`Self::add`], for a guest whose VMM has a vsock device of its own, and its socket at `path`.
    ///
    /// # Errors
    /// See [`BrokerError`].
    pub fn add_hybrid(
        &mut self,
        broker: &mut Broker,
        path: &Path,
        hello: &Hello,
    ) -> Result<GuestId, BrokerError> {
        let socket = |source| BrokerError::Socket { path: path.to_owned(), source };
        let guest = self.hybrid.add_guest(path).map_err(socket)?;
        self.open(broker, guest, hello, true, Vec::new())
    }

    fn open(
        &mut self,
        broker: &mut Broker,
        guest: GuestId,
        hello: &Hello,
        comes_again: bool,
        streams: Vec<(u32, OwnedFd)>,
    ) -> Result<GuestId, BrokerError> {
        let opened = broker
            .open_guest(guest, hello)
            .and_then(|session| Self::carry(&mut self.gateways, &self.events, broker, guest, session, hello));
        if let Err(error) = opened {
            self.remove(broker, guest);
            return Err(error);
        }
        if comes_again {
            self.coming.insert(guest, hello.clone());
        }
        for (port, stream) in streams {
            broker.serve_port(guest, port, stream);
        }
        Ok(guest)
    }

    /// Lets a guest send from the files of a share, which it mounts by this tag, without their passing it.
    pub fn offer_files(&mut self, guest: GuestId, share: &str, files: Files) {
        if !Hybrid::has(guest) {
            self.hub.offer_files(guest, share, files);
        }
    }

    /// Makes a gateway for a guest's packets.
    fn carry(
        gateways: &mut Gateways,
        events: &OwnedFd,
        broker: &mut Broker,
        guest: GuestId,
        session: SessionId,
        hello: &Hello,
    ) -> Result<(), BrokerError> {
        let kernel = BrokerError::kernel;
        let (ours, theirs) = UnixStream::pair().map_err(kernel("cannot carry the guest's packets"))?;
        let config = GatewayConfig {
            addresses: hello.tun,
            publish: hello.publish.clone(),
            ..GatewayConfig::default()
        };
        let mut gateway = Gateway::framed(ours.into(), config)?;
        gateway.start(&mut Link::new(broker, session))?;
        epoll::add(events, gateway.poll_fd(), EventData::new_u64(guest.0.into()), EventFlags::IN)
            .map_err(|error| kernel("cannot wait for events")(error.into()))?;
        broker.serve_port(guest, ports::PACKETS, theirs.into());
        gateways.insert(guest, (session, gateway));
        Ok(())
    }

    /// Ends a guest and its session.
    pub fn remove(&mut self, broker: &mut Broker, guest: GuestId) {
        if Hybrid::has(guest) {
            self.hybrid.remove_guest(guest);
        } else {
            self.hub.remove_guest(guest);
        }
        self.gateways.remove(&guest);
        self.coming.remove(&guest);
        broker.close_guest(guest);
    }

    /// Readable when [`Self::run_ready`] has something to do: the device, and the gateways. Polled directly they are
    /// quicker than through one more level of epoll.
    #[must_use]
    pub fn poll_fds(&self) -> [BorrowedFd<'_>; 2] {
        let gateways = match self.gateways.values().next() {
            Some((_, gateway)) if self.has_one() => gateway.poll_fd(),
            // Guests of the other kind come by the same descriptor as gateways.
            _ => self.events.as_fd(),
        };
        [self.hub.poll_fd(), gateways]
    }

    /// When [`Self::run_ready`] has something to do at the latest; in the past: at once, after a look at other
    /// descriptors.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        let gateways = self.gateways.values().filter_map(|(_, gateway)| gateway.next_deadline()).min();
        [self.hub.next_deadline(), gateways].into_iter().flatten().min()
    }

    /// Serves what is ready and due. Never waits for long: the device looks for more for as long as there is traffic.
    /// `ready`: what was told of [`Self::poll_fds`].
    pub fn run_ready(&mut self, broker: &mut Broker, ready: [bool; 2]) {
        let [device, packets] = ready;
        if device || self.hub.next_deadline().is_some_and(|at| at <= Instant::now()) {
            self.hub.run_ready(broker);
        }
        self.serve_orders(broker);
        if packets {
            self.run_gateways(broker);
        }
        let now = Instant::now();
        for (session, gateway) in self.gateways.values_mut() {
            if gateway.next_deadline().is_some_and(|at| at <= now) {
                gateway.expire(now, &mut Link::new(broker, *session));
            }
        }
    }

    /// There is one guest, of the hub: its gateway is polled directly.
    fn has_one(&self) -> bool {
        self.gateways.len() == 1 && self.gateways.keys().all(|guest| !Hybrid::has(*guest))
    }

    fn run_gateways(&mut self, broker: &mut Broker) {
        if self.has_one() {
            self.gateways
                .iter_mut()
                .for_each(|(guest, (session, gateway))| serve(broker, *guest, *session, gateway));
            return;
        }
        let mut events = Vec::with_capacity(EVENTS);
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let _ = epoll::wait(&self.events, rustix::buffer::spare_capacity(&mut events), Some(&zero));
        for event in events {
            if event.data.u64() == HYBRID {
                self.hybrid.run_ready(broker);
                continue;
            }
            let guest = GuestId(u32::try_from(event.data.u64()).unwrap_or(u32::MAX));
            if let Some((session, gateway)) = self.gateways.get_mut(&guest) {
                serve(broker, guest, *session, gateway);
            }
        }
    }

    /// Takes an answer of the broker that came late. Given back if it is for none of the guests.
    pub fn answered(
        &mut self,
        broker: &mut Broker,
        session: SessionId,
        id: RequestId,
        answer: Answer,
    ) -> Option<Answer> {
        let found = self.gateways.values_mut().find(|(other, _)| *other == session);
        let Some((_, gateway)) = found else { return Some(answer) };
        gateway.answered(id, answer, Instant::now(), &mut Link::new(broker, session));
        None
    }

    /// Has the device do what the broker wants of it.
    pub fn serve_orders(&mut self, broker: &mut Broker) {
        let (hub, hybrid) = (&mut self.hub, &mut self.hybrid);
        let mut flush = false;
        while let Some(order) = broker.next_order() {
            match order {
                Order::Dial(guest, stream, socket) => {
                    let dialled = if Hybrid::has(guest) {
                        hybrid.dial(guest, stream, socket)
                    } else {
                        hub.dial(guest, stream, socket)
                    };
                    match dialled {
                        Ok(()) => flush = true,
                        Err(socket) => broker.rejected(guest, stream, socket),
                    }
                }
                Order::Call(guest, call) => {
                    let socket = hub.socket(guest, call.stream).or_else(|| hybrid.socket(guest, call.stream));
                    broker.answer_call(guest, &call, socket);
                }
                Order::SendFile(guest, ask, _) if Hybrid::has(guest) => {
                    broker.sent(guest, ask, Err(Errno::EOPNOTSUPP));
                }
                Order::SendFile(guest, ask, what) => hub.send_file(guest, ask, &what, broker),
                Order::StopSending(guest, stream, ask) => hub.stop_sending(guest, stream, ask, broker),
                Order::Abandon(guest, stream) => {
                    // The device sees its end as that of any connection.
                    if let Some(socket) = hub.socket(guest, stream).or_else(|| hybrid.socket(guest, stream)) {
                        let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
                    }
                }
                Order::Flush(_) => flush = true,
                Order::Restarted(guest) => {
                    let Some(hello) = self.coming.get(&guest) else { continue };
                    let Some(session) = broker.session_of(guest) else { continue };
                    // Its sockets outside are closed before others are opened in their place.
                    self.gateways.remove(&guest);
                    let carried =
                        Self::carry(&mut self.gateways, &self.events, broker, guest, session, hello);
                    if let Err(error) = carried {
                        tracing::error!(%error, "the guest's packets are not carried");
                    }
                }
            }
        }
        if flush {
            hub.flush(broker);
            hybrid.flush(broker);
        }
    }

    /// Waits for one of the descriptors, `other` being one more, or for a deadline.
    ///
    /// # Errors
    /// poll(2).
    pub fn wait(
        &self,
        other: BorrowedFd<'_>,
        deadline: Option<Instant>,
    ) -> std::io::Result<([bool; 2], bool)> {
        let next = [self.next_deadline(), deadline].into_iter().flatten().min();
        let timeout = next.map(|at| at.saturating_duration_since(Instant::now()));
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let [device, packets] = self.poll_fds();
        let mut polled =
            [device, packets, other].map(|descriptor| PollFd::from_borrowed_fd(descriptor, PollFlags::IN));
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) => {
                let [device, packets, other] = polled.map(|polled| !polled.revents().is_empty());
                Ok(([device, packets], other))
            }
            Err(rustix::io::Errno::INTR) => Ok(([false; 2], false)),
            Err(error) => Err(error.into()),
        }
    }
}

fn serve(broker: &mut Broker, guest: GuestId, session: SessionId, gateway: &mut Gateway) {
    gateway.set_segments(broker.takes_segments(guest));
    gateway.run_ready(Instant::now(), &mut Link::new(broker, session));
}
