//! File systems that are full, out of inodes, or become read-only.

use crate::place::{Mode, Place};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Writes until there is no room; how many bytes were taken.
fn fill(file: &mut File) -> usize {
    let chunk: Vec<u8> = (0..40_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut total = 0;
    loop {
        match file.write(&chunk[total % 40_000..]) {
            Ok(count) => total += count,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::StorageFull, "{error}");
                return total;
            }
        }
        assert!(total < 1 << 30, "it is never full");
    }
}

/// Every byte that was taken is there, and nothing else.
fn check(path: &Path, total: usize) {
    let mut bytes = Vec::new();
    File::open(path).and_then(|mut file| file.read_to_end(&mut bytes)).expect("it can be read");
    assert_eq!(bytes.len(), total, "{}", path.display());
    let right = bytes
        .iter()
        .enumerate()
        .all(|(i, byte)| *byte == (((i % 40_000) as u32).wrapping_mul(2_654_435_761) >> 24) as u8);
    assert!(right, "{} has other bytes", path.display());
}

fn out_of_room(mode: Mode) {
    let mut place = Place::new();
    place.on("tmpfs", "size=3M,nr_inodes=40", "tmpfs");
    let front = place.show("front", mode);
    fs::write(front.join("before"), "kept").expect("there is room");
    let path = front.join("large");
    let mut file = File::create(&path).expect("a file");
    let total = fill(&mut file);
    assert!((2 << 20..=3 << 20).contains(&total), "{mode:?}: {total} bytes");
    file.sync_all().expect("what was taken is kept");
    // Neither by another way; but in place there is room.
    let full = |result: std::io::Result<()>| {
        assert_eq!(result.expect_err("it is full").kind(), ErrorKind::StorageFull);
    };
    full(file.write_all_at(&[1; 8192], 1 << 21 | 1 << 22));
    full(
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 8 << 20, 8192).map_err(Into::into),
    );
    file.write_all_at(&[0], 0).expect("its own place is written");
    drop(file);
    check(&path, total);
    check(&place.path("behind/large"), total);
    assert_eq!(fs::read(front.join("before")).expect("kept"), b"kept");
    // With room again, it goes on.
    fs::remove_file(&path).expect("a file is removed");
    fs::write(front.join("after"), vec![7; 1 << 20]).expect("there is room again");
    assert_eq!(fs::read(place.path("behind/after")).expect("there"), vec![7; 1 << 20]);
    // Out of inodes.
    let made =
        (0..100).map(|i| fs::create_dir(front.join(format!("d{i}")))).take_while(Result::is_ok).count();
    assert!(made < 40, "{made}");
    full(fs::create_dir(front.join("more")));
    full(File::create(front.join("more")).map(drop));
    full(std::os::unix::fs::symlink("a", front.join("more")));
    fs::remove_dir(front.join("d0")).expect("a directory is removed");
    File::create(front.join("more")).expect("there is room again");
}

#[test]
fn a_full_file_system_is_told_and_nothing_is_lost() {
    for mode in [Mode::Auto, Mode::None] {
        out_of_room(mode);
    }
}

/// Where writes are kept back, the error comes when they are sent.
#[test]
fn what_was_kept_back_and_found_no_room_is_told() {
    let mut place = Place::new();
    place.on("tmpfs", "size=1M", "tmpfs");
    let front = place.show("front", Mode::Writeback);
    let mut file = File::create(front.join("large")).expect("a file");
    let written = file.write_all(&vec![1; 4 << 20]);
    let synced = file.sync_all();
    let error = written.and(synced).expect_err("it is full");
    assert_eq!(error.kind(), ErrorKind::StorageFull, "{error}");
}

#[test]
fn a_file_system_that_becomes_read_only() {
    let mut place = Place::new();
    place.on("tmpfs", "size=1M", "tmpfs");
    let front = place.show("front", Mode::Auto);
    fs::write(front.join("file"), "before").expect("a file");
    let behind = place.path("behind").display().to_string();
    kso_tests::argv(["mount", "-o", "remount,ro", &behind]).run().ok();
    let refused = |result: std::io::Result<()>| {
        assert_eq!(result.expect_err("read-only").kind(), ErrorKind::ReadOnlyFilesystem);
    };
    refused(fs::write(front.join("file"), "after"));
    refused(File::create(front.join("new")).map(drop));
    refused(fs::create_dir(front.join("new")));
    refused(fs::remove_file(front.join("file")));
    refused(fs::rename(front.join("file"), front.join("new")));
    refused(std::os::unix::fs::symlink("a", front.join("new")));
    refused(fs::hard_link(front.join("file"), front.join("new")));
    refused(fs::set_permissions(front.join("file"), std::os::unix::fs::PermissionsExt::from_mode(0o600)));
    assert_eq!(fs::read(front.join("file")).expect("it can be read"), b"before");
    kso_tests::argv(["mount", "-o", "remount,rw", &behind]).run().ok();
    let mut file = OpenOptions::new().append(true).open(front.join("file")).expect("it is writable again");
    file.write_all(b" and after").expect("it is written");
    assert_eq!(fs::read(place.path("behind/file")).expect("there"), b"before and after");
}
