//! Two sessions joined by a pair of sockets that carries frames.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use super::*;
use kso_provider::client::{Client, Fault as ClientFault};
use kso_provider::relay::stream_pair;
use kso_wire::provide::{Connect, Listen, ListenerId};
use kso_wire::{Family, OptionName, SocketOptions};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

struct Kernel {
    client: Client,
    thread: JoinHandle<Result<(), Fault>>,
    next: u64,
    /// The link lives longer than the session.
    _link: OwnedFd,
}

fn frames() -> (OwnedFd, OwnedFd) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (one, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    for end in [&one, &other] {
        let _ = rustix::net::sockopt::set_socket_send_buffer_size_force(end, 8 << 20);
    }
    (one, other)
}

fn start(link: OwnedFd, address: &str) -> (JoinHandle<Result<(), Fault>>, OwnedFd) {
    let (control, other) = stream_pair().unwrap();
    let addresses = vec![address.parse().unwrap()];
    let config = Config { addresses, gateways: Vec::new(), mtu: 1500, offload: true };
    let thread = std::thread::spawn(move || crate::serve(other, Tap::new(link), &config));
    (thread, control)
}

impl Kernel {
    fn new(link: OwnedFd, address: &str) -> Self {
        let copy = link.try_clone().unwrap();
        let (thread, control) = start(link, address);
        let client = Client::new(control, "test", Duration::from_secs(20)).unwrap();
        let mut kernel = Self { client, thread, next: 1, _link: copy };
        match kernel.next_message().unwrap() {
            ToBroker::Welcome(welcome) => assert_eq!(welcome.kernel, KERNEL),
            other => panic!("{other:?}"),
        }
        kernel
    }

    fn pair() -> (Self, Self) {
        let (one, other) = frames();
        (Self::new(one, "10.0.0.1/24"), Self::new(other, "10.0.0.2/24"))
    }

    fn next_message(&mut self) -> Result<ToBroker, ClientFault> {
        for _ in 0..200 {
            self.client.flush()?;
            if let Some(message) = self.client.receive()? {
                return Ok(message);
            }
            let mut polled = [PollFd::from_borrowed_fd(self.client.poll_fd(), PollFlags::IN)];
            poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 100_000_000 })).unwrap();
        }
        panic!("the provider says nothing");
    }

    fn number(&mut self) -> StreamId {
        self.next += 1;
        StreamId(self.next)
    }

    fn connect(&mut self, peer: &str) -> (StreamId, UnixStream) {
        let (own, given) = stream_pair().unwrap();
        let (stream, peer) = (self.number(), peer.parse().unwrap());
        let order = Connect { stream, peer, family: Family::V4, port: 0, options: SocketOptions::default() };
        self.client.connect(order, given).unwrap();
        self.client.flush().unwrap();
        (stream, blocking(own))
    }

    fn listen(&mut self, id: u64, address: &str, backlog: i32) -> Result<SocketAddr, Errno> {
        let (listener, address) = (ListenerId(id), address.parse().unwrap());
        let options = SocketOptions::default();
        self.client.listen(Listen { listener, address, backlog, options }).unwrap();
        match self.next_message().unwrap() {
            ToBroker::Listening { local, .. } => Ok(local),
            ToBroker::NotListening { errno, .. } => Err(errno),
            other => panic!("{other:?}"),
        }
    }

    fn offer(&mut self, id: u64) -> (StreamId, UnixStream) {
        let (own, given) = stream_pair().unwrap();
        let stream = self.number();
        self.client.offer(ListenerId(id), stream, given).unwrap();
        self.client.flush().unwrap();
        (stream, blocking(own))
    }
}

