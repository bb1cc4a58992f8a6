//! Bytes between sockets and the memory of a guest, with no buffer in between.

use libc::{c_int, iovec, msghdr};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use vm_memory::VolatileSlice;

/// Most pieces of one call (`IOV_MAX` of Linux); what is beyond is left for the next one.
pub const MAX_PIECES: usize = 1024;

fn pieces(slices: &[VolatileSlice<'_>], writable: bool) -> Vec<iovec> {
    let take = slices.iter().take(MAX_PIECES);
    take.map(|slice| iovec {
        // With plain mappings (no Xen grants) the guard only borrows: the address stays good as long as the slice.
        iov_base: if writable {
            slice.ptr_guard_mut().as_ptr()
        } else {
            slice.ptr_guard().as_ptr().cast_mut()
        }
        .cast(),
        iov_len: slice.len(),
    })
    .collect()
}

fn header(pieces: &mut [iovec]) -> msghdr {
    // SAFETY: all zeroes is a valid msghdr: null pointers with zero lengths.
    let mut header: msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = pieces.as_mut_ptr();
    header.msg_iovlen = pieces.len();
    header
}

fn outcome(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Receives into guest memory, never waiting. 0 is the end of the stream (or no room was given).
///
/// # Errors
/// Those of recvmsg(2), `WouldBlock` if there is nothing.
pub fn receive(socket: BorrowedFd<'_>, into: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let mut pieces = pieces(into, true);
    let mut header = header(&mut pieces);
    // SAFETY: every piece is a live mapping for as long as `into` is borrowed, and may be written by anybody at any time
    // (the guest does), so that the kernel writing there breaks no rule of Rust's: nobody holds references into it.
    outcome(unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_DONTWAIT) })
}

/// Sends from guest memory, never waiting and without SIGPIPE.
///
/// # Errors
/// Those of sendmsg(2), `WouldBlock` if there is no room.
pub fn send(socket: BorrowedFd<'_>, from: &[VolatileSlice<'_>]) -> io::Result<usize> {
    const FLAGS: c_int = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    let mut pieces = pieces(from, false);
    let header = header(&mut pieces);
    // SAFETY: as in `receive`; the kernel only reads. That the guest may change the bytes meanwhile concerns only what
    // is sent.
    outcome(unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const header, FLAGS) })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn scatters_and_gathers() {
        let (left, right) = UnixStream::pair().unwrap();
        let (mut a, mut b) = (*b"hello, ", *b"guest");
        let from = [VolatileSlice::from(a.as_mut_slice()), VolatileSlice::from(b.as_mut_slice())];
        assert_eq!(send(left.as_fd(), &from).unwrap(), 12);
        let (mut c, mut d) = ([0; 3], [0; 20]);
        let into = [VolatileSlice::from(c.as_mut_slice()), VolatileSlice::from(d.as_mut_slice())];
        assert_eq!(receive(right.as_fd(), &into).unwrap(), 12);
        assert_eq!(receive(right.as_fd(), &into).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(left);
        assert_eq!(receive(right.as_fd(), &into).unwrap(), 0);
        assert_eq!(send(right.as_fd(), &into).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        assert_eq!((&c, d.get(..9).unwrap()), (b"hel", b"lo, guest".as_slice()));
    }
}
