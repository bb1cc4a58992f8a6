//! The hub with a driver in the same process: each rule of the device, without a VMM.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod common;

use common::{Driver, Told, World, from_guest, key, settle};
use kso_devices::vsock::packet::{Header, NO_RECEIVE, NO_SEND, Op};
use kso_devices::vsock::{End, GuestId, Hub, Limits, Verdict};
use kso_wire::Errno;
use kso_wire::guest::StreamKey;
use proptest::prelude::*;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

struct Fixture {
    hub: Hub,
    world: World,
    driver: Driver,
    guest: GuestId,
}

impl Fixture {
    fn new() -> Self {
        Self::with(Limits::default(), true)
    }

    fn with(limits: Limits, event_idx: bool) -> Self {
        let mut hub = Hub::new(limits).unwrap();
        let (driver, guest) = Driver::new(&mut hub, event_idx);
        Fixture { hub, world: World::default(), driver, guest }
    }

    fn settle(&mut self) {
        settle(&mut self.hub, &mut self.world);
        self.driver.receive();
    }

    /// An open stream, and its outside.
    fn connect(&mut self, port: u32) -> UnixStream {
        let far = self.world.offer();
        self.driver.packet(key(port), Op::Request, &[]);
        self.settle();
        self.driver.expect(Op::Response);
        assert_eq!(self.world.told.pop(), Some(Told::Established(self.guest, key(port))));
        far
    }

    fn ended(&mut self, port: u32, bytes_out: u64, bytes_in: u64, errno: Option<Errno>) {
        let end = End { bytes_out, bytes_in, errno };
        assert_eq!(self.world.told.pop(), Some(Told::Ended(self.guest, key(port), end)));
    }

    fn shutdown(&mut self, port: u32, flags: u32) {
        self.driver.send(&Header { flags, ..from_guest(key(port), Op::Shutdown) }, &[]);
        self.settle();
    }
}

#[test]
fn bytes_and_halves() {
    let mut f = Fixture::new();
    let mut far = f.connect(1);
    assert!(f.hub.socket(f.guest, key(1)).is_some());
    f.driver.packet(key(1), Op::Data, b"hello");
    f.settle();
    let mut buffer = [0; 16];
    assert_eq!(far.read(&mut buffer).unwrap(), 5);
    far.write_all(b"goodbye").unwrap();
    far.shutdown(Shutdown::Write).unwrap();
    f.settle();
    assert_eq!(f.driver.next().unwrap().1, b"goodbye");
    assert_eq!(f.driver.expect(Op::Shutdown).flags, NO_SEND);
    // The other half is still open.
    f.driver.packet(key(1), Op::Data, b"more");
    f.shutdown(1, NO_SEND);
    assert_eq!(far.read(&mut buffer).unwrap(), 4);
    assert_eq!(far.read(&mut buffer).unwrap(), 0);
    f.shutdown(1, NO_SEND | NO_RECEIVE);
    f.driver.expect(Op::Reset);
    f.ended(1, 9, 7, None);
    assert!(f.hub.socket(f.guest, key(1)).is_none());
}

#[test]
fn a_far_end_that_is_closed_early_is_a_reset_where_that_is_wanted() {
    let mut f = Fixture::new();
    f.hub.pass_resets();
    let mut far = f.connect(1);
    far.write_all(b"last").unwrap();
    drop(far);
    f.settle();
    assert_eq!(f.driver.next().unwrap().1, b"last");
    f.driver.expect(Op::Reset);
    f.ended(1, 0, 4, Some(Errno::ECONNRESET));
    // One that is shut down is not.
    let far = f.connect(2);
    far.shutdown(Shutdown::Write).unwrap();
    f.settle();
    assert_eq!(f.driver.expect(Op::Shutdown).flags, NO_SEND);
    // Nor is one whose other half has ended already.
    let far = f.connect(3);
    f.shutdown(3, NO_SEND);
    drop(far);
    f.settle();
    assert_eq!(f.driver.expect(Op::Shutdown).flags, NO_SEND);
}

