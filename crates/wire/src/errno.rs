//! Error numbers that mean the same on every kernel.
//!
//! The numbers of `errno.h` differ between systems, so none of them crosses the wire. One file per system
//! (for Linux `kso-sys`) maps these names to its own numbers, source: `errno(3)`, POSIX.1-2017 `<errno.h>`.

use serde::{Deserialize, Serialize};

macro_rules! errnos {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// A portable error number.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[non_exhaustive]
        pub enum Errno { $($(#[$doc])* $name,)* }

        impl Errno {
            /// Every error number there is, in wire order.
            pub const ALL: &'static [Errno] = &[$(Errno::$name,)*];

            /// The POSIX symbol, such as `ECONNREFUSED`.
            #[must_use]
            pub fn symbol(self) -> &'static str {
                match self { $(Errno::$name => stringify!($name),)* }
            }

            /// A short sentence for a person.
            #[must_use]
            pub fn text(self) -> &'static str {
                match self { $(Errno::$name => $text,)* }
            }
        }
    };
}

// The order is the wire format: append only (postcard writes the index of the variant).
#[allow(clippy::upper_case_acronyms)]
mod table {
    use super::*;
    errnos! {
        /// Operation not permitted.
        EPERM = "operation not permitted",
        /// No such file or directory.
        ENOENT = "no such file or directory",
        /// Interrupted by a signal.
        EINTR = "interrupted system call",
        /// Input or output error.
        EIO = "input/output error",
        /// Bad descriptor.
        EBADF = "bad file descriptor",
        /// Try again.
        EAGAIN = "resource temporarily unavailable",
        /// Out of memory.
        ENOMEM = "cannot allocate memory",
        /// Permission denied.
        EACCES = "permission denied",
        /// Bad address.
        EFAULT = "bad address",
        /// Busy.
        EBUSY = "device or resource busy",
        /// Invalid argument.
        EINVAL = "invalid argument",
        /// The process has too many open files.
        EMFILE = "too many open files",
        /// The system has too many open files.
        ENFILE = "too many open files in system",
        /// No space left.
        ENOSPC = "no space left on device",
        /// Broken pipe.
        EPIPE = "broken pipe",
        /// Not implemented.
        ENOSYS = "function not implemented",
        /// Not a socket.
        ENOTSOCK = "socket operation on non-socket",
        /// A destination is needed.
        EDESTADDRREQ = "destination address required",
        /// The message is too long.
        EMSGSIZE = "message too long",
        /// Wrong protocol for the socket.
        EPROTOTYPE = "protocol wrong type for socket",
        /// No such option.
        ENOPROTOOPT = "protocol not available",
        /// No such protocol.
        EPROTONOSUPPORT = "protocol not supported",
        /// Not supported.
        EOPNOTSUPP = "operation not supported",
        /// No such address family.
        EAFNOSUPPORT = "address family not supported",
        /// The address is in use.
        EADDRINUSE = "address already in use",
        /// The address is not local.
        EADDRNOTAVAIL = "cannot assign requested address",
        /// The network is down.
        ENETDOWN = "network is down",
        /// No route to the network.
        ENETUNREACH = "network is unreachable",
        /// The network dropped the connection.
        ENETRESET = "network dropped connection on reset",
        /// Aborted.
        ECONNABORTED = "software caused connection abort",
        /// Reset by the peer.
        ECONNRESET = "connection reset by peer",
        /// No buffer space.
        ENOBUFS = "no buffer space available",
        /// Already connected.
        EISCONN = "transport endpoint is already connected",
        /// Not connected.
        ENOTCONN = "transport endpoint is not connected",
        /// Timed out.
        ETIMEDOUT = "connection timed out",
        /// Refused.
        ECONNREFUSED = "connection refused",
        /// The host is down.
        EHOSTDOWN = "host is down",
        /// No route to the host.
        EHOSTUNREACH = "no route to host",
        /// Already under way.
        EALREADY = "operation already in progress",
        /// Under way.
        EINPROGRESS = "operation now in progress",
        /// Protocol error.
        EPROTO = "protocol error",
        /// Not a directory.
        ENOTDIR = "not a directory",
        /// Too many symbolic links.
        ELOOP = "too many levels of symbolic links",
        /// A name is too long.
        ENAMETOOLONG = "file name too long",
    }
}
pub use table::Errno;

impl std::fmt::Display for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.text(), self.symbol())
    }
}

impl std::error::Error for Errno {}
