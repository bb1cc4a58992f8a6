//! What a guest asks about its streams, asked of their sockets outside.

use super::{Call, streams::Stream};
use crate::broker::Broker;
use kso_devices::vsock::GuestId;
use kso_sys::{RawAddress, options};
use kso_wire::guest::{GuestReply, StreamCall, ToGuest};
use kso_wire::{Errno, Failure, OptionName};
use std::os::fd::BorrowedFd;

/// Longest `struct tcp_info` that is told, bytes.
const MAX_INFO: u16 = 1024;
/// `TCP_ESTABLISHED` (include/net/tcp_states.h), the first byte of `struct tcp_info`.
const ESTABLISHED: u8 = 1;

impl Broker {
    /// Answers [`super::Order::Call`] with the help of the stream's socket. `None`: there is none.
    pub fn answer_call(&mut self, guest: GuestId, call: &Call, socket: Option<BorrowedFd<'_>>) {
        let stream = self.guests.all.get(&guest).and_then(|guest| guest.streams.get(&call.stream));
        let result = match (socket, stream) {
            (Some(socket), _) => of_socket(socket, &call.call),
            (None, Some(stream)) => of_joined(stream, &call.call),
            (None, None) => Err(Errno::ENOTCONN),
        };
        let result = result.map_err(Failure::kernel);
        self.guests.tell(guest, &ToGuest::Answered { id: call.id, result });
    }
}

fn of_socket(socket: BorrowedFd<'_>, call: &StreamCall) -> Result<GuestReply, Errno> {
    let errno = |error: std::io::Error| kso_sys::errno::of(&error);
    let address = |raw| match raw {
        RawAddress::Inet(address) => Ok(GuestReply::Address(address)),
        _ => Err(Errno::EAFNOSUPPORT),
    };
    match *call {
        StreamCall::LocalAddress => kso_sys::local_address(socket).map_err(errno).and_then(address),
        StreamCall::PeerAddress => kso_sys::peer_address(socket).map_err(errno).and_then(address),
        StreamCall::GetOption(name) => options::get_one(socket, name).map(GuestReply::Value).map_err(errno),
        StreamCall::SetOption(name, value) => {
            options::set_one(socket, name, value).map(|()| GuestReply::Done).map_err(errno)
        }
        StreamCall::TcpInfo(length) => {
            kso_sys::tcp_info(socket, length.min(MAX_INFO).into()).map(GuestReply::Bytes).map_err(errno)
        }
        StreamCall::OutQueue => {
            kso_sys::out_queue(socket).map(|bytes| GuestReply::Value(bytes.into())).map_err(errno)
        }
    }
}

/// A stream to another guest has no socket: it is as one on loopback with every option at its default.
fn of_joined(stream: &Stream, call: &StreamCall) -> Result<GuestReply, Errno> {
    Ok(match *call {
        StreamCall::LocalAddress => GuestReply::Address(stream.local.ok_or(Errno::ENOTCONN)?),
        StreamCall::PeerAddress => GuestReply::Address(stream.peer),
        StreamCall::GetOption(OptionName::Linger) => GuestReply::Value(-1),
        StreamCall::GetOption(_) | StreamCall::OutQueue => GuestReply::Value(0),
        StreamCall::SetOption(..) => GuestReply::Done,
        StreamCall::TcpInfo(length) => {
            let mut info = vec![0; length.min(MAX_INFO).into()];
            if let Some(state) = info.first_mut() {
                *state = ESTABLISHED;
            }
            GuestReply::Bytes(info)
        }
    })
}
