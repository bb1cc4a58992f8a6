//! What may be reached: rules by name, wildcard, CIDR, port and protocol; what is protected by default; what
//! programs say when something is denied.
#![forbid(unsafe_code)]

use kso_tests::{EchoServer, UdpEcho, World, argv, c_program, go_program, program, sh};
use std::time::Duration;

const CURL: &str = "curl -sS -m 5 -o /dev/null -w '%{http_code}\\n'";

/// Asserts which of the targets can be fetched under `flags`.
#[track_caller]
fn fetches(world: &World, flags: &str, allowed: &[&str], denied: &[&str]) {
    for url in allowed {
        let out = world.kso(flags, sh(format!("{CURL} {url}")));
        assert!(out.code() == Some(0), "{flags}: {url} should be allowed: {}", out.report());
    }
    for url in denied {
        let out = world.kso(flags, sh(format!("{CURL} {url}")));
        assert!(matches!(out.code(), Some(6 | 7)), "{flags}: {url} should be denied: {}", out.report());
        assert!(out.elapsed < Duration::from_secs(4), "a denial is told at once: {}", out.report());
    }
}

#[test]
fn rules_by_name_and_wildcard() {
    let world = World::new();
    world.http();
    let all = ["http://origin.test/hello", "http://www.origin.test/hello", "http://other.test/hello"];
    fetches(&world, "", &all, &[]);
    fetches(&world, "--allow origin.test", &all[..1], &all[2..]);
    fetches(&world, "--allow *.origin.test", &all[1..2], &all[2..]);
    fetches(
        &world,
        "--allow origin.test --allow other.test",
        &[all[0], all[2]],
        &["http://third.test/hello"],
    );
    fetches(&world, "--allow ORIGIN.Test.", &all[..1], &all[2..]);
    // A name in a CNAME chain holds for its end.
    fetches(&world, "--allow alias.test", &["http://alias.test/hello"], &all[..1]);
    fetches(&world, "--deny other.test", &all[..1], &all[2..]);
    fetches(&world, "--allow *.test --deny other.test", &all[..1], &all[2..]);
    // By /etc/hosts too.
    fetches(&world, "--allow fromhosts.test", &["http://fromhosts.test/hello"], &["http://10.77.0.3/hello"]);
    // A name that nobody asked for gives no right to an address.
    fetches(&world, "--allow third.test", &[], &["http://10.77.0.2/hello"]);
}

#[test]
fn rules_by_address_port_and_protocol() {
    let world = World::new();
    world.http();
    fetches(
        &world,
        "--allow 10.77.0.2",
        &["http://10.77.0.2/hello"],
        &["http://10.77.0.3/hello", "http://[fd77::2]/hello"],
    );
    fetches(
        &world,
        "--allow 10.77.0.0/24",
        &["http://10.77.0.2/hello", "http://10.77.0.4/hello"],
        &["http://[fd77::2]/hello"],
    );
    fetches(&world, "--allow [fd77::]/64", &["http://[fd77::2]/hello"], &["http://10.77.0.2/hello"]);
    fetches(&world, "--allow [fd77::2]:80", &["http://[fd77::2]/hello"], &["http://[fd77::3]/hello"]);
    fetches(&world, "--allow 10.77.0.2:80", &["http://10.77.0.2/hello"], &["-k https://10.77.0.2/hello"]);
    fetches(
        &world,
        "--allow 10.77.0.2:440-450",
        &["-k https://10.77.0.2/hello"],
        &["http://10.77.0.2/hello"],
    );
    fetches(&world, "--allow 10.77.0.2:80/tcp", &["http://10.77.0.2/hello"], &[]);
    fetches(&world, "--allow 10.77.0.2/udp", &[], &["http://10.77.0.2/hello"]);
    fetches(&world, "--allow * --deny *:80", &["-k https://10.77.0.2/hello"], &["http://10.77.0.2/hello"]);
    fetches(
        &world,
        "--allow 10.77.0.0/24 --deny 10.77.0.3",
        &["http://10.77.0.2/hello"],
        &["http://10.77.0.3/hello"],
    );
    // An IPv4-mapped address is the same address.
    let mapped =
        "import socket; s=socket.socket(socket.AF_INET6); print(s.connect_ex(('::ffff:10.77.0.3',80)))";
    world.kso("--deny 10.77.0.3", argv(["/usr/bin/python3", "-c", mapped])).ok().shows("13");
    world.kso("--deny 10.77.0.2", argv(["/usr/bin/python3", "-c", mapped])).ok().shows("0");
}

