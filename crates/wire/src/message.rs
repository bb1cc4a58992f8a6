//! What is asked and what is answered.
//!
//! ```text
//!   runner                                  broker
//!     | -- Hello ---------------------------> |     once, at the start
//!     | <------------------- Welcome/Refused  |
//!     | -- Request{id, caller, ..} ---------> |     any number, at most MAX_PENDING unanswered
//!     | <------------------- Answered{id, ..} |     in any order; a descriptor may ride along
//!     | -- Forget{id} ----------------------> |     the caller was interrupted: an answer is no longer wanted
//! ```

use crate::{Errno, SocketOptions};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, SocketAddr};

/// At most so many requests of a session are unanswered at one time; one more is refused with `ENOBUFS`.
pub const MAX_PENDING: usize = 4096;
/// Longest program name carried, bytes.
pub const MAX_PROGRAM: usize = 64;
/// Most rules or publications in a [`Hello`].
pub const MAX_RULES: usize = 1024;
/// Longest text of one rule, bytes.
pub const MAX_RULE: usize = 512;
/// Longest text for a person, bytes.
pub const MAX_MESSAGE_TEXT: usize = 4096;
/// Most ports that a launcher serves.
pub const MAX_PORTS: usize = 8;
/// Longest DNS message, bytes (RFC 1035, 4.2.2).
pub const MAX_DNS: usize = 65_535;

/// Names a request within its session. The client chooses it; it is unique among the unanswered ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RequestId(pub u64);

impl RequestId {
    const GATEWAY: u64 = 1 << 63;

    /// The `n`th request of the interceptor.
    #[must_use]
    pub fn interceptor(n: u64) -> Self {
        Self(n & !Self::GATEWAY)
    }

    /// The `n`th request of the TUN gateway.
    #[must_use]
    pub fn gateway(n: u64) -> Self {
        Self(n | Self::GATEWAY)
    }

    /// Whether the TUN gateway asked.
    #[must_use]
    pub fn is_gateway(self) -> bool {
        self.0 & Self::GATEWAY != 0
    }
}

/// Who asks: for policy by program, and for the eyes of a person.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Caller {
    /// The process, as the runner's kernel numbers it; 0 when unknown (packets have no sender).
    pub pid: u32,
    /// Its name (`comm`), at most [`MAX_PROGRAM`] bytes; empty when unknown.
    pub program: String,
}

/// Which of the two loopback networks 127.0.0.0/8 and ::1 mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum LoopbackMode {
    /// The client kernel's own: private to the sandbox.
    #[default]
    Private,
    /// The external kernel's: stream sockets on loopback are outsourced too.
    External,
}

/// Stream or datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP and ICMPv6 echo.
    Icmp,
}

impl Protocol {
    /// Its lower-case name: `tcp`, `udp`, `icmp`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Icmp => "icmp",
        }
    }
}

/// Lets the outside reach a port of the sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publication {
    /// The address outside; `None` is loopback (127.0.0.1 and ::1).
    pub address: Option<IpAddr>,
    /// The port outside. 0: the same number as the port inside.
    pub outer_port: u16,
    /// The port inside. 0: every port on which a program listens (then `outer_port` is 0 too).
    pub inner_port: u16,
    /// TCP or UDP.
    pub protocol: Protocol,
}

/// The addresses of the sandbox's TUN network, one pair per family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunAddresses {
    /// The sandbox's own addresses.
    pub guest: [IpAddr; 2],
    /// The gateway: answers names, and stands for the external kernel's loopback (`host.kso.internal`).
    pub gateway: [IpAddr; 2],
}

impl TunAddresses {
    /// 198.18.0.0/15 (RFC 2544) and a unique local prefix (RFC 4193): neither is a real destination.
    #[must_use]
    pub fn standard() -> Self {
        use std::net::{Ipv4Addr, Ipv6Addr};
        let v6 = |host| IpAddr::V6(Ipv6Addr::new(0xfd6b, 0x736f, 0, 0, 0, 0, 0, host));
        let v4 = |host| IpAddr::V4(Ipv4Addr::new(198, 18, 0, host));
        Self { guest: [v4(2), v6(2)], gateway: [v4(1), v6(1)] }
    }

