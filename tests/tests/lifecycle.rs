//! `kso run` is not there: exit status, signals, terminal and stdio are the program's own, and nothing is left.
#![forbid(unsafe_code)]

use kso_tests::{World, argv, c_program, kso_binary, seconds, sh, wait_until};
use rustix::process::{Pid, Signal, kill_process};

#[test]
fn exit_status() {
    let world = World::new();
    for status in [0, 1, 7, 42, 125, 126, 127, 255] {
        world.same("", sh(format!("exit {status}"))).exits(status);
    }
    world.kso("", argv(["/nonexistent/program"])).exits(127);
    world.kso("", argv(["no-such-program-in-the-path"])).exits(127).complains("no-such-program-in-the-path");
    world.kso("", argv(["/proc/version"])).exits(126);
    world.kso("", argv(["/tmp"])).exits(126);
    for (signal, number) in
        [("TERM", 15), ("KILL", 9), ("SEGV", 11), ("ABRT", 6), ("INT", 2), ("HUP", 1), ("USR1", 10)]
    {
        world.kso("", sh(format!("kill -{signal} $$"))).exits(128 + number);
    }
    // The first process's status counts, not that of a child left behind.
    world.kso("", sh("sleep 100 & exit 3")).exits(3);
    let bad = world.kso_command(["run", "--no-such-option", "--", "true"]).run();
    assert!(!matches!(bad.code(), Some(0) | None), "{}", bad.report());
    world.kso_command(["run"]).run().exits(2);
    world.nothing_left();
}

#[test]
fn arguments_environment_and_directory() {
    let world = World::new();
    world.same_ok("", argv(["printf", "%s\\n", "a b", "", "-n", "--", "$HOME", "\u{e9}\n\t*"]));
    world.same_ok("", argv(["sh", "-c", "pwd; umask; ulimit -n"]).cwd("/usr"));
    world.same_ok("", sh("echo $MARK$HOME$PATH").env("MARK", "one two"));
    world.kso("-e A=1 -e B=x=y", sh("echo $A $B")).ok().shows("1 x=y");
    world.kso("-w /usr/lib", sh("pwd")).ok().shows("/usr/lib");
    // Who one is: the same user inside.
    world.same_ok("", sh("id -u; id -g; touch $0.x && stat -c '%u %g' $0.x && rm $0.x").cwd(world.path(".")));
    let name = world.kso("--name tester", sh("cat /proc/1/comm; echo $$; ls /proc | grep -c '^[0-9]'")).ok();
    assert!(
        name.text().lines().last().is_some_and(|n| n.parse::<u32>().is_ok_and(|n| n < 10)),
        "its own pids: {}",
        name.report()
    );
    world.nothing_left();
}

