//! A share that is performed elsewhere, mounted: programs see what they would on the directory itself, though its performer
//! dies again and again.
//!
//! As root, through /dev/fuse; elsewhere these tests do nothing.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

mod common;
mod steps;

use common::performers::{Dialler, Performers};
use kso_files::mount::{MountError, MountOptions, Mounted, mount_relayed};
use kso_files::{Cache, Share};
use proptest::prelude::*;
use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;
use steps::{Step, perform, steps, tree};

/// A directory, and the same one mounted elsewhere.
struct World {
    mounted: Option<Mounted>,
    performers: Arc<Performers>,
    directory: tempfile::TempDir,
}

fn can_mount() -> bool {
    let can = rustix::process::geteuid().is_root() && Path::new("/dev/fuse").exists();
    if !can {
        eprintln!("skipped: needs root and /dev/fuse");
    }
    can
}

impl World {
    fn new(change: impl FnOnce(&mut Share)) -> Option<Self> {
        if !can_mount() {
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let (behind, front) = (directory.path().join("behind"), directory.path().join("front"));
        fs::create_dir(&behind).unwrap();
        fs::create_dir(&front).unwrap();
        let mut share = Share::new(&behind);
        share.devices = true;
        change(&mut share);
        let performers = Performers::new(share);
        let options = MountOptions { no_privilege: false, ..MountOptions::default() };
        let mounted = mount_relayed(Arc::new(Dialler(performers.clone())), &front, options).unwrap();
        Some(Self { mounted: Some(mounted), performers, directory })
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
    same_as_native(|_| {}, 100);
}

#[test]
fn without_a_cache_too() {
    same_as_native(|share| share.cache = Cache::None, 60);
}

#[test]
fn with_writes_kept_back_too() {
    same_as_native(
        |share| {
            share.cache = Cache::Always;
            share.writeback = true;
        },
        60,
    );
}

/// Whether nobody can know what became of a step: an error that only a death gives.
fn uncertain(step: &Step, got: &str) -> bool {
    // What has no name is lost with its performer.
    let nameless = matches!(step, Step::Temporary(..)) && got.contains("code: 116,");
    nameless || got.contains("code: 5,") || got.contains("Err(Some(5))")
}

#[test]
fn random_operations_survive_random_deaths() {
    let Some(world) = World::new(|share| share.cache = Cache::None) else { return };
    let count = AtomicU32::new(0);
    let failed = AtomicU32::new(0);
    let config = ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(steps in steps(), seed in any::<u64>())| {
        let number = count.fetch_add(1, Ordering::Relaxed).to_string();
        let plain = world.directory.path().join("plain").join(&number);
        let through = world.front().join(&number);
        let behind = world.behind().join(&number);
        world.performers.live();
        fs::create_dir_all(&plain).unwrap();
        fs::create_dir(&through).unwrap();
        // Some live for a few requests only, some for hundreds; none for so short that nothing could ever be written.
        world.performers.die_at_random(seed, 15 + (seed % 3) as u32);
        for (index, step) in steps.iter().enumerate() {
            let before = tree(&plain);
            let (expected, got) = (perform(&plain, step), perform(&through, step));
            if expected == got {
                continue;
            }
            prop_assert!(uncertain(step, &got), "step {} {:?}: {} instead of {}", index, step, got, expected);
            failed.fetch_add(1, Ordering::Relaxed);
            // It was performed, or it was not; nothing else.
            let (now, after) = (tree(&behind), tree(&plain));
            let whole = now == before || now == after;
            let parts = matches!(step, Step::Temporary(..));
            prop_assert!(whole || parts, "step {} {:?}: {:?} is neither {:?} nor {:?}", index, step, now, before, after);
            fs::remove_dir_all(&plain).unwrap();
            assert!(Command::new("cp").arg("-a").arg(&behind).arg(&plain).status().unwrap().success());
        }
        prop_assert_eq!(&tree(&plain), &tree(&behind));
        world.performers.live();
        prop_assert_eq!(&tree(&plain), &tree(&through));
        fs::remove_dir_all(&plain).unwrap();
        fs::remove_dir_all(&through).unwrap();
    });
    let dials = world.performers.dials.load(Ordering::SeqCst);
    println!("{dials} performers, {} operations of unknown fate", failed.load(Ordering::SeqCst));
    assert!(dials > 40);
}

#[test]
fn programs_that_are_in_the_middle_go_on() {
    let Some(world) = World::new(|_| {}) else { return };
    const THREADS: u8 = 4;
    const BLOCKS: u64 = 200;
    const BLOCK: usize = 10_000;
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..THREADS)
            .map(|thread| {
                let path = world.front().join(format!("file-{thread}"));
                scope.spawn(move || {
                    // Opened once, by whomever, and used to the end.
                    let file = fs::File::options()
                        .create(true)
                        .read(true)
                        .write(true)
                        .truncate(false)
                        .open(path)
                        .unwrap();
                    for block in 0..BLOCKS {
                        let byte = thread ^ block as u8;
                        file.write_all_at(&vec![byte; BLOCK], block * BLOCK as u64).unwrap();
                        let back = block / 2;
                        let mut bytes = vec![0; BLOCK];
                        file.read_exact_at(&mut bytes, back * BLOCK as u64).unwrap();
                        assert_eq!(bytes, vec![thread ^ back as u8; BLOCK], "block {back} of {thread}");
                    }
                    file.sync_all().unwrap();
                })
            })
            .collect();
        let killer = scope.spawn(|| {
            let mut before = 0;
            while !over.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
                // However slow this machine is, each has performed something.
                let performed = world.performers.seen.lock().unwrap().len();
                if performed > before + 40 {
                    world.performers.kill();
                    before = performed;
                }
            }
        });
        let results: Vec<_> = writers.into_iter().map(|writer| writer.join()).collect();
        over.store(true, Ordering::SeqCst);
        killer.join().unwrap();
        assert!(results.into_iter().all(|result| result.is_ok()));
    });
    for thread in 0..THREADS {
        let bytes = fs::read(world.behind().join(format!("file-{thread}"))).unwrap();
        assert_eq!(bytes.len(), BLOCKS as usize * BLOCK);
        for (block, bytes) in bytes.chunks(BLOCK).enumerate() {
            assert!(bytes.iter().all(|byte| *byte == thread ^ block as u8), "block {block} of {thread}");
        }
    }
}

