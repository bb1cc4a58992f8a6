//! Frames of a byte stream: a length of four bytes, little-endian, and so many bytes.
//!
//! ```text
//!   Frames: bytes in --push--> whole frames --next_message--> a message, or the reason to drop the peer
//! ```

use crate::codec::{Bounded, CodecError};
use serde::{Serialize, de::DeserializeOwned};

/// Bytes of a frame's length.
pub const HEADER: usize = 4;
/// Longest frame, bytes: the longest IP packet with its virtio-net header fits, and the longest message.
pub const MAX_FRAME: usize = 1 << 20;

/// Appends a message as a frame.
///
/// # Errors
/// [`CodecError::TooLong`], [`CodecError::Bound`].
pub fn append<T: Serialize + Bounded>(message: &T, buffer: &mut Vec<u8>) -> Result<(), CodecError> {
    if let Some(field) = message.over_bound() {
        return Err(CodecError::Bound(field));
    }
    let bytes = postcard::to_stdvec(message).map_err(CodecError::Malformed)?;
    append_bytes(&bytes, buffer)
}

/// Appends bytes as a frame.
///
/// # Errors
/// [`CodecError::TooLong`].
pub fn append_bytes(bytes: &[u8], buffer: &mut Vec<u8>) -> Result<(), CodecError> {
    let length = u32::try_from(bytes.len()).ok().filter(|_| bytes.len() <= MAX_FRAME);
    let length = length.ok_or(CodecError::TooLong(bytes.len()))?;
    buffer.extend_from_slice(&length.to_le_bytes());
    buffer.extend_from_slice(bytes);
    Ok(())
}

/// Takes frames out of a byte stream. Holds at most one unfinished frame and what was pushed after it.
#[derive(Debug, Default)]
pub struct Frames {
    bytes: Vec<u8>,
    /// Consumed already.
    start: usize,
}

impl Frames {
    /// Adds bytes as they came.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start > 0 && (self.start == self.bytes.len() || self.start > MAX_FRAME) {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole frame, if there is one.
    ///
    /// # Errors
    /// [`CodecError::TooLong`]: the peer is to be dropped.
    pub fn next_bytes(&mut self) -> Result<Option<&[u8]>, CodecError> {
        let rest = self.bytes.get(self.start..).unwrap_or_default();
        let Some((length, rest)) = rest.split_first_chunk::<HEADER>() else { return Ok(None) };
        let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
        if length > MAX_FRAME {
            return Err(CodecError::TooLong(length));
        }
        let Some(frame) = rest.get(..length) else { return Ok(None) };
        self.start += HEADER + length;
        Ok(Some(frame))
    }

    /// Whether [`Self::next_bytes`] has something to say.
    #[must_use]
    pub fn has_frame(&self) -> bool {
        let rest = self.bytes.get(self.start..).unwrap_or_default();
        rest.split_first_chunk::<HEADER>().is_some_and(|(length, rest)| {
            let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
            length > MAX_FRAME || length <= rest.len()
        })
    }

    /// The next whole message, if there is one.
    ///
    /// # Errors
    /// It is malformed or over a bound: the peer is to be dropped.
    pub fn next_message<T: DeserializeOwned + Bounded>(&mut self) -> Result<Option<T>, CodecError> {
        let Some(frame) = self.next_bytes()? else { return Ok(None) };
        let (message, rest): (T, _) = postcard::take_from_bytes(frame).map_err(CodecError::Malformed)?;
        if !rest.is_empty() {
            return Err(CodecError::Trailing(rest.len()));
        }
        match message.over_bound() {
            Some(field) => Err(CodecError::Bound(field)),
            None => Ok(Some(message)),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use crate::guest::ToHost;

    #[test]
    fn frames_come_out_whole_however_they_came_in() {
        let mut bytes = Vec::new();
        append(&ToHost::Hello { version: 7, datagram_segments: false }, &mut bytes).unwrap();
        append_bytes(b"", &mut bytes).unwrap();
        append_bytes(b"abc", &mut bytes).unwrap();
        for step in 1..bytes.len() {
            let mut frames = Frames::default();
            let mut seen = Vec::new();
            for part in bytes.chunks(step) {
                frames.push(part);
                while let Some(frame) = frames.next_bytes().unwrap() {
                    seen.push(frame.to_vec());
                }
            }
            assert_eq!(seen.len(), 3);
            assert_eq!(seen[1..], [b"".to_vec(), b"abc".to_vec()]);
        }
        let mut frames = Frames::default();
        frames.push(&bytes);
        assert_eq!(
            frames.next_message::<ToHost>().unwrap(),
            Some(ToHost::Hello { version: 7, datagram_segments: false })
        );
        assert!(frames.next_message::<ToHost>().is_err(), "an empty frame is no message");
    }

    #[test]
    fn a_frame_that_is_too_long_is_refused_before_it_is_gathered() {
        let mut frames = Frames::default();
        frames.push(&u32::MAX.to_le_bytes());
        assert!(frames.next_bytes().is_err());
        assert!(append_bytes(&vec![0; MAX_FRAME + 1], &mut Vec::new()).is_err());
    }
}
