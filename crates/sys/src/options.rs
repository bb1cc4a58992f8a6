//! Socket options by portable name, on Linux. Sources: socket(7), tcp(7), ip(7), ipv6(7).

mod bytes;
mod chosen;
pub use bytes::{from_bytes, name_of, to_bytes};
pub use chosen::read_these;

use crate::socket::{get, set};
use kso_wire::{CONGESTION_CONTROLS, Family, OptionName, OptionValue, SocketOptions};
use std::io;
use std::os::fd::BorrowedFd;

/// How a value is laid out in the kernel's own type.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Layout {
    Int,
    /// `int`, reported as twice what was set (socket(7), `SO_SNDBUF`).
    Doubled,
    /// `struct linger`.
    Linger,
    /// `struct timeval`.
    Time,
    /// A name (`TCP_CA_NAME_MAX` bytes).
    Congestion,
}

struct Entry {
    name: OptionName,
    level: libc::c_int,
    number: libc::c_int,
    layout: Layout,
    /// `None`: sockets of both families have it.
    family: Option<Family>,
    /// Set once in the life of a socket at most: whoever sees it being set need not ask each socket for it. The others
    /// are set on each accepted connection, or again and again: seeing those would cost more.
    rare: bool,
}

impl Entry {
    const fn rare(mut self) -> Self {
        self.rare = true;
        self
    }
}

const fn entry(name: OptionName, level: libc::c_int, number: libc::c_int, layout: Layout) -> Entry {
    Entry { name, level, number, layout, family: None, rare: false }
}

const fn only(family: Family, name: OptionName, level: libc::c_int, number: libc::c_int) -> Entry {
    Entry { name, level, number, layout: Layout::Int, family: Some(family), rare: false }
}

const TCP_NOTSENT_LOWAT: libc::c_int = 25;
/// Which buffer sizes a program has set (Linux 5.15; `include/uapi/asm-generic/socket.h`).
const SO_BUF_LOCK: libc::c_int = 72;
/// `SOCK_SNDBUF_LOCK` and `SOCK_RCVBUF_LOCK` (`include/uapi/linux/socket.h`).
const SEND_BUFFER_LOCK: libc::c_int = 1;
const RECEIVE_BUFFER_LOCK: libc::c_int = 2;

/// Every option that is carried over. `V6Only` and the reuse flags come first: they matter to `bind`.
const TABLE: &[Entry] = &[
    only(Family::V6, OptionName::V6Only, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY).rare(),
    entry(OptionName::ReuseAddress, libc::SOL_SOCKET, libc::SO_REUSEADDR, Layout::Int).rare(),
    entry(OptionName::ReusePort, libc::SOL_SOCKET, libc::SO_REUSEPORT, Layout::Int).rare(),
    entry(OptionName::KeepAlive, libc::SOL_SOCKET, libc::SO_KEEPALIVE, Layout::Int),
    entry(OptionName::Linger, libc::SOL_SOCKET, libc::SO_LINGER, Layout::Linger).rare(),
    entry(OptionName::SendBuffer, libc::SOL_SOCKET, libc::SO_SNDBUF, Layout::Doubled),
    entry(OptionName::ReceiveBuffer, libc::SOL_SOCKET, libc::SO_RCVBUF, Layout::Doubled),
    entry(OptionName::ReceiveTimeout, libc::SOL_SOCKET, libc::SO_RCVTIMEO, Layout::Time),
    entry(OptionName::SendTimeout, libc::SOL_SOCKET, libc::SO_SNDTIMEO, Layout::Time),
    entry(OptionName::Priority, libc::SOL_SOCKET, libc::SO_PRIORITY, Layout::Int).rare(),
    entry(OptionName::OutOfBandInline, libc::SOL_SOCKET, libc::SO_OOBINLINE, Layout::Int).rare(),
    entry(OptionName::ReceiveLowWater, libc::SOL_SOCKET, libc::SO_RCVLOWAT, Layout::Int).rare(),
    entry(OptionName::Timestamp, libc::SOL_SOCKET, libc::SO_TIMESTAMP, Layout::Int).rare(),
    entry(OptionName::BusyPoll, libc::SOL_SOCKET, libc::SO_BUSY_POLL, Layout::Int).rare(),
    entry(OptionName::NoDelay, libc::IPPROTO_TCP, libc::TCP_NODELAY, Layout::Int),
    entry(OptionName::Cork, libc::IPPROTO_TCP, libc::TCP_CORK, Layout::Int),
    entry(OptionName::KeepIdle, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, Layout::Int),
    entry(OptionName::KeepInterval, libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, Layout::Int),
    entry(OptionName::KeepCount, libc::IPPROTO_TCP, libc::TCP_KEEPCNT, Layout::Int),
    entry(OptionName::UserTimeout, libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, Layout::Int).rare(),
    entry(OptionName::SynCount, libc::IPPROTO_TCP, libc::TCP_SYNCNT, Layout::Int).rare(),
    entry(OptionName::MaxSegment, libc::IPPROTO_TCP, libc::TCP_MAXSEG, Layout::Int).rare(),
    entry(OptionName::DeferAccept, libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, Layout::Int).rare(),
    entry(OptionName::Linger2, libc::IPPROTO_TCP, libc::TCP_LINGER2, Layout::Int).rare(),
    entry(OptionName::NotSentLowWater, libc::IPPROTO_TCP, TCP_NOTSENT_LOWAT, Layout::Int).rare(),
    entry(OptionName::WindowClamp, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, Layout::Int).rare(),
    entry(OptionName::CongestionControl, libc::IPPROTO_TCP, libc::TCP_CONGESTION, Layout::Congestion).rare(),
    entry(OptionName::TypeOfService, libc::IPPROTO_IP, libc::IP_TOS, Layout::Int).rare(),
    entry(OptionName::TimeToLive, libc::IPPROTO_IP, libc::IP_TTL, Layout::Int).rare(),
    entry(OptionName::MtuDiscover, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, Layout::Int).rare(),
    entry(OptionName::ReceiveErrors, libc::IPPROTO_IP, libc::IP_RECVERR, Layout::Int).rare(),
    only(Family::V6, OptionName::UnicastHops, libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS).rare(),
    only(Family::V6, OptionName::TrafficClass, libc::IPPROTO_IPV6, libc::IPV6_TCLASS).rare(),
];

