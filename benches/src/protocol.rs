//! What the workloads' client and server say to each other.
//!
//! TCP: a connection begins with a request of [`REQUEST_LEN`] bytes whose first bytes name the mode.
//!
//! ```text
//!   Echo     request, then blocks of `size` bytes to and fro until the client closes
//!   Sink     request, then bytes until the client shuts down; the server answers a Count
//!   Source   request, then the server writes until the client closes
//!   Reply    request, 100 bytes of reply, the server closes first (so TIME_WAIT is the server's)
//!   Hold     request, one byte of reply, the server keeps the connection
//! ```
//!
//! UDP: every datagram begins with a tag and the number of the run.
//!
//! ```text
//!   Ping     the server sends the datagram back
//!   Blast    counted by the server; Ask makes it answer a Count
//!   Pull     the server sends Blast datagrams for a while, then End with the number sent
//! ```

use std::time::{Duration, Instant};

/// Bytes of every TCP request, and of the reply in the `Reply` mode.
pub const REQUEST_LEN: usize = 100;
/// Bytes of one write or read of a bulk stream (what iperf3 uses).
pub const BULK_LEN: usize = 128 * 1024;
/// Bytes of the UDP header: tag, run, number, a length or a time.
pub const UDP_HEADER: usize = 21;

/// What a TCP connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Echo,
    Sink,
    Source,
    Reply,
    Hold,
}

/// The first bytes of a TCP connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    pub mode: Mode,
    /// Bytes of an echo block.
    pub size: u32,
    pub window: Window,
}

/// When the receiver counts: after `warm_up`, for `length`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    pub warm_up: Duration,
    pub length: Duration,
}

impl Window {
    pub fn millis(warm_up: u64, length: u64) -> Window {
        Window { warm_up: Duration::from_millis(warm_up), length: Duration::from_millis(length) }
    }

    /// The whole time from the beginning.
    pub fn total(&self) -> Duration {
        self.warm_up + self.length
    }
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

/// Reads the four bytes at `at` as a big-endian number; what is missing counts as zero.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.iter().skip(at).take(4).fold(0, |sum, byte| (sum << 8) | u32::from(*byte))
}

/// Reads the eight bytes at `at` as a big-endian number; what is missing counts as zero.
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.iter().skip(at).take(8).fold(0, |sum, byte| (sum << 8) | u64::from(*byte))
}

impl Request {
    pub fn encode(&self) -> [u8; REQUEST_LEN] {
        let mode = match self.mode {
            Mode::Echo => b'E',
            Mode::Sink => b'S',
            Mode::Source => b'O',
            Mode::Reply => b'R',
            Mode::Hold => b'H',
        };
        let mut bytes = [0; REQUEST_LEN];
        let fields = std::iter::once(mode)
            .chain(self.size.to_be_bytes())
            .chain(millis(self.window.warm_up).to_be_bytes())
            .chain(millis(self.window.length).to_be_bytes());
        for (place, byte) in bytes.iter_mut().zip(fields) {
            *place = byte;
        }
        bytes
    }

    pub fn decode(bytes: &[u8; REQUEST_LEN]) -> Option<Request> {
        let mode = match bytes.first()? {
            b'E' => Mode::Echo,
            b'S' => Mode::Sink,
            b'O' => Mode::Source,
            b'R' => Mode::Reply,
            b'H' => Mode::Hold,
            _ => return None,
        };
        let window = Window::millis(u64::from(u32_at(bytes, 5)), u64::from(u32_at(bytes, 9)));
        Some(Request { mode, size: u32_at(bytes, 1), window })
    }
}

/// What a receiver counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Bytes within the window.
    pub bytes: u64,
    /// Length of the window as it was.
    pub nanos: u64,
    /// Datagrams in all (UDP).
    pub datagrams: u64,
}

impl Count {
    pub const LEN: usize = 24;

    pub fn encode(&self) -> [u8; Count::LEN] {
        let mut bytes = [0; Count::LEN];
        let fields = [self.bytes, self.nanos, self.datagrams];
        for (place, byte) in bytes.iter_mut().zip(fields.iter().flat_map(|field| field.to_be_bytes())) {
            *place = byte;
        }
        bytes
    }

    pub fn decode(bytes: &[u8]) -> Count {
        Count { bytes: u64_at(bytes, 0), nanos: u64_at(bytes, 8), datagrams: u64_at(bytes, 16) }
    }

    pub fn gbit_per_second(&self) -> f64 {
        if self.nanos == 0 { 0.0 } else { self.bytes as f64 * 8.0 / self.nanos as f64 }
    }
}

