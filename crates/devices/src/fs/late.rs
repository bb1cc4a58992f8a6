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
mod tests {
    use super::*;

    #[test]
    fn replies_that_nobody_fetches_are_few() {
        let late = Late::default();
        for unique in 0..100_000 {
            late.complete(unique, 4);
        }
        assert_eq!(late.state().early.len(), MAX_EARLY);
    }
}
