//! The gateway on a real TUN, between network namespaces of the tests' own. Needs root, iproute2 and ping.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, missing_docs)]

mod world;

use kso_gateway::GatewayConfig;
use kso_wire::{Protocol, Publication};
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};
use world::{DENIED, SCARCE, World, run, within};

const PEERS: [(&str, &str); 2] = [("0.0.0.0:0", "10.9.0.2:7"), ("[::]:0", "[fd09::2]:7")];

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index * 7 + index / 251) as u8).collect()
}

#[track_caller]
fn echoed(socket: &UdpSocket, length: usize) {
    let sent = pattern(length);
    socket.send(&sent).unwrap();
    let mut buffer = vec![0; 65_536];
    let got = socket.recv(&mut buffer).unwrap_or_else(|error| panic!("{length} bytes: {error}"));
    assert!(buffer[..got] == sent, "{length} bytes came back as {got}");
}

#[test]
fn datagrams_of_every_size_and_both_families() {
    for late in [false, true] {
        let world = World::with(GatewayConfig::default(), late);
        for (own, peer) in PEERS {
            world.udp_echo(&world.peer, peer);
            let socket = world.udp(&world.guest, own);
            socket.connect(peer).unwrap();
            let longest = if peer.starts_with('[') { 65_527 } else { 65_507 };
            for length in [1, 0, 100, 1472, 1473, 9000, 60_000, 65_480, 65_507, longest] {
                echoed(&socket, length);
            }
        }
        let stats = world.stats();
        assert_eq!((stats.flows, stats.malformed, stats.bad_checksum), (2, 0, 0), "{stats:?}");
    }
}

#[test]
fn another_kernels_packets_come_as_frames() {
    let world = World::framed();
    for (own, peer) in PEERS {
        world.udp_echo(&world.peer, peer);
        let socket = world.udp(&world.guest, own);
        socket.connect(peer).unwrap();
        for length in [1, 0, 1472, 1473, 9000, 65_507] {
            echoed(&socket, length);
        }
        // Many at once: more than one read of the stream gives.
        for _ in 0..60 {
            socket.send(&[7; 1000]).unwrap();
        }
        let mut buffer = [0; 2000];
        let came = (0..60).take_while(|_| socket.recv(&mut buffer).is_ok()).count();
        assert!(came > 50, "{came} of 60");
    }
    let listener = world.listener(&world.peer, "10.9.0.2:8000");
    let mut stream = within(&world.guest, || TcpStream::connect("10.9.0.2:8000").unwrap());
    let (mut accepted, _) = listener.accept().unwrap();
    let sent = pattern(3_000_000);
    let (mut sender, copy) = (stream.try_clone().unwrap(), sent.clone());
    let thread = std::thread::spawn(move || sender.write_all(&copy).unwrap());
    let mut read = vec![0; sent.len()];
    accepted.read_exact(&mut read).unwrap();
    assert!(read == sent);
    thread.join().unwrap();
    accepted.write_all(&sent).unwrap();
    stream.read_exact(&mut read).unwrap();
    assert!(read == sent);
    assert_eq!(
        run(&format!(
            "ip netns exec {} ping -qc 3 -i 0.05 10.9.0.2 | grep -c ' 0% packet loss'",
            world.guest
        ))
        .trim(),
        "1"
    );
    assert_eq!(world.stats().malformed, 0);
}

#[test]
fn fragments_both_ways() {
    let world = World::new();
    run(&format!("ip -n {} link set kso0 mtu 1400", world.guest));
    for (own, peer) in PEERS {
        world.udp_echo(&world.peer, peer);
        let socket = world.udp(&world.guest, own);
        socket.connect(peer).unwrap();
        for length in [1300, 1400, 5000, 65_507] {
            echoed(&socket, length);
        }
    }
}

#[test]
fn many_peers_of_one_socket() {
    let world = World::new();
    let socket = world.udp(&world.guest, "0.0.0.0:5000");
    let servers: Vec<UdpSocket> = (0..40).map(|_| world.udp(&world.peer, "10.9.0.2:0")).collect();
    let mut seen = Vec::new();
    for (index, server) in servers.iter().enumerate() {
        socket.send_to(&[index as u8], server.local_addr().unwrap()).unwrap();
    }
    let mut buffer = [0; 10];
    for (index, server) in servers.iter().enumerate() {
        let (length, from) = server.recv_from(&mut buffer).unwrap();
        assert_eq!(buffer[..length], [index as u8]);
        seen.push(from);
        server.send_to(&[100 + index as u8], from).unwrap();
    }
    seen.dedup();
    assert_eq!(seen.len(), 1, "one port outside: {seen:?}");
    for _ in &servers {
        let (_, from) = socket.recv_from(&mut buffer).unwrap();
        let index = servers.iter().position(|server| server.local_addr().unwrap() == from).unwrap();
        assert_eq!(buffer[0], 100 + index as u8);
    }
    assert_eq!(world.stats().flows, 40);
    // Idle flows are closed.
    assert_eq!(world.expire(Duration::from_secs(200)).flows, 40, "they were answered");
    assert_eq!(world.expire(Duration::from_secs(301)).flows, 0);
}

