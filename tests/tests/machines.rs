//! Linux in a virtual machine as an external kernel: the programs of the host, its own TCP/IP, its disks; and its deaths.
#![forbid(unsafe_code)]

use kso_tests::{Cmd, Death, External, Running, World, argv, seconds, sh, wait_until};
use std::io::{Read, Write};
use std::time::Instant;

/// For what waits for a machine that is emulated on a busy host.
const LIMIT: std::time::Duration = seconds(120);

/// A program that says by which addresses it is connected, asks the peer from where, and reads to the end.
fn client(address: &str, port: u16) -> Cmd {
    let script = format!(
        "import socket\n\
         s = socket.create_connection(('{address}', {port}), 30)\n\
         print('from', s.getsockname()[0], 'to', s.getpeername(), flush=True)\n\
         s.sendall(b'a')\n\
         s.shutdown(socket.SHUT_WR)\n\
         print('told', s.makefile().read().split()[0], flush=True)\n"
    );
    argv(["python3", "-c", &script])
}

/// A server that greets, echoes one message, and never ends.
const SERVER: &str = "import socket, threading\n\
    l = socket.create_server(('0.0.0.0', 80), backlog=64)\n\
    print('ready', l.getsockname(), flush=True)\n\
    def serve(c, a):\n    \
        c.sendall(('hello ' + a[0]).encode())\n    \
        try:\n        c.sendall(c.recv(100)); c.recv(1)\n    \
        except OSError as e: print('error', e.strerror, flush=True)\n    \
        c.close()\n\
    while True:\n    \
        threading.Thread(target=serve, args=l.accept(), daemon=True).start()\n";

/// The server, once it listens.
fn serve(world: &World, flags: &str) -> Running {
    let running = world.start(flags, argv(["python3", "-c", SERVER]));
    wait_until("the server listens", LIMIT, || running.text().contains("ready ('0.0.0.0', 80)"));
    running
}

#[test]
fn a_machine_performs_the_tcp_of_a_program() {
    let world = World::new();
    let kernel = format!("--kernel {}", External::machine(&world, "").flag);
    let _echo = world.echo(7000);
    let out = world.kso(&kernel, client("10.80.0.1", 7000).limit(LIMIT));
    assert!(out.text().contains("from 10.80.0.2 to ('10.80.0.1', 7000)"), "{}", out.report());
    assert!(out.text().contains("told 10.80.0.2"), "{}", out.report());
    // Names are the host's; the connection is not.
    world.http();
    world.kso(&kernel, sh("curl -sS -m 60 http://origin.test/hello").limit(LIMIT)).ok();
    let log = world.http().log();
    assert!(log.contains("10.80.0.2"), "{log}");
    // A refusal is one, and a reset.
    world.kso(&kernel, sh("curl -sS -m 60 http://10.80.0.1:9/").limit(LIMIT)).exits(7);
    let listener = world.origin.listen("0.0.0.0:7001");
    let resetting = std::thread::spawn(move || {
        let (mut peer, _) = listener.accept().expect("it connects");
        peer.read_exact(&mut [0]).expect("it sends");
        rustix::net::sockopt::set_socket_linger(&peer, Some(std::time::Duration::ZERO)).expect("linger");
    });
    let script = "import socket\ns = socket.create_connection(('10.80.0.1', 7001), 30)\n\
                  s.sendall(b'a')\ntry: s.recv(1)\nexcept OSError as e: print(e.strerror)\n";
    world.kso(&kernel, argv(["python3", "-c", script]).limit(LIMIT)).ok().shows("Connection reset by peer");
    resetting.join().expect("it was reset");
    world.nothing_left();
}

#[test]
fn a_blocked_socket_stalls_no_other() {
    let world = World::new();
    let kernel = format!("--kernel {}", External::machine(&world, "").flag);
    let _echo = world.echo(7000);
    // Accepted by the kernel, read by nobody.
    let _deaf = world.origin.listen("0.0.0.0:7001");
    let script = "import socket, threading\n\
        deaf = socket.create_connection(('10.80.0.1', 7001), 30)\n\
        deaf.settimeout(2)\n\
        try:\n    \
            while True: deaf.send(b'x' * 65536)\n\
        except TimeoutError: print('blocked', flush=True)\n\
        s = socket.create_connection(('10.80.0.1', 7000), 30)\n\
        data = b'e' + bytes(range(256)) * 16384\n\
        threading.Thread(target=lambda: (s.sendall(data), s.shutdown(socket.SHUT_WR)), daemon=True).start()\n\
        s.settimeout(60)\n\
        got = b''\n\
        while True:\n    \
            more = s.recv(1 << 20)\n    \
            if not more: break\n    \
            got += more\n\
        print('echoed', got == data[1:])\n";
    let out = world.kso(&kernel, argv(["python3", "-c", script]).limit(LIMIT)).ok();
    assert!(out.text().contains("blocked") && out.text().contains("echoed True"), "{}", out.report());
    world.nothing_left();
}

