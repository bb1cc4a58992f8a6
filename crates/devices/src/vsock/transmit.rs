//! From the guest to the outside.

use super::chain::{self, Pieces};
use super::guest::Fault;
use super::hub::{Hub, guest_id};
use super::outside::{Outside, Verdict};
use super::packet::{Header, Op, STREAM};
use super::stream::{Effect, Phase, Stream};
use super::table::{Entry, Far, Id};
use kso_sys::guest_memory;
use kso_wire::Errno;
use kso_wire::guest::{GUEST_CID, StreamKey};
use rustix::net::{SendFlags, Shutdown};
use std::os::fd::AsFd;

/// RSTs that may wait for buffers before no more packets are taken.
const MAX_RESETS: usize = 256;
/// Bytes that go out in one call.
const BATCH: usize = 1 << 20;
/// Pieces that go out in one call.
const BATCH_PIECES: usize = 256;
/// Packets returned before the guest is interrupted for it: it only wants the memory back.
const MODERATION: u32 = 24;

/// Payload of one stream from successive packets.
#[derive(Default)]
struct Batch<'m> {
    stream: Option<Id>,
    pieces: Pieces<'m>,
    bytes: usize,
    /// The packets it came in.
    heads: Vec<u16>,
}

impl Hub {
    /// Whether no packets are taken because the guest has no buffers for their answers.
    pub(super) fn blocked(&mut self, index: usize) -> bool {
        self.guest(index).is_none_or(|guest| guest.resets.len() >= MAX_RESETS)
    }

    /// Takes what the guest sent; whether there was something.
    pub(super) fn transmit(&mut self, index: usize, outside: &mut dyn Outside) -> bool {
        match self.try_transmit(index, outside) {
            Ok(worked) => worked,
            Err(fault) => {
                self.fault(index, &fault, outside);
                true
            }
        }
    }

    fn try_transmit(&mut self, index: usize, outside: &mut dyn Outside) -> Result<bool, Fault> {
        let Some(queue) = self.guest(index).and_then(|guest| guest.tx.clone()) else { return Ok(false) };
        let Some(mut ring) = queue.lock() else { return Ok(false) };
        if !ring.has_available() {
            return Ok(false);
        }
        let memory = ring.memory();
        let mut batch = Batch::default();
        let mut returned = 0;
        // Bounded, so that the other direction and the other guests have their turn.
        for _ in 0..ring.size() {
            if self.blocked(index) {
                break;
            }
            let Some(chain) = ring.pop(&*memory)? else { break };
            let head = chain.head_index();
            let start = batch.pieces.len();
            let header = chain::read(chain, &memory, &mut batch.pieces)?;
            let stream = self.stream_of(index, &header);
            let joins = header.op == Op::Data as u16 && stream.is_some() && stream == batch.stream;
            if !joins || batch.bytes >= BATCH || batch.pieces.len() >= BATCH_PIECES {
                let payload = batch.pieces.split_off(start);
                for head in self.send_batch(&mut batch, outside) {
                    ring.push(head, 0)?;
                    returned += 1;
                }
                batch.pieces = payload;
            }
            if self.packet(index, &header, stream, &mut batch, outside)? {
                batch.heads.push(head);
            } else {
                ring.push(head, 0)?;
                returned += 1;
            }
        }
        for head in self.send_batch(&mut batch, outside) {
            ring.push(head, 0)?;
            returned += 1;
        }
        self.interrupt_touched();
        if let Some(guest) = self.guest(index) {
            guest.unsignalled += returned;
            if guest.unsignalled >= MODERATION {
                guest.unsignalled = 0;
                ring.signal()?;
            }
        }
        Ok(returned > 0)
    }

    fn stream_of(&mut self, index: usize, header: &Header) -> Option<Id> {
        let key =
            header.stream().filter(|_| header.kind == STREAM && header.src_cid == u64::from(GUEST_CID))?;
        self.guest(index)?.names.get(&key).copied()
    }

    /// Handles a packet whose payload is at the end of the batch; whether it stays there.
    fn packet(
        &mut self,
        index: usize,
        header: &Header,
        stream: Option<Id>,
        batch: &mut Batch<'_>,
        outside: &mut dyn Outside,
    ) -> Result<bool, Fault> {
        if let Some(id) = stream
            && header.op != Op::Request as u16
        {
            let kept = self.stream_packet(id, header, batch, outside)?;
            self.consider(id);
            if !kept {
                batch.pieces.clear();
            }
            return Ok(kept);
        }
        batch.pieces.clear();
        if header.src_cid != u64::from(GUEST_CID) {
            // Nobody there to answer to.
            return Ok(false);
        }
        match header.stream().filter(|_| header.kind == STREAM) {
            Some(key) if header.op == Op::Request as u16 => self.request(index, key, header, stream, outside),
            _ if header.op == Op::Reset as u16 => {}
            _ => {
                if let Some(guest) = self.guest(index) {
                    guest.resets.push_back(header.reset());
                }
            }
        }
        Ok(false)
    }

