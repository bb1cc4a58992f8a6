//! `sendfile` from a file of the host's to a stream outside: the host does it, and no byte passes the guest.
//!
//! ```text
//!  sendfile --- file or socket are not outside, or both busy --------------> CONTINUE
//!     +-------- Ask SendFile, behind what was written to the stream; held
//!                  +-- Value: the file's position moves ------------------> bytes
//!                  +-- StayInside: nothing was sent ----------------------> CONTINUE
//!                  +-- a signal, a time limit: StopSending, then Value ---> bytes, or as if nothing was done
//! ```
//!
//! A call that does not wait and finds no room outside is CONTINUEd, too: the guest's kernel then sends what the stream has credit
//! for, and tells of room as for any write. So EAGAIN is never made up, and who polls does not poll in vain.

use super::connect::nonblocking;
use super::held::{Caller, End, examine};
use super::names::key;
use super::{GuestRunner, Kind, Outcome};
use kso_sys::notify::{Notification, Response};
use kso_sys::vsock::{self, State};
use kso_sys::{errno, numbers, remote};
use kso_wire::guest::{GuestReply, GuestRequest, SendFile, StreamKey, ToHost};
use kso_wire::{Errno, Failure, MAX_PENDING};
use rustix::fs::{SeekFrom, seek, tell};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

/// Calls for less are left to the guest's kernel without a look: asking would cost more than the bytes.
pub(super) const LEAST: u32 = 32 * 1024;
/// Most bytes of one call (`MAX_RW_COUNT`, include/linux/fs.h).
const MOST: u64 = 0x7fff_f000;

/// A call that the host performs.
#[derive(Debug)]
pub(super) struct Sending {
    caller: Caller,
    notification: Notification,
    stream: StreamKey,
    /// Held, as the kernel would: the call goes on if another thread closes them.
    _socket: OwnedFd,
    file: OwnedFd,
    offset: u64,
    /// It was told to stop, for this reason.
    stopping: Option<End>,
}

/// Whether a kernel of this release keeps a call that was taken from being interrupted (Linux 5.19): otherwise it would begin
/// again, and what was sent be sent twice.
pub(super) fn can_hold(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) >= (5, 19),
        _ => false,
    }
}

impl GuestRunner {
    pub(super) fn sendfile(&mut self, notification: Notification) -> io::Result<Outcome> {
        if !self.sends_files {
            return Ok(Outcome::CONTINUE);
        }
        let (target, kind) = self.target(notification)?;
        let Kind::Vsock(port) = kind else { return Ok(Outcome::CONTINUE) };
        let State::Connected(peer) = vsock::state(target.socket.as_fd())? else {
            return Ok(Outcome::CONTINUE);
        };
        let stream = key(port, peer);
        // Two on one stream have no order; the second goes the ordinary way, and arrives behind the first.
        let busy = self.sending.values().any(|sending| sending.stream == stream);
        if peer.cid <= vsock::CID_HOST || busy || self.sending.len() >= MAX_PENDING {
            return Ok(Outcome::CONTINUE);
        }
        let [_, number, offset_at, count, ..] = notification.args;
        let file = self.descriptors.copy(notification.tid, number as i32)?;
        let Some(shared) = self.shares.find(file.as_fd())? else { return Ok(Outcome::CONTINUE) };
        let Some(offset) = offset_of(notification.tid, offset_at, &file)? else {
            return Ok(Outcome::CONTINUE);
        };
        let count = count.min(MOST).min(i64::MAX.cast_unsigned() - offset);
        let waits = !nonblocking(target.socket.as_fd())?;
        let limit = if waits { vsock::time_limit(target.socket.as_fd(), false) } else { None };
        // What was read from memory came from this caller only if it waits still.
        if !self.notifier.is_valid(notification.id) {
            return Ok(Outcome::Later);
        }
        self.next_request += 1;
        let id = self.next_request;
        let what = SendFile { stream, share: shared.share, node: shared.node, offset, count, waits };
        let request = GuestRequest::SendFile(what);
        if self.control.send(&ToHost::Ask { id, caller: kso_wire::Caller::default(), request }).is_err() {
            return Ok(Outcome::CONTINUE);
        }
        let caller = Caller::new(notification.id, notification.tid, limit);
        let sending =
            Sending { caller, notification, stream, _socket: target.socket, file, offset, stopping: None };
        self.sending.insert(id, sending);
        self.look_soon();
        Ok(Outcome::Later)
    }

