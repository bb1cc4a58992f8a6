//! Kernels of other make: the same programs, their TCP performed by gVisor, or by Linux in another namespace; and what
//! programs notice when such a kernel dies.
#![forbid(unsafe_code)]

use kso_tests::{Cmd, Running, World, argv, has_gvisor, kso_binary, seconds, sh, wait_until};
use rustix::process::Signal;
use std::io::{ErrorKind, Read, Write};
use std::time::{Duration, Instant};

/// gVisor on a cable to the origin.
const GVISOR: &str = "gvisor,address=10.79.0.2/24,gateway=10.79.0.1,patience_ms=1000";

/// Flags for gVisor; `None` where runsc is not installed: `kso doctor` says how.
fn gvisor(world: &World) -> Option<String> {
    if !has_gvisor() {
        return None;
    }
    Some(format!("{GVISOR},attach=netns:/run/netns/{}", world.origin.name()))
}

/// A program that says by which addresses it is connected, asks the peer from where, and reads to the end.
fn client(address: &str, port: u16) -> Cmd {
    let script = format!(
        "import socket\n\
         s = socket.create_connection(('{address}', {port}), 10)\n\
         print('from', s.getsockname()[0], 'to', s.getpeername(), flush=True)\n\
         s.sendall(b'a')\n\
         s.shutdown(socket.SHUT_WR)\n\
         print('told', s.makefile().read().split()[0], flush=True)\n"
    );
    argv(["python3", "-c", &script])
}

/// A server that greets, echoes one message, and never ends.
fn server(world: &World, flags: &str) -> Running {
    let script = "import socket, threading\n\
        l = socket.create_server(('0.0.0.0', 80), backlog=64)\n\
        print('ready', l.getsockname(), flush=True)\n\
        def serve(c, a):\n    \
            c.sendall(('hello ' + a[0]).encode())\n    \
            try:\n        c.sendall(c.recv(100)); c.recv(1)\n    \
            except OSError as e: print('error', e.strerror, flush=True)\n    \
            c.close()\n\
        while True:\n    \
            threading.Thread(target=serve, args=l.accept(), daemon=True).start()\n";
    let mut server = world.start(flags, argv(["python3", "-c", script]));
    server.wait_for("ready ('0.0.0.0', 80)");
    server
}

