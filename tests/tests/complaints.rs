//! What users of kindred systems complain of, numbered as in the project's list of peers: each is a test of ours.
#![forbid(unsafe_code)]

use kso_tests::{Resources, World, argv, c_program, seconds, sh, wait_until};
use std::io::{Read, Write};
use std::time::{Duration, Instant};

fn complaints(case: &str) -> kso_tests::Cmd {
    argv([c_program("complaints").as_str(), case])
}

/// accept() blocked in one thread hangs getsockname() in another; any blocking call holds the socket.
#[test]
fn complaint_01_a_blocked_accept_holds_nothing_up() {
    let world = World::new();
    let _echo = world.echo(7007);
    for (flags, port) in [("-p 8080:80", Some(8080)), ("", None)] {
        let mut run = world.start(flags, complaints("blocked_accept"));
        run.wait_for("ready");
        assert!(run.text().starts_with("0.0.0.0 80\naccepts 1\n"), "{}", run.text());
        assert!(run.text().contains("meanwhile\n0.0.0.0 80\nin time 1"), "{}", run.text());
        if let Some(port) = port {
            world.host.connect(&format!("127.0.0.1:{port}")).expect("published");
            run.finish(seconds(10)).ok().shows("accepted");
        }
    }
}

/// A non-blocking accept4 blocks; a server wedges.
#[test]
fn complaint_02_a_non_blocking_accept_does_not_block() {
    let world = World::new();
    let mut run = world.start("-p 8080:80 -p 8081:81", complaints("nonblocking_accept"));
    run.wait_for("ready");
    let stream = world.host.connect("127.0.0.1:8080").expect("published");
    let out = run.finish(seconds(10)).ok();
    assert!(!out.text().contains("did not say"), "{}", out.report());
    out.shows("in time 1")
        .shows("flags 800 1, peer 1")
        .shows("own 127.0.0.1 80")
        .shows("accept4(fd, 0, 0, 0) = EAGAIN")
        .shows("read(got, &c, 1) = EAGAIN");
    drop(stream);
}

/// bind(0): the port that the program sees is not the port outside.
#[test]
fn complaint_03_bind_zero_and_publish_agree() {
    let world = World::new();
    let mut run = world.start("-p all", complaints("bind_zero"));
    run.wait_for("ready");
    assert!(run.text().contains("agree 1"), "{}", run.text());
    let text = run.text();
    let ports: Vec<&str> =
        text.lines().find_map(|l| l.strip_prefix("ports ")).expect("ports").split(' ').collect();
    for port in &ports {
        let mut stream =
            world.host.connect(&format!("127.0.0.1:{port}")).unwrap_or_else(|e| panic!("{port}: {e} {text}"));
        let mut hello = String::new();
        stream.read_to_string(&mut hello).expect("a greeting");
        assert_eq!(hello, "hello");
    }
    let out = run.finish(seconds(10)).ok();
    assert_eq!(out.text().matches("accepted on 1").count(), 3, "{}", out.report());
}

/// Two guests silently share one host port; unpublished listeners appear on the host's wildcard address.
#[test]
fn complaint_04_a_port_is_published_once_and_only_what_is_published() {
    let world = World::new();
    let server = "import socket,sys\n\
        a=socket.create_server(('',80)); b=socket.create_server(('',81)); c=socket.create_server(('127.0.0.1',82)); print('ready', flush=True); sys.stdin.read(1)";
    let mut first = world.start("-p 8080:80", argv(["/usr/bin/python3", "-c", server]).hold());
    first.wait_for("ready");
    let outside: Vec<_> = world.host.listeners();
    assert!(outside.iter().all(|(_, port)| *port == 8080) && !outside.is_empty(), "{outside:?}");
    assert!(
        outside.iter().all(|(address, _)| !address.chars().all(|c| c == '0')),
        "loopback only: {outside:?}"
    );
    // The second is told at once, by name of the port.
    let second = world.kso("-p 8080:80", argv(["/usr/bin/python3", "-c", server]));
    assert!(second.code() != Some(0) && second.errors().contains("8080"), "{}", second.report());
    // A native owner of the port too.
    let taken = world.host.listen("127.0.0.1:8090");
    let third = world.kso("-p 8090:80", sh("true"));
    assert!(third.code() != Some(0) && third.errors().contains("8090"), "{}", third.report());
    drop(taken);
    // One port inside is published once: what could not be served is refused, not forgotten.
    let fourth = world.kso("-p 8092:80 -p 8093:80", sh("true"));
    assert!(fourth.code() != Some(0) && fourth.errors().contains("80"), "{}", fourth.report());
    // Inside one sandbox the second bind says EADDRINUSE, as ever.
    let twice = "import socket\na=socket.create_server(('',80))\ntry: socket.create_server(('',80))\nexcept OSError as e: print(e.errno)";
    world.kso("-p 8091:80", argv(["/usr/bin/python3", "-c", twice])).ok().shows("98");
    assert!(
        world.at_origin(sh("curl -sS -m 2 http://10.77.0.1:8080/")).run().code() == Some(7),
        "not for other machines"
    );
    drop(first);
}

