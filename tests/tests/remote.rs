//! A provider on another machine, over mutual TLS: the machine is another network namespace, and the TLS is real.
#![forbid(unsafe_code)]

use kso_tests::{Cmd, Running, World, argv, kso_binary, seconds, sh, wait_until};
use rustix::process::Signal;
use std::io::{ErrorKind, Read, Write};

const PORT: u16 = 7443;

/// Makes certificates with `kso provide certs`; the directory.
fn certificates(world: &World, name: &str) -> String {
    let directory = world.path(name);
    let made = argv([&kso_binary(), "provide", "certs", &directory, "--name", "10.77.0.2"]).run().ok();
    assert!(made.text().contains("--tls-ca"), "{}", made.report());
    directory
}

/// Starts the provider in the origin's namespace.
fn provider(world: &World, certs: &str) -> Running {
    let listen = format!("tcp:10.77.0.2:{PORT}");
    let (ca, cert, key) =
        (format!("{certs}/ca.pem"), format!("{certs}/10.77.0.2.pem"), format!("{certs}/10.77.0.2.key"));
    let words =
        ["provide", "--listen", &listen, "--tls-ca", &ca, "--tls-cert", &cert, "--tls-key", &key, "-v"];
    let provider = world.at_origin(argv(words).prefixed([kso_binary()])).spawn();
    world.origin.wait_for_port(PORT);
    provider
}

/// The kernel, as `--kernel` takes it. `ca`: whom to trust; `certs`: who to be.
fn kernel(ca: &str, certs: &str) -> String {
    format!(
        "far=remote,address=10.77.0.2:{PORT},ca={ca}/ca.pem,cert={certs}/broker.pem,key={certs}/broker.key"
    )
}

fn python(script: &str) -> Cmd {
    argv(["python3", "-c", script])
}

/// A server that greets, echoes one message, and never ends.
fn server(world: &World, flags: &str) -> Running {
    let script = "import socket, threading\n\
        l = socket.create_server(('0.0.0.0', 80), backlog=64)\n\
        print('ready', flush=True)\n\
        def serve(c, a):\n    \
            c.sendall(('hello ' + a[0]).encode())\n    \
            try:\n        c.sendall(c.recv(100)); c.recv(1)\n    \
            except OSError as e: print('error', e.strerror, flush=True)\n    \
            c.close()\n\
        while True:\n    \
            threading.Thread(target=serve, args=l.accept(), daemon=True).start()\n";
    let mut server = world.start(flags, python(script));
    server.wait_for("ready");
    server
}

#[test]
fn a_provider_elsewhere_performs_the_tcp_of_a_program() {
    let world = World::new();
    let certs = certificates(&world, "certs");
    let provider = provider(&world, &certs);
    let kernel = format!("--kernel {}", kernel(&certs, &certs));
    world.http();
    let _echo = world.echo(7000);
    // From an address of the other machine, with its ends in order.
    let script = "import socket\n\
        s = socket.create_connection(('10.77.0.3', 7000), 20)\n\
        s.sendall(b'a')\n\
        print('told', s.makefile().read().split()[0])\n\
        s = socket.create_connection(('10.77.0.3', 7000), 20)\n\
        s.sendall(b'g' + b'x' * 3000000); s.shutdown(socket.SHUT_WR)\n\
        print(s.makefile().read().strip())\n\
        s = socket.create_connection(('10.77.0.3', 7000), 20)\n\
        s.sendall(b'r')\n\
        try: print('read', s.recv(1))\n\
        except ConnectionResetError: print('reset')\n\
        try: socket.create_connection(('10.77.0.3', 9), 20)\n\
        except ConnectionRefusedError: print('refused')\n";
    let out = world.kso(&kernel, python(script)).ok();
    for line in ["told 10.77.0.", "got 3000000", "reset", "refused"] {
        assert!(out.text().contains(line), "{line}: {}", out.report());
    }
    let curl = "curl -sS -m 20 http://origin.test/hello && curl -sS -m 20 --cacert \"$CA\" https://origin.test/hello";
    world.kso(&kernel, sh(curl).env("CA", world.ca())).ok().shows("hello from origin");
    // One program after the other, until SIGTERM: then it ends.
    provider.terminate().exits(0);
    world.nothing_left();
}

