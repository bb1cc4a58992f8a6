#![allow(clippy::unwrap_used, clippy::panic)]

use super::*;
use crate::client::Client;
use kso_wire::SocketOptions;
use kso_wire::provide::{Connect, Listen, ListenerId, StreamId, ToBroker};
use rustix::event::{PollFd, PollFlags, poll};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

/// A provider behind a TCP socket: no descriptor can be passed to it.
struct World {
    door: Door,
    listener: TcpListener,
    client: Client,
}

fn world() -> World {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut door = Door::new(Shared::default(), Limits::default()).unwrap();
    let control = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    control.set_nonblocking(true).unwrap();
    let client = Client::new(control.into(), "test", Duration::from_secs(5)).unwrap();
    door.admit(listener.accept().unwrap().0.into());
    let mut world = World { door, listener, client };
    assert!(matches!(world.next(), ToBroker::Welcome(_)));
    world
}

impl World {
    /// Waits for the next thing that the provider says.
    fn next(&mut self) -> ToBroker {
        for _ in 0..100 {
            self.client.flush().unwrap();
            self.door.run_ready();
            if let Some(message) = self.client.receive().unwrap() {
                return message;
            }
            let fds = [self.client.poll_fd(), self.door.poll_fd()];
            let mut polled = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
            poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 100_000_000 })).unwrap();
        }
        panic!("the provider says nothing");
    }

    /// A stream that begins with these bytes.
    fn stream(&mut self, begin: &[u8]) -> TcpStream {
        let mut own = TcpStream::connect(self.listener.local_addr().unwrap()).unwrap();
        own.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        own.write_all(begin).unwrap();
        self.door.admit(self.listener.accept().unwrap().0.into());
        own
    }

    fn ticket(&self, id: u64) -> [u8; Ticket::SIZE] {
        self.client.ticket(StreamId(id)).unwrap().bytes()
    }

    fn connect(&mut self, id: u64, peer: SocketAddr) {
        let options = SocketOptions::default();
        let order = Connect { stream: StreamId(id), peer, family: crate::family_of(peer), port: 0, options };
        self.client.connect(order, None).unwrap();
        self.client.flush().unwrap();
    }
}

fn round_trip(one: &TcpStream, other: &TcpStream) {
    for (mut from, mut to) in [(one, other), (other, one)] {
        from.write_all(b"bytes").unwrap();
        let mut read = [0; 5];
        to.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"bytes");
    }
}

#[test]
fn a_stream_comes_after_its_message_or_before_it_or_in_pieces() {
    let mut world = world();
    let outside = TcpListener::bind("127.0.0.1:0").unwrap();
    let peer = outside.local_addr().unwrap();
    let mut own = Vec::new();
    for id in 1..4 {
        let ticket = world.ticket(id);
        match id {
            1 => {
                world.connect(id, peer);
                own.push(world.stream(&ticket));
            }
            2 => {
                own.push(world.stream(&ticket));
                world.connect(id, peer);
            }
            _ => {
                // What follows the ticket is the stream's.
                let (first, rest) = ticket.split_at(3);
                let mut stream = world.stream(first);
                world.connect(id, peer);
                for byte in rest {
                    world.door.run_ready();
                    stream.write_all(&[*byte]).unwrap();
                }
                own.push(stream);
            }
        }
        match world.next() {
            ToBroker::Connected { stream, .. } => assert_eq!(stream, StreamId(id)),
            other => panic!("{other:?}"),
        }
        let (far, _) = outside.accept().unwrap();
        round_trip(own.last().unwrap(), &far);
    }
}

#[test]
fn offers_that_broke_are_given_back() {
    let mut world = world();
    let listener = ListenerId(1);
    let address = "127.0.0.1:0".parse().unwrap();
    world
        .client
        .listen(Listen { listener, address, backlog: 16, options: SocketOptions::default() })
        .unwrap();
    let ToBroker::Listening { local, .. } = world.next() else { panic!() };
    let mut own = Vec::new();
    for id in [1, 2] {
        let ticket = world.ticket(id);
        own.push(world.stream(&ticket));
        world.client.offer(listener, StreamId(id), None).unwrap();
    }
    let broken = own.remove(0);
    crate::relay::reset(broken.into());
    let far = TcpStream::connect(local).unwrap();
    far.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    match world.next() {
        ToBroker::Failed { stream: StreamId(1), .. } => {}
        other => panic!("{other:?}"),
    }
    assert!(matches!(world.next(), ToBroker::Accepted { stream: StreamId(2), .. }));
    round_trip(own.first().unwrap(), &far);
}

#[test]
fn who_has_no_ticket_of_a_session_is_closed() {
    let mut world = world();
    let mut unknown = Ticket { session: 1, stream: StreamId(1) }.bytes();
    let mut stream = world.stream(&unknown);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    // Not even a ticket, nor anything else: it is told what is wrong.
    unknown.rotate_left(1);
    let mut stream = world.stream(&unknown);
    let mut told = Vec::new();
    stream.read_to_end(&mut told).unwrap();
    assert!(String::from_utf8_lossy(&told).contains("the broker"), "{told:?}");
}

#[test]
fn who_says_nothing_is_bounded() {
    let mut world = world();
    let stream = world.stream(b"");
    assert!(world.door.next_deadline().is_some());
    drop(stream);
    for _ in 0..200 {
        world.door.run_ready();
        if world.door.next_deadline().is_none() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("it is kept");
}
