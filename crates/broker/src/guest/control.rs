//! What a guest's runner says on its control stream.

use super::{Call, MAX_ORDERS, MAX_OUTPUT, Order};
use crate::broker::Broker;
use crate::streams::release;
use kso_devices::vsock::{End, GuestId};
use kso_wire::frame::Frames;
use kso_wire::guest::{GuestReply, GuestRequest, ToGuest, ToHost};
use kso_wire::{Caller, Errno, Failure, VERSION, Welcome};

impl Broker {
    /// Bytes of a control stream came.
    pub(super) fn control_came(&mut self, id: GuestId, bytes: &[u8]) -> Result<(), String> {
        let Some(guest) = self.guests.all.get_mut(&id) else { return Err("there is no such guest".into()) };
        guest.frames.push(bytes);
        loop {
            let Some(guest) = self.guests.all.get_mut(&id) else { return Ok(()) };
            let message = guest.frames.next_message::<ToHost>();
            let Some(message) = message.map_err(|error| error.to_string())? else { break };
            self.message(id, message)?;
        }
        match self.guests.all.get(&id) {
            Some(guest) if guest.output.len() > MAX_OUTPUT => Err("it does not read its answers".into()),
            _ => Ok(()),
        }
    }

    fn message(&mut self, id: GuestId, message: ToHost) -> Result<(), String> {
        let Some(guest) = self.guests.all.get_mut(&id) else { return Ok(()) };
        match message {
            ToHost::Hello { version, datagram_segments } if !guest.welcomed => {
                guest.welcomed = true;
                guest.datagram_segments = datagram_segments;
                if version == VERSION {
                    let welcome = Welcome { version, session: guest.session.0 };
                    guest.tell(&ToGuest::Welcome(welcome));
                    return Ok(());
                }
                let reason = format!(
                    "this broker speaks version {VERSION} of the protocol, not {version}: use the same version of kso"
                );
                guest.tell(&ToGuest::Refused(reason.clone()));
                guest.welcomed = false;
                tracing::warn!(guest = id.0, reason, "a guest was refused");
                Ok(())
            }
            ToHost::Hello { .. } => Err("it said hello twice".into()),
            _ if !guest.welcomed => Err("it did not say hello".into()),
            ToHost::Prepare(prepare) => {
                guest.prepared.insert(prepare);
                Ok(())
            }
            ToHost::Abandon { local_port } => {
                guest.prepared.take(local_port);
                if let Some(key) = guest.connecting.remove(&local_port) {
                    let end = End { bytes_out: 0, bytes_in: 0, errno: Some(Errno::ECONNABORTED) };
                    self.forget_stream(id, key, Some(end));
                    self.guests.order(Order::Abandon(id, key));
                }
                Ok(())
            }
            ToHost::Ask { id: ask, caller, request } => {
                if let Some(result) = self.asked(id, ask, &caller, request)
                    && let Some(guest) = self.guests.all.get_mut(&id)
                {
                    guest.tell(&ToGuest::Answered { id: ask, result });
                }
                Ok(())
            }
        }
    }

    /// Does what is asked. `None`: it is answered later.
    fn asked(
        &mut self,
        id: GuestId,
        ask: u64,
        caller: &Caller,
        request: GuestRequest,
    ) -> Option<Result<GuestReply, Failure>> {
        Some(match request {
            GuestRequest::Listen { listen, vsock_port } => {
                self.listen_for_guest(id, caller, &listen, vsock_port)
            }
            GuestRequest::Unlisten(vsock_port) => {
                self.unlisten(id, vsock_port);
                Ok(GuestReply::Done)
            }
            GuestRequest::Release(address) => {
                let session = self.session_of(id);
                if let Some(session) = session.and_then(|session| self.sessions.get_mut(&session.0)) {
                    release(session, address);
                }
                Ok(GuestReply::Done)
            }
            GuestRequest::Stream(..) | GuestRequest::SendFile(_) | GuestRequest::StopSending(..)
                if self.guests.orders.len() >= MAX_ORDERS =>
            {
                Err(Failure::kernel(Errno::ENOBUFS))
            }
            GuestRequest::SendFile(what) => {
                self.guests.order(Order::SendFile(id, ask, what));
                return None;
            }
            GuestRequest::StopSending(stream, sending) => {
                self.guests.order(Order::StopSending(id, stream, sending));
                Ok(GuestReply::Done)
            }
            GuestRequest::Stream(stream, call) => {
                self.guests.order(Order::Call(id, Call { id: ask, stream, call }));
                return None;
            }
        })
    }

    /// The control stream is over.
    pub(super) fn control_ended(&mut self, id: GuestId) {
        self.unlisten_all(id);
        // Another may come, whose packets need another stream.
        self.guests.order(Order::Restarted(id));
        if let Some(guest) = self.guests.all.get_mut(&id) {
            guest.control = None;
            guest.welcomed = false;
            guest.frames = Frames::default();
            guest.output = Vec::new();
            guest.prepared = super::Prepared::default();
        }
    }
}
