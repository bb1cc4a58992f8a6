//! What happened in a session: one line of `kso trace` each.
//!
//! Display is the line for a person, in the manner of `strace(1)`; serde is the line of `--json`. Texts that come
//! from programs (names, command lines) are made printable in Display.

use crate::place::printable;
use kso_wire::{Errno, Protocol};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

mod time;
pub use time::Time;

/// Something happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// When.
    pub time: Time,
    /// In which session.
    pub session: u64,
    /// The process that did it; 0 when unknown.
    pub pid: u32,
    /// The process's name; empty when unknown.
    pub program: String,
    /// What.
    #[serde(flatten)]
    pub kind: Kind,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Kind {
    /// A session began.
    SessionStart(SessionStart),
    /// A session ended.
    SessionEnd(SessionEnd),
    /// A program connected a stream.
    Connect(Connect),
    /// A program listens.
    Listen(Listen),
    /// A connection came in.
    Accept(Accept),
    /// A connection ended.
    Closed(Closed),
    /// A name was looked up.
    Resolve(Resolve),
    /// Policy refused something.
    Denied(Denied),
    /// A datagram flow began or ended.
    Datagram(Datagram),
    /// Echo requests were sent to someone.
    Echo(Echo),
    /// Something happened to an external kernel; the session is 0.
    Kernel(Kernel),
}

/// See [`Kind::SessionStart`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SessionStart {
    /// Its name.
    pub name: String,
    /// What it runs.
    pub command: String,
}

/// See [`Kind::SessionEnd`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SessionEnd {
    /// Its name.
    pub name: String,
    /// How long it took.
    pub duration_us: Micros,
}

/// See [`Kind::Connect`]. The connection is under way when there is no error: how it ends is told by
/// [`Closed`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Connect {
    /// Where to.
    pub peer: SocketAddr,
    /// The names under which the session knows the address.
    pub names: Vec<String>,
    /// The address outside from which it goes.
    pub local: Option<SocketAddr>,
    /// Why it failed, if it did.
    pub error: Option<Errno>,
}

/// See [`Kind::Listen`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Listen {
    /// The address inside.
    pub local: SocketAddr,
    /// The address outside; `None`: it stays inside.
    pub published: Option<SocketAddr>,
    /// Why it failed, if it did.
    pub error: Option<Errno>,
}

/// See [`Kind::Accept`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Accept {
    /// The listener's address outside.
    pub local: SocketAddr,
    /// Who came.
    pub peer: SocketAddr,
}

/// Who began a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// The sandbox.
    Out,
    /// The outside.
    In,
}

/// See [`Kind::Closed`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Closed {
    /// The other end.
    pub peer: SocketAddr,
    /// The names under which the session knows it.
    pub names: Vec<String>,
    /// Our end, outside.
    pub local: Option<SocketAddr>,
    /// Who began.
    pub direction: Direction,
    /// Bytes that the sandbox received.
    pub bytes_in: u64,
    /// Bytes that the sandbox sent.
    pub bytes_out: u64,
    /// From connect or accept to the end.
    pub duration_us: Micros,
    /// What ended it, if it was not a normal end.
    pub error: Option<Errno>,
}

/// See [`Kind::Resolve`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Resolve {
    /// The name.
    pub name: String,
    /// What about it: `A`, `AAAA`, ...
    pub record: String,
    /// The response code: `NOERROR`, `NXDOMAIN`, ...
    pub code: String,
    /// The addresses in the answer.
    pub addresses: Vec<IpAddr>,
    /// How long it took.
    pub duration_us: Micros,
}

/// See [`Kind::Denied`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Denied {
    /// Where to; `None`: a name was to be looked up.
    pub address: Option<IpAddr>,
    /// The port, unless it is an echo or a name.
    pub port: Option<u16>,
    /// By what protocol.
    pub protocol: Protocol,
    /// The names under which the session knows the address, or the name itself.
    pub names: Vec<String>,
    /// What the program was told.
    pub error: Errno,
    /// Why.
    pub reason: String,
}

/// See [`Kind::Datagram`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Datagram {
    /// The sandbox's end.
    pub local: SocketAddr,
    /// The other end.
    pub peer: SocketAddr,
    /// The names under which the session knows it.
    pub names: Vec<String>,
    /// Why it failed, if it did.
    pub error: Option<Errno>,
    /// What it carried, if it ended.
    pub ended: Option<Flow>,
}

/// What a datagram flow carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flow {
    /// Bytes that the sandbox received.
    pub bytes_in: u64,
    /// Bytes that the sandbox sent.
    pub bytes_out: u64,
    /// From the first datagram to the last.
    pub duration_us: Micros,
}

/// See [`Kind::Kernel`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Kernel {
    /// Its name.
    pub kernel: String,
    /// `up`, `down`, `draining` or `aside`.
    pub state: String,
    /// Its version, or why it is down.
    pub detail: String,
}

/// See [`Kind::Echo`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Echo {
    /// The other end.
    pub peer: IpAddr,
    /// The names under which the session knows it.
    pub names: Vec<String>,
    /// Why it failed, if it did.
    pub error: Option<Errno>,
}

/// A duration: a number of microseconds in JSON, `1.2 ms` for people.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Micros(pub u64);

impl From<Duration> for Micros {
    fn from(duration: Duration) -> Self {
        Self(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX))
    }
}

