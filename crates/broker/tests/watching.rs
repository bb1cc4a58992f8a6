//! What `kso ps`, `kso trace` and metrics see, and the daemon.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use common::{Client, allow, config, free_port, hello, publish};
use kso_broker::{BrokerConfig, Control, Question, Report, ServeConfig, control_sockets};
use kso_core::event::{Direction, Event, Kind};
use kso_runner::RemoteLink;
use kso_wire::{Answer, BrokerLink, Caller, Connect, Family, Origin, Reply, Request, RequestId, Submitted};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

struct Watcher {
    stream: UnixStream,
    read: Vec<u8>,
}

impl Watcher {
    fn new(client: &mut Client, directory: &Path, question: &Question) -> Self {
        let (path, _) = control_sockets(directory).pop().unwrap();
        let mut stream = UnixStream::connect(path).unwrap();
        stream.write_all(&serde_json::to_vec(question).unwrap()).unwrap();
        stream.write_all(b"\n").unwrap();
        stream.set_nonblocking(true).unwrap();
        for _ in 0..3 {
            client.turn(Duration::from_millis(10));
        }
        Self { stream, read: Vec::new() }
    }

    /// The next line that `wanted` takes.
    fn line<T>(&mut self, client: &mut Client, mut wanted: impl FnMut(&[u8]) -> Option<T>) -> T {
        let end = Instant::now() + Duration::from_secs(10);
        while Instant::now() < end {
            while let Some(at) = self.read.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.read.drain(..=at).collect();
                if let Some(found) = wanted(&line) {
                    return found;
                }
            }
            client.turn(Duration::from_millis(20));
            let mut buffer = [0; 65_536];
            if let Ok(count) = self.stream.read(&mut buffer) {
                self.read.extend_from_slice(&buffer[..count]);
            }
        }
        panic!("it did not come");
    }

    fn event<T>(&mut self, client: &mut Client, wanted: impl Fn(Event) -> Option<T>) -> T {
        self.line(client, |line| wanted(serde_json::from_slice(line).unwrap()))
    }
}

fn seen(directory: &Path) -> BrokerConfig {
    BrokerConfig { control: Control::Run, runtime_directory: directory.to_owned(), ..config() }
}

#[test]
fn a_trace_tells_of_connections_and_what_they_carried() {
    let directory = tempfile::tempdir().unwrap();
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let outer = free_port();
    let mut hello = publish(&[format!("{outer}:80")]);
    hello.rules = allow(&[&format!("host:{port}")]).rules;
    let mut client = Client::new(seen(directory.path()), &hello);
    let mut watcher = Watcher::new(&mut client, directory.path(), &Question::Trace { session: None });

    let answer = client.connect(&format!("198.18.0.1:{port}"));
    let mut stream = TcpStream::from(answer.descriptor.unwrap());
    let connect = watcher.event(&mut client, |event| match event.kind {
        Kind::Connect(connect) => Some((connect, event.program)),
        _ => None,
    });
    assert_eq!(connect.1, "prog");
    assert_eq!(connect.0.names, ["host.kso.internal"]);
    let (mut accepted, _) = server.accept().unwrap();
    stream.set_nonblocking(false).unwrap();
    stream.write_all(&[1; 5000]).unwrap();
    accepted.read_exact(&mut [0; 5000]).unwrap();
    accepted.write_all(&[1; 77]).unwrap();
    stream.read_exact(&mut [0; 77]).unwrap();
    drop((stream, accepted));
    let closed = watcher.event(&mut client, |event| match event.kind {
        Kind::Closed(closed) => Some(closed),
        _ => None,
    });
    assert_eq!((closed.bytes_in, closed.bytes_out, closed.direction), (77, 5000, Direction::Out));
    assert_eq!(closed.error, None);

    assert!(client.connect("198.18.0.1:9").result.is_err());
    let denied = watcher.event(&mut client, |event| match event.kind {
        Kind::Denied(denied) => Some(denied),
        _ => None,
    });
    assert_eq!(denied.port, Some(9));

    let listener = TcpListener::from(client.listen("0.0.0.0:80", Some(16)).descriptor.unwrap());
    listener.set_nonblocking(false).unwrap();
    let mut outside = TcpStream::connect(("127.0.0.1", outer)).unwrap();
    let (mut inside, _) = listener.accept().unwrap();
    let accept = watcher.event(&mut client, |event| match event.kind {
        Kind::Accept(accept) => Some(accept),
        _ => None,
    });
    assert_eq!(accept.peer, outside.local_addr().unwrap());
    outside.write_all(b"12345").unwrap();
    inside.read_exact(&mut [0; 5]).unwrap();
    drop(outside);
    drop(inside);
    let closed = watcher.event(&mut client, |event| match event.kind {
        Kind::Closed(closed) => Some(closed),
        _ => None,
    });
    assert_eq!((closed.bytes_in, closed.bytes_out, closed.direction), (5, 0, Direction::In));
}

#[test]
fn a_refused_connection_is_told_as_refused() {
    let directory = tempfile::tempdir().unwrap();
    let mut client = Client::new(seen(directory.path()), &allow(&["host"]));
    let mut watcher = Watcher::new(&mut client, directory.path(), &Question::Trace { session: None });
    drop(client.connect(&format!("198.18.0.1:{}", free_port())));
    let closed = watcher.event(&mut client, |event| match event.kind {
        Kind::Closed(closed) => Some(closed),
        _ => None,
    });
    assert_eq!(closed.error, Some(kso_wire::Errno::ECONNREFUSED));
}

