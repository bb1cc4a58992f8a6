//! smoltcp as the kernel of programs: out and in, IPv4 and IPv6, failures, many at once, much, and its death.
#![forbid(unsafe_code)]

use kso_tests::{Cmd, Running, World, argv, seconds, sh, wait_until};
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;

/// A stack with an interface in the origin's namespace.
fn netstack(world: &World) -> String {
    let addresses = "address=10.79.1.2/24,gateway=10.79.1.1,address=fd79:1::2/64,gateway=fd79:1::1";
    format!("netstack,{addresses},attach=netns:/run/netns/{}", world.origin.name())
}

fn python(script: &str) -> Cmd {
    argv(["python3", "-c", script])
}

/// A server that greets with the peer's address, echoes until the peer's end, and never ends.
fn server(world: &World, flags: &str) -> Running {
    let script = "import socket, threading\n\
        l = socket.create_server(('::', 80), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)\n\
        print('ready', flush=True)\n\
        def serve(c, a):\n    \
            try:\n        \
                c.sendall(('hello ' + a[0] + '\\n').encode())\n        \
                while data := c.recv(1 << 16): c.sendall(data)\n    \
            except OSError as e: print('error', e.strerror, flush=True)\n    \
            c.close()\n\
        while True:\n    \
            threading.Thread(target=serve, args=l.accept(), daemon=True).start()\n";
    let mut server = world.start(flags, python(script));
    server.wait_for("ready");
    server
}

/// Connects from the origin's side, until somebody listens.
fn dial(world: &World, address: &str) -> TcpStream {
    let mut found = None;
    wait_until("a listener", seconds(30), || {
        found = world.origin.connect(address).ok();
        found.is_some()
    });
    let stream = found.expect("connected");
    stream.set_read_timeout(Some(seconds(30))).expect("a timeout");
    stream
}

fn greeting(stream: &mut TcpStream) -> String {
    let (mut text, mut byte) = (String::new(), [0]);
    while !text.ends_with('\n') {
        stream.read_exact(&mut byte).expect("a greeting");
        text.push(char::from(byte[0]));
    }
    text
}

#[test]
fn a_program_reaches_out() {
    let world = World::new();
    let kernel = format!("--kernel {}", netstack(&world));
    let _echo = world.echo(7000);
    for (peer, own) in [("10.79.1.1", "10.79.1.2"), ("fd79:1::1", "fd79:1::2")] {
        // It says by which addresses it is connected, closes one half, and reads to the end.
        let script = format!(
            "import socket\n\
             s = socket.create_connection(('{peer}', 7000), 20)\n\
             print('from', s.getsockname()[0], 'to', s.getpeername()[0], flush=True)\n\
             s.sendall(b'a')\n\
             s.shutdown(socket.SHUT_WR)\n\
             print('told', s.makefile().read(), flush=True)\n"
        );
        let out = world.kso(&kernel, python(&script).limit(seconds(60)));
        assert!(out.text().contains(&format!("from {own} to {peer}")), "{}", out.report());
        assert!(out.text().contains("told "), "{}", out.report());
    }
    // Names are the host's; the connection is not.
    world.http();
    world.kso(&kernel, sh("curl -4 -sS -m 30 http://origin.test/hello")).ok().shows("hello from origin");
    assert!(world.http().log().contains("10.79.1.2"), "{}", world.http().log());
    // What fails does so with its reason.
    let script = "import errno, socket\n\
        for address in ('10.79.1.1', 9), ('fd79:1::1', 9), ('10.79.1.77', 80):\n    \
            try: socket.create_connection(address, 60); print('connected?', flush=True)\n    \
            except OSError as e: print(errno.errorcode[e.errno], flush=True)\n";
    let out = world.kso(&kernel, python(script).limit(seconds(90))).ok();
    assert_eq!(out.text(), "ECONNREFUSED\nECONNREFUSED\nEHOSTUNREACH\n", "{}", out.report());
    world.nothing_left();
}

