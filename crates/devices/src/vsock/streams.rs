//! The streams of guests: their names, their places in line, and their removal.

use super::hub::{Hub, guest_id};
use super::outside::{End, Outside};
use super::packet::{Header, Op};
use super::stream::{Phase, Stream};
use super::table::{Entry, Far, Id};
use kso_wire::Errno;
use kso_wire::guest::StreamKey;

impl Hub {
    /// Whether there may be one more stream by this name.
    pub(super) fn may_add(&mut self, index: usize, key: StreamKey) -> bool {
        let limits = self.limits;
        self.guest(index).is_some_and(|guest| {
            guest.tx.is_some()
                && guest.names.len() < limits.streams
                && guest.half_open < limits.half_open
                && !guest.names.contains_key(&key)
        })
    }

    pub(super) fn add(&mut self, index: usize, stream: Stream, far: Far) -> Id {
        let key = stream.key();
        let half_open = usize::from(stream.phase() != Phase::Open);
        let id = self.table.insert(Entry::new(index, stream, far));
        if let Some(guest) = self.guest(index) {
            guest.names.insert(key, id);
            guest.half_open += half_open;
        }
        id
    }

    /// Puts a stream in line for buffers if it has something for the guest.
    pub(super) fn consider(&mut self, id: Id) {
        let Some(entry) = self.table.get(id) else { return };
        let source = match &entry.far {
            Far::Socket(_) => entry.readable,
            Far::Joined(peer) => self.table.get(*peer).is_some_and(|peer| !peer.held.is_empty()),
            Far::Control => false,
        };
        if entry.queued || entry.orphan || !(entry.stream.owed() || source && entry.stream.room() > 0) {
            return;
        }
        let guest = entry.guest;
        if let Some(entry) = self.table.get_mut(id) {
            entry.queued = true;
        }
        if let Some(guest) = self.guest(guest) {
            guest.line.push_back(id);
        }
    }

    pub(super) fn reset_packet(&mut self, index: usize, key: StreamKey) {
        if let Some(guest) = self.guest(index) {
            guest.resets.push_back(Header::to_guest(key, Op::Reset));
        }
    }

    /// Takes a stream's name away from the guest; its entry stays.
    pub(super) fn unname(&mut self, id: Id) {
        let Some(entry) = self.table.get_mut(id) else { return };
        let (index, key, phase) = (entry.guest, entry.stream.key(), entry.stream.phase());
        let Some(guest) = self.guest(index) else { return };
        if guest.names.get(&key) == Some(&id) {
            guest.names.remove(&key);
            guest.half_open -= usize::from(phase != Phase::Open);
        }
        if guest.control == Some(id) {
            guest.control = None;
        }
    }

    /// Removes an entry; its socket is closed.
    pub(super) fn discard(&mut self, id: Id) -> Option<Entry> {
        self.unname(id);
        let entry = self.table.remove(id)?;
        if let Some(sending) = &entry.sending {
            sending.stop();
        }
        if let Some(guest) = self.guest(entry.guest) {
            guest.held = guest.held.saturating_sub(entry.held.len());
        }
        Some(entry)
    }

    /// Drops all streams of a guest. What it sent already is still delivered.
    pub(super) fn drop_streams(&mut self, index: usize) {
        for id in self.table.of_guest(index) {
            self.unname(id);
            let sends = self.silence(id);
            let Some(entry) = self.table.get_mut(id) else { continue };
            if entry.stream.phase() == Phase::Open && (sends || !entry.held.is_empty()) {
                let already = std::mem::replace(&mut entry.orphan, true);
                entry.finishing = true;
                if !already {
                    self.bury_later(id);
                }
            } else {
                self.sever(id);
            }
        }
        if let Some(guest) = self.guest(index) {
            guest.line.clear();
            guest.resets.clear();
            guest.half_open = 0;
            guest.starved = false;
        }
    }

    /// An open stream ended: tells the outside.
    pub(super) fn ended(&mut self, id: Id, errno: Option<Errno>, outside: &mut dyn Outside) {
        self.end_sending(id, errno, outside);
        let Some(entry) = self.table.get(id) else { return };
        let end = End { bytes_out: entry.bytes_out, bytes_in: entry.bytes_in, errno };
        outside.ended(guest_id(entry.guest), entry.stream.key(), end);
    }
}
