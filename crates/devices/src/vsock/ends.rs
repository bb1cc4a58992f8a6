//! How streams open, fail and end.

use super::hub::{Hub, guest_id};
use super::outside::Outside;
use super::packet::Header;
use super::stream::{Phase, Stream};
use super::table::{Entry, Far, Id};
use kso_wire::Errno;
use kso_wire::guest::StreamKey;
use rustix::event::epoll::EventFlags;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// How long an orphan may take to deliver what it holds (Linux gives a TCP orphan about as long).
const ORPHAN: Duration = Duration::from_secs(60);

impl Hub {
    /// epoll told something of a socket.
    pub(super) fn socket_ready(&mut self, id: Id, flags: EventFlags, outside: &mut dyn Outside) {
        let Some(entry) = self.table.get_mut(id) else { return };
        let ending = flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR);
        entry.ending |= ending;
        entry.readable |= ending || flags.contains(EventFlags::IN);
        entry.writable |= ending || flags.contains(EventFlags::OUT);
        let Far::Socket(socket) = &entry.far else { return };
        match entry.stream.phase() {
            Phase::Opening if entry.writable => match kso_sys::take_error(socket.as_fd()) {
                Ok(0) => self.opened(id, outside),
                Ok(error) => self.fail(id, kso_sys::errno::from_raw(error), outside),
                Err(error) => self.fail(id, kso_sys::errno::of(&error), outside),
            },
            Phase::Opening | Phase::Dialling => {}
            Phase::Open => {
                if entry.writable && !entry.held.is_empty() {
                    self.flush_held(id, outside);
                }
                self.send_on(id, outside);
                self.nudge(id);
                if self.table.get(id).is_some_and(|entry| entry.orphan && entry.ending) {
                    // Nobody is left who would read an error.
                    self.look_at_orphan(id);
                }
                self.consider(id);
            }
        }
    }

    fn look_at_orphan(&mut self, id: Id) {
        let Some(Entry { far: Far::Socket(socket), .. }) = self.table.get(id) else { return };
        if !matches!(kso_sys::take_error(socket.as_fd()), Ok(0)) {
            self.discard(id);
        }
    }

    fn opened(&mut self, id: Id, outside: &mut dyn Outside) {
        let Some(entry) = self.table.get_mut(id) else { return };
        entry.stream.opened();
        let (index, key) = (entry.guest, entry.stream.key());
        if let Some(guest) = self.guest(index) {
            guest.half_open = guest.half_open.saturating_sub(1);
        }
        let socket = self.socket(guest_id(index), key);
        outside.established(guest_id(index), key, socket);
        self.consider(id);
    }

    /// The guest took a stream that was dialled.
    pub(super) fn taken(&mut self, id: Id, outside: &mut dyn Outside) {
        let Some(entry) = self.table.get_mut(id) else { return };
        let (index, key) = (entry.guest, entry.stream.key());
        let peer = if let Far::Joined(peer) = entry.far { Some(peer) } else { None };
        if let Some(guest) = self.guest(index) {
            guest.half_open = guest.half_open.saturating_sub(1);
        }
        if let Err(error) = self.watch_stream(id) {
            return self.broke(id, kso_sys::errno::of(&error), outside);
        }
        let socket = self.socket(guest_id(index), key);
        outside.established(guest_id(index), key, socket);
        if let Some(peer) = peer {
            self.opened(peer, outside);
        }
    }

    /// It did not; with an RST if it needs to be told.
    pub(super) fn rejected(&mut self, id: Id, reset: bool, outside: &mut dyn Outside) {
        let Some(entry) = self.discard(id) else { return };
        let key = entry.stream.key();
        if reset {
            self.reset_packet(entry.guest, key);
        }
        match entry.far {
            Far::Socket(socket) => outside.rejected(guest_id(entry.guest), key, socket),
            Far::Joined(peer) => self.fail(peer, Errno::ECONNREFUSED, outside),
            Far::Control => {}
        }
    }

    /// A connection that the guest asked for failed.
    pub(super) fn fail(&mut self, id: Id, errno: Errno, outside: &mut dyn Outside) {
        let Some(entry) = self.discard(id) else { return };
        let key = entry.stream.key();
        outside.failed(guest_id(entry.guest), key, errno);
        self.reset_packet(entry.guest, key);
        if let Far::Joined(peer) = entry.far {
            self.severed.push(peer);
        }
    }

    /// An open stream broke.
    pub(super) fn broke(&mut self, id: Id, errno: Errno, outside: &mut dyn Outside) {
        let orphan = self.table.get(id).is_some_and(|entry| entry.orphan);
        if !orphan {
            self.ended(id, Some(errno), outside);
        }
        let Some(entry) = self.discard(id) else { return };
        if !orphan {
            self.reset_packet(entry.guest, entry.stream.key());
        }
        if let Far::Joined(peer) = entry.far {
            self.severed.push(peer);
        }
    }

    /// Removes a stream that the guest has given up.
    pub(super) fn sever(&mut self, id: Id) {
        if let Some(Entry { far: Far::Joined(peer), .. }) = self.discard(id) {
            self.severed.push(peer);
        }
    }

    /// Ends the streams whose other end, in a guest too, is gone.
    pub(super) fn settle(&mut self, outside: &mut dyn Outside) {
        while let Some(id) = self.severed.pop() {
            match self.table.get(id).map(|entry| entry.stream.phase()) {
                Some(Phase::Open) => self.broke(id, Errno::ECONNRESET, outside),
                Some(Phase::Opening) => self.fail(id, Errno::ECONNREFUSED, outside),
                Some(Phase::Dialling) => {
                    if let Some(entry) = self.discard(id) {
                        self.reset_packet(entry.guest, entry.stream.key());
                    }
                }
                None => {}
            }
        }
        let now = Instant::now();
        while let Some(&(deadline, id)) = self.orphans.front()
            && deadline <= now
        {
            self.orphans.pop_front();
            self.discard(id);
        }
    }

    /// An orphan is not waited for without end.
    pub(super) fn bury_later(&mut self, id: Id) {
        self.orphans.push_back((Instant::now() + ORPHAN, id));
    }

    /// Joins a stream that a guest asked for to a listener of a guest.
    pub(super) fn join(
        &mut self,
        index: usize,
        key: StreamKey,
        header: &Header,
        (other, name): (usize, StreamKey),
        outside: &mut dyn Outside,
    ) {
        if !self.may_add(other, name) || (index, key) == (other, name) {
            outside.failed(guest_id(index), key, Errno::ECONNREFUSED);
            return self.reset_packet(index, key);
        }
        let nobody = Id { index: u32::MAX, generation: 0 };
        let there = self.add(other, Stream::dialled(name), Far::Joined(nobody));
        let here = self.add(index, Stream::requested(key, header), Far::Joined(there));
        if let Some(entry) = self.table.get_mut(there) {
            entry.far = Far::Joined(here);
        }
        self.consider(there);
    }
}
