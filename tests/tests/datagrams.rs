//! UDP, echo and names by the TUN; and TCP that is not intercepted.
#![forbid(unsafe_code)]

use kso_tests::{UdpEcho, World, argv, c_program, seconds, sh, wait_until};

#[track_caller]
fn case(name: &str) -> String {
    let world = World::new();
    let _echo = ["10.77.0.2", "10.77.0.3", "10.77.0.4", "[fd77::2]"]
        .map(|address| UdpEcho::start(&world.origin, &format!("{address}:7007")));
    let out = world.same_ok("", argv([c_program("datagrams").as_str(), name]));
    world.nothing_left();
    out.text()
}

macro_rules! cases {
    ($($name:ident: $($text:literal),*;)*) => {$(
        #[test]
        fn $name() {
            let text = case(stringify!($name));
            for expected in [$($text),*] {
                let expected: &str = expected;
                assert!(text.contains(expected), "expected {expected:?} in {text}");
            }
        }
    )*};
}

cases! {
    connected: "5 hello from 10.77.0.2 7007", "6 mapped from ::ffff:10.77.0.2 7007";
    unconnected: "5 three from 10.77.0.4 7007", "the same source for both: 1";
    many: "bad 0";
    refused: "recv(fd, &fd, 0, 0) = ECONNREFUSED", "ECONNREFUSED origin 2 type 3 code 3", "4 next";
    sizes: "65507 1", "0 1", "= EMSGSIZE";
    fragments: "20000 1";
    batches: "received 32 bad 0", "segments 10";
    inside: "= ECONNREFUSED";
    ping_pong: "bad 0";
    packet_info: "control 8";
}

#[test]
fn published_udp_with_the_true_source() {
    let world = World::new();
    let server = c_program("udp_server");
    let flags = "-p 5300:53/udp -p 127.0.0.1:9000:9000/udp -p 10.77.0.1:5301:53/udp -p [fd77::1]:5302:53/udp";
    let mut run = world.start(flags, argv([server.as_str(), "53", "9000"]));
    run.wait_for("ready");
    for (target, expected, own) in [
        // Loopback has no place on a TUN: there the gateway stands for it, with the true port.
        ("127.0.0.1:5300", "port 53: 5 from ::ffff:198.18.0.1", "127.0.0.1:40001"),
        ("[::1]:5300", "port 53: 5 from fd6b:736f::1", "[::1]:40002"),
        ("127.0.0.1:9000", "port 9000: 5 from ::ffff:198.18.0.1", "127.0.0.1:40003"),
    ] {
        let socket = world.host.udp(own);
        socket.send_to(b"hello", target).expect("send");
        let mut buffer = [0; 100];
        let (n, from) =
            socket.recv_from(&mut buffer).unwrap_or_else(|e| panic!("{target}: {e}: {}", run.errors()));
        assert_eq!((&buffer[..n], from.to_string()), (&b"hello"[..], target.to_owned()));
        let port = own.rsplit(':').next().expect("a port");
        run.wait_for(&format!("{expected} {port}"));
    }
    // Many peers at once, from another machine, each answered by the address it asked.
    let sockets: Vec<_> =
        (0..50u16).map(|i| world.origin.udp(&format!("10.77.0.{}:{}", 2 + i % 3, 41000 + i))).collect();
    for (i, socket) in sockets.iter().enumerate() {
        socket.send_to(format!("peer {i}").as_bytes(), "10.77.0.1:5301").expect("send");
    }
    for (i, socket) in sockets.iter().enumerate() {
        let mut buffer = [0; 100];
        let (n, from) = socket.recv_from(&mut buffer).expect("an answer");
        assert_eq!(
            (&buffer[..n], from.to_string().as_str()),
            (format!("peer {i}").as_bytes(), "10.77.0.1:5301")
        );
    }
    run.wait_for("from ::ffff:10.77.0.4 41047");
    let six = world.origin.udp("[fd77::3]:42000");
    six.send_to(&vec![b'x'; 60000], "[fd77::1]:5302").expect("send");
    run.wait_for("port 53: 60000 from fd77::3 42000");
    let mut buffer = vec![0; 65536];
    assert_eq!(six.recv(&mut buffer).expect("an answer"), 60000);
    // Not published on that address: nobody answers.
    let stranger = world.origin.udp("10.77.0.2:0");
    stranger.set_read_timeout(Some(std::time::Duration::from_millis(300))).expect("a limit");
    stranger.send_to(b"x", "10.77.0.1:9000").expect("send");
    assert!(stranger.recv(&mut buffer).is_err());
    run.terminate();
    world.nothing_left();
    assert!(world.host.udp_ports().is_empty(), "{:?}", world.host.udp_ports());
}

