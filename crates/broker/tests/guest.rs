//! Sessions of guests: what the vsock device asks, and what it is told to do.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use common::{allow, config, free_port, hello, publish};
use kso_broker::Broker;
use kso_broker::guest::Order;
use kso_devices::vsock::{End, GuestId, Outside, Verdict};
use kso_wire::frame::{Frames, append};
use kso_wire::guest::{
    FIRST_NAMED_CID, GuestReply, GuestRequest, Prepare, SendFile, StreamCall, StreamKey, ToGuest, ToHost,
    ports,
};
use kso_wire::{
    Caller, Connect, Errno, Failure, Family, Hello, Listen, OptionName, Origin, SocketOptions, VERSION,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

const ONE: GuestId = GuestId(1);
const TWO: GuestId = GuestId(2);
const CONTROL: StreamKey = StreamKey { local_port: 1000, peer_cid: 2, peer_port: ports::CONTROL };
const LOOPBACK: u32 = 0x7f00_0001;

/// A device that has no guests: the test says what they do.
struct Device {
    broker: Broker,
    sockets: HashMap<(GuestId, StreamKey), OwnedFd>,
    frames: HashMap<GuestId, Frames>,
    orders: Vec<Order>,
    next: u64,
}

impl Device {
    fn new() -> Self {
        let broker = Broker::new(config()).unwrap();
        Self { broker, sockets: HashMap::new(), frames: HashMap::new(), orders: Vec::new(), next: 0 }
    }

    fn with(hello: &Hello) -> Self {
        let mut device = Self::new();
        device.guest(ONE, hello);
        device
    }

    fn guest(&mut self, guest: GuestId, hello: &Hello) {
        self.broker.open_guest(guest, hello).unwrap();
        assert!(matches!(self.broker.request(guest, CONTROL), Verdict::Control));
        self.say(guest, &ToHost::Hello { version: VERSION, datagram_segments: true });
        assert!(matches!(self.hear(guest), Some(ToGuest::Welcome(_))));
    }

    fn say(&mut self, guest: GuestId, message: &ToHost) {
        let mut bytes = Vec::new();
        append(message, &mut bytes).unwrap();
        for part in bytes.chunks(7) {
            self.broker.control(guest, part).unwrap();
        }
    }

    fn hear(&mut self, guest: GuestId) -> Option<ToGuest> {
        let frames = self.frames.entry(guest).or_default();
        let bytes = std::mem::take(self.broker.control_output(guest).unwrap());
        frames.push(&bytes);
        frames.next_message().unwrap()
    }

    fn ask(&mut self, guest: GuestId, request: GuestRequest) -> Result<GuestReply, Failure> {
        self.next += 1;
        let id = self.next;
        self.say(guest, &ToHost::Ask { id, caller: caller(), request });
        self.serve();
        loop {
            match self.hear(guest).unwrap() {
                ToGuest::Answered { id: answered, result } if answered == id => return result,
                _ => {}
            }
        }
    }

    /// Takes the broker's orders, but for those that the test looks at.
    fn serve(&mut self) {
        while let Some(order) = self.broker.next_order() {
            match order {
                Order::Call(guest, call) => {
                    let socket = self.sockets.get(&(guest, call.stream));
                    self.broker.answer_call(guest, &call, socket.map(AsFd::as_fd));
                }
                Order::Flush(_) => {}
                other => self.orders.push(other),
            }
        }
    }

    fn prepare(&mut self, guest: GuestId, local_port: u32, peer: SocketAddr) {
        let connect = Connect {
            peer,
            family: if peer.is_ipv4() { Family::V4 } else { Family::V6 },
            local: None,
            options: SocketOptions::default(),
            origin: Origin::Intercepted,
        };
        self.say(guest, &ToHost::Prepare(Prepare { local_port, caller: caller(), connect }));
    }

    fn listen(&mut self, guest: GuestId, local: &str, vsock_port: u32, backlog: i32) -> SocketAddr {
        let local: SocketAddr = local.parse().unwrap();
        let family = if local.is_ipv4() { Family::V4 } else { Family::V6 };
        let listen = Listen { local, family, backlog: Some(backlog), options: SocketOptions::default() };
        match self.ask(guest, GuestRequest::Listen { listen, vsock_port }) {
            Ok(GuestReply::Listening(outer)) => outer,
            other => panic!("{other:?}"),
        }
    }

    /// Turns the loop until there is something to dial.
    fn dialled(&mut self) -> (GuestId, StreamKey, OwnedFd) {
        let end = Instant::now() + Duration::from_secs(10);
        while Instant::now() < end {
            self.serve();
            let found = self.orders.iter().position(|order| matches!(order, Order::Dial(..)));
            if let Some(Order::Dial(guest, key, socket)) = found.map(|at| self.orders.remove(at)) {
                return (guest, key, socket);
            }
            self.turn(Duration::from_millis(100));
        }
        panic!("nothing was dialled");
    }

    fn turn(&mut self, most: Duration) {
        let until = self.broker.next_deadline().map(|at| at.saturating_duration_since(Instant::now()));
        let wait = until.unwrap_or(most).min(most);
        let mut polled = [PollFd::from_borrowed_fd(self.broker.poll_fd(), PollFlags::IN)];
        poll(&mut polled, Some(&Timespec::try_from(wait).unwrap())).unwrap();
        self.broker.run_ready();
    }
}

fn caller() -> Caller {
    Caller { pid: 77, program: "prog".into() }
}

fn key(local_port: u32, peer: SocketAddr) -> StreamKey {
    let SocketAddr::V4(v4) = peer else { panic!() };
    StreamKey { local_port, peer_cid: (*v4.ip()).into(), peer_port: peer.port().into() }
}

/// A key for the gateway's address, by which the host's loopback is reached.
fn host(port: u16) -> SocketAddr {
    SocketAddr::from(([198, 18, 0, 1], port))
}

#[test]
fn a_prepared_connection_is_opened_and_asked_about() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut device = Device::with(&allow(&[&format!("host:{port}")]));
    device.prepare(ONE, 5000, host(port));
    let name = key(5000, host(port));
    let Verdict::Socket(socket) = device.broker.request(ONE, name) else { panic!() };
    let (mut accepted, _) = listener.accept().unwrap();
    device.broker.established(ONE, name, Some(socket.as_fd()));
    let local = accepted.peer_addr().unwrap();
    assert_eq!(device.hear(ONE), Some(ToGuest::Established { local_port: 5000, local }));
    device.sockets.insert((ONE, name), socket);

    let mut call = |call| device.ask(ONE, GuestRequest::Stream(name, call));
    assert_eq!(call(StreamCall::LocalAddress), Ok(GuestReply::Address(local)));
    let peer = listener.local_addr().unwrap();
    assert_eq!(call(StreamCall::PeerAddress), Ok(GuestReply::Address(peer)));
    assert_eq!(call(StreamCall::GetOption(OptionName::NoDelay)), Ok(GuestReply::Value(0)));
    assert_eq!(call(StreamCall::SetOption(OptionName::NoDelay, 1)), Ok(GuestReply::Done));
    assert_eq!(call(StreamCall::GetOption(OptionName::NoDelay)), Ok(GuestReply::Value(1)));
    assert_eq!(call(StreamCall::OutQueue), Ok(GuestReply::Value(0)));
    let Ok(GuestReply::Bytes(info)) = call(StreamCall::TcpInfo(104)) else { panic!() };
    assert_eq!((info.len(), info[0]), (104, 1));
    let bad = call(StreamCall::SetOption(OptionName::KeepIdle, -5));
    assert_eq!(bad, Err(Failure::kernel(Errno::EINVAL)));
    let nothing = StreamKey { local_port: 9, ..name };
    let answer = device.ask(ONE, GuestRequest::Stream(nothing, StreamCall::OutQueue));
    assert_eq!(answer, Err(Failure::kernel(Errno::ENOTCONN)));

    accepted.write_all(b"x").unwrap();
    device.broker.ended(ONE, name, End { bytes_out: 0, bytes_in: 1, errno: Some(Errno::ECONNRESET) });
    assert_eq!(device.hear(ONE), Some(ToGuest::Broken { stream: name, errno: Errno::ECONNRESET }));
}

