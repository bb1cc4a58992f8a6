//! `connect`.

use super::{Call, Interceptor, MAX_INTERRUPTED, Outcome, Publishing, Purpose, recall, remember};
use kso_sys::notify::{Notification, Response};
use kso_sys::{MAX_ADDRESS, RawAddress, address_from_raw, local_address, remote};
use kso_wire::{
    Answer, BrokerLink, Connect, Errno, Family, LoopbackMode, OptionName, Origin, Reply, Request,
};
use rustix::fs::OFlags;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};

/// `TCP_CLOSE`: nothing was begun, or it failed (include/net/tcp_states.h).
pub(crate) const CLOSED: u8 = 7;
/// The port of DNS (RFC 1035).
pub(crate) const NAME_SERVICE: u16 = 53;
/// `TCP_SYN_SENT`.
const SYN_SENT: u8 = 2;

impl Interceptor {
    pub(super) fn connect(
        &mut self,
        notification: Notification,
        link: &mut dyn BrokerLink,
    ) -> io::Result<Outcome> {
        let [_, address, length, ..] = notification.args;
        // As the kernel does: `int addrlen`, no longer than a sockaddr_storage (move_addr_to_kernel).
        let length = usize::try_from(length as i32).unwrap_or(usize::MAX);
        if length > MAX_ADDRESS {
            return Ok(Outcome::CONTINUE);
        }
        let mut bytes = [0; MAX_ADDRESS];
        let bytes = bytes.get_mut(..length).unwrap_or_default();
        if remote::read_memory(notification.tid, address, bytes)? != length {
            return Ok(Outcome::CONTINUE);
        }
        // AF_UNSPEC dissolves: the kernel's own business, also for a swapped socket.
        let RawAddress::Inet(peer) = address_from_raw(bytes) else { return Ok(Outcome::CONTINUE) };
        let Some(call) = self.tcp_socket(notification)? else { return Ok(Outcome::CONTINUE) };
        if !self.may_leave(peer) {
            return self.inside(&call);
        }
        if matches!((call.family, peer), (Family::V4, SocketAddr::V6(_)) | (Family::V6, SocketAddr::V4(_))) {
            return Ok(Outcome::CONTINUE);
        }
        let socket = call.socket.as_fd();
        let state = call.state;
        let swapped = self.is_swapped(socket)?;
        if swapped {
            if state == SYN_SENT
                && !self.interrupted.is_empty()
                && rustix::fs::fcntl_getfl(socket)?.contains(OFlags::NONBLOCK)
                && recall(&mut self.interrupted, &kso_sys::cookie(socket)?)
            {
                return Ok(Outcome::error(Errno::EINPROGRESS));
            }
            // Under way or established: the kernel knows what to say. Otherwise it is a new attempt, for which
            // the socket, locked to its old peer, is replaced.
            if state != CLOSED {
                return Ok(Outcome::CONTINUE);
            }
            if let Some(error) = failure(socket)? {
                return Ok(Outcome::Respond(Response::Error(error)));
            }
        } else if state != CLOSED {
            return Ok(Outcome::CONTINUE);
        }
        let options = self.options(&call, swapped)?;
        if options.get(OptionName::V6Only) == Some(1) && peer.ip().to_canonical().is_ipv4() {
            return Ok(Outcome::CONTINUE);
        }
        let local = call.bound();
        let request = Request::Connect(Connect {
            peer,
            family: call.family,
            local,
            options,
            origin: Origin::Intercepted,
        });
        self.ask(call, Purpose::Connect, request, link)
    }

    /// The client kernel connects, if the socket is its own. One that was swapped for an earlier connection
    /// cannot come back in.
    fn inside(&self, call: &Call) -> io::Result<Outcome> {
        let socket = call.socket.as_fd();
        if call.state != CLOSED || !self.is_swapped(socket)? {
            return Ok(Outcome::CONTINUE);
        }
        Ok(match failure(socket)? {
            Some(error) => Outcome::Respond(Response::Error(error)),
            None => Outcome::error(Errno::EADDRNOTAVAIL),
        })
    }

    /// Whether a connection to `peer` may have to be made outside. What is the sandbox's own stays inside,
    /// unless a published listener could be meant.
    fn may_leave(&self, peer: SocketAddr) -> bool {
        let ip = peer.ip().to_canonical();
        if self.config.tun.is_gateway(ip) && peer.port() == NAME_SERVICE {
            // The gateway itself answers names, by the TUN.
            return false;
        }
        let loopback = ip.is_loopback() || ip.is_unspecified();
        if loopback && self.config.loopback == LoopbackMode::External {
            return true;
        }
        let inside = loopback || self.config.tun.is_guest(ip);
        !inside || self.config.publishing != Publishing::Nothing
    }

    pub(super) fn connected(&mut self, call: &Call, answer: Answer) -> io::Result<Outcome> {
        match answer.result {
            Ok(Reply::Socket { .. }) => {}
            Ok(_) => return self.inside(call),
            Err(failure) => return Ok(Outcome::error(failure.errno)),
        }
        let Some(outer) = answer.descriptor else { return Ok(Outcome::error(Errno::EPROTO)) };
        let Some(nonblocking) = self.swap(call, outer.as_fd())? else {
            // Another thread closed it meanwhile.
            return Ok(Outcome::error(Errno::EBADF));
        };
        if !nonblocking {
            return Ok(Outcome::CONTINUE);
        }
        // The program may close it as soon as it is answered, and then it must be gone from its epoll instances.
        drop(outer);
        let response = Response::Error(kso_sys::errno::to_raw(Errno::EINPROGRESS));
        if self.listener.respond(call.notification.id, response).is_err() {
            // Interrupted after the swap: the call will be made again, and must not hear EALREADY.
            let thread = self.threads.again(call.notification.tid)?;
            let swapped = remote::take_descriptor(thread.descriptor(), call.number)?;
            remember(&mut self.interrupted, kso_sys::cookie(swapped.as_fd())?, MAX_INTERRUPTED);
        }
        Ok(Outcome::Gone)
    }
}

/// Why an earlier attempt on a closed socket failed, if the program did not hear it yet. A socket that was
/// dissociated (`AF_UNSPEC`) has `ECONNRESET` (`tcp_disconnect`), which is no failure of an attempt.
fn failure(socket: BorrowedFd<'_>) -> io::Result<Option<i32>> {
    let error = kso_sys::take_error(socket)?;
    Ok((error != 0 && kso_sys::errno::from_raw(error) != Errno::ECONNRESET).then_some(error))
}

/// The address the program bound, if it did.
pub(crate) fn bound_address(socket: BorrowedFd<'_>) -> io::Result<Option<SocketAddr>> {
    Ok(match local_address(socket)? {
        RawAddress::Inet(address) if address.port() != 0 || !address.ip().is_unspecified() => Some(address),
        _ => None,
    })
}