#[test]
fn datagrams_are_denied_per_flow() {
    let world = World::new();
    let allowed = UdpEcho::start(&world.origin, "10.77.0.2:7007");
    let denied = UdpEcho::start(&world.origin, "10.77.0.3:7007");
    let script = "import socket\n\
        for ip in ('10.77.0.2','10.77.0.3'):\n    s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.settimeout(2); s.connect((ip,7007))\n    \
        try:\n        s.send(b'x'); print(ip, s.recv(10))\n    except OSError as e: print(ip, type(e).__name__, e)\n";
    let out = world.kso("--allow 10.77.0.2/udp", argv(["/usr/bin/python3", "-c", script])).ok();
    assert!(out.text().contains("10.77.0.2 b'x'"), "{}", out.report());
    assert!(
        out.text().contains("10.77.0.3 ") && !out.text().contains("timed out"),
        "told at once: {}",
        out.report()
    );
    assert_eq!((allowed.received(), denied.received()), (1, 0));
    let out = world
        .kso("--allow *:80/tcp --allow 10.77.0.3:7000-7010", argv(["/usr/bin/python3", "-c", script]))
        .ok();
    assert!(
        out.text().contains("10.77.0.3 b'x'") && !out.text().contains("10.77.0.2 b'x'"),
        "{}",
        out.report()
    );
    assert_eq!((allowed.received(), denied.received()), (1, 1));
}

#[test]
fn no_net_at_all() {
    let world = World::new();
    world.http();
    let udp = UdpEcho::start(&world.origin, "10.77.0.2:7007");
    fetches(
        &world,
        "--no-net",
        &[],
        &["http://10.77.0.2/hello", "http://origin.test/hello", "http://[fd77::2]/hello"],
    );
    let out = world.kso("--no-net", sh("ping -c1 -W1 10.77.0.2; echo $?; dig +short +time=1 +tries=1 origin.test; getent hosts origin.test; echo $?"));
    assert!(!out.text().contains("10.77.0.2\n"), "{}", out.report());
    // Loopback inside works.
    let inside = "/usr/bin/python3 -c \"import socket; s=socket.create_server(('127.0.0.1',0)); c=socket.create_connection(s.getsockname()); print('inside')\"";
    world.kso("--no-net", sh(inside)).ok().shows("inside");
    assert_eq!(udp.received(), 0);
    assert!(!world.http().log().contains("GET"), "{}", world.http().log());
    world.nothing_left();
}

#[test]
fn the_hosts_loopback_is_protected() {
    let world = World::new();
    let echo = EchoServer::start(&world.host, "127.0.0.1:8000");
    let echo6 = EchoServer::start(&world.host, "[::1]:8000");
    let udp = UdpEcho::start(&world.host, "127.0.0.1:8000");
    let client = c_program("client");
    let connect =
        |flags: &str, target: &str| world.kso(flags, argv([client.as_str(), target, "8000", "e", "hi"]));
    // 127.0.0.1 is the sandbox's own.
    connect("", "127.0.0.1").exits(1).shows("refused");
    connect("--allow host:8000", "127.0.0.1").exits(1).shows("refused");
    // The host by its name and by the gateway's address.
    for target in ["host.kso.internal", "198.18.0.1", "fd6b:736f::1"] {
        connect("", target).exits(1).shows("denied");
        connect("--allow *", target).exits(1);
        connect("--allow host:8001", target).exits(1);
        connect("--allow host:8000", target).ok().shows("hi");
        connect("--allow host", target).ok().shows("hi");
        connect("--allow host --deny host:8000", target).exits(1);
    }
    // The host's own address is not a way around.
    let wildcard = EchoServer::start(&world.host, "0.0.0.0:8002");
    let out = world.kso("", argv([client.as_str(), "10.77.0.1", "8002", "e", "hi"]));
    eprintln!("the host's own outside address: {}", out.text().trim());
    // What a name resolves to is judged, not only the name (DNS rebinding).
    let rebind = world.kso("--allow *.test", argv([client.as_str(), "rebind.test", "8000", "e", "hi"]));
    assert_ne!(rebind.code(), Some(0), "{}", rebind.report());
    let script = "import socket; s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.settimeout(2); s.connect(('host.kso.internal',8000)); s.send(b'u'); print(s.recv(10))";
    assert_ne!(world.kso("", argv(["/usr/bin/python3", "-c", script])).code(), Some(0));
    assert_eq!(udp.received(), 0);
    world.kso("--allow host:8000/udp", argv(["/usr/bin/python3", "-c", script])).ok().shows("b'u'");
    assert!(echo.accepted() > 0);
    drop((echo6, wildcard));
}

#[test]
fn metadata_and_link_local_are_protected() {
    let world = World::new();
    world.http();
    let protected = [
        "http://169.254.169.254/hello",
        "http://169.254.7.7/hello",
        "http://[fd00:ec2::254]/hello",
        "http://metadata.test/hello",
    ];
    for url in protected {
        world.native(sh(format!("{CURL} {url}"))).ok();
    }
    fetches(&world, "", &["http://10.77.0.2/hello"], &protected);
    fetches(&world, "--allow *", &["http://10.77.0.2/hello"], &protected);
    fetches(&world, "--allow *.test", &[], &["http://metadata.test/hello"]);
    fetches(&world, "--allow 169.254.169.254", &protected[..1], &protected[1..2]);
    fetches(&world, "--allow 169.254.0.0/16", &protected[..2], &protected[2..3]);
    fetches(&world, "--allow [fd00:ec2::254]:80", &protected[2..3], &protected[..1]);
    let strange = "import socket,errno\n\
        for ip in ('0.0.0.0','255.255.255.255','224.0.0.1','240.0.0.1','0.1.2.3'):\n    s=socket.socket(); s.settimeout(3)\n    r=s.connect_ex((ip,80)); print(ip, errno.errorcode.get(r,r))\n";
    let out = world.kso("--allow *", argv(["/usr/bin/python3", "-c", strange])).ok();
    for line in out.text().lines() {
        assert!(!line.ends_with(" 0"), "{}", out.report());
    }
}

