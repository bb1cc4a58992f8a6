//! Streams and datagrams of a session, on real sockets of loopback.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use common::{Client, allow, config, free_port, hello, publish, reaches, readable};
use kso_broker::{Broker, BrokerConfig};
use kso_wire::{BindDatagram, Errno, Failure, Family, Hello, LoopbackMode, OpenDatagram, Reply, Request};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};

fn failure(answer: &kso_wire::Answer) -> &Failure {
    answer.result.as_ref().unwrap_err()
}

#[test]
fn the_host_is_reached_by_its_gateway_address_if_a_rule_says_so() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut client = Client::new(config(), &hello());
    let answer = client.connect(&format!("198.18.0.1:{port}"));
    assert_eq!(failure(&answer), &Failure::denied(Errno::EACCES));
    let mut client = Client::new(config(), &allow(&[&format!("host:{port}")]));
    for peer in ["198.18.0.1", "[::ffff:198.18.0.1]", "[fd6b:736f::1]"] {
        assert!(reaches(client.connect(&format!("{peer}:{port}")), &listener), "{peer}");
    }
    let answer = client.connect(&format!("198.18.0.1:{}", port ^ 1));
    assert!(failure(&answer).denied);
}

#[test]
fn loopback_inside_stays_inside() {
    let mut client = Client::new(config(), &hello());
    for peer in ["127.0.0.1:80", "[::1]:80", "0.0.0.0:80", "198.18.0.2:80", "[::ffff:127.0.0.1]:80"] {
        assert_eq!(client.connect(peer).result, Ok(Reply::StayInside), "{peer}");
    }
}

#[test]
fn the_rules_of_the_broker_hold_too() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let rules = vec![(false, "host".to_owned())];
    let mut client = Client::new(BrokerConfig { rules, ..config() }, &allow(&["host"]));
    assert!(failure(&client.connect(&format!("198.18.0.1:{port}"))).denied);
}

#[test]
fn a_published_listener_is_reached_from_both_sides_until_it_closes() {
    let port = free_port();
    let mut client = Client::new(config(), &publish(&[format!("{port}:80")]));
    assert_eq!(client.connect("127.0.0.1:80").result, Ok(Reply::StayInside));
    let answer = client.listen("0.0.0.0:80", Some(16));
    let outer: SocketAddr = format!("127.0.0.1:{port}").parse().unwrap();
    assert_eq!(answer.result, Ok(Reply::Socket { local: Some(outer) }));
    let listener = TcpListener::from(answer.descriptor.unwrap());
    listener.set_nonblocking(false).unwrap();
    let outside = TcpStream::connect(outer).unwrap();
    listener.accept().unwrap();
    drop(outside);
    for peer in ["127.0.0.1:80", "198.18.0.2:80", "[::ffff:127.0.0.1]:80"] {
        assert!(reaches(client.connect(peer), &listener), "{peer}");
    }
    assert_eq!(client.connect("[::1]:80").result, Ok(Reply::StayInside));
    drop(listener);
    // A stranger takes the port: it is not the session's, and what is inside stays there.
    let _stranger = TcpListener::bind(outer);
    assert_eq!(client.connect("127.0.0.1:80").result, Ok(Reply::StayInside));
}

#[test]
fn listeners_on_loopback_and_others_stay_inside() {
    let port = free_port();
    let mut client = Client::new(config(), &publish(&[format!("{port}:80")]));
    for local in ["127.0.0.1:80", "[::1]:80", "0.0.0.0:81"] {
        assert_eq!(client.listen(local, Some(16)).result, Ok(Reply::StayInside), "{local}");
    }
}

#[test]
fn a_dual_stack_listener_is_reached_over_ipv4() {
    let port = free_port();
    let mut client = Client::new(config(), &publish(&[format!("{port}:80")]));
    let answer = client.listen("[::]:80", Some(16));
    let listener = TcpListener::from(answer.descriptor.unwrap());
    listener.set_nonblocking(false).unwrap();
    let _stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let (_, peer) = listener.accept().unwrap();
    assert!(peer.is_ipv6());
    assert!(reaches(client.connect("[::1]:80"), &listener));
}

#[test]
fn a_port_that_is_taken_is_told_when_the_session_opens() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let mut broker = Broker::new(config()).unwrap();
    let error = broker.open_session(&publish(&[format!("{port}:80")])).unwrap_err().to_string();
    assert!(error.contains(&format!("127.0.0.1:{port}")) && error.contains("in use"), "{error}");
    let port = free_port();
    broker.open_session(&publish(&[format!("{port}:80")])).unwrap();
    let error = broker.open_session(&publish(&[format!("{port}:81")])).unwrap_err().to_string();
    assert!(error.contains("session 1"), "{error}");
}

