//! What a program may do around `connect` and `listen`, natively and outsourced: the outputs are the same.
#![forbid(unsafe_code)]

use kso_tests::{FullBacklog, World, argv, c_program};

/// Runs a case of `tests/programs/interception.c` both ways.
#[track_caller]
fn case(name: &str) -> String {
    let world = World::new();
    let _echo = world.echo(7007);
    let out = world.same_ok("", argv([c_program("interception").as_str(), name]));
    world.nothing_left();
    out.text()
}

macro_rules! cases {
    ($($(#[$doc:meta])* $name:ident: $($text:literal),*;)*) => {$(
        $(#[$doc])*
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
    nonblocking: "dial(fd, ORIGIN, 7007) = EINPROGRESS", "EISCONN";
    pending: "dial(fd, BLACKHOLE, 80) = EALREADY", "another is not held up: events 4, other";
    errors: "10.77.0.2 9 blocking ECONNREFUSED", "192.0.2.1 80 blocking ENETUNREACH", "10.78.0.1 80 non-blocking EHOSTUNREACH";
    late_errors: "SO_ERROR ETIMEDOUT", "SO_ERROR EHOSTUNREACH", "= ETIMEDOUT", "= EHOSTUNREACH";
    epoll_modes: "mode 40000000\ndial(fd, ORIGIN, 7007) = EINPROGRESS\nconnected 1 data 123456789abcdef2";
    epoll_many: "in a: 2, sum 3";
    epoll_blocked: "woken with 42";
    duplicates: "one two", "cloexec 1 0 0 1";
    fork_after: "from child";
    exec_keeps: "after exec", "EBADF";
    threads: "bad 0";
    passing: "passed connected", "passed fresh", "parent: back";
    interrupted: "= EINTR", "bad 0 leaked 0";
    interrupted_storm: "few 1 leaked 0";
    options_before: "TCP_KEEPIDLE 77", "SO_LINGER 1 5", "TCP_CONGESTION reno", "IPV6_UNICAST_HOPS 44";
    options_after: "FIONREAD 5";
    options_on_listener: "SO_ACCEPTCONN 1";
    half_close: "got 6", "bye", "ECONNRESET";
    bound: "seen as it is named: 1", "seen as 10.77.0.1 5555", "same port: 1 1", "EADDRINUSE";
    mapped: "peer ::ffff:10.77.0.2 7007, mapped";
    bad_arguments: "after all that", "EFAULT";
    inside: "peer agrees 1";
    shutdown_pending: "soon: 1";
    files: "got 8010";
    blocked_elsewhere: "in time: 1";
    vfork_child: "the child's connect: 0";
}

/// Runs a case both ways: what differs is `differences` (natively, under kso) and nothing else. Each is explained in
/// docs/semantics.md.
#[track_caller]
fn differs(name: &str, differences: &[(&str, &str)]) {
    let world = World::new();
    let _echo = world.echo(7007);
    let cmd = argv([c_program("interception").as_str(), name]);
    let mut native = world.native(cmd.clone()).ok().text();
    for (natively, outsourced) in differences {
        assert!(native.contains(natively), "{natively:?} natively: {native}");
        native = native.replacen(natively, outsourced, 1);
    }
    assert_eq!(world.kso("", cmd).ok().text(), native);
    world.nothing_left();
}

#[test]
fn timeouts() {
    differs("timeouts", &[("dial(fd, BLACKHOLE, 80) = EINPROGRESS", "dial(fd, BLACKHOLE, 80) = EALREADY")]);
}

#[test]
fn again() {
    // A socket of the host's has no way back inside.
    differs("again", &[("port_of(server)) = 0", "port_of(server)) = EADDRNOTAVAIL")]);
}

#[test]
fn fastopen() {
    differs("fastopen", &[("a.length) = 5\nfast", "a.length) = EOPNOTSUPP\n")]);
}

#[test]
fn fork_before() {
    differs("fork_before", &[("child: hello", "child: EPIPE")]);
}

/// The other side's full queue keeps connects pending; they succeed once it accepts.
#[test]
fn a_pending_connect_succeeds_later() {
    let world = World::new();
    let backlog = FullBacklog::start(&world.origin, "10.77.0.2:7011");
    let client = argv([c_program("pending_then").as_str(), "10.77.0.2", "7011"]);
    let mut runs = vec![world.at_host(client.clone()).spawn()];
    runs.push(world.start("", client));
    for run in &mut runs {
        run.wait_for("pending");
    }
    let start = std::time::Instant::now();
    let mut streams = Vec::new();
    kso_tests::wait_until("all connected", kso_tests::seconds(20), || {
        streams.extend(backlog.drain());
        runs.iter().all(|run| run.text().contains("both connected"))
    });
    assert!(start.elapsed() < kso_tests::seconds(20));
    drop(streams);
    for run in runs {
        run.finish(kso_tests::seconds(20)).ok();
    }
    world.nothing_left();
}