#[test]
fn refusals() {
    let mut f = Fixture::new();
    f.driver.packet(key(1), Op::Request, &[]);
    f.settle();
    f.driver.expect(Op::Reset);
    // A connection that fails later.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.set_nonblocking(true).unwrap();
    let _ = socket.connect(&address.into());
    f.world.verdicts.push_back(Verdict::Socket(socket.into()));
    f.driver.packet(key(2), Op::Request, &[]);
    f.settle();
    f.driver.expect(Op::Reset);
    assert_eq!(f.world.told, [Told::Failed(f.guest, key(2), Errno::ECONNREFUSED)]);
}

#[test]
fn what_is_no_stream() {
    let mut f = Fixture::new();
    let seqpacket = Header { kind: 2, ..from_guest(key(1), Op::Request) };
    f.driver.send(&seqpacket, &[]);
    f.settle();
    assert_eq!(f.driver.expect(Op::Reset).kind, 2);
    f.driver.send(&Header { dst_cid: 1 << 40, ..from_guest(key(1), Op::Request) }, &[]);
    f.settle();
    assert_eq!(f.driver.expect(Op::Reset).src_cid, 1 << 40);
    // Bytes, or an end, of nothing.
    f.driver.packet(key(3), Op::Data, b"x");
    f.driver.packet(key(3), Op::Reset, &[]);
    f.settle();
    f.driver.expect(Op::Reset);
    // Somebody else's CID: not answered.
    f.driver.send(&Header { src_cid: 4, ..from_guest(key(1), Op::Request) }, &[]);
    // An operation that there is not.
    f.driver.send(&Header { op: 77, ..from_guest(key(1), Op::Request) }, &[]);
    f.settle();
    f.driver.expect(Op::Reset);
    assert_eq!(f.driver.next(), None);
    assert!(f.world.requests.is_empty() && f.world.told.is_empty());
}

#[test]
fn a_broken_packet_drops_that_guest_only() {
    let mut f = Fixture::new();
    let (mut other, second) = Driver::new(&mut f.hub, false);
    let far = f.world.offer();
    other.packet(key(1), Op::Request, &[]);
    f.settle();
    other.expect(Op::Response);
    drop(f.connect(1));
    f.world.told.clear();
    f.driver.send_raw(&[1, 2, 3], &[]);
    f.settle();
    assert_eq!(f.world.told, [Told::Gone(f.guest)]);
    (&far).write_all(b"still here").unwrap();
    f.settle();
    assert_eq!(other.next().unwrap().1, b"still here");
    // More payload than the chain has.
    other.send(&Header { len: 1 << 30, ..from_guest(key(1), Op::Data) }, b"short");
    f.settle();
    assert_eq!(f.world.told.pop(), Some(Told::Gone(second)));
}

#[test]
fn loops_and_addresses_of_descriptors() {
    for (address, len, flags, next) in
        [(0x20_0000_u64, 8_u32, 1_u16, 0_u16), (u64::MAX - 5, 44, 0, 0), (15 << 20, 1 << 28, 0, 0)]
    {
        use vm_memory::{Bytes, GuestAddress};
        let mut f = Fixture::new();
        let memory = std::sync::Arc::clone(&f.driver.memory);
        f.driver.packet(key(1), Op::Request, &[]);
        // The descriptor that was just offered is made to point to itself, or nowhere.
        memory.write_obj(address, GuestAddress(0x8000)).unwrap();
        memory.write_obj(len, GuestAddress(0x8008)).unwrap();
        memory.write_obj(u32::from(next) << 16 | u32::from(flags), GuestAddress(0x800c)).unwrap();
        f.settle();
        assert!(f.world.told.len() <= 1 && !matches!(f.world.told.first(), Some(Told::Established(..))));
    }
}

#[test]
fn an_available_index_out_of_bounds() {
    use vm_memory::{Bytes, GuestAddress};
    let mut f = Fixture::new();
    f.driver.memory.write_obj(0x7777_u16, GuestAddress(0x8000 + 0x1000 + 2)).unwrap();
    f.settle();
    assert_eq!(f.world.told, [Told::Gone(f.guest)]);
}