/// Traffic inside the guest goes through the host.
#[test]
fn complaint_05_inside_traffic_stays_inside() {
    let world = World::new();
    let script = "import socket,threading,os\n\
        s=socket.create_server(('127.0.0.1',0)); c=socket.create_connection(s.getsockname()); a,_=s.accept()\n\
        threading.Thread(target=lambda: [c.sendall(b'x'*65536) for i in range(400)]).start()\n\
        n=0\nwhile n<400*65536: n+=len(a.recv(1<<20))\n\
        u=socket.socket(socket.AF_UNIX); u.bind('\\0inside'); u.listen(); v=socket.socket(socket.AF_UNIX); v.connect('\\0inside')\n\
        d=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); d.bind(('127.0.0.1',0)); d.sendto(b'x',d.getsockname()); d.recv(9)\nprint('done', n)\n";
    let counters = || {
        let out = sh(format!("ip netns exec {} nstat -asz", world.host.name())).run().text();
        ["TcpActiveOpens", "TcpPassiveOpens", "TcpInSegs", "UdpInDatagrams"].map(|name| {
            out.lines()
                .find_map(|l| l.strip_prefix(name)?.split_whitespace().next()?.parse::<u64>().ok())
                .unwrap_or(0)
        })
    };
    let before = counters();
    world.kso("--trace", argv(["/usr/bin/python3", "-c", script])).ok().shows("done 26214400");
    assert_eq!(before, counters(), "the host saw segments of inside traffic");
    // And abstract AF_UNIX names are not the host's.
    let listener = world.host.enter(|| {
        use std::os::linux::net::SocketAddrExt;
        let address = std::os::unix::net::SocketAddr::from_abstract_name("hosts-own").expect("a name");
        std::os::unix::net::UnixListener::bind_addr(&address).expect("bind")
    });
    let reach = "import socket; u=socket.socket(socket.AF_UNIX); print(u.connect_ex('\\0hosts-own'))";
    world.kso("", argv(["/usr/bin/python3", "-c", reach])).ok().shows("111");
    drop(listener);
}

/// get/setsockopt crash the guest.
#[test]
fn complaint_06_every_socket_option() {
    let world = World::new();
    let _echo = world.echo(7007);
    let native = world.native(complaints("all_options")).ok().text();
    let kso = world.kso("-p 8080:80", complaints("all_options")).ok().text();
    let differences: Vec<(&str, &str)> = native.lines().zip(kso.lines()).filter(|(a, b)| a != b).collect();
    // SO_GET_FILTER (26) shows the length of the filter that locks a socket; SO_LOCK_FILTER too is there. And the
    // host's namespace gives the sandbox's root no capabilities: netfilter's options say EPERM instead of their own error.
    let explained = |native: &str, kso: &str| {
        [" 1 26: ", " 1 44: "].iter().any(|part| native.contains(part))
            || (!native.ends_with(": 0") && kso.ends_with(": EPERM"))
    };
    let unexplained: Vec<_> =
        differences.into_iter().filter(|(native, kso)| !explained(native, kso)).collect();
    assert!(unexplained.is_empty(), "{unexplained:?}");
    assert!(kso.contains("still 10.77.0.2 7007"));
}

/// DNS at 127.0.0.53 works with sendto and fails with connect and send; connected UDP stays inside.
#[test]
fn complaint_07_names_by_every_kind_of_datagram() {
    let world = World::new();
    // The host's resolver is on its loopback, as systemd-resolved is.
    let conf = world.file(
        "stub.conf",
        "no-resolv\nno-hosts\nport=53\nlisten-address=127.0.0.53\nbind-interfaces\nuser=root\npid-file=\nserver=10.77.0.2\n",
    );
    let mut stub =
        world.at_host(argv(["dnsmasq", "--keep-in-foreground", &format!("--conf-file={conf}")])).spawn();
    wait_until("the stub resolver", seconds(10), || world.host.udp_ports().contains(&53));
    std::fs::write(format!("/etc/netns/{}/resolv.conf", world.host.name()), "nameserver 127.0.0.53\n")
        .expect("resolv.conf");
    world.http();
    let script = r"import socket
servers=[l.split()[1] for l in open('/etc/resolv.conf') if l.startswith('nameserver')]
q=b'\0\7\1\0\0\1\0\0\0\0\0\0\6origin\4test\0\0\1\0\1'
for server in servers:
    a=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); a.settimeout(5); a.sendto(q,(server,53)); print('sendto', a.recvfrom(500)[0][-4:])
    b=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); b.settimeout(5); b.connect((server,53)); b.send(q); print('connect', b.recv(500)[-4:])
    t=socket.create_connection((server,53)); t.sendall(len(q).to_bytes(2,'big')+q); print('tcp', t.recv(500)[-4:])
