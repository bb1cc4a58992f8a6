//! `kso doctor`, `kso kernels`, and a broker whose configuration has kernels and routes.
#![forbid(unsafe_code)]

use kso_tests::{Cmd, Running, World, argv, kso_binary, seconds, sh, wait_until};
use serde_json::Value;
use std::fs;

/// What kso prints as JSON, whatever its status.
fn json(world: &World, words: &[&str]) -> (Value, Option<i32>) {
    let out = world.kso_command(words.iter().copied()).run();
    let value = serde_json::from_str(&out.text()).unwrap_or_else(|error| panic!("{error}: {}", out.report()));
    (value, out.code())
}

#[test]
fn the_doctor_tells_what_can_run_and_what_is_missing() {
    let world = World::new();
    // These tests run: so can kso run.
    let (told, code) = json(&world, &["doctor", "run", "--json"]);
    assert_eq!((&told["can"]["run"], code), (&Value::Bool(true), Some(0)), "{told}");
    let checks = told["subjects"][0]["checks"].as_array().cloned().unwrap_or_default();
    assert!(checks.iter().any(|check| check["name"] == "a sandbox" && check["state"] == "ok"), "{told}");
    // Without QEMU there is no kso vm, and the doctor says what to install.
    let nothing = world.path("nothing");
    fs::create_dir(&nothing).expect("a directory");
    let poor = world.native(sh(format!("PATH={nothing} exec {} doctor vm", kso_binary()))).exits(1);
    let poor = poor.shows("missing  QEMU").shows("apt-get install qemu-system").shows("kso vm");
    assert!(!poor.text().contains('\x1b'), "no colours where there is no terminal");
    // What is not asked for does not count.
    let rest = world.kso_command(["doctor"]).limit(seconds(400)).run();
    rest.ok().shows("kso run").shows("--kernel host").shows("--kernel gvisor");
    let strange = world.kso_command(["doctor", "nonsense"]).run().exits(125);
    assert!(
        strange.errors().contains("nonsense") && strange.errors().contains("gvisor"),
        "{}",
        strange.report()
    );
    world.nothing_left();
}

#[test]
fn kso_guest_says_what_it_lacks_where_there_is_no_broker() {
    let world = World::new();
    let out = world.kso_command(["guest", "--", "true"]).run().exits(125);
    assert!(out.errors().contains("cannot reach the broker by vsock"), "{}", out.report());
    let out = world.kso_command(["guest", "--user", "nobody-of-this-name", "--", "true"]).run().exits(125);
    assert!(out.errors().contains("/etc/passwd"), "{}", out.report());
    let kso = world.path("kso");
    fs::copy(kso_binary(), &kso).expect("a copy that anybody can read");
    let unprivileged = format!(
        "cd /; exec setpriv --reuid=1000 --regid=1000 --clear-groups --inh-caps=-all {kso} guest -- true"
    );
    let out = world.native(sh(unprivileged)).exits(125);
    assert!(out.errors().contains("root"), "{}", out.report());
}

/// A provider in the origin's namespace.
fn provider(world: &World) -> (Running, String) {
    let path = world.path("provider.sock");
    let listen = format!("unix:{path}");
    let provider = world.at_origin(argv([&kso_binary(), "provide", "--listen", &listen])).spawn();
    wait_until("the provider", seconds(30), || fs::exists(&path).unwrap_or(false));
    (provider, path)
}

/// Says from which address the echo server saw it come.
fn ask() -> Cmd {
    let script = "import socket\n\
        s = socket.create_connection(('10.77.0.2', 7000), 20)\n\
        s.sendall(b'a')\n\
        s.shutdown(socket.SHUT_WR)\n\
        print('told', s.makefile().read().split()[0])\n";
    argv(["python3", "-c", script])
}

fn kernel(world: &World, name: &str) -> Value {
    let (told, _) = json(world, &["kernels", "--json"]);
    let all = told["external"].as_array().cloned().unwrap_or_default();
    all.into_iter().find(|kernel| kernel["name"] == name).unwrap_or_else(|| panic!("no {name}: {told}"))
}