    fn request(
        &mut self,
        index: usize,
        key: StreamKey,
        header: &Header,
        before: Option<Id>,
        outside: &mut dyn Outside,
    ) {
        if let Some(id) = before {
            match self.table.get(id).map(|entry| entry.stream.phase()) {
                // Both ends call at once, which TCP would make one connection of. This is not TCP.
                Some(Phase::Dialling) => return self.reset_packet(index, key),
                Some(Phase::Open) => self.ended(id, None, outside),
                // The guest gave up and tries again.
                _ => {}
            }
            self.sever(id);
        }
        if !self.may_add(index, key) {
            outside.failed(guest_id(index), key, Errno::ENOBUFS);
            return self.reset_packet(index, key);
        }
        match outside.request(guest_id(index), key) {
            // It knows, and has told the guest what it wants to.
            Verdict::Refused(_) => self.reset_packet(index, key),
            Verdict::Control => {
                let mut stream = Stream::requested(key, header);
                stream.opened();
                let id = self.add(index, stream, Far::Control);
                if let Some(guest) = self.guest(index) {
                    guest.control = Some(id);
                }
                self.consider(id);
            }
            Verdict::Socket(socket) => {
                let id = self.add(index, Stream::requested(key, header), Far::Socket(socket));
                if let Err(error) = self.watch_stream(id) {
                    self.fail(id, kso_sys::errno::of(&error), outside);
                }
            }
            Verdict::Guest(other, name) => self.join(index, key, header, (other.0 as usize, name), outside),
        }
    }

    pub(super) fn watch_stream(&mut self, id: Id) -> std::io::Result<()> {
        match self.table.get(id).map(|entry| &entry.far) {
            Some(Far::Socket(socket)) => self.watch_socket(socket, id),
            _ => Ok(()),
        }
    }

    fn stream_packet(
        &mut self,
        id: Id,
        header: &Header,
        batch: &mut Batch<'_>,
        outside: &mut dyn Outside,
    ) -> Result<bool, Fault> {
        let Some(entry) = self.table.get_mut(id) else { return Ok(false) };
        let (index, key, phase) = (entry.guest, entry.stream.key(), entry.stream.phase());
        match entry.stream.packet(header) {
            Effect::None => {}
            Effect::Deliver(bytes) => return self.deliver(id, bytes as usize, batch, outside),
            Effect::Finish => {
                entry.finishing = true;
                self.finish_far(id);
            }
            Effect::Taken => self.taken(id, outside),
            Effect::Rejected => self.rejected(id, header.op != Op::Reset as u16, outside),
            Effect::Closed => {
                self.ended(id, None, outside);
                self.reset_packet(index, key);
                self.orphan(id);
            }
            Effect::Dropped if phase == Phase::Open => {
                self.ended(id, None, outside);
                self.sever(id);
            }
            Effect::Dropped => {
                outside.failed(guest_id(index), key, Errno::ECONNRESET);
                self.sever(id);
            }
            Effect::Violated if phase == Phase::Open => self.broke(id, Errno::EPROTO, outside),
            Effect::Violated => self.fail(id, Errno::EPROTO, outside),
        }
        Ok(false)
    }

    /// Payload at the end of the batch is for this stream's far end; whether it stays in the batch.
    fn deliver(
        &mut self,
        id: Id,
        bytes: usize,
        batch: &mut Batch<'_>,
        outside: &mut dyn Outside,
    ) -> Result<bool, Fault> {
        let Some(entry) = self.table.get_mut(id) else { return Ok(false) };
        match &entry.far {
            Far::Socket(_) if entry.held.is_empty() && entry.writable && entry.sending.is_none() => {
                batch.stream = Some(id);
                batch.bytes += bytes;
                return Ok(true);
            }
            Far::Control => {
                let mut message = Vec::with_capacity(bytes);
                chain::keep(&batch.pieces, 0, &mut message);
                entry.forwarded(bytes);
                let guest = guest_id(entry.guest);
                outside.control(guest, &message).map_err(Fault::Control)?;
            }
            Far::Socket(_) => self.hold(id, &batch.pieces, 0, outside),
            Far::Joined(peer) => {
                let peer = *peer;
                if self.table.get(peer).is_none_or(|peer| peer.orphan) {
                    // As TCP answers bytes to a socket that is closed.
                    self.broke(id, Errno::EPIPE, outside);
                    return Ok(false);
                }
                let placed = self.place_joined(id, peer, &batch.pieces, bytes, outside);
                if placed < bytes {
                    self.hold(id, &batch.pieces, placed, outside);
                    self.consider(peer);
                }
            }
        }
        Ok(false)
    }

