//! Numbers of the kernel's interface, for crates that do not depend on libc.

macro_rules! calls {
    ($($(#[$attribute:meta])* $name:ident = $number:ident;)*) => {
        $($(#[$attribute])* #[doc = concat!("`", stringify!($number), "`")] pub const $name: i64 = libc::$number as i64;)*
    };
}

calls! {
    CONNECT = SYS_connect;
    LISTEN = SYS_listen;
    BIND = SYS_bind;
    SOCKET = SYS_socket;
    ACCEPT = SYS_accept;
    ACCEPT4 = SYS_accept4;
    GETSOCKNAME = SYS_getsockname;
    GETPEERNAME = SYS_getpeername;
    SETSOCKOPT = SYS_setsockopt;
    GETSOCKOPT = SYS_getsockopt;
    IOCTL = SYS_ioctl;
    DUP = SYS_dup;
    #[cfg(target_arch = "x86_64")]
    DUP2 = SYS_dup2;
    DUP3 = SYS_dup3;
    FCNTL = SYS_fcntl;
    #[cfg(target_arch = "x86_64")]
    EPOLL_CREATE = SYS_epoll_create;
    EPOLL_CREATE1 = SYS_epoll_create1;
    SENDTO = SYS_sendto;
    SENDMSG = SYS_sendmsg;
    SENDMMSG = SYS_sendmmsg;
    IO_URING_SETUP = SYS_io_uring_setup;
    SENDFILE = SYS_sendfile;
}

/// `F_DUPFD` (fcntl(2)).
pub const F_DUPFD: u32 = libc::F_DUPFD as u32;
/// `F_DUPFD_CLOEXEC` (fcntl(2)).
pub const F_DUPFD_CLOEXEC: u32 = libc::F_DUPFD_CLOEXEC as u32;
/// `MSG_FASTOPEN` (tcp(7)).
pub const MSG_FASTOPEN: u32 = libc::MSG_FASTOPEN as u32;
/// `EOPNOTSUPP`.
pub const EOPNOTSUPP: u16 = libc::EOPNOTSUPP as u16;
/// `ESRCH`.
pub const ESRCH: i32 = libc::ESRCH;
/// `ENOSYS`.
pub const ENOSYS: u16 = libc::ENOSYS as u16;
/// `EBADF`.
pub const EBADF: i32 = libc::EBADF;
/// `SIGPIPE`.
pub const SIGPIPE: i32 = libc::SIGPIPE;
/// `EAFNOSUPPORT`.
pub const EAFNOSUPPORT: u16 = libc::EAFNOSUPPORT as u16;
/// `AF_VSOCK`.
pub const AF_VSOCK: i32 = libc::AF_VSOCK;
/// `SOCK_CLOEXEC`.
pub const SOCK_CLOEXEC: i32 = libc::SOCK_CLOEXEC;
/// `SOCK_NONBLOCK`.
pub const SOCK_NONBLOCK: i32 = libc::SOCK_NONBLOCK;
/// `AF_INET`.
pub const AF_INET: i32 = libc::AF_INET;
/// `AF_INET6`.
pub const AF_INET6: i32 = libc::AF_INET6;