impl fmt::Display for Micros {
    #[allow(clippy::cast_precision_loss)] // Four digits are shown.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let micros = self.0 as f64;
        match self.0 {
            0..1_000 => write!(f, "{} us", self.0),
            1_000..1_000_000 => write!(f, "{:.1} ms", micros / 1e3),
            _ => write!(f, "{:.1} s", micros / 1e6),
        }
    }
}

/// A number of bytes for people, in powers of 1000.
struct Bytes(u64);

impl fmt::Display for Bytes {
    #[allow(clippy::cast_precision_loss)] // Two digits are shown.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0 as f64;
        match self.0 {
            0..1_000 => write!(f, "{} B", self.0),
            1_000..1_000_000 => write!(f, "{:.1} kB", bytes / 1e3),
            1_000_000..1_000_000_000 => write!(f, "{:.1} MB", bytes / 1e6),
            _ => write!(f, "{:.1} GB", bytes / 1e9),
        }
    }
}

/// An address and the first of its names: `example.org 192.0.2.1:80`.
struct Named<'a, A>(&'a [String], A);

impl<A: fmt::Display> fmt::Display for Named<'_, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(name) = self.0.first() {
            write!(f, "{} ", printable(name))?;
        }
        write!(f, "{}", self.1)
    }
}

/// What a call returned: `0`, or the error as strace shows it.
struct Outcome(Option<Errno>);

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => f.write_str("0"),
            Some(errno) => write!(f, "-1 {} ({})", errno.symbol(), errno.text()),
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} #{} ", self.time.of_day(), self.session)?;
        if !self.program.is_empty() || self.pid != 0 {
            write!(f, "{}[{}] ", printable(&self.program), self.pid)?;
        }
        write!(f, "{}", self.kind)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SessionStart(event) => {
                write!(f, "session {} started: {}", printable(&event.name), printable(&event.command))
            }
            Self::SessionEnd(event) => {
                write!(f, "session {} ended <{}>", printable(&event.name), event.duration_us)
            }
            Self::Connect(Connect { peer, names, local, error }) => {
                write!(f, "connect({}) = {}", Named(names, peer), Outcome(*error))?;
                local.map_or(Ok(()), |local| write!(f, " from {local}"))
            }
            Self::Listen(Listen { local, published, error }) => {
                write!(f, "listen({local}) = {}", Outcome(*error))?;
                match published {
                    Some(published) => write!(f, " published on {published}"),
                    None if error.is_none() => f.write_str(" inside"),
                    None => Ok(()),
                }
            }
            Self::Accept(Accept { local, peer }) => write!(f, "accept({local}) = {peer}"),
            Self::Closed(event) => closed(f, event),
            Self::Resolve(Resolve { name, record, code, addresses, duration_us }) => {
                write!(f, "resolve({} {}) = ", printable(name), printable(record))?;
                if addresses.is_empty() {
                    write!(f, "{}", printable(code))?;
                }
                for (index, address) in addresses.iter().enumerate() {
                    write!(f, "{}{address}", if index == 0 { "" } else { " " })?;
                }
                write!(f, " <{duration_us}>")
            }
            Self::Denied(event) => denied(f, event),
            Self::Datagram(Datagram { local, peer, names, error, ended }) => match ended {
                None => write!(f, "udp({} from {local}) = {}", Named(names, peer), Outcome(*error)),
                Some(Flow { bytes_in, bytes_out, duration_us }) => {
                    write!(f, "udp({} from {local}) ended", Named(names, peer))?;
                    write!(f, " in {} out {} <{duration_us}>", Bytes(*bytes_in), Bytes(*bytes_out))
                }
            },
            Self::Echo(Echo { peer, names, error }) => {
                write!(f, "echo({}) = {}", Named(names, peer), Outcome(*error))
            }
            Self::Kernel(Kernel { kernel, state, detail }) => {
                write!(f, "kernel {} {}: {}", printable(kernel), printable(state), printable(detail))
            }
        }
    }
}

fn closed(f: &mut fmt::Formatter<'_>, event: &Closed) -> fmt::Result {
    let Closed { peer, names, local, direction, bytes_in, bytes_out, duration_us, error } = event;
    match (direction, local) {
        (Direction::Out, _) => write!(f, "closed({})", Named(names, peer))?,
        (Direction::In, Some(local)) => write!(f, "closed({local} from {peer})")?,
        (Direction::In, None) => write!(f, "closed(from {peer})")?,
    }
    if let Some(errno) = error {
        write!(f, " {} ({})", errno.symbol(), errno.text())?;
    }
    write!(f, " in {} out {} <{duration_us}>", Bytes(*bytes_in), Bytes(*bytes_out))
}

fn denied(f: &mut fmt::Formatter<'_>, event: &Denied) -> fmt::Result {
    let Denied { address, port, protocol, names, error, reason } = event;
    let what = match protocol {
        _ if address.is_none() => "resolve",
        Protocol::Tcp => "connect",
        Protocol::Udp => "udp",
        Protocol::Icmp => "echo",
    };
    let place = match (address, port) {
        (Some(address), Some(port)) => Named(names, SocketAddr::new(*address, *port).to_string()).to_string(),
        (Some(address), None) => Named(names, address).to_string(),
        (None, _) => names.first().map(|name| printable(name)).unwrap_or_default(),
    };
    write!(f, "{what}({place}) = -1 {} DENIED: {}", error.symbol(), printable(reason))
}

#[cfg(test)]
mod tests;
