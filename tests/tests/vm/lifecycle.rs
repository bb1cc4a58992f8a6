//! Start, exit status, arguments, standard streams, signals, kernels.

use crate::LIMIT;
use kso_tests::{Client, Resources, World, argv, kso_binary, seconds, sh, wait_until};
use rustix::process::Signal;

#[test]
fn exit_status() {
    let world = World::new();
    for status in [0, 42, 255] {
        world.guest("", sh(format!("exit {status}"))).run().exits(status);
    }
    world.guest("", argv(["/nonexistent/program"])).run().exits(127).complains("/nonexistent/program");
    world.guest("", argv(["/proc/version"])).run().exits(126);
    world.guest("", sh("kill -SEGV $$")).run().exits(139);
    // The first process's status counts, not that of a child left behind.
    world.guest("", sh("sleep 100 & exit 3")).run().exits(3);
    world.nothing_left();
}

#[test]
fn what_is_wrong_is_told_before_anything_starts() {
    let world = World::new();
    for (flags, complaint) in [
        ("--no-such-option", "no-such-option"),
        ("--memory 1", "size"),
        ("--allow example.org:http", "http"),
        ("-v /nonexistent:/srv", "/nonexistent"),
        ("--kernel-image /etc/passwd", "no Linux kernel image"),
    ] {
        let words = flags.split_whitespace().chain(["--", "true"]);
        let out = world.kso_command(["vm"].into_iter().chain(words)).run();
        assert!(!matches!(out.code(), Some(0) | None), "{flags}: {}", out.report());
        assert!(out.errors().contains(complaint), "{flags}: {}", out.report());
        assert!(out.elapsed < seconds(10), "{flags}: {}", out.report());
    }
    let out = world.kso_command(["vm", "--kernel", "3.14", "--", "true"]).run().exits(125);
    out.complains("kso kernels fetch 3.14");
    world.nothing_left();
}

#[test]
fn a_guest_that_does_not_come_up_shows_its_console() {
    let world = World::new();
    // Without an init the kernel panics.
    let out = world.guest("--append rdinit=/nonexistent --append root=/dev/nothing", sh("true")).run();
    out.exits(125).complains("console").complains("panic");
    world.nothing_left();
}

#[test]
fn arguments_environment_directory_and_user() {
    let world = World::new();
    let same = |cmd: kso_tests::Cmd| {
        let (native, guest) = (world.native(cmd.clone()), world.guest("", cmd).run());
        assert_eq!((native.text(), native.status), (guest.text(), guest.status), "{}", guest.report());
    };
    same(argv(["printf", "%s\\n", "a b", "", "-n", "--", "$HOME", "\u{e9}\n\t*"]));
    same(sh("pwd; umask; ulimit -n; id; echo $MARK").env("MARK", "one two").cwd("/usr/lib"));
    let out = world.guest("-e A=1 -e B=x=y -w /usr/bin --name tester", sh("echo $A $B; pwd; hostname")).run();
    assert_eq!(out.ok().text(), "1 x=y\n/usr/bin\ntester\n");
    world.nothing_left();
}

#[test]
fn memory_and_processors() {
    let world = World::new();
    let out = world.guest("--memory 256M --cpus 2", sh("nproc; grep MemTotal /proc/meminfo")).run().ok();
    let kib = out.text().split_whitespace().rev().nth(1).and_then(|word| word.parse::<u32>().ok());
    assert!(out.text().starts_with("2\n"), "{}", out.report());
    assert!(kib.is_some_and(|kib| (150_000..262_144).contains(&kib)), "{}", out.report());
    world.nothing_left();
}

