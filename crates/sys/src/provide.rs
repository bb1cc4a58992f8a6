//! Socket options that only a provider sets, on sockets of its own.

use crate::socket::set;
use kso_wire::Family;
use std::io;
use std::os::fd::BorrowedFd;

/// `SOL_RAW` (include/linux/socket.h).
const SOL_RAW: libc::c_int = 255;
/// `ICMP_FILTER` (raw(7)).
const ICMP_FILTER: libc::c_int = 1;
/// Types that a ping cares for: echo reply, destination unreachable, source quench, redirect, time exceeded,
/// parameter problem (RFC 792). A set bit of the filter drops its type.
const ECHO_TYPES: u32 = 1 << 0 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 11 | 1 << 12;

/// Queues ICMP errors on the socket: `IP_RECVERR` (ip(7)) or `IPV6_RECVERR` (ipv6(7)).
///
/// # Errors
/// Not an Internet socket.
pub fn receive_errors(socket: BorrowedFd<'_>, family: Family) -> io::Result<()> {
    match family {
        Family::V4 => set::<libc::c_int>(socket, libc::IPPROTO_IP, libc::IP_RECVERR, &1),
        Family::V6 => set::<libc::c_int>(socket, libc::IPPROTO_IPV6, libc::IPV6_RECVERR, &1),
    }
}

/// A raw ICMP socket reads only what answers an echo.
///
/// # Errors
/// Not a raw ICMP socket.
pub fn only_echo_answers(socket: BorrowedFd<'_>) -> io::Result<()> {
    set::<libc::c_int>(socket, SOL_RAW, ICMP_FILTER, &(!ECHO_TYPES).cast_signed())
}
