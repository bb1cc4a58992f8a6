//! One connection of a VMM, and the socket it is joined to.
//!
//! ```text
//!   Ticket --8 bytes--> Connecting --up--> Open --both ends finished, or one broke--> over
//!   Dialled --"OK port\n"--> Open             Service: as Open, but nobody asks
//!   Control: messages to and from the broker
//! ```

use super::errno_of;
use crate::vsock::{GuestId, Outside};
use kso_wire::Errno;
use kso_wire::guest::StreamKey;
use rustix::net::{RecvFlags, SendFlags, Shutdown};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Bytes that one direction holds at most.
const BUFFER: usize = 64 * 1024;
/// Longest answer to CONNECT, bytes.
const MAX_LINE: usize = 32;
/// So many bytes of a control stream are taken before others have their turn.
const CONTROL: usize = 16 * 1024;

#[derive(Debug)]
pub(super) enum Role {
    Ticket(Vec<u8>),
    Connecting(StreamKey),
    Dialled { key: StreamKey, line: Vec<u8> },
    Open(StreamKey),
    Service,
    Control,
}

/// How far a link went.
#[derive(Debug)]
pub(super) enum Progress {
    /// Nothing more now.
    Waits,
    /// The ticket is here.
    Requested(u64),
    /// The connection outside is up.
    Up(StreamKey),
    /// It is not.
    Failed(StreamKey, Errno),
    /// The guest took what was dialled; the VMM gave it this port.
    Taken(StreamKey, u32),
    /// The guest did not.
    Rejected(StreamKey),
    /// All is over.
    Over(Option<StreamKey>, Option<Errno>),
    /// The control stream is over.
    Gone(Option<String>),
}

/// One direction.
#[derive(Debug, Default)]
struct Pipe {
    bytes: Vec<u8>,
    sent: usize,
    total: u64,
    ended: bool,
    shut: bool,
}

