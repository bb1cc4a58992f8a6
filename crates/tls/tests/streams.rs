//! Both sides over TCP: who is let in, what streams carry, and what strangers cannot do.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use kso_provider::relay::has_hung_up;
use kso_tls::identity::{self, Files};
use kso_tls::{Arrival, Dialer, Gate, Pump, Target, certs};
use kso_wire::provide::{StreamId, Ticket};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(30);

fn authority() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    certs::make(directory.path(), &["provider.test".to_owned()]).unwrap();
    directory
}

fn files(directory: &tempfile::TempDir, name: &str) -> Files {
    let path = |name: String| directory.path().join(name);
    Files { ca: path("ca.pem".into()), cert: path(format!("{name}.pem")), key: path(format!("{name}.key")) }
}

struct Provider {
    gate: Gate,
    pump: Arc<Pump>,
    address: SocketAddr,
    arrivals: Receiver<Arrival>,
}

fn provider(files: &Files) -> Provider {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (told, arrivals) = mpsc::channel();
    let pump = Arc::new(Pump::start().unwrap());
    let arrived = move |arrival| told.send(arrival).unwrap_or_default();
    let gate = Gate::open(listener, identity::server(files).unwrap(), Arc::clone(&pump), arrived).unwrap();
    Provider { gate, pump, address, arrivals }
}

impl Provider {
    fn control(&self) -> UnixStream {
        match self.arrivals.recv_timeout(LIMIT).unwrap() {
            Arrival::Control(stream, _) => blocking(stream),
            other => panic!("{other:?}"),
        }
    }

    fn stream(&self) -> (Ticket, UnixStream) {
        match self.arrivals.recv_timeout(LIMIT).unwrap() {
            Arrival::Stream(ticket, stream) => (ticket, blocking(stream)),
            other => panic!("{other:?}"),
        }
    }
}

fn dial(address: SocketAddr, name: &str, files: &Files) -> (Dialer, UnixStream) {
    let target = Target::new(vec![address], name, files).unwrap();
    let (dialer, control) = Dialer::start(target).unwrap();
    (dialer, blocking(control))
}

fn blocking(stream: OwnedFd) -> UnixStream {
    let stream = UnixStream::from(stream);
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.set_write_timeout(Some(LIMIT)).unwrap();
    stream
}

