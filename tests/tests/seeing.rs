//! `kso ps`, `kso trace`, metrics, and the broker as a daemon.
#![forbid(unsafe_code)]

use kso_tests::{Running, UdpEcho, World, argv, program, sh, wait_until};
use serde_json::Value;
use std::time::Duration;

fn lines(run: &Running) -> Vec<Value> {
    run.text().lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Waits for an event of `kind` for which `is` holds.
#[track_caller]
fn event(run: &Running, kind: &str, is: impl Fn(&Value) -> bool) -> Value {
    let mut found = None;
    let start = std::time::Instant::now();
    while found.is_none() {
        found = lines(run).into_iter().find(|line| line["event"] == kind && is(line));
        assert!(start.elapsed() < Duration::from_secs(5), "no {kind} came: {}\n{}", run.text(), run.errors());
        std::thread::sleep(Duration::from_millis(10));
    }
    found.expect("just seen")
}

const SESSION: &str = "import socket,sys,urllib.request\n\
    print(urllib.request.urlopen('http://origin.test/bytes/2510').read()[:0])\n\
    s=socket.create_server(('',80))\n\
    u=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); u.sendto(b'x',('10.77.0.2',7007)); u.recv(9)\n\
    t=socket.socket(); print(t.connect_ex(('10.77.0.3',80)))\n\
    t=socket.socket(); print(t.connect_ex(('10.77.0.2',9)))\n\
    c=socket.create_connection(('10.77.0.2',80))\n\
    print('ready', flush=True)\n\
    a,p=s.accept(); a.sendall(b'hello'); a.close()\n\
    sys.stdin.read(1)\n";

#[test]
fn trace_tells_each_thing_once_as_json_and_as_text() {
    let world = World::new();
    world.http();
    let _udp = UdpEcho::start(&world.origin, "10.77.0.2:7007");
    let trace = world.kso_command(["trace", "--json"]).spawn();
    let text = world.kso_command(["trace"]).spawn();
    std::thread::sleep(Duration::from_millis(300));
    // The trace must be there before the session's first event: the program waits for a line.
    let flags = "--name web -p 8080:80 --deny 10.77.0.3";
    let script = SESSION.replacen("import socket", "input()\nimport socket", 1);
    let mut run = world.start(flags, argv(["/usr/bin/python3", "-c", &script]).hold());
    std::thread::sleep(Duration::from_millis(800));
    run.send("\n");
    run.wait_for("ready");
    world
        .native(sh("exec 3<>/dev/tcp/127.0.0.1/8080; cat <&3").prefixed(["bash", "-c", "exec \"$@\"", "x"]))
        .report();
    let mut stream = world.host.connect("127.0.0.1:8080").ok();
    if let Some(stream) = &mut stream {
        let _ = std::io::Read::read(stream, &mut [0; 10]);
    }
    drop(stream);
    run.release();
    run.finish(Duration::from_secs(20)).ok();
    let resolve = event(&trace, "resolve", |e| e["name"] == "origin.test");
    assert_eq!(resolve["code"], "NOERROR", "{resolve}");
    let connect = event(&trace, "connect", |e| e["peer"] == "10.77.0.2:80");
    assert_eq!(
        (&connect["program"], &connect["names"][0]),
        (&"python3".into(), &"origin.test".into()),
        "{connect}"
    );
    assert!(connect["pid"].as_u64().is_some_and(|pid| pid > 0));
    let denied = event(&trace, "denied", |e| e["address"] == "10.77.0.3");
    assert_eq!((&denied["port"], &denied["error"]), (&80.into(), &"EACCES".into()), "{denied}");
    assert!(denied["reason"].as_str().is_some_and(|reason| reason.contains("10.77.0.3")), "{denied}");
    let listen = event(&trace, "listen", |_| true);
    assert!(listen["published"].as_str().is_some_and(|p| p.ends_with(":8080")), "{listen}");
    let closed = event(&trace, "closed", |e| e["direction"] == "out" && e["bytes_in"].as_u64() > Some(2510));
    assert!(closed["duration_us"].as_u64() > Some(0), "{closed}");
    event(&trace, "closed", |e| e["direction"] == "in");
    event(&trace, "datagram", |e| e["peer"] == "10.77.0.2:7007");
    // The trace found the session a moment after its start: `kso run --trace` would have told that too.
    for kind in ["session_end", "accept"] {
        event(&trace, kind, |_| true);
    }
    let connects =
        lines(&trace).iter().filter(|e| e["event"] == "connect" && e["peer"] == "10.77.0.2:80").count();
    assert_eq!(connects, 1, "one line for each connect: {}", trace.text());
    for part in ["origin.test", "EACCES", "listen(", "closed("] {
        assert!(text.text().contains(part), "{part}: {}", text.text());
    }
    assert!(!text.text().contains('\x1b'), "no colours where there is no terminal");
}

#[test]
fn ps_lists_sessions_listeners_and_connections() {
    let world = World::new();
    world.http();
    let _udp = UdpEcho::start(&world.origin, "10.77.0.2:7007");
    world.kso_command(["ps"]).run().ok().shows("no sessions");
    let mut run = world
        .start("--name web -p 8080:80 --deny 10.77.0.3", argv(["/usr/bin/python3", "-c", SESSION]).hold());
    run.wait_for("ready");
    let report = world.kso_command(["ps", "--json"]).run().ok();
    let report: Value =
        serde_json::from_str(&report.text()).unwrap_or_else(|e| panic!("{e}: {}", report.report()));
    let session = &report["sessions"][0];
    assert_eq!(session["name"], "web", "{report}");
    assert_eq!((&session["denied"], &session["flows"]), (&1.into(), &1.into()), "{session}");
    assert!(session["listeners"][0]["outside"].as_str().is_some_and(|a| a.ends_with(":8080")), "{session}");
    assert!(session["listeners"][0]["inside"].as_str().is_some_and(|a| a.ends_with(":80")), "{session}");
    let connections = session["connections"].as_array().cloned().unwrap_or_default();
    assert!(
        connections.iter().any(|c| c["peer"] == "10.77.0.2:80" && c["program"] == "python3"),
        "{session}"
    );
    let text = world.kso_command(["ps"]).run().ok();
    for part in ["web", ":8080", "python3", "10.77.0.2:80"] {
        assert!(text.text().contains(part), "{part}: {}", text.report());
    }
    world.kso_command(["ps", "nobody"]).run().exits(1);
    drop(run);
    world.nothing_left();
    // A killed kso's socket is swept.
    world.kso_command(["ps"]).run().ok().shows("no sessions");
}

#[test]
fn run_with_trace_and_verbose_say_what_happens() {
    let world = World::new();
    world.http();
    let out = world
        .kso(
            "--trace --deny 10.77.0.3",
            sh("curl -sS http://origin.test/hello; curl -sS http://10.77.0.3/; true"),
        )
        .ok();
    for part in ["resolve(origin.test", "connect(origin.test ", "10.77.0.3", "EACCES"] {
        assert!(out.errors().contains(part), "{part}: {}", out.report());
    }
    assert_eq!(out.text(), "hello from origin\n", "standard output is the program's alone");
    let quiet = world.kso("", sh("curl -s http://origin.test/hello")).ok();
    assert!(quiet.errors().is_empty(), "kso is silent unless asked: {}", quiet.report());
}

#[test]
fn metrics_on_an_address_and_on_a_unix_socket() {
    let world = World::new();
    world.http();
    let socket = world.path("metrics.sock");
    for (flag, curl) in [
        ("127.0.0.1:9464".to_owned(), "curl -sS http://127.0.0.1:9464/metrics".to_owned()),
        (format!("unix:{socket}"), format!("curl -sS --unix-socket {socket} http://localhost/metrics")),
    ] {
        let script = "curl -sS http://origin.test/hello; curl -sS http://10.77.0.3/; echo ready; read x";
        let mut run = world.start(&format!("--metrics {flag} --deny 10.77.0.3"), sh(script).hold());
        run.wait_for("ready");
        let out = world.native(sh(curl)).ok();
        for part in ["kso_connects_total{", "kso_denials_total 1", "kso_sessions 1", "# EOF"] {
            assert!(out.text().contains(part), "{part}: {}", out.report());
        }
        drop(run);
        world.nothing_left();
    }
}

#[test]
fn the_broker_as_a_daemon() {
    let world = World::new();
    world.http();
    let _echo = world.echo(7007);
    let _udp = UdpEcho::start(&world.origin, "10.77.0.2:7007");
    let socket = world.path("broker.sock");
    let mut broker = world
        .kso_command(["broker", "--listen", &socket, "--deny", "10.77.0.3", "--metrics", "127.0.0.1:9464"])
        .spawn();
    wait_until("the broker's socket", Duration::from_secs(10), || std::path::Path::new(&socket).exists());
    let flags = format!("--broker {socket}");
    world
        .kso(&flags, sh("curl -sS http://origin.test/hello http://[fd77::2]/hello"))
        .ok()
        .shows("hello from origin");
    // The broker's rules hold for all, whatever a session allows itself.
    world.kso(&format!("{flags} --allow *"), sh("curl -sS http://10.77.0.3/hello")).exits(7);
    world.kso(&format!("{flags} --allow 10.77.0.4"), sh("curl -sS http://10.77.0.2/hello")).exits(7);
    world
        .kso(&flags, sh("ping -c1 -W2 10.77.0.2; dig +short origin.test"))
        .ok()
        .shows("1 received")
        .shows("10.77.0.2");
    world
        .kso(&flags, argv(["/usr/bin/python3", &program("python_clients.py"), &world.ca()]))
        .ok()
        .shows("EpollSelector [b'ping'] 10");
    // Interception semantics by the daemon are the same.
    let interception = kso_tests::c_program("interception");
    for case in [
        "nonblocking",
        "errors",
        "pending",
        "epoll_modes",
        "duplicates",
        "passing",
        "threads",
        "interrupted",
        "half_close",
        "bound",
        "options_after",
    ] {
        world.same_ok(&flags, argv([interception.as_str(), case]));
    }
    let mut web = world.start(
        &format!("{flags} -p 8080:80 --name web"),
        argv(["/usr/bin/python3", "-m", "http.server", "80"]),
    );
    world.host.wait_for_port(8080);
    world.native(sh("curl -sS -o /dev/null -w '%{http_code}' http://127.0.0.1:8080/")).ok().shows("200");
    world.kso_command(["ps"]).run().ok().shows("web").shows(":8080");
    let second = world.kso(&format!("{flags} -p 8080:80"), sh("true"));
    assert!(second.code() != Some(0) && second.errors().contains("8080"), "{}", second.report());
    world.native(sh("curl -sS http://127.0.0.1:9464/metrics")).ok().shows("kso_sessions 1");
    // A killed session leaves nothing at the broker.
    web.signal(rustix::process::Signal::KILL);
    wait_until("the port is free again", Duration::from_secs(5), || !world.host.listens(8080));
    world.kso_command(["ps"]).run().ok().shows("no sessions");
    assert!(
        !web.running() || {
            std::thread::sleep(Duration::from_millis(300));
            !web.running()
        }
    );
    assert!(broker.running(), "{}", broker.errors());
    // The broker goes: a session that lives on says so, connects fail with an error, nothing hangs.
    let script = "curl -sS http://10.77.0.2/hello; echo ready; read x; curl -sS -m 10 http://10.77.0.2/hello; echo then $?";
    let mut run = world.start(&flags, sh(script).hold());
    run.wait_for("ready");
    broker.signal(rustix::process::Signal::KILL);
    wait_until("the broker ended", Duration::from_secs(5), || !broker.running());
    run.send("\n");
    let out = run.finish(Duration::from_secs(30));
    assert!(out.status.is_some(), "{}", out.report());
    assert!(!out.text().contains("then 0"), "{}", out.report());
    let none = world.kso(&flags, sh("true"));
    assert!(none.code() == Some(125) && none.errors().contains("broker.sock"), "{}", none.report());
    world.nothing_left();
}

#[test]
fn the_brokers_configuration_shows_the_place_of_an_error() {
    let world = World::new();
    for (text, part) in [
        ("sockt = \"/x\"\n", "sockt"),
        ("[policy]\nallow = [\"10.0.0.0/99\"]\n", "/99"),
        ("[policy]\nallow = \"x\n", "2"),
        ("[publish]\nports = \"9-1\"\n", "9-1"),
    ] {
        let path = world.file("kso.toml", text);
        let out = world.kso_command(["broker", "--config", &path]).run();
        assert!(!matches!(out.code(), None | Some(0)), "{text}: {}", out.report());
        assert!(out.errors().contains(part) && out.errors().contains("kso.toml"), "{part}: {}", out.report());
    }
}

#[test]
fn help_says_how() {
    let world = World::new();
    for words in
        [&["--help"][..], &["run", "--help"], &["ps", "--help"], &["trace", "--help"], &["broker", "--help"]]
    {
        world.kso_command(words.iter().copied()).run().ok().shows("Usage").shows("kso");
    }
    world.kso_command(["--version"]).run().ok().shows("kso ");
}
