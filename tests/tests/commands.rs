//! `kso doctor`.
#![forbid(unsafe_code)]

use kso_tests::{World, kso_binary, seconds, sh};
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
