//! Socket options by portable names.
//!
//! Options set on a socket before it is outsourced are read on the client kernel and applied again on the
//! external kernel. The numbers of levels and options differ between systems and stay in `kso-sys`.
//! Sources: `socket(7)`, `tcp(7)`, `ip(7)`, `ipv6(7)`.

use serde::{Deserialize, Serialize};

/// The name of an option that is carried over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[non_exhaustive]
// The order is the wire format: append only.
pub enum OptionName {
    /// `SO_REUSEADDR`, flag.
    ReuseAddress,
    /// `SO_REUSEPORT`, flag.
    ReusePort,
    /// `SO_KEEPALIVE`, flag.
    KeepAlive,
    /// `SO_LINGER`: seconds, or -1 for off.
    Linger,
    /// `SO_SNDBUF`, bytes as a program would set them (Linux reports twice that).
    SendBuffer,
    /// `SO_RCVBUF`, bytes as a program would set them.
    ReceiveBuffer,
    /// `SO_RCVTIMEO`, microseconds, 0 for none.
    ReceiveTimeout,
    /// `SO_SNDTIMEO`, microseconds, 0 for none.
    SendTimeout,
    /// `SO_PRIORITY`, 0 to 6.
    Priority,
    /// `SO_OOBINLINE`, flag.
    OutOfBandInline,
    /// `SO_RCVLOWAT`, bytes.
    ReceiveLowWater,
    /// `SO_TIMESTAMP`, flag.
    Timestamp,
    /// `SO_BUSY_POLL`, microseconds.
    BusyPoll,
    /// `TCP_NODELAY`, flag.
    NoDelay,
    /// `TCP_CORK`, flag.
    Cork,
    /// `TCP_KEEPIDLE`, seconds.
    KeepIdle,
    /// `TCP_KEEPINTVL`, seconds.
    KeepInterval,
    /// `TCP_KEEPCNT`, probes.
    KeepCount,
    /// `TCP_USER_TIMEOUT`, milliseconds.
    UserTimeout,
    /// `TCP_SYNCNT`, retransmissions.
    SynCount,
    /// `TCP_MAXSEG`, bytes.
    MaxSegment,
    /// `TCP_DEFER_ACCEPT`, seconds.
    DeferAccept,
    /// `TCP_LINGER2`, seconds.
    Linger2,
    /// `TCP_NOTSENT_LOWAT`, bytes.
    NotSentLowWater,
    /// `TCP_WINDOW_CLAMP`, bytes.
    WindowClamp,
    /// `IP_TOS`, the whole octet.
    TypeOfService,
    /// `IP_TTL`, hops.
    TimeToLive,
    /// `IP_MTU_DISCOVER`, the value of ip(7).
    MtuDiscover,
    /// `IP_RECVERR`, flag.
    ReceiveErrors,
    /// `IPV6_V6ONLY`, flag.
    V6Only,
    /// `IPV6_UNICAST_HOPS`, hops or -1.
    UnicastHops,
    /// `IPV6_TCLASS`, the whole octet.
    TrafficClass,
    /// `TCP_CONGESTION`: a position in [`CONGESTION_CONTROLS`].
    CongestionControl,
}

/// The algorithms of congestion control that [`OptionName::CongestionControl`] can name. Append only.
pub const CONGESTION_CONTROLS: &[&str] = &[
    "reno",
    "cubic",
    "bbr",
    "dctcp",
    "vegas",
    "westwood",
    "htcp",
    "bic",
    "hybla",
    "illinois",
    "veno",
    "yeah",
    "lp",
    "nv",
    "cdg",
    "scalable",
    "highspeed",
    "bbr2",
    "bbr3",
    "prague",
];

/// The value of an option; its unit is the option's.
pub type OptionValue = i64;

/// One option with its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketOption {
    /// Which.
    pub name: OptionName,
    /// Its value.
    pub value: OptionValue,
}

/// The options that differ from a fresh socket's, in the order in which they are to be applied.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketOptions(
    #[serde(deserialize_with = "crate::codec::at_most::<_, _, { SocketOptions::MAX }>")] Vec<SocketOption>,
);

impl SocketOptions {
    /// At most so many options are carried; a message with more is refused.
    pub const MAX: usize = 64;

    /// Adds an option. Past [`Self::MAX`] it does nothing (there are fewer names than that).
    pub fn push(&mut self, name: OptionName, value: OptionValue) {
        if self.0.len() < Self::MAX {
            self.0.push(SocketOption { name, value });
        }
    }

    /// Adds an option, or gives it another value.
    pub fn set(&mut self, name: OptionName, value: OptionValue) {
        match self.0.iter_mut().find(|option| option.name == name) {
            Some(option) => option.value = value,
            None => self.push(name, value),
        }
    }

    /// The options in order.
    pub fn iter(&self) -> impl Iterator<Item = SocketOption> + '_ {
        self.0.iter().copied()
    }

    /// The value of `name`, if it is carried.
    #[must_use]
    pub fn get(&self, name: OptionName) -> Option<OptionValue> {
        self.iter().find(|option| option.name == name).map(|option| option.value)
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