#[test]
fn what_was_not_prepared_is_the_address_itself() {
    let mut device = Device::with(&hello());
    // The host's own loopback is protected, and 0 is no port.
    for (port, cid) in
        [(80, LOOPBACK), (0, 0x0a00_0001), (65_536, 0x0a00_0001), (80, FIRST_NAMED_CID), (80, 1)]
    {
        let name = StreamKey { local_port: 1, peer_cid: cid, peer_port: port };
        assert!(matches!(device.broker.request(ONE, name), Verdict::Refused(_)), "{name:?}");
    }
    assert_eq!(device.hear(ONE), None, "nobody waits for an answer");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut device = Device::with(&allow(&[&format!("host:{port}")]));
    assert!(matches!(device.broker.request(ONE, key(1, host(port))), Verdict::Socket(_)));
    // What was announced for another address says nothing about this one.
    device.prepare(ONE, 2, host(1));
    assert!(matches!(device.broker.request(ONE, key(2, host(port))), Verdict::Socket(_)));
}

#[test]
fn denials_and_failures_keep_their_errno() {
    let mut device = Device::with(&allow(&["192.0.2.0/24"]));
    device.prepare(ONE, 5, host(80));
    assert!(matches!(device.broker.request(ONE, key(5, host(80))), Verdict::Refused(Errno::EACCES)));
    let failed = ToGuest::Failed { local_port: 5, failure: Failure::denied(Errno::EACCES) };
    assert_eq!(device.hear(ONE), Some(failed));

    let port = free_port();
    let mut device = Device::with(&allow(&["host"]));
    device.prepare(ONE, 6, host(port));
    let name = key(6, host(port));
    assert!(matches!(device.broker.request(ONE, name), Verdict::Socket(_)));
    device.broker.failed(ONE, name, Errno::ECONNREFUSED);
    let failed = ToGuest::Failed { local_port: 6, failure: Failure::kernel(Errno::ECONNREFUSED) };
    assert_eq!(device.hear(ONE), Some(failed));
}

