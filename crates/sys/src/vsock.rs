//! `AF_VSOCK` stream sockets of a guest.
//!
//! Sources: vsock(7), `include/uapi/linux/vm_sockets.h`, `net/vmw_vsock/af_vsock.c`.

use crate::socket::{get, set};
use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

/// The CID of a guest's own loopback (`VMADDR_CID_LOCAL`).
pub const CID_LOCAL: u32 = 1;
/// The CID of the host (`VMADDR_CID_HOST`).
pub const CID_HOST: u32 = 2;
/// `VMADDR_FLAG_TO_HOST`: whatever the CID, the host has it (Linux 5.11).
const TO_HOST: u8 = 1;

const SO_VM_SOCKETS_BUFFER_SIZE: libc::c_int = 0;
const SO_VM_SOCKETS_BUFFER_MAX_SIZE: libc::c_int = 2;
const SO_VM_SOCKETS_CONNECT_TIMEOUT: libc::c_int = 6;

/// `FIONREAD` (ioctl_tty(2)), `TIOCOUTQ` alias `SIOCOUTQ`.
pub const FIONREAD: u32 = libc::FIONREAD as u32;
/// See [`FIONREAD`].
pub const SIOCOUTQ: u32 = libc::TIOCOUTQ as u32;

/// One end of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    /// Which machine.
    pub cid: u32,
    /// Which port.
    pub port: u32,
}

/// What a socket is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Nothing yet, or its connection failed.
    Closed,
    /// Its connection is under way.
    Connecting,
    /// Connected, or was until the other end closed.
    Connected(Address),
    /// Shut down by its own program: the kernel no longer tells the peer.
    ShutDown,
    /// It accepts.
    Listening,
}

fn raw_address(address: Address, flags: u8) -> libc::sockaddr_vm {
    libc::sockaddr_vm {
        svm_family: libc::AF_VSOCK as libc::sa_family_t,
        svm_reserved1: 0,
        svm_port: address.port,
        svm_cid: address.cid,
        // The first of these bytes is `svm_flags` since Linux 5.11.
        svm_zero: [flags, 0, 0, 0],
    }
}

const LENGTH: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

fn checked(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A stream socket, close-on-exec.
///
/// # Errors
/// `EAFNOSUPPORT` without the vsock module; `EMFILE`.
pub fn socket() -> io::Result<OwnedFd> {
    // SAFETY: no memory is involved.
    let raw = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    checked(raw)?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Whether a socket is of this family.
#[must_use]
pub fn is_vsock(socket: BorrowedFd<'_>) -> bool {
    crate::socket::domain(socket).is_ok_and(|domain| domain == libc::AF_VSOCK)
}

/// Binds a socket to a port.
///
/// # Errors
/// `EADDRINUSE`, `EACCES` (below 1024).
pub fn bind(socket: BorrowedFd<'_>, port: u32) -> io::Result<()> {
    let address = raw_address(Address { cid: libc::VMADDR_CID_ANY, port }, 0);
    // SAFETY: the kernel reads one `sockaddr_vm`.
    checked(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), LENGTH) })
}

/// Connects a socket: waits if its file is in blocking mode. Every CID but those of the guest itself is the host's.
///
/// # Errors
/// `EINPROGRESS` in non-blocking mode; `ECONNRESET` when it was refused; `ETIMEDOUT`.
pub fn connect(socket: BorrowedFd<'_>, to: Address) -> io::Result<()> {
    let flags = if to.cid > CID_HOST { TO_HOST } else { 0 };
    let attempt = |flags| {
        let address = raw_address(to, flags);
        // SAFETY: the kernel reads one `sockaddr_vm`.
        checked(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), LENGTH) })
    };
    match attempt(flags) {
        // Linux 5.10 knows no flags, and needs none: without vhost in the guest all is the host's.
        Err(error) if flags != 0 && error.raw_os_error() == Some(libc::EINVAL) => attempt(0),
        done => done,
    }
}

