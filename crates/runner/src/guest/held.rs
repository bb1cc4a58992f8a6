//! Calls that wait for the world outside, and their signals.

use super::recent::Failures;
use super::run::Source;
use super::signals::{self, Look, Status};
use super::{GuestRunner, Outcome};
use kso_sys::notify::{Notification, Response};
use kso_sys::vsock::{self, State};
use kso_wire::{Errno, MAX_PENDING};
use rustix::event::epoll;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Callers are looked at so often.
const LOOK_EVERY: Duration = Duration::from_millis(12);
/// So many at a time, when many wait: a look costs some 50 us.
pub(super) const LOOKS: usize = 4;
/// When all that wait were quiet for so many rounds, they are looked at less often.
const LAZY_AFTER: u32 = 40;
const LAZY_EVERY: Duration = Duration::from_millis(50);
/// The broker answers within this time, or it never does.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// A caller that waits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Caller {
    pub(super) id: u64,
    pub(super) tid: u32,
    pub(super) deadline: Option<Instant>,
    /// The last look found a signal that may be its own.
    suspected: bool,
}

impl Caller {
    pub(super) fn new(id: u64, tid: u32, limit: Option<Duration>) -> Self {
        Self { id, tid, deadline: limit.map(|limit| Instant::now() + limit), suspected: false }
    }

    /// Whether it is to run a signal's handler.
    fn is_interrupted(&mut self) -> bool {
        let Some(status) = Status::of(self.tid) else { return false };
        let look = signals::look(self.tid, &status, || signals::all_of(status.process()));
        let before = std::mem::replace(&mut self.suspected, look == Look::Perhaps);
        look == Look::Interrupted || (look == Look::Perhaps && before)
    }
}

/// A `connect` that waits.
#[derive(Debug)]
pub(super) struct Connecting {
    caller: Caller,
    socket: Arc<OwnedFd>,
    /// The broker said that it is up; the kernel does not know yet.
    established: bool,
}

impl GuestRunner {
    /// Holds a blocking `connect` until its connection is up or failed.
    pub(super) fn wait_for_connection(
        &mut self,
        notification: Notification,
        socket: Arc<OwnedFd>,
        port: u32,
    ) -> io::Result<Outcome> {
        if let State::Connected(_) = vsock::state(socket.as_fd())? {
            self.heard(port);
            return Ok(Outcome::DONE);
        }
        if self.connecting.len() >= MAX_PENDING {
            return Ok(Outcome::error(Errno::ENOBUFS));
        }
        let limit = vsock::time_limit(socket.as_fd(), false);
        let caller = Caller::new(notification.id, notification.tid, limit);
        self.connecting.entry(port).or_default().push(Connecting { caller, socket, established: false });
        self.look_soon();
        Ok(Outcome::Later)
    }

    fn heard(&mut self, port: u32) {
        if let Some(begun) = self.recent.get_mut(port) {
            begun.unheard = false;
        }
    }

    /// The broker says that a connection is up.
    pub(super) fn established(&mut self, port: u32, local: SocketAddr) {
        if let Some(begun) = self.recent.get_mut(port) {
            begun.local = Some(local);
        }
        self.underway.remove(port);
        let Some(waiting) = self.connecting.get_mut(&port) else { return };
        for held in waiting.iter_mut() {
            held.established = true;
        }
        self.settle(port);
        // The kernel hears of it a moment later than we did.
        if let Some(held) = self.connecting.get(&port).and_then(|waiting| waiting.first()) {
            let data = epoll::EventData::new_u64(Source::Connecting(port).data());
            let flags = epoll::EventFlags::OUT | epoll::EventFlags::ONESHOT;
            let _ = epoll::add(&self.events, &*held.socket, data, flags);
        }
    }

    /// Answers those whose connection is up or over, as the kernel has it.
    pub(super) fn settle(&mut self, port: u32) {
        let Some(waiting) = self.connecting.get(&port) else { return };
        let Some(first) = waiting.first() else { return };
        let response = match vsock::state(first.socket.as_fd()) {
            Ok(State::Connected(_) | State::ShutDown) => Response::Value(0),
            Ok(State::Connecting | State::Listening) => return,
            Ok(State::Closed) | Err(_) => {
                let told = self.failures.take(port, None).map(kso_sys::errno::to_raw);
                let own = kso_sys::take_error(first.socket.as_fd()).ok().filter(|&error| error != 0);
                Response::Error(told.or(own).unwrap_or(kso_sys::errno::to_raw(Errno::ETIMEDOUT)))
            }
        };
        self.answer_connecting(port, response);
    }

    /// The broker says that a connection failed.
    pub(super) fn failed(&mut self, port: u32, errno: Errno) {
        self.underway.remove(port);
        if let Some(begun) = self.recent.get_mut(port) {
            begun.failed = true;
        }
        if self.connecting.contains_key(&port) {
            self.answer_connecting(port, Response::Error(kso_sys::errno::to_raw(errno)));
        } else {
            self.failures.add(port, None, errno);
        }
    }

