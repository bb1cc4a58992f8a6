//! The table of what is measured.

use crate::sandbox::Variant;

/// Where the client and the server may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Pin {
    /// Wherever the scheduler puts them.
    Free,
    /// Both on processor 0.
    Same,
    /// The client on processor 0, the server on processor 1.
    Cross,
}

impl Pin {
    pub fn client(self) -> Option<usize> {
        (self != Pin::Free).then_some(0)
    }

    pub fn server(self) -> Option<usize> {
        match self {
            Pin::Free => None,
            Pin::Same => Some(0),
            Pin::Cross => Some(1),
        }
    }
}

/// Which side is in the sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// The client is inside, the server on the host's loopback.
    Out,
    /// The server is inside, on a published port.
    In,
}

/// What the client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// From the client to the server.
    Up(u32),
    /// From the server to the client.
    Down(u32),
    Pingpong(u32),
    Connect,
    UdpPingpong(u32),
    UdpUp(u32),
    UdpDown(u32),
    Iperf {
        streams: u32,
        reverse: bool,
    },
    IperfUdp(u32),
}

/// What the figure must reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    OfNative(f64),
    OfPasta(f64),
}

/// A row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    pub name: &'static str,
    pub title: &'static str,
    pub section: Section,
    pub via: Via,
    pub work: Work,
    pub pin: Pin,
    pub target: Target,
}

/// A part of the table, and a plot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Section {
    Bulk,
    Latency,
    Connect,
    Datagrams,
}

impl Section {
    pub const ALL: [Section; 4] = [Section::Bulk, Section::Latency, Section::Connect, Section::Datagrams];

    pub fn title(self) -> &'static str {
        match self {
            Section::Bulk => "TCP streams",
            Section::Latency => "TCP ping-pong",
            Section::Connect => "Short connections",
            Section::Datagrams => "UDP",
        }
    }

    pub fn file(self) -> &'static str {
        match self {
            Section::Bulk => "sandbox-streams.svg",
            Section::Latency => "sandbox-pingpong.svg",
            Section::Connect => "sandbox-connect.svg",
            Section::Datagrams => "sandbox-udp.svg",
        }
    }
}

impl Row {
    pub fn unit(&self) -> &'static str {
        match self.work {
            Work::Up(_) | Work::Down(_) | Work::UdpUp(_) | Work::UdpDown(_) => "Gbit/s",
            Work::Iperf { .. } | Work::IperfUdp(_) => "Gbit/s",
            Work::Pingpong(_) | Work::UdpPingpong(_) => "round trips/s",
            Work::Connect => "connections/s",
        }
    }

    pub fn is_iperf(&self) -> bool {
        matches!(self.work, Work::Iperf { .. } | Work::IperfUdp(_))
    }

    /// pasta splices what comes from the host's loopback anyhow, so the two differ on the way out only.
    pub fn variants(&self) -> Vec<Variant> {
        let splice = self.via == Via::Out && !self.is_iperf();
        Variant::ALL.into_iter().filter(|variant| splice || *variant != Variant::PastaSplice).collect()
    }
}

