//! Locks on sockets that are handed to a program.
//!
//! A descriptor of the host's network that a program holds must be good for what the broker approved and for
//! nothing else, also when the program races the supervisor (it can have a `connect` on another descriptor
//! continued, and put this one in its place). A classic BPF filter on received packets, locked with
//! `SO_LOCK_FILTER` (socket(7), Linux 3.9; no privilege needed), makes it so:
//!
//! - a connected socket accepts segments only from the approved address and port: a connection to anything
//!   else never gets its SYN+ACK;
//! - a listener, and each socket it accepts, drops SYN+ACK: it can never become an outgoing connection.
//!
//! For TCP the filter sees the segment from its header on (`tcp_v4_rcv`, `tcp_filter` in net/ipv4/tcp_ipv4.c);
//! the IP header is reached with `SKF_NET_OFF` (Documentation/networking/filter.rst).

use crate::socket::set;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;

const LOAD_BYTE: u16 = (libc::BPF_LD | libc::BPF_B | libc::BPF_ABS) as u16;
const LOAD_HALF: u16 = (libc::BPF_LD | libc::BPF_H | libc::BPF_ABS) as u16;
const LOAD_WORD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const AND: u16 = (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16;
const JUMP_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
const ACCEPT: libc::sock_filter = step(RETURN, u32::MAX);
const DROP: libc::sock_filter = step(RETURN, 0);

/// Where the network header begins, for `BPF_ABS` loads (`SKF_NET_OFF`).
const NETWORK: u32 = libc::SKF_NET_OFF as u32;
/// Offset of the source address in an IPv4 header (RFC 791).
const V4_SOURCE: u32 = 12;
/// Offset of the source address in an IPv6 header (RFC 8200).
const V6_SOURCE: u32 = 8;
/// Offset of the flags in a TCP header (RFC 9293).
const TCP_FLAGS: u32 = 13;
const SYN_ACK: u32 = 0x12;

const fn step(code: u16, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt: 0, jf: 0, k }
}

/// A jump that goes on if equal, and over `skip` instructions if not.
const fn require(k: u32, skip: u8) -> libc::sock_filter {
    libc::sock_filter { code: JUMP_EQUAL, jt: 0, jf: skip, k }
}

/// From now on `socket` takes segments only from `peer`, for good.
///
/// # Errors
/// `ENOMEM` beyond `net.core.optmem_max`; `EPERM` if the filter is locked already.
pub fn lock_to_peer(socket: BorrowedFd<'_>, peer: SocketAddr) -> io::Result<()> {
    let port = u32::from(peer.port());
    match peer.ip().to_canonical() {
        IpAddr::V4(address) => attach(
            socket,
            &[
                step(LOAD_HALF, 0),
                require(port, 3),
                step(LOAD_WORD, NETWORK + V4_SOURCE),
                require(u32::from(address), 1),
                ACCEPT,
                DROP,
            ],
        ),
        IpAddr::V6(address) => {
            let bits = u128::from(address);
            let word = |index: u32| (bits >> (96 - 32 * index)) as u32;
            attach(
                socket,
                &[
                    step(LOAD_HALF, 0),
                    require(port, 9),
                    step(LOAD_WORD, NETWORK + V6_SOURCE),
                    require(word(0), 7),
                    step(LOAD_WORD, NETWORK + V6_SOURCE + 4),
                    require(word(1), 5),
                    step(LOAD_WORD, NETWORK + V6_SOURCE + 8),
                    require(word(2), 3),
                    step(LOAD_WORD, NETWORK + V6_SOURCE + 12),
                    require(word(3), 1),
                    ACCEPT,
                    DROP,
                ],
            )
        }
    }
}

/// From now on `socket`, and each socket that it accepts, drops SYN+ACK.
///
/// # Errors
/// As [`lock_to_peer`].
pub fn lock_listener(socket: BorrowedFd<'_>) -> io::Result<()> {
    attach(
        socket,
        &[
            step(LOAD_BYTE, TCP_FLAGS),
            step(AND, SYN_ACK),
            libc::sock_filter { code: JUMP_EQUAL, jt: 0, jf: 1, k: SYN_ACK },
            DROP,
            ACCEPT,
        ],
    )
}

fn attach(socket: BorrowedFd<'_>, program: &[libc::sock_filter]) -> io::Result<()> {
    // The kernel only reads the instructions; the type of the field is not const.
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    set(socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &filter)?;
    set::<libc::c_int>(socket, libc::SOL_SOCKET, libc::SO_LOCK_FILTER, &1)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

    fn fresh(domain: i32) -> OwnedFd {
        // SAFETY: socket(2) returns a new descriptor or -1, which from_raw_fd would refuse in the assert.
        unsafe {
            let raw = libc::socket(domain, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0);
            assert!(raw >= 0);
            OwnedFd::from_raw_fd(raw)
        }
    }

    fn connect(socket: &OwnedFd, peer: SocketAddr) -> bool {
        let stream = socket.try_clone().unwrap();
        let _ = rust_connect(&stream, peer);
        let mut poll = libc::pollfd { fd: stream.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
        // SAFETY: one pollfd on the stack.
        unsafe { libc::poll(&raw mut poll, 1, 300) };
        crate::socket::tcp_state(stream.as_fd()).unwrap() == 1
    }

    fn rust_connect(socket: &OwnedFd, peer: SocketAddr) -> i32 {
        let (storage, length) = crate::socket::address_to_raw(peer);
        // SAFETY: the storage holds `length` bytes of address.
        unsafe { libc::connect(socket.as_raw_fd(), (&raw const storage).cast(), length) }
    }

    #[test]
    fn a_locked_socket_reaches_its_peer_and_nobody_else() {
        for loopback in ["127.0.0.1:0", "[::1]:0"] {
            let approved = TcpListener::bind(loopback).unwrap();
            let other = TcpListener::bind(loopback).unwrap();
            let peer = approved.local_addr().unwrap();
            let domain = if peer.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
            let socket = fresh(domain);
            lock_to_peer(socket.as_fd(), peer).unwrap();
            assert!(connect(&socket, peer));
            let socket = fresh(domain);
            lock_to_peer(socket.as_fd(), peer).unwrap();
            assert!(!connect(&socket, other.local_addr().unwrap()));
        }
    }

    #[test]
    fn a_mapped_address_is_an_ipv4_address() {
        let approved = TcpListener::bind("127.0.0.1:0").unwrap();
        let mapped: SocketAddr =
            format!("[::ffff:127.0.0.1]:{}", approved.local_addr().unwrap().port()).parse().unwrap();
        let socket = fresh(libc::AF_INET6);
        lock_to_peer(socket.as_fd(), mapped).unwrap();
        assert!(connect(&socket, mapped));
    }

    #[test]
    fn a_locked_listener_accepts_but_cannot_connect() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        lock_listener(listener.as_fd()).unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        drop(client);
        let target = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = fresh(libc::AF_INET);
        lock_listener(socket.as_fd()).unwrap();
        assert!(!connect(&socket, target.local_addr().unwrap()));
        assert!(lock_listener(socket.as_fd()).is_err(), "the lock holds");
    }
}