#[test]
fn standard_streams_are_binary_clean_and_apart() {
    let world = World::new();
    let bytes: Vec<u8> = (0..8_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let out = world.guest("", argv(["cat"]).stdin(bytes.clone())).run().ok();
    assert!(out.stdout == bytes, "{} of {} bytes", out.stdout.len(), bytes.len());
    let out = world.guest("", sh("echo out; echo err >&2; wc -c").stdin("x".repeat(100_000))).run().ok();
    assert_eq!((out.text().as_str(), out.errors().as_str()), ("out\n100000\n", "err\n"));
    world.nothing_left();
}

#[test]
fn a_reader_that_goes_away_ends_the_program() {
    let world = World::new();
    let words = Client::guest().words(&kso_binary(), "", &[]).join(" ");
    world.native(sh(format!("{words} yes | head -n 3")).limit(LIMIT)).ok().shows("y\ny\ny");
    world
        .native(sh(format!("{words} cat < /dev/null; {words} sh -c 'echo x >&-'; echo done")).limit(LIMIT))
        .ok()
        .shows("done");
    world.nothing_left();
}

#[test]
fn a_slow_reader_holds_the_program_up() {
    let world = World::new();
    let words = Client::guest().words(&kso_binary(), "", &[]).join(" ");
    let count = world.path("count");
    // 300 MB of output, read after five seconds only: neither kso nor the guest may keep them.
    let script =
        format!("{words} sh -c 'head -c 300000000 /dev/zero; echo $? >&2' | (sleep 5; wc -c > {count})");
    let mut run = world.at_host(sh(script).limit(LIMIT)).spawn();
    std::thread::sleep(seconds(5));
    let launcher = world.processes().into_iter().find(|(_, line)| line.contains(" vm --kernel"));
    let (pid, _) = launcher.expect("kso runs");
    let resident = Resources::of(pid).resident;
    assert!(resident < 700_000, "{resident} KiB with the guest's 512 MiB");
    assert!(run.running());
    run.finish(LIMIT).ok();
    assert_eq!(std::fs::read_to_string(count).expect("a count").trim(), "300000000");
    world.nothing_left();
}

#[test]
fn signals_are_handed_on() {
    let world = World::new();
    let script = "for s in INT HUP USR1 QUIT; do trap \"echo got $s\" $s; done; trap 'echo got TERM; exit 9' TERM\n\
        echo ready; while :; do sleep 0.05; done";
    let mut run = world.guest("", sh(script)).spawn();
    run.wait_for("ready");
    for (signal, name) in
        [(Signal::INT, "INT"), (Signal::HUP, "HUP"), (Signal::USR1, "USR1"), (Signal::QUIT, "QUIT")]
    {
        run.signal(signal);
        run.wait_for(&format!("got {name}"));
    }
    run.signal(Signal::TERM);
    run.finish(LIMIT).exits(9).shows("got TERM");
    // Not handled: the program dies of it, and so says kso.
    let mut run = world.guest("", sh("echo ready; exec sleep 100")).spawn();
    run.wait_for("ready");
    run.signal(Signal::TERM);
    let out = run.finish(LIMIT);
    assert!(out.code() == Some(143) || out.signal() == Some(15), "{}", out.report());
    // Before it is up.
    let run = world.guest("", sh("sleep 100")).spawn();
    std::thread::sleep(std::time::Duration::from_millis(300));
    run.signal(Signal::TERM);
    let out = run.finish(LIMIT);
    assert!(out.code() == Some(143) || out.signal() == Some(15), "{}", out.report());
    world.nothing_left();
}

#[test]
fn stock_kernels_of_several_years() {
    let world = World::new();
    world.http();
    let there = world.kso_command(["kernels"]).run().ok().text();
    for version in ["5.10", "6.1", "6.12", "7.2"] {
        if !there.contains(&format!("{version}.")) {
            eprintln!("no kernel {version} here: `kso kernels fetch {version}`");
            continue;
        }
        let client = Client::Guest { kernel: Some(version.to_owned()) };
        let curl = "uname -r; curl -sS http://origin.test/hello";
        world.outsourced_on(&client, "", sh(curl)).run().ok().shows(version).shows("hello from origin");
        // A copy has no capabilities: where ping's file has some it is not executed (docs/semantics.md).
        let ping = sh("cp $(command -v ping) /tmp/ping && /tmp/ping -c 1 -W 3 10.77.0.2 | grep received");
        world.outsourced_on(&client, "", ping).run().ok().shows("1 received");
    }
    world.nothing_left();
}

#[test]
fn a_pc_with_pci() {
    let world = World::new();
    world.http();
    world
        .guest("--machine q35", sh("curl -sS http://origin.test/hello"))
        .run()
        .ok()
        .shows("hello from origin");
    world.nothing_left();
}

#[test]
fn it_is_listed_while_it_runs() {
    let world = World::new();
    let mut run = world.guest("--name lister -p 8080:80", sh("echo ready; exec sleep 100")).spawn();
    run.wait_for("ready");
    world.kso_command(["ps"]).run().ok().shows("lister");
    run.terminate();
    wait_until("it is listed no more", seconds(5), || {
        !world.kso_command(["ps"]).run().text().contains("lister")
    });
    world.nothing_left();
}
