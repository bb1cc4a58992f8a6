//! The streams of a session, joined with connections, and those that are offered to listeners.

use super::Fault;
use crate::connection::ConnectionId;
use crate::joint::{Joint, Step};
use crate::stack::{Event, Stack};
use kso_provider::channel::Channel;
use kso_provider::relay;
use kso_wire::Errno;
use kso_wire::provide::{ListenerId, MAX_OFFERS, StreamId, ToBroker};
use rustix::event::epoll::{self, EventData, EventFlags};
use std::collections::{HashMap, VecDeque};
use std::os::fd::{BorrowedFd, OwnedFd};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Streams {
    joints: HashMap<ConnectionId, Joint>,
    /// The connections of streams; none: it is offered.
    names: HashMap<StreamId, Option<ConnectionId>>,
    offers: HashMap<ListenerId, VecDeque<(StreamId, OwnedFd)>>,
    /// Those with something to do.
    queue: Vec<ConnectionId>,
}

impl Streams {
    pub fn knows(&self, id: StreamId) -> bool {
        self.names.contains_key(&id)
    }

    pub fn connection(&self, id: StreamId) -> Option<ConnectionId> {
        self.names.get(&id).copied().flatten()
    }

    pub fn knows_listener(&self, id: ListenerId) -> bool {
        self.offers.contains_key(&id)
    }

    pub fn listeners(&self) -> usize {
        self.offers.len()
    }

    pub fn has_more_to_do(&self) -> bool {
        !self.queue.is_empty()
    }

    pub fn listen(&mut self, id: ListenerId) {
        self.offers.insert(id, VecDeque::new());
    }

    /// False: there is none.
    pub fn unlisten(&mut self, id: ListenerId) -> bool {
        let Some(offers) = self.offers.remove(&id) else { return false };
        for (stream, _) in offers {
            self.names.remove(&stream);
        }
        true
    }

    /// An offer for a listener that is closed already closes the stream.
    pub fn offer(&mut self, id: ListenerId, stream: StreamId, descriptor: OwnedFd) -> Result<(), Fault> {
        let Some(offers) = self.offers.get_mut(&id) else { return Ok(()) };
        if offers.len() >= MAX_OFFERS {
            return Err(Fault::OutOfOrder("it offered more streams than may wait"));
        }
        offers.push_back((stream, descriptor));
        self.names.insert(stream, None);
        Ok(())
    }

    /// Joins a stream with a connection, which is `up` or becomes so.
    pub fn add(
        &mut self,
        epoll: BorrowedFd<'_>,
        connection: ConnectionId,
        id: StreamId,
        descriptor: OwnedFd,
        up: bool,
    ) -> Result<(), Errno> {
        let data = EventData::new_u64(connection.0);
        epoll::add(epoll, &descriptor, data, relay::interest())
            .map_err(|error| kso_sys::errno::from_raw(error.raw_os_error()))?;
        self.names.insert(id, Some(connection));
        self.joints.insert(connection, Joint::new(id, descriptor, up));
        Ok(())
    }

    /// Takes the connections that wait at a listener, as many as there are streams for.
    pub fn accept(
        &mut self,
        epoll: BorrowedFd<'_>,
        stack: &mut Stack,
        channel: &mut Channel,
        listener: ListenerId,
    ) -> Result<(), Fault> {
        while self.offers.get(&listener).is_some_and(|offers| !offers.is_empty()) {
            let Some((connection, ends)) = stack.accept(listener.0) else { return Ok(()) };
            let offer = self.offers.get_mut(&listener).and_then(VecDeque::pop_front);
            let Some((stream, descriptor)) = offer else { return Ok(()) };
            let told = ToBroker::Accepted { listener, stream, peer: ends.remote, local: ends.local };
            channel.send(&told, None)?;
            if let Err(errno) = self.add(epoll, connection, stream, descriptor, true) {
                stack.abort(connection);
                self.names.remove(&stream);
                let errno = Some(errno);
                channel.send(&ToBroker::Ended { stream, bytes_in: 0, bytes_out: 0, errno }, None)?;
            }
        }
        Ok(())
    }

    /// A stream is ready.
    pub fn ready(&mut self, number: u64, flags: EventFlags) {
        let id = ConnectionId(number);
        let Some(joint) = self.joints.get_mut(&id) else { return };
        joint.ready(flags);
        // That it can be written is no news while the connection is under way.
        if joint.up || flags.contains(EventFlags::HUP) {
            enqueue(&mut self.queue, joint, id);
        }
    }

    /// Hears what happened to the connections.
    pub fn hear(
        &mut self,
        epoll: BorrowedFd<'_>,
        stack: &mut Stack,
        channel: &mut Channel,
    ) -> Result<(), Fault> {
        while let Some(event) = stack.next_event() {
            match event {
                Event::Connected(id) => {
                    let (Some(joint), Some(ends)) = (self.joints.get_mut(&id), stack.ends(id)) else {
                        continue;
                    };
                    joint.up = true;
                    channel.send(&ToBroker::Connected { stream: joint.id, local: ends.local }, None)?;
                    enqueue(&mut self.queue, joint, id);
                }
                Event::Failed(id, errno) => {
                    if let Some(joint) = self.joints.remove(&id) {
                        self.names.remove(&joint.id);
                        channel.send(&ToBroker::Failed { stream: joint.id, errno }, None)?;
                    }
                }
                Event::Arrived(id) => self.accept(epoll, stack, channel, ListenerId(id))?,
                Event::Ready(id) => {
                    if let Some(joint) = self.joints.get_mut(&id) {
                        enqueue(&mut self.queue, joint, id);
                    }
                }
            }
        }
        Ok(())
    }

    /// Does what there is to do, a turn for each.
    pub fn run(&mut self, stack: &mut Stack, channel: &mut Channel) -> Result<(), Fault> {
        for id in std::mem::take(&mut self.queue) {
            let Some(joint) = self.joints.get_mut(&id) else { continue };
            joint.queued = false;
            let stream = joint.id;
            if !joint.up {
                if joint.is_given_up() {
                    stack.abort(id);
                    self.forget(id, stream);
                    let errno = Errno::ECONNABORTED;
                    channel.send(&ToBroker::Failed { stream, errno }, None)?;
                }
                continue;
            }
            match joint.run(stack, id) {
                Step::Wait => {}
                Step::Again => enqueue(&mut self.queue, joint, id),
                Step::Over(errno) => {
                    let (bytes_in, bytes_out) = (joint.bytes_in, joint.bytes_out);
                    // Told before the stream closes: see `kso_provider::relay`.
                    channel.send(&ToBroker::Ended { stream, bytes_in, bytes_out, errno }, None)?;
                    channel.flush()?;
                    match errno {
                        None => stack.release(id),
                        Some(_) => stack.abort(id),
                    }
                    self.forget(id, stream);
                }
            }
        }
        Ok(())
    }

    fn forget(&mut self, id: ConnectionId, stream: StreamId) {
        self.joints.remove(&id);
        self.names.remove(&stream);
    }
}

fn enqueue(queue: &mut Vec<ConnectionId>, joint: &mut Joint, id: ConnectionId) {
    if !joint.queued {
        joint.queued = true;
        queue.push(id);
    }
}