    fn answer_connecting(&mut self, port: u32, response: Response) {
        let Some(waiting) = self.connecting.remove(&port) else { return };
        self.heard(port);
        for held in waiting {
            // A socket that has been registered stays so while the program has it.
            let _ = epoll::delete(&self.events, &*held.socket);
            self.respond(held.caller.id, response);
        }
    }

    /// The outside is gone.
    pub(super) fn all_lost(&mut self) {
        let ports: Vec<u32> = self.connecting.keys().copied().collect();
        for port in ports {
            self.answer_connecting(port, Response::Error(kso_sys::errno::to_raw(Errno::ENETDOWN)));
        }
        let asked: Vec<u64> = self.asked.keys().chain(self.sending.keys()).copied().collect();
        for id in asked {
            self.answered(id, Err(kso_wire::Failure::kernel(Errno::ENETDOWN)));
        }
        self.unnamed_lost();
        self.failures = Failures::default();
    }

    /// A call is held: its caller is looked at from now on.
    pub(super) fn look_soon(&mut self) {
        self.quiet = 0;
        self.look_at.get_or_insert_with(|| Instant::now() + LOOK_EVERY);
    }

    /// Looks at callers that wait: for signals, time limits, and whether they are still there.
    pub(super) fn look(&mut self, now: Instant) {
        self.look_at = None;
        // What the kernel knows already the broker has said.
        self.receive_control();
        self.expire_asked(now);
        let ports: Vec<u32> = self.connecting.keys().copied().collect();
        for port in ports {
            self.settle(port);
        }
        let mut budget = LOOKS;
        let mut quiet = self.look_connecting(now, &mut budget);
        quiet &= self.look_accepting(now, &mut budget);
        quiet &= self.look_sending(now, &mut budget);
        self.look_unnamed();
        self.quiet = if quiet { self.quiet.saturating_add(1) } else { 0 };
        let held = self.connecting.len() + self.accepting.len() + self.sending.len();
        if held + self.asked.len() + self.unnamed.len() > 0 {
            let pause = if self.quiet > LAZY_AFTER { LAZY_EVERY } else { LOOK_EVERY };
            self.look_at = Some(now + pause);
        }
    }

    fn look_connecting(&mut self, now: Instant, budget: &mut usize) -> bool {
        let (mut quiet, mut answers) = (true, Vec::new());
        self.next_look = self.next_look.wrapping_add(1);
        let turn = self.next_look as usize;
        let all = self.connecting.len().max(1);
        for (at, waiting) in self.connecting.values_mut().enumerate() {
            // A few each time, in turn.
            let in_turn = (at + turn * LOOKS) % all < LOOKS;
            waiting.retain_mut(|held| {
                let response = examine(&mut held.caller, &self.notifier, now, in_turn, budget);
                let Some(response) = response else { return true };
                quiet = false;
                answers.extend(response.map(|end| (held.caller.id, end)));
                false
            });
        }
        self.connecting.retain(|_, waiting| !waiting.is_empty());
        for (id, end) in answers {
            let response = match end {
                End::Signal => Response::Restart,
                End::LimitedSignal => Response::Error(kso_sys::errno::to_raw(Errno::EINTR)),
                // As TCP: the connection goes on.
                End::Time => Response::Error(kso_sys::errno::to_raw(Errno::EINPROGRESS)),
            };
            self.respond(id, response);
        }
        quiet
    }

    fn expire_asked(&mut self, now: Instant) {
        let late = self.asked.iter().filter(|(_, asked)| now.duration_since(asked.since) > ANSWER_TIMEOUT);
        let late: Vec<u64> = late.map(|(&id, _)| id).collect();
        for id in late {
            self.answered(id, Err(kso_wire::Failure::kernel(Errno::ENETDOWN)));
        }
    }
}

/// Why a call that waits is over.
#[derive(Clone, Copy, Debug)]
pub(super) enum End {
    Signal,
    LimitedSignal,
    Time,
}

/// `Some`: the call is over; for a reason, unless its caller is gone.
pub(super) fn examine(
    caller: &mut Caller,
    notifier: &kso_sys::notify::Listener,
    now: Instant,
    in_turn: bool,
    budget: &mut usize,
) -> Option<Option<End>> {
    if caller.deadline.is_some_and(|deadline| deadline <= now) {
        return Some(Some(End::Time));
    }
    if !in_turn && !caller.suspected {
        return None;
    }
    *budget = budget.checked_sub(1)?;
    if !notifier.is_valid(caller.id) {
        return Some(None);
    }
    // A call with a time limit is not made again: it would have the whole time once more (sock_intr_errno).
    let end = if caller.deadline.is_some() { End::LimitedSignal } else { End::Signal };
    caller.is_interrupted().then_some(Some(end))
}
