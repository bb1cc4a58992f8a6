//! Carries packets between the TUN and the packets stream, as frames.
//!
//! A packet that finds no room waits in the TUN, whose queue has an end: the kernel drops what comes after, as any
//! network does.

use kso_sys::tun::{Tun, VNET_HEADER};
use kso_wire::frame::{Frames, HEADER, MAX_FRAME};
use rustix::event::PollFlags;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// The longest packet, with its header.
const MAX_PACKET: usize = 65_536 + VNET_HEADER;
/// Bytes gathered before they are sent; a packet that does not fit any more waits.
const BATCH: usize = 256 * 1024;
/// Packets read from the TUN at a time, before others get their turn.
const TURN: usize = 64;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Packets {
    /// `None`: the guest has none.
    tun: Option<Tun>,
    /// `None`: the outside is gone.
    stream: Option<OwnedFd>,
    /// Frames on their way out, from `sent` to `filled`.
    outgoing: Vec<u8>,
    sent: usize,
    filled: usize,
    incoming: Frames,
    buffer: Vec<u8>,
}

impl Packets {
    pub(super) fn new(both: Option<(Tun, OwnedFd)>) -> Self {
        let (tun, stream) = both.unzip();
        let size = if tun.is_some() { BATCH } else { 0 };
        Self {
            tun,
            stream,
            outgoing: vec![0; size],
            sent: 0,
            filled: 0,
            incoming: Frames::default(),
            buffer: vec![0; size],
        }
    }

    /// The TUN, and what to wait for on it.
    pub(super) fn tun(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let wanted = if self.stream.is_some() && self.sent == self.filled {
            PollFlags::IN
        } else {
            PollFlags::empty()
        };
        self.tun.as_ref().map(|tun| (tun.as_fd(), wanted))
    }

    /// The stream, and what to wait for on it.
    pub(super) fn stream(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let out = if self.sent < self.filled { PollFlags::OUT } else { PollFlags::empty() };
        self.stream.as_ref().map(|stream| (stream.as_fd(), PollFlags::IN | out))
    }

    /// Sends what the TUN has.
    pub(super) fn send(&mut self) {
        if self.sent == self.filled {
            self.gather();
        }
        while let Some(stream) = &self.stream
            && let Some(bytes) = self.outgoing.get(self.sent..self.filled)
            && !bytes.is_empty()
        {
            match send(stream, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(0) | Err(rustix::io::Errno::AGAIN) => return,
                Ok(sent) => self.sent += sent,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => self.lose(&error.to_string()),
            }
        }
    }

    fn gather(&mut self) {
        (self.sent, self.filled) = (0, 0);
        let Some(tun) = &self.tun else { return };
        // Without a header of the device's there is an empty one.
        let header = if tun.has_vnet_header() { 0 } else { VNET_HEADER };
        for _ in 0..TURN {
            let Some(room) = self.outgoing.get_mut(self.filled..) else { return };
            if room.len() < HEADER + MAX_PACKET {
                return;
            }
            let Some(packet) = room.get_mut(HEADER + header..) else { return };
            let Ok(read) = rustix::io::read(tun, packet) else { return };
            if let Some(empty) = room.get_mut(HEADER..HEADER + header) {
                empty.fill(0);
            }
            let length = u32::try_from(header + read).unwrap_or(0).to_le_bytes();
            if let Some(place) = room.get_mut(..HEADER) {
                place.copy_from_slice(&length);
            }
            self.filled += HEADER + header + read;
        }
    }

    /// Takes what came by the stream.
    pub(super) fn receive(&mut self) {
        let Some(stream) = &self.stream else { return };
        match recv(stream, &mut self.buffer, RecvFlags::DONTWAIT) {
            Ok((0, _)) => self.lose("it was closed"),
            Ok((read, _)) => {
                self.incoming.push(self.buffer.get(..read).unwrap_or_default());
                self.deliver();
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Err(error) => self.lose(&error.to_string()),
        }
    }

    fn deliver(&mut self) {
        let Some(tun) = &self.tun else { return };
        let header = if tun.has_vnet_header() { 0 } else { VNET_HEADER };
        loop {
            match self.incoming.next_bytes() {
                Ok(Some(frame)) => {
                    if let Some(packet) = frame.get(header..) {
                        // What the kernel does not take (a malformed packet, no memory) is lost, as on any network.
                        let _ = rustix::io::write(tun, packet);
                    }
                }
                Ok(None) => return,
                Err(error) => return self.lose(&error.to_string()),
            }
        }
    }

    fn lose(&mut self, reason: &str) {
        if self.stream.take().is_some() {
            tracing::warn!(reason, "the packets stream is lost: no datagram leaves or comes any more");
        }
        (self.sent, self.filled) = (0, 0);
        self.incoming = Frames::default();
    }
}

const _: () = assert!(HEADER + MAX_PACKET <= BATCH && MAX_PACKET <= MAX_FRAME);