print(socket.gethostbyname('origin.test'))
";
    let out = world.kso("", argv(["/usr/bin/python3", "-c", script])).ok();
    for part in
        ["sendto b'\\nM\\x00\\x02'", "connect b'\\nM\\x00\\x02'", "tcp b'\\nM\\x00\\x02'", "10.77.0.2"]
    {
        assert!(out.text().contains(part), "{part}: {}", out.report());
    }
    world.kso("", sh("curl -sS http://origin.test/hello; node -e \"require('dns').lookup('origin.test',e=>console.log(e))\"")).ok().shows("hello").shows("null");
    assert!(stub.running());
    drop(stub);
}

/// EOF on a published port takes seconds; loopback to a published port is refused.
#[test]
fn complaint_08_published_ports_are_quick_and_answer_inside_too() {
    let world = World::new();
    let server = "import socket\ns=socket.create_server(('',80)); print('ready', flush=True)\n\
        while True:\n    c,_=s.accept(); d=c.recv(100); c.sendall(d.upper()); c.close()\n    \
        if d==b'quit': break\n";
    let mut run = world.start("-p 8080:80", argv(["/usr/bin/python3", "-c", server]));
    run.wait_for("ready");
    for _ in 0..20 {
        let start = Instant::now();
        let mut stream = world.host.connect("127.0.0.1:8080").expect("published");
        stream.write_all(b"hello").expect("write");
        let mut all = String::new();
        stream.read_to_string(&mut all).expect("EOF");
        assert_eq!(all, "HELLO");
        assert!(start.elapsed() < Duration::from_millis(500), "{:?}", start.elapsed());
    }
    drop(run);
    // From inside: by 127.0.0.1 and ::1, by the address of the sandbox, at the inner port.
    let inside = "import socket,threading\n\
        s=socket.create_server(('::',80),family=socket.AF_INET6,dualstack_ipv6=True)\n\
        def serve():\n    while True:\n        c,_=s.accept(); c.sendall(b'inside'); c.close()\n\
        threading.Thread(target=serve,daemon=True).start()\n\
        for a in ('127.0.0.1','::1','198.18.0.2','localhost'):\n    c=socket.create_connection((a,80),timeout=5); print(a, c.recv(100), c.recv(1))\n";
    let out = world.kso("-p 8080:80", argv(["/usr/bin/python3", "-c", inside])).ok();
    assert_eq!(out.text().matches("b'inside' b''").count(), 4, "{}", out.report());
}

/// A stream stops at about 240 KB.
#[test]
fn complaint_09_a_stream_does_not_stop() {
    let world = World::new();
    let _echo = world.echo(7007);
    world.kso("", complaints("long_stream")).ok().shows("echoed 104857600 bad 0");
    // And by a published port, out of the sandbox.
    let server = "import socket\ns=socket.create_server(('',80)); print('ready', flush=True)\nc,_=s.accept()\nfor i in range(1600): c.sendall(b'z'*65536)\nc.close()";
    let mut run = world.start("-p 8080:80", argv(["/usr/bin/python3", "-c", server]));
    run.wait_for("ready");
    let mut stream = world.host.connect("127.0.0.1:8080").expect("published");
    let mut all = Vec::new();
    stream.read_to_end(&mut all).expect("all of it");
    assert_eq!(all.len(), 104_857_600);
}

/// Many short connections slow down over time; threads pile up.
#[test]
fn complaint_10_short_connections_do_not_slow_down() {
    let world = World::new();
    let mut server = world.at_origin(argv([c_program("acceptor").as_str(), "7008"])).spawn();
    server.wait_for("ready");
    let mut run = world.start("", argv([c_program("storm").as_str(), "short", "10000"]).hold());
    wait_until("a first tenth", seconds(60), || run.text().contains("rate"));
    let early = Resources::of(run.pid());
    wait_until("the last", seconds(90), || run.text().contains("bad "));
    let may = |late: &Resources| late.threads <= early.threads && late.descriptors <= early.descriptors + 3;
    let late = Resources::settled(run.pid(), may);
    assert!(may(&late), "{early:?} {late:?}");
    run.release();
    let out = run.finish(seconds(90)).ok();
    let rates: Vec<f64> = out.text().lines().filter_map(|l| l.strip_prefix("rate ")?.parse().ok()).collect();
    let best = |range: &[f64]| range.iter().copied().fold(0.0, f64::max);
    // The machine is noisy: only a collapse is a failure here, `make bench` measures.
    assert!(best(&rates[7..]) > best(&rates[..3]) * 0.4, "{rates:?}");
}