/// Counts what comes within a window.
#[derive(Debug)]
pub struct Meter {
    opens: Instant,
    /// None: open to the last that comes (datagrams, whose end is not known in time).
    closes: Option<Instant>,
    first: Option<Instant>,
    last: Instant,
    bytes: u64,
    datagrams: u64,
}

impl Meter {
    /// For a stream: a fixed window, so that a stream that stalls within it counts as slow.
    pub fn fixed(window: Window) -> Meter {
        Meter { closes: Some(Instant::now() + window.total()), ..Meter::open_ended(window.warm_up) }
    }

    /// For datagrams: from the first after `warm_up` to the last.
    pub fn open_ended(warm_up: Duration) -> Meter {
        let now = Instant::now();
        Meter { opens: now + warm_up, closes: None, first: None, last: now, bytes: 0, datagrams: 0 }
    }

    /// Notes that `bytes` came; false once the window has closed.
    pub fn add(&mut self, bytes: usize) -> bool {
        let now = Instant::now();
        self.datagrams += 1;
        if now < self.opens {
            return true;
        }
        if self.closes.is_some_and(|closes| now > closes) {
            return false;
        }
        self.first.get_or_insert(now);
        self.last = now;
        self.bytes += bytes as u64;
        true
    }

    pub fn count(&self) -> Count {
        let time = match (self.closes, self.first) {
            (Some(closes), _) => closes - self.opens,
            (None, Some(first)) => self.last - first,
            (None, None) => Duration::ZERO,
        };
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        Count { bytes: self.bytes, nanos, datagrams: self.datagrams }
    }
}

/// What a datagram is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tag {
    Ping,
    Blast,
    Ask,
    Pull,
    Answer,
    End,
}

/// The first bytes of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram {
    pub tag: Tag,
    /// Tells one run from the next.
    pub run: u32,
    /// Number of the datagram; of `End`: how many were sent.
    pub number: u64,
    /// Of `Pull`: bytes of each datagram.
    pub size: u32,
    /// Of `Pull`: how long to send, in milliseconds.
    pub millis: u32,
}

impl Datagram {
    /// Writes the header at the beginning of `bytes`.
    pub fn encode(&self, bytes: &mut [u8]) {
        let tag = match self.tag {
            Tag::Ping => b'P',
            Tag::Blast => b'B',
            Tag::Ask => b'A',
            Tag::Pull => b'U',
            Tag::Answer => b'C',
            Tag::End => b'E',
        };
        let fields = std::iter::once(tag)
            .chain(self.run.to_be_bytes())
            .chain(self.number.to_be_bytes())
            .chain(self.size.to_be_bytes())
            .chain(self.millis.to_be_bytes());
        for (place, byte) in bytes.iter_mut().zip(fields) {
            *place = byte;
        }
    }

    pub fn decode(bytes: &[u8]) -> Option<Datagram> {
        let tag = match bytes.first()? {
            b'P' => Tag::Ping,
            b'B' => Tag::Blast,
            b'A' => Tag::Ask,
            b'U' => Tag::Pull,
            b'C' => Tag::Answer,
            b'E' => Tag::End,
            _ => return None,
        };
        Some(Datagram {
            tag,
            run: u32_at(bytes, 1),
            number: u64_at(bytes, 5),
            size: u32_at(bytes, 13),
            millis: u32_at(bytes, 17),
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    #[test]
    fn request_round_trip() {
        for mode in [Mode::Echo, Mode::Sink, Mode::Source, Mode::Reply, Mode::Hold] {
            let request = Request { mode, size: 70_000, window: Window::millis(5, 900) };
            assert_eq!(Request::decode(&request.encode()), Some(request));
        }
        assert_eq!(Request::decode(&[0; REQUEST_LEN]), None);
    }

    #[test]
    fn datagram_round_trip() {
        for tag in [Tag::Ping, Tag::Blast, Tag::Ask, Tag::Pull, Tag::Answer, Tag::End] {
            let datagram = Datagram { tag, run: 7, number: 1 << 40, size: 8192, millis: 600 };
            let mut bytes = [0; UDP_HEADER];
            datagram.encode(&mut bytes);
            assert_eq!(Datagram::decode(&bytes), Some(datagram));
        }
        assert_eq!(Datagram::decode(&[]), None);
    }

    #[test]
    fn count_round_trip() {
        let count = Count { bytes: 125, nanos: 1000, datagrams: 3 };
        assert_eq!(Count::decode(&count.encode()), count);
        assert_eq!(count.gbit_per_second(), 1.0);
    }
}