#[test]
fn a_machine_that_is_alone_takes_its_listeners_back_after_each_death() {
    let world = World::new();
    let machine = External::machine(&world, "");
    let flags = format!("--trace -p 8080:80 --kernel {}", machine.flag);
    let mut running = serve(&world, &flags);
    for (death, reason) in [
        (Death::Kill, "its machine ended (signal: 9"),
        (Death::Panic, "its kernel panicked: NMI"),
        (Death::Freeze, "it did not answer for 3000 ms"),
    ] {
        let mut peer = world.reach("10.80.0.2:8080");
        let mut text = [0; 15];
        peer.read_exact(&mut text).expect("a greeting");
        assert_eq!(&text, b"hello 10.80.0.1");
        peer.write_all(b"x").expect("it reads");
        peer.read_exact(&mut text[..1]).expect("an echo");
        let count = |text: String, what: &str| text.matches(what).count();
        let before = count(running.text(), "error Connection reset by peer");
        let down = count(running.errors(), "kernel deb down: ");
        let (process, died) = (machine.process(&running), Instant::now());
        machine.die(&running, death);
        wait_until("the program is told", LIMIT, || {
            count(running.text(), "error Connection reset by peer") > before
        });
        wait_until("its death is told", LIMIT, || count(running.errors(), "kernel deb down: ") > down);
        // On a busy host a panic may take longer than the kernel may be silent.
        let errors = running.errors();
        let told = errors.lines().rfind(|line| line.contains("kernel deb down: ")).unwrap_or_default();
        assert!(told.contains(reason) || told.contains("it did not answer"), "{told}");
        drop(world.reach("10.80.0.2:8080"));
        eprintln!("{}: back after {:?}", death.name(), died.elapsed());
        assert_ne!(machine.process(&running), process);
        assert!(running.running(), "the program noticed nothing");
    }
    drop(running);
    world.nothing_left();
}

#[test]
fn disks_are_mounted_and_left_in_order() {
    let world = World::new();
    let image = world.path("disk.img");
    sh(format!("truncate -s 32M {image} && mke2fs -q -t ext4 {image}")).run().ok();
    let machine = External::machine(&world, &format!(",disk={image}@/srv/data"));
    let _echo = world.echo(7000);
    let kernel = format!("--kernel {}", machine.flag);
    world.kso(&kernel, client("10.80.0.1", 7000).limit(LIMIT)).ok();
    let told = sh(format!("dumpe2fs -h {image} 2>/dev/null")).run().ok().text();
    assert!(told.contains("Mount count:              1"), "{told}");
    assert!(!told.contains("needs_recovery"), "{told}");
    // What it cannot mount it tells.
    let wrong = world.file("wrong.img", vec![0; 1 << 20]);
    let machine = External::machine(&world, &format!(",disk={wrong}@/srv:ro"));
    let out = world.kso(&format!("--kernel {}", machine.flag), sh("true").limit(LIMIT)).exits(125);
    assert!(out.errors().contains("cannot mount ext4"), "{}", out.report());
    world.nothing_left();
}

#[test]
fn a_machine_that_does_not_come_up_is_told() {
    let world = World::new();
    let kernel = |more: &str| format!("--kernel {}", External::machine(&world, more).flag);
    // It panics.
    let out = world.kso(&kernel(",append=rdinit=/nowhere"), sh("true").limit(LIMIT)).exits(125);
    assert!(out.errors().contains("its kernel panicked"), "{}", out.report());
    // It stands still.
    let out = world.kso(&kernel(",qemu=-S"), sh("true").limit(LIMIT)).exits(125);
    assert!(out.errors().contains("did not come up in time"), "{}", out.report());
    // QEMU refuses.
    let out = world.kso(&kernel(",qemu=-nonsense"), sh("true").limit(LIMIT)).exits(125);
    assert!(out.errors().contains("nonsense"), "{}", out.report());
    // There is no such kernel.
    let none = "--kernel deb=vm,kernel=1.0";
    let out = world.kso(none, sh("true").limit(LIMIT)).exits(125);
    assert!(out.errors().contains("kso kernels fetch 1.0"), "{}", out.report());
    world.nothing_left();
}

#[test]
fn a_machine_ends_with_its_broker() {
    let world = World::new();
    let machine = External::machine(&world, "");
    let flags = format!("--trace -p 8080:80 --kernel {}", machine.flag);
    let running = serve(&world, &flags);
    drop(world.reach("10.80.0.2:8080"));
    running.signal(rustix::process::Signal::KILL);
    running.finish(LIMIT);
    world.nothing_left();
    // In order, too.
    serve(&world, &flags).terminate();
    world.nothing_left();
    let left = sh(format!("ip -n {} link show type tun", world.origin.name())).run().ok();
    assert_eq!(left.text(), "", "a cable was left");
}
