//! Files of the host's as a guest's programs see them: the same as natively.
//!
//! `-v` is used as it comes: names and attributes are believed for a second, data until the file's times tell otherwise
//! (`Cache::Auto`).

mod databases;
mod locks;
mod same;
mod serving;
mod work;

use kso_tests::World;
use std::path::PathBuf;

fn path(world: &World, name: &str) -> PathBuf {
    world.path(name).into()
}
