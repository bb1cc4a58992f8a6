//! The same operations on a plain directory and on one that the service performs: results and trees are the same.
//!
//! As root, through /dev/fuse; elsewhere these tests do nothing.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

mod steps;

use kso_files::mount::{MountOptions, Mounted, mount};
use kso_files::{Cache, Share};
use proptest::prelude::*;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use steps::{perform, steps, tree};

/// A directory, and the same one mounted elsewhere.
struct World {
    mounted: Option<Mounted>,
    directory: tempfile::TempDir,
}

impl World {
    fn new(change: impl FnOnce(&mut Share)) -> Option<Self> {
        if !rustix::process::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
            eprintln!("skipped: needs root and /dev/fuse");
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let (behind, front) = (directory.path().join("behind"), directory.path().join("front"));
        fs::create_dir(&behind).unwrap();
        fs::create_dir(&front).unwrap();
        let mut share = Share::new(&behind);
        share.devices = true;
        change(&mut share);
        let options = MountOptions { passthrough: false, no_privilege: false, ..MountOptions::default() };
        let mounted = mount(share, &front, options).unwrap();
        Some(Self { mounted: Some(mounted), directory })
    }

    fn front(&self) -> PathBuf {
        self.directory.path().join("front")
    }

    fn behind(&self) -> PathBuf {
        self.directory.path().join("behind")
    }
}

impl Drop for World {
    fn drop(&mut self) {
        drop(self.mounted.take());
    }
}

fn same_as_native(change: impl FnOnce(&mut Share), cases: u32) {
    let Some(world) = World::new(change) else { return };
    let count = AtomicU32::new(0);
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(steps in steps())| {
        let number = count.fetch_add(1, Ordering::Relaxed).to_string();
        let plain = world.directory.path().join("plain").join(&number);
        let through = world.front().join(&number);
        fs::create_dir_all(&plain).unwrap();
        fs::create_dir(&through).unwrap();
        for (index, step) in steps.iter().enumerate() {
            let (expected, got) = (perform(&plain, step), perform(&through, step));
            prop_assert_eq!(expected, got, "step {} {:?}", index, step);
        }
        let (expected, got) = (tree(&plain), tree(&through));
        prop_assert_eq!(&expected, &got);
        prop_assert_eq!(&expected, &tree(&world.behind().join(&number)));
        fs::remove_dir_all(&plain).unwrap();
        fs::remove_dir_all(&through).unwrap();
    });
}

#[test]
fn operations_give_what_they_give_natively() {
    same_as_native(|_| {}, 150);
}

#[test]
fn without_a_cache_too() {
    same_as_native(|share| share.cache = Cache::None, 100);
}

#[test]
fn with_writes_kept_back_too() {
    same_as_native(
        |share| {
            share.cache = Cache::Always;
            share.writeback = true;
        },
        100,
    );
}

#[test]
fn beyond_the_budget_of_descriptors_too() {
    // So few that all nodes but the root are held by handles.
    same_as_native(|share| share.descriptors = Some(60), 100);
}
