//! What the host's kernel says of datagrams that did not arrive, told to the sandbox's.
//!
//! Each socket queues its errors (`IP_RECVERR`, ip(7)) with the head of the datagram each is about; the gateway
//! makes of it the ICMP message that a router would have sent.

use crate::datagrams::{Flow, FlowKey, State};
use crate::gateway::Gateway;
use crate::packet::icmp::{Cause, Quoted};
use crate::packet::protocol;
use crate::packet::transport::{UDP_HEADER, udp_header};
use crate::table::Token;
use kso_sys::datagram::{self, ErrorOrigin, QueuedError};
use kso_wire::Errno;
use std::net::IpAddr;
use std::os::fd::AsFd;

/// Errors that are taken off a queue at one time.
const MAX_ERRORS: usize = 32;

impl Gateway {
    /// Tells the sandbox what the queue of errors of a flow's socket holds.
    pub(crate) fn report_queued(&mut self, token: Token) {
        let mut buffer = [0; 1280];
        for _ in 0..MAX_ERRORS {
            let Some((key, Flow { state, .. })) = self.datagrams.table.get(token) else { return };
            let key = *key;
            let socket = match state {
                State::Open { socket } => socket.as_fd(),
                State::Published { port, .. } => return self.report_published(*port),
                State::Opening { .. } | State::Refused { .. } => return,
            };
            let Ok(Some(error)) = datagram::next_error(socket, &mut buffer) else { return };
            self.report_error(&key, &error, &buffer);
        }
    }

    /// Takes the next error off the queue of any socket and reports it for the flow of `key`.
    pub(crate) fn report_error(&mut self, key: &FlowKey, error: &QueuedError, buffer: &[u8]) {
        let (cause, offender) = self.judge(error, key.peer.ip());
        let payload = buffer.get(..error.length).unwrap_or_default();
        self.report_datagram(key, cause, offender, payload, payload.len());
    }

    /// What an error means, and who is said to have found it.
    pub(crate) fn judge(&self, error: &QueuedError, peer: IpAddr) -> (Cause, IpAddr) {
        let cause = match error.origin {
            ErrorOrigin::Icmp(kind, code) => Cause::of_v4(kind, code, error.info),
            ErrorOrigin::Icmp6(kind, code) => Cause::of_v6(kind, code, error.info),
            ErrorOrigin::Local => match kso_sys::errno::from_raw(error.errno) {
                Errno::EMSGSIZE => Some(Cause::TooBig(error.info)),
                errno => Some(Cause::of_errno(errno)),
            },
        };
        // The host's own addresses of loopback mean something else inside.
        let offender = error
            .offender
            .filter(|offender| offender.is_ipv4() == peer.is_ipv4() && !offender.is_loopback())
            .filter(|offender| !self.addresses.is_guest(*offender))
            .unwrap_or_else(|| self.own(peer));
        (cause.unwrap_or(Cause::Host), offender)
    }

    /// Tells the sandbox why a datagram of `length` bytes that began with `payload` did not arrive.
    pub(crate) fn report_datagram(
        &mut self,
        key: &FlowKey,
        cause: Cause,
        offender: IpAddr,
        payload: &[u8],
        length: usize,
    ) {
        let length = length.min(usize::from(u16::MAX) - UDP_HEADER);
        let Some(head) = udp_header(key.guest.port(), key.peer.port(), length) else { return };
        let quoted = Quoted {
            source: key.guest.ip(),
            destination: key.peer.ip(),
            protocol: protocol::UDP,
            head: &head,
            payload,
        };
        self.report(cause, offender, &quoted);
    }
}