#[test]
fn flows_are_bounded_and_files_scarce() {
    let config = GatewayConfig { max_flows: 50, ..GatewayConfig::default() };
    let world = World::with(config, false);
    let socket = world.udp(&world.guest, "0.0.0.0:0");
    for port in 10_000..10_500 {
        socket.send_to(b"x", ("10.9.0.2", port)).unwrap();
    }
    std::thread::sleep(Duration::from_millis(300));
    let stats = world.stats();
    assert_eq!((stats.flows, stats.evicted), (50, 450), "{stats:?}");
    world.udp_echo(&world.peer, &format!("10.9.0.2:{SCARCE}"));
    socket.connect(("10.9.0.2", SCARCE)).unwrap();
    echoed(&socket, 10);
    assert!(world.stats().flows < 50);
}

#[test]
fn errors_reach_the_program() {
    let world = World::new();
    let mut buffer = [0; 10];
    for (own, peer, port, expected) in [
        ("0.0.0.0:0", "10.9.0.2", 9, libc_errno::ECONNREFUSED),
        ("[::]:0", "fd09::2", 9, libc_errno::ECONNREFUSED),
        ("0.0.0.0:0", "10.10.0.77", 9, libc_errno::EHOSTUNREACH),
        ("0.0.0.0:0", "10.9.0.2", DENIED, libc_errno::EHOSTUNREACH),
        ("[::]:0", "fd09::2", DENIED, libc_errno::EACCES),
        ("0.0.0.0:0", "198.18.0.1", 9, libc_errno::ECONNREFUSED),
        ("[::]:0", "fd6b:736f::1", 9, libc_errno::ECONNREFUSED),
    ] {
        let socket = world.udp(&world.guest, own);
        socket.connect((peer, port)).unwrap();
        // What is not fatal (icmp_err_convert in net/ipv4/icmp.c) is told to those who ask for it.
        if peer == "10.10.0.77" {
            kso_sys::datagram::prepare(socket.as_fd(), kso_wire::Family::V4, true).unwrap();
        }
        // Twice: the second one meets the error of the first, or a refusal that is remembered.
        for time in 0..2 {
            socket.send(b"hello").unwrap();
            let error = socket.recv(&mut buffer).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(expected), "{peer} {port} {time}: {error}");
        }
    }
}

mod libc_errno {
    pub const EACCES: i32 = 13;
    pub const ECONNREFUSED: i32 = 111;
    pub const EHOSTUNREACH: i32 = 113;
}

#[test]
fn hop_limit_and_traffic_class_are_carried() {
    let world = World::new();
    for (own, far, other) in
        [("0.0.0.0:0", "10.10.0.2:7", "10.10.0.2:8"), ("[::]:0", "[fd10::2]:7", "[fd10::2]:8")]
    {
        world.udp_echo(&world.far, far);
        let socket = world.udp(&world.guest, own);
        let family = if far.starts_with('[') { kso_wire::Family::V6 } else { kso_wire::Family::V4 };
        kso_sys::datagram::prepare(socket.as_fd(), family, true).unwrap();
        socket.connect(far).unwrap();
        echoed(&socket, 10);
        kso_sys::datagram::set_hops(socket.as_fd(), family, 1).unwrap();
        socket.send(b"short-lived").unwrap();
        let error = socket.recv(&mut [0; 10]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc_errno::EHOSTUNREACH));
        let mut buffer = [0; 100];
        let queued = kso_sys::datagram::next_error(socket.as_fd(), &mut buffer).unwrap().unwrap();
        assert_eq!(&buffer[..queued.length], b"short-lived");
        assert_eq!(
            queued.offender,
            Some(if own.starts_with('[') { "fd09::2" } else { "10.9.0.2" }.parse().unwrap())
        );
        kso_sys::datagram::set_hops(socket.as_fd(), family, 64).unwrap();
        echoed(&socket, 11);
        // And the class, each way.
        let server = world.udp(&world.far, other);
        kso_sys::datagram::prepare(server.as_fd(), family, true).unwrap();
        socket.connect(other).unwrap();
        kso_sys::datagram::set_traffic_class(socket.as_fd(), family, 0x28).unwrap();
        socket.send(b"hello").unwrap();
        std::thread::sleep(Duration::from_millis(100));
        let mut batch = kso_sys::datagram::ReceiveBatch::new();
        assert_eq!(batch.receive(server.as_fd(), 4, true).unwrap(), 1);
        let received = *batch.get(0).unwrap().0;
        assert_eq!(received.traffic_class, 0x28);
        kso_sys::datagram::set_traffic_class(server.as_fd(), family, 0x48).unwrap();
        server.send_to(b"back", received.source.unwrap()).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(batch.receive(socket.as_fd(), 4, true).unwrap(), 1);
        assert_eq!(batch.get(0).unwrap().0.traffic_class, 0x48);
    }
}

