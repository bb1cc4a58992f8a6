//! What a stand-in needs of its kernel: a TCP socket here that stands for one on another kernel
//! (`kso-kernels` says how it comes about).
//!
//! A stand-in whose connection is under way must neither be refused nor established: its SYN is answered by
//! nobody but the kernel's own RST, and a filter that drops whatever is received ([`deafen`]) keeps that away. Once the true
//! connection is up the far end connects to *it* (a simultaneous open, RFC 9293, 3.5); if the true
//! connection failed, an ICMP error is made up that carries its errno, for which the number of its SYN is needed
//! ([`syn_number`]).

use crate::socket::{get, set};
use kso_wire::Family;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// `TCP_REPAIR_OFF_NO_WP` (include/uapi/linux/tcp.h): off, without a window probe.
const REPAIR_OFF: libc::c_int = -1;
/// `TCP_SEND_QUEUE` (include/uapi/linux/tcp.h).
const SEND_QUEUE: libc::c_int = 2;
/// `IPV6_FREEBIND` (include/uapi/linux/in6.h).
const IPV6_FREEBIND: libc::c_int = 78;

/// Drops whatever the socket receives from now on.
///
/// # Errors
/// Not a socket.
pub fn deafen(socket: BorrowedFd<'_>) -> io::Result<()> {
    let mut drop = libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: 0 };
    let filter = libc::sock_fprog { len: 1, filter: &raw mut drop };
    // `drop` outlives the call, which copies the instruction.
    set(socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &filter)
}

/// Ends [`deafen`].
///
/// # Errors
/// Not a socket. Without a filter it is no error.
pub fn hear(socket: BorrowedFd<'_>) -> io::Result<()> {
    match set::<libc::c_int>(socket, libc::SOL_SOCKET, libc::SO_DETACH_FILTER, &0) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other,
    }
}

/// The sequence number of the SYN of a socket whose connection is under way.
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN` over the socket's network namespace.
pub fn syn_number(socket: BorrowedFd<'_>) -> io::Result<u32> {
    set::<libc::c_int>(socket, libc::IPPROTO_TCP, libc::TCP_REPAIR, &1)?;
    let read = set::<libc::c_int>(socket, libc::IPPROTO_TCP, libc::TCP_REPAIR_QUEUE, &SEND_QUEUE)
        .and_then(|()| get::<libc::c_int>(socket, libc::IPPROTO_TCP, libc::TCP_QUEUE_SEQ));
    set::<libc::c_int>(socket, libc::IPPROTO_TCP, libc::TCP_REPAIR, &REPAIR_OFF)?;
    // The next number to be sent is the SYN's plus one.
    Ok(read?.cast_unsigned().wrapping_sub(1))
}

/// Permits to bind any address (`IP_FREEBIND`, ip(7)).
///
/// # Errors
/// Not an Internet socket.
pub fn free_bind(socket: BorrowedFd<'_>, family: Family) -> io::Result<()> {
    match family {
        Family::V4 => set::<libc::c_int>(socket, libc::IPPROTO_IP, libc::IP_FREEBIND, &1),
        Family::V6 => set::<libc::c_int>(socket, libc::IPPROTO_IPV6, IPV6_FREEBIND, &1),
    }
}

/// Moves the calling thread into another network namespace (setns(2)).
///
/// # Errors
/// `EPERM` without privilege.
pub fn enter_network(namespace: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: no memory is involved.
    if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The network namespace of the calling thread.
///
/// # Errors
/// /proc is not there.
pub fn own_network() -> io::Result<OwnedFd> {
    Ok(File::open("/proc/thread-self/ns/net")?.into())
}

/// Does `work` in a new network namespace, on a thread of its own, and tells the namespace too.
///
/// # Errors
/// `EPERM` without privilege, or what `work` says.
pub fn new_network<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<(OwnedFd, T)> {
    std::thread::scope(|scope| {
        let made = scope.spawn(|| {
            // SAFETY: no memory is involved; only this thread changes its namespace.
            if unsafe { libc::unshare(libc::CLONE_NEWNET) } < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok((own_network()?, work()?))
        });
        made.join().map_err(|_| io::Error::other("a thread panicked"))?
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    #[test]
    fn a_deaf_socket_hears_again() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        hear(stream.as_fd()).unwrap();
        deafen(stream.as_fd()).unwrap();
        hear(stream.as_fd()).unwrap();
    }
}