#[test]
fn a_broker_has_the_kernels_and_routes_of_its_configuration() {
    let world = World::new();
    let _echo = world.echo(7000);
    let (provider, path) = provider(&world);
    let socket = world.path("broker.sock");
    let config = format!(
        "socket = \"{socket}\"\n\
         [metrics]\nlisten = \"127.0.0.1:9464\"\n\
         [kernel.p]\nmake = \"provider\"\npath = \"{path}\"\n\
         [kernel.spare]\nmake = \"provider\"\npath = \"/nonexistent\"\n\
         [[route]]\nservices = [\"tcp-connect\"]\nports = \"7000\"\nstrategy = \"failover\"\nkernels = [\"p\", \"host\"]\n"
    );
    let config = world.file("kso.toml", config);
    let mut broker = world.kso_command(["broker", "--config", &config]).spawn();
    wait_until("the broker's socket", seconds(30), || {
        assert!(broker.running(), "{}", broker.errors());
        fs::exists(&socket).unwrap_or(false)
    });
    let flags = format!("--broker {socket}");
    // There its own address is the echo server's neighbour: itself.
    world.kso(&flags, ask()).ok().shows("told 10.77.0.2");
    let up = kernel(&world, "p");
    assert_eq!(
        (&up["make"], &up["state"], &up["deaths"]),
        (&"provider".into(), &"up".into(), &0.into()),
        "{up}"
    );
    assert!(up["version"].as_str().is_some_and(|version| !version.is_empty()), "{up}");
    assert!(up["services"].as_array().is_some_and(|all| all.contains(&"tcp-connect".into())), "{up}");
    assert!(up["uptime"].as_f64().is_some_and(|uptime| uptime >= 0.0), "{up}");
    assert_eq!(kernel(&world, "spare")["state"], "idle", "no route names it");
    let table = world.kso_command(["kernels"]).run().ok();
    table.shows("External kernels").shows("p      provider  up").shows("spare  provider  idle");
    let metrics = || world.native(sh("curl -sS http://127.0.0.1:9464/metrics")).ok();
    metrics().shows("kso_kernel_up{kernel=\"p\",make=\"provider\"} 1");

    // Whoever traces hears of its death, and the next of the route takes its place.
    let mut trace = world.kso_command(["trace", "--json"]).spawn();
    wait_until("the trace", seconds(60), || {
        world.kso(&flags, sh("true")).ok();
        trace.text().contains("session_start")
    });
    provider.signal(rustix::process::Signal::KILL);
    trace.wait_for("\"event\":\"kernel\"");
    wait_until("its death", seconds(30), || kernel(&world, "p")["deaths"] == 1);
    let down = kernel(&world, "p");
    assert!(down["state"] != "up" && down["last_death"].is_number(), "{down}");
    assert!(down["last_death_reason"].is_string() && down["uptime"].is_null(), "{down}");
    world.kso(&flags, ask()).ok().shows("told 10.77.0.1");
    metrics()
        .shows("kso_kernel_up{kernel=\"p\",make=\"provider\"} 0")
        .shows("kso_kernel_deaths_total{kernel=\"p\",make=\"provider\"} 1");
    drop((provider, trace));
    broker.signal(rustix::process::Signal::TERM);
    wait_until("the broker ended", seconds(30), || !broker.running());
    world.nothing_left();
}

#[test]
fn sessions_of_a_broker_take_turns() {
    let world = World::new();
    let _echo = world.echo(7000);
    let (_provider, path) = provider(&world);
    let socket = world.path("broker.sock");
    let config = format!(
        "socket = \"{socket}\"\n[kernel.p]\nmake = \"provider\"\npath = \"{path}\"\n\
         [[route]]\nservices = [\"tcp-connect\"]\nports = \"7000\"\nstrategy = \"spread\"\nkernels = [\"p\", \"host\"]\n"
    );
    let config = world.file("kso.toml", config);
    let mut broker = world.kso_command(["broker", "--config", &config]).spawn();
    wait_until("the broker's socket", seconds(30), || fs::exists(&socket).unwrap_or(false));
    let told: Vec<String> =
        (0..4).map(|_| world.kso(&format!("--broker {socket}"), ask()).ok().text()).collect();
    let by_host = told.iter().filter(|text| text.contains("told 10.77.0.1")).count();
    assert_eq!(by_host, 2, "{told:?}");
    assert!(broker.running(), "{}", broker.errors());
}

#[test]
fn a_route_that_rests_on_a_kernel_that_is_not_there_is_told_at_the_start() {
    let world = World::new();
    let config = "[kernel.p]\nmake = \"provider\"\npath = \"/nonexistent/p.sock\"\n[[route]]\nservices = [\"tcp\"]\nkernels = [\"p\"]\n";
    let config = world.file("kso.toml", config);
    let out = world.kso_command(["broker", "--config", &config]).run().exits(125);
    assert!(out.errors().contains("kso provide --listen"), "{}", out.report());
    world.nothing_left();
}
