//! Two stacks joined by a link that loses, repeats and reorders, in a time of its own.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use super::*;
use crate::options::Options;
use proptest::prelude::*;
use smoltcp::socket::tcp::RecvError;
use std::collections::BTreeMap;
use std::net::SocketAddr;

const ADDRESSES: [[&str; 2]; 2] = [["10.0.0.1/24", "fd00::1/64"], ["10.0.0.2/24", "fd00::2/64"]];

#[derive(Default)]
struct Wire(Vec<Vec<u8>>);

impl Link for Wire {
    fn send(&mut self, frame: &[u8]) {
        self.0.push(frame.to_vec());
    }
}

/// How bad the link is: of a thousand frames, so many are lost, and so many come twice; and how late they come.
#[derive(Clone, Copy, Debug, Default)]
struct Quality {
    lost: u64,
    twice: u64,
    late: Duration,
    /// No IP comes through.
    deaf: bool,
}

struct Net {
    stacks: [Stack; 2],
    events: [VecDeque<Event>; 2],
    now: Instant,
    frames: BTreeMap<(Instant, u64), (usize, Vec<u8>)>,
    count: u64,
    random: u64,
    quality: Quality,
}

impl Net {
    fn new(seed: u64, offload: bool, quality: Quality) -> Self {
        let now = Instant::now();
        let stack = |index: usize| {
            let addresses = ADDRESSES[index].map(|text| text.parse().unwrap()).to_vec();
            let config = Config { addresses, gateways: Vec::new(), mtu: 1500, offload };
            Stack::new(&config, [2, 0, 0, 0, 0, 1 + index as u8], seed + index as u64, now).unwrap()
        };
        let (stacks, frames) = ([stack(0), stack(1)], BTreeMap::new());
        Self { stacks, events: Default::default(), now, frames, count: 0, random: seed | 1, quality }
    }

    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    fn post(&mut self, from: usize, wire: Wire) {
        for frame in wire.0 {
            // Who is where is always found out: that it is not is another test.
            let neighbours = frame[23] == 0x06 || frame[22] == 0x86 && frame[crate::frame::HEAD + 6] == 58;
            if !neighbours && (self.quality.deaf || self.random() % 1000 < self.quality.lost) {
                continue;
            }
            let copies = 1 + u64::from(self.random() % 1000 < self.quality.twice);
            for _ in 0..copies {
                let late = self.random() % (self.quality.late.as_micros() as u64 + 1);
                let at = self.now + Duration::from_micros(50 + late);
                self.count += 1;
                self.frames.insert((at, self.count), (1 - from, frame.clone()));
            }
        }
    }

    fn pump(&mut self) {
        for index in 0..2 {
            let mut wire = Wire::default();
            self.stacks[index].run_due(&mut wire, self.now);
            self.stacks[index].flush(&mut wire, self.now);
            while let Some(event) = self.stacks[index].next_event() {
                self.events[index].push_back(event);
            }
            self.post(index, wire);
        }
    }

    /// Goes on to the next thing that happens. False: nothing does.
    fn step(&mut self) -> bool {
        self.pump();
        let frame = self.frames.first_key_value().map(|((at, _), _)| *at);
        let deadlines = self.stacks.iter().filter_map(Stack::next_deadline);
        let Some(next) = deadlines.chain(frame).min() else { return false };
        self.now = self.now.max(next);
        while let Some(entry) = self.frames.first_entry().filter(|entry| entry.key().0 <= self.now) {
            let (to, frame) = entry.remove();
            let mut wire = Wire::default();
            self.stacks[to].input(&frame, &mut wire, self.now);
            self.post(to, wire);
        }
        self.pump();
        true
    }

    /// Steps until something is there, or a long time has passed.
    fn until<T>(&mut self, mut what: impl FnMut(&mut Self) -> Option<T>) -> T {
        let end = self.now + Duration::from_secs(3600);
        let mut goes_on = true;
        loop {
            if let Some(found) = what(self) {
                return found;
            }
            assert!(goes_on && self.now < end, "it never happens");
            goes_on = self.step();
        }
    }

    /// The next event of a stack that is not merely `Ready`.
    fn event(&mut self, index: usize) -> Event {
        self.until(|net| {
            loop {
                let event = net.events[index].pop_front()?;
                if !matches!(event, Event::Ready(_)) {
                    return Some(event);
                }
            }
        })
    }

