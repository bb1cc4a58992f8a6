//! Replies that come late: of locks that were waited for, and all that another kernel gives.

use crate::vhost::{Memory, Queue};
use kso_files::Completer;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vm_memory::{Bytes, GuestAddress};

/// Replies that came before their requests were parked: a moment's matter, unless a guest gives one number to two requests.
const MAX_EARLY: usize = 1024;

/// Where a reply belongs.
pub(super) struct Parked {
    pub queue: Arc<Queue>,
    pub memory: Arc<Memory>,
    pub head: u16,
    pub room: Vec<(GuestAddress, usize)>,
}

#[derive(Default)]
struct State {
    parked: HashMap<u64, Parked>,
    /// Completed before they were parked.
    early: HashMap<u64, Vec<u8>>,
}

/// Requests that wait for their reply.
#[derive(Default)]
pub(super) struct Late(Mutex<State>);

impl std::fmt::Debug for Late {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Late").field("parked", &self.state().parked.len()).finish()
    }
}

impl Late {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request waits from now on.
    pub fn park(&self, ticket: u64, parked: Parked) {
        let mut state = self.state();
        match state.early.remove(&ticket) {
            Some(reply) => {
                drop(state);
                parked.reply(&reply);
            }
            None => {
                state.parked.insert(ticket, parked);
            }
        }
    }

    /// Nobody waits any more.
    pub fn clear(&self) {
        *self.state() = State::default();
    }
}

impl Completer for Late {
    fn reply(&self, ticket: u64, reply: &[u8]) {
        let mut state = self.state();
        match state.parked.remove(&ticket) {
            Some(parked) => {
                drop(state);
                parked.reply(reply);
            }
            None if state.early.len() < MAX_EARLY => {
                state.early.insert(ticket, reply.to_vec());
            }
            None => tracing::debug!(ticket, "a guest gives its requests the same numbers"),
        }
    }
}

impl Parked {
    fn reply(self, reply: &[u8]) {
        let mut rest = reply;
        for (address, room) in self.room {
            let (now, later) = rest.split_at(room.min(rest.len()));
            if self.memory.write_slice(now, address).is_err() {
                break;
            }
            rest = later;
        }
        let Some(mut ring) = self.queue.lock() else { return };
        let pushed = ring.push(self.head, (reply.len() - rest.len()) as u32);
        if let Err(error) = pushed.and_then(|()| ring.signal()) {
            tracing::debug!(%error, "a late reply");
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::super::chain::room;
    use super::*;
    use vm_memory::GuestMemoryMmap;

    const DESCRIPTORS: u64 = 0;
    const AVAILABLE: u64 = 0x1000;
    const USED: u64 = 0x2000;

    /// A queue in which a request with room for 10 and 100 bytes waits.
    fn parked() -> (Parked, Arc<Memory>) {
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap());
        // Address, length, flags (1: there is a next one, 2: it is written to), the next one (virtio 1.2, 2.7.5).
        for (at, (address, length, flags, next)) in
            [(0x8000_u64, 40_u32, 1_u16, 1_u16), (0x9000, 10, 3, 2), (0xa000, 100, 2, 0)]
                .into_iter()
                .enumerate()
        {
            let descriptor = GuestAddress(DESCRIPTORS + 16 * at as u64);
            let bytes = [
                &address.to_le_bytes()[..],
                &length.to_le_bytes(),
                &flags.to_le_bytes(),
                &next.to_le_bytes(),
            ];
            memory.write_slice(&bytes.concat(), descriptor).unwrap();
        }
        memory.write_obj(1_u16.to_le(), GuestAddress(AVAILABLE + 2)).unwrap();
        let layout = [DESCRIPTORS, AVAILABLE, USED];
        let (queue, _) = Queue::in_memory(memory.clone(), 4, layout, false).unwrap();
        let chain = queue.lock().unwrap().pop(memory.as_ref()).unwrap().unwrap();
        let head = chain.head_index();
        let room = room(chain);
        (Parked { queue: Arc::new(queue), memory: memory.clone(), head, room }, memory)
    }

    #[test]
    fn replies_that_nobody_fetches_are_few() {
        let late = Late::default();
        for unique in 0..100_000 {
            late.complete(unique, 4);
        }
        assert_eq!(late.state().early.len(), MAX_EARLY);
    }

    #[test]
    fn a_whole_reply_goes_where_the_request_left_room() {
        let reply: Vec<u8> = (0..60).collect();
        for early in [false, true] {
            let late = Late::default();
            let (parked, memory) = parked();
            let used = || memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap();
            if early {
                late.reply(7, &reply);
                assert_eq!(used(), 0);
                late.park(7, parked);
            } else {
                late.park(7, parked);
                // Another's is not this one's.
                late.reply(8, &[]);
                assert_eq!(used(), 0);
                late.reply(7, &reply);
            }
            assert_eq!(used(), 1);
            assert_eq!(memory.read_obj::<[u32; 2]>(GuestAddress(USED + 4)).unwrap(), [0, 60]);
            let mut got = vec![0; 60];
            memory.read_slice(&mut got[..10], GuestAddress(0x9000)).unwrap();
            memory.read_slice(&mut got[10..], GuestAddress(0xa000)).unwrap();
            assert_eq!(got, reply);
        }
    }
}
