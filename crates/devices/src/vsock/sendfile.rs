//! Files that go from the host's disk to a stream's socket by sendfile(2): no byte of them passes the guest.
//!
//! ```text
//!   send_file --- no such stream or file, no room and no patience ------------------------> sent(None)
//!      |
//!      v            held bytes are out             a thread has it        all sent, file ends
//!   [Behind] ------------------------> [Ready] ---------------------> [Running] ---------> sent(bytes)
//!                                      ^ |  ^                            | | |
//!                     somebody's turn  | |  +-- the socket has room -----+ | +-- broke --> sent(bytes | errno)
//!                     is over          +-+      (who waits)                |
//!                                                                          +-- full ------> sent(bytes), and a CREDIT_UPDATE
//!                                                                              (who does not wait)     once there is room
//! ```
//!
//! What the guest sends on the stream meanwhile is held, and goes out behind the file. For a guest's kernel a stream is writable while
//! it has credit, whatever the room outside; so one that does not wait is told of room by a credit update, which wakes those who
//! poll (`virtio_transport_recv_pkt` in net/vmw_vsock/virtio_transport_common.c).

use super::hub::{Hub, guest_id};
use super::outside::{GuestId, Outside};
use super::sender::{Done, Job, Why, has_room};
use super::stream::Phase;
use super::table::{Far, Id};
use kso_files::Files;
use kso_wire::Errno;
use kso_wire::guest::{SendFile, StreamKey};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A part of a file that is being sent on a stream.
#[derive(Debug)]
pub(super) struct Sending {
    /// `None`: nobody waits for an answer any more.
    ticket: Option<u64>,
    files: Files,
    node: u64,
    /// A thread has it.
    runs: bool,
    offset: u64,
    left: u64,
    sent: u64,
    waits: bool,
    /// So many of the bytes that are held go first.
    before: usize,
    stop: Arc<AtomicBool>,
}

impl Sending {
    /// How many of the bytes that are held may go now.
    pub fn first(&self) -> usize {
        if self.runs { 0 } else { self.before }
    }

    /// So many of them went.
    pub fn went(&mut self, bytes: usize) {
        self.before = self.before.saturating_sub(bytes);
    }

    /// A thread that has it shall let go of it.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    fn result(&self) -> Option<u64> {
        (self.sent > 0).then_some(self.sent)
    }
}

impl Hub {
    /// Lets a guest send from the files of a share that it mounts by this tag.
    pub fn offer_files(&mut self, guest: GuestId, share: &str, files: Files) {
        if let Some(guest) = self.guest(guest.0 as usize) {
            guest.files.insert(share.to_owned(), files);
        }
    }

    /// Sends a part of a file on a stream, behind what the guest has sent: [`Outside::sent`] will tell, by the ticket.
    pub fn send_file(&mut self, guest: GuestId, ticket: u64, what: &SendFile, outside: &mut dyn Outside) {
        let index = guest.0 as usize;
        if self.guest(index).is_none_or(|guest| guest.files.is_empty()) {
            return outside.sent(guest, ticket, Err(Errno::EOPNOTSUPP));
        }
        match self.begin(index, ticket, what, outside) {
            Some(id) => self.send_on(id, outside),
            None => outside.sent(guest, ticket, Ok(None)),
        }
        self.wake();
    }

    fn begin(&mut self, index: usize, ticket: u64, what: &SendFile, outside: &mut dyn Outside) -> Option<Id> {
        let guest = self.guest(index)?;
        let id = *guest.names.get(&what.stream)?;
        let files = guest.files.get(&what.share)?.clone();
        self.flush_held(id, outside);
        let entry = self.table.get_mut(id)?;
        let able = matches!(entry.far, Far::Socket(_))
            && entry.stream.phase() == Phase::Open
            && !entry.finishing
            && entry.sending.is_none()
            // The host's own services may have sockets that block.
            && what.stream.peer_cid > kso_sys::vsock::CID_HOST
            && what.count > 0;
        let before = entry.held.len();
        if !able || !what.waits && (before > 0 || !entry.writable) {
            return None;
        }
        entry.sending = Some(Box::new(Sending {
            ticket: Some(ticket),
            files,
            node: what.node,
            runs: false,
            offset: what.offset,
            left: what.count,
            sent: 0,
            waits: what.waits,
            before,
            stop: Arc::default(),
        }));
        Some(id)
    }

    /// Sends no more for this ticket.
    pub fn stop_sending(
        &mut self,
        guest: GuestId,
        stream: StreamKey,
        ticket: u64,
        outside: &mut dyn Outside,
    ) {
        let Some(id) = self.guest(guest.0 as usize).and_then(|guest| guest.names.get(&stream).copied())
        else {
            return;
        };
        let Some(sending) = self.table.get(id).and_then(|entry| entry.sending.as_ref()) else { return };
        if sending.ticket != Some(ticket) {
            return;
        }
        sending.stop();
        if !sending.runs {
            let result = Ok(sending.result());
            self.conclude(id, result, outside);
        }
        self.wake();
    }

