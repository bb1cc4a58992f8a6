//! Published datagram ports: bound outside by the broker, served here.
//!
//! What arrives is shown with its true source address and port, and makes a flow by which the answer finds its
//! way back out of the same port. Sources that mean something else inside are shown as the gateway
//! ([`Gateway::shown`]).

use crate::GatewayError;
use crate::datagrams::FlowKey;
use crate::device::Train;
use crate::gateway::Gateway;
use crate::watch::{Ready, Source, Waiting};
use kso_sys::datagram::{self, Destination, MAX_RECEIVE};
use kso_wire::{Answer, BindDatagram, BrokerLink, Errno, Family, Protocol, Publication, Reply, Request};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

/// Errors that are taken off a queue at one time.
const MAX_ERRORS: usize = 32;

/// A published port's socket.
#[derive(Debug)]
pub struct Published {
    pub(crate) socket: OwnedFd,
    /// Where its datagrams go inside.
    guest: SocketAddr,
}

impl Gateway {
    /// Opens the published UDP ports.
    ///
    /// # Errors
    /// One of them cannot be opened. If the broker answers later, the error is only logged.
    pub fn start(&mut self, link: &mut dyn BrokerLink) -> Result<(), GatewayError> {
        for index in 0..self.publish.len() {
            let Some(publication) = self.publish.get(index) else { break };
            // A publication of every listener is about streams: datagram sockets do not listen.
            if publication.protocol != Protocol::Udp || publication.inner_port == 0 {
                continue;
            }
            let families: &[Family] = match publication.address {
                None => &[Family::V4, Family::V6],
                Some(IpAddr::V4(_)) => &[Family::V4],
                Some(IpAddr::V6(_)) => &[Family::V6],
            };
            for family in families {
                let bind = BindDatagram { publication: index as u32, family: *family };
                let answer = self.ask(Waiting::Published(index), Request::BindDatagram(bind), link);
                if let Ok(answer) = answer {
                    self.published(index, answer)?;
                }
            }
        }
        Ok(())
    }

    pub(crate) fn published(&mut self, index: usize, answer: Answer) -> Result<(), GatewayError> {
        let Some(Publication { address, outer_port, inner_port, .. }) = self.publish.get(index) else {
            return Ok(());
        };
        let port = if *outer_port == 0 { *inner_port } else { *outer_port };
        let failed = |errno| GatewayError::Publish { port, errno };
        let (socket, local) = match (answer.result, answer.descriptor) {
            (Ok(Reply::Socket { local }), Some(socket)) => (socket, local),
            (Ok(_), _) => return Err(failed(Errno::EPROTO)),
            // A host without IPv6 has no ::1.
            (Err(failure), _)
                if address.is_none()
                    && matches!(failure.errno, Errno::EADDRNOTAVAIL | Errno::EAFNOSUPPORT) =>
            {
                return Ok(());
            }
            (Err(failure), _) => return Err(failed(failure.errno)),
        };
        let local = match local {
            Some(local) => local,
            None => match kso_sys::local_address(socket.as_fd()) {
                Ok(kso_sys::RawAddress::Inet(local)) => local,
                _ => return Err(failed(Errno::EPROTO)),
            },
        };
        let family = if local.is_ipv4() { Family::V4 } else { Family::V6 };
        let guest = self.addresses.guest.into_iter().find(|guest| guest.is_ipv4() == local.is_ipv4());
        let guest = SocketAddr::new(guest.ok_or_else(|| failed(Errno::EAFNOSUPPORT))?, *inner_port);
        datagram::prepare(socket.as_fd(), family, false).map_err(|_| failed(Errno::EPROTO))?;
        let place = self.datagrams.published.len() as u32;
        self.watch.add(&socket, Source::Published(place)).map_err(|_| failed(Errno::ENOMEM))?;
        self.datagrams.published.push(Published { socket, guest });
        Ok(())
    }

    pub(crate) fn published_ready(
        &mut self,
        place: u32,
        ready: Ready,
        now: Instant,
        link: &mut dyn BrokerLink,
    ) {
        if ready.error || !self.receive_published(place, now, link) {
            self.report_published(place);
            self.receive_published(place, now, link);
        }
    }

    /// Receives datagrams and writes them to the TUN. Whether there were any.
    pub(crate) fn receive_published(&mut self, place: u32, now: Instant, link: &mut dyn BrokerLink) -> bool {
        let Some(Published { socket, guest }) = self.datagrams.published.get(place as usize) else {
            return false;
        };
        let guest = *guest;
        let limit = self.datagrams.pace.limit(MAX_RECEIVE, self.at_once);
        // An error that is pending is told by the queue.
        let Ok(count) = self.datagrams.batch.receive(socket.as_fd(), limit, true) else { return false };
        self.datagrams.pace.got(count);
        // The batch is lent out while flows are made, which do not receive.
        let batch = std::mem::take(&mut self.datagrams.batch);
        let mut train = Train::default();
        let mut last: Option<(SocketAddr, SocketAddr)> = None;
        for (received, payload) in (0..count).filter_map(|index| batch.get(index)) {
            let Some(source) = received.source else { continue };
            let peer = self.shown(source);
            if last.is_some_and(|last| last != (peer, source)) {
                self.write_published(last.map(|last| last.0), guest, &mut train);
            }
            if last != Some((peer, source)) {
                last = Some((peer, source));
                let destination = Destination { peer: source, local: received.local };
                self.published_flow(FlowKey { guest, peer }, place, destination, now, link);
            }
            let unit = received.segment.map_or(payload.len(), usize::from);
            if !train.add(payload, unit, received.traffic_class) {
                self.write_published(Some(peer), guest, &mut train);
                train.add(payload, unit, received.traffic_class);
            }
        }
        self.write_published(last.map(|last| last.0), guest, &mut train);
        self.datagrams.batch = batch;
        count > 0
    }

    fn write_published(&mut self, peer: Option<SocketAddr>, guest: SocketAddr, train: &mut Train<'_>) {
        let Some(peer) = peer.filter(|_| !train.is_empty()) else { return };
        let written = self.device.write_train(peer, guest, train);
        self.stats.datagrams_received += *written.as_ref().unwrap_or(&0) as u64;
        self.wrote(written);
        *train = Train::default();
    }

    /// Tells the sandbox what the queue of errors of a published port holds.
    pub(crate) fn report_published(&mut self, place: u32) {
        let mut buffer = [0; 1280];
        for _ in 0..MAX_ERRORS {
            let Some(Published { socket, guest }) = self.datagrams.published.get(place as usize) else {
                return;
            };
            let guest = *guest;
            let Ok(Some(error)) = datagram::next_error(socket.as_fd(), &mut buffer) else { return };
            if let Some(peer) = error.peer {
                let key = FlowKey { guest, peer: self.shown(peer) };
                self.report_error(&key, &error, &buffer);
            }
        }
    }
}
