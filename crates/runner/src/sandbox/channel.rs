//! The socket between supervisor, init and program: small messages with descriptors.

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Longest text of a failure, bytes.
const MAX_TEXT: usize = 1024;
/// Most descriptors in a message.
const MAX_DESCRIPTORS: usize = 3;

/// See the picture in [`super`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    Mapped,
    Mounted,
    Ready,
    Started,
    Filtered,
    Go,
    Failed(String),
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// One end.
#[derive(Debug)]
pub(crate) struct Channel(OwnedFd);

impl Channel {
    pub(crate) fn pair() -> io::Result<(Self, Self)> {
        let (one, other) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Self(one), Self(other)))
    }

    pub(crate) fn send(&self, message: Message, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let (tag, mut text) = match message {
            Message::Mapped => (b'M', String::new()),
            Message::Mounted => (b'V', String::new()),
            Message::Ready => (b'R', String::new()),
            Message::Started => (b'S', String::new()),
            Message::Filtered => (b'N', String::new()),
            Message::Go => (b'G', String::new()),
            Message::Failed(text) => (b'F', text),
        };
        while text.len() > MAX_TEXT {
            text.pop();
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        let parts = [IoSlice::new(std::slice::from_ref(&tag)), IoSlice::new(text.as_bytes())];
        sendmsg(&self.0, &parts, &mut ancillary, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// The next message. `None`: the other end is gone.
    pub(crate) fn receive(&self) -> io::Result<Option<(Message, VecDeque<OwnedFd>)>> {
        let mut bytes = [0; MAX_TEXT + 1];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received =
            recvmsg(&self.0, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
        let mut descriptors = VecDeque::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                descriptors.extend(received);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            return Err(io::Error::from(io::ErrorKind::InvalidData));
        }
        let Some((tag, text)) = bytes.get(..received.bytes).and_then(<[u8]>::split_first) else {
            return Ok(None);
        };
        let message = match tag {
            b'M' => Message::Mapped,
            b'V' => Message::Mounted,
            b'R' => Message::Ready,
            b'S' => Message::Started,
            b'N' => Message::Filtered,
            b'G' => Message::Go,
            b'F' => Message::Failed(String::from_utf8_lossy(text).into_owned()),
            _ => return Err(io::Error::from(io::ErrorKind::InvalidData)),
        };
        Ok(Some((message, descriptors)))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn messages_and_descriptors_arrive_in_order_and_the_end_is_seen() {
        let (one, other) = Channel::pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        one.send(Message::Ready, &[file.as_fd(), file.as_fd(), file.as_fd()]).unwrap();
        one.send(Message::Failed("no".into()), &[]).unwrap();
        drop(one);
        let (message, descriptors) = other.receive().unwrap().unwrap();
        assert_eq!((message, descriptors.len()), (Message::Ready, 3));
        assert_eq!(other.receive().unwrap().unwrap().0, Message::Failed("no".into()));
        assert!(other.receive().unwrap().is_none());
    }
}
