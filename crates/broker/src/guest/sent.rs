//! Files that the device sends for guests.

use crate::broker::Broker;
use kso_devices::vsock::GuestId;
use kso_wire::guest::{GuestReply, ToGuest};
use kso_wire::{Errno, Failure};

impl Broker {
    /// Answers a guest's request to send a part of a file.
    pub(super) fn file_sent(&mut self, guest: GuestId, ask: u64, result: Result<Option<u64>, Errno>) {
        if let Ok(Some(bytes)) = result {
            let totals = &mut self.shared.totals;
            totals.files_sent += 1;
            totals.file_bytes_sent = totals.file_bytes_sent.saturating_add(bytes);
        }
        let reply = result.map_err(Failure::kernel).map(|sent| match sent {
            // No file is so long.
            Some(bytes) => GuestReply::Value(i64::try_from(bytes).unwrap_or(i64::MAX)),
            None => GuestReply::StayInside,
        });
        self.guests.tell(guest, &ToGuest::Answered { id: ask, result: reply });
    }
}
