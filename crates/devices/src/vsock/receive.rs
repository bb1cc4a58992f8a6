//! From the outside to the guest.

use super::chain::{self, Buffer, Pieces};
use super::guest::Fault;
use super::hub::{Hub, guest_id};
use super::outside::Outside;
use super::packet::{HEADER, Header};
use super::table::{Entry, Far, Id};
use crate::vhost::{Memory, Ring};
use kso_sys::guest_memory;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::AsFd;
use vm_memory::VolatileSlice;

/// Most buffers of one read: others have their turn then.
const MAX_STRIDE: usize = 96;

/// Buffers of the guest, taken for a read.
struct Gathered<'m> {
    buffers: Vec<Buffer<'m>>,
    pieces: Pieces<'m>,
    bytes: usize,
}

/// Takes buffers for at most so many bytes.
fn gather<'m>(
    ring: &mut Ring,
    memory: &'m Memory,
    bytes: usize,
    buffers: usize,
) -> Result<Gathered<'m>, Fault> {
    let count = buffers.min(MAX_STRIDE);
    let mut gathered =
        Gathered { buffers: Vec::with_capacity(count), pieces: Vec::with_capacity(count), bytes: 0 };
    while gathered.bytes < bytes && gathered.buffers.len() < buffers {
        let Some(chain) = ring.pop(memory)? else { break };
        let buffer = Buffer::new(chain, memory, bytes - gathered.bytes, &mut gathered.pieces)?;
        if buffer.room == 0 {
            return Err(chain::Malformed::Short.into());
        }
        gathered.bytes += buffer.room;
        gathered.buffers.push(buffer);
    }
    Ok(gathered)
}

/// Returns the buffers that `filled` bytes are in, and takes back the others.
fn commit(ring: &mut Ring, gathered: &Gathered<'_>, filled: usize, entry: &mut Entry) -> Result<(), Fault> {
    let mut rest = filled;
    for buffer in &gathered.buffers {
        if rest == 0 {
            ring.unpop();
            continue;
        }
        let bytes = rest.min(buffer.room);
        // A buffer's room is at most what a 32-bit credit allowed.
        let length = u32::try_from(bytes).unwrap_or(u32::MAX);
        buffer.write(&entry.stream.data_header(length));
        ring.push(buffer.head, length.saturating_add(HEADER as u32))?;
        rest -= bytes;
    }
    entry.bytes_in = entry.bytes_in.saturating_add(filled as u64);
    Ok(())
}

/// Writes a packet without payload; false: there is no buffer.
fn place(ring: &mut Ring, memory: &Memory, header: &Header) -> Result<bool, Fault> {
    let Some(chain) = ring.pop(memory)? else { return Ok(false) };
    let buffer = Buffer::new(chain, memory, 0, &mut Pieces::new())?;
    buffer.write(header);
    ring.push(buffer.head, HEADER as u32)?;
    Ok(true)
}

/// Whether the other end of a unix socket is closed, not merely shut down (unix_poll in net/unix/af_unix.c).
fn has_hung_up(far: &Far) -> bool {
    let Far::Socket(socket) = far else { return false };
    let mut polled = [PollFd::new(socket, PollFlags::empty())];
    let ready = poll(&mut polled, Some(&Timespec::default())).is_ok();
    let [polled] = polled;
    ready && polled.revents().contains(PollFlags::HUP)
}

/// What became of a stream's turn.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// Nothing could be done now.
    Idle,
    /// Something was sent.
    Sent,
    /// There is no buffer.
    Starved,
    /// The socket broke.
    Broke(kso_wire::Errno),
}

impl Hub {
    /// Gives the guest what is for it; whether there was something.
    pub(super) fn receive(&mut self, index: usize, outside: &mut dyn Outside) -> bool {
        match self.try_receive(index, outside) {
            Ok(worked) => worked,
            Err(fault) => {
                self.fault(index, &fault, outside);
                true
            }
        }
    }