    fn connect(&mut self, peer: &str) -> ConnectionId {
        self.stacks[0].connect(peer.parse().unwrap(), 0, Options::default(), self.now).unwrap().0
    }

    fn listen(&mut self, address: &str, backlog: i32) -> SocketAddr {
        self.stacks[1].listen(7, address.parse().unwrap(), backlog, Options::default()).unwrap()
    }

    /// A connection from the first to the second.
    fn pair(&mut self, peer: &str) -> [ConnectionId; 2] {
        self.listen(peer, 8);
        let one = self.connect(peer);
        let other = self.until(|net| net.stacks[1].accept(7));
        assert_eq!(self.event(0), Event::Connected(one));
        [one, other.0]
    }

    fn quiet(&mut self) {
        self.events.iter_mut().for_each(VecDeque::clear);
    }
}

/// What a side sends, and got.
struct Side {
    data: Vec<u8>,
    sent: usize,
    closed: bool,
    got: Vec<u8>,
    end: bool,
}

impl Side {
    fn new(length: usize, salt: u8) -> Self {
        let data = (0..length).map(|index| (((index as u64 * 31) >> 3) as u8) ^ salt).collect();
        Self { data, sent: 0, closed: false, got: Vec::new(), end: false }
    }

    fn run(&mut self, stack: &mut Stack, id: ConnectionId) {
        let mut buffer = [0; 40_000];
        let Some(socket) = stack.socket(id) else { panic!("it is gone") };
        while self.sent < self.data.len() && socket.can_send() {
            self.sent += socket.send_slice(&self.data[self.sent..]).unwrap();
        }
        if self.sent == self.data.len() && !self.closed {
            socket.close();
            self.closed = true;
        }
        while !self.end {
            match socket.recv_slice(&mut buffer) {
                Ok(0) => break,
                Ok(count) => self.got.extend_from_slice(&buffer[..count]),
                Err(RecvError::Finished) => self.end = true,
                Err(error) => panic!("{error}"),
            }
        }
        stack.touch(id, true);
    }
}

/// Sends so much both ways; each gets what the other sent, and nothing is left.
fn exchange(net: &mut Net, peer: &str, lengths: [usize; 2]) {
    let ids = net.pair(peer);
    let mut sides = [Side::new(lengths[0], 0x5a), Side::new(lengths[1], 0xc3)];
    net.until(|net| {
        for (index, side) in sides.iter_mut().enumerate() {
            side.run(&mut net.stacks[index], ids[index]);
        }
        net.quiet();
        sides.iter().all(|side| side.end && side.closed).then_some(())
    });
    let [one, other] = sides;
    assert!(one.got == other.data, "{} of {} bytes", one.got.len(), other.data.len());
    assert!(other.got == one.data, "{} of {} bytes", other.got.len(), one.data.len());
    for (stack, id) in net.stacks.iter_mut().zip(ids) {
        stack.release(id);
    }
    net.until(|net| net.stacks.iter().all(|stack| stack.connections() == 0).then_some(()));
}

#[test]
fn bytes_arrive_on_a_good_link() {
    for offload in [false, true] {
        for peer in ["10.0.0.2:80", "[fd00::2]:80"] {
            exchange(&mut Net::new(7, offload, Quality::default()), peer, [3_000_000, 1_000_000]);
        }
    }
}

