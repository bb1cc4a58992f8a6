//! Programs that mean harm: no hang, no leak, no panic, no policy hole.
#![forbid(unsafe_code)]

use kso_tests::{EchoServer, Output, Resources, UdpEcho, World, argv, c_program, seconds, wait_until};

#[track_caller]
fn no_panic(out: &Output) {
    assert!(!out.errors().contains("panicked"), "{}", out.report());
}

#[test]
fn races_its_own_sockaddr() {
    let world = World::new();
    let _allowed = EchoServer::start(&world.origin, "10.77.0.2:7007");
    let denied = EchoServer::start(&world.origin, "10.77.0.3:7007");
    let race = c_program("hostile/race_sockaddr");
    let out = world.kso("--deny 10.77.0.3", argv([race.as_str(), "6000"]).limit(seconds(90)));
    no_panic(&out);
    eprintln!("{}", out.errors());
    out.ok().shows("wrong 0");
    assert_eq!(denied.accepted(), 0, "a denied origin saw a completed connection");
    world.nothing_left();
}

#[test]
fn races_descriptors_of_the_host_into_inside_calls() {
    let world = World::new();
    let _allowed = EchoServer::start(&world.origin, "10.77.0.2:7007");
    let denied = EchoServer::start(&world.origin, "10.77.0.3:7007");
    let secret = EchoServer::start(&world.host, "127.0.0.1:8000");
    let race = c_program("hostile/race_descriptor");
    for flags in ["--deny 10.77.0.3", "--deny 10.77.0.3 -p all"] {
        let out = world.kso(flags, argv([race.as_str(), "3000", "8000"]).limit(seconds(90)));
        no_panic(&out);
        out.ok().shows("reached 0");
    }
    assert_eq!(
        (denied.accepted(), secret.accepted()),
        (0, 0),
        "(denied origin, the host's loopback) saw a connection"
    );
    world.nothing_left();
}

#[test]
fn turns_sockets_into_something_else() {
    let world = World::new();
    let _allowed = EchoServer::start(&world.origin, "10.77.0.2:7007");
    let denied = EchoServer::start(&world.origin, "10.77.0.3:7007");
    let secret = EchoServer::start(&world.host, "127.0.0.1:8000");
    let misuse = c_program("hostile/misuse");
    let mut run = world.start("--deny 10.77.0.3 -p 8080:80", argv([misuse.as_str(), "transmute"]));
    run.wait_for("ready");
    assert!(!world.host.listens(8123), "an unpublished listener appeared outside");
    let out = run.finish(seconds(30));
    no_panic(&out);
    for line in [
        "denied by listener: 0",
        "host loopback by listener: 0",
        "denied by a dissolved socket: 0",
        "host loopback by a dissolved socket: 0",
    ] {
        assert!(out.text().contains(line), "{line}: {}", out.report());
    }
    assert_eq!((denied.accepted(), secret.accepted()), (0, 0));
    world.nothing_left();
}

#[test]
fn uses_another_abi() {
    let world = World::new();
    let _allowed = EchoServer::start(&world.origin, "10.77.0.2:7007");
    let denied = EchoServer::start(&world.origin, "10.77.0.3:7007");
    let out = world.kso("--deny 10.77.0.3", argv([c_program("hostile/foreign_abi")]).limit(seconds(30)));
    assert!(out.status.is_some(), "{}", out.report());
    no_panic(&out);
    for success in ["connect 0", "socketcall 0", "x32 connect 0", "io_uring_setup 3"] {
        assert!(!out.errors().contains(success), "{}", out.report());
    }
    assert_eq!(denied.accepted(), 0, "{}", out.report());
    world.nothing_left();
}

/// Threads that are started once when first needed: one carries epoll registrations, one makes sockets in advance.
const HELPERS: usize = 2;

/// Runs a case of `churn.c`, then looks at what kso still holds: of threads of which `alive` still live, three
/// descriptors each (the thread, its list of descriptors, and one of that).
#[track_caller]
fn churn(name: &str, alive: usize) {
    let world = World::new();
    let _echo = world.echo(7007);
    let program = c_program("hostile/churn");
    let mut run = world.start("", argv([program.as_str(), "idle", "0"]).hold());
    run.wait_for("done");
    let quiet = Resources::of(run.pid());
    drop(run);
    let mut run = world.start("", argv([program.as_str(), name, "4"]).hold());
    run.wait_for("done 0 alive");
    // Sockets of the dead take a moment.
    let after = Resources::settled(run.pid(), |after| {
        after.threads <= quiet.threads + HELPERS && after.descriptors <= quiet.descriptors + 6 + 3 * alive
    });
    assert!(after.threads <= quiet.threads + HELPERS, "threads: {quiet:?} {after:?}");
    assert!(after.descriptors <= quiet.descriptors + 6 + 3 * alive, "descriptors: {quiet:?} {after:?}");
    assert!(after.resident <= quiet.resident + 6000, "memory: {quiet:?} {after:?}");
    let out = run.terminate();
    no_panic(&out);
    world.nothing_left();
}