    fn try_receive(&mut self, index: usize, outside: &mut dyn Outside) -> Result<bool, Fault> {
        let Some(guest) = self.guest(index) else { return Ok(false) };
        guest.starved = false;
        if guest.line.is_empty() && guest.resets.is_empty() && guest.control.is_none() {
            return Ok(false);
        }
        let Some(queue) = guest.rx.clone() else { return Ok(false) };
        let Some(mut ring) = queue.lock() else { return Ok(false) };
        let memory = ring.memory();
        let (mut clear, mut worked) = self.send_control(index, &mut ring, &memory, outside)?;
        let mut starved = !clear && !ring.has_available();
        while clear && let Some(reset) = self.guest(index).and_then(|guest| guest.resets.front().copied()) {
            if !place(&mut ring, &memory, &reset)? {
                starved = true;
                break;
            }
            worked = true;
            self.guest(index).and_then(|guest| guest.resets.pop_front());
        }
        let turns = self.guest(index).map_or(0, |guest| guest.line.len());
        for _ in 0..turns {
            if !ring.has_available() {
                starved = true;
                break;
            }
            let Some(id) = self.guest(index).and_then(|guest| guest.line.pop_front()) else { break };
            let Some(entry) = self.table.get_mut(id) else { continue };
            entry.queued = false;
            match self.turn(id, &mut ring, &memory, clear)? {
                Turn::Idle => {}
                Turn::Sent => worked = true,
                Turn::Starved => starved = true,
                Turn::Broke(errno) => {
                    worked = true;
                    self.broke(id, errno, outside);
                    // What the outside says of it goes first.
                    clear = self.send_control(index, &mut ring, &memory, outside)?.0;
                }
            }
            self.consider(id);
        }
        if worked {
            ring.signal()?;
        }
        if let Some(guest) = self.guest(index) {
            guest.starved = starved;
        }
        Ok(worked)
    }

    /// Sends what the outside has for the control stream. Whether nothing of it waits, and whether something was sent.
    fn send_control(
        &mut self,
        index: usize,
        ring: &mut Ring,
        memory: &Memory,
        outside: &mut dyn Outside,
    ) -> Result<(bool, bool), Fault> {
        let Some(id) = self.guest(index).and_then(|guest| guest.control) else { return Ok((true, false)) };
        let Some(entry) = self.table.get_mut(id) else { return Ok((true, false)) };
        let mut worked = false;
        while entry.stream.owed() && ring.has_available() {
            let Some(header) = entry.stream.next_owed() else { break };
            worked |= place(ring, memory, &header)?;
        }
        let Some(output) = outside.control_output(guest_id(index)) else { return Ok((true, worked)) };
        while !output.is_empty() && entry.stream.room() > 0 {
            let most = output.len().min(entry.stream.room() as usize);
            let gathered = gather(ring, memory, most, MAX_STRIDE)?;
            if gathered.bytes == 0 {
                break;
            }
            let filled = chain::fill(&gathered.pieces, output);
            commit(ring, &gathered, filled, entry)?;
            output.drain(..filled);
            worked = true;
        }
        Ok((output.is_empty(), worked))
    }

    /// One stream's turn: what it owes, then bytes.
    fn turn(&mut self, id: Id, ring: &mut Ring, memory: &Memory, clear: bool) -> Result<Turn, Fault> {
        let Some(entry) = self.table.get_mut(id) else { return Ok(Turn::Idle) };
        let mut turn = Turn::Idle;
        while entry.stream.owed() && (clear || !entry.stream.owes_opening()) {
            if !ring.has_available() {
                return Ok(Turn::Starved);
            }
            let Some(header) = entry.stream.next_owed() else { break };
            place(ring, memory, &header)?;
            turn = Turn::Sent;
        }
        if entry.stream.room() == 0 {
            return Ok(turn);
        }
        let read = match entry.far {
            Far::Socket(_) if entry.readable => self.read_socket(id, ring, memory)?,
            Far::Joined(peer) => self.read_peer(id, peer, ring, memory)?,
            Far::Socket(_) | Far::Control => Turn::Idle,
        };
        Ok(if read == Turn::Idle { turn } else { read })
    }