fn blocking(stream: OwnedFd) -> UnixStream {
    let stream = UnixStream::from(stream);
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

/// A connection from one to the other: both streams.
fn joined(one: &mut Kernel, other: &mut Kernel) -> (UnixStream, UnixStream) {
    let local = other.listen(1, "0.0.0.0:80", 8).unwrap();
    assert_eq!(local.port(), 80);
    let (offered, far) = other.offer(1);
    let (asked, near) = one.connect("10.0.0.2:80");
    let ToBroker::Connected { stream, local } = one.next_message().unwrap() else { panic!() };
    assert_eq!(stream, asked);
    match other.next_message().unwrap() {
        ToBroker::Accepted { stream, peer, local: at, .. } => {
            assert_eq!((stream, peer, at), (offered, local, "10.0.0.2:80".parse().unwrap()));
        }
        other => panic!("{other:?}"),
    }
    (near, far)
}

fn ended(kernel: &mut Kernel) -> (u64, u64, Option<Errno>) {
    match kernel.next_message().unwrap() {
        ToBroker::Ended { bytes_in, bytes_out, errno, .. } => (bytes_in, bytes_out, errno),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_connection_carries_bytes_and_ends_in_order() {
    let (mut one, mut other) = Kernel::pair();
    let (mut near, mut far) = joined(&mut one, &mut other);
    near.write_all(b"question").unwrap();
    near.shutdown(Shutdown::Write).unwrap();
    let mut text = String::new();
    far.read_to_string(&mut text).unwrap();
    assert_eq!(text, "question");
    // Half of it is closed: the other half goes on.
    far.write_all(b"answer").unwrap();
    drop(far);
    text.clear();
    near.read_to_string(&mut text).unwrap();
    assert_eq!(text, "answer");
    assert_eq!(ended(&mut one), (6, 8, None));
    assert_eq!(ended(&mut other), (8, 6, None));
    drop(one.client);
    one.thread.join().unwrap().unwrap();
}

#[test]
fn much_goes_both_ways_at_once() {
    let (mut one, mut other) = Kernel::pair();
    let (near, far) = joined(&mut one, &mut other);
    let data: Vec<u8> =
        (0..24_u32 << 20).map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let data = &data;
    std::thread::scope(|scope| {
        for stream in [&near, &far] {
            scope.spawn(move || {
                let mut stream = stream;
                stream.write_all(data).unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
            });
            scope.spawn(move || {
                let (mut stream, mut got) = (stream, Vec::new());
                stream.read_to_end(&mut got).unwrap();
                assert!(got == *data, "{} bytes", got.len());
            });
        }
    });
    let length = data.len() as u64;
    assert_eq!(ended(&mut one), (length, length, None));
    assert_eq!(ended(&mut other), (length, length, None));
}

#[test]
fn failures_keep_their_errno() {
    let (mut one, mut other) = Kernel::pair();
    for (peer, errno) in [
        ("10.0.0.2:9", Errno::ECONNREFUSED),
        ("192.0.2.1:80", Errno::ENETUNREACH),
        ("10.0.0.99:80", Errno::EHOSTUNREACH),
    ] {
        let (stream, mut near) = one.connect(peer);
        assert_eq!(one.next_message().unwrap(), ToBroker::Failed { stream, errno });
        assert_eq!(near.read(&mut [0; 4]).unwrap(), 0);
    }
    assert_eq!(other.listen(1, "10.0.0.9:80", 8), Err(Errno::EADDRNOTAVAIL));
    other.listen(2, "0.0.0.0:80", 8).unwrap();
    assert_eq!(other.listen(3, "10.0.0.2:80", 8), Err(Errno::EADDRINUSE));
    other.client.unlisten(ListenerId(2)).unwrap();
    assert_eq!(other.next_message().unwrap(), ToBroker::Unlistened(ListenerId(2)));
    other.listen(4, "10.0.0.2:80", 8).unwrap();
}

#[test]
fn a_reset_passes_in_both_directions() {
    let (mut one, mut other) = Kernel::pair();
    let (mut near, far) = joined(&mut one, &mut other);
    // Closed before its ends.
    drop(far);
    assert_eq!(ended(&mut other).2, Some(Errno::ECONNRESET));
    assert_eq!(ended(&mut one).2, Some(Errno::ECONNRESET));
    match near.read(&mut [0]) {
        Ok(0) => {}
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
        other => panic!("{other:?}"),
    }
    // The death of a session resets its connections, too.
    let (_, _far) = other.offer(1);
    let (_, _near) = one.connect("10.0.0.2:80");
    assert!(matches!(one.next_message().unwrap(), ToBroker::Connected { .. }));
    drop(other.client);
    other.thread.join().unwrap().unwrap();
    assert_eq!(ended(&mut one).2, Some(Errno::ECONNRESET));
}

#[test]
fn a_listener_accepts_what_it_has_streams_for() {
    let (mut one, mut other) = Kernel::pair();
    other.listen(1, "0.0.0.0:80", 8).unwrap();
    let near: Vec<_> = (0..3).map(|_| one.connect("10.0.0.2:80")).collect();
    for _ in &near {
        assert!(matches!(one.next_message().unwrap(), ToBroker::Connected { .. }));
    }
    (&near[0].1).write_all(b"early").unwrap();
    let mut far = Vec::new();
    for _ in 0..2 {
        far.push(other.offer(1));
        assert!(matches!(other.next_message().unwrap(), ToBroker::Accepted { .. }));
    }
    let mut text = [0; 5];
    far[0].1.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"early");
    // The third is never accepted.
    other.client.unlisten(ListenerId(1)).unwrap();
    other.client.flush().unwrap();
    assert_eq!(ended(&mut one).2, Some(Errno::ECONNRESET));
}

#[test]
fn a_blocked_socket_stalls_no_other() {
    let (mut one, mut other) = Kernel::pair();
    let (blocked, _deaf) = joined(&mut one, &mut other);
    blocked.set_nonblocking(true).unwrap();
    let chunk = vec![0; 1 << 20];
    let mut full = 0;
    while full < 20 {
        match (&blocked).write(&chunk) {
            Ok(1..) => full = 0,
            Ok(0) | Err(_) => {
                full += 1;
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
    let (_, mut far) = other.offer(1);
    let (_, mut near) = one.connect("10.0.0.2:80");
    let writer = std::thread::spawn(move || near.write_all(&vec![5; 8 << 20]).map(|()| near));
    let mut got = vec![0; 8 << 20];
    far.read_exact(&mut got).unwrap();
    assert!(got.iter().all(|byte| *byte == 5));
    writer.join().unwrap().unwrap();
}

#[test]
fn questions_are_answered() {
    let (link, _far) = frames();
    let (_thread, control) = start(link, "10.0.0.1/24");
    let mut channel = Channel::new(control);
    let mut ask = |message: &ToProvider, descriptor| {
        channel.send(message, descriptor).unwrap();
        channel.flush().unwrap();
    };
    ask(&ToProvider::Hello { version: PROVIDE_VERSION, name: "test".into() }, None);
    let (_own, given) = stream_pair().unwrap();
    let (stream, peer) = (StreamId(1), "10.0.0.2:80".parse().unwrap());
    let mut options = SocketOptions::default();
    options.push(OptionName::KeepIdle, 77);
    let order = Connect { stream, peer, family: Family::V4, port: 4000, options };
    ask(&ToProvider::Connect(order), Some(given));
    let questions = [
        (stream, Question::PeerAddress, Ok(Reply::Address(peer))),
        (stream, Question::LocalAddress, Ok(Reply::Address("10.0.0.1:4000".parse().unwrap()))),
        (stream, Question::GetOption(OptionName::KeepIdle), Ok(Reply::Value(77))),
        (stream, Question::SetOption(OptionName::NoDelay, 1), Ok(Reply::Done)),
        (stream, Question::GetOption(OptionName::CongestionControl), Err(Errno::ENOPROTOOPT)),
        (StreamId(9), Question::PeerAddress, Err(Errno::ENOTCONN)),
    ];
    for (id, (stream, question, _)) in (0..).zip(&questions) {
        ask(&ToProvider::Ask { id, stream: *stream, question: *question }, None);
    }
    ask(&ToProvider::Resolve { id: 100, query: vec![0; 12] }, None);
    let mut answers = Vec::new();
    while answers.len() < questions.len() + 1 {
        let mut polled = [PollFd::from_borrowed_fd(channel.as_fd(), PollFlags::IN)];
        assert_ne!(poll(&mut polled, Some(&Timespec { tv_sec: 20, tv_nsec: 0 })).unwrap(), 0);
        channel.fill().unwrap();
        while let Some(message) = channel.next_message().unwrap() {
            if let ToBroker::Answered { id, result } = message {
                answers.push((id, result));
            }
        }
    }
    for (id, (_, _, expected)) in (0..).zip(questions) {
        assert_eq!(answers[id as usize], (id, expected));
    }
    assert_eq!(answers.last().unwrap().1, Err(Errno::EOPNOTSUPP));
}

#[test]
fn who_sends_nonsense_is_dropped_with_a_reason() {
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[2, 0, 0, 0, 7, 1], &[1, 0, 0, 0, 0xff]] {
        let (link, _far) = frames();
        let (thread, control) = start(link, "10.0.0.1/24");
        let mut broker = blocking(control);
        broker.write_all(bytes).unwrap();
        assert!(thread.join().unwrap().is_err());
        let mut told = Vec::new();
        broker.read_to_end(&mut told).unwrap();
        assert!(String::from_utf8_lossy(&told).contains("the broker"), "{told:?}");
    }
}
