//! Whatever is killed or crashes: nothing stays, and the user is told.

use crate::LIMIT;
use kso_tests::{World, argv, seconds, sh, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use std::time::Duration;

/// A guest with a listener, connections and children.
const BUSY: &str = "import socket,os,time\n\
    s=socket.socket(); s.bind(('0.0.0.0',80)); s.listen()\n\
    c=[socket.create_connection(('10.77.0.2',7007)) for i in range(5)]\n\
    u=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); u.sendto(b'x',('10.77.0.2',7007))\n\
    os.fork()\n\
    print('ready', flush=True); time.sleep(100)\n";

pub(crate) fn qemu_of(world: &World) -> Pid {
    let found = world.processes().into_iter().find(|(_, line)| line.contains("qemu-system"));
    let (pid, _) = found.expect("QEMU runs");
    Pid::from_raw(i32::try_from(pid).expect("a pid")).expect("a pid")
}

#[test]
fn kill_nine_of_qemu_is_told() {
    let world = World::new();
    let _echo = world.echo(7007);
    let mut run = world.guest("-p 8080:80", argv(["/usr/bin/python3", "-c", BUSY])).spawn();
    run.wait_for("ready");
    assert!(world.host.listens(8080));
    kill_process(qemu_of(&world), Signal::KILL).expect("kill");
    let out = run.finish(LIMIT).exits(125);
    assert!(out.errors().contains("guest") && !out.errors().contains("panicked"), "{}", out.report());
    world.nothing_left();
    wait_until("the published port is free", seconds(5), || !world.host.listens(8080));
}

#[test]
fn kill_nine_of_kso_leaves_nothing() {
    let world = World::new();
    let _echo = world.echo(7007);
    let mut run = world.guest("-p 8080:80", argv(["/usr/bin/python3", "-c", BUSY])).spawn();
    run.wait_for("ready");
    run.signal(Signal::KILL);
    run.finish(LIMIT);
    world.nothing_left();
    wait_until("the published port is free", seconds(5), || !world.host.listens(8080));
    // At any moment of the start.
    for delay in [0, 20, 60, 150, 400, 800, 1500] {
        let run = world.guest("-p 8080:80", argv(["/usr/bin/python3", "-c", BUSY])).spawn();
        std::thread::sleep(Duration::from_millis(delay));
        run.signal(Signal::KILL);
        run.finish(LIMIT);
        world.nothing_left();
    }
    let left = sh("grep -c kso /proc/self/mounts; ls /dev/shm | grep -c kso").run().text();
    assert!(!left.contains("memory-backend"), "{left}");
}

#[test]
fn a_panic_of_the_guest_is_told_with_its_last_words() {
    let world = World::new();
    let _echo = world.echo(7007);
    let script = format!("/usr/bin/python3 -c \"{BUSY}\" & sleep 3; echo c > /proc/sysrq-trigger; sleep 100");
    let out = world.guest("-p 8080:80", sh(script)).run().exits(125);
    assert!(out.errors().contains("sysrq") || out.errors().contains("panic"), "{}", out.report());
    world.nothing_left();
    assert!(!world.host.listens(8080));
}

#[test]
fn a_guest_that_powers_off_is_told() {
    let world = World::new();
    let out = world.guest("", sh("echo o > /proc/sysrq-trigger; sleep 100")).run().exits(125);
    assert!(out.errors().contains("guest"), "{}", out.report());
    world.nothing_left();
}

#[test]
fn a_guest_out_of_memory_ends_with_a_word() {
    let world = World::new();
    let hog = "b=[]\nwhile True: b.append(bytearray(1<<20))";
    let out = world.guest("--memory 192", argv(["/usr/bin/python3", "-c", hog])).run();
    // The program is killed, or the kernel gives up: never silence.
    assert!(matches!(out.code(), Some(137 | 1 | 125)) || out.signal().is_some(), "{}", out.report());
    assert!(!out.errors().contains("panicked"), "{}", out.report());
    world.nothing_left();
}
