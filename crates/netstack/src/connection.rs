//! A connection: a socket of smoltcp in a set of its own, and what has to be known beside it.
//!
//! ```text
//!   connect --> connecting -- up --> open -- released --> orphan -- acknowledged, or given up --> gone
//!                   +-- failed --> gone
//!   SYN --> half open -- shaken hands --> waiting -- accepted --> open
//! ```

use crate::egress::Note;
use crate::options::Options;
use crate::packet::{Segment, Tuple};
use kso_wire::Errno;
use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp::{self, CongestionControl, State};
use smoltcp::time::Duration;
use std::time::Instant;

/// Most connections of a stack.
pub const MAX: usize = 8192;
/// How long an acknowledgement may wait for data to ride on.
const ACKNOWLEDGEMENT_DELAY: Duration = Duration::from_millis(10);
/// Bytes that come in small talk: more is a transfer, whose sender waits for acknowledgements.
const SMALL_TALK: usize = 1024;

/// Names a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionId(pub u64);

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// We connect.
    Connecting,
    /// A peer connects, to this listener.
    HalfOpen(u64),
    /// It waits to be accepted.
    Waiting(u64),
    /// It is somebody's.
    Open,
    /// Nobody has it any more; what is on its way shall arrive.
    Orphan,
}

/// Bytes for each direction of a new connection when there are so many: together never more than 1 GiB. They are reserved, and
/// used as they fill.
pub fn room(connections: usize) -> usize {
    match connections {
        0..256 => 512 << 10,
        256..1024 => 128 << 10,
        _ => 32 << 10,
    }
}

/// See the module.
pub struct Connection {
    /// Its ends.
    pub tuple: Tuple,
    /// How far it is.
    pub role: Role,
    /// Its options.
    pub options: Options,
    /// For smoltcp.
    pub set: SocketSet<'static>,
    handle: SocketHandle,
    /// What is noted when it sends.
    pub note: Note,
    /// When its socket wants to be called.
    pub due: Option<Instant>,
    /// Since when its peer is silent that should not be.
    pub silent_since: Option<Instant>,
    /// What broke it.
    pub error: Option<Errno>,
    /// Its owner was told to look at it, and has not.
    pub announced: bool,
    /// It is to be looked at before this turn ends.
    pub dirty: bool,
    acknowledgement_pending: bool,
    talks: bool,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("Connection");
        shown.field("tuple", &self.tuple).field("role", &self.role).finish_non_exhaustive()
    }
}

impl Connection {
    pub fn new(tuple: Tuple, role: Role, options: Options, room: usize) -> Self {
        let (receive, send) = options.buffers(room);
        let buffer = |bytes| tcp::SocketBuffer::new(vec![0; bytes]);
        let mut socket = tcp::Socket::new(buffer(receive), buffer(send));
        // What comes from the stream was gathered by the program's own kernel.
        socket.set_nagle_enabled(false);
        socket.set_congestion_control(CongestionControl::Cubic);
        options.apply(&mut socket);
        let mut set = SocketSet::new(Vec::with_capacity(1));
        let handle = set.add(socket);
        Self {
            tuple,
            role,
            options,
            set,
            handle,
            note: Note::default(),
            due: None,
            silent_since: None,
            error: None,
            announced: false,
            dirty: false,
            acknowledgement_pending: false,
            talks: false,
        }
    }

    /// Its socket.
    pub fn socket(&mut self) -> &mut tcp::Socket<'static> {
        self.set.get_mut(self.handle)
    }

    /// The same, to look at.
    pub fn look(&self) -> &tcp::Socket<'static> {
        self.set.get(self.handle)
    }

    /// Before a segment is given to the socket. An acknowledgement waits only where an answer is likely, as with a Linux: a sender
    /// of bulk waits for it.
    pub fn receiving(&mut self, segment: &Segment) {
        self.silent_since = None;
        if segment.length == 0 && !segment.fin {
            return;
        }
        // The delay of one that waits is smoltcp's to cut short, when more than a segment came.
        if !self.acknowledgement_pending {
            let delay = (self.talks && segment.length <= SMALL_TALK).then_some(ACKNOWLEDGEMENT_DELAY);
            self.socket().set_ack_delay(delay);
        }
        self.acknowledgement_pending = true;
        self.talks = false;
    }

    /// The program answered.
    pub fn talked(&mut self) {
        self.talks = true;
    }

    /// After the socket could send.
    pub fn sent(&mut self) {
        if std::mem::take(&mut self.note.sent) {
            self.acknowledgement_pending = false;
        }
    }

    /// Whether both sides said all and the peer knows: only TIME_WAIT is left.
    pub fn is_over(&self) -> bool {
        let socket = self.look();
        socket.state() == State::TimeWait && !self.acknowledgement_pending && socket.recv_queue() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_buffers_together_have_a_bound() {
        let total: usize = (0..MAX).map(|connections| 2 * room(connections)).sum();
        assert!(total <= 1 << 30, "{total}");
    }
}