    fn read_socket(&mut self, id: Id, ring: &mut Ring, memory: &Memory) -> Result<Turn, Fault> {
        let Some(entry) = self.table.get_mut(id) else { return Ok(Turn::Idle) };
        let Far::Socket(socket) = &entry.far else { return Ok(Turn::Idle) };
        let gathered = gather(ring, memory, entry.stream.room() as usize, entry.stride)?;
        if gathered.bytes == 0 {
            return Ok(Turn::Starved);
        }
        let received = guest_memory::receive(socket.as_fd(), &gathered.pieces);
        let filled = *received.as_ref().unwrap_or(&0);
        commit(ring, &gathered, filled, entry)?;
        if filled == gathered.bytes {
            entry.stride = (entry.stride * 2).min(MAX_STRIDE);
            return Ok(Turn::Sent);
        }
        match received {
            Ok(0) => {
                entry.readable = false;
                if self.passes_resets && !entry.stream.guest_finished() && has_hung_up(&entry.far) {
                    return Ok(Turn::Broke(kso_wire::Errno::ECONNRESET));
                }
                entry.stream.finish();
                Ok(Turn::Sent)
            }
            Ok(_) => {
                // All that there was, unless the end comes after it (epoll(7), "edge-triggered").
                entry.readable = entry.ending;
                entry.stride = (entry.stride / 2).max(2);
                Ok(Turn::Sent)
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                entry.readable = false;
                Ok(Turn::Idle)
            }
            Err(error) => Ok(Turn::Broke(kso_sys::errno::of(&error))),
        }
    }

    /// Gives the guest of a joined stream what the other one sent, straight from memory to memory; how much of it.
    pub(super) fn place_joined(
        &mut self,
        id: Id,
        peer: Id,
        from: &[VolatileSlice<'_>],
        bytes: usize,
        outside: &mut dyn Outside,
    ) -> usize {
        // Behind what came before, if there is something.
        if self.table.get(id).is_none_or(|entry| !entry.held.is_empty()) {
            return 0;
        }
        let Some(entry) = self.table.get(peer) else { return 0 };
        let (index, most) = (entry.guest, bytes.min(entry.stream.room() as usize));
        let Some(queue) = self.guest(index).and_then(|guest| guest.rx.clone()).filter(|_| most > 0) else {
            return 0;
        };
        let placed = queue.lock().map_or(Ok(0), |mut ring| {
            let memory = ring.memory();
            let gathered = gather(&mut ring, &memory, most, usize::MAX)?;
            let copied = chain::copy(from, &gathered.pieces);
            match self.table.get_mut(peer) {
                Some(entry) => commit(&mut ring, &gathered, copied, entry).map(|()| copied),
                None => Ok(0),
            }
        });
        match placed {
            Ok(placed) => {
                if placed > 0 && !self.touched.contains(&index) {
                    self.touched.push(index);
                }
                if let Some(entry) = self.table.get_mut(id) {
                    entry.forwarded(placed);
                }
                placed
            }
            Err(fault) => {
                self.fault(index, &fault, outside);
                0
            }
        }
    }

    /// Interrupts the guests that were given something by [`Self::place_joined`].
    pub(super) fn interrupt_touched(&mut self) {
        while let Some(index) = self.touched.pop() {
            if let Some(mut ring) = self.guest(index).and_then(|guest| guest.rx.as_ref()?.lock()) {
                // If it cannot be read, the next look at it says so.
                let _ = ring.signal();
            }
        }
    }

    fn read_peer(&mut self, id: Id, peer: Id, ring: &mut Ring, memory: &Memory) -> Result<Turn, Fault> {
        let Some(entry) = self.table.get(id) else { return Ok(Turn::Idle) };
        let room = entry.stream.room() as usize;
        let Some(source) = self.table.get(peer) else { return Ok(Turn::Idle) };
        let most = room.min(source.held.as_slices().0.len());
        if most == 0 {
            return Ok(Turn::Idle);
        }
        let gathered = gather(ring, memory, most, MAX_STRIDE)?;
        let Some(source) = self.table.get_mut(peer) else { return Ok(Turn::Idle) };
        let filled = chain::fill(&gathered.pieces, source.held.as_slices().0.get(..most).unwrap_or_default());
        source.held.drain(..filled);
        if let Some(entry) = self.table.get_mut(id) {
            commit(ring, &gathered, filled, entry)?;
        }
        self.delivered(peer, filled);
        self.finish_far(peer);
        Ok(if filled == 0 { Turn::Starved } else { Turn::Sent })
    }
}
