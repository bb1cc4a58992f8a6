//! What a chain of descriptors holds: a request to read, and room for its reply.

use crate::vhost::{Chain, Memory};
use std::ops::Deref;
use vm_memory::{GuestAddress, GuestMemory, VolatileSlice};

/// Most pieces of a request or a reply: 1 MiB in single pages, and headers.
const MAX_PIECES: usize = 1024;

/// A chain's memory.
pub(super) struct Buffers<'a> {
    pub readable: Vec<VolatileSlice<'a>>,
    pub writable: Vec<VolatileSlice<'a>>,
}

/// Reads a chain. `None`: it names memory that is none, or does not begin with what is to be read.
pub(super) fn buffers<'a, M>(chain: Chain<M>, memory: &'a Memory) -> Option<Buffers<'a>>
where
    M: Deref<Target = Memory> + Clone,
{
    let mut buffers = Buffers { readable: Vec::with_capacity(4), writable: Vec::with_capacity(4) };
    for descriptor in chain {
        let pieces = if descriptor.is_write_only() {
            &mut buffers.writable
        } else if buffers.writable.is_empty() {
            &mut buffers.readable
        } else {
            return None;
        };
        for piece in memory.get_slices(GuestAddress(descriptor.addr().0), descriptor.len() as usize) {
            if pieces.len() == MAX_PIECES {
                return None;
            }
            pieces.push(piece.ok()?);
        }
    }
    Some(buffers)
}

/// Where a reply goes: kept for one that comes late.
pub(super) fn room<M>(chain: Chain<M>) -> Vec<(GuestAddress, usize)>
where
    M: Deref<Target = Memory> + Clone,
{
    chain
        .writable()
        .take(MAX_PIECES)
        .map(|descriptor| (GuestAddress(descriptor.addr().0), descriptor.len() as usize))
        .collect()
}
