//! `accept` with a place for the peer's address.
//!
//! The kernel would write a vsock address, so the connection is accepted here, its address written as TCP would, and
//! the descriptor handed over as the call's answer. A blocking caller waits in a queue of its listener, which only
//! a connection or a signal ends; nobody else waits for it.

use super::connect::nonblocking;
use super::held::{Caller, End, examine};
use super::ports::Port;
use super::run::Source;
use super::{GuestRunner, Kind, Outcome};
use kso_sys::notify::{Notification, Response};
use kso_sys::vsock::{self, Address, State};
use kso_sys::{errno, numbers, remote};
use kso_wire::{Errno, MAX_PENDING};
use rustix::event::epoll;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

/// Callers that wait at one listener.
#[derive(Debug)]
pub(super) struct Queue {
    listener: OwnedFd,
    waiting: VecDeque<Accepting>,
}

/// A connection whose peer is not known yet: two connections of a VMM have no order, and what the broker says of this one is
/// on its way.
#[derive(Debug)]
pub(super) struct Unnamed {
    notification: Notification,
    socket: OwnedFd,
}

/// An `accept`.
#[derive(Clone, Copy, Debug)]
struct Accepting {
    caller: Caller,
    notification: Notification,
}

impl GuestRunner {
    pub(super) fn accept(&mut self, notification: Notification) -> io::Result<Outcome> {
        let (target, kind) = self.target(notification)?;
        let Kind::Vsock(port) = kind else { return Ok(Outcome::CONTINUE) };
        if vsock::state(target.socket.as_fd())? != State::Listening {
            return Ok(Outcome::error(Errno::EINVAL));
        }
        let flags = flags(notification);
        if flags & !(numbers::SOCK_CLOEXEC | numbers::SOCK_NONBLOCK) != 0 {
            return Ok(Outcome::error(Errno::EINVAL));
        }
        let listener = target.socket.as_fd();
        let waits = !nonblocking(listener)?;
        if !(waits && self.accepting.contains_key(&port)) {
            match take(listener, waits) {
                Ok((socket, peer)) => {
                    self.hand_over(notification, port, socket, peer);
                    return Ok(Outcome::Later);
                }
                Err(error) if errno::of(&error) == Errno::EAGAIN && waits => {}
                Err(error) => return Ok(Outcome::error(errno::of(&error))),
            }
        }
        let limit = vsock::time_limit(listener, true);
        let caller = Caller::new(notification.id, notification.tid, limit);
        if !self.accepting.contains_key(&port) {
            if self.accepting.len() >= MAX_PENDING {
                return Ok(Outcome::error(Errno::ENOBUFS));
            }
            let data = epoll::EventData::new_u64(Source::Accepting(port).data());
            epoll::add(&self.events, listener, data, epoll::EventFlags::IN)?;
            self.accepting.insert(port, Queue { listener: target.socket, waiting: VecDeque::new() });
        }
        if let Some(queue) = self.accepting.get_mut(&port) {
            if queue.waiting.len() >= MAX_PENDING {
                return Ok(Outcome::error(Errno::ENOBUFS));
            }
            queue.waiting.push_back(Accepting { caller, notification });
        }
        self.look_soon();
        Ok(Outcome::Later)
    }

    /// A listener has connections: those who wait longest get them.
    pub(super) fn acceptable(&mut self, port: u32) {
        while let Some(queue) = self.accepting.get_mut(&port) {
            let Some(first) = queue.waiting.front() else { break };
            let notification = first.notification;
            // A connection is not taken for a caller that is gone.
            if !self.notifier.is_valid(notification.id) {
                queue.waiting.pop_front();
                continue;
            }
            match take(queue.listener.as_fd(), true) {
                Ok((socket, peer)) => {
                    queue.waiting.pop_front();
                    self.hand_over(notification, port, socket, peer);
                }
                Err(error) if errno::of(&error) == Errno::EAGAIN => return,
                Err(error) => {
                    queue.waiting.pop_front();
                    self.respond(notification.id, Response::Error(errno::to_raw(errno::of(&error))));
                }
            }
        }
        self.drop_idle();
    }

    /// Lets go of listeners at which nobody waits.
    fn drop_idle(&mut self) {
        self.accepting.retain(|_, queue| {
            if queue.waiting.is_empty() {
                // The registration would outlive our copy.
                let _ = epoll::delete(&self.events, &queue.listener);
            }
            !queue.waiting.is_empty()
        });
    }

    fn hand_over(&mut self, notification: Notification, port: u32, socket: OwnedFd, peer: Address) {
        if peer.cid == vsock::CID_HOST
            && self.peer_of(port, peer).is_none()
            && self.unnamed.len() < MAX_PENDING
        {
            self.unnamed.insert((port, peer.port), Unnamed { notification, socket });
            return self.look_soon();
        }
        let result = self.write_peer(notification, port, peer).and_then(|()| {
            let flags = flags(notification);
            if flags & numbers::SOCK_NONBLOCK != 0 {
                fcntl_setfl(&socket, OFlags::NONBLOCK)?;
            }
            self.notifier.hand_over(notification.id, socket.as_fd(), flags & numbers::SOCK_CLOEXEC != 0)
        });
        if let Err(error) = result {
            // As TCP: the connection is lost with the call.
            self.respond(notification.id, Response::Error(errno::to_raw(errno::of(&error))));
        }
    }