    /// Whether `address` is one of the sandbox's own.
    #[must_use]
    pub fn is_guest(&self, address: IpAddr) -> bool {
        self.guest.contains(&address.to_canonical())
    }

    /// Whether `address` is the gateway.
    #[must_use]
    pub fn is_gateway(&self, address: IpAddr) -> bool {
        self.gateway.contains(&address.to_canonical())
    }
}

/// Opens a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`crate::VERSION`] of the client.
    pub version: u16,
    /// A name for `kso ps`.
    pub name: String,
    /// The command line, for people, cut to a bound.
    pub command: String,
    /// The first process of the sandbox, as the host numbers it; 0 when there is none on this host.
    pub pid: u32,
    /// Rules of this session in the syntax of `--allow` and `--deny`, in order: `(allow, text)`.
    #[serde(deserialize_with = "crate::codec::at_most::<_, _, MAX_RULES>")]
    pub rules: Vec<(bool, String)>,
    /// Nothing outside may be reached at all.
    pub no_net: bool,
    /// What is published.
    #[serde(deserialize_with = "crate::codec::at_most::<_, _, MAX_RULES>")]
    pub publish: Vec<Publication>,
    /// Where loopback is.
    pub loopback: LoopbackMode,
    /// The session's addresses.
    pub tun: TunAddresses,
}

/// Opens a session for a guest whose vsock device the broker shall serve. Descriptors ride along (`SCM_RIGHTS`): first the
/// vhost-user socket that leads to the guest's VMM, then one stream for each of `ports`. The guest has no more to ask
/// than its device lets through: nothing but the end of the connection follows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestHello {
    /// The session.
    pub hello: Hello,
    /// Which of [`crate::guest::ports`] the launcher serves, at most [`MAX_PORTS`].
    #[serde(deserialize_with = "crate::codec::at_most::<_, _, MAX_PORTS>")]
    pub ports: Vec<u32>,
}

/// Accepts a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// [`crate::VERSION`] of the broker.
    pub version: u16,
    /// The session's number.
    pub session: u64,
}

/// Address family of the program's socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Family {
    /// `AF_INET`.
    V4,
    /// `AF_INET6`; its addresses may be IPv4-mapped.
    V6,
}

/// How a stream reached the runner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Origin {
    /// `connect` was intercepted.
    Intercepted,
    /// A SYN came by the TUN.
    Tun,
}

/// Connect a stream socket. Answered with a descriptor whose connection is under way or established:
/// it is non-blocking while the broker holds it, and the runner sets its flags.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connect {
    /// Where to, as the program said it (not translated, IPv4-mapped addresses as they are).
    pub peer: SocketAddr,
    /// The family of the program's socket; the descriptor has it too.
    pub family: Family,
    /// The address the program bound first, if it did.
    pub local: Option<SocketAddr>,
    /// Options to apply before connecting.
    pub options: SocketOptions,
    /// How it came.
    pub origin: Origin,
}

/// Make a stream socket listen. Answered with a descriptor that listens, or with [`Reply::StayInside`] if
/// nothing publishes this port.
///
/// Without a backlog it only *reserves*: the broker binds a socket outside and keeps it; the answer is
/// [`Reply::Socket`] with its local address and no descriptor. The runner gives the program's own socket the
/// same port, so that what `getsockname` says inside is what is true outside. A later `Listen` or `Connect`
/// whose `local` has that port uses the reserved socket (with the options of the later message applied), and
/// [`Request::Release`] gives it back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listen {
    /// The address inside, as `getsockname` tells it to the program.
    pub local: SocketAddr,
    /// The family of the program's socket.
    pub family: Family,
    /// `listen`'s argument; `None` only reserves.
    pub backlog: Option<i32>,
    /// Options to apply before binding.
    pub options: SocketOptions,
}

