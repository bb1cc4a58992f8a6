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
use std::collections::VecDeque;
use std::io;
use std::mem::{size_of, size_of_val};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Where the network header begins, for absolute loads (`SKF_NET_OFF`).
const NETWORK: u32 = libc::SKF_NET_OFF as u32;
/// Offset of the source address in an IPv4 header (RFC 791).
const V4_SOURCE: u32 = 12;
/// Offset of the source address in an IPv6 header (RFC 8200).
const V6_SOURCE: u32 = 8;
/// Offset of the source port in a TCP header (RFC 9293).
const TCP_SOURCE: u32 = 0;
/// Offset of the flags in a TCP header.
const TCP_FLAGS: u32 = 13;
const SYN_ACK: u32 = 0x12;

/// So many peers have a program that is shared by their sockets.
const MAX_SHARED: usize = 32;
/// So many peers are remembered in order to see that one comes again.
const MAX_SEEN: usize = 64;

/// What a segment from the peer has at `offset`.
#[derive(Clone, Copy)]
struct Check {
    wide: bool,
    offset: u32,
    value: u32,
}

const fn word(offset: u32, value: u32) -> Check {
    Check { wide: true, offset: NETWORK + offset, value }
}

fn checks(peer: SocketAddr) -> Vec<Check> {
    let mut checks = vec![Check { wide: false, offset: TCP_SOURCE, value: peer.port().into() }];
    match peer.ip().to_canonical() {
        IpAddr::V4(address) => checks.push(word(V4_SOURCE, address.into())),
        IpAddr::V6(address) => {
            let bits = u128::from(address);
            checks
                .extend((0..4).map(|index| word(V6_SOURCE + 4 * index, (bits >> (96 - 32 * index)) as u32)));
        }
    }
    checks
}

/// Set by [`permit_unlocked`].
static UNLOCKED: AtomicBool = AtomicBool::new(false);

/// From now on in this process, a lock that this user may not set is no error: the socket stays unlocked.
pub fn permit_unlocked() {
    UNLOCKED.store(true, Ordering::Relaxed);
}

/// Whether this user may lock a TCP socket. Most kernels permit it to everybody, newer ones not to users without
/// privilege.
///
/// # Errors
/// What the kernel says, `EPERM` usually.
pub fn probe() -> io::Result<()> {
    let socket = std::net::TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0))?;
    attach(socket.as_fd(), &classic::listener())
}

/// Passes over a refusal, if that was permitted.
fn or_unlocked(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) && UNLOCKED.load(Ordering::Relaxed) => Ok(()),
        result => result,
    }
}

/// From now on `socket` takes segments only from `peer`, for good.
///
/// # Errors
/// `ENOMEM` beyond `net.core.optmem_max`; `EPERM` if the filter is locked already.
pub fn lock_to_peer(socket: BorrowedFd<'_>, peer: SocketAddr) -> io::Result<()> {
    let shared = shared().lock().unwrap_or_else(PoisonError::into_inner).attach(socket, peer);
    let attached = if shared { Ok(()) } else { attach(socket, &classic::peer(&checks(peer))) };
    or_unlocked(
        attached.and_then(|()| set::<libc::c_int>(socket, libc::SOL_SOCKET, libc::SO_LOCK_FILTER, &1)),
    )
}

/// From now on `socket`, and each socket that it accepts, drops SYN+ACK.
///
/// # Errors
/// As [`lock_to_peer`].
pub fn lock_listener(socket: BorrowedFd<'_>) -> io::Result<()> {
    let attached = attach(socket, &classic::listener());
    or_unlocked(
        attached.and_then(|()| set::<libc::c_int>(socket, libc::SOL_SOCKET, libc::SO_LOCK_FILTER, &1)),
    )
}

fn attach(socket: BorrowedFd<'_>, program: &[libc::sock_filter]) -> io::Result<()> {
    // The kernel only reads the instructions; the type of the field is not const.
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    set(socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &filter)
}

/// The filters as classic BPF: needs no privilege, costs some 14 us a socket.
mod classic {
    use super::{Check, SYN_ACK, TCP_FLAGS};

    const LOAD_BYTE: u16 = (libc::BPF_LD | libc::BPF_B | libc::BPF_ABS) as u16;
    const LOAD_HALF: u16 = (libc::BPF_LD | libc::BPF_H | libc::BPF_ABS) as u16;
    const LOAD_WORD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const AND: u16 = (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16;
    const JUMP_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    const ACCEPT: libc::sock_filter = step(RETURN, u32::MAX);
    const DROP: libc::sock_filter = step(RETURN, 0);

    const fn step(code: u16, k: u32) -> libc::sock_filter {
        libc::sock_filter { code, jt: 0, jf: 0, k }
    }

    pub(super) fn peer(checks: &[Check]) -> Vec<libc::sock_filter> {
        let mut program = Vec::with_capacity(2 * checks.len() + 2);
        for (index, check) in checks.iter().enumerate() {
            program.push(step(if check.wide { LOAD_WORD } else { LOAD_HALF }, check.offset));
            // Over the checks that are left, and over ACCEPT.
            let over = 2 * (checks.len() - index - 1) + 1;
            program.push(libc::sock_filter { code: JUMP_EQUAL, jt: 0, jf: over as u8, k: check.value });
        }
        program.extend([ACCEPT, DROP]);
        program
    }

    pub(super) fn listener() -> [libc::sock_filter; 5] {
        [
            step(LOAD_BYTE, TCP_FLAGS),
            step(AND, SYN_ACK),
            libc::sock_filter { code: JUMP_EQUAL, jt: 0, jf: 1, k: SYN_ACK },
            DROP,
            ACCEPT,
        ]
    }
}

fn shared() -> &'static Mutex<Shared> {
    static SHARED: Mutex<Shared> =
        Mutex::new(Shared { refused: false, seen: VecDeque::new(), programs: VecDeque::new() });
    &SHARED
}

