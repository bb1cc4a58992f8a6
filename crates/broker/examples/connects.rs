//! What a connect costs in the broker, beside what the system calls alone cost.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]
use kso_broker::{Broker, BrokerConfig, Control};
use kso_wire::*;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

const ROUNDS: u32 = 20_000;

fn main() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut broker =
        Broker::new(BrokerConfig { control: Control::Hidden, ..BrokerConfig::default() }).unwrap();
    let hello = Hello {
        version: VERSION,
        name: "x".into(),
        command: "x".into(),
        pid: 0,
        rules: vec![(true, "host".into()), (true, "*.example.org:443".into())],
        no_net: false,
        publish: vec![],
        loopback: LoopbackMode::Private,
        tun: TunAddresses::standard(),
    };
    let session = broker.open_session(&hello).unwrap();
    let caller = Caller { pid: 1, program: "x".into() };
    let peer: SocketAddr = format!("198.18.0.1:{port}").parse().unwrap();
    let direct: SocketAddr = format!("127.0.0.1:{port}").parse().unwrap();
    for round in 0..3 {
        let mut ours = Duration::ZERO;
        let mut bare = Duration::ZERO;
        for n in 0..ROUNDS {
            let request = Request::Connect(Connect {
                peer,
                family: Family::V4,
                local: None,
                options: SocketOptions::default(),
                origin: Origin::Intercepted,
            });
            let at = Instant::now();
            let submitted = broker.handle(session, RequestId::interceptor(n.into()), &caller, request);
            ours += at.elapsed();
            let Submitted::Done(answer) = submitted else { panic!() };
            assert!(answer.result.is_ok());
            let accepted = listener.accept().unwrap();
            socket2::SockRef::from(&accepted.0).set_linger(Some(Duration::ZERO)).unwrap();
            drop(accepted);
            drop(answer);
            let at = Instant::now();
            let socket: OwnedFd = rustix::net::socket_with(
                rustix::net::AddressFamily::INET,
                rustix::net::SocketType::STREAM,
                rustix::net::SocketFlags::CLOEXEC | rustix::net::SocketFlags::NONBLOCK,
                None,
            )
            .unwrap();
            let _ = rustix::net::connect(&socket, &direct);
            bare += at.elapsed();
            let accepted = listener.accept().unwrap();
            socket2::SockRef::from(&accepted.0).set_linger(Some(Duration::ZERO)).unwrap();
            drop(accepted);
            drop(socket);
        }
        println!("round {round}: broker {:?}, socket+connect alone {:?}", ours / ROUNDS, bare / ROUNDS);
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    status.lines().filter(|l| l.starts_with("VmRSS") || l.starts_with("Rss")).for_each(|l| println!("{l}"));
}
