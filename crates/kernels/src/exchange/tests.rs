#![allow(clippy::unwrap_used)]
//! As root: a network namespace is made.

use super::*;
use kso_wire::OptionName;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

fn exchange() -> Option<Exchange> {
    // Without root there is nothing to test.
    Exchange::new().ok()
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn blocking(socket: OwnedFd) -> TcpStream {
    let stream = TcpStream::from(socket);
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    stream
}

const CASES: [(Family, &str, &str); 3] = [
    (Family::V4, "10.77.0.2:0", "192.0.2.9:443"),
    (Family::V6, "[fd00::2]:0", "[2001:db8::9]:443"),
    (Family::V6, "10.77.0.2:0", "[::ffff:192.0.2.9]:443"),
];

#[test]
fn a_stand_in_is_under_way_until_the_true_connection_is_up() {
    let Some(exchange) = exchange() else { return };
    for (family, local, peer) in CASES {
        let mut wanted = SocketOptions::default();
        wanted.push(OptionName::TimeToLive, 33);
        let (socket, pending) = exchange.connect(family, address(local), address(peer), &wanted).unwrap();
        assert_eq!(connected(&socket), Ok(false));
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(connected(&socket), Ok(false), "its own kernel's refusal is not heard");
        let mut far = blocking(exchange.establish(&pending).unwrap());
        assert_eq!(connected(&socket), Ok(true));
        let mut own = blocking(socket);
        assert_eq!(own.peer_addr().unwrap(), address(peer));
        assert_eq!(own.local_addr().unwrap().ip().to_canonical(), address(local).ip());
        if family == Family::V4 {
            assert_eq!(own.ttl().unwrap(), 33);
        }
        own.write_all(b"abc").unwrap();
        let mut read = [0; 3];
        far.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"abc");
        drop(pending);
        kso_provider::relay::reset(far.into());
        assert_eq!(own.read(&mut read).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }
}

#[test]
fn a_failure_keeps_its_errno() {
    let Some(exchange) = exchange() else { return };
    for (family, local, peer) in CASES {
        for errno in [Errno::ECONNREFUSED, Errno::EHOSTUNREACH, Errno::ENETUNREACH] {
            let none = SocketOptions::default();
            let (socket, pending) = exchange.connect(family, address(local), address(peer), &none).unwrap();
            exchange.fail(&pending, errno);
            let began = Instant::now();
            let failed = loop {
                match connected(&socket) {
                    Ok(false) if began.elapsed() < Duration::from_secs(3) => {}
                    other => break other,
                }
            };
            assert_eq!(failed, Err(errno), "{peer}");
            assert!(began.elapsed() < Duration::from_millis(500), "{:?}", began.elapsed());
        }
    }
}

#[test]
fn who_dials_in_comes_from_the_true_peer() {
    let Some(exchange) = exchange() else { return };
    for (family, inner, local, peer) in [
        (Family::V4, "0.0.0.0:80", "10.77.0.2:8080", "192.0.2.9:5555"),
        (Family::V4, "198.18.0.2:80", "10.77.0.2:8080", "192.0.2.9:5555"),
        (Family::V6, "[::]:81", "[fd00::2]:8080", "[2001:db8::9]:5555"),
        (Family::V6, "[::]:82", "10.77.0.2:8080", "192.0.2.9:5555"),
    ] {
        let none = SocketOptions::default();
        let listener = TcpListener::from(exchange.listen(family, address(inner), 5, &none).unwrap());
        let far = exchange.dial(address(inner), address(local), address(peer)).unwrap();
        assert_eq!(connected(&far), Ok(true));
        let (accepted, from) = listener.accept().unwrap();
        assert_eq!((from.ip().to_canonical(), from.port()), (address(peer).ip(), address(peer).port()));
        assert_eq!(accepted.local_addr().unwrap().port(), address(inner).port());
        drop(listener);
        let other = SocketAddr::new(address(peer).ip(), 6666);
        let refused = exchange.dial(address(inner), address(local), other).map(|far| connected(&far));
        assert!(matches!(refused, Err(Errno::ECONNREFUSED) | Ok(Err(Errno::ECONNREFUSED))), "{refused:?}");
    }
}

#[test]
fn short_connections_use_up_no_ports() {
    let Some(exchange) = exchange() else { return };
    let none = SocketOptions::default();
    let (local, peer) = (address("10.77.0.2:0"), address("192.0.2.9:443"));
    for _ in 0..40_000 / if cfg!(debug_assertions) { 8 } else { 1 } {
        let (socket, pending) = exchange.connect(Family::V4, local, peer, &none).unwrap();
        let far = exchange.establish(&pending).unwrap();
        drop(pending);
        drop(socket);
        drop(far);
    }
}
