//! A session to ask, and a name server to be asked.
#![allow(dead_code, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use hickory_proto::op::{Message, OpCode, Query};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use kso_broker::{Broker, BrokerConfig, Control, SessionId};
use kso_wire::{
    Answer, Caller, Connect, Family, Hello, Listen, LoopbackMode, Origin, Reply, Request, RequestId,
    SocketOptions, Submitted, TunAddresses, VERSION,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsFd;
use std::sync::mpsc;
use std::time::{Duration, Instant};

pub fn hello() -> Hello {
    Hello {
        version: VERSION,
        name: "test".into(),
        command: "test --it".into(),
        pid: std::process::id(),
        rules: Vec::new(),
        no_net: false,
        publish: Vec::new(),
        loopback: LoopbackMode::Private,
        tun: TunAddresses::standard(),
    }
}

pub fn allow(rules: &[&str]) -> Hello {
    Hello { rules: rules.iter().map(|rule| (true, (*rule).to_owned())).collect(), ..hello() }
}

pub fn publish(ports: &[String]) -> Hello {
    let publish = ports.iter().map(|port| kso_core::publish::parse(port).unwrap()).collect();
    Hello { publish, ..hello() }
}

pub fn config() -> BrokerConfig {
    BrokerConfig { control: Control::Hidden, hosts: "/nonexistent".into(), ..BrokerConfig::default() }
}

/// A port that is free now.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

pub struct Client {
    pub broker: Broker,
    pub session: SessionId,
    next: u64,
}

impl Client {
    pub fn new(config: BrokerConfig, hello: &Hello) -> Self {
        let mut broker = Broker::new(config).unwrap();
        let session = broker.open_session(hello).unwrap();
        Self { broker, session, next: 0 }
    }

    pub fn ask(&mut self, request: Request) -> Answer {
        self.next += 1;
        let id = RequestId::interceptor(self.next);
        let caller = Caller { pid: std::process::id(), program: "prog".into() };
        match self.broker.handle(self.session, id, &caller, request) {
            Submitted::Done(answer) => answer,
            Submitted::Pending => self.wait(id),
        }
    }

    fn wait(&mut self, id: RequestId) -> Answer {
        let end = Instant::now() + Duration::from_secs(20);
        while Instant::now() < end {
            self.turn(Duration::from_millis(200));
            while let Some((_, found, answer)) = self.broker.completed() {
                if found == id {
                    return answer;
                }
            }
        }
        panic!("no answer");
    }

    /// One turn of the loop.
    pub fn turn(&mut self, most: Duration) {
        let until = self.broker.next_deadline().map(|at| at.saturating_duration_since(Instant::now()));
        let wait = until.unwrap_or(most).min(most);
        let mut polled = [PollFd::from_borrowed_fd(self.broker.poll_fd(), PollFlags::IN)];
        poll(&mut polled, Some(&Timespec::try_from(wait).unwrap())).unwrap();
        self.broker.run_ready();
    }

    pub fn connect(&mut self, peer: &str) -> Answer {
        self.connect_from(peer, None)
    }

    pub fn connect_from(&mut self, peer: &str, local: Option<SocketAddr>) -> Answer {
        let peer: SocketAddr = peer.parse().unwrap();
        let family = if peer.is_ipv4() { Family::V4 } else { Family::V6 };
        let options = SocketOptions::default();
        self.ask(Request::Connect(Connect { peer, family, local, options, origin: Origin::Intercepted }))
    }

    pub fn listen(&mut self, local: &str, backlog: Option<i32>) -> Answer {
        let local: SocketAddr = local.parse().unwrap();
        let family = if local.is_ipv4() { Family::V4 } else { Family::V6 };
        self.ask(Request::Listen(Listen { local, family, backlog, options: SocketOptions::default() }))
    }

    pub fn resolve(&mut self, name: &str, record: RecordType) -> Message {
        let answer = self.resolve_raw(query(name, record).to_vec().unwrap());
        Message::from_vec(&answer).unwrap()
    }

    pub fn resolve_raw(&mut self, query: Vec<u8>) -> Vec<u8> {
        match self.ask(Request::Resolve(query)).result {
            Ok(Reply::Resolved(answer)) => answer,
            other => panic!("{other:?}"),
        }
    }
}

/// Whether the other end of the connection in `answer` is the program that accepts at `listener`.
pub fn reaches(answer: Answer, listener: &TcpListener) -> bool {
    let Some(socket) = answer.descriptor else { return false };
    let mut stream = std::net::TcpStream::from(socket);
    stream.set_nonblocking(false).unwrap();
    let (mut accepted, _) = listener.accept().unwrap();
    accepted.write_all(b"here").unwrap();
    let mut read = [0; 4];
    stream.read_exact(&mut read).unwrap();
    &read == b"here"
}

pub fn query(name: &str, record: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), record));
    message
}

