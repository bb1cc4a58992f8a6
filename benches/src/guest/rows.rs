//! What is measured in the guest, and what is wanted of it.

use super::net::Way;
use crate::rows::Work;

/// What a row's figure must reach, as a ratio of rates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// At least so much of what this way reaches.
    Of(Way, f64),
    /// At least so much of what kso reaches in another row.
    OfRow(&'static str, f64),
}

/// A row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    pub name: &'static str,
    pub title: &'static str,
    pub work: Work,
    pub targets: &'static [Target],
}

/// 1-byte ping-pong in at most 0.8 of tap's time.
const PINGPONG: f64 = 1.0 / 0.8;

/// One guest and its host, in the order of the table.
pub const ROWS: &[Row] = &[
    Row {
        name: "up-1",
        title: "guest to host, 1 stream",
        work: Work::Up(1),
        targets: &[Target::Of(Way::Tap, 1.5), Target::Of(Way::Slirp, 8.0)],
    },
    Row {
        name: "up-8",
        title: "guest to host, 8 streams",
        work: Work::Up(8),
        targets: &[Target::OfRow("up-1", 1.0)],
    },
    Row {
        name: "down-1",
        title: "host to guest, 1 stream",
        work: Work::Down(1),
        targets: &[Target::Of(Way::Tap, 1.0)],
    },
    Row {
        name: "down-8",
        title: "host to guest, 8 streams",
        work: Work::Down(8),
        targets: &[Target::OfRow("down-1", 1.0)],
    },
    Row {
        name: "pingpong",
        title: "1 byte to and fro",
        work: Work::Pingpong(1),
        targets: &[Target::Of(Way::Tap, PINGPONG)],
    },
    Row {
        name: "connect",
        title: "connect, 100 B, reply, close",
        work: Work::Connect,
        targets: &[Target::Of(Way::Tap, 2.5), Target::Of(Way::Slirp, 3.0)],
    },
];

/// From one guest to another. `tap` is two taps on a bridge.
pub const PAIR: &[Row] = &[
    Row {
        name: "pair-bulk",
        title: "guest to guest, 1 stream",
        work: Work::Up(1),
        targets: &[Target::Of(Way::Tap, 2.0)],
    },
    Row {
        name: "pair-pingpong",
        title: "guest to guest, 1 byte to and fro",
        work: Work::Pingpong(1),
        targets: &[Target::Of(Way::Tap, 2.0)],
    },
];

impl Row {
    pub fn unit(&self) -> &'static str {
        match self.work {
            Work::Up(_) | Work::Down(_) => "MB/s",
            Work::Connect => "connections/s",
            _ => "round trips/s",
        }
    }

    /// The client's output in the row's unit.
    pub fn value(&self, outcome: f64) -> f64 {
        match self.work {
            // Gbit/s.
            Work::Up(_) | Work::Down(_) => outcome * 125.0,
            _ => outcome,
        }
    }

    /// The client's words for it.
    pub fn words(&self) -> Vec<String> {
        match self.work {
            Work::Up(streams) => vec!["up".into(), "--streams".into(), streams.to_string()],
            Work::Down(streams) => vec!["down".into(), "--streams".into(), streams.to_string()],
            Work::Pingpong(size) => vec!["pingpong".into(), "--size".into(), size.to_string()],
            _ => vec!["connect".into()],
        }
    }
}