    /// The broker says what was sent.
    pub(super) fn file_sent(&mut self, sending: &Sending, result: Result<GuestReply, Failure>) {
        let outcome = match result {
            Ok(GuestReply::Value(sent)) => match advance(sending, sent) {
                Ok(()) => Outcome::Respond(Response::Value(sent)),
                Err(error) => Outcome::error(errno::of(&error)),
            },
            Ok(GuestReply::StayInside) => match sending.stopping {
                None => Outcome::CONTINUE,
                Some(End::Signal) => Outcome::Respond(Response::Restart),
                Some(End::LimitedSignal) => Outcome::error(Errno::EINTR),
                Some(End::Time) => Outcome::error(Errno::EAGAIN),
            },
            Ok(_) => Outcome::error(Errno::EPROTO),
            Err(failure) if failure.errno == Errno::EOPNOTSUPP => {
                tracing::debug!("files are not sent by the host here");
                self.sends_files = false;
                Outcome::CONTINUE
            }
            Err(failure) => {
                if failure.errno == Errno::EPIPE {
                    self.raise_sigpipe(sending);
                }
                Outcome::error(failure.errno)
            }
        };
        self.conclude(sending.notification.id, &outcome);
    }

    /// As `sk_stream_error` in net/core/stream.c does.
    fn raise_sigpipe(&mut self, sending: &Sending) {
        let tid = sending.notification.tid;
        if self.notifier.is_valid(sending.notification.id)
            && let Ok(process) = self.descriptors.process(tid)
            && let Err(error) = remote::signal_thread(process, tid, numbers::SIGPIPE)
        {
            tracing::debug!(%error, tid, "SIGPIPE");
        }
    }

    pub(super) fn look_sending(&mut self, now: Instant, budget: &mut usize) -> bool {
        let (mut quiet, mut stopped) = (true, Vec::new());
        let (turn, all) = (self.next_look as usize, self.sending.len().max(1));
        for (at, (&id, sending)) in self.sending.iter_mut().enumerate() {
            let in_turn = (at + turn * super::held::LOOKS) % all < super::held::LOOKS;
            if sending.stopping.is_some() {
                continue;
            }
            let Some(end) = examine(&mut sending.caller, &self.notifier, now, in_turn, budget) else {
                continue;
            };
            quiet = false;
            sending.stopping = end;
            stopped.push((id, sending.stream, end.is_none()));
        }
        for (id, stream, gone) in stopped {
            if gone {
                // Killed: its descriptors are let go of.
                self.sending.remove(&id);
            }
            // If it cannot be told, the outside is gone, which ends all.
            let _ = self.tell(GuestRequest::StopSending(stream, id));
        }
        quiet
    }
}

/// Where a call reads from. `None`: the kernel shall say what is wrong with it.
fn offset_of(tid: u32, offset_at: u64, file: &OwnedFd) -> io::Result<Option<u64>> {
    if offset_at == 0 {
        return Ok(Some(tell(file)?));
    }
    let mut bytes = [0; 8];
    if remote::read_memory(tid, offset_at, &mut bytes)? != bytes.len() {
        return Ok(None);
    }
    Ok(u64::try_from(i64::from_ne_bytes(bytes)).ok())
}

/// Moves the position that the call has read from.
fn advance(sending: &Sending, sent: i64) -> io::Result<()> {
    let end = sending.offset.saturating_add_signed(sent);
    match sending.notification.args {
        [_, _, 0, ..] => seek(&sending.file, SeekFrom::Start(end)).map(drop).map_err(Into::into),
        [_, _, at, ..] => remote::write_memory(sending.notification.tid, at, &end.to_ne_bytes()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_may_interrupt_is_told_by_its_release() {
        for able in ["5.19.0", "6.1.0-37-cloud-amd64", "6.12-rc1", "7.2"] {
            assert!(can_hold(able), "{able}");
        }
        for unable in ["5.10.0-34-amd64", "5.18.19", "4.19", "", "x.y"] {
            assert!(!can_hold(unable), "{unable}");
        }
    }
}
