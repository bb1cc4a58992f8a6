//! The life of one stream: what either end may still send, and what the guest is owed. No I/O, no bytes: only
//! counts.
//!
//! ```text
//!   REQUEST ----> Opening --opened()--> Open
//!                    |                   |  guest: SHUTDOWN(both) -> Closed     flush what is held, close
//!   dial() -----> Dialling --RESPONSE-->-+  guest: RST            -> Dropped    close
//!                    |                   |  guest: nonsense       -> Violated   close, RST
//!                    +--RST--> Rejected  |  outside: broken: the owner removes it and sends RST
//! ```
//!
//! Credit (virtio 1.2, 5.10.6.3) counts payload, in wrapping counters. What the guest is told of room here, the
//! *window*, begins small and doubles while the outside keeps up, so that a stream whose peer is slow never holds
//! much. A window is never taken back: Linux computes with what it was told.

use super::packet::{Header, NO_RECEIVE, NO_SEND, Op};
use kso_wire::guest::StreamKey;

/// Window of a new stream, bytes.
pub const FIRST_WINDOW: u32 = 256 << 10;
/// Largest window, bytes.
pub const LARGEST_WINDOW: u32 = 4 << 20;

/// How far a stream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The guest asked; the outside is not there yet.
    Opening,
    /// The guest was asked.
    Dialling,
    /// Bytes may flow.
    Open,
}

/// What a packet of the guest means for the owner of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing more. There may be more [`Stream::room`] or something [`Stream::owed`].
    None,
    /// So many bytes of payload are for the outside; tell [`Stream::forwarded`] once they are there.
    Deliver(u32),
    /// The guest sends no more: shut the outside's half once all is delivered.
    Finish,
    /// The guest took the stream that was dialled.
    Taken,
    /// It did not.
    Rejected,
    /// The guest closed: answer RST, deliver what is held, close.
    Closed,
    /// The guest has nothing of it any more: close.
    Dropped,
    /// The guest broke the rules: answer RST, close.
    Violated,
}

/// Packets that the guest is owed.
#[derive(Clone, Copy, Debug, Default)]
struct Owed {
    opening: bool,
    credit: bool,
    shutdown: bool,
}

/// One stream.
#[derive(Clone, Debug)]
pub struct Stream {
    key: StreamKey,
    phase: Phase,
    owed: Owed,
    /// `VIRTIO_VSOCK_SHUTDOWN_F_*` of the guest.
    guest_shut: u32,
    /// The outside's end of stream was reached.
    finished: bool,

    /// Room that the guest told, and how much of what it was sent it has passed on.
    guest_window: u32,
    guest_forwarded: u32,
    sent: u32,

    window: u32,
    told_window: u32,
    received: u32,
    forwarded: u32,
    told_forwarded: u32,
    /// `forwarded` when the window was last enlarged.
    grown_at: u32,
}

impl Stream {
    fn new(key: StreamKey, phase: Phase) -> Self {
        Stream {
            key,
            phase,
            owed: Owed::default(),
            guest_shut: 0,
            finished: false,
            guest_window: 0,
            guest_forwarded: 0,
            sent: 0,
            window: FIRST_WINDOW,
            told_window: FIRST_WINDOW,
            received: 0,
            forwarded: 0,
            told_forwarded: 0,
            grown_at: 0,
        }
    }

    /// The stream that a REQUEST asks for.
    #[must_use]
    pub fn requested(key: StreamKey, request: &Header) -> Self {
        let mut stream = Self::new(key, Phase::Opening);
        stream.credit(request);
        stream
    }

    /// A stream that the guest is to be asked for.
    #[must_use]
    pub fn dialled(key: StreamKey) -> Self {
        let mut stream = Self::new(key, Phase::Dialling);
        stream.owed.opening = true;
        stream
    }

    /// Its name.
    #[must_use]
    pub fn key(&self) -> StreamKey {
        self.key
    }

    /// How far it is.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether the guest has shut the half that it sends on.
    #[must_use]
    pub fn guest_finished(&self) -> bool {
        self.guest_shut & NO_SEND != 0
    }

    fn credit(&mut self, header: &Header) {
        self.guest_window = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
    }

    /// A packet of the guest, other than REQUEST.
    pub fn packet(&mut self, header: &Header) -> Effect {
        let Some(op) = header.operation() else { return self.violated() };
        self.credit(header);
        match (self.phase, op) {
            (Phase::Dialling, Op::Response) if !self.owed.opening => {
                self.phase = Phase::Open;
                Effect::Taken
            }
            (Phase::Dialling, Op::Reset) => Effect::Rejected,
            (Phase::Opening | Phase::Open, Op::Reset) => Effect::Dropped,
            (Phase::Open, Op::Data) => self.data(header.len),
            (Phase::Open, Op::Shutdown) => self.shutdown(header.flags),
            (Phase::Open, Op::CreditUpdate) => Effect::None,
            (Phase::Open, Op::CreditRequest) => {
                self.owed.credit = true;
                Effect::None
            }
            _ => self.violated(),
        }
    }

