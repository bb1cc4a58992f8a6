//! What a datagram flow carried, told to the broker when it ends.

use crate::datagrams::{Flow, FlowKey, State};
use crate::gateway::Gateway;
use crate::table::Token;
use crate::watch::Waiting;
use kso_wire::{BrokerLink, FlowEnded, Request};
use std::time::Instant;

/// Payload of one flow, in both directions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Carried {
    began: Instant,
    last: Instant,
    bytes_in: u64,
    bytes_out: u64,
}

impl Carried {
    pub fn nothing(now: Instant) -> Self {
        Self { began: now, last: now, bytes_in: 0, bytes_out: 0 }
    }
}

impl Gateway {
    /// So many bytes of a flow were written to the TUN.
    pub(crate) fn carried_in(&mut self, token: Token, bytes: usize, now: Instant) {
        if let Some((_, flow)) = self.datagrams.table.get_mut(token) {
            flow.carried.bytes_in += bytes as u64;
            flow.carried.last = now;
        }
    }

    /// So many bytes of a flow were sent.
    pub(crate) fn carried_out(&mut self, token: Token, bytes: usize, now: Instant) {
        if let Some((_, flow)) = self.datagrams.table.get_mut(token) {
            flow.carried.bytes_out += bytes as u64;
            flow.carried.last = now;
        }
    }

    /// Lets go of a flow that was taken out of the table, and tells the broker if it was open.
    pub(crate) fn end_flow(&mut self, key: FlowKey, flow: Flow, link: &mut dyn BrokerLink) {
        let carried = flow.carried;
        let open = matches!(flow.state, State::Open { .. } | State::Published { .. });
        self.drop_state(flow.state, link);
        if !open {
            return;
        }
        let ended = FlowEnded {
            guest: key.guest,
            peer: key.peer,
            bytes_in: carried.bytes_in,
            bytes_out: carried.bytes_out,
            micros: u64::try_from((carried.last - carried.began).as_micros()).unwrap_or(u64::MAX),
        };
        // Nothing depends on what is answered.
        let _ = self.ask(Waiting::Nothing, Request::FlowEnded(ended), link);
    }

    /// The sandbox has ended, and all its flows.
    pub fn end(&mut self, link: &mut dyn BrokerLink) {
        while let Some((key, flow)) = self.datagrams.table.evict() {
            self.end_flow(key, flow, link);
        }
    }
}