#[test]
fn much_goes_both_ways_at_once() {
    let world = World::new();
    let kernel = format!("--kernel {}", netstack(&world));
    let script = |address: &str| {
        format!(
            "import hashlib, random, socket, threading\n\
             data = random.Random(7).randbytes(24 << 20)\n\
             s = socket.create_connection(('{address}', 80), 30)\n\
             s.settimeout(60)\n\
             def send():\n    s.sendall(data)\n    s.shutdown(socket.SHUT_WR)\n\
             thread = threading.Thread(target=send); thread.start()\n\
             got = bytearray()\n\
             while part := s.recv(1 << 20): got += part\n\
             thread.join()\n\
             got = got[got.index(b'\\n') + 1:]\n\
             print('same' if got == data else f'different: {{len(got)}} bytes')\n"
        )
    };
    // From outside to a server inside.
    let running = server(&world, &format!("-p 8080:80 {kernel}"));
    drop(dial(&world, "10.79.1.2:8080"));
    let client = script("10.79.1.2").replace(", 80)", ", 8080)");
    world.at_origin(python(&client).limit(seconds(120))).run().ok().shows("same");
    drop(running);
    // From inside to a server outside, which greets with a line, too.
    let serve = "import socket\n\
        l = socket.create_server(('::', 80), family=socket.AF_INET6, dualstack_ipv6=True)\n\
        print('ready', flush=True)\n\
        while True:\n    \
            c, a = l.accept()\n    \
            c.sendall(b'hello\\n')\n    \
            while data := c.recv(1 << 16): c.sendall(data)\n    \
            c.close()\n";
    let mut outside = world.at_origin(python(serve)).spawn();
    outside.wait_for("ready");
    for peer in ["10.79.1.1", "fd79:1::1"] {
        world.kso(&kernel, python(&script(peer)).limit(seconds(120))).ok().shows("same");
    }
    drop(outside);
    world.nothing_left();
}

#[test]
fn nginx_is_published_and_driven_by_wrk() {
    let world = World::new();
    let directory = world.path("nginx");
    sh(format!(
        "mkdir -p {directory}/www && echo small > {directory}/www/small && chmod -R a+rX {directory}"
    ))
    .run()
    .ok();
    let config = world.file(
        "nginx/nginx.conf",
        format!(
            "daemon off; user www-data; worker_processes 2; pid {directory}/pid; error_log stderr notice;\n\
             events {{ worker_connections 1024; multi_accept on; }}\n\
             http {{ access_log off; client_body_temp_path {directory}/a; proxy_temp_path {directory}/b; fastcgi_temp_path {directory}/c;\n\
             uwsgi_temp_path {directory}/d; scgi_temp_path {directory}/e; sendfile on;\n\
             server {{ listen 80; root {directory}/www;\n\
               location /peer {{ return 200 \"$remote_addr $server_port\\n\"; }} }} }}\n"
        ),
    );
    let flags = format!("-p 8080:80 --kernel {}", netstack(&world));
    let mut nginx = world.start(&flags, argv(["nginx", "-c", &config]));
    drop(dial(&world, "10.79.1.2:8080"));
    assert!(nginx.running(), "{}", nginx.errors());
    let get = |path: &str| argv(["curl", "-sS", "-m", "30", &format!("http://10.79.1.2:8080/{path}")]);
    world.at_origin(get("peer")).run().ok().shows("10.79.1.1 80");
    let wrk = argv(["wrk", "-t2", "-c64", "-d3s", "--timeout", "20s", "http://10.79.1.2:8080/small"]);
    let out = world.at_origin(wrk.limit(seconds(60))).run().ok();
    assert!(!out.text().contains("Socket errors") && !out.text().contains("Non-2xx"), "{}", out.report());
    // A connection for each request.
    let wrk = argv([
        "wrk",
        "-t1",
        "-c16",
        "-d2s",
        "--timeout",
        "20s",
        "-H",
        "Connection: close",
        "http://10.79.1.2:8080/small",
    ]);
    let out = world.at_origin(wrk.limit(seconds(60))).run().ok();
    assert!(!out.text().contains("Non-2xx"), "{}", out.report());
    assert!(nginx.running(), "{}", nginx.errors());
    world.at_origin(get("small")).run().ok().shows("small");
    drop(nginx);
    world.nothing_left();
}

