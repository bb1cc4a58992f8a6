//! Several guests at once, and guests that talk to each other.

use crate::{LIMIT, everything};
use kso_tests::{Running, World, argv, sh, wait_until};
use std::io::{Read, Write};

const SERVE: &str = "import http.server,sys\n\
    class H(http.server.BaseHTTPRequestHandler):\n    \
        def do_GET(self):\n        \
            b=sys.argv[1].encode(); self.send_response(200); self.send_header('Content-Length',str(len(b)))\n        \
            self.end_headers(); self.wfile.write(b)\n    \
        def log_message(self,*a): pass\n\
    s=http.server.ThreadingHTTPServer(('0.0.0.0',80),H); print('serving',flush=True); s.serve_forever()\n";

fn get(world: &World, port: u16) -> String {
    let mut text = String::new();
    let mut stream = match world.host.connect(&format!("127.0.0.1:{port}")) {
        Ok(stream) => stream,
        Err(error) => return error.to_string(),
    };
    let _ = stream.write_all(b"GET / HTTP/1.0\r\n\r\n");
    let _ = stream.read_to_string(&mut text);
    text
}

#[test]
fn many_guests_serve_at_once() {
    let world = World::new();
    // 24 of them take 6 GiB and some minutes of an emulated start: `make test-all`.
    let count: u16 = if everything() { 24 } else { 6 };
    let mut guests: Vec<Running> = (0..count)
        .map(|i| {
            let flags = format!("--memory 256 --boot-timeout 600 -p {}:80", 8100 + i);
            let cmd = argv(["/usr/bin/python3", "-c", SERVE, &format!("guest {i}.")]);
            world.guest(&flags, cmd).spawn()
        })
        .collect();
    let limit = LIMIT * (1 + u32::from(count) / 6);
    for guest in &mut guests {
        wait_until("all serve", limit, || {
            assert!(guest.running(), "{}{}", guest.text(), guest.errors());
            guest.text().contains("serving")
        });
    }
    for round in 0..3 {
        for i in 0..count {
            let answer = get(&world, 8100 + i);
            assert!(answer.ends_with(&format!("guest {i}.")), "round {round}, guest {i}: {answer:?}");
        }
    }
    for guest in guests {
        guest.terminate();
    }
    world.nothing_left();
}

/// A broker with two guests: one serves, the other asks.
fn pair(world: &World, ask: &str) -> kso_tests::Output {
    let socket = world.path("broker.sock");
    let broker = world.kso_command(["broker", "--listen", &socket]).spawn();
    wait_until("the broker listens", LIMIT, || std::fs::exists(&socket).unwrap_or(false));
    let serve = argv(["/usr/bin/python3", "-c", SERVE, "the other guest"]);
    let mut server = world.guest(&format!("--broker {socket} --name web -p 8080:80"), serve).spawn();
    server.wait_for("serving");
    let flags = format!("--broker {socket} --name asker --allow web.kso.internal --allow host:8080");
    let out = world.guest(&flags, sh(ask)).run();
    server.terminate();
    broker.terminate();
    out
}

#[test]
fn one_guest_reaches_another_by_name_and_by_its_published_port() {
    let world = World::new();
    let ask = "curl -sS http://web.kso.internal:80/; echo; curl -sS http://host.kso.internal:8080/; echo";
    let out = pair(&world, ask).ok();
    assert_eq!(out.text(), "the other guest\nthe other guest\n", "{}", out.report());
    world.nothing_left();
}

#[test]
fn a_guest_that_may_not_reach_another_does_not() {
    let world = World::new();
    let socket = world.path("broker.sock");
    let broker = world.kso_command(["broker", "--listen", &socket]).spawn();
    wait_until("the broker listens", LIMIT, || std::fs::exists(&socket).unwrap_or(false));
    let serve = argv(["/usr/bin/python3", "-c", SERVE, "the other guest"]);
    let mut server = world.guest(&format!("--broker {socket} --name web -p 8080:80"), serve).spawn();
    server.wait_for("serving");
    let script =
        "curl -sS -m 5 http://web.kso.internal:80/; curl -sS -m 5 http://host.kso.internal:8080/; true";
    for flags in ["", "--allow 10.77.0.2"] {
        let out = world.guest(&format!("--broker {socket} {flags}"), sh(script)).run().ok();
        assert_eq!(out.text(), "", "{flags}: {}", out.report());
    }
    server.terminate();
    broker.terminate();
    world.nothing_left();
}

#[test]
fn a_guest_that_dies_harms_no_other_of_its_broker() {
    let world = World::new();
    let socket = world.path("broker.sock");
    let mut broker = world.kso_command(["broker", "--listen", &socket]).spawn();
    wait_until("the broker listens", LIMIT, || std::fs::exists(&socket).unwrap_or(false));
    let start = |name: &str, port: u16| {
        let serve = argv(["/usr/bin/python3", "-c", SERVE, name]);
        world.guest(&format!("--broker {socket} --name {name} -p {port}:80"), serve).spawn()
    };
    let (mut steady, mut dying) = (start("steady", 8080), start("dying", 8081));
    steady.wait_for("serving");
    dying.wait_for("serving");
    assert!(get(&world, 8081).ends_with("dying"));
    dying.signal(rustix::process::Signal::KILL);
    dying.finish(LIMIT);
    wait_until("its port is free", LIMIT, || !world.host.listens(8081));
    assert!(get(&world, 8080).ends_with("steady"));
    let crash = world.guest(&format!("--broker {socket}"), sh("echo c > /proc/sysrq-trigger; sleep 100"));
    crash.run().exits(125);
    assert!(get(&world, 8080).ends_with("steady"));
    assert!(broker.running());
    steady.terminate();
    broker.terminate();
    world.nothing_left();
}