/// `char name[TCP_CA_NAME_MAX]`, padded with zeroes.
type CongestionName = [u8; 16];

fn padded(name: &str) -> CongestionName {
    let mut bytes = [0; 16];
    bytes.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from);
    bytes
}

/// Microseconds of a second.
const MICROS: i64 = 1_000_000;

fn read_one(socket: BorrowedFd<'_>, entry: &Entry) -> io::Result<OptionValue> {
    Ok(match entry.layout {
        Layout::Int => get::<libc::c_int>(socket, entry.level, entry.number)?.into(),
        Layout::Doubled => i64::from(get::<libc::c_int>(socket, entry.level, entry.number)?) / 2,
        Layout::Linger => {
            let linger: libc::linger = get(socket, entry.level, entry.number)?;
            if linger.l_onoff == 0 { -1 } else { linger.l_linger.into() }
        }
        Layout::Time => {
            let time: libc::timeval = get(socket, entry.level, entry.number)?;
            time.tv_sec.saturating_mul(MICROS).saturating_add(time.tv_usec)
        }
        Layout::Congestion => {
            let name: CongestionName = get(socket, entry.level, entry.number)?;
            let known = CONGESTION_CONTROLS.iter().position(|known| padded(known) == name);
            known.and_then(|at| i64::try_from(at).ok()).ok_or(io::ErrorKind::Unsupported)?
        }
    })
}

fn apply_one(socket: BorrowedFd<'_>, entry: &Entry, value: OptionValue) -> io::Result<()> {
    let int = libc::c_int::try_from(value).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    match entry.layout {
        Layout::Int | Layout::Doubled => set(socket, entry.level, entry.number, &int),
        Layout::Linger => {
            let linger = libc::linger { l_onoff: (value >= 0).into(), l_linger: int.max(0) };
            set(socket, entry.level, entry.number, &linger)
        }
        Layout::Time => {
            let value = value.max(0);
            let time = libc::timeval { tv_sec: value / MICROS, tv_usec: value % MICROS };
            set(socket, entry.level, entry.number, &time)
        }
        Layout::Congestion => {
            let name = usize::try_from(value).ok().and_then(|at| CONGESTION_CONTROLS.get(at));
            set(socket, entry.level, entry.number, &padded(name.ok_or(io::ErrorKind::InvalidInput)?))
        }
    }
}

/// What a fresh socket of a family has: only what differs is carried over.
#[derive(Clone, Debug)]
pub struct Defaults {
    family: Family,
    values: [Option<OptionValue>; TABLE.len()],
}

