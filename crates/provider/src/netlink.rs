//! As much of netlink(7) as is needed: requests, dumps, notifications, attributes.

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// `sizeof(struct nlmsghdr)`.
const HEADER: usize = 16;
/// `NLMSG_ERROR`.
const ERROR: u16 = 2;
/// `NLMSG_DONE`.
const DONE: u16 = 3;
/// `NLM_F_REQUEST | NLM_F_DUMP`.
const REQUEST_DUMP: u16 = 0x301;
/// `NLM_F_REQUEST | NLM_F_ACK`.
const REQUEST_ACK: u16 = 0x5;
/// Room for one read; the kernel fills at most 32 KiB at a time in a dump (net/netlink/af_netlink.c).
const READ: usize = 32 * 1024;
/// A dump of more parts than this is given up: it would not end.
const MAX_PARTS: usize = 65_536;

/// A netlink socket.
#[derive(Debug)]
pub struct Netlink {
    socket: OwnedFd,
}

/// One message: its type and what follows the header.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    pub kind: u16,
    pub body: &'a [u8],
}

impl Netlink {
    /// Opens a socket that is told of `groups` (a mask); 0 for requests only.
    pub fn open(protocol: Option<Protocol>, groups: u32) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol)?;
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, groups))?;
        Ok(Self { socket })
    }

    /// Asks for everything, and calls `each` with every part. The kernel answers while it is asked, so this
    /// does not wait.
    pub fn dump(&self, kind: u16, body: &[u8], mut each: impl FnMut(Message<'_>)) -> io::Result<()> {
        let length = u32::try_from(HEADER + body.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut request = Vec::with_capacity(HEADER + body.len());
        request.extend_from_slice(&length.to_ne_bytes());
        request.extend_from_slice(&kind.to_ne_bytes());
        request.extend_from_slice(&REQUEST_DUMP.to_ne_bytes());
        request.extend_from_slice(&[0; 8]);
        request.extend_from_slice(body);
        rustix::net::send(&self.socket, &request, SendFlags::empty())?;
        let mut buffer = vec![0; READ];
        for _ in 0..MAX_PARTS {
            let mut end = None;
            let read = self.receive(&mut buffer)?;
            for message in messages(read) {
                match message.kind {
                    DONE => end = Some(Ok(())),
                    ERROR => end = Some(Err(failure(message.body))),
                    _ => each(message),
                }
            }
            if let Some(end) = end {
                return end;
            }
        }
        Err(io::Error::other("a dump without an end"))
    }

    /// Asks for a change, and for the kernel's word on it. The kernel answers while it is asked.
    pub fn change(&self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        let length = u32::try_from(HEADER + body.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut request = Vec::with_capacity(HEADER + body.len());
        request.extend_from_slice(&length.to_ne_bytes());
        request.extend_from_slice(&kind.to_ne_bytes());
        request.extend_from_slice(&(REQUEST_ACK | flags).to_ne_bytes());
        request.extend_from_slice(&[0; 8]);
        request.extend_from_slice(body);
        rustix::net::send(&self.socket, &request, SendFlags::empty())?;
        let mut buffer = vec![0; READ];
        let read = self.receive(&mut buffer)?;
        match messages(read).find(|message| message.kind == ERROR) {
            // An error of zero is the acknowledgement.
            Some(message) if number(message.body, 0) == Some(0) => Ok(()),
            Some(message) => Err(failure(message.body)),
            None => Err(io::Error::other("the kernel did not answer")),
        }
    }

    /// Calls `each` with every notification that is there. `ENOBUFS` says that some were lost.
    pub fn notifications(&self, buffer: &mut [u8], mut each: impl FnMut(Message<'_>)) -> io::Result<()> {
        loop {
            match self.receive(buffer) {
                Ok(read) => messages(read).for_each(&mut each),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn receive<'a>(&self, buffer: &'a mut [u8]) -> io::Result<&'a [u8]> {
        let (read, _) = rustix::net::recv(&self.socket, &mut *buffer, RecvFlags::empty())?;
        Ok(buffer.get(..read).unwrap_or_default())
    }
}

impl AsFd for Netlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn failure(body: &[u8]) -> io::Error {
    let code = number(body, 0).map_or(0, u32::cast_signed);
    io::Error::from_raw_os_error(code.saturating_neg())
}

/// The messages in what was read.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let length = usize::try_from(number(bytes, 0)?).ok()?;
        let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
        let body = bytes.get(HEADER..length)?;
        bytes = bytes.get(aligned(length)..).unwrap_or_default();
        Some(Message { kind, body })
    })
}

/// The attributes in `bytes`: type and value (rtnetlink(7)).
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?);
        let value = bytes.get(4..length)?;
        bytes = bytes.get(aligned(length)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}

/// The number at `offset` in the kernel's own order.
pub fn number(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(offset..)?.first_chunk()?))
}

/// The long number at `offset` in the kernel's own order.
pub fn long(bytes: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(*bytes.get(offset..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_cut_off_is_left_out() {
        for length in 0..64_u32 {
            let mut bytes = vec![0xff; 40];
            bytes.splice(..4, length.to_ne_bytes());
            for message in messages(&bytes) {
                for _ in attributes(message.body) {}
            }
            for _ in attributes(&bytes) {}
        }
    }
}
