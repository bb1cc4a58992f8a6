//! Small questions to a socket, and the raw `getsockopt`/`setsockopt` beneath them.

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};

/// `SO_NETNS_COOKIE`, Linux 5.14 (`include/uapi/asm-generic/socket.h`).
const SO_NETNS_COOKIE: libc::c_int = 71;

/// Types that `getsockopt` and `setsockopt` exchange with the kernel: any bit pattern is a value.
pub(crate) trait Plain: Copy {}
impl Plain for libc::c_int {}
impl Plain for u64 {}
impl Plain for [u8; 16] {}
impl Plain for libc::linger {}
impl Plain for libc::timeval {}
impl Plain for libc::tcp_info {}
impl Plain for libc::sock_fprog {}

pub(crate) fn get<T: Plain>(socket: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int) -> io::Result<T> {
    let mut value = MaybeUninit::<T>::zeroed();
    let mut length = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes into `value`, which has that size; all of it was
    // zeroed before and `T: Plain` makes every bit pattern a value.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut length)
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: see above.
    Ok(unsafe { value.assume_init() })
}

pub(crate) fn set<T: Plain>(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
    value: &T,
) -> io::Result<()> {
    // SAFETY: the kernel reads `size_of::<T>()` bytes of a live reference. For `sock_fprog` it also reads
    // the instructions it points to, which `lock` keeps alive over the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The kernel's own number of a socket, unique until reboot (`SO_COOKIE`, Linux 4.12).
///
/// # Errors
/// `ENOTSOCK`.
pub fn cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    get(socket, libc::SOL_SOCKET, libc::SO_COOKIE)
}

/// The network namespace a socket belongs to, as a number unique until reboot (`SO_NETNS_COOKIE`, Linux
/// 5.14).
///
/// # Errors
/// `ENOTSOCK`, or `ENOPROTOOPT` on older kernels.
pub fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    get(socket, libc::SOL_SOCKET, SO_NETNS_COOKIE)
}

/// Domain of a socket: `AF_INET`, ... (`SO_DOMAIN`; socket(7)).
///
/// # Errors
/// `ENOTSOCK`.
pub fn domain(socket: BorrowedFd<'_>) -> io::Result<i32> {
    get(socket, libc::SOL_SOCKET, libc::SO_DOMAIN)
}

/// Fetches and clears the error of a socket (`SO_ERROR`), a number of `errno.h` or 0.
///
/// # Errors
/// `ENOTSOCK`.
pub fn take_error(socket: BorrowedFd<'_>) -> io::Result<i32> {
    get(socket, libc::SOL_SOCKET, libc::SO_ERROR)
}

/// State of a TCP socket, as `enum` in `include/net/tcp_states.h` numbers it: 1 established, 2 SYN sent,
/// 7 closed, 10 listening.
///
/// # Errors
/// Not a TCP socket.
pub fn tcp_state(socket: BorrowedFd<'_>) -> io::Result<u8> {
    // One byte would do, but the kernel copies whole fields: ask for the first eight bytes only.
    let head: u64 = get(socket, libc::IPPROTO_TCP, libc::TCP_INFO)?;
    Ok(head.to_le_bytes()[0])
}

/// `struct tcp_info`, cut to `length` bytes, or shorter if this kernel has less.
///
/// # Errors
/// Not a TCP socket.
pub fn tcp_info(socket: BorrowedFd<'_>, length: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0_u8; length];
    let mut length = libc::socklen_t::try_from(length).unwrap_or(libc::socklen_t::MAX);
    // SAFETY: the kernel writes at most `length` bytes into the vector, which has as many.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            bytes.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    bytes.truncate(length as usize);
    Ok(bytes)
}

/// Bytes that were sent and not acknowledged (`SIOCOUTQ`, tcp(7)).
///
/// # Errors
/// Not a TCP socket, or a listener.
pub fn out_queue(socket: BorrowedFd<'_>) -> io::Result<i32> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the kernel writes one int (TIOCOUTQ is SIOCOUTQ by another name).
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(bytes) }
}

/// The bytes of a socket address as the kernel takes them, and their number.
#[must_use]
pub fn address_to_raw(address: SocketAddr) -> (libc::sockaddr_storage, libc::socklen_t) {
    // SAFETY: sockaddr_storage is plain data; zero is a value.
    let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let length = match address {
        SocketAddr::V4(address) => {
            let raw = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: address.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from(*address.ip()).to_be() },
                sin_zero: [0; 8],
            };
            // SAFETY: sockaddr_storage is larger than, and aligned for, every socket address.
            unsafe { (&raw mut storage).cast::<libc::sockaddr_in>().write(raw) };
            size_of::<libc::sockaddr_in>()
        }
        SocketAddr::V6(address) => {
            let raw = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: address.port().to_be(),
                sin6_flowinfo: address.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: address.ip().octets() },
                sin6_scope_id: address.scope_id(),
            };
            // SAFETY: as above.
            unsafe { (&raw mut storage).cast::<libc::sockaddr_in6>().write(raw) };
            size_of::<libc::sockaddr_in6>()
        }
    };
    (storage, length as libc::socklen_t)
}

