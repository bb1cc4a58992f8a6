//! Two guests and the host lock parts of the same file; a file system that is full.

use super::path;
use kso_tests::conformance::{Agent, locks_are_shared};
use kso_tests::{World, sh};
use std::fs;

#[test]
fn locks_of_two_guests_and_the_host() {
    let world = World::new();
    let file = path(&world, "file");
    fs::write(&file, "0123456789").expect("a file");
    let command = || Agent::command(&file);
    let mut agents = [
        Agent::new("one guest", world.guest("--memory 256", command()).spawn()).not_interrupted(),
        Agent::new("the other guest", world.guest("--memory 256", command()).spawn()).not_interrupted(),
        Agent::new("the host", world.at_host(command()).spawn()),
    ];
    locks_are_shared(&mut agents);
    for agent in agents {
        agent.finish();
    }
    world.nothing_left();
}

/// A file system of the host's, unmounted in the end.
struct Small(String);

impl Drop for Small {
    fn drop(&mut self) {
        sh(format!("umount -l {}", self.0)).run();
    }
}

#[test]
fn a_full_file_system_and_a_submount() {
    let world = World::new();
    let small = Small(world.path("small"));
    fs::create_dir(&small.0).expect("a directory");
    sh(format!("mount -t tmpfs -o size=3M tmpfs {}", small.0)).run().ok();
    // It is below a directory that the guest sees, and another device there too.
    let script = "cd $SMALL; echo kept > before; cat /dev/zero > large; echo full $?; sync\n\
        size=$(stat -c %s large); [ $size -gt 2000000 ] && cmp -n $size large /dev/zero && echo all of it\n\
        cp before more; cat before; rm large; echo room > more && cat more\n\
        [ $(stat -c %d .) != $(stat -c %d ..) ] && echo its own device";
    let out = world.guest("--memory 256", sh(script).env("SMALL", &small.0)).run();
    assert_eq!(out.text(), "full 1\nall of it\nkept\nroom\nits own device\n", "{}", out.report());
    assert_eq!(out.errors().matches("No space left on device").count(), 2, "{}", out.report());
    assert_eq!(fs::read_to_string(format!("{}/more", small.0)).expect("there"), "room\n");
    world.nothing_left();
}
