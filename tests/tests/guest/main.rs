//! `kso guest`: programs in a guest that knows nothing of kso: a stock kernel, an init of its own, a VMM that this test starts;
//! its devices are served by `kso broker --config`.
#![forbid(unsafe_code)]

mod machine;
mod vmm;

use kso_tests::{Running, World, kso_binary, seconds, sh, wait_until};
use machine::Machine;
use std::fs;
use std::time::Duration;

/// An emulated guest on a loaded machine.
const LIMIT: Duration = Duration::from_secs(300);

/// A broker with this configuration, and the file system device of the guest's root.
fn broker(world: &World, vsock: &str) -> Running {
    world.http();
    let (socket, root) = (world.path("broker.sock"), world.path("root.sock"));
    let config = format!(
        "socket = \"{socket}\"\n\
         [guest.box]\n{vsock}\npublish = [\"8080:80\"]\ndeny = [\"10.77.0.3\"]\n\
         [[guest.box.share]]\nsocket = \"{root}\"\ntag = \"root\"\ndirectory = \"/\"\nread_only = true\n"
    );
    let config = world.file("kso.toml", config);
    let mut broker = world.kso_command(["broker", "--config", &config]).spawn();
    wait_until("the broker's sockets", seconds(30), || {
        assert!(broker.running(), "{}", broker.errors());
        fs::exists(&socket).unwrap_or(false)
    });
    broker
}

/// Starts the guest with a script, in which `kso` is kso, `step NAME COMMAND` tells what came of it, and a server listens at last.
fn start(world: &World, device: &str, steps: &str) -> Machine {
    let (kso, stop) = (kso_binary(), world.path("stop"));
    let script = format!(
        "kso() {{ {kso} \"$@\"; }}\n\
         step() {{ echo \"== $1\"; shift; \"$@\"; echo \"<< $?\"; }}\n\
         {steps}\n\
         {kso} guest -- python3 -u -m http.server --bind 0.0.0.0 80 & server=$!\n\
         while ! test -e {stop}; do sleep 0.2; done\n\
         kill -TERM $server; wait $server; echo \"the server ended: $?\"\n\
         step device test ! -e /sys/class/net/kso0\n"
    );
    let script = world.file("script", script);
    Machine::start(world, device, &world.path("root.sock"), &script)
}

/// Fetches a page of the guest's server, which then ends, and the machine with it: all that it wrote.
fn finish(world: &World, mut machine: Machine) -> String {
    machine.wait_for("Serving HTTP on", LIMIT);
    let page = "curl -sS -m 100 -o /dev/null -w '%{http_code}' http://127.0.0.1:8080/";
    world.native(sh(page).limit(LIMIT)).ok().shows("200");
    // It tells who came.
    machine.wait_for("\"GET / HTTP/1.1\" 200", LIMIT);
    world.file("stop", "");
    machine.wait_for("THE SCRIPT ENDED", LIMIT);
    machine.text()
}

/// What a step printed, and its status.
#[track_caller]
fn step<'a>(text: &'a str, name: &str) -> (&'a str, i32) {
    let found = || {
        let rest = text.split(&format!("== {name}\n")).nth(1)?;
        let (said, rest) = rest.split_once("<< ")?;
        Some((said, rest.lines().next()?.trim().parse().ok()?))
    };
    found().unwrap_or_else(|| panic!("no step {name}: {text}"))
}

#[track_caller]
fn shows(text: &str, name: &str, part: &str, status: i32) {
    let (said, ended) = step(text, name);
    assert!(said.contains(part) && ended == status, "{name}: {said}, {ended}\n{text}");
}

#[test]
fn a_program_in_somebody_elses_guest_has_the_hosts_sockets() {
    let world = World::new();
    let vsock = world.path("box.vsock");
    let mut broker = broker(&world, &format!("vsock = \"{vsock}\""));
    let steps = format!(
        "mount -t tmpfs tmpfs /mnt && cat /etc/resolv.conf > /mnt/before\n\
         step names kso guest -- curl -sS -m 100 http://origin.test/hello\n\
         step status kso guest -- sh -c 'exit 7'\n\
         step signal kso guest -- sh -c 'kill -TERM $$'\n\
         step missing kso guest -- /nonexistent/program\n\
         step ping kso guest -- ping -c1 -W20 10.77.0.2\n\
         step denied kso guest -- curl -sS -m 100 http://10.77.0.3/hello\n\
         step user kso guest --user nobody -- id -un\n\
         step plain kso guest --no-tun -- curl -sS -m 100 http://10.77.0.2/hello\n\
         step second kso guest -- {kso} guest -- true\n\
         step left kso guest -- sh -c 'sleep 1234 & echo started'\n\
         step gone pgrep -x sleep\n\
         step untouched cmp /etc/resolv.conf /mnt/before",
        kso = kso_binary(),
    );
    let text = finish(&world, start(&world, &vsock, &steps));
    for (name, part, status) in [
        ("names", "hello from origin", 0),
        ("status", "", 7),
        ("signal", "", 143),
        ("missing", "/nonexistent/program", 127),
        ("ping", "1 received", 0),
        ("denied", "", 7),
        ("user", "nobody", 0),
        ("plain", "hello from origin", 0),
        ("second", "another kso guest", 125),
        ("left", "started", 0),
        ("gone", "", 1),
        ("untouched", "", 0),
        ("device", "", 0),
    ] {
        shows(&text, name, part, status);
    }
    assert!(text.contains("the server ended: 143"), "{text}");
    assert!(text.contains("127.0.0.1 - - ["), "the server knows who came: {text}");
    assert!(broker.running(), "{}", broker.errors());
}

#[test]
fn a_guest_behind_hybrid_sockets_connects_and_serves() {
    let world = World::new();
    let (sockets, device) = (world.path("v.sock"), world.path("vhost.sock"));
    let mut broker = broker(&world, &format!("hybrid = \"{sockets}\""));
    let vmm = vmm::Vmm::start(&sockets, &device);
    let steps = "step names kso guest -- curl -sS -m 100 http://origin.test/hello\n\
         step ping kso guest -- ping -c1 -W20 10.77.0.2\n\
         step denied kso guest -- curl -sS -m 100 http://10.77.0.3/hello\n\
         step plain kso guest --no-tun -- true";
    let text = finish(&world, start(&world, &device, steps));
    for (name, part, status) in [
        ("names", "hello from origin", 0),
        ("ping", "1 received", 0),
        ("denied", "", 7),
        ("plain", "CID 2 only", 125),
        ("device", "", 0),
    ] {
        shows(&text, name, part, status);
    }
    assert!(text.contains("the server ended: 143"), "{text}");
    assert!(text.contains("127.0.0.1 - - ["), "the server knows who came: {text}");
    drop(vmm);
    assert!(broker.running(), "{}", broker.errors());
}
