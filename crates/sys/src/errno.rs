//! Linux's error numbers for the portable ones. Source: `include/uapi/asm-generic/errno*.h`.

use kso_wire::Errno;

macro_rules! map {
    ($($name:ident),* $(,)?) => {
        /// Linux's number of a portable error.
        #[must_use]
        pub fn to_raw(errno: Errno) -> i32 {
            match errno {
                $(Errno::$name => libc::$name,)*
                _ => libc::EIO,
            }
        }

        /// The portable error of Linux's number; `EIO` for what has no name.
        #[must_use]
        pub fn from_raw(raw: i32) -> Errno {
            match raw {
                $(libc::$name => Errno::$name,)*
                _ => Errno::EIO,
            }
        }
    };
}

map!(
    EPERM,
    ENOENT,
    EINTR,
    EIO,
    EBADF,
    EAGAIN,
    ENOMEM,
    EACCES,
    EFAULT,
    EBUSY,
    EINVAL,
    EMFILE,
    ENFILE,
    ENOSPC,
    EPIPE,
    ENOSYS,
    ENOTSOCK,
    EDESTADDRREQ,
    EMSGSIZE,
    EPROTOTYPE,
    ENOPROTOOPT,
    EPROTONOSUPPORT,
    EOPNOTSUPP,
    EAFNOSUPPORT,
    EADDRINUSE,
    EADDRNOTAVAIL,
    ENETDOWN,
    ENETUNREACH,
    ENETRESET,
    ECONNABORTED,
    ECONNRESET,
    ENOBUFS,
    EISCONN,
    ENOTCONN,
    ETIMEDOUT,
    ECONNREFUSED,
    EHOSTDOWN,
    EHOSTUNREACH,
    EALREADY,
    EINPROGRESS,
    EPROTO,
    ENOTDIR,
    ELOOP,
    ENAMETOOLONG,
);

/// The portable error of a failed call.
#[must_use]
pub fn of(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, from_raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_portable_error_survives_the_round_trip() {
        for &errno in Errno::ALL {
            assert_eq!(from_raw(to_raw(errno)), errno);
        }
    }
}