/// Always the same links: what fails once fails again.
#[test]
fn bytes_arrive_on_a_bad_link() {
    for seed in 1..=40_u64 {
        let mut number = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut below = |most: u64| {
            number = number.rotate_left(25).wrapping_mul(0xd6e8_feb8_6659_fd93);
            (number >> 16) % most
        };
        let late = Duration::from_micros(below(20_000));
        let quality = Quality { lost: below(100), twice: below(100), late, deaf: false };
        let lengths = [below(200_000) as usize, below(200_000) as usize];
        let peer = if below(2) == 0 { "10.0.0.2:80" } else { "[fd00::2]:80" };
        exchange(&mut Net::new(seed, below(2) == 0, quality), peer, lengths);
    }
    // Both repeat what the other has, and neither's acknowledgements were taken.
    let quality = Quality { lost: 29, twice: 0, late: Duration::from_micros(10_138), deaf: false };
    exchange(&mut Net::new(4_937_740_994_639_382_900, false, quality), "[fd00::2]:80", [3303, 61_939]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn no_frame_harms_a_stack(
        seed in 1_u64..u64::MAX / 2,
        changes in proptest::collection::vec((any::<u16>(), any::<u8>(), any::<u16>()), 1..200),
    ) {
        // Frames of a connection that lives, changed a little.
        let mut net = Net::new(seed, true, Quality::default());
        let [one, _] = net.pair("10.0.0.2:80");
        let mut seen: Vec<Vec<u8>> = Vec::new();
        for (place, value, length) in changes {
            if let Some(socket) = net.stacks[0].socket(one) {
                let _ = socket.send_slice(&[value; 3000][..usize::from(length % 3000)]);
                net.stacks[0].touch(one, true);
            }
            net.pump();
            seen.extend(net.frames.values().map(|(_, frame)| frame.clone()).take(4));
            net.step();
            net.quiet();
            let Some(mut frame) = seen.get(usize::from(place) % seen.len().max(1)).cloned() else { continue };
            // Trusted, or its checksum would keep it out.
            frame[0] = 1;
            let position = crate::frame::HEAD - 2 + usize::from(place) % (frame.len() - crate::frame::HEAD + 2);
            frame[position] = value;
            if length % 5 == 0 {
                frame.truncate(usize::from(length) % frame.len());
            }
            for index in 0..2 {
                let mut wire = Wire::default();
                net.stacks[index].input(&frame, &mut wire, net.now);
                net.post(index, wire);
            }
        }
        net.pump();
        prop_assert!(net.stacks.iter().all(|stack| stack.connections() <= 210));
    }
}

#[test]
fn a_connection_that_cannot_be_fails_with_its_reason() {
    let mut net = Net::new(3, true, Quality::default());
    let refused = net.connect("10.0.0.2:9");
    assert_eq!(net.event(0), Event::Failed(refused, Errno::ECONNREFUSED));
    // Nobody has this address.
    let nobody = net.connect("10.0.0.77:80");
    let began = net.now;
    assert_eq!(net.event(0), Event::Failed(nobody, Errno::EHOSTUNREACH));
    assert!((net.now - began).as_secs() < 5);
    let mut connect =
        |peer: &str| net.stacks[0].connect(peer.parse().unwrap(), 0, Options::default(), net.now);
    assert_eq!(connect("192.0.2.1:80"), Err(Errno::ENETUNREACH), "there is no gateway");
    assert_eq!(connect("224.0.0.1:80"), Err(Errno::ENETUNREACH));
    // Somebody, who is silent.
    net.quality.deaf = true;
    let silent = net.connect("10.0.0.2:80");
    let began = net.now;
    assert_eq!(net.event(0), Event::Failed(silent, Errno::ETIMEDOUT));
    assert!((120..140).contains(&(net.now - began).as_secs()));
    assert_eq!(net.stacks[0].connections(), 0);
}

#[test]
fn connections_wait_until_they_are_accepted_as_many_as_may() {
    let mut net = Net::new(5, true, Quality::default());
    net.listen("0.0.0.0:80", 4);
    let ids: Vec<ConnectionId> = (0..20).map(|_| net.connect("10.0.0.2:80")).collect();
    let end = net.now + Duration::from_millis(500);
    while net.now < end && net.step() {}
    let mut up = 0;
    while let Some(event) = net.events[0].pop_front() {
        up += usize::from(matches!(event, Event::Connected(_)));
    }
    assert_eq!(up, 5, "the backlog and one, as with a Linux");
    // The others try again, and come as those before are accepted.
    let mut accepted = 0;
    net.until(|net| {
        while net.stacks[1].accept(7).is_some() {
            accepted += 1;
        }
        (accepted == ids.len()).then_some(())
    });
    // Who waits when a listener ends is reset; who comes later is refused.
    net.quiet();
    let late = net.connect("10.0.0.2:80");
    assert_eq!(net.event(1), Event::Arrived(7));
    net.stacks[1].unlisten(7);
    net.until(|net| (net.stacks[0].socket(late)?.state() == State::Closed).then_some(()));
    assert_eq!(net.stacks[0].error(late), Errno::ECONNRESET);
    net.quiet();
    let refused = net.connect("10.0.0.2:80");
    assert_eq!(net.event(0), Event::Failed(refused, Errno::ECONNREFUSED));
}

#[test]
fn a_reset_is_told_and_silence_ends_a_connection() {
    let mut net = Net::new(9, true, Quality::default());
    let [one, other] = net.pair("10.0.0.2:80");
    net.stacks[1].abort(other);
    net.until(|net| (net.stacks[0].socket(one)?.state() == State::Closed).then_some(()));
    assert_eq!(net.stacks[0].error(one), Errno::ECONNRESET);
    net.stacks[0].abort(one);
    net.stacks[1].unlisten(7);
    let [one, _] = net.pair("10.0.0.2:81");
    net.quality.deaf = true;
    net.stacks[0].socket(one).unwrap().send_slice(b"is anybody there?").unwrap();
    net.stacks[0].touch(one, true);
    let began = net.now;
    net.until(|net| (net.stacks[0].socket(one)?.state() == State::Closed).then_some(()));
    assert_eq!(net.stacks[0].error(one), Errno::ETIMEDOUT);
    assert!((900..1000).contains(&(net.now - began).as_secs()));
}

#[test]
fn a_stack_speaks_to_itself() {
    let mut net = Net::new(11, true, Quality::default());
    for (number, peer) in ["10.0.0.2:80", "127.0.0.1:80", "[::1]:80"].into_iter().enumerate() {
        let listener = 100 + number as u64;
        let any: SocketAddr = if peer.starts_with('[') { "[::]:80" } else { "0.0.0.0:80" }.parse().unwrap();
        net.stacks[1].listen(listener, any, 8, Options::default()).unwrap();
        let peer: SocketAddr = peer.parse().unwrap();
        let (one, local) = net.stacks[1].connect(peer, 0, Options::default(), net.now).unwrap();
        assert_eq!(local.ip(), peer.ip());
        let (other, ends) = net.until(|net| net.stacks[1].accept(listener));
        assert_eq!((ends.remote, ends.local), (local, peer));
        net.stacks[1].socket(one).unwrap().send_slice(b"hello").unwrap();
        net.stacks[1].touch(one, true);
        net.until(|net| (net.stacks[1].socket(other)?.recv_queue() == 5).then_some(()));
        net.stacks[1].unlisten(listener);
    }
    let (refused, _) =
        net.stacks[1].connect("127.0.0.1:9".parse().unwrap(), 0, Options::default(), net.now).unwrap();
    net.quiet();
    assert_eq!(net.event(1), Event::Failed(refused, Errno::ECONNREFUSED));
}

#[test]
fn many_connections_are_nobodys_burden() {
    let mut net = Net::new(13, true, Quality::default());
    net.listen("0.0.0.0:80", 4096);
    let ids: Vec<ConnectionId> = (0..2000).map(|_| net.connect("10.0.0.2:80")).collect();
    let mut accepted = 0;
    net.until(|net| {
        while net.stacks[1].accept(7).is_some() {
            accepted += 1;
        }
        net.quiet();
        (accepted == ids.len()).then_some(())
    });
    // Idle ones want nothing: neither is there a deadline, nor a frame.
    for _ in 0..10_000 {
        if !net.step() {
            break;
        }
        net.quiet();
    }
    assert!(net.frames.is_empty() && net.stacks.iter().all(|stack| stack.next_deadline().is_none()));
    net.stacks.iter_mut().for_each(Stack::abort_all);
    net.until(|net| net.stacks.iter().all(|stack| stack.connections() == 0).then_some(()));
}

#[test]
fn segments_are_cut_to_what_the_path_takes() {
    let mut net = Net::new(17, true, Quality::default());
    let [one, _] = net.pair("10.0.0.2:80");
    let longest = |net: &mut Net| {
        net.stacks[0].socket(one).unwrap().send_slice(&[1; 20_000]).unwrap();
        net.stacks[0].touch(one, true);
        let mut longest = 0;
        for _ in 0..20 {
            net.pump();
            for (to, frame) in net.frames.values() {
                if *to == 1 && frame[1] != 0 {
                    longest = longest.max(u16::from_ne_bytes([frame[4], frame[5]]));
                }
            }
            net.step();
            net.quiet();
        }
        longest
    };
    assert_eq!(longest(&mut net), 1460);
    let tuple = net.stacks[0].ends(one).unwrap();
    let kind = packet::TroubleKind::TooBig(1360);
    net.stacks[0].trouble(&packet::Trouble { tuple, number: 0, kind });
    assert_eq!(longest(&mut net), 1360);
}