impl Pipe {
    /// Moves what can be moved. True: something was.
    fn pump(&mut self, from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<bool, rustix::io::Errno> {
        let mut moved = false;
        if !self.ended && self.bytes.len() < BUFFER {
            let mut buffer = [0; 16 * 1024];
            match rustix::net::recv(from, &mut buffer, RecvFlags::DONTWAIT) {
                Ok((0, _)) => {
                    self.ended = true;
                    moved = true;
                }
                Ok((count, _)) => {
                    self.bytes.extend_from_slice(buffer.get(..count).unwrap_or_default());
                    moved = true;
                }
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        moved |= self.flush(to)?;
        if self.ended && self.bytes.is_empty() && !self.shut {
            self.shut = true;
            let _ = rustix::net::shutdown(to, Shutdown::Write);
        }
        Ok(moved)
    }

    fn flush(&mut self, to: BorrowedFd<'_>) -> Result<bool, rustix::io::Errno> {
        let mut moved = false;
        while let Some(rest) = self.bytes.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match rustix::net::send(to, rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => {
                    self.sent += count;
                    self.total += count as u64;
                    moved = true;
                }
                Err(rustix::io::Errno::AGAIN) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        if self.sent == self.bytes.len() {
            self.bytes.clear();
            self.sent = 0;
        }
        Ok(moved)
    }
}

#[derive(Debug)]
pub(super) struct Link {
    pub guest: GuestId,
    pub near: OwnedFd,
    pub far: Option<OwnedFd>,
    pub role: Role,
    out: Pipe,
    inward: Pipe,
    /// Bytes of our own that went inwards.
    own: u64,
}

impl Link {
    pub fn new(guest: GuestId, near: OwnedFd, role: Role) -> Self {
        Self { guest, near, far: None, role, out: Pipe::default(), inward: Pipe::default(), own: 0 }
    }

    /// Bytes that the guest sent.
    pub fn bytes_out(&self) -> u64 {
        self.out.total
    }

    /// Bytes that the guest was given.
    pub fn bytes_in(&self) -> u64 {
        self.inward.total.saturating_sub(self.own)
    }

    /// Says something to the VMM before anything else.
    pub fn greet(&mut self, bytes: &[u8]) {
        self.own += bytes.len() as u64;
        self.inward.bytes.extend_from_slice(bytes);
        let _ = self.inward.flush(self.near.as_fd());
    }

    /// Says something to the guest before what comes from outside.
    pub fn answer(&mut self, bytes: &[u8]) {
        self.greet(bytes);
    }

    pub fn run(&mut self, outside: &mut dyn Outside) -> Progress {
        match &mut self.role {
            Role::Ticket(bytes) => match read_some(&self.near, bytes, 8) {
                Some(Ok(())) => {
                    Progress::Requested(bytes.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes)))
                }
                Some(Err(_)) => Progress::Over(None, None),
                None => Progress::Waits,
            },
            Role::Connecting(key) => connected(self.far.as_ref(), *key),
            Role::Dialled { key, line } => {
                let key = *key;
                if self.inward.flush(self.near.as_fd()).is_err() {
                    return Progress::Rejected(key);
                }
                while !line.ends_with(b"\n") {
                    let more = line.len() + 1;
                    match read_some(&self.near, line, more) {
                        Some(Ok(())) if line.len() <= MAX_LINE => {}
                        Some(_) => return Progress::Rejected(key),
                        None => return Progress::Waits,
                    }
                }
                match std::str::from_utf8(line)
                    .ok()
                    .and_then(|line| line.trim_end().strip_prefix("OK ")?.parse().ok())
                {
                    Some(port) => Progress::Taken(key, port),
                    None => Progress::Rejected(key),
                }
            }
            Role::Open(key) => {
                let key = *key;
                self.relay(Some(key))
            }
            Role::Service => self.relay(None),
            Role::Control => self.control(outside),
        }
    }

    fn relay(&mut self, key: Option<StreamKey>) -> Progress {
        let Some(far) = &self.far else { return Progress::Over(key, None) };
        loop {
            // The guest's end broke: nobody is there to be told an error.
            let Ok(out) = self.out.pump(self.near.as_fd(), far.as_fd()).map_err(|error| (error, true)) else {
                return Progress::Over(key, broken(far));
            };
            let inward = match self.inward.pump(far.as_fd(), self.near.as_fd()) {
                Ok(inward) => inward,
                Err(error) => return Progress::Over(key, Some(errno_of(error))),
            };
            if self.out.shut && self.inward.shut {
                return Progress::Over(key, None);
            }
            if !out && !inward {
                return Progress::Waits;
            }
        }
    }

    fn control(&mut self, outside: &mut dyn Outside) -> Progress {
        let mut taken = 0;
        while taken < CONTROL {
            let mut buffer = [0; 4096];
            match rustix::net::recv(&self.near, &mut buffer, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Progress::Gone(None),
                Ok((count, _)) => {
                    taken += count;
                    if let Err(reason) = outside.control(self.guest, buffer.get(..count).unwrap_or_default())
                    {
                        return Progress::Gone(Some(reason));
                    }
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => break,
                Err(_) => return Progress::Gone(None),
            }
        }
        while let Some(output) = outside.control_output(self.guest).filter(|output| !output.is_empty()) {
            match rustix::net::send(&self.near, output, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => drop(output.drain(..count)),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => break,
                Err(_) => return Progress::Gone(None),
            }
        }
        Progress::Waits
    }
}

/// The error of a socket outside, if it has one.
fn broken(far: &OwnedFd) -> Option<Errno> {
    match kso_sys::take_error(far.as_fd()) {
        Ok(0) | Err(_) => None,
        Ok(number) => Some(kso_sys::errno::from_raw(number)),
    }
}

fn connected(far: Option<&OwnedFd>, key: StreamKey) -> Progress {
    let Some(far) = far else { return Progress::Failed(key, Errno::ECONNRESET) };
    match kso_sys::take_error(far.as_fd()) {
        Ok(0) => {}
        Ok(number) => return Progress::Failed(key, kso_sys::errno::from_raw(number)),
        Err(error) => return Progress::Failed(key, kso_sys::errno::of(&error)),
    }
    match rustix::net::getpeername(far) {
        Ok(_) => Progress::Up(key),
        Err(rustix::io::Errno::NOTCONN) => Progress::Waits,
        Err(error) => Progress::Failed(key, errno_of(error)),
    }
}

/// Reads until there are `wanted` bytes, and not one more. `None`: not yet.
fn read_some(near: &OwnedFd, bytes: &mut Vec<u8>, wanted: usize) -> Option<Result<(), ()>> {
    while bytes.len() < wanted {
        let mut buffer = [0; 8];
        let most = (wanted - bytes.len()).min(buffer.len());
        let Some(room) = buffer.get_mut(..most) else { break };
        match rustix::net::recv(near, room, RecvFlags::DONTWAIT) {
            Ok((0, _)) => return Some(Err(())),
            Ok((count, _)) => bytes.extend_from_slice(buffer.get(..count).unwrap_or_default()),
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => return None,
            Err(_) => return Some(Err(())),
        }
    }
    Some(Ok(()))
}
