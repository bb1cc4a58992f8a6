//! Memory that is scattered and that others may change meanwhile: a guest's, or a transport's own.

use vm_memory::VolatileSlice;

/// Pieces of memory, read or written as if they were one.
#[derive(Clone, Copy, Debug)]
pub struct Pieces<'a>(&'a [VolatileSlice<'a>]);

impl<'a> Pieces<'a> {
    /// Of these.
    #[must_use]
    pub fn new(pieces: &'a [VolatileSlice<'a>]) -> Self {
        Self(pieces)
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.iter().map(VolatileSlice::len).sum()
    }

    /// One by one.
    #[must_use]
    pub fn slices(&self) -> &'a [VolatileSlice<'a>] {
        self.0
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(VolatileSlice::is_empty)
    }

    /// Copies bytes from the front to `bytes`, and tells how many.
    pub fn read(&self, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in self.0 {
            let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) else { break };
            done += piece.copy_to(rest);
        }
        done
    }

    /// Copies `bytes` to the front, and tells how many had room.
    pub fn write(&self, bytes: &[u8]) -> usize {
        let mut done = 0;
        for piece in self.0 {
            let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) else { break };
            let count = rest.len().min(piece.len());
            piece.copy_from(rest);
            done += count;
        }
        done
    }

    /// Copies `bytes` to where the first `skip` bytes end.
    pub fn write_behind(&self, skip: usize, bytes: &[u8]) {
        let (mut skip, mut bytes) = (skip, bytes);
        for piece in self.0 {
            if skip >= piece.len() {
                skip -= piece.len();
                continue;
            }
            let Ok(piece) = piece.offset(skip) else { return };
            let (now, later) = bytes.split_at(bytes.len().min(piece.len()));
            piece.copy_from(now);
            (skip, bytes) = (0, later);
        }
    }

    /// Puts what is left without the first `skip` bytes, and at most `limit` bytes of it, into `rest`.
    pub fn window(&self, skip: usize, limit: usize, rest: &mut Vec<VolatileSlice<'a>>) {
        rest.clear();
        let (mut skip, mut limit) = (skip, limit);
        for piece in self.0 {
            if skip >= piece.len() {
                skip -= piece.len();
                continue;
            }
            let count = (piece.len() - skip).min(limit);
            if count == 0 {
                break;
            }
            // The bounds were just computed: no error is possible.
            rest.extend(piece.subslice(skip, count).ok());
            limit -= count;
            skip = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_read_and_write_as_one() {
        let mut memory = *b"abcdefghij";
        let (left, right) = memory.split_at_mut(3);
        let pieces = [VolatileSlice::from(left), VolatileSlice::from(right)];
        let all = Pieces::new(&pieces);
        assert_eq!(all.len(), 10);
        let mut bytes = [0; 5];
        assert_eq!(all.read(&mut bytes), 5);
        assert_eq!(&bytes, b"abcde");
        let mut rest = Vec::new();
        all.window(2, 4, &mut rest);
        assert_eq!(rest.iter().map(VolatileSlice::len).collect::<Vec<_>>(), [1, 3]);
        assert_eq!(Pieces::new(&rest).write(b"123456789"), 4);
        all.window(10, 4, &mut rest);
        assert!(rest.is_empty());
        assert_eq!(&memory, b"ab1234ghij");
    }
}
