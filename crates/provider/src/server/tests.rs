#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use super::*;
use crate::client::{Client, Fault as ClientFault};
use crate::relay::stream_pair;
use kso_wire::SocketOptions;
use kso_wire::provide::{Connect, Listen, ListenerId, StreamId, ToBroker};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::Duration;

struct World {
    client: Client,
    server: JoinHandle<Result<(), Fault>>,
    shared: Shared,
}

fn world(limits: Limits) -> World {
    let (one, other) = stream_pair().unwrap();
    let shared = Shared::default();
    let server = std::thread::spawn({
        let shared = shared.clone();
        move || shared.serve(other, limits)
    });
    let mut client = Client::new(one, "test", Duration::from_secs(2)).unwrap();
    assert!(matches!(next(&mut client).unwrap(), ToBroker::Welcome(_)));
    World { client, server, shared }
}

/// Waits for the next thing that the provider says.
fn next(client: &mut Client) -> Result<ToBroker, ClientFault> {
    for _ in 0..50 {
        client.flush()?;
        if let Some(message) = client.receive()? {
            return Ok(message);
        }
        let mut polled = [PollFd::from_borrowed_fd(client.poll_fd(), PollFlags::IN)];
        poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 100_000_000 })).unwrap();
    }
    panic!("the provider says nothing");
}

fn connect(client: &mut Client, number: u64, peer: SocketAddr) -> UnixStream {
    let (own, given) = stream_pair().unwrap();
    let family = crate::family_of(peer);
    let order =
        Connect { stream: StreamId(number), peer, family, port: 0, options: SocketOptions::default() };
    client.connect(order, given).unwrap();
    client.flush().unwrap();
    blocking(own)
}

fn blocking(stream: OwnedFd) -> UnixStream {
    let stream = UnixStream::from(stream);
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    stream
}

#[test]
fn a_connection_carries_bytes_and_ends_in_order() {
    let World { mut client, server, .. } = world(Limits::default());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut stream = connect(&mut client, 1, listener.local_addr().unwrap());
    let (mut far, peer) = listener.accept().unwrap();
    match next(&mut client).unwrap() {
        ToBroker::Connected { stream: StreamId(1), local } => assert_eq!(local, peer),
        other => panic!("{other:?}"),
    }
    stream.write_all(b"question").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut text = String::new();
    far.read_to_string(&mut text).unwrap();
    assert_eq!(text, "question");
    far.write_all(b"answer").unwrap();
    drop(far);
    text.clear();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text, "answer");
    let ended = next(&mut client).unwrap();
    let expected = ToBroker::Ended { stream: StreamId(1), bytes_in: 6, bytes_out: 8, errno: None };
    assert_eq!(ended, expected);
    drop(client);
    server.join().unwrap().unwrap();
}

#[test]
fn a_failure_keeps_its_errno() {
    let World { mut client, .. } = world(Limits::default());
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut stream = connect(&mut client, 1, SocketAddr::from(([127, 0, 0, 1], port)));
    let expected = ToBroker::Failed { stream: StreamId(1), errno: Errno::ECONNREFUSED };
    assert_eq!(next(&mut client).unwrap(), expected);
    assert_eq!(stream.read(&mut [0; 4]).unwrap(), 0);
    connect(&mut client, 2, "255.255.255.255:1".parse().unwrap());
    assert!(matches!(next(&mut client).unwrap(), ToBroker::Failed { stream: StreamId(2), .. }));
}