#[test]
fn a_connection_that_is_given_up_is_closed() {
    let port = free_port();
    let mut device = Device::with(&allow(&["host"]));
    device.prepare(ONE, 6, host(port));
    let name = key(6, host(port));
    assert!(matches!(device.broker.request(ONE, name), Verdict::Socket(_)));
    device.say(ONE, &ToHost::Abandon { local_port: 6 });
    device.say(ONE, &ToHost::Abandon { local_port: 7 });
    device.serve();
    assert!(matches!(device.orders[..], [Order::Abandon(ONE, given_up)] if given_up == name));
    device.broker.failed(ONE, name, Errno::ECONNREFUSED);
    assert_eq!(device.hear(ONE), None);
}

#[test]
fn a_published_listener_is_dialled_and_what_is_rejected_comes_again() {
    let port = free_port();
    let mut device = Device::with(&publish(&[format!("{port}:80")]));
    let outer = device.listen(ONE, "0.0.0.0:80", 9000, 8);
    assert_eq!(outer.port(), port);
    let mut stream = TcpStream::connect(outer).unwrap();
    let (guest, name, socket) = device.dialled();
    assert_eq!((guest, name), (ONE, key(9000, stream.local_addr().unwrap())));
    device.broker.rejected(guest, name, socket);
    let since = Instant::now();
    let (_, again, socket) = device.dialled();
    assert_eq!(again, name);
    assert!(since.elapsed() < Duration::from_millis(50));
    device.broker.established(ONE, name, Some(socket.as_fd()));
    let mut accepted = TcpStream::from(socket);
    accepted.write_all(b"hello").unwrap();
    let mut read = [0; 5];
    stream.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"hello");

    // Another that waits when the listener closes is reset, and the port is free at once.
    let mut late = TcpStream::connect(outer).unwrap();
    let (guest, name, socket) = device.dialled();
    device.broker.rejected(guest, name, socket);
    assert_eq!(device.ask(ONE, GuestRequest::Unlisten(9000)), Ok(GuestReply::Done));
    assert!(late.read(&mut read).is_err());
    TcpListener::bind(outer).unwrap();
    stream.write_all(b"still there").unwrap();
}

#[test]
fn a_guest_that_takes_nothing_holds_no_more_than_its_backlog() {
    let port = free_port();
    let mut device = Device::with(&publish(&[format!("{port}:80")]));
    let outer = device.listen(ONE, "0.0.0.0:80", 9000, 4);
    let streams: Vec<_> =
        (0..9).map(|_| TcpStream::connect_timeout(&outer, Duration::from_millis(200))).collect();
    assert!(streams.iter().filter(|stream| stream.is_ok()).count() >= 5, "the host's queue takes some");
    let mut offered = vec![device.dialled()];
    device.turn(Duration::from_millis(20));
    device.serve();
    offered.extend(device.orders.drain(..).filter_map(|order| match order {
        Order::Dial(guest, name, socket) => Some((guest, name, socket)),
        _ => None,
    }));
    assert_eq!(offered.len(), 4);
    // The loop does not spin meanwhile.
    let mut polled = [PollFd::from_borrowed_fd(device.broker.poll_fd(), PollFlags::IN)];
    let none = poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 20_000_000 })).unwrap();
    assert_eq!(none, 0);
    for (guest, name, socket) in offered {
        device.broker.established(guest, name, Some(socket.as_fd()));
    }
    device.dialled();
}