#[test]
fn the_gateway_stands_for_the_hosts_loopback() {
    let world = World::new();
    for (own, host, gateway) in
        [("0.0.0.0:0", "127.0.0.1:5353", "198.18.0.1:5353"), ("[::]:0", "[::1]:5353", "[fd6b:736f::1]:5353")]
    {
        world.udp_echo(&world.host, host);
        let socket = world.udp(&world.guest, own);
        socket.send_to(b"hello", gateway).unwrap();
        let mut buffer = [0; 10];
        let (length, from) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..length], from), (&b"hello"[..], gateway.parse().unwrap()));
    }
}

#[test]
fn published_ports_show_the_true_source() {
    let publish = |address: Option<&str>, outer_port, inner_port| Publication {
        address: address.map(|address| address.parse().unwrap()),
        outer_port,
        inner_port,
        protocol: Protocol::Udp,
    };
    let config = GatewayConfig {
        publish: vec![
            publish(None, 5300, 53),
            publish(Some("0.0.0.0"), 5301, 0),
            publish(Some("0.0.0.0"), 5302, 54),
        ],
        ..GatewayConfig::default()
    };
    for late in [false, true] {
        let world = World::with(config.clone(), late);
        let servers = [world.udp(&world.guest, "[::]:53"), world.udp(&world.guest, "0.0.0.0:54")];
        let mut buffer = [0; 100];
        for (namespace, own, target, shown, server) in [
            (&world.host, "127.0.0.1:4001", "127.0.0.1:5300", "[::ffff:198.18.0.1]:4001", 0),
            (&world.host, "[::1]:4002", "[::1]:5300", "[fd6b:736f::1]:4002", 0),
            (&world.peer, "10.9.0.2:4003", "10.9.0.1:5302", "10.9.0.2:4003", 1),
            (&world.host, "127.0.0.1:4004", "127.0.0.1:5302", "198.18.0.1:4004", 1),
        ] {
            let client = world.udp(namespace, own);
            // Connected: it takes an answer only from where it sent to.
            client.connect(target).unwrap();
            for round in 0..3 {
                client.send(format!("question {round}").as_bytes()).unwrap();
                let (length, from) = servers[server].recv_from(&mut buffer).unwrap();
                assert_eq!(from, shown.parse::<SocketAddr>().unwrap());
                servers[server].send_to(&buffer[..length], from).unwrap();
                let length = client.recv(&mut buffer).unwrap();
                assert_eq!(&buffer[..length], format!("question {round}").as_bytes());
            }
        }
    }
}

/// As many datagrams as one call can send, by segmentation in the sandbox, and back.
#[test]
fn segmentation_passes_through() {
    let world = World::new();
    for (own, peer) in PEERS {
        let server = world.udp(&world.peer, peer);
        let socket = world.udp(&world.guest, own);
        socket.connect(peer).unwrap();
        // The second does not fit the path outside in segments, and goes in fragments.
        for (unit, count) in [(1200, 40), (5000, 8), (1200, 40)] {
            let sent = pattern(unit * count - 100);
            let message = [kso_sys::datagram::Message { slices: 1, segment: unit as u16 }];
            kso_sys::datagram::send(socket.as_fd(), None, &[IoSlice::new(&sent)], &message).unwrap();
            let mut buffer = vec![0; 65_536];
            let mut back = None;
            for part in sent.chunks(unit) {
                let (length, from) = server.recv_from(&mut buffer).unwrap();
                assert!(buffer[..length] == *part, "{length} for {}", part.len());
                back = Some(from);
            }
            let destination = kso_sys::datagram::Destination { peer: back.unwrap(), local: None };
            if unit < 1400 {
                kso_sys::datagram::send(server.as_fd(), Some(destination), &[IoSlice::new(&sent)], &message)
                    .unwrap();
            } else {
                for part in sent.chunks(unit) {
                    server.send_to(part, back.unwrap()).unwrap();
                }
            }
            for part in sent.chunks(unit) {
                let length = socket.recv(&mut buffer).unwrap();
                assert!(buffer[..length] == *part, "{length} for {}", part.len());
            }
        }
    }
}