#[test]
fn stdio_is_binary_clean() {
    let world = World::new();
    let bytes: Vec<u8> = (0..3_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let out = world.kso("", argv(["cat"]).stdin(bytes.clone())).ok();
    assert!(out.stdout == bytes, "{} of {} bytes", out.stdout.len(), bytes.len());
    world.same_ok("", sh("echo out; echo err >&2; cat | wc -c").stdin("x".repeat(100_000)));
    // Descriptors beyond the three are passed on too, as any wrapper does.
    let kso = kso_binary();
    world.native(sh(format!("echo through | {kso} run -- sh -c 'cat <&3' 3<&0"))).ok().shows("through");
    // A reader that goes away.
    world.native(sh(format!("{kso} run -- yes | head -n 3"))).ok().shows("y\ny\ny");
    world
        .native(sh(format!("{kso} run -- cat < /dev/null; {kso} run -- sh -c 'echo x >&-'; echo done")))
        .ok()
        .shows("done");
    world.nothing_left();
}

#[test]
fn signals_are_handed_on() {
    let world = World::new();
    for (signal, name) in [
        (Signal::TERM, "TERM"),
        (Signal::INT, "INT"),
        (Signal::HUP, "HUP"),
        (Signal::USR1, "USR1"),
        (Signal::USR2, "USR2"),
        (Signal::QUIT, "QUIT"),
    ] {
        let mut run = world.start(
            "",
            sh(format!("trap 'echo got {name}; exit 9' {name}; echo ready; while :; do sleep 0.05; done")),
        );
        run.wait_for("ready");
        run.signal(signal);
        run.finish(seconds(10)).exits(9).shows(&format!("got {name}"));
    }
    // Not handled: the program dies of it, and so says kso.
    for (signal, number) in [(Signal::TERM, 15), (Signal::INT, 2), (Signal::HUP, 1)] {
        let mut run = world.start("", sh("echo ready; exec sleep 100"));
        run.wait_for("ready");
        run.signal(signal);
        let out = run.finish(seconds(10));
        assert!(out.code() == Some(128 + number) || out.signal() == Some(number), "{}", out.report());
    }
    // Stopped and continued.
    let mut run = world.start("", sh("echo ready; sleep 1; echo done"));
    run.wait_for("ready");
    run.signal(Signal::TSTP);
    run.signal(Signal::CONT);
    run.finish(seconds(10)).ok().shows("done");
    world.nothing_left();
}

/// A sandbox with children, connections, a listener and a pending connect.
const BUSY: &str = "import socket,os,sys,signal,time\n\
    s=socket.socket(); s.bind(('0.0.0.0',80)); s.listen()\n\
    c=[socket.create_connection(('10.77.0.2',7007)) for i in range(5)]\n\
    u=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); u.sendto(b'x',('10.77.0.2',7007))\n\
    for i in range(3):\n    \
        if os.fork()==0:\n        \
            signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.signal(signal.SIGINT, signal.SIG_IGN)\n        \
            if i==2: os.setsid()\n        \
            socket.create_connection(('10.77.0.99',80))\n\
    print('ready', flush=True); time.sleep(100)\n";

#[test]
fn kill_nine_of_any_part_leaves_nothing() {
    let world = World::new();
    let _echo = world.echo(7007);
    let part = |which: &str, pids: &[(u32, String)], kso: u32| -> u32 {
        let child_of = |parent: u32| {
            pids.iter().map(|(pid, _)| *pid).find(|pid| {
                std::fs::read_to_string(format!("/proc/{pid}/stat"))
                    .ok()
                    .and_then(|stat| stat.rsplit(") ").next()?.split(' ').nth(1)?.parse::<u32>().ok())
                    == Some(parent)
            })
        };
        let init = child_of(kso).expect("init of the sandbox");
        match which {
            "kso" => kso,
            "init" => init,
            _ => child_of(init).expect("the program"),
        }
    };
    for which in ["kso", "init", "program"] {
        let mut run = world.start("-p 8080:80", argv(["/usr/bin/python3", "-c", BUSY]));
        run.wait_for("ready");
        assert!(world.host.listens(8080));
        let pids = world.processes();
        let victim = part(which, &pids, run.pid());
        kill_process(Pid::from_raw(victim as i32).expect("a pid"), Signal::KILL).expect("kill");
        let out = run.finish(seconds(10));
        assert!(out.status.is_some(), "kso hangs when {which} is killed: {}", out.report());
        if which != "kso" {
            assert_eq!(out.code(), Some(137), "{which}: {}", out.report());
        }
        world.nothing_left();
        wait_until("the published port is free", seconds(5), || !world.host.listens(8080));
    }
    // Again and again, at any moment of the start.
    for delay in 0..25 {
        let run = world.start("-p 8080:80", argv(["/usr/bin/python3", "-c", BUSY]));
        std::thread::sleep(std::time::Duration::from_millis(delay * 4));
        run.signal(Signal::KILL);
        run.finish(seconds(10));
        world.nothing_left();
    }
    let mounts = || sh("grep kso /proc/self/mounts | grep -cv /run/netns/").run().text();
    let before = mounts();
    world.kso("", sh("true")).ok();
    assert_eq!(before, mounts(), "a mount of the sandbox's appeared outside");
}

#[test]
fn a_crash_of_the_program_leaves_nothing() {
    let world = World::new();
    let _echo = world.echo(7007);
    let crash = format!("{}\n", BUSY.replace("time.sleep(100)", "os.kill(os.getpid(), signal.SIGSEGV)"));
    world.kso("-p 8080:80", argv(["/usr/bin/python3", "-c", &crash])).exits(139);
    world.nothing_left();
    assert!(!world.host.listens(8080));
}

#[test]
fn terminal_is_passed_through() {
    let world = World::new();
    let terminal = c_program("terminal");
    let mut pty = world.terminal("", argv([terminal.as_str()]), 33, 101);
    pty.wait_for("tty 111 size 33x101 foreground 1");
    pty.resize(44, 122);
    pty.wait_for("resized 44x122");
    pty.send("typed\n");
    pty.wait_for("line: typed");
    // Ctrl-C is a signal to the program, which may live on.
    pty.send("\x03");
    pty.wait_for("SIGINT");
    pty.send("\x04");
    pty.wait_for("end of input");
    assert_eq!(pty.finish().code(), Some(5), "{:?}", pty.text());
    world.nothing_left();
}

#[test]
fn control_c_leaves_nothing() {
    let world = World::new();
    let _echo = world.echo(7007);
    let mut pty = world.terminal("-p 8080:80", argv(["/usr/bin/python3", "-c", BUSY]), 24, 80);
    pty.wait_for("ready");
    pty.send("\x03");
    let status = pty.finish();
    assert!(status.code() == Some(130) || status.code() == Some(1) || !status.success(), "{status}");
    world.nothing_left();
    assert!(!world.host.listens(8080));
}

#[test]
fn job_control_of_a_shell_inside() {
    let world = World::new();
    let mut pty = world.terminal("", argv(["bash", "--norc", "-i"]).env("PS1", "% "), 24, 80);
    pty.wait_for("% ");
    assert!(!pty.text().contains("no job control"), "{:?}", pty.text());
    pty.send("sleep 100\r");
    std::thread::sleep(std::time::Duration::from_millis(300));
    pty.send("\x1a");
    pty.wait_for("Stopped");
    pty.send("jobs; kill %1; stty size; echo a$((1+1))b\r");
    pty.wait_for("24 80");
    pty.wait_for("a2b");
    pty.send("exit 6\r");
    assert_eq!(pty.finish().code(), Some(6), "{:?}", pty.text());
    world.nothing_left();
}

#[test]
fn kso_itself_is_a_job_of_a_shell() {
    // Ctrl-Z stops the whole job, fg continues it.
    let world = World::new();
    let kso = kso_binary();
    let shell = world.at_host(argv(["bash", "--norc", "-i"]).env("PS1", "% "));
    let mut pty = kso_tests::Pty::spawn(&shell, 24, 80);
    pty.wait_for("% ");
    pty.send(&format!("{kso} run -- sh -c 'echo star''ted; sleep 1; echo fin''ished'\r"));
    pty.wait_for("started");
    pty.send("\x1a");
    pty.wait_for("Stopped");
    pty.send("fg\r");
    pty.wait_for("finished");
    pty.send("exit\r");
    pty.finish();
    world.nothing_left();
}

#[test]
fn without_root() {
    let world = World::new();
    world.http();
    // The device is anyone's on most systems; where it is not, kso must say so.
    let kso = world.path("kso");
    std::fs::copy(kso_binary(), &kso).expect("a copy that uid 1000 can read");
    let home = world.path("home");
    sh(format!("mkdir -m 755 -p {home} && chown 1000:1000 {home}")).run().ok();
    let user = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "--inh-caps=-all"];
    let run = |script: &str| {
        world
            .at_host(
                sh(script.replace("KSO", &kso))
                    .prefixed(user)
                    .env("HOME", &home)
                    .env("KSO_RUNTIME_DIR", &home),
            )
            .run()
    };
    let mode = std::fs::metadata("/dev/net/tun")
        .map(|m| std::os::unix::fs::PermissionsExt::mode(&m.permissions()) & 0o777);
    if mode.is_ok_and(|mode| mode & 0o006 != 0o006) {
        let out = run("KSO run -- true");
        assert_ne!(out.code(), Some(0), "{}", out.report());
        assert!(out.errors().contains("/dev/net/tun"), "it names what is missing: {}", out.report());
    }
    // As most systems have it; a new network namespace allows nobody (icmp(7)).
    world
        .host
        .enter(|| std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647"))
        .expect("sysctl");
    // A device of the world's own, as udev makes it on desktop systems: a node in a private mount namespace.
    let private = format!(
        "mount --bind {dev} /dev/net/tun && exec setpriv --reuid=1000 --regid=1000 --clear-groups --inh-caps=-all sh -c",
        dev = world.path("tun")
    );
    sh(format!("mknod -m 666 {} c 10 200", world.path("tun"))).run().ok();
    let as_user = |script: &str| {
        let inner = format!("{private} '{}'", script.replace("KSO", &kso));
        world
            .at_host(
                argv(["unshare", "-m", "sh", "-c", &inner]).env("HOME", &home).env("KSO_RUNTIME_DIR", &home),
            )
            .run()
    };
    // A hardened kernel lets only root filter sockets (SO_ATTACH_FILTER), on which the guard of connects rests.
    let probe = "import socket,struct,ctypes\n\
        b=ctypes.create_string_buffer(struct.pack('HBBI',6,0,0,0xffffffff))\n\
        socket.socket().setsockopt(1,26,struct.pack('HxxxxxxQ',1,ctypes.addressof(b)))";
    if argv(["/usr/bin/python3", "-c", probe]).prefixed(user).run().code() != Some(0) {
        let out = as_user("KSO run -- true");
        assert!(
            out.code() == Some(125) && out.errors().contains("SO_ATTACH_FILTER"),
            "it says why not: {}",
            out.report()
        );
        as_user("KSO run --unlocked -- sh -c \"curl -sS http://origin.test/hello; ping -c1 -W2 10.77.0.2\"")
            .ok()
            .shows("hello")
            .shows("1 received");
        world.nothing_left();
        return;
    }
    as_user("id -u; KSO run -- sh -c \"id -u; curl -sS http://origin.test/hello; ping -c1 -W2 10.77.0.2\"")
        .ok()
        .shows("hello from origin")
        .shows("1 received");
    as_user("KSO run -p 8080:80 -- sh -c \"curl -sS http://[fd77::2]/hello\"").ok().shows("hello");
    world.nothing_left();
}

#[test]
fn says_what_is_missing_when_namespaces_are_forbidden() {
    let world = World::new();
    let kso = world.path("kso");
    std::fs::copy(kso_binary(), &kso).expect("a copy that uid 1000 can read");
    let forbidden = c_program("forbidden");
    let out = world.at_host(argv([forbidden.as_str(), "1000", &kso, "run", "--", "true"])).run();
    assert_ne!(out.code(), Some(99), "{}", out.report());
    assert_ne!(out.code(), Some(0), "{}", out.report());
    let said = out.errors().to_lowercase();
    assert!(said.contains("namespaces") && said.contains("max_user_namespaces"), "{}", out.report());
    world.nothing_left();
}

#[test]
fn many_sandboxes_at_once() {
    let world = World::new();
    world.http();
    let runs: Vec<_> = (0..12)
        .map(|i| world.start(&format!("-p {}:80", 8100 + i), sh("curl -sS http://origin.test/hello")))
        .collect();
    for run in runs {
        run.finish(seconds(60)).ok().shows("hello from origin");
    }
    world.nothing_left();
}

#[test]
fn a_sandbox_in_a_sandbox() {
    let world = World::new();
    world.http();
    let kso = kso_binary();
    // It works, or it says what is missing; it does not hang.
    let out = world.kso("", argv([kso.as_str(), "run", "--", "curl", "-sS", "http://10.77.0.2/hello"]));
    assert!(out.status.is_some(), "{}", out.report());
    assert!(out.text().contains("hello") || !out.errors().is_empty(), "{}", out.report());
    world.nothing_left();
}
