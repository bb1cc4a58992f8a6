//! Bytes of a message: one datagram of a `SOCK_SEQPACKET` socket, or one frame of a stream.
//!
//! A message is `postcard`, preceded by nothing: the transport keeps boundaries. Every length is bounded by
//! [`MAX_MESSAGE`] and by the bounds in [`crate::message`]: those of lists hold while a message is
//! read, the others are checked by [`decode`] after it. The scope of an IPv6 address is not carried: the number
//! of an interface means nothing on another kernel.

use crate::message::{self, ToBroker, ToRunner};
use crate::{guest, job};
use serde::Serialize;
use serde::de::{Deserialize, DeserializeOwned, Deserializer, Error, SeqAccess, Visitor};
use std::marker::PhantomData;

/// Version of this protocol. A peer with another one is refused by name, not by misunderstanding.
pub const VERSION: u16 = 1;

/// Longest message, bytes: a DNS message of 64 KiB and its envelope.
pub const MAX_MESSAGE: usize = 66 * 1024;

/// Why bytes are not a message, or a message does not fit.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CodecError {
    /// Longer than [`MAX_MESSAGE`].
    #[error("a message of {0} bytes is longer than {MAX_MESSAGE}")]
    TooLong(usize),
    /// Not a message.
    #[error("malformed message: {0}")]
    Malformed(postcard::Error),
    /// Bytes after the end.
    #[error("{0} bytes follow the message")]
    Trailing(usize),
    /// A field is over its bound.
    #[error("{0} is over its bound")]
    Bound(&'static str),
}

/// A message whose fields have bounds.
pub trait Bounded {
    /// Names the field that is over its bound.
    fn over_bound(&self) -> Option<&'static str>;
}

impl Bounded for ToBroker {
    fn over_bound(&self) -> Option<&'static str> {
        match self {
            ToBroker::Hello(hello) => hello_over(hello),
            ToBroker::Guest(guest) if guest.ports.len() > message::MAX_PORTS => Some("ports"),
            ToBroker::Guest(guest) => hello_over(&guest.hello),
            ToBroker::Request { caller, request, .. } => {
                if caller.program.len() > message::MAX_PROGRAM {
                    return Some("program");
                }
                match request {
                    message::Request::Connect(connect) => options_over(&connect.options),
                    message::Request::Listen(listen) => options_over(&listen.options),
                    message::Request::Resolve(bytes) => (bytes.len() > message::MAX_DNS).then_some("query"),
                    _ => None,
                }
            }
            ToBroker::Forget(_) => None,
        }
    }
}

fn hello_over(hello: &message::Hello) -> Option<&'static str> {
    if hello.rules.len() > message::MAX_RULES {
        Some("rules")
    } else if hello.publish.len() > message::MAX_RULES {
        Some("publish")
    } else if hello.rules.iter().any(|(_, text)| text.len() > message::MAX_RULE) {
        Some("rule")
    } else if hello.name.len() > message::MAX_RULE || hello.command.len() > message::MAX_RULE {
        Some("name or command")
    } else {
        None
    }
}

fn options_over(options: &crate::SocketOptions) -> Option<&'static str> {
    (options.len() > crate::SocketOptions::MAX).then_some("options")
}

impl Bounded for guest::ToHost {
    fn over_bound(&self) -> Option<&'static str> {
        let (caller, options) = match self {
            Self::Hello { .. } | Self::Abandon { .. } => return None,
            Self::Prepare(prepare) => (&prepare.caller, Some(&prepare.connect.options)),
            Self::Ask { caller, request: guest::GuestRequest::Listen { listen, .. }, .. } => {
                (caller, Some(&listen.options))
            }
            Self::Ask { request: guest::GuestRequest::SendFile(send), .. }
                if send.share.len() > guest::MAX_SHARE =>
            {
                return Some("share");
            }
            Self::Ask { caller, .. } => (caller, None),
        };
        if caller.program.len() > message::MAX_PROGRAM {
            return Some("program");
        }
        options.and_then(options_over)
    }
}