#[test]
fn a_slow_outside_holds_no_descriptors_and_gets_all() {
    let mut f = Fixture::new();
    let mut slow = f.connect(1);
    let mut quick = f.connect(2);
    let mut sent = 0_u32;
    let mut forwarded = 0;
    // As much as the window allows; the socket takes some 200 kB of it.
    let payload = vec![b's'; 1 << 15];
    let (mut window, mut stuck) = (256 << 10, 0);
    while stuck < 3 {
        if window - (sent - forwarded) >= 1 << 15 {
            f.driver.packet(key(1), Op::Data, &payload);
            sent += 1 << 15;
        } else {
            stuck += 1;
        }
        f.settle();
        while let Some((header, _)) = f.driver.next() {
            (window, forwarded) = (header.buf_alloc, header.fwd_cnt);
        }
    }
    f.driver.packet(key(2), Op::Data, b"quick");
    f.settle();
    let mut buffer = [0; 5];
    quick.read_exact(&mut buffer).unwrap();
    // It closes; what it sent still arrives.
    f.shutdown(1, NO_SEND | NO_RECEIVE);
    f.driver.expect(Op::Reset);
    let mut received = 0;
    let mut buffer = vec![0; 1 << 20];
    slow.set_nonblocking(true).unwrap();
    loop {
        match slow.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => received += count as u32,
            Err(_) => f.settle(),
        }
    }
    assert_eq!(received, sent);
}

#[test]
fn more_than_the_window_is_a_violation() {
    let mut f = Fixture::new();
    let _far = f.connect(1);
    let payload = vec![0; 1 << 16];
    for _ in 0..32 {
        f.driver.packet(key(1), Op::Data, &payload);
    }
    f.settle();
    assert!(matches!(f.world.told.pop(), Some(Told::Ended(_, _, End { errno: Some(Errno::EPROTO), .. }))));
}

#[test]
fn a_dialled_stream() {
    let mut f = Fixture::new();
    let (near, mut far) = UnixStream::pair().unwrap();
    far.write_all(b"early").unwrap();
    f.hub.dial(f.guest, key(5), near.into()).unwrap();
    let (again, _) = UnixStream::pair().unwrap();
    f.hub.dial(f.guest, key(5), again.into()).unwrap_err();
    f.settle();
    let request = f.driver.expect(Op::Request);
    assert_eq!((request.src_cid, request.src_port, request.dst_port), (0x0a00_0001, 80, 5));
    f.driver.packet(key(5), Op::Response, &[]);
    f.settle();
    assert_eq!(f.world.told.pop(), Some(Told::Established(f.guest, key(5))));
    assert_eq!(f.driver.next().unwrap().1, b"early");

    let (near, far) = UnixStream::pair().unwrap();
    f.hub.dial(f.guest, key(6), near.into()).unwrap();
    f.settle();
    f.driver.expect(Op::Request);
    f.driver.packet(key(6), Op::Reset, &[]);
    f.settle();
    assert_eq!(f.world.told.pop(), Some(Told::Rejected(f.guest, key(6))));
    drop(far);
}

#[test]
fn a_request_replaces_one_that_is_under_way() {
    let mut f = Fixture::new();
    // An unconnected socket stays "under way": epoll says HUP, so use a listener with a full queue.
    let listener = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    listener.bind(&"127.0.0.1:0".parse::<std::net::SocketAddr>().unwrap().into()).unwrap();
    listener.listen(0).unwrap();
    let address = listener.local_addr().unwrap();
    let _fill: Vec<_> = (0..4)
        .map(|_| {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            socket.set_nonblocking(true).unwrap();
            let _ = socket.connect(&address);
            socket
        })
        .collect();
    let pending = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    pending.set_nonblocking(true).unwrap();
    let _ = pending.connect(&address);
    f.world.verdicts.push_back(Verdict::Socket(pending.into()));
    f.driver.packet(key(1), Op::Request, &[]);
    f.settle();
    assert_eq!(f.driver.next(), None);
    let far = f.connect(1);
    // The guest gave up: it answers a late RESPONSE by RST.
    f.driver.packet(key(1), Op::Reset, &[]);
    f.settle();
    f.ended(1, 0, 0, None);
    assert_eq!((&far).read(&mut [0]).unwrap(), 0);
}

