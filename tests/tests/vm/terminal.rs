//! `kso vm -it`.

use crate::LIMIT;
use kso_tests::{Pty, World, argv, c_program, wait_until};

fn spawn(world: &World, cmd: kso_tests::Cmd, rows: u16, columns: u16) -> Pty {
    Pty::spawn(&world.guest("-it", cmd), rows, columns)
}

fn wait_for(pty: &Pty, text: &str) {
    wait_until(&format!("{text:?} on {:?}", pty.text()), LIMIT, || pty.text().contains(text));
}

#[test]
fn a_program_has_a_terminal() {
    let world = World::new();
    let terminal = c_program("terminal");
    let mut pty = spawn(&world, argv([terminal.as_str()]), 33, 101);
    wait_for(&pty, "tty 111 size 33x101 foreground 1");
    pty.resize(44, 122);
    wait_for(&pty, "resized 44x122");
    pty.send("typed\n");
    wait_for(&pty, "line: typed");
    pty.send("\x03");
    wait_for(&pty, "SIGINT");
    pty.send("\x04");
    wait_for(&pty, "end of input");
    assert_eq!(pty.finish().code(), Some(5), "{:?}", pty.text());
    world.nothing_left();
}

#[test]
fn a_shell_has_job_control() {
    let world = World::new();
    let mut pty = spawn(&world, argv(["bash", "--norc", "-i"]).env("PS1", "% "), 24, 80);
    wait_for(&pty, "% ");
    assert!(!pty.text().contains("no job control"), "{:?}", pty.text());
    pty.send("sleep 100\r");
    std::thread::sleep(std::time::Duration::from_millis(700));
    pty.send("\x1a");
    wait_for(&pty, "Stopped");
    pty.send("jobs; kill %1; stty size; echo a$((1+1))b\r");
    wait_for(&pty, "24 80");
    wait_for(&pty, "a2b");
    pty.send("exit 6\r");
    assert_eq!(pty.finish().code(), Some(6), "{:?}", pty.text());
    world.nothing_left();
}

#[test]
fn the_users_own_terminal_is_as_it_was() {
    let world = World::new();
    let words = kso_tests::Client::guest().words(&kso_tests::kso_binary(), "-it", &[]).join(" ");
    let script =
        format!("stty -a > before; {words} true; stty -a > after; cmp before after && echo the same");
    let cmd = world.at_host(kso_tests::sh(script).cwd(world.path(".")));
    let mut pty = Pty::spawn(&cmd.cwd(world.path(".")), 24, 80);
    wait_for(&pty, "the same");
    pty.finish();
    world.nothing_left();
}