    /// Has a thread go on with what is being sent on a stream, if it can.
    pub(super) fn send_on(&mut self, id: Id, outside: &mut dyn Outside) {
        let busy = self.senders.busy();
        let Some(entry) = self.table.get_mut(id) else { return };
        let Some(sending) = &mut entry.sending else { return };
        if sending.runs || entry.in_turns || sending.before > 0 || !entry.writable {
            return;
        }
        if busy {
            entry.in_turns = true;
            self.turns.push_back(id);
            return;
        }
        let Far::Socket(socket) = &entry.far else { return };
        let started = socket.try_clone().is_ok_and(|socket| {
            sending.runs = true;
            // What epoll tells from here on is news.
            entry.writable = false;
            self.senders.start(Job {
                id,
                socket,
                files: sending.files.clone(),
                node: sending.node,
                offset: sending.offset,
                count: sending.left,
                waits: sending.waits,
                stop: sending.stop.clone(),
            })
        });
        if !started {
            (sending.runs, entry.writable) = (false, true);
            let result = Ok(sending.result());
            self.conclude(id, result, outside);
        }
    }

    /// Threads let go of what they had.
    pub(super) fn threads_ready(&mut self, outside: &mut dyn Outside) {
        for done in self.senders.take_done() {
            self.done(done, outside);
        }
        while !self.senders.busy()
            && let Some(id) = self.turns.pop_front()
        {
            if let Some(entry) = self.table.get_mut(id) {
                entry.in_turns = false;
            }
            self.send_on(id, outside);
        }
    }

    fn done(&mut self, done: Done, outside: &mut dyn Outside) {
        let Done { id, sent, why } = done;
        let Some(entry) = self.table.get_mut(id) else { return };
        let Some(sending) = &mut entry.sending else { return };
        sending.runs = false;
        sending.sent = sending.sent.saturating_add(sent);
        sending.offset = sending.offset.saturating_add(sent);
        sending.left = sending.left.saturating_sub(sent);
        entry.bytes_out = entry.bytes_out.saturating_add(sent);
        // No event comes for room that there was all the time; and what one told, the thread may have used up.
        entry.writable = match &entry.far {
            Far::Socket(socket) if why == Why::Full => entry.writable && has_room(socket, Duration::ZERO),
            _ => true,
        };
        let (waits, stopped) = (sending.waits, sending.stop.load(Ordering::Relaxed));
        let result = sending.result();
        match why {
            Why::Finished => {
                let sent = sending.sent;
                self.conclude(id, Ok(Some(sent)), outside);
            }
            Why::Full | Why::Paused if stopped => self.conclude(id, Ok(result), outside),
            Why::Paused => self.send_on(id, outside),
            Why::Full if waits => self.send_on(id, outside),
            Why::Full => {
                entry.nudge = result.is_some();
                self.conclude(id, Ok(result), outside);
                self.nudge(id);
            }
            Why::Unreadable => self.conclude(id, Ok(result), outside),
            Why::Broke(error) => {
                let errno = kso_sys::errno::from_raw(error.raw_os_error());
                let result = result.map_or(Err(errno), |sent| Ok(Some(sent)));
                self.conclude(id, result, outside);
                self.broke(id, errno, outside);
            }
        }
    }

    /// What was being sent is over; what was held behind it goes out.
    fn conclude(&mut self, id: Id, result: Result<Option<u64>, Errno>, outside: &mut dyn Outside) {
        let Some(entry) = self.table.get_mut(id) else { return };
        let Some(sending) = entry.sending.take() else { return };
        if let Some(ticket) = sending.ticket {
            outside.sent(guest_id(entry.guest), ticket, result);
        }
        self.flush_held(id, outside);
    }

    /// A stream ends with something being sent: tells so, once.
    pub(super) fn end_sending(&mut self, id: Id, errno: Option<Errno>, outside: &mut dyn Outside) {
        let Some(entry) = self.table.get_mut(id) else { return };
        let index = entry.guest;
        let Some(sending) = &mut entry.sending else { return };
        let result = match (sending.result(), errno) {
            (None, Some(errno)) => Err(errno),
            (result, _) => Ok(result),
        };
        if let Some(ticket) = sending.ticket.take() {
            outside.sent(guest_id(index), ticket, result);
        }
        if !self.silence(id) && errno.is_none() {
            self.flush_held(id, outside);
        }
    }

    /// Nothing more is to be sent, and nobody is told. Whether a thread still does.
    pub(super) fn silence(&mut self, id: Id) -> bool {
        let Some(entry) = self.table.get_mut(id) else { return false };
        let Some(sending) = &mut entry.sending else { return false };
        sending.ticket = None;
        sending.stop();
        if !sending.runs {
            entry.sending = None;
        }
        entry.sending.is_some()
    }

    /// Tells a guest that was told of no room that there is some.
    pub(super) fn nudge(&mut self, id: Id) {
        let Some(entry) = self.table.get_mut(id) else { return };
        if entry.nudge && entry.writable {
            entry.nudge = false;
            entry.stream.owe_credit();
            self.consider(id);
        }
    }
}
