//! Descriptor chains as a header and the pieces of a payload (virtio 1.2, 2.7.4: framing is the driver's choice).

use super::packet::{HEADER, Header};
use crate::vhost::{Chain, Memory};
use vm_memory::{GuestMemory, VolatileSlice};

/// A chain that is no vsock packet, or has no room for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Less than a header.
    #[error("a chain without room for a vsock header")]
    Short,
    /// Less payload than the header says.
    #[error("a vsock packet with {0} bytes less payload than it says")]
    Cut(usize),
    /// Outside of the guest's memory.
    #[error("a descriptor points outside of memory")]
    Outside,
}

/// Pieces of guest memory.
pub type Pieces<'m> = Vec<VolatileSlice<'m>>;

/// Calls `each` with the pieces of a chain that the device may write, or may read.
fn pieces<'m>(
    chain: Chain<&'m Memory>,
    memory: &'m Memory,
    writable: bool,
    mut each: impl FnMut(VolatileSlice<'m>) -> Result<(), Malformed>,
) -> Result<(), Malformed> {
    for descriptor in chain.filter(|descriptor| descriptor.is_write_only() == writable) {
        for piece in memory.get_slices(descriptor.addr(), descriptor.len() as usize) {
            each(piece.map_err(|_| Malformed::Outside)?)?;
        }
    }
    Ok(())
}

/// The first `most` bytes of a piece, and what comes after.
fn split(piece: VolatileSlice<'_>, most: usize) -> Result<[VolatileSlice<'_>; 2], Malformed> {
    let (before, after) = piece.split_at(most.min(piece.len())).map_err(|_| Malformed::Outside)?;
    Ok([before, after])
}

/// A packet of the guest; the pieces of its payload are appended, exactly as many bytes as the header says.
///
/// # Errors
/// It is none.
pub fn read<'m>(
    chain: Chain<&'m Memory>,
    memory: &'m Memory,
    payload: &mut Pieces<'m>,
) -> Result<Header, Malformed> {
    let mut bytes = [0; HEADER];
    let mut filled = 0;
    let mut header = None;
    let mut missing = 0;
    pieces(chain, memory, false, |mut piece| {
        if filled < HEADER {
            let [part, rest] = split(piece, HEADER - filled)?;
            filled += part.copy_to(bytes.get_mut(filled..).unwrap_or_default());
            piece = rest;
            if filled == HEADER {
                let parsed = Header::parse(&bytes);
                missing = parsed.len as usize;
                header = Some(parsed);
            }
        }
        let [part, _] = split(piece, missing)?;
        if !part.is_empty() {
            missing -= part.len();
            payload.push(part);
        }
        Ok(())
    })?;
    match header {
        Some(header) if missing == 0 => Ok(header),
        Some(_) => Err(Malformed::Cut(missing)),
        None => Err(Malformed::Short),
    }
}

/// A buffer of the driver for one packet.
#[derive(Debug)]
pub struct Buffer<'m> {
    /// Its head.
    pub head: u16,
    /// Where the header goes: almost always one piece.
    header: Pieces<'m>,
    /// Bytes of payload that fit.
    pub room: usize,
}

impl<'m> Buffer<'m> {
    /// Looks at a chain; the pieces for the payload are appended, at most `most` bytes.
    ///
    /// # Errors
    /// It has no room for a header.
    pub fn new(
        chain: Chain<&'m Memory>,
        memory: &'m Memory,
        most: usize,
        payload: &mut Pieces<'m>,
    ) -> Result<Self, Malformed> {
        let head = chain.head_index();
        let mut header = Vec::with_capacity(1);
        let (mut lacking, mut room) = (HEADER, 0);
        pieces(chain, memory, true, |mut piece| {
            if lacking > 0 {
                let [part, rest] = split(piece, lacking)?;
                lacking -= part.len();
                header.push(part);
                piece = rest;
            }
            let [part, _] = split(piece, most - room)?;
            if !part.is_empty() {
                room += part.len();
                payload.push(part);
            }
            Ok(())
        })?;
        if lacking > 0 {
            return Err(Malformed::Short);
        }
        Ok(Buffer { head, header, room })
    }

    /// Writes the header.
    pub fn write(&self, header: &Header) {
        let bytes = header.bytes();
        let mut rest = bytes.as_slice();
        for piece in &self.header {
            let (part, after) = rest.split_at_checked(piece.len()).unwrap_or((rest, &[]));
            piece.copy_from(part);
            rest = after;
        }
    }
}

/// Appends what the pieces hold to a queue of bytes.
pub fn keep(pieces: &[VolatileSlice<'_>], mut skip: usize, into: &mut impl for<'b> Extend<&'b u8>) {
    let mut chunk = [0; 4096];
    for piece in pieces {
        let mut at = skip.min(piece.len());
        skip -= at;
        while let Ok(rest) = piece.offset(at).map_err(drop) {
            let count = rest.copy_to(&mut chunk);
            if count == 0 {
                break;
            }
            into.extend(chunk.get(..count).unwrap_or_default());
            at += count;
        }
    }
}

/// Copies from pieces to pieces; how many bytes fitted.
pub fn copy(from: &[VolatileSlice<'_>], to: &[VolatileSlice<'_>]) -> usize {
    let mut targets = to.iter();
    let mut target = targets.next().copied();
    let mut copied = 0;
    for piece in from {
        let mut rest = *piece;
        while !rest.is_empty() {
            let Some(room) = target.filter(|target| !target.is_empty()) else {
                target = targets.next().copied();
                if target.is_none() {
                    return copied;
                }
                continue;
            };
            let count = rest.len().min(room.len());
            rest.copy_to_volatile_slice(room);
            copied += count;
            let (Ok(after), Ok(left)) = (rest.offset(count), room.offset(count)) else { return copied };
            (rest, target) = (after, Some(left));
        }
    }
    copied
}

/// Copies bytes into pieces; how many fitted.
pub fn fill(pieces: &[VolatileSlice<'_>], bytes: &[u8]) -> usize {
    let mut rest = bytes;
    for piece in pieces {
        let (part, after) = rest.split_at_checked(piece.len()).unwrap_or((rest, &[]));
        piece.copy_from(part);
        rest = after;
    }
    bytes.len() - rest.len()
}