#[test]
fn forks_while_calls_are_pending() {
    churn("forks", 21);
}

#[test]
fn exits_mid_call() {
    churn("exits", 0);
}

#[test]
fn closes_descriptors_under_the_supervisor() {
    // Sockets that were replaced in mid-call go by the TUN, to a host that does not answer: some are under way still.
    churn("closes", 12);
}

#[test]
fn is_killed_at_any_moment() {
    churn("kills", 0);
}

#[test]
fn is_stopped_and_signalled_all_the_time() {
    churn("signals", 0);
}

fn acceptor(world: &World) {
    for port in ["7008", "7009"] {
        let mut server = world.at_origin(argv([c_program("acceptor").as_str(), port])).spawn();
        server.wait_for("ready");
        world.keep(server);
    }
}

#[test]
fn opens_twenty_thousand_connections() {
    let world = World::new();
    acceptor(&world);
    let storm = c_program("storm");
    let mut run = world.start("", argv([storm.as_str(), "held", "20000"]).hold());
    wait_until("20000 connections", seconds(60), || run.text().contains("open 20000"));
    assert!(run.text().contains("open 20000 bad 0"), "{} {}", run.text(), run.errors());
    let held = Resources::settled(run.pid(), |held| held.descriptors < 100);
    assert!(held.descriptors < 100, "kso holds a descriptor per connection: {held:?}");
    assert!(held.threads < 10, "{held:?}");
    assert!(held.resident < 15_000 + 20_000 * 4, "{held:?}");
    run.release();
    let out = run.finish(seconds(90));
    no_panic(&out);
    out.ok().shows("echoed, bad 0");
    world.nothing_left();
}

#[test]
fn twenty_thousand_short_connections_leave_kso_as_it_was() {
    let world = World::new();
    acceptor(&world);
    let mut run = world.start("", argv([c_program("storm").as_str(), "short", "20000"]).hold());
    wait_until("a first tenth", seconds(60), || run.text().contains("rate"));
    let early = Resources::of(run.pid());
    wait_until("the last", seconds(90), || run.text().contains("bad "));
    assert!(run.text().contains("bad 0"), "{} {}", run.text(), run.errors());
    let may = |late: &Resources| late.descriptors <= early.descriptors + 3 && late.threads <= early.threads;
    let late = Resources::settled(run.pid(), may);
    assert!(may(&late), "{early:?} {late:?}");
    assert!(late.resident <= early.resident + 1000, "{early:?} {late:?}");
    run.release();
    run.finish(seconds(90)).ok();
    world.nothing_left();
}

#[track_caller]
fn misuse(name: &str, flags: &str) -> Output {
    let world = World::new();
    let _echo = world.echo(7007);
    let _udp = ["10.77.0.2:7007", "10.77.0.3:7007"].map(|address| UdpEcho::start(&world.origin, address));
    let machine = std::fs::read_link("/proc/self/ns/pid").expect("/proc").display().to_string();
    let cmd = argv([c_program("hostile/misuse").as_str(), name]).env("KSO_MACHINE_PIDNS", machine);
    let out = world.kso(flags, cmd.limit(seconds(60)));
    no_panic(&out);
    let out = out.ok();
    world.nothing_left();
    out
}

#[test]
fn has_few_descriptors() {
    misuse("few_descriptors", "").shows("enough");
}

#[test]
fn sends_junk_to_the_tun() {
    misuse("junk", "").shows("after junk: 0 alive").shows("and udp");
}

#[test]
fn opens_more_flows_than_any_bound() {
    misuse("flows", "").shows("last\n0");
}

#[test]
fn sends_syns_without_end() {
    misuse("syns", "").shows("0 alive");
}

#[test]
fn kills_its_init() {
    misuse("kill_init", "").shows("0 alive");
}

#[test]
fn has_a_filter_of_its_own() {
    misuse("own_filter", "").shows("0 alive");
}