#[test]
fn tcp_by_io_uring_goes_by_the_tun() {
    let world = World::new();
    let echo = world.echo(7007);
    let uring = c_program("uring");
    // Without the flag there is no io_uring, as in containers: programs fall back.
    let without = world.kso("", argv([uring.as_str(), "10.77.0.2", "7007"]));
    assert_eq!(without.code(), Some(3), "{}", without.report());
    assert!(without.text().contains("ENOSYS") || without.text().contains("EPERM"), "{}", without.report());
    assert_eq!(echo.accepted(), 0);
    for address in ["10.77.0.2", "fd77::2"] {
        world
            .same_ok("--io-uring", argv([uring.as_str(), address, "7007"]).limit(seconds(30)))
            .shows("echoed 199999")
            .shows("refused ECONNREFUSED");
    }
    // Policy holds there too.
    let before = echo.accepted();
    let denied = world.kso(
        "--io-uring --deny 10.77.0.2:7007",
        argv([uring.as_str(), "10.77.0.2", "7007"]).limit(seconds(30)),
    );
    assert!(!denied.text().contains("connect 0"), "{}", denied.report());
    assert_eq!(echo.accepted(), before, "a denied connection reached the origin");
    world.nothing_left();
}

#[test]
fn ping_v4_v6_and_by_name() {
    let world = World::new();
    for target in ["10.77.0.2", "fd77::2", "origin.test", "-4 origin.test", "-6 origin.test"] {
        // Round trip times differ: only the counts are compared.
        let ping = format!(
            "ping -c 3 -i 0.2 -W 3 {target} | grep -E -o '[0-9]+ packets transmitted, [0-9]+ received'"
        );
        world.same_ok("", sh(ping)).shows("3 packets transmitted, 3 received");
    }
    world.kso("", sh("ping -c 2 -i 0.2 -s 20000 -W 3 10.77.0.2")).ok().shows("20008 bytes from 10.77.0.2");
    world
        .kso("", sh("ping -c 2 -i 0.2 -p abcd -W 3 fd77::2"))
        .ok()
        .shows("64 bytes from fd77::2: icmp_seq=2");
    // The gateway itself answers.
    world.kso("", sh("ping -c 1 -W 3 198.18.0.1")).ok();
    world.kso("", sh("ping -c 1 -W 3 127.0.0.1")).ok();
    // Nobody there: no answer, and an exit status that says so.
    world.kso("", sh("ping -c 1 -W 1 10.77.0.99")).exits(1);
    let denied = world.kso("--deny 10.77.0.2/icmp", sh("ping -c 1 -W 1 10.77.0.2"));
    assert_ne!(denied.code(), Some(0), "{}", denied.report());
    world.nothing_left();
}

#[test]
fn ping_from_the_unprivileged_socket() {
    let world = World::new();
    // A datagram ICMP socket (icmp(7)), which needs no privilege.
    let script = "import socket,struct\n\
        s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM,socket.IPPROTO_ICMP); s.settimeout(5)\n\
        s.sendto(struct.pack('!BBHHH',8,0,0,0,7)+b'payload',('10.77.0.2',0)); d,a=s.recvfrom(100); print(d[0],d[6:8],d[8:],a)\n";
    world
        .kso("", argv(["/usr/bin/python3", "-c", script]))
        .ok()
        .shows("0 b'\\x00\\x07' b'payload' ('10.77.0.2', 0)");
    world.nothing_left();
}