/// In the order of the table.
pub fn all() -> Vec<Row> {
    use Section::{Bulk, Connect, Datagrams, Latency};
    use Via::{In, Out};
    let mut rows = Vec::new();
    let mut add = |section, name, title, via, work, pin, target| {
        rows.push(Row { name, title, section, via, work, pin, target });
    };
    let native = Target::OfNative(0.97);
    let pasta = Target::OfPasta(1.0);
    add(Bulk, "up-1", "sandbox to host, 1 stream", Out, Work::Up(1), Pin::Cross, native);
    add(Bulk, "up-8", "sandbox to host, 8 streams", Out, Work::Up(8), Pin::Cross, native);
    add(Bulk, "down-1", "host to sandbox, 1 stream", Out, Work::Down(1), Pin::Cross, native);
    add(Bulk, "down-8", "host to sandbox, 8 streams", Out, Work::Down(8), Pin::Cross, native);
    add(Bulk, "published-up-1", "host to published port, 1 stream", In, Work::Up(1), Pin::Cross, native);
    add(Bulk, "published-up-8", "host to published port, 8 streams", In, Work::Up(8), Pin::Cross, native);
    add(Bulk, "published-down-1", "published port to host, 1 stream", In, Work::Down(1), Pin::Cross, native);
    add(Bulk, "published-down-8", "published port to host, 8 streams", In, Work::Down(8), Pin::Cross, native);
    let iperf = |streams, reverse| Work::Iperf { streams, reverse };
    add(Bulk, "iperf3-up-1", "iperf3, sandbox to host, 1 stream", Out, iperf(1, false), Pin::Cross, native);
    add(Bulk, "iperf3-up-8", "iperf3 -P 8, sandbox to host", Out, iperf(8, false), Pin::Cross, native);
    add(
        Bulk,
        "iperf3-down-1",
        "iperf3 -R, host to sandbox, 1 stream",
        Out,
        iperf(1, true),
        Pin::Cross,
        native,
    );
    add(Bulk, "iperf3-down-8", "iperf3 -R -P 8, host to sandbox", Out, iperf(8, true), Pin::Cross, native);
    add(
        Bulk,
        "iperf3-published-1",
        "iperf3 to a published iperf3 -s",
        In,
        iperf(1, false),
        Pin::Cross,
        native,
    );
    for (name, title, via, size, pin) in [
        ("pingpong-1-same", "1 byte, one processor", Out, 1, Pin::Same),
        ("pingpong-1-cross", "1 byte, two processors", Out, 1, Pin::Cross),
        ("pingpong-4096-same", "4 KiB, one processor", Out, 4096, Pin::Same),
        ("pingpong-4096-cross", "4 KiB, two processors", Out, 4096, Pin::Cross),
        ("published-pingpong-1-same", "1 byte to a published port, one processor", In, 1, Pin::Same),
        ("published-pingpong-4096-same", "4 KiB to a published port, one processor", In, 4096, Pin::Same),
    ] {
        add(Latency, name, title, via, Work::Pingpong(size), pin, native);
    }
    let most = Target::OfNative(0.6);
    add(Connect, "connect", "connect, 100 B, reply, close", Out, Work::Connect, Pin::Free, most);
    add(Connect, "connect-same", "the same, one processor", Out, Work::Connect, Pin::Same, most);
    add(Connect, "published-connect", "the same to a published port", In, Work::Connect, Pin::Free, most);
    for (name, title, via, size) in [
        ("udp-pingpong-32", "ping-pong, 32 B", Out, 32),
        ("udp-pingpong-4096", "ping-pong, 4 KiB", Out, 4096),
        ("published-udp-pingpong-32", "ping-pong to a published port, 32 B", In, 32),
    ] {
        add(Datagrams, name, title, via, Work::UdpPingpong(size), Pin::Free, pasta);
    }
    for (name, title, via, work) in [
        ("udp-up-1400", "sandbox to host, 1400 B", Out, Work::UdpUp(1400)),
        ("udp-up-8192", "sandbox to host, 8 KiB", Out, Work::UdpUp(8192)),
        ("udp-down-1400", "host to sandbox, 1400 B", Out, Work::UdpDown(1400)),
        ("udp-down-8192", "host to sandbox, 8 KiB", Out, Work::UdpDown(8192)),
        ("published-udp-up-1400", "host to published port, 1400 B", In, Work::UdpUp(1400)),
        ("published-udp-up-8192", "host to published port, 8 KiB", In, Work::UdpUp(8192)),
        ("iperf3-udp-up-1400", "iperf3 -u -b 0, sandbox to host, 1400 B", Out, Work::IperfUdp(1400)),
    ] {
        add(Datagrams, name, title, via, work, Pin::Free, pasta);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique() {
        let rows = all();
        let names: HashSet<_> = rows.iter().map(|row| row.name).collect();
        assert_eq!(names.len(), rows.len());
    }
}