#[test]
fn ping() {
    for datagram_sockets in [false, true] {
        let world = World::new();
        if datagram_sockets {
            run(&format!("ip netns exec {} sysctl -qw net.ipv4.ping_group_range='0 0'", world.host));
        }
        let ping = |arguments: &str| run(&format!("ip netns exec {} ping {arguments}", world.guest));
        for target in ["198.18.0.1", "fd6b:736f::1", "10.9.0.2", "fd09::2", "10.10.0.2", "fd10::2"] {
            let said = ping(&format!("-c 3 -i 0.1 -W 2 -s 1000 {target}"));
            assert!(
                said.contains("3 received") && said.contains(&format!("1008 bytes from {target}")),
                "{said}"
            );
        }
        assert!(ping("-c 1 -W 2 -s 60000 10.9.0.2").contains("1 received"));
        for (arguments, expected) in [
            ("-t 1 10.10.0.2", "From 10.9.0.2 icmp_seq=1 Time to live exceeded"),
            ("-t 1 fd10::2", "From fd09::2 icmp_seq=1 Time exceeded: Hop limit"),
            ("10.10.0.77", "From 10.9.0.2 icmp_seq=1 Destination Host Unreachable"),
        ] {
            let said = ping(&format!("-c 1 -W 5 {arguments} || true"));
            assert!(said.contains(expected), "{said}");
        }
    }
}

fn query(name: &str) -> Vec<u8> {
    let mut message = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, name.len() as u8];
    message.extend_from_slice(name.as_bytes());
    message.extend_from_slice(&[0, 0, 1, 0, 1]);
    message
}

#[test]
fn names_by_udp_and_tcp() {
    for late in [false, true] {
        let world = World::with(GatewayConfig::default(), late);
        for (own, gateway) in [("0.0.0.0:0", "198.18.0.1:53"), ("[::]:0", "[fd6b:736f::1]:53")] {
            let socket = world.udp(&world.guest, own);
            let mut buffer = vec![0; 4000];
            socket.connect(gateway).unwrap();
            let short = query("short");
            socket.send(&short).unwrap();
            let length = socket.recv(&mut buffer).unwrap();
            assert_eq!((length, buffer[2], &buffer[12..length]), (short.len(), 0x81, &short[12..]));
            let long = query("Long");
            socket.send(&long).unwrap();
            let length = socket.recv(&mut buffer).unwrap();
            assert_eq!((length, buffer[2]), (long.len(), 0x83), "cut, and says so");

            let mut stream = within(&world.guest, || TcpStream::connect(gateway).unwrap());
            stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            // Several at once, in odd pieces.
            let mut sent = Vec::new();
            for name in ["Long", "short", "Long", "other"].iter().cycle().take(40) {
                let message = query(name);
                sent.extend_from_slice(&(message.len() as u16).to_be_bytes());
                sent.extend_from_slice(&message);
            }
            for part in sent.chunks(13) {
                stream.write_all(part).unwrap();
            }
            for expected in [2000, short.len(), 2000, short.len()].iter().cycle().take(40) {
                let mut length = [0; 2];
                stream.read_exact(&mut length).unwrap();
                assert_eq!(usize::from(u16::from_be_bytes(length)), *expected);
                stream.read_exact(&mut buffer[..*expected]).unwrap();
            }
            stream.shutdown(Shutdown::Write).unwrap();
            assert_eq!(stream.read(&mut buffer).unwrap(), 0, "an end");
        }
        no_streams(&world);
    }
}

fn connect(world: &World, peer: &str) -> std::io::Result<TcpStream> {
    let stream = within(&world.guest, || TcpStream::connect(peer))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    Ok(stream)
}