/// Longest socket address, bytes (`struct sockaddr_storage`).
pub const MAX_ADDRESS: usize = size_of::<libc::sockaddr_storage>();

/// What the bytes of a socket address say, as `connect` and `bind` would read them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RawAddress {
    /// `AF_INET` or `AF_INET6`.
    Inet(SocketAddr),
    /// `AF_UNSPEC`: dissolves an association (connect(2)).
    Unspecified,
    /// Another family, or too short for its own: the kernel shall judge.
    Other,
}

/// Reads the bytes of a socket address. Source: ip(7), ipv6(7).
#[must_use]
pub fn address_from_raw(bytes: &[u8]) -> RawAddress {
    let Some((family, rest)) = bytes.split_first_chunk::<2>() else { return RawAddress::Other };
    match libc::c_int::from(u16::from_ne_bytes(*family)) {
        libc::AF_UNSPEC => RawAddress::Unspecified,
        libc::AF_INET => inet(rest).map_or(RawAddress::Other, RawAddress::Inet),
        libc::AF_INET6 => inet6(rest).map_or(RawAddress::Other, RawAddress::Inet),
        _ => RawAddress::Other,
    }
}

/// The rest of a `sockaddr_in`: port, address, and eight bytes that must be there.
fn inet(rest: &[u8]) -> Option<SocketAddr> {
    let (port, rest) = rest.split_first_chunk::<2>()?;
    let (address, rest) = rest.split_first_chunk::<4>()?;
    rest.first_chunk::<8>()?;
    Some(SocketAddr::from((Ipv4Addr::from(*address), u16::from_be_bytes(*port))))
}

/// The rest of a `sockaddr_in6`; the scope may be missing (SIN6_LEN_RFC2133, net/ipv6/af_inet6.c).
fn inet6(rest: &[u8]) -> Option<SocketAddr> {
    let (port, rest) = rest.split_first_chunk::<2>()?;
    let (flow, rest) = rest.split_first_chunk::<4>()?;
    let (address, rest) = rest.split_first_chunk::<16>()?;
    let scope = rest.first_chunk::<4>().map_or(0, |scope| u32::from_ne_bytes(*scope));
    let port = u16::from_be_bytes(*port);
    Some(SocketAddr::V6(SocketAddrV6::new(Ipv6Addr::from(*address), port, u32::from_ne_bytes(*flow), scope)))
}

/// The local address of a socket (getsockname(2)).
///
/// # Errors
/// `ENOTSOCK`.
pub fn local_address(socket: BorrowedFd<'_>) -> io::Result<RawAddress> {
    address_of(socket, libc::getsockname)
}

/// The address of the other end (getpeername(2)).
///
/// # Errors
/// `ENOTCONN`, `ENOTSOCK`.
pub fn peer_address(socket: BorrowedFd<'_>) -> io::Result<RawAddress> {
    address_of(socket, libc::getpeername)
}

type AddressCall =
    unsafe extern "C" fn(libc::c_int, *mut libc::sockaddr, *mut libc::socklen_t) -> libc::c_int;

fn address_of(socket: BorrowedFd<'_>, call: AddressCall) -> io::Result<RawAddress> {
    let mut bytes = [0_u8; MAX_ADDRESS];
    let mut length = MAX_ADDRESS as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes into the array.
    let result = unsafe { call(socket.as_raw_fd(), bytes.as_mut_ptr().cast(), &raw mut length) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(address_from_raw(bytes.get(..length as usize).unwrap_or(&bytes)))
}

/// Binds a socket (bind(2)).
///
/// # Errors
/// `EADDRINUSE`, `EADDRNOTAVAIL`, `EACCES`, `EINVAL`.
pub fn bind(socket: BorrowedFd<'_>, address: SocketAddr) -> io::Result<()> {
    let (storage, length) = address_to_raw(address);
    // SAFETY: the storage holds `length` bytes of address.
    let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const storage).cast(), length) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The bytes of a socket address, for another process's memory.
#[must_use]
pub fn address_bytes(address: SocketAddr) -> Vec<u8> {
    let (storage, length) = address_to_raw(address);
    // SAFETY: the first `length` bytes of the storage were written as one socket address without padding.
    unsafe { std::slice::from_raw_parts((&raw const storage).cast::<u8>(), length as usize) }.to_vec()
}