#[test]
fn control_goes_before_what_it_tells_of() {
    let mut f = Fixture::new();
    let control = StreamKey { local_port: 9, peer_cid: 2, peer_port: 1 };
    f.world.verdicts.push_back(Verdict::Control);
    f.driver.send(&Header { buf_alloc: 10, ..from_guest(control, Op::Request) }, &[]);
    f.settle();
    f.driver.expect(Op::Response);
    f.driver.send(&Header { len: 5, buf_alloc: 10, ..from_guest(control, Op::Data) }, b"hello");
    f.world.output.insert(f.guest, b"0123456789".to_vec());
    f.settle();
    assert_eq!(f.world.control, b"hello");
    f.driver.expect(Op::CreditUpdate);
    assert_eq!(f.driver.next().unwrap().1, b"0123456789");
    // The guest has no room for "up": RESPONSE waits.
    let _far = f.world.offer();
    f.driver.packet(key(1), Op::Request, &[]);
    f.settle();
    assert_eq!(f.driver.next(), None);
    f.driver.send(&Header { fwd_cnt: 10, buf_alloc: 10, ..from_guest(control, Op::CreditUpdate) }, &[]);
    f.settle();
    assert_eq!(f.driver.next().unwrap().1, b"up ");
    f.driver.expect(Op::Response);
    f.world.told.clear();
    f.driver
        .send(&Header { len: 8, fwd_cnt: 10, buf_alloc: 10, ..from_guest(control, Op::Data) }, b"nonsense");
    f.settle();
    assert_eq!(f.world.told, [Told::Gone(f.guest)]);
}

#[test]
fn a_starved_guest_gets_all_later() {
    let mut f = Fixture::new();
    let mut far = f.connect(1);
    f.driver.starve();
    far.write_all(&[7; 200_000]).unwrap();
    f.settle();
    // Nothing spins on a guest without buffers.
    assert!(f.hub.next_deadline().is_none_or(|at| at > std::time::Instant::now()));
    let mut got = 0;
    for _ in 0..10 {
        while let Some((_, payload)) = f.driver.next() {
            got += payload.len();
        }
        f.driver.supply();
        f.settle();
    }
    assert_eq!(got, 200_000);
}

#[test]
fn floods_are_bounded() {
    let mut f = Fixture::with(Limits { streams: 100, half_open: 50, held: 1 << 20 }, true);
    let mut fars = Vec::new();
    for port in 0..200 {
        fars.push(f.world.offer());
        f.driver.packet(key(port), Op::Request, &[]);
        f.settle();
    }
    let failed = f.world.told.iter().filter(|told| matches!(told, Told::Failed(_, _, Errno::ENOBUFS)));
    assert_eq!(failed.count(), 100);
    // RSTs wait for buffers, and no packets are taken while too many do.
    let mut f = Fixture::new();
    f.driver.starve();
    for port in 0..100_000 {
        if !f.driver.can_send() {
            assert!(port > 200);
            return;
        }
        f.driver.packet(key(port), Op::Data, &[]);
        f.settle();
    }
    panic!("no end of it");
}