#[test]
fn a_peer_whose_address_is_no_cid_is_named_before() {
    let port = free_port();
    let mut device = Device::with(&publish(&[format!("[::1]:{port}:80")]));
    let outer = device.listen(ONE, "[::]:80", 9000, 8);
    let stream = TcpStream::connect(outer).unwrap();
    let (_, name, _) = device.dialled();
    assert_eq!((name.local_port, name.peer_cid), (9000, FIRST_NAMED_CID));
    let address = stream.local_addr().unwrap();
    assert_eq!(device.hear(ONE), Some(ToGuest::Named { stream: name, address }));
}

#[test]
fn bind_0_and_a_reservation_agree_on_the_port() {
    let mut device = Device::with(&publish(&["all".into()]));
    let listen = |local: &str, backlog| Listen {
        local: local.parse().unwrap(),
        family: Family::V4,
        backlog,
        options: SocketOptions::default(),
    };
    let reserve = GuestRequest::Listen { listen: listen("0.0.0.0:0", None), vsock_port: 0 };
    let Ok(GuestReply::Listening(kept)) = device.ask(ONE, reserve.clone()) else { panic!() };
    assert_eq!(device.listen(ONE, &format!("0.0.0.0:{}", kept.port()), 9000, 8), kept);
    TcpStream::connect(kept).unwrap();
    let Ok(GuestReply::Listening(kept)) = device.ask(ONE, reserve) else { panic!() };
    assert_eq!(device.ask(ONE, GuestRequest::Release(kept)), Ok(GuestReply::Done));
    TcpListener::bind(kept).unwrap();
    let inside = GuestRequest::Listen { listen: listen("127.0.0.1:81", Some(1)), vsock_port: 9001 };
    assert_eq!(device.ask(ONE, inside), Ok(GuestReply::StayInside));
}

#[test]
fn guests_are_joined_by_a_published_port_and_by_name() {
    let port = free_port();
    let mut device = Device::new();
    device.guest(ONE, &Hello { name: "web".into(), ..publish(&[format!("{port}:80")]) });
    device.guest(
        TWO,
        &Hello { name: "client".into(), ..allow(&[&format!("host:{port}"), "web.kso.internal:80"]) },
    );
    device.listen(ONE, "0.0.0.0:80", 9000, 8);

    device.prepare(TWO, 5, host(port));
    let Verdict::Guest(ONE, joined) = device.broker.request(TWO, key(5, host(port))) else { panic!() };
    assert_eq!(joined.local_port, 9000);
    device.broker.established(ONE, joined, None);
    device.broker.established(TWO, key(5, host(port)), None);
    let Some(ToGuest::Established { local_port: 5, local }) = device.hear(TWO) else { panic!() };
    let asked = device.ask(ONE, GuestRequest::Stream(joined, StreamCall::PeerAddress));
    assert_eq!(asked, Ok(GuestReply::Address(local)));

    // By name: the address is asked for first, or rules by name would not know it.
    let session = device.broker.session_of(TWO).unwrap();
    let address = resolve(&mut device.broker, session, "web.kso.internal").unwrap();
    let peer = SocketAddr::from((address, 80));
    device.prepare(TWO, 6, peer);
    assert!(matches!(device.broker.request(TWO, key(6, peer)), Verdict::Guest(ONE, _)));
    for (port, errno) in [(81, Errno::EACCES), (80, Errno::ECONNREFUSED)] {
        if port == 80 {
            device.ask(ONE, GuestRequest::Unlisten(9000)).unwrap();
        }
        let peer = SocketAddr::from((address, port));
        let verdict = device.broker.request(TWO, key(7, peer));
        assert!(matches!(verdict, Verdict::Refused(found) if found == errno), "{verdict:?}");
    }
    assert_eq!(resolve(&mut device.broker, session, "nobody.kso.internal"), None);
}