/// Takes a connection off a listener's queue, close-on-exec and blocking.
///
/// # Errors
/// `EAGAIN` in non-blocking mode.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<(OwnedFd, Address)> {
    let mut address = raw_address(Address { cid: 0, port: 0 }, 0);
    let mut length = LENGTH;
    // SAFETY: the kernel writes at most one `sockaddr_vm`.
    let raw = unsafe {
        libc::accept4(listener.as_raw_fd(), (&raw mut address).cast(), &raw mut length, libc::SOCK_CLOEXEC)
    };
    checked(raw)?;
    // SAFETY: a new descriptor that nobody else owns.
    let socket = unsafe { OwnedFd::from_raw_fd(raw) };
    Ok((socket, Address { cid: address.svm_cid, port: address.svm_port }))
}

type NameCall = unsafe extern "C" fn(libc::c_int, *mut libc::sockaddr, *mut libc::socklen_t) -> libc::c_int;

fn name(socket: BorrowedFd<'_>, call: NameCall) -> io::Result<Address> {
    let mut address = raw_address(Address { cid: 0, port: 0 }, 0);
    let mut length = LENGTH;
    // SAFETY: the kernel writes at most one `sockaddr_vm`.
    checked(unsafe { call(socket.as_raw_fd(), (&raw mut address).cast(), &raw mut length) })?;
    if libc::c_int::from(address.svm_family) != libc::AF_VSOCK {
        return Err(io::Error::from_raw_os_error(libc::EAFNOSUPPORT));
    }
    Ok(Address { cid: address.svm_cid, port: address.svm_port })
}

/// The local end; `VMADDR_PORT_ANY` when it is not bound.
///
/// # Errors
/// It is no vsock socket.
pub fn local(socket: BorrowedFd<'_>) -> io::Result<Address> {
    name(socket, libc::getsockname)
}

/// The other end.
///
/// # Errors
/// `ENOTCONN`, also once the socket was shut down.
pub fn peer(socket: BorrowedFd<'_>) -> io::Result<Address> {
    name(socket, libc::getpeername)
}