    fn violated(&self) -> Effect {
        if self.phase == Phase::Dialling { Effect::Rejected } else { Effect::Violated }
    }

    fn data(&mut self, len: u32) -> Effect {
        if self.guest_finished() || len > self.told_window.saturating_sub(self.unacknowledged()) {
            return Effect::Violated;
        }
        self.received = self.received.wrapping_add(len);
        Effect::Deliver(len)
    }

    /// Bytes that the guest sent beyond what it knows to be forwarded.
    fn unacknowledged(&self) -> u32 {
        self.received.wrapping_sub(self.told_forwarded)
    }

    fn shutdown(&mut self, flags: u32) -> Effect {
        let before = self.guest_shut;
        self.guest_shut |= flags & (NO_RECEIVE | NO_SEND);
        match self.guest_shut {
            both if both == NO_RECEIVE | NO_SEND => Effect::Closed,
            NO_SEND if before & NO_SEND == 0 => Effect::Finish,
            _ => Effect::None,
        }
    }

    /// The outside is connected: RESPONSE is owed.
    pub fn opened(&mut self) {
        if self.phase == Phase::Opening {
            self.phase = Phase::Open;
            self.owed.opening = true;
        }
    }

    /// The outside's stream ended, and all that came before was sent: SHUTDOWN is owed.
    pub fn finish(&mut self) {
        if !self.finished {
            self.finished = true;
            self.owed.shutdown = true;
        }
    }

    /// So many bytes that were delivered are outside.
    pub fn forwarded(&mut self, bytes: u32) {
        self.forwarded = self.forwarded.wrapping_add(bytes);
        let kept_up = self.forwarded == self.received;
        if kept_up
            && self.window < LARGEST_WINDOW
            && self.forwarded.wrapping_sub(self.grown_at) >= self.window
        {
            self.window = (self.window * 2).min(LARGEST_WINDOW);
            self.grown_at = self.forwarded;
            self.owed.credit = true;
        }
        // Newer kernels send no more than their own buffer holds, however large the window is.
        let limit = self.told_window.min(self.guest_window);
        if self.forwarded.wrapping_sub(self.told_forwarded) >= (limit / 2).max(1) {
            self.owed.credit = true;
        }
    }

    /// The guest is to be told of its credit, though it knows.
    pub fn owe_credit(&mut self) {
        self.owed.credit = true;
    }

    /// Bytes that the guest has room for.
    #[must_use]
    pub fn room(&self) -> u32 {
        if self.phase != Phase::Open
            || self.owed.opening
            || self.finished
            || self.guest_shut & NO_RECEIVE != 0
        {
            return 0;
        }
        self.guest_window.saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    /// Whether [`Self::next_owed`] has something.
    #[must_use]
    pub fn owed(&self) -> bool {
        self.owed.opening || self.owed.credit && self.phase == Phase::Open || self.owed.shutdown
    }

    /// Whether what is owed first must not overtake the control stream.
    #[must_use]
    pub fn owes_opening(&self) -> bool {
        self.owed.opening
    }

    /// The next packet without payload that the guest is owed; it is taken to be sent.
    pub fn next_owed(&mut self) -> Option<Header> {
        if std::mem::take(&mut self.owed.opening) {
            return Some(self.header(if self.phase == Phase::Dialling { Op::Request } else { Op::Response }));
        }
        if self.phase != Phase::Open {
            return None;
        }
        if std::mem::take(&mut self.owed.shutdown) {
            return Some(Header { flags: NO_SEND, ..self.header(Op::Shutdown) });
        }
        // `header` takes the debt off.
        self.owed.credit.then(|| self.header(Op::CreditUpdate))
    }

    /// The header of a packet with so many bytes, at most [`Self::room`]; it is taken to be sent.
    pub fn data_header(&mut self, bytes: u32) -> Header {
        self.sent = self.sent.wrapping_add(bytes);
        Header { len: bytes, ..self.header(Op::Data) }
    }

    fn header(&mut self, op: Op) -> Header {
        self.told_window = self.window;
        self.told_forwarded = self.forwarded;
        self.owed.credit = false;
        Header { buf_alloc: self.window, fwd_cnt: self.forwarded, ..Header::to_guest(self.key, op) }
    }
}

#[cfg(test)]
#[path = "stream/tests.rs"]
mod tests;