fn resolve(broker: &mut Broker, session: kso_broker::SessionId, name: &str) -> Option<std::net::IpAddr> {
    use hickory_proto::rr::{RData, RecordType};
    let query = common::query(name, RecordType::A).to_vec().unwrap();
    let request = kso_wire::Request::Resolve(query);
    let id = kso_wire::RequestId::gateway(1);
    let kso_wire::Submitted::Done(answer) = broker.handle(session, id, &caller(), request) else { panic!() };
    let Ok(kso_wire::Reply::Resolved(bytes)) = answer.result else { panic!() };
    let message = hickory_proto::op::Message::from_vec(&bytes).unwrap();
    message.answers.first().map(|record| match &record.data {
        RData::A(address) => address.0.into(),
        other => panic!("{other:?}"),
    })
}

#[test]
fn files_are_sent_by_the_device_and_it_tells_how_much() {
    let mut device = Device::with(&hello());
    let stream = StreamKey { local_port: 5, peer_cid: LOOPBACK, peer_port: 80 };
    let what = SendFile { stream, share: "kso1".into(), node: 3, offset: 4, count: 5, waits: true };
    for (ask, told, reply) in [
        (1, Ok(Some(5)), Ok(GuestReply::Value(5))),
        (2, Ok(None), Ok(GuestReply::StayInside)),
        (3, Err(Errno::EPIPE), Err(Failure::kernel(Errno::EPIPE))),
    ] {
        let request = GuestRequest::SendFile(what.clone());
        device.say(ONE, &ToHost::Ask { id: ask, caller: caller(), request });
        device.serve();
        let order = device.orders.pop();
        assert!(matches!(order, Some(Order::SendFile(ONE, id, sent)) if id == ask && sent == what));
        device.broker.sent(ONE, ask, told);
        assert_eq!(device.hear(ONE), Some(ToGuest::Answered { id: ask, result: reply }));
    }
    let stopped = device.ask(ONE, GuestRequest::StopSending(stream, 1));
    assert_eq!(stopped, Ok(GuestReply::Done));
    assert!(matches!(device.orders[..], [Order::StopSending(ONE, of, 1)] if of == stream));
}

#[test]
fn ports_of_the_host_are_served_once_and_others_not_at_all() {
    let mut device = Device::with(&hello());
    let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    device.broker.serve_port(ONE, ports::STDOUT, ours.into());
    let to = |port| StreamKey { local_port: 50, peer_cid: 2, peer_port: port };
    assert!(matches!(device.broker.request(ONE, to(ports::STDOUT)), Verdict::Socket(_)));
    for port in [ports::STDOUT, ports::STDIN, ports::CONTROL, ports::STREAMS, 22] {
        assert!(matches!(device.broker.request(ONE, to(port)), Verdict::Refused(_)), "{port}");
    }
}

#[test]
fn garbage_ends_the_guest_and_nothing_else() {
    let port = free_port();
    let mut device = Device::with(&publish(&[format!("{port}:80")]));
    device.guest(TWO, &hello());
    device.listen(ONE, "0.0.0.0:80", 9000, 8);
    assert!(device.broker.control(ONE, &[0xff; 64]).is_err());
    device.broker.gone(ONE);
    TcpListener::bind(("127.0.0.1", port)).unwrap();
    assert!(device.broker.control_output(ONE).is_none());
    device.say(TWO, &ToHost::Abandon { local_port: 1 });
    // Its device can be set up again, and begins anew.
    assert!(matches!(device.broker.request(ONE, CONTROL), Verdict::Control));
    let mut bytes = Vec::new();
    append(&ToHost::Abandon { local_port: 1 }, &mut bytes).unwrap();
    assert!(device.broker.control(ONE, &bytes).is_err(), "it did not say hello");
    device.broker.close_guest(ONE);
    assert!(matches!(device.broker.request(ONE, CONTROL), Verdict::Refused(_)));
}

#[test]
fn a_guest_that_does_not_read_is_dropped() {
    let mut device = Device::with(&hello());
    let mut bytes = Vec::new();
    let request = GuestRequest::Release("127.0.0.1:1".parse().unwrap());
    append(&ToHost::Ask { id: 1, caller: caller(), request }, &mut bytes).unwrap();
    let ended = (0..1_000_000).any(|_| device.broker.control(ONE, &bytes).is_err());
    assert!(ended);
}
