//! Bytes that tell where they are in a stream.

use std::io::{Read, Result, Write};

/// Prime, so that no power of two repeats it.
const PERIOD: usize = 65_521;

pub struct Pattern(Vec<u8>);

impl Pattern {
    pub fn new(seed: u64) -> Self {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        };
        let mut bytes: Vec<u8> = (0..PERIOD).map(|_| next()).collect();
        bytes.extend_from_within(..);
        Pattern(bytes)
    }

    fn at(&self, offset: u64, most: usize) -> &[u8] {
        let start = (offset % PERIOD as u64) as usize;
        &self.0[start..start + most.min(PERIOD)]
    }

    pub fn send(&self, to: &mut impl Write, bytes: u64, piece: usize) -> Result<()> {
        let mut offset = 0;
        while offset < bytes {
            let part = self.at(offset, piece.min((bytes - offset) as usize));
            to.write_all(part)?;
            offset += part.len() as u64;
        }
        Ok(())
    }

    /// Reads to the end, or so many bytes; how many were right. Panics at the first wrong one.
    pub fn check(&self, from: &mut impl Read, bytes: u64, piece: usize) -> Result<u64> {
        let mut buffer = vec![0; piece.min(PERIOD)];
        let mut offset = 0;
        while offset < bytes {
            let most = buffer.len().min((bytes - offset) as usize);
            let count = from.read(&mut buffer[..most])?;
            if count == 0 {
                break;
            }
            assert!(buffer[..count] == *self.at(offset, count), "wrong bytes near {offset}");
            offset += count as u64;
        }
        Ok(offset)
    }
}