#[test]
fn dig_udp_tcp_and_record_types() {
    let world = World::new();
    for query in [
        "origin.test A",
        "origin.test AAAA",
        "origin.test MX",
        "origin.test TXT",
        "alias.test A",
        "_http._tcp.origin.test SRV",
        "v6.test A",
    ] {
        // Sections beside the answer, times to live and the order are the resolver's own.
        for tcp in ["", "+tcp"] {
            let dig = format!(
                "dig +time=5 +tries=1 {tcp} {query} +noall +answer +nottlid +comments | grep -E -o 'status: [A-Z]*|^[^;].*' | sort"
            );
            world.same_ok("", sh(dig)).shows("NOERROR");
        }
    }
    for tcp in ["", "+tcp"] {
        world
            .same_ok("", sh(format!("dig +time=5 +tries=1 {tcp} nowhere.test | grep -o 'status: [A-Z]*'")))
            .shows("NXDOMAIN");
    }
    // Too long for UDP: the answer comes by TCP, whole.
    world.same_ok("", sh("dig +time=5 +tries=1 +short long.test TXT | sort")).shows("11xxx");
    world
        .kso("", sh("dig +time=5 +tries=1 +notcp +ignore +noedns long.test TXT | grep flags"))
        .ok()
        .shows(" tc");
    // By the gateway's address in either family, and by the C library.
    world
        .kso("", sh("dig +short @198.18.0.1 origin.test; dig +short @fd6b:736f::1 origin.test AAAA"))
        .ok()
        .shows("10.77.0.2")
        .shows("fd77::2");
    world.same_ok("", sh("getent ahosts origin.test | sort"));
    // Names of the host's own file, and of the host itself.
    world
        .kso("", sh("dig +short fromhosts.test; getent hosts host.kso.internal"))
        .ok()
        .shows("10.77.0.2")
        .shows("host.kso.internal");
    // A query to a server outside is a datagram like any other.
    world.kso("", sh("dig +short @10.77.0.2 origin.test")).ok().shows("10.77.0.2");
    world.nothing_left();
}

#[test]
fn unusual_queries_are_answered() {
    let world = World::new();
    let script = r"import socket
s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.settimeout(2)
for junk in [b'', b'x', b'\0'*12, b'\xff'*12, b'\0\1\1\0\0\1\0\0\0\0\0\0'+b'\xc0\x0c'*20, b'\0\2\1\0\xff\xff\xff\xff\xff\xff\xff\xff', bytes(range(256))*8]:
    s.sendto(junk,('198.18.0.1',53))
s.sendto(b'\0\7\1\0\0\1\0\0\0\0\0\0\6origin\4test\0\0\1\0\1',('198.18.0.1',53))
while True:
    d=s.recv(1000)
    if d[:2]==b'\0\7': break
print('answered', d[-4:])
t=socket.create_connection(('198.18.0.1',53)); t.settimeout(3); t.sendall(b'\0\1x'); t.shutdown(1); print(t.recv(100))
t=socket.create_connection(('198.18.0.1',53)); t.settimeout(3); q=b'\0\7\1\0\0\1\0\0\0\0\0\0\6origin\4test\0\0\1\0\1'
t.sendall((len(q).to_bytes(2,'big')+q)*3); n=0
while n<3:
    l=int.from_bytes(t.recv(2,socket.MSG_WAITALL),'big'); t.recv(l,socket.MSG_WAITALL); n+=1
print('pipelined', n)
";
    world
        .kso("", argv(["/usr/bin/python3", "-c", script]))
        .ok()
        .shows("answered b'\\nM\\x00\\x02'")
        .shows("pipelined 3");
    world.nothing_left();
}

#[test]
fn flows_are_forgotten() {
    // Each new source port is a flow: their sockets are bounded and go away with the sandbox.
    let world = World::new();
    let echo = UdpEcho::start(&world.origin, "10.77.0.2:7007");
    let script = "import socket,sys\nok=0\n\
        for i in range(3000):\n    s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.settimeout(2); s.sendto(b'%d'%i,('10.77.0.2',7007)); ok+=s.recv(10)==b'%d'%i; s.close()\n\
        print('answered', ok, flush=True); sys.stdin.read(1)";
    let run = world.start("", argv(["/usr/bin/python3", "-c", script]).limit(seconds(60)));
    wait_until("3000 answers", seconds(60), || run.text().contains("answered") || !run.errors().is_empty());
    assert!(run.text().contains("answered 3000"), "{} {}", run.text(), run.errors());
    assert!(echo.received() >= 3000);
    run.finish(seconds(60)).ok();
    world.nothing_left();
}