#[test]
fn many_connect_at_once_and_none_is_lost() {
    let world = World::new();
    let running = server(&world, &format!("-p 8080:80 --kernel {}", netstack(&world)));
    for (address, own) in [("10.79.1.2:8080", "10.79.1.1"), ("[fd79:1::2]:8080", "fd79:1::1")] {
        let mut peer = dial(&world, address);
        assert_eq!(
            greeting(&mut peer).trim_end().trim_start_matches("hello ").trim_start_matches("::ffff:"),
            own
        );
    }
    // More than may wait at a time: their SYNs come again.
    let script = "import selectors, socket\n\
        many, selector = 300, selectors.DefaultSelector()\n\
        for _ in range(many):\n    \
            s = socket.socket(); s.setblocking(False); s.connect_ex(('10.79.1.2', 8080))\n    \
            selector.register(s, selectors.EVENT_READ)\n\
        greeted = 0\n\
        while greeted < many:\n    \
            for key, _ in selector.select(60) or [exit('they wait in vain')]:\n        \
                assert key.fileobj.recv(5) == b'hello'\n        \
                selector.unregister(key.fileobj); greeted += 1\n\
        print('all', greeted)\n";
    world.at_origin(python(script).limit(seconds(120))).run().ok().shows("all 300");
    drop(running);
    world.nothing_left();
}

#[test]
fn a_stack_on_a_bridge_is_one_of_many() {
    let world = World::new();
    world.host.ip("link add br0 type bridge");
    world.host.ip("link set br0 up");
    world.host.ip(&format!("link add port type veth peer name far netns {}", world.origin.name()));
    world.host.ip("link set port master br0 up");
    world.origin.ip("addr add 10.79.5.1/24 dev far");
    world.origin.ip("link set far up");
    let echo = world.echo(7000);
    let kernel = "--kernel netstack,address=10.79.5.2/24,gateway=10.79.5.1,attach=bridge:br0";
    let script = "import socket\n\
        s = socket.create_connection(('10.79.5.1', 7000), 30)\n\
        s.sendall(b'a'); s.shutdown(socket.SHUT_WR)\n\
        print(s.getsockname()[0], len(s.makefile().read()) > 0)\n";
    world.kso(kernel, python(script).limit(seconds(60))).ok().shows("10.79.5.2 True");
    assert_eq!(echo.accepted(), 1);
    world.nothing_left();
}

/// Takes the interface away from a stack: it dies.
fn kill(world: &World) {
    let list =
        world.at_origin(sh("ip -o link show | sed -n 's/^[0-9]*: \\(ksn[^:@]*\\).*/\\1/p'")).run().ok();
    let text = list.text();
    let interface = text.split_whitespace().next().expect("a stack runs");
    world.origin.ip(&format!("link del {interface}"));
}

#[test]
fn a_listener_moves_when_its_stack_dies() {
    let world = World::new();
    let flags = format!("-p 8080:80 --external {} --via tcp-listen:80=netstack,host", netstack(&world));
    let mut running = server(&world, &flags);
    let mut peer = dial(&world, "10.79.1.2:8080");
    greeting(&mut peer);
    kill(&world);
    let mut there = None;
    wait_until("the host takes over", seconds(30), || {
        there = world.host.connect("127.0.0.1:8080").ok();
        there.is_some()
    });
    assert!(greeting(&mut there.expect("connected")).contains("127.0.0.1"));
    running.wait_for("error Connection reset by peer");
    assert!(running.running());
    drop(running);
    world.nothing_left();
}

#[test]
fn a_stack_that_is_alone_takes_its_listeners_back_after_its_death() {
    let world = World::new();
    let mut running = server(&world, &format!("-p 8080:80 --kernel {}", netstack(&world)));
    for _ in 0..2 {
        let mut peer = dial(&world, "10.79.1.2:8080");
        greeting(&mut peer);
        kill(&world);
        running.wait_for("error Connection reset by peer");
        // Its peers are told by the next stack.
        let mut again = dial(&world, "10.79.1.2:8080");
        greeting(&mut again);
        let _ = peer.write_all(b"x");
        let error = peer.read(&mut [0]).expect_err("it was reset");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        drop(again);
    }
    assert!(running.running(), "the program noticed nothing");
    drop(running);
    world.nothing_left();
}