fn wait_until(what: &str, mut ready: impl FnMut() -> bool) {
    let start = Instant::now();
    while !ready() {
        assert!(start.elapsed() < LIMIT, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn ticket(number: u64) -> Ticket {
    Ticket { session: 0x0123_4567_89ab_cdef, stream: StreamId(number) }
}

/// A control stream through which something went both ways.
fn session(provider: &Provider, files: &Files) -> (Dialer, UnixStream, UnixStream) {
    let (dialer, mut own) = dial(provider.address, "provider.test", files);
    own.write_all(b"hello").unwrap();
    let mut other = provider.control();
    let mut bytes = [0; 5];
    other.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"hello");
    other.write_all(b"welcome").unwrap();
    let mut bytes = [0; 7];
    own.read_exact(&mut bytes).unwrap();
    (dialer, own, other)
}

fn stream(dialer: &Dialer, provider: &Provider, number: u64) -> (UnixStream, UnixStream) {
    let mut own = blocking(dialer.open().unwrap());
    own.write_all(&ticket(number).bytes()).unwrap();
    let (came, other) = provider.stream();
    assert_eq!(came, ticket(number));
    (own, other)
}

#[test]
fn streams_carry_bytes_and_ends() {
    let authority = authority();
    let provider = provider(&files(&authority, "provider.test"));
    let (dialer, _own, _other) = session(&provider, &files(&authority, "broker"));
    wait_until("connections that are ready", || dialer.ready() > 4);
    // More than are ready, at once.
    let mut streams: Vec<_> = (0..60).map(|_| blocking(dialer.open().unwrap())).collect();
    for (number, stream) in streams.iter_mut().enumerate() {
        stream.write_all(&ticket(number as u64).bytes()).unwrap();
        stream.write_all(format!("question {number}").as_bytes()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
    }
    for _ in 0..streams.len() {
        let (ticket, mut stream) = provider.stream();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert_eq!(text, format!("question {}", ticket.stream.0));
        stream.write_all(&[ticket.stream.0 as u8; 100_000]).unwrap();
        assert!(!has_hung_up(stream.as_fd()), "its other direction is open");
    }
    for (number, stream) in streams.iter_mut().enumerate() {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        assert!(bytes.len() == 100_000 && bytes.iter().all(|byte| *byte == number as u8));
    }
    drop(streams);
    wait_until("their ends", || provider.pump.load() == 1);
    wait_until("others that are ready", || dialer.ready() == 8);
}

#[test]
fn a_reset_passes_in_both_directions_and_death_resets_all() {
    let authority = authority();
    let provider = provider(&files(&authority, "provider.test"));
    let (dialer, _own, mut other) = session(&provider, &files(&authority, "broker"));
    let (mut own, theirs) = stream(&dialer, &provider, 1);
    drop(theirs);
    assert_eq!(own.read(&mut [0; 8]).unwrap(), 0);
    wait_until("its end", || has_hung_up(own.as_fd()));
    let (own, mut theirs) = stream(&dialer, &provider, 2);
    drop(own);
    assert_eq!(theirs.read(&mut [0; 8]).unwrap(), 0);
    wait_until("its end", || has_hung_up(theirs.as_fd()));
    // The broker is gone.
    let (_own, mut theirs) = stream(&dialer, &provider, 3);
    drop(dialer);
    for stream in [&mut theirs, &mut other] {
        assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
        wait_until("its end", || has_hung_up(stream.as_fd()));
    }
    // The provider is gone.
    let (dialer, mut own, _other) = session(&provider, &files(&authority, "broker"));
    let Provider { gate, pump, .. } = provider;
    drop((gate, pump));
    assert_eq!(own.read(&mut [0; 8]).unwrap(), 0);
    assert!(dialer.fate().unwrap().contains("closed"), "{:?}", dialer.fate());
}

#[test]
fn a_blocked_stream_stalls_no_other() {
    let authority = authority();
    let provider = provider(&files(&authority, "provider.test"));
    let (dialer, _own, _other) = session(&provider, &files(&authority, "broker"));
    let (blocked, _deaf) = stream(&dialer, &provider, 1);
    blocked.set_nonblocking(true).unwrap();
    let chunk = vec![0; 1 << 20];
    let mut full = 0;
    while full < 10 {
        let written = (&blocked).write(&chunk).unwrap_or(0);
        full = if written > 0 { 0 } else { full + 1 };
        std::thread::sleep(Duration::from_millis(if written > 0 { 0 } else { 10 }));
    }
    let (mut own, mut theirs) = stream(&dialer, &provider, 2);
    let bytes: Vec<u8> = (0..8_u32 << 20).map(|at| (at % 251) as u8).collect();
    let writer = std::thread::spawn({
        let bytes = bytes.clone();
        move || own.write_all(&bytes).map(|()| own)
    });
    let mut read = vec![0; bytes.len()];
    theirs.read_exact(&mut read).unwrap();
    assert!(read == bytes);
    writer.join().unwrap().unwrap();
}

#[test]
fn strangers_are_refused_with_a_reason() {
    let (ours, theirs) = (authority(), authority());
    let provider = provider(&files(&ours, "provider.test"));
    let broker = files(&ours, "broker");
    let cases = [
        (
            "its authority is not ours",
            "provider.test",
            Files { ca: files(&theirs, "x").ca, ..broker.clone() },
        ),
        (
            "ours is not its authority",
            "provider.test",
            Files { ca: broker.ca.clone(), ..files(&theirs, "broker") },
        ),
        ("a provider's certificate is no broker's", "provider.test", files(&ours, "provider.test")),
        ("another name", "other.test", broker.clone()),
    ];
    let reasons =
        ["not of the authority", "refuses our certificate", "refuses our certificate", "another name"];
    for ((what, name, files), reason) in cases.into_iter().zip(reasons) {
        let (dialer, mut control) = dial(provider.address, name, &files);
        control.write_all(b"hello").unwrap();
        let _ = control.read(&mut [0; 8]);
        let fate = dialer.fate().unwrap_or_default();
        assert!(fate.contains(reason), "{what}: {fate}");
    }
    assert!(provider.arrivals.try_recv().is_err(), "nobody came in");
    // Nobody there at all.
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (dialer, mut control) = dial(closed, "provider.test", &broker);
    assert_eq!(control.read(&mut [0; 8]).unwrap(), 0);
    assert!(dialer.fate().unwrap().contains("refused"), "{:?}", dialer.fate());
}

#[test]
fn a_crowd_of_strangers_keeps_nobody_out() {
    let authority = authority();
    let provider = provider(&files(&authority, "provider.test"));
    let broker = files(&authority, "broker");
    let (dialer, _own, _other) = session(&provider, &broker);
    let (mut own, mut theirs) = stream(&dialer, &provider, 1);
    // More than may be unfinished at one time; every third talks nonsense.
    let mut crowd = Vec::new();
    for number in 0..300 {
        let mut stranger = TcpStream::connect(provider.address).unwrap();
        if number % 3 == 0 {
            stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        }
        crowd.push(stranger);
    }
    own.write_all(b"still there").unwrap();
    let mut bytes = [0; 11];
    theirs.read_exact(&mut bytes).unwrap();
    let (_dialer, _own, _other) = session(&provider, &broker);
    // The first of them was sent away for the last.
    crowd[1].set_read_timeout(Some(LIMIT)).unwrap();
    let sent_away = crowd[1].read(&mut [0; 1]);
    assert!(sent_away.is_ok_and(|count| count == 0), "closed");
}

#[test]
fn a_gate_that_is_shut_still_lets_streams_through() {
    let authority = authority();
    let provider = provider(&files(&authority, "provider.test"));
    let (dialer, _own, _other) = session(&provider, &files(&authority, "broker"));
    wait_until("connections that are ready", || dialer.ready() > 0);
    provider.gate.shut();
    wait_until("that nobody listens", || TcpStream::connect(provider.address).is_err());
    let (mut own, mut theirs) = stream(&dialer, &provider, 1);
    own.write_all(b"late").unwrap();
    let mut bytes = [0; 4];
    theirs.read_exact(&mut bytes).unwrap();
}