/// Open a datagram flow: answered with a socket bound outside and connected to the peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenDatagram {
    /// The sandbox's end. Flows of one `guest` to several peers leave from one port outside.
    pub guest: SocketAddr,
    /// The other end.
    pub peer: SocketAddr,
}

/// Open a published datagram port: answered with an unconnected socket bound outside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BindDatagram {
    /// Which publication, by its position in [`Hello::publish`].
    pub publication: u32,
    /// A publication on loopback has one socket per family.
    pub family: Family,
}

/// Open an echo flow: answered with a ping socket connected to the peer. Its descriptor reads and writes
/// ICMP messages without an IP header when it is a datagram socket, and with one when it is an IPv4 raw
/// socket (`raw(7)`), as [`Reply::Echo`] says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenEcho {
    /// The other end.
    pub peer: IpAddr,
    /// The identifier the program used.
    pub identifier: u16,
}

/// Something for the broker to decide and do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// See [`Connect`].
    Connect(Connect),
    /// See [`Listen`].
    Listen(Listen),
    /// See [`OpenDatagram`].
    OpenDatagram(OpenDatagram),
    /// See [`BindDatagram`].
    BindDatagram(BindDatagram),
    /// See [`OpenEcho`].
    OpenEcho(OpenEcho),
    /// A DNS query message (RFC 1035) of at most [`MAX_DNS`] bytes; answered with a DNS message.
    Resolve(#[serde(with = "serde_bytes_vec")] Vec<u8>),
    /// The reservation of this local address (as [`Reply::Socket`] told it) is no longer wanted: the program
    /// closed its socket. Answered with [`Reply::StayInside`], also when there is none.
    Release(SocketAddr),
}

/// Bytes are written as a length and the bytes, not as a sequence of numbers.
mod serde_bytes_vec {
    use serde::{Deserializer, Serializer, de::Visitor};

    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        struct Bytes;
        impl<'de> Visitor<'de> for Bytes {
            type Value = Vec<u8>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("bytes")
            }
            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
                Ok(bytes.to_vec())
            }
            fn visit_borrowed_bytes<E>(self, bytes: &'de [u8]) -> Result<Vec<u8>, E> {
                Ok(bytes.to_vec())
            }
        }
        deserializer.deserialize_byte_buf(Bytes)
    }
}

/// What came of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// A descriptor rides along (except for a reservation). `local` is its address outside, when it is bound.
    Socket {
        /// `getsockname` outside.
        local: Option<SocketAddr>,
    },
    /// Not outsourced: the client kernel shall do it.
    StayInside,
    /// A ping socket rides along.
    Echo {
        /// The descriptor is a raw socket: what it reads begins with an IPv4 header if the peer is IPv4,
        /// its identifier is the program's, and echoes of others are seen too.
        raw: bool,
    },
    /// A DNS message.
    Resolved(#[serde(with = "serde_bytes_vec")] Vec<u8>),
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What the program gets.
    pub errno: Errno,
    /// Whether policy refused it, rather than the external kernel.
    pub denied: bool,
}

impl Failure {
    /// The external kernel refused.
    #[must_use]
    pub fn kernel(errno: Errno) -> Self {
        Self { errno, denied: false }
    }

    /// Policy refused.
    #[must_use]
    pub fn denied(errno: Errno) -> Self {
        Self { errno, denied: true }
    }
}

/// From a runner to its broker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToBroker {
    /// First message of a session.
    Hello(Hello),
    /// Do this.
    Request {
        /// Named so.
        id: RequestId,
        /// Asked by.
        caller: Caller,
        /// What to do.
        request: Request,
    },
    /// The answer is no longer wanted.
    Forget(RequestId),
    /// First message of a guest's session.
    Guest(GuestHello),
}

/// From a broker to a runner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToRunner {
    /// The session is open.
    Welcome(Welcome),
    /// It is not, and why.
    Refused(String),
    /// What came of a request.
    Answered {
        /// Its name.
        id: RequestId,
        /// The outcome.
        result: Result<Reply, Failure>,
        /// Whether a descriptor rides along (`SCM_RIGHTS`).
        descriptor: bool,
    },
}