#[test]
fn a_server_is_published_on_the_other_machine() {
    let world = World::new();
    let certs = certificates(&world, "certs");
    let _provider = provider(&world, &certs);
    let directory = world.path("nginx");
    sh(format!("mkdir -p {directory} && chmod a+rx {directory}")).run().ok();
    let config = world.file(
        "nginx/nginx.conf",
        format!(
            "daemon off; user www-data; worker_processes 1; pid {directory}/pid; error_log stderr notice;\n\
             events {{ worker_connections 512; }}\n\
             http {{ access_log off; client_body_temp_path {directory}/a; proxy_temp_path {directory}/b;\n\
             fastcgi_temp_path {directory}/c; uwsgi_temp_path {directory}/d; scgi_temp_path {directory}/e;\n\
             server {{ listen 80; location / {{ return 200 \"to $remote_addr $server_port\\n\"; }} }} }}\n"
        ),
    );
    let flags = format!("-p 8080:80 --kernel {}", kernel(&certs, &certs));
    let mut nginx = world.start(&flags, argv(["nginx", "-c", &config]));
    world.origin.wait_for_port(8080);
    assert!(nginx.running(), "{}", nginx.errors());
    world.at_origin(sh("curl -sS -m 20 http://10.77.0.3:8080/")).run().ok().shows("to 10.77.0.2 80");
    let wrk = "wrk -t1 -c32 -d2s http://127.0.0.1:8080/";
    let wrk = world.at_origin(sh(wrk)).run().ok();
    assert!(!wrk.text().contains("Socket errors") && !wrk.text().contains("Non-2xx"), "{}", wrk.report());
    // A connection for each request.
    let many = "for i in $(seq 100); do curl -sS -m 20 http://127.0.0.1:8080/ || exit 1; done | grep -c to";
    world.at_origin(sh(many)).run().ok().shows("100");
    nginx.terminate();
    world.nothing_left();
}

#[test]
fn whoever_has_no_certificate_of_the_authority_is_refused() {
    let world = World::new();
    let (certs, others) = (certificates(&world, "certs"), certificates(&world, "others"));
    let mut provider = provider(&world, &certs);
    let _echo = world.echo(7000);
    // Ours is of another authority.
    let out = world.kso(&format!("--kernel {}", kernel(&certs, &others)), sh("echo ran"));
    assert!(out.code() != Some(0) && !out.text().contains("ran"), "{}", out.report());
    assert!(out.errors().contains("refuses our certificate"), "{}", out.report());
    provider.wait_for("its certificate is not of the authority");
    // The provider's is.
    let out = world.kso(&format!("--kernel {}", kernel(&others, &certs)), sh("echo ran"));
    assert!(out.code() != Some(0), "{}", out.report());
    assert!(out.errors().contains("not of the authority that is trusted here"), "{}", out.report());
    // It is called otherwise.
    let named = format!("--kernel {},server_name=elsewhere.test", kernel(&certs, &certs));
    let out = world.kso(&named, sh("echo ran"));
    assert!(out.errors().contains("for another name"), "{}", out.report());
    // None at all.
    let client = format!(
        "echo hello | timeout 20 openssl s_client -connect 10.77.0.2:{PORT} -CAfile {certs}/ca.pem -quiet 2>&1; true"
    );
    let out = world.at_host(sh(client)).run();
    assert!(out.text().contains("certificate required"), "{}", out.report());
    provider.wait_for("it showed no certificate");
    // Settings that cannot be are told before anything starts.
    let half = format!("--kernel far=remote,address=10.77.0.2:{PORT},ca={certs}/ca.pem");
    let out = world.kso(&half, sh("echo ran"));
    assert!(out.errors().contains("cert=FILE is missing"), "{}", out.report());
    let listen = format!("tcp:127.0.0.1:{PORT}");
    let bare = argv([&kso_binary(), "provide", "--listen", &listen]).run();
    assert!(bare.code() != Some(0) && bare.errors().contains("--tls-ca"), "{}", bare.report());
    world.nothing_left();
}

#[test]
fn strangers_at_its_door_harm_no_session() {
    let world = World::new();
    let certs = certificates(&world, "certs");
    let mut provider = provider(&world, &certs);
    let _echo = world.echo(7000);
    let script = "import socket, sys\n\
        s = socket.create_connection(('10.77.0.3', 7000), 20)\n\
        s.sendall(b'e')\n\
        print('ready', flush=True)\n\
        for line in sys.stdin:\n    \
            s.sendall(b'x' * 100000); n = 0\n    \
            while n < 100000: n += len(s.recv(65536))\n    \
            print('echoed', line.strip(), flush=True)\n";
    let mut program = world.start(&format!("--kernel {}", kernel(&certs, &certs)), python(script).hold());
    program.wait_for("ready");
    // Handshakes that are never finished, nonsense, records without end.
    let crowd = format!(
        "import resource, socket\n\
         soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE); resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))\n\
         all = []\n\
         for i in range(2000):\n    \
             s = socket.create_connection(('10.77.0.2', {PORT}), 20)\n    \
             try: s.sendall([b'', b'GET / HTTP/1.1\\r\\n\\r\\n', b'\\x16\\x03\\x01\\xff\\xff' + b'\\0' * 3000][i % 3])\n    \
             except OSError: pass\n    \
             all.append(s)\n\
         print('crowded', flush=True)\n\
         input()\n"
    );
    let mut crowd = world.at_host(python(&crowd)).hold().spawn();
    crowd.wait_for("crowded");
    program.send("one\n");
    program.wait_for("echoed one");
    // And somebody new gets in.
    let out = world.kso(&format!("--kernel {}", kernel(&certs, &certs)), sh("echo ran"));
    out.ok().shows("ran");
    provider.wait_for("a connection is refused");
    // The log does not grow with the crowd.
    let told = provider.errors().matches("is refused").count();
    assert!(told < 100, "{told} lines");
    drop(crowd);
    program.send("two\n");
    program.wait_for("echoed two");
    program.release();
    program.finish(seconds(30)).ok();
    world.nothing_left();
}