#[test]
fn big_files_are_whole() {
    let Some(world) = World::new(|_| {}) else { return };
    let data: Vec<u8> = (0..8 << 20).map(|at: u32| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut file =
        fs::File::options().create_new(true).read(true).write(true).open(world.front().join("big")).unwrap();
    file.write_all(&data).unwrap();
    world.performers.kill();
    file.seek(SeekFrom::Start(0)).unwrap();
    let mut got = Vec::new();
    file.read_to_end(&mut got).unwrap();
    assert!(got == data);
    assert!(fs::read(world.behind().join("big")).unwrap() == data);
    // By others too, and with what the client does not have.
    fs::write(world.behind().join("other"), &data).unwrap();
    assert!(fs::read(world.front().join("other")).unwrap() == data);
}

#[test]
fn nothing_is_mounted_without_a_performer() {
    if !can_mount() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let performers = Performers::new(Share::new(directory.path()));
    performers.refuse(1);
    let target = directory.path().join("target");
    fs::create_dir(&target).unwrap();
    let dial = || Arc::new(Dialler(performers.clone()));
    let error = mount_relayed(dial(), &target, MountOptions::default()).unwrap_err();
    assert!(matches!(error, MountError::Unreachable(_)), "{error}");
    assert!(error.to_string().contains("refused"), "{error}");
    // One that is there, whose share is not.
    let gone = Performers::new(Share::new(directory.path().join("none")));
    assert!(mount_relayed(Arc::new(Dialler(gone)), &target, MountOptions::default()).is_err());
    let mounted =
        mount_relayed(dial(), &target, MountOptions { read_only: true, ..MountOptions::default() }).unwrap();
    assert!(target.join("target").is_dir());
    assert_eq!(fs::write(target.join("x"), b"x").unwrap_err().raw_os_error(), Some(30));
    // Unmounting waits for nobody, though somebody waits.
    performers.refuse(usize::MAX);
    performers.kill();
    let waiting = std::thread::spawn({
        let path = target.join("later");
        move || fs::metadata(path)
    });
    drop(mounted);
    assert!(waiting.join().unwrap().is_err());
    assert!(!target.join("target").exists());
}

#[test]
fn locks_are_waited_for_by_every_thread_of_the_mount() {
    let Some(world) = World::new(|_| {}) else { return };
    fs::write(world.front().join("lock"), b"").unwrap();
    let open = || fs::File::options().read(true).write(true).open(world.front().join("lock")).unwrap();
    let counter = world.front().join("counter");
    fs::write(&counter, b"0").unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let lock = open();
                for _ in 0..10 {
                    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
                    let count: u32 = fs::read_to_string(&counter).unwrap().parse().unwrap();
                    fs::write(&counter, (count + 1).to_string()).unwrap();
                    rustix::fs::flock(&lock, rustix::fs::FlockOperation::Unlock).unwrap();
                }
            });
        }
    });
    assert_eq!(fs::read(&counter).unwrap(), b"40");
}
