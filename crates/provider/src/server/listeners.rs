//! The listeners of a session.
//!
//! A connection is accepted only when there is a stream for it: those that wait are in the kernel's own queue, with
//! the length that the program gave it.

use super::session::{Fault, ToBrokerAccepted, token};
use crate::relay;
use crate::stream::{self, Holder, Place};
use kso_wire::Errno;
use kso_wire::provide::{Listen, ListenerId, MAX_OFFERS, StreamId};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::net::{SocketAddrAny, SocketFlags, acceptfrom_with};
use std::collections::{HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

#[derive(Debug)]
struct Listener {
    socket: OwnedFd,
    offers: VecDeque<(StreamId, OwnedFd)>,
    /// Connections may wait.
    ready: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Listeners {
    all: HashMap<ListenerId, Listener>,
    offered: HashSet<StreamId>,
}

impl Listeners {
    pub fn count(&self) -> usize {
        self.all.len()
    }

    pub fn knows(&self, id: ListenerId) -> bool {
        self.all.contains_key(&id)
    }

    pub fn knows_stream(&self, id: StreamId) -> bool {
        self.offered.contains(&id)
    }

    pub fn open(&mut self, epoll: BorrowedFd<'_>, order: &Listen) -> Result<SocketAddr, Errno> {
        let place = Place { address: order.address, loopback_only: false, reuse: true };
        let socket = stream::reserve(place, &order.options)?;
        stream::listen(&socket, order.backlog, &order.options, Holder::Outside)?;
        let local = crate::local_address(&socket)?;
        let data = EventData::new_u64(token::of(token::LISTENER, order.listener.0));
        epoll::add(epoll, &socket, data, EventFlags::IN | EventFlags::ET).map_err(crate::errno)?;
        let listener = Listener { socket, offers: VecDeque::new(), ready: true };
        self.all.insert(order.listener, listener);
        Ok(local)
    }

    /// An offer for a listener that is closed already closes the stream.
    pub fn offer(&mut self, id: ListenerId, stream: StreamId, descriptor: OwnedFd) -> Result<(), Fault> {
        let Some(listener) = self.all.get_mut(&id) else { return Ok(()) };
        if listener.offers.len() >= MAX_OFFERS {
            return Err(Fault::OutOfOrder("it offered more streams than may wait"));
        }
        listener.offers.push_back((stream, descriptor));
        self.offered.insert(stream);
        Ok(())
    }

    /// Drops the streams that are the next to be used and are broken.
    pub fn drop_broken(&mut self, id: ListenerId) -> Vec<StreamId> {
        let mut broken = Vec::new();
        let Some(listener) = self.all.get_mut(&id).filter(|listener| listener.ready) else { return broken };
        while let Some((stream, descriptor)) = listener.offers.front()
            && relay::has_hung_up(descriptor.as_fd())
        {
            self.offered.remove(stream);
            broken.push(*stream);
            listener.offers.pop_front();
        }
        broken
    }

    pub fn ready(&mut self, id: u64) {
        if let Some(listener) = self.all.get_mut(&ListenerId(id)) {
            listener.ready = true;
        }
    }

    /// The next connection with the stream that was offered for it.
    #[allow(clippy::type_complexity)]
    pub fn accept(
        &mut self,
        id: u64,
    ) -> Result<Option<(ToBrokerAccepted, OwnedFd, OwnedFd)>, (ListenerId, Errno)> {
        let id = ListenerId(id);
        let Some(listener) = self.all.get_mut(&id) else { return Ok(None) };
        while listener.ready && !listener.offers.is_empty() {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            match acceptfrom_with(listener.socket.as_fd(), flags) {
                Ok((socket, peer)) => {
                    let peer = peer.and_then(|peer: SocketAddrAny| SocketAddr::try_from(peer).ok());
                    let (Some(peer), Ok(local)) = (peer, crate::local_address(&socket)) else { continue };
                    let Some((stream, descriptor)) = listener.offers.pop_front() else { continue };
                    self.offered.remove(&stream);
                    return Ok(Some((
                        ToBrokerAccepted { listener: id, stream, peer, local },
                        socket,
                        descriptor,
                    )));
                }
                Err(rustix::io::Errno::AGAIN) => listener.ready = false,
                // Of the connection, not of the listener (accept(2), "Error handling").
                Err(
                    rustix::io::Errno::INTR
                    | rustix::io::Errno::CONNABORTED
                    | rustix::io::Errno::PROTO
                    | rustix::io::Errno::PERM
                    | rustix::io::Errno::NETDOWN
                    | rustix::io::Errno::HOSTUNREACH
                    | rustix::io::Errno::NETUNREACH,
                ) => {}
                // The queue keeps it; the next offer, or connection, tries again.
                Err(
                    rustix::io::Errno::MFILE
                    | rustix::io::Errno::NFILE
                    | rustix::io::Errno::NOBUFS
                    | rustix::io::Errno::NOMEM,
                ) => return Ok(None),
                Err(error) => {
                    self.close(id);
                    return Err((id, crate::errno(error)));
                }
            }
        }
        Ok(None)
    }

    pub fn close(&mut self, id: ListenerId) {
        if let Some(listener) = self.all.remove(&id) {
            for (stream, _) in listener.offers {
                self.offered.remove(&stream);
            }
        }
    }

    pub fn clear(&mut self) {
        self.all.clear();
        self.offered.clear();
    }
}