#[test]
fn what_programs_say_when_denied() {
    let world = World::new();
    world.http();
    let deny = "--deny 10.77.0.3";
    world.kso(deny, sh("curl -sS http://10.77.0.3/")).exits(7);
    world.kso(deny, sh("curl -v http://10.77.0.3/")).exits(7).complains("Permission denied");
    world.kso(deny, sh("wget -t 3 -O - http://10.77.0.3/")).exits(4).complains("Permission denied");
    let python = "import urllib.request; urllib.request.urlopen('http://10.77.0.3/')";
    world.kso(deny, argv(["/usr/bin/python3", "-c", python])).exits(1).complains("Permission denied");
    let asyncio = "import asyncio; asyncio.run(asyncio.open_connection('10.77.0.3', 80))";
    world.kso(deny, argv(["/usr/bin/python3", "-c", asyncio])).exits(1).complains("PermissionError");
    let node =
        "require('http').get('http://10.77.0.3/').on('error', e => { console.log(e.code); process.exit(1) })";
    world.kso(deny, argv(["node", "-e", node])).exits(1).shows("EACCES");
    let go = go_program("godial");
    world.kso(deny, argv([go.as_str(), "10.77.0.3:80"])).exits(1).shows("permission denied");
    world
        .kso(deny, argv(["java", "-Xshare:auto", &program("Dial.java"), "10.77.0.3", "80"]))
        .exits(1)
        .shows("Permission denied");
    world
        .kso(deny, sh("ssh -F none -o ConnectTimeout=5 -o BatchMode=yes -p 80 10.77.0.3 true"))
        .exits(255)
        .complains("Permission denied");
    world.kso(deny, sh("git ls-remote http://10.77.0.3/x.git")).exits(128);
    world.kso(deny, sh("redis-cli -h 10.77.0.3 ping")).exits(1).complains("Permission denied");
    // A denied address does not keep a program from the next one.
    world.kso("--deny 10.78.0.1", sh("curl -sS http://two.test/hello")).ok().shows("hello");
    assert!(!world.http().log().contains("10.77.0.3"));
}

#[test]
fn a_bad_rule_shows_its_place() {
    let world = World::new();
    for (rule, part) in [
        ("10.0.0.0/33", "/33"),
        ("origin.test:http", "http"),
        ("origin.test:70000", "70000"),
        ("origin.test:90-80", "90-80"),
        ("10.0.0.1/sctp", "sctp"),
        ("[fd00::", "["),
        ("a..b", ".."),
        ("foo*.bar", "*"),
        ("", ""),
        ("fd00::1:80x", ""),
    ] {
        let out = world.kso_command(["run", "--allow", rule, "--", "true"]).run();
        assert!(!matches!(out.code(), Some(0) | None), "{rule:?} was taken: {}", out.report());
        assert!(
            out.errors().contains('^') && out.errors().contains(part),
            "the place is shown: {rule:?} {}",
            out.report()
        );
    }
    for publication in ["x:80", "70000:80", "1:2:3:4:5", "8080:80/sctp", "300.1.1.1:80:80"] {
        let out = world.kso_command(["run", "-p", publication, "--", "true"]).run();
        assert!(!matches!(out.code(), Some(0) | None), "{publication:?} was taken: {}", out.report());
        assert!(out.errors().contains('^') || out.errors().contains(publication), "{}", out.report());
    }
}

#[test]
fn a_denied_origin_sees_nothing() {
    // Not even a SYN: the origin's kernel counts none.
    let world = World::new();
    let echo = EchoServer::start(&world.origin, "10.77.0.3:7007");
    let syns = || {
        let table =
            sh("ip netns exec NS nstat -asz TcpPassiveOpens".replace("NS", world.origin.name())).run();
        table.text().split_whitespace().filter_map(|w| w.parse::<u64>().ok()).next().unwrap_or(0)
    };
    let before = syns();
    let script = "import socket\nfor i in range(200):\n    s=socket.socket(); s.setblocking(i%2); print(s.connect_ex(('10.77.0.3',7007)))";
    let out = world.kso("--deny 10.77.0.3:7007", argv(["/usr/bin/python3", "-c", script])).ok();
    assert_eq!(out.text(), "13\n".repeat(200));
    assert_eq!((echo.accepted(), syns()), (0, before));
}