/// What a socket is doing.
///
/// # Errors
/// It is no vsock socket.
pub fn state(socket: BorrowedFd<'_>) -> io::Result<State> {
    match peer(socket) {
        Ok(peer) => return Ok(State::Connected(peer)),
        Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => {}
        Err(error) => return Err(error),
    }
    if get::<libc::c_int>(socket, libc::SOL_SOCKET, libc::SO_ACCEPTCONN)? != 0 {
        return Ok(State::Listening);
    }
    // A send of nothing sends nothing, and tells a connection that was shut down from one that is not there.
    // SAFETY: no byte is read.
    let sent = unsafe {
        libc::send(socket.as_raw_fd(), std::ptr::null(), 0, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
    };
    if sent >= 0 || io::Error::last_os_error().raw_os_error() == Some(libc::EPIPE) {
        return Ok(State::ShutDown);
    }
    let mut polled = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: the kernel writes one `pollfd`.
    checked(unsafe { libc::poll(&raw mut polled, 1, 0) })?;
    Ok(if polled.revents & libc::POLLOUT == 0 { State::Connecting } else { State::Closed })
}

/// Sets how much the socket buffers of what it receives.
///
/// # Errors
/// It is no vsock socket.
pub fn set_buffer(socket: BorrowedFd<'_>, bytes: u64) -> io::Result<()> {
    set(socket, libc::AF_VSOCK, SO_VM_SOCKETS_BUFFER_MAX_SIZE, &bytes)?;
    set(socket, libc::AF_VSOCK, SO_VM_SOCKETS_BUFFER_SIZE, &bytes)
}

/// Sets after what time a connection that is under way fails.
///
/// # Errors
/// It is no vsock socket.
pub fn set_connect_timeout(socket: BorrowedFd<'_>, timeout: Duration) -> io::Result<()> {
    let time = libc::timeval {
        tv_sec: timeout.as_secs().try_into().unwrap_or(libc::time_t::MAX),
        tv_usec: timeout.subsec_micros().into(),
    };
    set(socket, libc::AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT, &time)
}

/// A time that bounds blocking calls of a socket: `SO_RCVTIMEO` for accept, `SO_SNDTIMEO` for connect.
#[must_use]
pub fn time_limit(socket: BorrowedFd<'_>, receiving: bool) -> Option<Duration> {
    let name = if receiving { libc::SO_RCVTIMEO } else { libc::SO_SNDTIMEO };
    let time: libc::timeval = get(socket, libc::SOL_SOCKET, name).ok()?;
    let limit = Duration::new(u64::try_from(time.tv_sec).ok()?, 0)
        + Duration::from_micros(u64::try_from(time.tv_usec).ok()?);
    (!limit.is_zero()).then_some(limit)
}

/// `struct vsock_diag_req` and `struct vsock_diag_msg` of `include/uapi/linux/vm_sockets_diag.h`.
#[repr(C)]
#[derive(Clone, Copy)]
struct DiagRequest {
    family: u8,
    protocol: u8,
    pad: u16,
    states: u32,
    inode: u32,
    show: u32,
    cookie: [u32; 2],
}

#[repr(C)]
#[derive(Clone, Copy)]
struct DiagMessage {
    family: u8,
    kind: u8,
    state: u8,
    shutdown: u8,
    source_cid: u32,
    source_port: u32,
    destination_cid: u32,
    destination_port: u32,
    inode: u32,
    cookie: [u32; 2],
}

/// `SOCK_DIAG_BY_FAMILY` (sock_diag(7)).
const SOCK_DIAG_BY_FAMILY: u16 = 20;

/// The other end of the socket with this inode, asked of the kernel's own list (sock_diag(7)): for one that was shut
/// down. Its cost is that of all the sockets there are. Needs the module `vsock_diag`.
///
/// # Errors
/// `ENOENT`: there is none, or the kernel has no such list.
pub fn peer_by_inode(inode: u64) -> io::Result<Address> {
    // SAFETY: no memory is involved.
    let raw = unsafe {
        libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_SOCK_DIAG)
    };
    checked(raw)?;
    // SAFETY: a new descriptor that nobody else owns.
    let netlink = unsafe { OwnedFd::from_raw_fd(raw) };
    #[repr(C)]
    struct Message {
        header: libc::nlmsghdr,
        request: DiagRequest,
    }
    let message = Message {
        header: libc::nlmsghdr {
            nlmsg_len: size_of::<Message>() as u32,
            nlmsg_type: SOCK_DIAG_BY_FAMILY,
            nlmsg_flags: (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16,
            nlmsg_seq: 1,
            nlmsg_pid: 0,
        },
        request: DiagRequest {
            family: libc::AF_VSOCK as u8,
            protocol: 0,
            pad: 0,
            states: u32::MAX,
            inode: 0,
            show: 0,
            cookie: [u32::MAX; 2],
        },
    };
    // SAFETY: the kernel reads one `Message`, which has no padding.
    let sent =
        unsafe { libc::send(netlink.as_raw_fd(), (&raw const message).cast(), size_of::<Message>(), 0) };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut buffer = [0_u8; 16 * 1024];
    loop {
        // SAFETY: the kernel writes at most the buffer's length.
        let got = unsafe { libc::recv(netlink.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        if got < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut rest = buffer.get(..got as usize).unwrap_or_default();
        while let Some((kind, body, after)) = next_message(rest) {
            if kind != SOCK_DIAG_BY_FAMILY {
                // The end, or an error.
                return Err(io::Error::from_raw_os_error(libc::ENOENT));
            }
            if let Some(found) = diag_message(body)
                && u64::from(found.inode) == inode
            {
                return Ok(Address { cid: found.destination_cid, port: found.destination_port });
            }
            rest = after;
        }
    }
}

fn next_message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    const HEADER: usize = size_of::<libc::nlmsghdr>();
    let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let body = bytes.get(HEADER..length)?;
    Some((kind, body, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

fn diag_message(body: &[u8]) -> Option<DiagMessage> {
    let body = body.get(..size_of::<DiagMessage>())?;
    let mut message = MaybeUninit::<DiagMessage>::zeroed();
    // SAFETY: as many bytes as the structure has; any bit pattern is a value of it.
    unsafe {
        std::ptr::copy_nonoverlapping(body.as_ptr(), message.as_mut_ptr().cast::<u8>(), body.len());
        Some(message.assume_init())
    }
}