    /// Keeps bytes for a far end that is slow.
    fn hold(
        &mut self,
        id: Id,
        pieces: &[vm_memory::VolatileSlice<'_>],
        skip: usize,
        outside: &mut dyn Outside,
    ) {
        let limit = self.limits.held;
        let Some(entry) = self.table.get_mut(id) else { return };
        let before = entry.held.len();
        chain::keep(pieces, skip, &mut entry.held);
        let (index, more) = (entry.guest, entry.held.len() - before);
        let Some(guest) = self.guest(index) else { return };
        guest.held += more;
        if guest.held > limit {
            self.broke(id, Errno::ENOBUFS, outside);
        }
    }

    /// Sends a batch; its packets can be returned then.
    fn send_batch(&mut self, batch: &mut Batch<'_>, outside: &mut dyn Outside) -> Vec<u16> {
        let Batch { stream, pieces, bytes, heads } = std::mem::take(batch);
        let Some(id) = stream else { return heads };
        let Some(entry) = self.table.get_mut(id) else { return heads };
        let Far::Socket(socket) = &entry.far else { return heads };
        let sent = match guest_memory::send(socket.as_fd(), &pieces) {
            Ok(sent) => sent,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => 0,
            Err(error) => {
                self.broke(id, kso_sys::errno::of(&error), outside);
                return heads;
            }
        };
        entry.forwarded(sent);
        if sent < bytes {
            entry.writable = false;
            self.hold(id, &pieces, sent, outside);
        }
        self.consider(id);
        heads
    }

    /// Sends what is held for a socket that has room again.
    pub(super) fn flush_held(&mut self, id: Id, outside: &mut dyn Outside) {
        let mut delivered = 0;
        let mut error = None;
        if let Some(Entry { far: Far::Socket(socket), held, writable, sending, .. }) = self.table.get_mut(id)
        {
            // What came behind a file that is being sent waits.
            let most = sending.as_ref().map_or(usize::MAX, |sending| sending.first());
            while *writable && !held.is_empty() && delivered < most {
                let (front, _) = held.as_slices();
                let front = front.get(..most - delivered).unwrap_or(front);
                match rustix::net::send(&*socket, front, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                    Ok(sent) => {
                        held.drain(..sent);
                        delivered += sent;
                    }
                    Err(rustix::io::Errno::AGAIN) => *writable = false,
                    Err(failure) => {
                        error = Some(kso_sys::errno::from_raw(failure.raw_os_error()));
                        break;
                    }
                }
            }
            if let Some(sending) = sending {
                sending.went(delivered);
            }
            if held.is_empty() {
                // What a burst needed is not kept.
                *held = std::collections::VecDeque::new();
            }
        }
        self.delivered(id, delivered);
        if let Some(errno) = error {
            return self.broke(id, errno, outside);
        }
        self.finish_far(id);
    }

    /// So many held bytes are at the far end.
    pub(super) fn delivered(&mut self, id: Id, bytes: usize) {
        let Some(entry) = self.table.get_mut(id) else { return };
        entry.forwarded(bytes);
        let index = entry.guest;
        if let Some(guest) = self.guest(index) {
            guest.held = guest.held.saturating_sub(bytes);
        }
        self.consider(id);
    }

    /// Shuts the far end's half, or lets go of an orphan, once nothing is held.
    pub(super) fn finish_far(&mut self, id: Id) {
        let Some(entry) = self.table.get_mut(id) else { return };
        if !entry.finishing || !entry.held.is_empty() || entry.sending.is_some() {
            return;
        }
        let orphan = entry.orphan;
        match &entry.far {
            Far::Socket(socket) if !orphan => {
                // If it is broken, reading tells.
                let _ = rustix::net::shutdown(socket, Shutdown::Write);
            }
            Far::Socket(_) | Far::Control => {}
            Far::Joined(peer) => {
                let peer = *peer;
                if let Some(peer) = self.table.get_mut(peer) {
                    peer.stream.finish();
                }
                self.consider(peer);
            }
        }
        if orphan {
            self.discard(id);
        }
    }

    /// The guest closed: what is held is still delivered.
    fn orphan(&mut self, id: Id) {
        self.unname(id);
        if let Some(entry) = self.table.get_mut(id) {
            entry.orphan = true;
            entry.finishing = true;
        }
        self.finish_far(id);
        if self.table.get(id).is_some() {
            self.bury_later(id);
        }
    }
}