    /// The broker said whose a connection is.
    pub(super) fn has_name(&mut self, port: u32, vmm_port: u32) {
        if let Some(Unnamed { notification, socket }) = self.unnamed.remove(&(port, vmm_port)) {
            self.hand_over(notification, port, socket, Address { cid: vsock::CID_HOST, port: vmm_port });
        }
    }

    /// Lets go of connections whose callers are gone.
    pub(super) fn look_unnamed(&mut self) {
        let notifier = &self.notifier;
        self.unnamed.retain(|_, one| notifier.is_valid(one.notification.id));
    }

    /// The broker is gone: it will not say whose they are.
    pub(super) fn unnamed_lost(&mut self) {
        for (_, one) in std::mem::take(&mut self.unnamed) {
            self.respond(one.notification.id, Response::Error(errno::to_raw(Errno::ECONNABORTED)));
        }
    }

    fn write_peer(&mut self, notification: Notification, port: u32, peer: Address) -> io::Result<()> {
        let [_, target, length_at, ..] = notification.args;
        let address = self.peer_of(port, peer).unwrap_or_else(|| {
            // It fell out of the table meanwhile: getpeername asks the broker.
            SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), peer.port as u16)
        });
        write_address(notification.tid, target, length_at, address)
    }

    /// What TCP would call the peer of a stream, if that is known here.
    pub(super) fn peer_of(&mut self, port: u32, peer: Address) -> Option<SocketAddr> {
        let family = Port::of(port).family;
        if peer.cid == vsock::CID_LOCAL {
            return Some(Self::inside_name(family, Port::of(port), Port::of(peer.port)));
        }
        if peer.cid == vsock::CID_HOST {
            if self.peers.of_port(peer.port).is_none() {
                self.receive_control();
            }
            return self.peers.of_port(peer.port).map(|address| Self::present(family, address));
        }
        if self.peers.address(peer.cid).is_none() {
            // It is told before the connection comes.
            self.receive_control();
        }
        let ip = self.peers.address(peer.cid)?;
        Some(Self::present(family, SocketAddr::new(ip, peer.port as u16)))
    }

    pub(super) fn look_accepting(&mut self, now: Instant, budget: &mut usize) -> bool {
        let (mut quiet, mut answers) = (true, Vec::new());
        let all: usize = self.accepting.values().map(|queue| queue.waiting.len()).sum();
        let (turn, mut at) = (self.next_look as usize, 0);
        for queue in self.accepting.values_mut() {
            queue.waiting.retain_mut(|held| {
                at += 1;
                let in_turn = (at + turn * super::held::LOOKS) % all.max(1) < super::held::LOOKS;
                let Some(end) = examine(&mut held.caller, &self.notifier, now, in_turn, budget) else {
                    return true;
                };
                quiet = false;
                answers.extend(end.map(|end| (held.caller.id, end)));
                false
            });
        }
        for (id, end) in answers {
            let response = match end {
                End::Signal => Response::Restart,
                End::LimitedSignal => Response::Error(errno::to_raw(Errno::EINTR)),
                End::Time => Response::Error(errno::to_raw(Errno::EAGAIN)),
            };
            self.respond(id, response);
        }
        self.drop_idle();
        quiet
    }
}

fn flags(notification: Notification) -> i32 {
    if notification.call == numbers::ACCEPT4 { notification.args[3] as i32 } else { 0 }
}

/// Takes a connection off a listener without waiting, whatever its file's mode.
fn take(listener: BorrowedFd<'_>, blocking: bool) -> io::Result<(OwnedFd, Address)> {
    if !blocking {
        return vsock::accept(listener);
    }
    // accept(2) has no flag for it, and another thread may take the connection that poll saw: the file's own mode is
    // changed for the moment.
    let mode = fcntl_getfl(listener)?;
    fcntl_setfl(listener, mode | OFlags::NONBLOCK)?;
    let taken = vsock::accept(listener);
    fcntl_setfl(listener, mode)?;
    taken
}

/// Writes an address where a call wants it: as much as fits, and the length it has (getsockname(2)).
pub(super) fn write_address(tid: u32, target: u64, length_at: u64, address: SocketAddr) -> io::Result<()> {
    write_value(tid, target, length_at, &kso_sys::address_bytes(address), true)
}

/// Writes bytes where a call wants them. The length told is the whole one, or what was written.
pub(super) fn write_value(
    tid: u32,
    target: u64,
    length_at: u64,
    bytes: &[u8],
    whole: bool,
) -> io::Result<()> {
    let error = |errno| io::Error::from_raw_os_error(errno::to_raw(errno));
    let mut room = [0; 4];
    if remote::read_memory(tid, length_at, &mut room)? != room.len() {
        return Err(error(Errno::EFAULT));
    }
    let room = usize::try_from(i32::from_ne_bytes(room)).map_err(|_| error(Errno::EINVAL))?;
    let part = bytes.get(..room).unwrap_or(bytes);
    let length = if whole { bytes.len() } else { part.len() };
    if !part.is_empty() {
        remote::write_memory(tid, target, part)?;
    }
    remote::write_memory(tid, length_at, &(length as u32).to_ne_bytes())
}