/// The last acknowledgement may still be on its way.
#[track_caller]
fn no_streams(world: &World) {
    let start = Instant::now();
    while world.stats().streams > 0 {
        assert!(start.elapsed() < Duration::from_secs(2), "{:?}", world.stats());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn streams_carry_everything_and_close_each_way() {
    for (late, mtu) in [(false, 65_535), (true, 1400)] {
        let world = World::with(GatewayConfig::default(), late);
        run(&format!("ip -n {} link set kso0 mtu {mtu}", world.guest));
        for peer in ["10.9.0.2:80", "[fd09::2]:80"] {
            let listener = world.listener(&world.peer, peer);
            let mut client = connect(&world, peer).unwrap();
            let (mut server, _) = listener.accept().unwrap();
            assert_eq!(client.peer_addr().unwrap(), peer.parse().unwrap());
            let bytes = pattern(20 << 20);
            let copy = bytes.clone();
            // The client sends all and ends; the server reads to the end, then sends all back and ends.
            let sender = std::thread::spawn(move || {
                let mut client_write = client.try_clone().unwrap();
                client_write.write_all(&copy).unwrap();
                client_write.shutdown(Shutdown::Write).unwrap();
                let mut got = Vec::new();
                client.read_to_end(&mut got).unwrap();
                got
            });
            let mut got = Vec::new();
            server.read_to_end(&mut got).unwrap();
            assert!(got == bytes, "{} of {}", got.len(), bytes.len());
            server.write_all(&bytes).unwrap();
            let before = Instant::now();
            drop(server);
            let got = sender.join().unwrap();
            assert!(got == bytes, "{} of {}", got.len(), bytes.len());
            assert!(before.elapsed() < Duration::from_secs(5));
            // The server ends first.
            let mut client = connect(&world, peer).unwrap();
            let (mut server, _) = listener.accept().unwrap();
            server.write_all(b"bye").unwrap();
            server.shutdown(Shutdown::Write).unwrap();
            let mut text = String::new();
            client.read_to_string(&mut text).unwrap();
            assert_eq!(text, "bye");
            client.write_all(b"and you").unwrap();
            drop(client);
            text.clear();
            server.read_to_string(&mut text).unwrap();
            assert_eq!(text, "and you");
        }
        no_streams(&world);
    }
}

#[test]
fn streams_fail_as_outside() {
    let world = World::new();
    for peer in ["10.9.0.2:81", "[fd09::2]:81", "198.18.0.1:81"] {
        assert_eq!(connect(&world, peer).unwrap_err().kind(), ErrorKind::ConnectionRefused, "{peer}");
    }
    let before = Instant::now();
    let error = connect(&world, &format!("10.9.0.2:{DENIED}")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc_errno::EHOSTUNREACH));
    let error = connect(&world, &format!("[fd09::2]:{DENIED}")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc_errno::EACCES));
    assert!(before.elapsed() < Duration::from_millis(500));
    let error = connect(&world, "10.10.0.77:80").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc_errno::EHOSTUNREACH));
    // A reset, each way.
    let listener = world.listener(&world.peer, "10.9.0.2:80");
    for from_outside in [true, false] {
        let client = connect(&world, "10.9.0.2:80").unwrap();
        let (server, _) = listener.accept().unwrap();
        let (gone, mut left) = if from_outside { (server, client) } else { (client, server) };
        socket2::SockRef::from(&gone).set_linger(Some(Duration::ZERO)).unwrap();
        drop(gone);
        left.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        assert_eq!(left.read(&mut [0; 10]).unwrap_err().kind(), ErrorKind::ConnectionReset, "{from_outside}");
    }
    no_streams(&world);
}

#[test]
fn a_slow_reader_holds_up_the_sender_alone() {
    let world = World::new();
    let listener = world.listener(&world.peer, "10.9.0.2:80");
    let slow = connect(&world, "10.9.0.2:80").unwrap();
    let (_server, _) = listener.accept().unwrap();
    slow.set_nonblocking(true).unwrap();
    let mut filled = 0;
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(500) {
        match (&slow).write(&[1; 65_536]) {
            Ok(written) => filled += written,
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    assert!(filled < 64 << 20, "somebody holds {filled} bytes");
    let mut quick = connect(&world, "10.9.0.2:80").unwrap();
    let (mut server, _) = listener.accept().unwrap();
    quick.write_all(b"hello").unwrap();
    let mut buffer = [0; 5];
    server.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"hello");
}

#[test]
fn many_streams_leave_nothing() {
    let world = World::new();
    let listener = world.listener(&world.peer, "10.9.0.2:80");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut buffer = [0; 100];
            let length = stream.read(&mut buffer).unwrap();
            stream.write_all(&buffer[..length]).unwrap();
        }
    });
    for round in 0..300 {
        let mut stream = connect(&world, "10.9.0.2:80").unwrap();
        stream.write_all(b"ping").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert_eq!(text, "ping", "{round}");
    }
    no_streams(&world);
}