impl Defaults {
    /// Reads them off a socket on which nothing was set yet.
    #[must_use]
    pub fn of(fresh: BorrowedFd<'_>, family: Family) -> Self {
        let mut values = [None; TABLE.len()];
        for (value, entry) in values.iter_mut().zip(TABLE) {
            if entry.family.is_none_or(|only| only == family) {
                *value = read_one(fresh, entry).ok();
            }
        }
        Self { family, values }
    }

    /// The value of one.
    #[must_use]
    pub fn get(&self, name: OptionName) -> Option<OptionValue> {
        let at = TABLE.iter().position(|entry| entry.name == name)?;
        self.values.get(at).copied().flatten()
    }
}

/// Level and number of each option that is rarely set: whoever sees them being set (setsockopt(2)) need not
/// read them off every socket.
pub fn rare() -> impl Iterator<Item = (i32, i32)> {
    TABLE.iter().filter(|entry| entry.rare).map(|entry| (entry.level, entry.number))
}

/// The options of `socket` that differ from `defaults`, in the order in which to apply them; those of
/// [`rare`] only if `all` is asked for. Each costs a third of a microsecond.
#[must_use]
pub fn read(socket: BorrowedFd<'_>, defaults: &Defaults, all: bool) -> SocketOptions {
    let mut options = SocketOptions::default();
    // One question for both; an older kernel is asked for each.
    let buffers =
        get(socket, libc::SOL_SOCKET, SO_BUF_LOCK).unwrap_or(SEND_BUFFER_LOCK | RECEIVE_BUFFER_LOCK);
    for (entry, default) in TABLE.iter().zip(&defaults.values) {
        let untouched = match entry.name {
            OptionName::SendBuffer => buffers & SEND_BUFFER_LOCK == 0,
            OptionName::ReceiveBuffer => buffers & RECEIVE_BUFFER_LOCK == 0,
            _ => entry.rare && !all,
        };
        if untouched || entry.family.is_some_and(|only| only != defaults.family) {
            continue;
        }
        if let Ok(value) = read_one(socket, entry)
            && Some(value) != *default
        {
            options.push(entry.name, value);
        }
    }
    options
}

/// One option of a socket.
///
/// # Errors
/// What getsockopt(2) says; `ENOPROTOOPT` for an option that this kernel does not have.
pub fn get_one(socket: BorrowedFd<'_>, name: OptionName) -> io::Result<OptionValue> {
    read_one(socket, find(name)?)
}

/// Sets one option.
///
/// # Errors
/// As [`get_one`], setsockopt(2).
pub fn set_one(socket: BorrowedFd<'_>, name: OptionName, value: OptionValue) -> io::Result<()> {
    apply_one(socket, find(name)?, value)
}

fn find(name: OptionName) -> io::Result<&'static Entry> {
    let entry = TABLE.iter().find(|entry| entry.name == name);
    entry.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOPROTOOPT))
}

/// Sets every option. One that this kernel refuses (an unknown one, a value over its limit) is passed over:
/// the program was told yes by its own kernel already.
///
/// # Errors
/// The socket is not one (`EBADF`, `ENOTSOCK`).
pub fn apply(socket: BorrowedFd<'_>, options: &SocketOptions) -> io::Result<()> {
    for option in options.iter() {
        let Some(entry) = TABLE.iter().find(|entry| entry.name == option.name) else { continue };
        match apply_one(socket, entry, option.value) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EBADF | libc::ENOTSOCK)) => {
                return Err(error);
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    #[test]
    fn what_a_program_set_is_carried_and_nothing_else() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let fresh = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let defaults = Defaults::of(fresh.as_fd(), Family::V4);
        assert!(read(fresh.as_fd(), &defaults, true).is_empty());

        let set = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        set.set_nodelay(true).unwrap();
        set.set_read_timeout(Some(std::time::Duration::from_micros(1_250_000))).unwrap();
        set.set_ttl(33).unwrap();
        let options = read(set.as_fd(), &defaults, true);
        assert_eq!(options.get(OptionName::NoDelay), Some(1));
        assert_eq!(options.get(OptionName::TimeToLive), Some(33));
        assert_eq!(options.len(), 3);
        assert_eq!(read(set.as_fd(), &defaults, false).get(OptionName::TimeToLive), None, "it is rare");

        let copy = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        apply(copy.as_fd(), &options).unwrap();
        assert_eq!(read(copy.as_fd(), &defaults, true), options);
    }
}
