//! Locks of programs of the host and of several mounts, as of several guests.

use crate::place::{Mode, Place};
use kso_tests::conformance::{Agent, locks_are_shared};

#[test]
fn locks_are_those_of_the_host_whoever_asks() {
    let mut place = Place::new();
    std::fs::write(place.path("behind/file"), "0123456789").expect("a file");
    let (one, another) = (place.show("one", Mode::Auto), place.show("another", Mode::None));
    let mut agents: Vec<Agent> = [("one", one), ("another", another), ("the host", place.path("behind"))]
        .into_iter()
        .map(|(name, directory)| Agent::new(name, Agent::command(&directory.join("file")).spawn()))
        .collect();
    locks_are_shared(&mut agents);
    for agent in agents {
        agent.finish();
    }
}
