//! The streams of a hub, and the bytes that wait for one of their ends.

use super::sendfile::Sending;
use super::stream::Stream;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;

/// Names an entry; another one in the same place has another generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Id {
    pub index: u32,
    pub generation: u32,
}

/// Where a stream ends that begins in a guest.
#[derive(Debug)]
pub(super) enum Far {
    /// A socket of the host.
    Socket(OwnedFd),
    /// The broker.
    Control,
    /// A stream of a guest.
    Joined(Id),
}

/// A stream, and its far end.
#[derive(Debug)]
pub(super) struct Entry {
    /// Of this guest of the hub.
    pub guest: usize,
    pub stream: Stream,
    pub far: Far,
    /// What epoll (edge-triggered) told of the socket, until a call says otherwise.
    pub readable: bool,
    pub writable: bool,
    /// The peer's end of stream, or an error, waits behind what is to be read.
    pub ending: bool,
    /// Bytes of the guest that the far end had no room for.
    pub held: VecDeque<u8>,
    /// A part of a file that is being sent: what is held behind it waits.
    pub sending: Option<Box<Sending>>,
    /// It stands in line for a thread that sends.
    pub in_turns: bool,
    /// The guest was told of no room, and is to be told of some.
    pub nudge: bool,
    /// Shut the far end's half when nothing is held.
    pub finishing: bool,
    /// The guest knows it no more; it lives until what is held is delivered.
    pub orphan: bool,
    /// It stands in line for the guest's buffers.
    pub queued: bool,
    /// Buffers that the next read takes.
    pub stride: usize,
    pub bytes_out: u64,
    pub bytes_in: u64,
}

impl Entry {
    pub fn new(guest: usize, stream: Stream, far: Far) -> Self {
        Entry {
            guest,
            stream,
            far,
            readable: false,
            writable: false,
            ending: false,
            held: VecDeque::new(),
            sending: None,
            in_turns: false,
            nudge: false,
            finishing: false,
            orphan: false,
            queued: false,
            stride: 2,
            bytes_out: 0,
            bytes_in: 0,
        }
    }

    /// So many bytes of the guest are at the far end.
    pub fn forwarded(&mut self, bytes: usize) {
        self.bytes_out = self.bytes_out.saturating_add(bytes as u64);
        // No more than was received, which a counter of 32 bits bounds.
        self.stream.forwarded(u32::try_from(bytes).unwrap_or(u32::MAX));
    }
}

/// Entries with generations.
#[derive(Debug, Default)]
pub(super) struct Table {
    slots: Vec<(u32, Option<Entry>)>,
    free: Vec<u32>,
}

impl Table {
    pub fn insert(&mut self, entry: Entry) -> Id {
        if let Some(index) = self.free.pop()
            && let Some((generation, slot)) = self.slots.get_mut(index as usize)
        {
            *slot = Some(entry);
            return Id { index, generation: *generation };
        }
        // Bounded by the streams of a guest times the guests of a hub, both far below.
        let index = u32::try_from(self.slots.len()).unwrap_or(u32::MAX);
        self.slots.push((0, Some(entry)));
        Id { index, generation: 0 }
    }

    pub fn get(&self, id: Id) -> Option<&Entry> {
        let (generation, entry) = self.slots.get(id.index as usize)?;
        entry.as_ref().filter(|_| *generation == id.generation)
    }

    pub fn get_mut(&mut self, id: Id) -> Option<&mut Entry> {
        let (generation, entry) = self.slots.get_mut(id.index as usize)?;
        entry.as_mut().filter(|_| *generation == id.generation)
    }

    pub fn remove(&mut self, id: Id) -> Option<Entry> {
        let (generation, entry) = self.slots.get_mut(id.index as usize)?;
        if *generation != id.generation {
            return None;
        }
        let entry = entry.take()?;
        *generation = generation.wrapping_add(1) & GENERATIONS;
        self.free.push(id.index);
        Some(entry)
    }

    /// The names of all entries of a guest.
    pub fn of_guest(&self, guest: usize) -> Vec<Id> {
        let slots = self.slots.iter().enumerate();
        let of_guest = slots.filter_map(|(index, (generation, entry))| {
            let index = u32::try_from(index).ok()?;
            entry.as_ref().filter(|entry| entry.guest == guest)?;
            Some(Id { index, generation: *generation })
        });
        of_guest.collect()
    }
}

/// Generations fit into a token of epoll beside the index and a tag.
const GENERATIONS: u32 = 0x00ff_ffff;