#[test]
fn a_dead_provider_resets_connections_and_is_dialled_again() {
    let world = World::new();
    let certs = certificates(&world, "certs");
    let first = provider(&world, &certs);
    let mut running = server(&world, &format!("-p 8080:80 --kernel {}", kernel(&certs, &certs)));
    world.origin.wait_for_port(8080);
    let mut peer = world.origin.connect("127.0.0.1:8080").expect("published there");
    let mut text = [0; 15];
    peer.read_exact(&mut text).expect("a greeting");
    assert_eq!(&text, b"hello 127.0.0.1");
    first.signal(Signal::KILL);
    let error = peer.read(&mut text).expect_err("its connection is reset");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    running.wait_for("error Connection reset by peer");
    drop(first);
    let second = provider(&world, &certs);
    wait_until("the listener", seconds(20), || world.origin.connect("127.0.0.1:8080").is_ok());
    let mut peer = world.origin.connect("127.0.0.1:8080").expect("published there");
    peer.read_exact(&mut text).expect("a greeting");
    peer.write_all(b"again").expect("it reads");
    peer.read_exact(&mut text[..5]).expect("an echo");
    assert_eq!(&text[..5], b"again");
    // One that hangs is as good as dead, with all that it has.
    let resets = running.text().matches("error Connection reset").count();
    second.signal(Signal::STOP);
    let more = || running.text().matches("error Connection reset").count() > resets;
    wait_until("a reset", seconds(20), more);
    second.signal(Signal::KILL);
    drop(second);
    let _third = provider(&world, &certs);
    wait_until("the listener", seconds(20), || world.origin.connect("127.0.0.1:8080").is_ok());
    assert!(running.running(), "the program noticed nothing");
    drop(running);
    world.nothing_left();
}

#[test]
fn a_provider_that_is_to_end_lets_connections_end() {
    let world = World::new();
    let certs = certificates(&world, "certs");
    let mut provider = provider(&world, &certs);
    let _echo = world.echo(7000);
    let script = "import socket, sys\n\
        s = socket.create_connection(('10.77.0.3', 7000), 20)\n\
        s.sendall(b'g')\n\
        print('ready', flush=True)\n\
        sys.stdin.readline()\n\
        s.sendall(b'x' * 1000000); s.shutdown(socket.SHUT_WR)\n\
        print(s.makefile().read().strip(), flush=True)\n";
    let flags = format!("--external {} --via tcp-connect=far,host", kernel(&certs, &certs));
    let mut program = world.start(&flags, python(script).hold());
    program.wait_for("ready");
    provider.signal(Signal::TERM);
    wait_until("that it listens no more", seconds(20), || !world.origin.listens(PORT));
    assert!(provider.running(), "a connection is up");
    program.send("go\n");
    program.wait_for("got 1000000");
    program.release();
    program.finish(seconds(30)).ok();
    provider.finish(seconds(60)).exits(0);
    world.nothing_left();
}

#[test]
fn a_thousand_sockets_go_on_while_one_is_blocked() {
    let world = World::new();
    let certs = certificates(&world, "certs");
    let _provider = provider(&world, &certs);
    let _echo = world.echo(7000);
    let script = "import resource, socket\n\
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE); resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))\n\
        def connect():\n    \
            s = socket.create_connection(('10.77.0.3', 7000), 60); s.sendall(b'e'); return s\n\
        blocked = connect(); blocked.setblocking(False)\n\
        # Echoed, and never read: sooner or later both directions are full.\n\
        import time\n\
        sent = 0; full = 0\n\
        while full < 20:\n    \
            try: sent += blocked.send(b'x' * 1000000); full = 0\n    \
            except BlockingIOError: full += 1; time.sleep(0.05)\n\
        all = [connect() for i in range(1000)]\n\
        for turn in range(2):\n    \
            for i, s in enumerate(all): s.sendall(b'%06d' % i * 500)\n    \
            for i, s in enumerate(all):\n        \
                want = b'%06d' % i * 500; got = b''\n        \
                while len(got) < len(want): got += s.recv(65536)\n        \
                assert got == want\n\
        # What was sent to the blocked one comes, too.\n\
        blocked.setblocking(True); blocked.shutdown(socket.SHUT_WR); n = 0\n\
        while True:\n    \
            got = blocked.recv(1 << 20)\n    \
            if not got: break\n    \
            n += len(got)\n\
        print('all', len(all), n == sent)\n";
    let limit = seconds(240);
    let out = world.kso(&format!("--kernel {}", kernel(&certs, &certs)), python(script).limit(limit));
    out.ok().shows("all 1000 True");
    world.nothing_left();
}