impl Bounded for guest::ToGuest {
    fn over_bound(&self) -> Option<&'static str> {
        match self {
            Self::Refused(reason) if reason.len() > message::MAX_RULE => Some("reason"),
            Self::Answered { result: Ok(guest::GuestReply::Bytes(bytes)), .. } if bytes.len() > 1024 => {
                Some("bytes")
            }
            _ => None,
        }
    }
}

// The launcher made these itself, or its own init did: a frame's own bound is enough.
impl Bounded for job::ToInit {
    fn over_bound(&self) -> Option<&'static str> {
        match self {
            Self::Start(start) => {
                [start.command.len(), start.environment.len(), start.mounts.len(), start.inside.len()]
                    .iter()
                    .any(|&count| count > job::MAX_WORDS)
                    .then_some("words")
            }
            _ => None,
        }
    }
}

impl Bounded for job::ToLauncher {
    fn over_bound(&self) -> Option<&'static str> {
        match self {
            Self::Failed { reason, .. } if reason.len() > message::MAX_MESSAGE_TEXT => Some("reason"),
            Self::Ready { kernel, .. } if kernel.len() > message::MAX_RULE => Some("kernel"),
            _ => None,
        }
    }
}

impl Bounded for ToRunner {
    fn over_bound(&self) -> Option<&'static str> {
        match self {
            ToRunner::Refused(text) => (text.len() > 4096).then_some("reason"),
            ToRunner::Answered { result: Ok(message::Reply::Resolved(bytes)), .. } => {
                (bytes.len() > message::MAX_DNS).then_some("answer")
            }
            ToRunner::Answered { .. } | ToRunner::Welcome(_) => None,
        }
    }
}

/// The bytes of `message`.
///
/// # Errors
/// A field is over its bound, or the whole is longer than [`MAX_MESSAGE`].
pub fn encode<M: Serialize + Bounded>(message: &M) -> Result<Vec<u8>, CodecError> {
    if let Some(field) = message.over_bound() {
        return Err(CodecError::Bound(field));
    }
    let bytes = postcard::to_stdvec(message).map_err(CodecError::Malformed)?;
    if bytes.len() > MAX_MESSAGE { Err(CodecError::TooLong(bytes.len())) } else { Ok(bytes) }
}

/// The message in `bytes`: exactly one.
///
/// # Errors
/// See [`CodecError`]. Never panics. Texts and bytes take no more memory than their input, and lists stop
/// at their bound before they are made: together less than twice [`MAX_MESSAGE`].
pub fn decode<M: DeserializeOwned + Bounded>(bytes: &[u8]) -> Result<M, CodecError> {
    if bytes.len() > MAX_MESSAGE {
        return Err(CodecError::TooLong(bytes.len()));
    }
    let (message, rest) = postcard::take_from_bytes::<M>(bytes).map_err(CodecError::Malformed)?;
    if !rest.is_empty() {
        return Err(CodecError::Trailing(rest.len()));
    }
    match message.over_bound() {
        Some(field) => Err(CodecError::Bound(field)),
        None => Ok(message),
    }
}

/// Reads a list of at most `MOST` elements, and allocates for no more than that, whatever the sender claims.
pub(crate) fn at_most<'de, T, D, const MOST: usize>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
{
    struct List<T, const MOST: usize>(PhantomData<T>);
    impl<'de, T: Deserialize<'de>, const MOST: usize> Visitor<'de> for List<T, MOST> {
        type Value = Vec<T>;
        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(f, "a list of at most {MOST}")
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
            let mut elements = Vec::with_capacity(list.size_hint().unwrap_or(0).min(MOST));
            while let Some(element) = list.next_element()? {
                if elements.len() == MOST {
                    return Err(A::Error::custom("too many"));
                }
                elements.push(element);
            }
            Ok(elements)
        }
    }
    deserializer.deserialize_seq(List::<T, MOST>(PhantomData))
}

#[cfg(test)]
mod tests;
