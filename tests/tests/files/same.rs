//! Suites and random operations: the results are those of a plain directory of the same file system.

use crate::LIMIT;
use crate::place::{Mode, Place};
use kso_tests::conformance::{Pjdfstest, RandomRun, parse, tree};
use kso_tests::semantics;

fn random(mode: Mode, seed: u64) {
    let mut place = Place::new();
    let run = RandomRun::new(seed, 4000);
    let left_out = if mode == Mode::Writeback { "holes" } else { "" };
    let native = run.command(&place.path("plain"), left_out).limit(LIMIT).run().ok().text();
    let front = place.show("front", mode);
    let through = run.command(&front.join("random"), left_out).limit(LIMIT).run().ok().text();
    run.compare(&format!("{mode:?}"), &native, &through);
    // What is left is what the host has, too.
    let left = tree(&place.path("plain")).run().ok().text();
    run.compare("the directory behind", &left, &tree(&place.path("behind/random")).run().ok().text());
}

#[test]
fn random_operations() {
    for seed in [1, 2, 3] {
        random(Mode::Auto, seed);
    }
}

#[test]
fn random_operations_without_a_cache() {
    random(Mode::None, 4);
}

#[test]
fn random_operations_with_writes_kept_back() {
    random(Mode::Writeback, 5);
}

#[test]
fn random_operations_beyond_the_budget_of_descriptors() {
    random(Mode::FewDescriptors, 6);
}

#[test]
fn random_operations_that_pass_the_service_by() {
    random(Mode::Passthrough, 7);
}

#[test]
fn pjdfstest_gives_the_same() {
    let mut place = Place::new();
    let suite = Pjdfstest::new(&place.path("."));
    let native = suite.command(&place.path("plain")).limit(LIMIT).run();
    let front = place.show("front", Mode::Auto);
    let through = suite.command(&front.join("suite")).limit(LIMIT).run();
    let (native, through) = (parse(&native.text()), parse(&through.text()));
    assert!(native.len() > 300, "only {} cases ran natively", native.len());
    let wrong = semantics::compare(&semantics::load(), "mount", &["pjdfstest"], &native, &through);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