#[test]
fn a_reset_passes_in_both_directions() {
    let World { mut client, .. } = world(Limits::default());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    // From outside.
    let mut stream = connect(&mut client, 1, listener.local_addr().unwrap());
    let (far, _) = listener.accept().unwrap();
    assert!(matches!(next(&mut client).unwrap(), ToBroker::Connected { .. }));
    crate::relay::reset(far.into());
    match next(&mut client).unwrap() {
        ToBroker::Ended { errno: Some(Errno::ECONNRESET), .. } => {}
        other => panic!("{other:?}"),
    }
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    assert!(crate::relay::has_hung_up(std::os::fd::AsFd::as_fd(&stream)));
    // From inside: closed before its ends.
    let stream = connect(&mut client, 2, listener.local_addr().unwrap());
    let (mut far, _) = listener.accept().unwrap();
    assert!(matches!(next(&mut client).unwrap(), ToBroker::Connected { .. }));
    drop(stream);
    assert!(matches!(next(&mut client).unwrap(), ToBroker::Ended { errno: Some(Errno::ECONNRESET), .. }));
    assert_eq!(far.read(&mut [0; 4]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn a_listener_accepts_what_it_has_streams_for() {
    let World { mut client, .. } = world(Limits::default());
    let listener = ListenerId(1);
    let address = "127.0.0.1:0".parse().unwrap();
    let order = Listen { listener, address, backlog: 16, options: SocketOptions::default() };
    client.listen(order.clone()).unwrap();
    let ToBroker::Listening { local, .. } = next(&mut client).unwrap() else { panic!() };
    let mut far: Vec<TcpStream> = (0..3).map(|_| TcpStream::connect(local).unwrap()).collect();
    let mut own = Vec::new();
    for number in 0..2 {
        let (one, given) = stream_pair().unwrap();
        client.offer(listener, StreamId(10 + number), given).unwrap();
        own.push(blocking(one));
    }
    for (index, peer) in far.iter().take(2).enumerate() {
        match next(&mut client).unwrap() {
            ToBroker::Accepted { stream, peer: told, local: at, .. } => {
                assert_eq!((stream.0, told, at), (10 + index as u64, peer.local_addr().unwrap(), local));
            }
            other => panic!("{other:?}"),
        }
    }
    far[1].write_all(b"two").unwrap();
    let mut read = [0; 3];
    own[1].read_exact(&mut read).unwrap();
    assert_eq!(&read, b"two");
    // The port is taken, and free again once nobody listens.
    client.listen(Listen { listener: ListenerId(2), address: local, ..order.clone() }).unwrap();
    match next(&mut client).unwrap() {
        ToBroker::NotListening { errno: Errno::EADDRINUSE, .. } => {}
        other => panic!("{other:?}"),
    }
    client.unlisten(listener).unwrap();
    assert_eq!(next(&mut client).unwrap(), ToBroker::Unlistened(listener));
    // The third was never accepted.
    assert_eq!(far[2].read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    client.listen(Listen { listener: ListenerId(3), address: local, ..order }).unwrap();
    assert!(matches!(next(&mut client).unwrap(), ToBroker::Listening { .. }));
}

#[test]
fn a_blocked_socket_stalls_no_other() {
    let World { mut client, .. } = world(Limits::default());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let blocked = connect(&mut client, 1, listener.local_addr().unwrap());
    let (_deaf, _) = listener.accept().unwrap();
    assert!(matches!(next(&mut client).unwrap(), ToBroker::Connected { .. }));
    blocked.set_nonblocking(true).unwrap();
    let chunk = vec![0; 1 << 20];
    while (&blocked).write(&chunk).is_ok() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut other = connect(&mut client, 2, listener.local_addr().unwrap());
    let (mut far, _) = listener.accept().unwrap();
    let bytes = vec![5; 8 << 20];
    let writer = std::thread::spawn({
        let bytes = bytes.clone();
        move || other.write_all(&bytes).map(|()| other)
    });
    let mut read = vec![0; bytes.len()];
    far.read_exact(&mut read).unwrap();
    assert_eq!(read, bytes);
    writer.join().unwrap().unwrap();
}

#[test]
fn when_the_broker_is_gone_its_connections_are_reset() {
    let World { mut client, server, .. } = world(Limits::default());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = connect(&mut client, 1, listener.local_addr().unwrap());
    let (mut far, _) = listener.accept().unwrap();
    assert!(matches!(next(&mut client).unwrap(), ToBroker::Connected { .. }));
    drop(client);
    server.join().unwrap().unwrap();
    assert_eq!(far.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    drop(stream);
}

#[test]
fn limits_are_told_and_draining_ends() {
    let World { mut client, server, shared } = world(Limits { streams: 1, ..Limits::default() });
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = connect(&mut client, 1, listener.local_addr().unwrap());
    assert!(matches!(next(&mut client).unwrap(), ToBroker::Connected { .. }));
    connect(&mut client, 2, listener.local_addr().unwrap());
    let expected = ToBroker::Failed { stream: StreamId(2), errno: Errno::ENOBUFS };
    assert_eq!(next(&mut client).unwrap(), expected);
    shared.draining.store(true, Ordering::Relaxed);
    assert_eq!(next(&mut client).unwrap(), ToBroker::Draining);
    drop(stream);
    assert!(matches!(next(&mut client).unwrap(), ToBroker::Ended { .. }));
    drop(client);
    server.join().unwrap().unwrap();
}

#[test]
fn who_sends_nonsense_is_dropped_with_a_reason() {
    for bytes in
        [&b"GET / HTTP/1.1\r\n\r\n"[..], &[2, 0, 0, 0, 7, 1], &[1, 0, 0, 0, 0xff], &[4, 0, 0, 0, 0, 9, 1, 65]]
    {
        let (one, other) = stream_pair().unwrap();
        let mut broker = blocking(one);
        broker.write_all(bytes).unwrap();
        assert!(Shared::default().serve(other, Limits::default()).is_err());
        let mut told = Vec::new();
        broker.read_to_end(&mut told).unwrap();
        assert!(String::from_utf8_lossy(&told).contains("the broker"), "{told:?}");
    }
}

/// Asks for a directory; our end of its stream.
fn share(client: &mut Client, number: u64, path: &std::path::Path) -> UnixStream {
    let (own, given) = stream_pair().unwrap();
    let path = path.as_os_str().as_encoded_bytes().to_vec();
    let order = kso_wire::provide::Share {
        stream: StreamId(number),
        path,
        read_only: false,
        caching: kso_wire::provide::Caching::Auto,
    };
    client.share(order, given).unwrap();
    client.flush().unwrap();
    blocking(own)
}

fn sharing(limits: Limits, exports: Vec<Export>) -> World {
    let (one, other) = stream_pair().unwrap();
    let shared = Shared { exports, ..Shared::default() };
    let server = std::thread::spawn({
        let shared = shared.clone();
        move || shared.serve(other, limits)
    });
    let mut client = Client::new(one, "test", Duration::from_secs(2)).unwrap();
    let ToBroker::Welcome(welcome) = next(&mut client).unwrap() else { panic!("no welcome") };
    let offers = welcome.services.contains(&kso_wire::provide::Service::Files);
    assert_eq!(offers, !shared.exports.is_empty());
    World { client, server, shared }
}

#[test]
fn a_directory_is_shared_until_its_stream_or_its_session_ends() {
    let place = tempfile::tempdir().unwrap();
    let inner = place.path().join("inner");
    std::fs::create_dir(&inner).unwrap();
    let limits = Limits { shares: 2, ..Limits::default() };
    let World { mut client, server, .. } = sharing(limits, vec![Export::open(&inner, false).unwrap()]);
    let mut streams = Vec::new();
    for number in 1..=2 {
        let mut stream = share(&mut client, number, &inner);
        assert_eq!(next(&mut client).unwrap(), ToBroker::Shared { stream: StreamId(number) });
        let mut hello = [0; 8];
        stream.read_exact(&mut hello).unwrap();
        assert_eq!(&hello, b"ksofiles");
        streams.push(stream);
    }
    for (number, path, errno) in [(3, place.path(), Errno::ENOBUFS), (4, inner.as_path(), Errno::ENOBUFS)] {
        share(&mut client, number, path);
        assert_eq!(next(&mut client).unwrap(), ToBroker::Failed { stream: StreamId(number), errno });
    }
    // Its end makes room.
    drop(streams.pop());
    match next(&mut client).unwrap() {
        ToBroker::Ended { stream: StreamId(2), .. } => {}
        other => panic!("{other:?}"),
    }
    for (number, path, errno) in
        [(5, place.path().to_owned(), Errno::EACCES), (6, inner.join("no"), Errno::ENOENT)]
    {
        share(&mut client, number, &path);
        assert_eq!(next(&mut client).unwrap(), ToBroker::Failed { stream: StreamId(number), errno });
    }
    // The session's end is theirs.
    drop(client);
    let mut rest = Vec::new();
    streams.pop().unwrap().read_to_end(&mut rest).unwrap();
    server.join().unwrap().unwrap();
}

#[test]
fn who_shares_nothing_says_so_and_who_drains_ends_its_shares() {
    let World { mut client, .. } = sharing(Limits::default(), Vec::new());
    share(&mut client, 1, std::path::Path::new("/"));
    let errno = Errno::EOPNOTSUPP;
    assert_eq!(next(&mut client).unwrap(), ToBroker::Failed { stream: StreamId(1), errno });
    let place = tempfile::tempdir().unwrap();
    let exports = vec![Export::open(place.path(), true).unwrap()];
    let World { mut client, server, shared } = sharing(Limits::default(), exports);
    let mut stream = share(&mut client, 1, place.path());
    assert_eq!(next(&mut client).unwrap(), ToBroker::Shared { stream: StreamId(1) });
    shared.draining.store(true, Ordering::Relaxed);
    assert_eq!(next(&mut client).unwrap(), ToBroker::Draining);
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    server.join().unwrap().unwrap();
}
