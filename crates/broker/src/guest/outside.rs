//! The broker as the vsock device sees it.

use super::Order;
use crate::broker::Broker;
use kso_devices::vsock::{End, GuestId, Outside, Verdict};
use kso_wire::Errno;
use kso_wire::guest::{StreamKey, ports};
use std::os::fd::{BorrowedFd, OwnedFd};

/// The CID by which a guest means its host (`VMADDR_CID_HOST`, vsock(7)).
pub(super) const HOST_CID: u32 = 2;

impl Outside for Broker {
    fn request(&mut self, guest: GuestId, stream: StreamKey) -> Verdict {
        if stream.peer_cid != HOST_CID {
            return self.connect_guest(guest, stream);
        }
        let Some(known) = self.guests.all.get_mut(&guest) else { return Verdict::Refused(Errno::ENETDOWN) };
        match stream.peer_port {
            // One at a time: whoever speaks here speaks for the whole guest.
            ports::CONTROL if known.control.is_none() => {
                known.control = Some(stream);
                Verdict::Control
            }
            ports::STREAMS if known.tickets => self.connect_guest(guest, stream),
            port => match known.services.remove(&port) {
                Some(socket) => Verdict::Socket(socket),
                None => Verdict::Refused(Errno::ECONNREFUSED),
            },
        }
    }

    fn established(&mut self, guest: GuestId, stream: StreamKey, socket: Option<BorrowedFd<'_>>) {
        self.stream_is_up(guest, stream, socket);
    }

    fn failed(&mut self, guest: GuestId, stream: StreamKey, errno: Errno) {
        self.stream_failed(guest, stream, errno);
    }

    fn rejected(&mut self, guest: GuestId, stream: StreamKey, socket: OwnedFd) {
        self.dial_rejected(guest, stream, socket);
    }

    fn renamed(&mut self, guest: GuestId, from: StreamKey, to: StreamKey) {
        self.rename_stream(guest, from, to);
    }

    fn ended(&mut self, guest: GuestId, stream: StreamKey, end: End) {
        if self.guests.all.get(&guest).is_some_and(|known| known.control == Some(stream)) {
            // Its runner is gone. What it listened for nobody serves; streams that are up live on.
            self.control_ended(guest);
        } else {
            self.stream_ended(guest, stream, end);
        }
    }

    fn sent(&mut self, guest: GuestId, ticket: u64, result: Result<Option<u64>, Errno>) {
        self.file_sent(guest, ticket, result);
    }

    fn control(&mut self, guest: GuestId, bytes: &[u8]) -> Result<(), String> {
        self.control_came(guest, bytes)
    }

    fn control_output(&mut self, guest: GuestId) -> Option<&mut Vec<u8>> {
        self.guests.all.get_mut(&guest).filter(|guest| guest.control.is_some()).map(|guest| &mut guest.output)
    }

    fn gone(&mut self, guest: GuestId) {
        self.clear_guest(guest);
        self.guests.order(Order::Restarted(guest));
    }
}