#[test]
fn noise_is_counted_and_dropped() {
    let world = World::new();
    let socket = world.udp(&world.guest, "0.0.0.0:0");
    socket.set_broadcast(true).unwrap();
    run(&format!(
        "ip -n {0} route add 224.0.0.0/4 dev kso0; ip -n {0} addr add 198.18.0.7/32 dev kso0",
        world.guest
    ));
    socket.send_to(b"x", "255.255.255.255:9").unwrap();
    socket.send_to(b"x", "224.0.0.251:9").unwrap();
    let other = world.udp(&world.guest, "198.18.0.7:0");
    other.send_to(b"x", "10.9.0.2:9").unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let stats = world.stats();
    assert_eq!((stats.not_unicast, stats.spoofed, stats.flows), (2, 1, 0), "{stats:?}");
    assert_eq!(stats.datagrams_sent, 0);
}

fn sum16(parts: &[&[u8]]) -> [u8; 2] {
    let mut sum: u32 = 0;
    for pair in parts.iter().flat_map(|part| part.chunks(2)) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// Segments that no TCP would send, with checksums that hold, into connections that are being made, open and ended.
#[test]
fn hostile_segments_harm_nobody() {
    let world = World::new();
    let listener = world.listener(&world.peer, "10.9.0.2:80");
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut stream = stream;
                let mut buffer = [0; 1000];
                while let Ok(length @ 1..) = stream.read(&mut buffer) {
                    if stream.write_all(&buffer[..length]).is_err() {
                        break;
                    }
                }
            });
        }
    });
    // The sandbox's own kernel would reset what it knows nothing of.
    run(&format!("ip netns exec {} sysctl -qw net.ipv4.conf.all.forwarding=0", world.guest));
    run(&format!("ip -n {} route add blackhole 198.18.0.2 table local || true", world.guest));
    let raw = within(&world.guest, || {
        socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::RAW, Some(socket2::Protocol::from(255)))
            .unwrap()
    });
    let target: socket2::SockAddr = "10.9.0.2:0".parse::<SocketAddr>().unwrap().into();
    let mut random: u64 = 0x2545_f491_4f6c_dd1d;
    let mut next = move |limit: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random >> 11) % limit
    };
    for _ in 0..30_000 {
        let options = next(11) as usize * 4;
        let length = 20 + options + next(200) as usize;
        let mut segment = vec![0_u8; length];
        segment.iter_mut().for_each(|byte| *byte = next(256) as u8);
        segment[..2].copy_from_slice(&(4000 + next(8) as u16).to_be_bytes());
        segment[2..4].copy_from_slice(&if next(10) == 0 { 53_u16 } else { 80 }.to_be_bytes());
        // Numbers close to each other, so that some fall within windows.
        segment[4..8].copy_from_slice(&(next(2000) as u32).to_be_bytes());
        segment[12] = (((20 + options) / 4) as u8) << 4;
        segment[13] = if next(3) == 0 { 2 } else { next(64) as u8 };
        segment[16..18].fill(0);
        let (own, other) = ([198, 18, 0, 2], [10, 9, 0, 2]);
        let sum = sum16(&[&own, &other, &[0, 6], &(length as u16).to_be_bytes(), &segment]);
        segment[16..18].copy_from_slice(&sum);
        let mut packet = vec![0x45, 0];
        packet.extend_from_slice(&(20 + length as u16).to_be_bytes());
        packet.extend_from_slice(&[0, 0, 0, 0, 64, 6, 0, 0]);
        packet.extend_from_slice(&own);
        packet.extend_from_slice(&other);
        let sum = sum16(&[&packet]);
        packet[10..12].copy_from_slice(&sum);
        packet.extend_from_slice(&segment);
        let _ = raw.send_to(&packet, &target);
    }
    run(&format!("ip -n {} route del blackhole 198.18.0.2 table local || true", world.guest));
    let mut stream = connect(&world, "10.9.0.2:80").unwrap();
    stream.write_all(b"still there").unwrap();
    let mut buffer = [0; 11];
    stream.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"still there");
    let stats = world.stats();
    assert!(stats.packets_in > 10_000 && stats.streams <= 10, "{stats:?}");
}