/// Processes of the sandbox of gVisor that kso started.
fn sandboxes(running: &Running) -> Vec<i32> {
    let name = format!("kso-{}-", running.pid());
    let found = sh(format!("pgrep -f 'runsc-sandbox.*{name}' || true")).run();
    found.text().split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

fn signal(pid: i32, signal: Signal) {
    let pid = rustix::process::Pid::from_raw(pid).expect("a process");
    let _ = rustix::process::kill_process(pid, signal);
}

#[test]
fn gvisor_performs_the_tcp_of_a_program() {
    let world = World::new();
    let Some(kernel) = gvisor(&world) else { return };
    let kernel = format!("--kernel {kernel}");
    let _echo = world.echo(7000);
    let out = world.kso(&kernel, client("10.79.0.1", 7000).limit(seconds(30)));
    assert!(out.text().contains("from 10.79.0.2 to ('10.79.0.1', 7000)"), "{}", out.report());
    assert!(out.text().contains("told 10.79.0.2"), "{}", out.report());
    // Names are the host's; the connection is not.
    world.http();
    world.kso(&kernel, sh("curl -sS -m 10 http://origin.test/hello")).ok();
    let log = world.http().log();
    assert!(log.contains("10.79.0.2"), "{log}");
    // A refusal is one.
    let refused = world.kso(&kernel, sh("curl -sS -m 10 http://10.79.0.1:9/"));
    assert!(refused.code() == Some(7) && refused.elapsed < seconds(8), "{}", refused.report());
    // Policy is the same.
    let denied = world.kso(&format!("{kernel} --deny 10.79.0.1"), sh("curl -sS -m 10 http://10.79.0.1:9/"));
    assert!(denied.errors().contains("denied") || denied.code() == Some(7), "{}", denied.report());
    world.nothing_left();
}

#[test]
fn linux_in_another_namespace_performs_the_tcp_of_a_program() {
    let world = World::new();
    let path = world.path("provider.sock");
    let provider =
        world.at_origin(argv([&kso_binary(), "provide", "--listen", &format!("unix:{path}")])).spawn();
    wait_until("the provider", seconds(10), || std::fs::exists(&path).unwrap_or(false));
    let kernel = format!("p=provider,path={path}");
    let _echo = world.echo(7000);
    // Its loopback is there, too.
    for address in ["10.77.0.2", "10.77.0.3"] {
        let out = world.kso(&format!("--kernel {kernel}"), client(address, 7000));
        assert!(out.text().contains("told "), "{}", out.report());
    }
    // A listener of the sandbox is one of the other namespace.
    let mut running = server(&world, &format!("-p 8080:80 --kernel {kernel}"));
    world.origin.wait_for_port(8080);
    let mut peer = world.origin.connect("127.0.0.1:8080").expect("published there");
    let mut text = [0; 15];
    peer.read_exact(&mut text).expect("a greeting");
    assert_eq!(&text, b"hello 127.0.0.1");
    // When the provider dies its connections are reset, and the program goes on.
    provider.signal(Signal::KILL);
    let error = peer.read(&mut text).expect_err("its connection is reset");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    running.wait_for("error Connection reset by peer");
    // When one is there again the listener is back.
    let again =
        world.at_origin(argv([&kso_binary(), "provide", "--listen", &format!("unix:{path}")])).spawn();
    wait_until("the listener", seconds(10), || world.origin.connect("127.0.0.1:8080").is_ok());
    assert!(running.running());
    drop(running);
    drop(again);
    world.nothing_left();
}

#[test]
fn a_listener_moves_when_its_kernel_dies_or_hangs() {
    let world = World::new();
    let Some(kernel) = gvisor(&world) else { return };
    let flags = format!("-p 8080:80 --external {kernel} --via tcp-listen:80=gvisor,host");
    let mut running = server(&world, &flags);
    let rounds = std::env::var("KSO_TEST_DEATHS").ok().and_then(|text| text.parse().ok()).unwrap_or(2);
    let mut times = Vec::new();
    for round in 0..rounds {
        let mut peer = connect_to(|| world.origin.connect("10.79.0.2:8080"));
        let mut text = [0; 15];
        peer.read_exact(&mut text).expect("a greeting");
        assert_eq!(&text, b"hello 10.79.0.1");
        peer.write_all(b"x").expect("it reads");
        let sandbox = *sandboxes(&running).first().expect("gVisor runs");
        signal(sandbox, if round % 2 == 0 { Signal::KILL } else { Signal::STOP });
        let died = Instant::now();
        let mut there = connect_to(|| world.host.connect("127.0.0.1:8080"));
        there.read_exact(&mut text).expect("a greeting");
        times.push(died.elapsed());
        assert!(died.elapsed() < seconds(3), "{:?}", died.elapsed());
        running.wait_for("error Connection reset by peer");
        drop(there);
        // Away from the host again: by the death of what serves there, which is this kso's own thread, it cannot be; so a
        // new program is started for the next round.
        drop(running);
        running = server(&world, &flags);
    }
    eprintln!("failover: {times:?}");
    drop(running);
    world.nothing_left();
}

#[test]
fn a_kernel_that_is_alone_takes_its_listeners_back_after_its_death() {
    let world = World::new();
    let Some(kernel) = gvisor(&world) else { return };
    let mut running = server(&world, &format!("-p 8080:80 --kernel {kernel}"));
    for _ in 0..2 {
        drop(connect_to(|| world.origin.connect("10.79.0.2:8080")));
        let sandbox = *sandboxes(&running).first().expect("gVisor runs");
        signal(sandbox, Signal::KILL);
        wait_until("its death", seconds(5), || !sandboxes(&running).contains(&sandbox));
        drop(connect_to(|| world.origin.connect("10.79.0.2:8080")));
        assert!(running.running(), "the program noticed nothing");
    }
    drop(running);
    world.nothing_left();
}

/// Connects, again and again for three seconds.
fn connect_to(connect: impl Fn() -> std::io::Result<std::net::TcpStream>) -> std::net::TcpStream {
    let until = Instant::now() + seconds(3);
    loop {
        match connect() {
            Ok(stream) => {
                stream.set_read_timeout(Some(seconds(5))).expect("a timeout");
                return stream;
            }
            Err(error) if Instant::now() > until => panic!("nobody listens: {error}"),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}
