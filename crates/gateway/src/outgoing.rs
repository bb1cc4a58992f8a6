//! Datagrams of one flow that leave together.

use crate::table::Token;
use kso_sys::datagram::{MAX_SEGMENTS, MAX_SEND, Message};
use std::io::IoSlice;

/// The most bytes sent by one call in segments.
const MAX_TRAIN: usize = 65_000;

/// Datagrams of one flow on their way out, so that they leave together.
#[derive(Debug)]
pub struct Outgoing<'a> {
    pub(crate) token: Option<Token>,
    pub(crate) slices: [IoSlice<'a>; MAX_SEND],
    /// Bytes of each datagram within the slice, 0 for all of it.
    pub(crate) units: [u16; MAX_SEND],
    pub(crate) count: usize,
}

impl Default for Outgoing<'_> {
    fn default() -> Self {
        Self { token: None, slices: [IoSlice::new(&[]); MAX_SEND], units: [0; MAX_SEND], count: 0 }
    }
}

impl<'a> Outgoing<'a> {
    /// Adds a datagram, or several of `segment` bytes.
    pub(crate) fn push(&mut self, payload: &'a [u8], segment: Option<u16>) {
        if let (Some(slice), Some(unit)) = (self.slices.get_mut(self.count), self.units.get_mut(self.count)) {
            *slice = IoSlice::new(payload);
            *unit = segment.unwrap_or(0);
            self.count += 1;
        }
    }

    /// Groups the slices from `from` on into messages: datagrams of one size (the last may be shorter) are one.
    pub(crate) fn messages(&self, from: usize, limit: usize) -> ([Message; MAX_SEND], usize) {
        let mut messages = [Message::default(); MAX_SEND];
        let mut count = 0_usize;
        let (mut unit, mut bytes, mut datagrams, mut closed) = (0, 0, 0, true);
        let slices = self.slices.iter().zip(&self.units).take(self.count).skip(from);
        for (slice, segment) in slices {
            let own = if *segment == 0 { slice.len() } else { usize::from(*segment) };
            let more = slice.len().div_ceil(own.max(1));
            let goes = !closed
                && own > 0
                && own <= limit
                && (own == unit || own == slice.len() && own < unit)
                && bytes + slice.len() <= MAX_TRAIN
                && datagrams + more <= MAX_SEGMENTS;
            if goes && let Some(message) = count.checked_sub(1).and_then(|last| messages.get_mut(last)) {
                message.slices += 1;
                message.segment = unit as u16;
                bytes += slice.len();
                datagrams += more;
                closed = own < unit || !slice.len().is_multiple_of(unit);
            } else if let Some(message) = messages.get_mut(count) {
                *message = Message { slices: 1, segment: *segment };
                (unit, bytes, datagrams) = (own, slice.len(), more);
                closed = own == 0 || own > limit || !slice.len().is_multiple_of(own);
                count += 1;
            }
        }
        (messages, count)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    fn grouped(sizes: &[(usize, u16)], limit: usize) -> Vec<(usize, u16)> {
        let bytes = vec![0; 65_535];
        let mut outgoing = Outgoing::default();
        for (size, segment) in sizes {
            outgoing.push(&bytes[..*size], Some(*segment).filter(|segment| *segment != 0));
        }
        let (messages, count) = outgoing.messages(0, limit);
        assert_eq!(messages[..count].iter().map(|message| message.slices).sum::<usize>(), sizes.len());
        messages[..count].iter().map(|message| (message.slices, message.segment)).collect()
    }

    #[test]
    fn datagrams_of_one_size_are_one_message() {
        let any = usize::MAX;
        assert_eq!(grouped(&[(100, 0), (100, 0), (50, 0), (50, 0)], any), [(3, 100), (1, 0)]);
        assert_eq!(grouped(&[(100, 0), (200, 0)], any), [(1, 0), (1, 0)]);
        assert_eq!(grouped(&[(0, 0), (0, 0), (5, 0)], any), [(1, 0), (1, 0), (1, 0)]);
        assert_eq!(grouped(&[(100, 0), (0, 0)], any), [(1, 0), (1, 0)]);
        assert_eq!(grouped(&[(40_000, 0), (40_000, 0)], any), [(1, 0), (1, 0)]);
        assert_eq!(grouped(&[(100, 0), (100, 0)], 99), [(1, 0), (1, 0)]);
        assert_eq!(grouped(&[(10, 0); 64], any), [(64, 10)]);
        // Segments of the sandbox's own.
        assert_eq!(grouped(&[(1000, 100), (1000, 100), (950, 100), (100, 0)], any), [(3, 100), (1, 0)]);
        assert_eq!(grouped(&[(6400, 100), (100, 0)], any), [(1, 100), (1, 0)]);
        assert_eq!(grouped(&[(1000, 100), (1000, 100)], 99), [(1, 100), (1, 100)]);
    }
}
