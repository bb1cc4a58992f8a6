//! The streams of a session, each joined with a socket of this kernel.
//!
//! ```text
//!   Connect --> connecting -- up --> joined -- over --> gone, Ended
//!                    +-- failed, or its stream was closed --> gone, Failed
//! ```

use super::session::{Fault, token};
use crate::channel::Channel;
use crate::relay::{self, End, Pair, Side, Step};
use crate::stream::{self, Holder};
use kso_wire::Errno;
use kso_wire::provide::{Connect, StreamId, ToBroker};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::net::sockopt;
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

#[derive(Debug)]
enum State {
    Connecting { tcp: OwnedFd, stream: OwnedFd },
    Joined(Pair),
}

#[derive(Debug)]
struct Entry {
    state: State,
    queued: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Streams {
    all: HashMap<StreamId, Entry>,
    /// Those with something to do.
    queue: Vec<StreamId>,
    scratch: Vec<u8>,
}

impl Streams {
    pub fn new() -> Self {
        Self { all: HashMap::new(), queue: Vec::new(), scratch: vec![0; relay::BUFFER] }
    }

    pub fn count(&self) -> usize {
        self.all.len()
    }

    pub fn knows(&self, id: StreamId) -> bool {
        self.all.contains_key(&id)
    }

    pub fn has_more_to_do(&self) -> bool {
        !self.queue.is_empty()
    }

    pub fn socket(&self, id: StreamId) -> Option<BorrowedFd<'_>> {
        self.all.get(&id).map(|entry| match &entry.state {
            State::Connecting { tcp, .. } => tcp.as_fd(),
            State::Joined(pair) => pair.tcp(),
        })
    }

    /// Begins a connection.
    pub fn connect(&mut self, epoll: BorrowedFd<'_>, order: &Connect, stream: OwnedFd) -> Result<(), Errno> {
        let tcp = match open(order, order.port) {
            // The port is a wish: programs see it, few depend on it.
            Err(Errno::EADDRINUSE | Errno::EADDRNOTAVAIL | Errno::EACCES) if order.port != 0 => {
                open(order, 0)?
            }
            other => other?,
        };
        self.add(epoll, order.stream, tcp, stream, |tcp, stream| State::Connecting { tcp, stream })
    }

    /// Joins a socket that was accepted.
    pub fn join(
        &mut self,
        epoll: BorrowedFd<'_>,
        id: StreamId,
        tcp: OwnedFd,
        stream: OwnedFd,
    ) -> Result<(), Errno> {
        let _ = sockopt::set_tcp_nodelay(&tcp, true);
        self.add(epoll, id, tcp, stream, |tcp, stream| State::Joined(Pair::new(tcp, stream)))
    }

    fn add(
        &mut self,
        epoll: BorrowedFd<'_>,
        id: StreamId,
        tcp: OwnedFd,
        stream: OwnedFd,
        state: impl FnOnce(OwnedFd, OwnedFd) -> State,
    ) -> Result<(), Errno> {
        for (kind, descriptor) in [(token::TCP, tcp.as_fd()), (token::STREAM, stream.as_fd())] {
            let data = EventData::new_u64(token::of(kind, id.0));
            epoll::add(epoll, descriptor, data, relay::interest()).map_err(crate::errno)?;
        }
        self.all.insert(id, Entry { state: state(tcp, stream), queued: false });
        Ok(())
    }

    /// A descriptor is ready.
    pub fn ready(&mut self, tcp: bool, id: StreamId, flags: EventFlags) {
        let Some(entry) = self.all.get_mut(&id) else { return };
        match &mut entry.state {
            State::Joined(pair) => pair.ready(if tcp { Side::Tcp } else { Side::Stream }, flags),
            // Its stream can be written at once: no news of the connection. Its end is; AF_VSOCK shows that as RDHUP.
            State::Connecting { .. } if !tcp && !flags.intersects(EventFlags::HUP | EventFlags::RDHUP) => {
                return;
            }
            State::Connecting { .. } => {}
        }
        if !entry.queued {
            entry.queued = true;
            self.queue.push(id);
        }
    }

    /// Does what there is to do, a turn for each.
    pub fn run(&mut self, channel: &mut Channel) -> Result<(), Fault> {
        for id in std::mem::take(&mut self.queue) {
            let Some(entry) = self.all.get_mut(&id) else { continue };
            entry.queued = false;
            if let State::Connecting { .. } = entry.state {
                let Some(told) = self.established(id) else { continue };
                channel.send(&told, None)?;
            }
            let Some(Entry { state: State::Joined(pair), queued }) = self.all.get_mut(&id) else { continue };
            match pair.run(&mut self.scratch) {
                Step::Wait => {}
                Step::Again => {
                    *queued = true;
                    self.queue.push(id);
                }
                Step::Over(End { bytes_in, bytes_out, errno }) => {
                    // Told before the stream closes: see `relay`.
                    channel.send(&ToBroker::Ended { stream: id, bytes_in, bytes_out, errno }, None)?;
                    channel.flush()?;
                    self.all.remove(&id);
                }
            }
        }
        Ok(())
    }

    /// What became of a connection that was under way; `None`: it still is.
    fn established(&mut self, id: StreamId) -> Option<ToBroker> {
        let Entry { state, queued } = self.all.remove(&id)?;
        let State::Connecting { tcp, stream } = state else { return None };
        if relay::has_hung_up(stream.as_fd()) {
            // The program gave up.
            return Some(ToBroker::Failed { stream: id, errno: Errno::ECONNABORTED });
        }
        let failed = match kso_sys::take_error(tcp.as_fd()) {
            Ok(0) if kso_sys::peer_address(tcp.as_fd()).is_err() => {
                self.all.insert(id, Entry { state: State::Connecting { tcp, stream }, queued });
                return None;
            }
            Ok(0) => None,
            Ok(raw) => Some(kso_sys::errno::from_raw(raw)),
            Err(error) => Some(super::portable(&error)),
        };
        let local = match (failed, crate::local_address(&tcp)) {
            (None, Ok(local)) => local,
            (Some(errno), _) | (None, Err(errno)) => return Some(ToBroker::Failed { stream: id, errno }),
        };
        self.all.insert(id, Entry { state: State::Joined(Pair::new(tcp, stream)), queued });
        Some(ToBroker::Connected { stream: id, local })
    }
}

fn open(order: &Connect, port: u16) -> Result<OwnedFd, Errno> {
    let port = (port != 0).then_some(port);
    stream::connect_relayed(&stream::Order {
        peer: order.peer,
        family: order.family,
        port,
        options: &order.options,
        holder: Holder::Outside,
    })
}
