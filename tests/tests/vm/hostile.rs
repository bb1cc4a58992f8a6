//! A guest whose root means harm.

use kso_tests::{EchoServer, World, argv, c_program, wait_until};

/// Opens AF_VSOCK itself, to ports of the host that have a meaning and to addresses that the policy denies.
const VSOCK: &str = "import socket\n\
    for cid,port in [(2,1),(2,3),(2,4),(0x0a4d0003,7007),(0x7f000001,8000)]:\n    \
        try:\n        \
            s=socket.socket(40,socket.SOCK_STREAM); s.settimeout(5); s.connect((cid,port))\n        \
            s.sendall(b'\\xff'*64); print('CONNECTED',hex(cid),port)\n    \
        except OSError as e: print('refused',e.errno)\n";

#[test]
fn a_program_gets_no_vsock_of_its_own() {
    let world = World::new();
    let denied = EchoServer::start(&world.origin, "10.77.0.3:7007");
    let secret = EchoServer::start(&world.host, "127.0.0.1:8000");
    let out = world.guest("--deny 10.77.0.3", argv(["/usr/bin/python3", "-c", VSOCK])).run().ok();
    assert!(!out.text().contains("CONNECTED"), "{}", out.report());
    assert_eq!((denied.accepted(), secret.accepted()), (0, 0), "{}", out.report());
    world.nothing_left();
}

/// Whatever root in the guest does to what its runner holds, the broker goes on and policy holds.
#[test]
fn garbage_on_the_streams_of_the_guests_init() {
    let world = World::new();
    let denied = EchoServer::start(&world.origin, "10.77.0.3:7007");
    let socket = world.path("broker.sock");
    let mut broker = world.kso_command(["broker", "--listen", &socket]).spawn();
    wait_until("the broker listens", crate::LIMIT, || std::fs::exists(&socket).unwrap_or(false));
    let hostile = c_program("hostile/guest_garbage");
    for what in ["random", "huge", "zeros", "close"] {
        let flags = format!("--broker {socket} --deny 10.77.0.3");
        let out = world.guest(&flags, argv([hostile.as_str(), what]).limit(kso_tests::seconds(30))).run();
        assert!(out.status.is_some(), "{what} hangs kso: {}", out.report());
        assert!(!out.errors().contains("panicked"), "{what}: {}", out.report());
        assert!(broker.running() && !broker.errors().contains("panicked"), "{what}: {}", broker.errors());
    }
    assert_eq!(denied.accepted(), 0);
    broker.terminate();
    world.nothing_left();
}
