//! The loop.

use super::GuestRunner;
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

/// A message that no call waits for can wait so long: each look costs a busy guest two changes of process.
const REST: Duration = Duration::from_millis(100);
/// So many events are taken at a time.
const EVENTS: usize = 32;

/// What an event is about, as an epoll registration's word: the kind in the upper half, a vsock port in the lower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Accepting(u32),
    Connecting(u32),
}

impl Source {
    pub(super) fn data(self) -> u64 {
        match self {
            Self::Accepting(port) => 1 << 32 | u64::from(port),
            Self::Connecting(port) => 2 << 32 | u64::from(port),
        }
    }

    fn of(data: u64) -> Self {
        match data >> 32 {
            1 => Self::Accepting(data as u32),
            _ => Self::Connecting(data as u32),
        }
    }
}

impl GuestRunner {
    /// Serves until `ended` is readable.
    ///
    /// # Errors
    /// The kernel refuses to wait.
    pub fn run(&mut self, ended: BorrowedFd<'_>) -> io::Result<()> {
        while !self.wait(ended, None)? {}
        Ok(())
    }

    /// Waits until something happens or the time is over, and serves it. Whether `other` is readable, which is the
    /// caller's to serve: an epoll instance, for one that has several.
    ///
    /// # Errors
    /// The kernel refuses to wait.
    pub fn wait(&mut self, other: BorrowedFd<'_>, limit: Option<Duration>) -> io::Result<bool> {
        let now = Instant::now();
        let deadlines = [
            self.look_at,
            self.sweep_at,
            self.underway.next_deadline(),
            self.descriptors.threads.next_deadline(),
        ];
        let next = deadlines.into_iter().flatten().min().map(|at| at.saturating_duration_since(now));
        let timeout = [next, limit].into_iter().flatten().min();
        let [calls, events, control, tun, stream, other] = self.poll(other, timeout)?;
        if calls.contains(PollFlags::IN) {
            self.serve();
        } else if calls.intersects(PollFlags::HUP | PollFlags::ERR) {
            // Nobody is left to call.
            self.supervising = false;
        }
        if !control.is_empty() {
            self.control.flush();
            self.receive_control();
            self.rest_until = Some(now + REST);
        }
        if events.contains(PollFlags::IN) {
            self.serve_events()?;
        }
        if stream.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
            self.packets.receive();
        }
        if tun.contains(PollFlags::IN) || stream.contains(PollFlags::OUT) {
            self.packets.send();
        }
        self.expire();
        Ok(other.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR))
    }

    /// The notifier is polled directly, so that the kernel can hand a call over on the caller's own core.
    fn poll(&self, other: BorrowedFd<'_>, timeout: Option<Duration>) -> io::Result<[PollFlags; 6]> {
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let events = self.events.as_fd();
        let calls = if self.supervising { self.notifier.as_fd() } else { events };
        let held = self.connecting.len() + self.sending.len() + self.unnamed.len();
        let awaited = held + self.asked.len() > 0;
        let mut by_control = PollFlags::empty();
        by_control.set(PollFlags::IN, awaited || self.rest_until.is_none());
        by_control.set(PollFlags::OUT, self.control.has_waiting());
        let (control, by_control) =
            self.control.descriptor().map_or((events, PollFlags::empty()), |control| (control, by_control));
        let (tun, from_tun) = self.packets.tun().unwrap_or((events, PollFlags::empty()));
        let (stream, by_stream) = self.packets.stream().unwrap_or((events, PollFlags::empty()));
        let mut polled = [
            PollFd::from_borrowed_fd(calls, PollFlags::IN),
            PollFd::from_borrowed_fd(events, PollFlags::IN),
            PollFd::from_borrowed_fd(control, by_control),
            PollFd::from_borrowed_fd(tun, from_tun),
            PollFd::from_borrowed_fd(stream, by_stream),
            PollFd::from_borrowed_fd(other, PollFlags::IN),
        ];
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) => {
                let mut seen = polled.map(|polled| polled.revents());
                if !self.supervising
                    && let [calls, ..] = &mut seen
                {
                    *calls = PollFlags::empty();
                }
                Ok(seen)
            }
            Err(rustix::io::Errno::INTR) => Ok([PollFlags::empty(); 6]),
            Err(error) => Err(error.into()),
        }
    }

    /// Answers one call that waits. One at a time, so that nothing else starves.
    fn serve(&mut self) {
        match self.notifier.receive() {
            Ok(Some(notification)) => self.handle(notification),
            Ok(None) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => tracing::warn!(%error, "cannot receive a notification"),
        }
    }

    fn serve_events(&mut self) -> io::Result<()> {
        let mut events = Vec::with_capacity(EVENTS);
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        match epoll::wait(&self.events, rustix::buffer::spare_capacity(&mut events), Some(&zero)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        for event in events {
            match Source::of(event.data.u64()) {
                Source::Accepting(port) => self.acceptable(port),
                Source::Connecting(port) => {
                    self.receive_control();
                    self.settle(port);
                }
            }
        }
        Ok(())
    }

    fn expire(&mut self) {
        let now = Instant::now();
        let due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if due(self.rest_until) {
            self.rest_until = None;
        }
        if due(self.look_at) {
            self.look(now);
        }
        if due(self.sweep_at) {
            self.sweep();
        }
        if due(self.underway.next_deadline()) {
            self.abandon(now);
        }
        if due(self.descriptors.threads.next_deadline()) {
            self.descriptors.threads.forget_ended();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_says_what_it_is_about() {
        for source in [Source::Accepting(u32::MAX), Source::Connecting(7)] {
            assert_eq!(Source::of(source.data()), source);
        }
    }
}