/// One eBPF program for all sockets to a peer: a tenth of the cost, from a peer's second socket on, where
/// the kernel lets us load it (`CAP_BPF`, or `kernel.unprivileged_bpf_disabled=0`; bpf(2)).
struct Shared {
    refused: bool,
    seen: VecDeque<SocketAddr>,
    programs: VecDeque<(SocketAddr, OwnedFd)>,
}

impl Shared {
    /// Whether `socket` has the shared program of `peer` now.
    fn attach(&mut self, socket: BorrowedFd<'_>, peer: SocketAddr) -> bool {
        if self.refused {
            return false;
        }
        if let Some((_, program)) = self.programs.iter().find(|(known, _)| *known == peer) {
            return set(socket, libc::SOL_SOCKET, libc::SO_ATTACH_BPF, &program.as_raw_fd()).is_ok();
        }
        if !self.seen.contains(&peer) {
            if self.seen.len() >= MAX_SEEN {
                self.seen.pop_front();
            }
            self.seen.push_back(peer);
            return false;
        }
        let Ok(program) = extended::load(&checks(peer)) else {
            self.refused = true;
            return false;
        };
        let attached = set(socket, libc::SOL_SOCKET, libc::SO_ATTACH_BPF, &program.as_raw_fd()).is_ok();
        if self.programs.len() >= MAX_SHARED {
            self.programs.pop_front();
        }
        self.programs.push_back((peer, program));
        attached
    }
}

/// The peer's filter as eBPF (Documentation/bpf/standardization/instruction-set.rst).
mod extended {
    use super::{Check, FromRawFd, OwnedFd, io, size_of, size_of_val};

    /// `struct bpf_insn`.
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Instruction {
        code: u8,
        registers: u8,
        offset: i16,
        immediate: i32,
    }

    /// The head of `union bpf_attr` for `BPF_PROG_LOAD`.
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log: [u64; 2],
        rest: [u64; 3],
    }

    const BPF_PROG_LOAD: libc::c_int = 5;
    const BPF_PROG_TYPE_SOCKET_FILTER: u32 = 1;
    /// r6 = r1: absolute loads take the packet from r6.
    const CONTEXT: Instruction = Instruction { code: 0xbf, registers: 0x16, offset: 0, immediate: 0 };
    const LOAD_HALF: u8 = 0x28;
    const LOAD_WORD: u8 = 0x20;
    /// Compares 32 bits (JMP32).
    const JUMP_NOT_EQUAL: u8 = 0x56;
    const SET_RESULT: u8 = 0xb4;
    const EXIT: Instruction = step(0x95, 0, 0);

    const fn step(code: u8, offset: i16, immediate: i32) -> Instruction {
        Instruction { code, registers: 0, offset, immediate }
    }

    pub(super) fn load(checks: &[Check]) -> io::Result<OwnedFd> {
        let mut program = vec![CONTEXT];
        for (index, check) in checks.iter().enumerate() {
            let code = if check.wide { LOAD_WORD } else { LOAD_HALF };
            program.push(step(code, 0, check.offset.cast_signed()));
            // Over the checks that are left, and over the acceptance.
            let over = 2 * (checks.len() - index - 1) + 2;
            program.push(step(JUMP_NOT_EQUAL, over as i16, check.value.cast_signed()));
        }
        program.extend([step(SET_RESULT, 0, -1), EXIT, step(SET_RESULT, 0, 0), EXIT]);
        let attributes = Load {
            kind: BPF_PROG_TYPE_SOCKET_FILTER,
            count: (size_of_val(program.as_slice()) / size_of::<Instruction>()) as u32,
            instructions: program.as_ptr() as u64,
            license: c"Dual MIT/GPL".as_ptr() as u64,
            log: [0; 2],
            rest: [0; 3],
        };
        // SAFETY: the attributes and what they point to live over the call, which only reads them and returns
        // a new descriptor.
        unsafe {
            let result =
                libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const attributes, size_of::<Load>());
            if result < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(result as i32)) }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

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
            // The first has a classic filter, the next ones share a program where that is allowed.
            for _ in 0..3 {
                let socket = fresh(domain);
                lock_to_peer(socket.as_fd(), peer).unwrap();
                assert!(connect(&socket, peer));
                let socket = fresh(domain);
                lock_to_peer(socket.as_fd(), peer).unwrap();
                assert!(!connect(&socket, other.local_addr().unwrap()));
                assert!(lock_to_peer(socket.as_fd(), other.local_addr().unwrap()).is_err(), "the lock holds");
            }
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
