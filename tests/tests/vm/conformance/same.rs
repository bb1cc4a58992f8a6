//! pjdfstest and random operations.

use super::path;
use crate::everything;
use kso_tests::conformance::{Pjdfstest, RandomRun, parse, tree};
use kso_tests::{World, seconds, semantics};

#[test]
fn pjdfstest_gives_the_same() {
    let world = World::new();
    let suite = Pjdfstest::new(&path(&world, "."));
    let native = world.native(suite.command(&path(&world, "native")).limit(seconds(300)));
    let guest = world.guest("", suite.command(&path(&world, "guest")).limit(seconds(120))).run();
    assert!(guest.text().contains("Summary"), "it did not end: {}", guest.report());
    let (native, guest) = (parse(&native.text()), parse(&guest.text()));
    assert!(native.len() > 300, "only {} cases ran natively", native.len());
    let wrong = semantics::compare(&semantics::load(), "guest", &["pjdfstest"], &native, &guest);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    world.nothing_left();
}

#[test]
fn random_operations_give_the_same() {
    let world = World::new();
    let run = RandomRun::new(11, if everything() { 100_000 } else { 4000 });
    // The guest's Linux is 6.1.
    let left_out = "tmpfile";
    let native = world.native(run.command(&path(&world, "native"), left_out).limit(seconds(300))).ok();
    let guest = world.guest("", run.command(&path(&world, "guest"), left_out).limit(seconds(300))).run().ok();
    run.compare("in a guest", &native.text(), &guest.text());
    let (native, guest) = (tree(&path(&world, "native")).run().ok(), tree(&path(&world, "guest")).run().ok());
    run.compare("what the guest left", &native.text(), &guest.text());
    world.nothing_left();
}