/// uid mapping and rootless unpack fail. (Escapes from a shared folder have no place here: `kso run` shares none.)
#[test]
fn complaint_11_owners_of_files_are_as_outside() {
    let world = World::new();
    let directory = world.path("owners");
    let script = format!(
        "set -e; rm -rf {directory}; mkdir {directory}; cd {directory}; echo x > a; chown 33:44 a; chmod 4755 a; tar cf t.tar a; mkdir out; \
         tar xpf t.tar -C out --same-owner --numeric-owner; stat -c '%u %g %a' out/a; id -u; cat /proc/self/uid_map | wc -l"
    );
    world.same_ok("", sh(script)).shows("33 44 4755");
    // Servers that give up root.
    world
        .same_ok("", sh("setpriv --reuid=33 --regid=33 --clear-groups sh -c 'id -u; id -g'"))
        .shows("33\n33");
}

/// Host-side edits raise no inotify in the guest.
#[test]
fn complaint_12_an_edit_outside_is_noticed_inside() {
    let world = World::new();
    let directory = world.path("watched");
    std::fs::create_dir(&directory).expect("mkdir");
    let mut run = world.start("", complaints("watch").arg(&directory));
    run.wait_for("ready");
    std::fs::write(format!("{directory}/edited"), "x").expect("an edit");
    run.finish(seconds(15)).ok().shows("edited 8");
}

/// Nobody can tell what the networking does.
#[test]
fn complaint_13_one_can_tell_what_the_networking_does() {
    let world = World::new();
    world.http();
    let script =
        "curl -sS http://origin.test/hello; curl -sS http://10.77.0.3/hello; curl -sS http://10.77.0.2:9/";
    let out = world.kso("--trace --allow origin.test", sh(script));
    for part in ["resolve(origin.test", "connect(origin.test ", "10.77.0.3:80", "no --allow rule matches"] {
        assert!(out.errors().contains(part), "{part}: {}", out.report());
    }
}

/// No hook for names and egress rules.
#[test]
fn complaint_14_egress_rules_by_name() {
    let world = World::new();
    world.http();
    let flags = "--allow *.origin.test:443 --allow origin.test:80";
    let ca = world.ca();
    world.kso(flags, argv(["curl", "-sS", "http://origin.test/hello"])).ok().shows("hello");
    world
        .kso(flags, argv(["curl", "-sS", "--cacert", &ca, "https://www.origin.test/hello"]))
        .ok()
        .shows("hello");
    // Names that no rule allows are not looked up: an answer could carry data out.
    world.kso(flags, argv(["curl", "-sS", "http://other.test/hello"])).exits(6);
    world.kso(flags, argv(["curl", "-sS", "http://10.77.0.3/hello"])).exits(7);
}

/// SO_ERROR loses the errno; late failures all become ECONNREFUSED.
#[test]
fn complaint_15_late_errors_keep_their_number() {
    let world = World::new();
    let out = world.same_ok("", argv([c_program("interception").as_str(), "late_errors"]));
    for part in ["SO_ERROR ETIMEDOUT", "SO_ERROR EHOSTUNREACH"] {
        assert!(out.text().contains(part), "{}", out.report());
    }
    let _echo = world.echo(7007);
    world
        .same_ok("", argv([c_program("interception").as_str(), "errors"]))
        .shows("SO_ERROR ECONNREFUSED, then 0");
}

/// epoll registrations made before connect vanish; F_SETFD, dup'ed descriptors, exiting threads leak.
#[test]
fn complaint_16_epoll_duplicates_and_threads() {
    let world = World::new();
    let _echo = world.echo(7007);
    for case in ["epoll_modes", "epoll_many", "duplicates"] {
        world.same_ok("", argv([c_program("interception").as_str(), case]));
    }
    let mut run = world.start("", complaints("ending_threads").hold());
    run.wait_for("warm");
    let early = Resources::of(run.pid());
    run.wait_for("over");
    let may = |late: &Resources| late.descriptors <= early.descriptors + 3 && late.threads <= early.threads;
    let late = Resources::settled(run.pid(), may);
    assert!(may(&late), "{early:?} {late:?}");
    assert!(run.text().contains("next descriptor 3\n"), "descriptors leaked inside: {}", run.text());
}

/// A seccomp notification answered after a signal duplicates descriptors.
#[test]
fn complaint_17_signals_duplicate_no_descriptors() {
    let world = World::new();
    let _echo = world.echo(7007);
    for (case, expected) in [("interrupted", "bad 0 leaked 0"), ("interrupted_storm", "leaked 0")] {
        world.kso("", argv([c_program("interception").as_str(), case])).ok().shows(expected);
    }
}