#[test]
fn guests_are_joined_memory_to_memory() {
    let mut f = Fixture::new();
    let (mut other, second) = Driver::new(&mut f.hub, true);
    let there = StreamKey { local_port: 5000, peer_cid: 0x0a00_0002, peer_port: 1 };
    let open = |f: &mut Fixture, other: &mut Driver| {
        f.world.verdicts.push_back(Verdict::Guest(second, there));
        f.driver.packet(key(1), Op::Request, &[]);
        f.settle();
        assert_eq!(other.expect(Op::Request).dst_port, 5000);
    };
    open(&mut f, &mut other);
    other.packet(there, Op::Reset, &[]);
    f.settle();
    f.driver.expect(Op::Reset);
    assert_eq!(f.world.told, [Told::Failed(f.guest, key(1), Errno::ECONNREFUSED)]);
    f.world.told.clear();

    open(&mut f, &mut other);
    assert_eq!(f.driver.next(), None);
    other.packet(there, Op::Response, &[]);
    f.settle();
    f.driver.expect(Op::Response);
    assert_eq!(f.world.told, [Told::Established(second, there), Told::Established(f.guest, key(1))]);
    // More than the other has buffers and credit for at once.
    let payload: Vec<u8> = (0..60_000_u32).map(|at| (at % 251) as u8).collect();
    for _ in 0..4 {
        f.driver.packet(key(1), Op::Data, &payload);
    }
    let mut got = Vec::new();
    for _ in 0..20 {
        f.settle();
        while let Some((_, part)) = other.next() {
            got.extend(part);
        }
    }
    assert_eq!(got, payload.repeat(4));
    f.shutdown(1, NO_SEND);
    assert_eq!(other.expect(Op::Shutdown).flags, NO_SEND);
    other.packet(there, Op::Data, b"back");
    f.settle();
    let back = std::iter::from_fn(|| f.driver.next()).find(|(header, _)| header.op == Op::Data as u16);
    assert_eq!(back.unwrap().1, b"back");
    f.shutdown(1, NO_SEND | NO_RECEIVE);
    f.driver.expect(Op::Reset);
    // Nobody is there any more.
    f.world.told.clear();
    other.packet(there, Op::Data, b"lost");
    f.settle();
    assert!(matches!(f.world.told[..], [Told::Ended(_, _, End { errno: Some(Errno::EPIPE), .. })]));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn every_byte_in_its_order(
        event_idx in any::<bool>(),
        up in proptest::collection::vec(1_usize..65_537, 1..20),
        down in proptest::collection::vec(1_usize..65_537, 1..20),
        reads in proptest::collection::vec(1_usize..100_000, 1..10),
    ) {
        let mut f = Fixture::with(Limits::default(), event_idx);
        let mut far = f.connect(1);
        far.set_nonblocking(true).unwrap();
        let bytes = |lengths: &[usize], salt: usize| -> Vec<u8> {
            (0..lengths.iter().sum()).map(|at| (at.wrapping_mul(2_654_435_761) >> 7) as u8 ^ salt as u8).collect()
        };
        let (up_bytes, down_bytes) = (bytes(&up, 1), bytes(&down, 2));
        let (mut up_sent, mut down_sent, mut up_got, mut down_got) = (0, 0, Vec::<u8>::new(), Vec::<u8>::new());
        let (mut window, mut forwarded, mut pieces) = (256_usize << 10, 0_usize, up.iter());
        let mut piece = pieces.next();
        let mut turn = 0;
        while up_got.len() < up_bytes.len() || down_got.len() < down_bytes.len() {
            turn += 1;
            prop_assert!(turn < 100_000, "stalled");
            if let Some(len) = piece.filter(|len| window - (up_sent - forwarded) >= **len) {
                if f.driver.can_send() {
                    let header = Header { fwd_cnt: down_got.len() as u32, len: *len as u32, ..from_guest(key(1), Op::Data) };
                    f.driver.send(&header, &up_bytes[up_sent..up_sent + len]);
                    up_sent += len;
                    piece = pieces.next();
                }
            } else if f.driver.can_send() {
                let header = Header { fwd_cnt: down_got.len() as u32, ..from_guest(key(1), Op::CreditUpdate) };
                f.driver.send(&header, &[]);
            }
            down_sent += far.write(&down_bytes[down_sent..]).unwrap_or(0);
            f.settle();
            while let Some((header, payload)) = f.driver.next() {
                (window, forwarded) = (header.buf_alloc as usize, header.fwd_cnt as usize);
                down_got.extend(payload);
            }
            let mut buffer = vec![0; reads[turn % reads.len()]];
            let count = far.read(&mut buffer).unwrap_or(0);
            up_got.extend(&buffer[..count]);
        }
        prop_assert_eq!(up_got, up_bytes);
        prop_assert_eq!(down_got, down_bytes);
    }
}