#[test]
fn a_slow_watcher_is_told_what_it_lost() {
    let directory = tempfile::tempdir().unwrap();
    let mut client = Client::new(seen(directory.path()), &hello());
    let mut watcher = Watcher::new(&mut client, directory.path(), &Question::Trace { session: None });
    for _ in 0..10_000 {
        client.connect("198.18.0.1:9");
    }
    let mut told = 0;
    let lost = loop {
        let line: serde_json::Value =
            watcher.line(&mut client, |line| Some(serde_json::from_slice(line).unwrap()));
        if let Some(lost) = line.get("lost") {
            break lost.as_u64().unwrap();
        }
        told += 1;
        if told % 100 == 0 {
            client.connect("198.18.0.1:9");
        }
    };
    assert!(lost > 0 && told > 100);
}

#[test]
fn ps_shows_listeners_and_connections() {
    let directory = tempfile::tempdir().unwrap();
    let outer = free_port();
    let mut hello = publish(&[format!("{outer}:80")]);
    hello.rules = allow(&["host"]).rules;
    let mut client = Client::new(seen(directory.path()), &hello);
    let listener = TcpListener::from(client.listen("0.0.0.0:80", Some(16)).descriptor.unwrap());
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let peer = server.local_addr().unwrap();
    let stream = TcpStream::from(client.connect(&format!("198.18.0.1:{}", peer.port())).descriptor.unwrap());
    let mut watcher = Watcher::new(&mut client, directory.path(), &Question::Ps);
    let report: Report = watcher.line(&mut client, |line| Some(serde_json::from_slice(line).unwrap()));
    let session = &report.sessions[0];
    assert_eq!((session.name.as_str(), session.connects), ("test", 1));
    assert_eq!(session.listeners[0].inside, "0.0.0.0:80".parse().unwrap());
    let ours = |one: &&kso_broker::ConnectionReport| one.local == stream.local_addr().unwrap();
    let connection = session.connections.iter().find(ours).unwrap();
    assert_eq!((connection.peer, connection.state.as_str()), (peer, "established"));
    drop((listener, watcher));
    drop(client);
    assert!(control_sockets(directory.path()).is_empty());
}

#[test]
fn metrics_are_read_over_http() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("metrics.sock");
    let metrics = Some(format!("unix:{}", path.display()));
    let mut client = Client::new(BrokerConfig { metrics, ..config() }, &hello());
    client.connect("198.18.0.1:9");
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    for _ in 0..5 {
        client.turn(Duration::from_millis(10));
    }
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert!(text.contains("kso_connects_total{result=\"denied\"} 1"), "{text}");
    drop(client);
    assert!(!path.exists());
}

fn wait(link: &mut RemoteLink, submitted: Submitted) -> Answer {
    match submitted {
        Submitted::Done(answer) => answer,
        Submitted::Pending => loop {
            assert!(common::readable(link.poll_fd().unwrap()));
            if let Some((_, answer)) = link.completed() {
                return answer;
            }
        },
    }
}

#[test]
fn the_daemon_serves_sessions_of_other_processes() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("broker.sock");
    let config = ServeConfig {
        broker: BrokerConfig { rules: vec![(false, "*:25".into())], ..config() },
        socket: socket.clone(),
        group: None,
        guests: Vec::new(),
    };
    // It serves until the test's process ends.
    std::thread::spawn(move || kso_broker::serve(config).unwrap());
    while !socket.exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(20));
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let peer = format!("198.18.0.1:{}", server.local_addr().unwrap().port());
    let (mut link, welcome) = RemoteLink::open(&socket, allow(&["host"])).unwrap();
    assert_eq!(welcome.session, 1);
    let ask = |link: &mut RemoteLink, n: u64, peer: &str| {
        let request = Request::Connect(Connect {
            peer: peer.parse().unwrap(),
            family: Family::V4,
            local: None,
            options: kso_wire::SocketOptions::default(),
            origin: Origin::Intercepted,
        });
        let submitted = link.submit(RequestId::interceptor(n), &Caller::default(), request);
        wait(link, submitted)
    };
    let answer = ask(&mut link, 1, &peer);
    assert_eq!(answer.result, Ok(Reply::Socket { local: None }));
    assert!(common::reaches(answer, &server));
    assert!(ask(&mut link, 2, "198.18.0.1:25").result.unwrap_err().denied);
    let error = RemoteLink::open(&socket, allow(&["b@d"])).unwrap_err().to_string();
    assert!(error.contains("b@d"), "{error}");
    // What is no message ends its own session and no other.
    let raw = rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::SEQPACKET, None);
    let raw = raw.unwrap();
    rustix::net::connect(&raw, &rustix::net::SocketAddrUnix::new(&socket).unwrap()).unwrap();
    rustix::net::send(&raw, &[0xff; 100], rustix::net::SendFlags::empty()).unwrap();
    let mut buffer = [0; 16];
    assert_eq!(rustix::net::recv(&raw, &mut buffer[..], rustix::net::RecvFlags::empty()).unwrap().1, 0);
    assert!(common::reaches(ask(&mut link, 3, &peer), &server));
}