#[test]
fn a_reserved_port_is_the_same_inside_and_outside() {
    let mut client = Client::new(config(), &publish(&["all".into()]));
    let answer = client.listen("0.0.0.0:0", None);
    assert!(answer.descriptor.is_none());
    let Ok(Reply::Socket { local: Some(outer) }) = answer.result else { panic!("{answer:?}") };
    assert!(outer.ip().is_loopback() && outer.port() != 0);
    let answer = client.listen(&format!("0.0.0.0:{}", outer.port()), Some(16));
    assert_eq!(answer.result, Ok(Reply::Socket { local: Some(outer) }));
    let listener = TcpListener::from(answer.descriptor.unwrap());
    listener.set_nonblocking(false).unwrap();
    assert!(reaches(client.connect(&format!("127.0.0.1:{}", outer.port())), &listener));
    // One that is given back is free.
    let Ok(Reply::Socket { local: Some(other) }) = client.listen("0.0.0.0:0", None).result else { panic!() };
    assert!(TcpListener::bind(other).is_err());
    client.ask(Request::Release(other));
    TcpListener::bind(other).unwrap();
}

#[test]
fn external_loopback_is_the_hosts() {
    let external = Hello { loopback: LoopbackMode::External, ..hello() };
    let mut client = Client::new(config(), &external);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    assert!(reaches(client.connect(&listener.local_addr().unwrap().to_string()), &listener));
    let Ok(Reply::Socket { local: Some(outer) }) = client.listen("127.0.0.1:0", None).result else {
        panic!()
    };
    // A program that binds and connects leaves from the port that it bound.
    let answer = client.connect_from(&listener.local_addr().unwrap().to_string(), Some(outer));
    let stream = TcpStream::from(answer.descriptor.unwrap());
    assert_eq!(stream.local_addr().unwrap(), outer);
    assert_eq!(listener.accept().unwrap().1, outer);
    let answer = client.listen("0.0.0.0:0", Some(5));
    let own = TcpListener::from(answer.descriptor.unwrap());
    own.set_nonblocking(false).unwrap();
    let port = own.local_addr().unwrap().port();
    assert!(reaches(client.connect(&format!("127.0.0.1:{port}")), &own));
}

#[test]
fn a_source_port_is_kept_and_loopback_reaches_nothing_else() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut client = Client::new(config(), &allow(&["host"]));
    let source = free_port();
    let peer = format!("198.18.0.1:{port}");
    let answer = client.connect_from(&peer, Some(format!("198.18.0.2:{source}").parse().unwrap()));
    assert_eq!(TcpStream::from(answer.descriptor.unwrap()).local_addr().unwrap().port(), source);
    let answer = client.connect_from(&peer, Some("127.0.0.1:4000".parse().unwrap()));
    assert_eq!(failure(&answer), &Failure::kernel(Errno::EINVAL));
}

#[test]
fn no_net_is_no_net() {
    let mut client = Client::new(config(), &Hello { no_net: true, ..hello() });
    assert!(failure(&client.connect("198.18.0.1:80")).denied);
    assert!(failure(&client.connect("192.0.2.1:80")).denied);
}

#[test]
fn datagrams_reach_the_host_and_come_back() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let peer: SocketAddr = format!("198.18.0.1:{port}").parse().unwrap();
    let guest: SocketAddr = "198.18.0.2:5000".parse().unwrap();
    let open = Request::OpenDatagram(OpenDatagram { guest, peer });
    let mut client = Client::new(config(), &hello());
    assert!(failure(&client.ask(open.clone())).denied);
    let mut client = Client::new(config(), &allow(&[&format!("host:{port}/udp")]));
    let flow = UdpSocket::from(client.ask(open).descriptor.unwrap());
    flow.send(b"there").unwrap();
    let mut read = [0; 16];
    let (_, from) = server.recv_from(&mut read).unwrap();
    server.send_to(b"back", from).unwrap();
    assert!(readable(&flow));
    assert_eq!(flow.recv(&mut read).unwrap(), 4);
}

#[test]
fn a_published_datagram_port_is_bound_once_a_family() {
    let port = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut client = Client::new(config(), &publish(&[format!("{port}:53/udp")]));
    let mut bind = |family| client.ask(Request::BindDatagram(BindDatagram { publication: 0, family }));
    let outer: SocketAddr = format!("127.0.0.1:{port}").parse().unwrap();
    let answer = bind(Family::V4);
    assert_eq!(answer.result, Ok(Reply::Socket { local: Some(outer) }));
    assert_eq!(failure(&bind(Family::V4)), &Failure::kernel(Errno::EADDRINUSE));
    assert!(bind(Family::V6).descriptor.is_some());
    let wrong = client.ask(Request::BindDatagram(BindDatagram { publication: 7, family: Family::V4 }));
    assert_eq!(failure(&wrong), &Failure::kernel(Errno::EINVAL));
}