pub fn response(query: &Message, records: &[(&str, RData)]) -> Message {
    let mut message = Message::response(query.metadata.id, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.metadata.recursion_available = true;
    message.queries.clone_from(&query.queries);
    for (name, data) in records {
        message.add_answer(Record::from_rdata(Name::from_ascii(name).unwrap(), 60, data.clone()));
    }
    message
}

/// A name server on loopback. `answer`: what is sent for a query, `true` if it came by TCP.
pub struct NameServer {
    pub address: SocketAddr,
    asked: mpsc::Receiver<bool>,
}

impl NameServer {
    pub fn start(answer: impl Fn(&Message, bool) -> Vec<Vec<u8>> + Send + Clone + 'static) -> Self {
        let (udp, tcp) = loop {
            let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
            if let Ok(tcp) = TcpListener::bind(udp.local_addr().unwrap()) {
                break (udp, tcp);
            }
        };
        let address = udp.local_addr().unwrap();
        let (tell, asked) = mpsc::channel();
        let (tell_tcp, answer_tcp) = (tell.clone(), answer.clone());
        std::thread::spawn(move || {
            let mut buffer = [0; 65_536];
            while let Ok((length, from)) = udp.recv_from(&mut buffer) {
                let _ = tell.send(false);
                for message in answer(&Message::from_vec(&buffer[..length]).unwrap(), false) {
                    let _ = udp.send_to(&message, from);
                }
            }
        });
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = tcp.accept() {
                let _ = tell_tcp.send(true);
                let mut length = [0; 2];
                if stream.read_exact(&mut length).is_err() {
                    continue;
                }
                let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
                stream.read_exact(&mut message).unwrap();
                for message in answer_tcp(&Message::from_vec(&message).unwrap(), true) {
                    let length = u16::try_from(message.len()).unwrap().to_be_bytes();
                    // In two pieces, as it may come.
                    stream.write_all(&length).unwrap();
                    std::thread::sleep(Duration::from_millis(5));
                    stream.write_all(&message).unwrap();
                }
            }
        });
        Self { address, asked }
    }

    /// How often it was asked since, by UDP and by TCP.
    pub fn asked(&self) -> (usize, usize) {
        let all: Vec<bool> = self.asked.try_iter().collect();
        let tcp = all.iter().filter(|tcp| **tcp).count();
        (all.len() - tcp, tcp)
    }
}

pub fn config_with(servers: &[&NameServer]) -> BrokerConfig {
    let servers = servers.iter().map(|server| server.address).collect();
    BrokerConfig { name_servers: Some(servers), ..config() }
}

/// Waits until something is readable.
pub fn readable(descriptor: impl AsFd) -> bool {
    let mut polled = [PollFd::new(&descriptor, PollFlags::IN)];
    poll(&mut polled, Some(&Timespec { tv_sec: 5, tv_nsec: 0 })).unwrap() == 1
}
