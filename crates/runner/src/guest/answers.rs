//! What the broker says.

use super::listen::Listening;
use super::names::name;
use super::options::{value_answer, write_option};
use super::{GuestRunner, Outcome};
use crate::descriptors::Target;
use kso_sys::errno;
use kso_sys::vsock::{self, Address};
use kso_wire::guest::{GuestReply, ToGuest};
use kso_wire::{Errno, Failure, Family, OptionName};
use std::io;
use std::net::SocketAddr;
use std::time::Instant;

/// A call that waits for an answer.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) target: Target,
    pub(super) purpose: Purpose,
    pub(super) since: Instant,
}

/// What an answer is for.
#[derive(Debug)]
pub(super) enum Purpose {
    Listen(Box<Listening>),
    Reserve {
        wanted: SocketAddr,
    },
    /// An address, with another port if one is given.
    Name {
        family: Family,
        port: Option<u16>,
    },
    GetOption(OptionName),
    SetOption,
    TcpInfo,
    OutQueue,
}

impl GuestRunner {
    /// Takes everything that came by the control stream.
    pub(super) fn receive_control(&mut self) {
        while let Some(message) = self.control.next() {
            self.told(message);
        }
        if self.control.descriptor().is_none() && !self.lost {
            self.lost = true;
            self.all_lost();
        }
    }

    fn told(&mut self, message: ToGuest) {
        match message {
            ToGuest::Established { local_port, local } => self.established(local_port, local),
            ToGuest::Failed { local_port, failure } => self.failed(local_port, failure.errno),
            ToGuest::Broken { stream, errno } => {
                let peer = Address { cid: stream.peer_cid, port: stream.peer_port };
                self.failures.add(stream.local_port, Some(peer), errno);
            }
            ToGuest::Named { stream, address } if stream.peer_cid == vsock::CID_HOST => {
                self.peers.came_by(stream.peer_port, address);
                self.has_name(stream.local_port, stream.peer_port);
            }
            ToGuest::Named { stream, address } => self.peers.named(stream.peer_cid, address.ip()),
            ToGuest::Answered { id, result } => self.answered(id, result),
            ToGuest::Welcome(_) | ToGuest::Refused(_) => {}
        }
    }

    /// Concludes a call by the broker's answer. One that nobody waits for is dropped.
    pub(super) fn answered(&mut self, id: u64, result: Result<GuestReply, Failure>) {
        if let Some(sending) = self.sending.remove(&id) {
            return self.file_sent(&sending, result);
        }
        let Some(Asked { target, purpose, .. }) = self.asked.remove(&id) else { return };
        let id = target.notification.id;
        let outcome = self.answer(target, purpose, result).unwrap_or_else(|error| {
            tracing::debug!(%error, "a call could not be answered");
            Outcome::error(errno::of(&error))
        });
        self.conclude(id, &outcome);
    }

    fn answer(
        &mut self,
        target: Target,
        purpose: Purpose,
        result: Result<GuestReply, Failure>,
    ) -> io::Result<Outcome> {
        let notification = target.notification;
        let listening = |result| match result {
            Ok(GuestReply::Listening(outer)) => Ok(Some(outer)),
            Ok(GuestReply::StayInside) => Ok(None),
            Ok(_) => Err(Failure::kernel(Errno::EPROTO)),
            Err(failure) => Err(failure),
        };
        match purpose {
            Purpose::Listen(pending) => return self.listening(&target, *pending, listening(result)),
            Purpose::Reserve { wanted } => return self.reserved(&target, wanted, listening(result)),
            _ => {}
        }
        let reply = match result {
            Ok(reply) => reply,
            Err(failure) => return Ok(Outcome::error(failure.errno)),
        };
        Ok(match (purpose, reply) {
            (Purpose::Name { family, port }, GuestReply::Address(address)) => {
                let address = Self::present(family, address);
                name(notification, SocketAddr::new(address.ip(), port.unwrap_or(address.port())))
            }
            (Purpose::GetOption(option), GuestReply::Value(value)) => {
                write_option(notification, &kso_sys::options::to_bytes(option, value))
            }
            (Purpose::SetOption, GuestReply::Done) => Outcome::DONE,
            (Purpose::TcpInfo, GuestReply::Bytes(bytes)) => write_option(notification, &bytes),
            (Purpose::OutQueue, GuestReply::Value(value)) => value_answer(notification, value),
            _ => Outcome::error(Errno::EPROTO),
        })
    }
}
