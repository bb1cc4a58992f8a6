//! A client that asks for what it may not have, for too much, or for nonsense: it is refused, and the service goes on.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

mod common;

use common::{Client, is_root, text};
use kso_files::abi::{self, InHeader, Opcode, ROOT, Valid};
use kso_files::{Outcome, Share};
use proptest::prelude::*;
use rustix::fs::OFlags;
use rustix::io::Errno;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use zerocopy::IntoBytes;

const WRITE: u32 = OFlags::RDWR.bits();
const ALICE: (u32, u32) = (1000, 1000);
const BOB: (u32, u32) = (1001, 1001);

fn raw(error: Errno) -> i32 {
    error.raw_os_error()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn a_file_that_another_made_meanwhile_is_not_opened_unchecked() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("secret");
    fs::write(&path, "secret").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    Client::run(Share::new(directory.path()), |mut client| {
        // The client asks for no permission where it thinks that it makes the file: it has to look again.
        client.user = BOB;
        assert_eq!(client.create(ROOT, "secret", 0, 0o644), Err(raw(Errno::STALE)));
        assert_eq!(
            client.create(ROOT, "secret", WRITE | OFlags::TRUNC.bits(), 0o644),
            Err(raw(Errno::STALE))
        );
        assert_eq!(client.create(ROOT, "secret", OFlags::EXCL.bits(), 0o644), Err(raw(Errno::EXIST)));
        client.user = (0, 0);
        assert!(client.create(ROOT, "secret", 0, 0o644).is_ok());
    });
    assert_eq!(fs::read(&path).unwrap(), b"secret");
}

#[test]
fn a_change_of_owner_to_nobody_clears_bits() {
    if !is_root() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    for (name, bits) in [("file", 0o6755), ("locks", 0o2744), ("others", 0o6755)] {
        fs::write(path(name), "").unwrap();
        chown(path(name), Some(ALICE.0), Some(ALICE.1)).unwrap();
        fs::set_permissions(path(name), fs::Permissions::from_mode(bits)).unwrap();
    }
    fs::create_dir(path("directory")).unwrap();
    fs::set_permissions(path("directory"), fs::Permissions::from_mode(0o2755)).unwrap();
    Client::run(Share::new(directory.path()), |mut client| {
        let nothing = abi::SetAttrIn::default();
        let mut nobody = |user, name: &str| {
            client.user = user;
            let node = client.find(ROOT, name).unwrap();
            client.get::<abi::AttrOut>(Opcode::SetAttr, node, nothing.as_bytes()).unwrap().attr.mode & 0o7777
        };
        assert_eq!(nobody(ALICE, "file"), 0o755);
        assert_eq!(nobody(ALICE, "locks"), 0o2744);
        // Of what is another's nothing is changed.
        assert_eq!(nobody(BOB, "others"), 0o6755);
        assert_eq!(nobody((0, 0), "others"), 0o755);
        assert_eq!(nobody((0, 0), "directory"), 0o2755);
    });
    assert_eq!(mode(&path("file")), 0o755);
}

fn range(owner: u64, fh: u64, kind: u32, start: u64, end: u64, pid: u32) -> abi::LkIn {
    abi::LkIn { fh, owner, lk: abi::FileLock { start, end, kind, pid }, ..abi::LkIn::default() }
}

#[test]
fn whoever_holds_a_lock_is_a_process_of_the_client_or_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    fs::write(&path, "0123456789").unwrap();
    Client::run(Share::new(directory.path()), move |mut client| {
        let node = client.find(ROOT, "file").unwrap();
        let fh = client.open(node, WRITE).unwrap();
        client.ask(Opcode::SetLk, node, range(7, fh, 1, 0, 4, 4711).as_bytes()).unwrap();
        client.ask(Opcode::SetLk, node, range(8, fh, 1, 5, 9, 4712).as_bytes()).unwrap();
        let mut holder = |start, end| {
            let ask = range(9, fh, 0, start, end, 4713);
            let lk = client.get::<abi::LkOut>(Opcode::GetLk, node, ask.as_bytes()).unwrap().lk;
            (lk.kind, lk.start, lk.end, lk.pid)
        };
        assert_eq!(holder(0, 0), (1, 0, 4, 4711));
        assert_eq!(holder(6, 100), (1, 5, 9, 4712));
        assert_eq!(holder(10, 100).0, 2);
        // Somebody of the host's, whose number means nothing to the client.
        let file = fs::File::options().write(true).open(&path).unwrap();
        let lock = kso_sys::file::RangeLock { kind: 1, start: 50, length: 10 };
        lock.set(std::os::fd::AsFd::as_fd(&file)).unwrap();
        assert_eq!(holder(50, 51), (1, 50, 59, 0));
    });
}

#[test]
fn asking_for_locks_takes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("file"), "").unwrap();
    let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
    Client::run(Share::new(directory.path()), move |mut client| {
        let node = client.find(ROOT, "file").unwrap();
        let fh = client.open(node, WRITE).unwrap();
        let before = descriptors();
        for owner in 0..10_000 {
            client.ask(Opcode::GetLk, node, range(owner, fh, 1, 0, 9, 1).as_bytes()).unwrap();
        }
        // Other tests of this process open files, too.
        assert!(descriptors() < before + 1000);
    });
}

#[test]
fn locks_that_wait_are_counted() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("file"), "").unwrap();
    Client::run(Share::new(directory.path()), move |mut client| {
        let node = client.find(ROOT, "file").unwrap();
        let fh = client.open(node, WRITE).unwrap();
        client.ask(Opcode::SetLk, node, range(1, fh, 1, 0, 9, 1).as_bytes()).unwrap();
        let mut refused = 0;
        for _ in 0..1100 {
            match client.begin(Opcode::SetLkW, node, range(2, fh, 1, 0, 9, 2).as_bytes()) {
                (Outcome::Later(_), _) => {}
                (outcome, reply) => {
                    assert_eq!(client.end(outcome, reply), Err(raw(Errno::NOLCK)));
                    refused += 1;
                }
            }
        }
        assert_eq!(refused, 1100 - 1024);
        // One that nobody knows, and one twice.
        for unique in [1, 1, client.unique] {
            client.ask(Opcode::Interrupt, 0, &u64::to_ne_bytes(unique)).unwrap_err();
        }
        client.ask(Opcode::SetLk, node, range(1, fh, 2, 0, 9, 1).as_bytes()).unwrap();
        // A range that ends before it begins, or is none.
        for (start, end, kind) in [(9, 3, 1), (u64::MAX, u64::MAX, 1), (0, 9, 7), (0, 9, u32::MAX)] {
            let ask = range(3, fh, kind, start, end, 3);
            assert_eq!(client.ask(Opcode::SetLk, node, ask.as_bytes()), Err(raw(Errno::INVAL)));
        }
    });
}

#[test]
fn flags_that_mean_more_are_left_out() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    fs::write(&path, "content").unwrap();
    Client::run(Share::new(directory.path()), |mut client| {
        let node = client.find(ROOT, "file").unwrap();
        for flags in [OFlags::PATH, OFlags::TMPFILE, OFlags::CREATE | OFlags::EXCL, OFlags::DIRECTORY] {
            let fh = client.open(node, flags.bits()).unwrap();
            assert_eq!(client.read(node, fh, 0, 10).unwrap(), b"content");
        }
        assert_eq!(client.open(node, 3), Err(raw(Errno::INVAL)));
        // A mode is no type.
        let (made, _) = client.create(ROOT, "made", WRITE, 0o060_777).unwrap();
        let get = abi::GetAttrIn::default();
        let attr = client.get::<abi::AttrOut>(Opcode::GetAttr, made, get.as_bytes()).unwrap().attr;
        assert_eq!(attr.mode & 0o170_000, 0o100_000);
        for kind in [0, 0o040_000, 0o120_000, 0o170_000] {
            let make = abi::MkNodIn { mode: kind | 0o644, ..abi::MkNodIn::default() };
            let made = client.struct_and_name(Opcode::MkNod, ROOT, &make, "node");
            assert_eq!(made, Err(raw(Errno::INVAL)), "{kind:o}");
        }
        // Bits that are none, and two that exclude each other.
        for flags in [8_u32, 3, u32::MAX] {
            let head = abi::Rename2In { newdir: ROOT, flags, padding: 0 };
            let body = [head.as_bytes(), &text("file"), &text("to")].concat();
            assert!(client.ask(Opcode::Rename2, ROOT, &body).is_err(), "{flags:x}");
        }
    });
    assert_eq!(fs::read(path).unwrap(), b"content");
    assert!(!directory.path().join("to").exists());
}

#[test]
fn offsets_and_lengths_beyond_everything() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("file"), "content").unwrap();
    Client::run(Share::new(directory.path()), |mut client| {
        let node = client.find(ROOT, "file").unwrap();
        let fh = client.open(node, WRITE).unwrap();
        let huge = [1 << 63, u64::MAX, u64::MAX - 4095, i64::MAX as u64];
        for offset in huge {
            for length in [0, 1, 1 << 62, u64::MAX] {
                let allocate = abi::FallocateIn { fh, offset, length, ..abi::FallocateIn::default() };
                assert!(client.ask(Opcode::Fallocate, node, allocate.as_bytes()).is_err());
                let copy = abi::CopyFileRangeIn {
                    fh_in: fh,
                    off_in: 0,
                    nodeid_out: node,
                    fh_out: fh,
                    off_out: offset,
                    len: length,
                    flags: 0,
                };
                for opcode in [Opcode::CopyFileRange, Opcode::CopyFileRange64] {
                    let _ = client.ask(opcode, node, copy.as_bytes());
                }
            }
            for whence in [0, 1, 2, 3, 4, 5, u32::MAX] {
                let seek = abi::LseekIn { fh, offset, whence, padding: 0 };
                assert!(client.ask(Opcode::Lseek, node, seek.as_bytes()).is_err(), "{offset} {whence}");
            }
            assert!(client.write(node, fh, offset, b"x").is_err());
            let set = abi::SetAttrIn { valid: Valid::SIZE.bits(), size: offset, ..abi::SetAttrIn::default() };
            assert!(client.ask(Opcode::SetAttr, node, set.as_bytes()).is_err());
        }
        // Times that are none.
        let set = abi::SetAttrIn {
            valid: Valid::MTIME.bits(),
            mtimensec: 1_000_000_000,
            ..abi::SetAttrIn::default()
        };
        assert_eq!(client.ask(Opcode::SetAttr, node, set.as_bytes()), Err(raw(Errno::INVAL)));
        // Places in a directory that nobody was told of, and room for nothing.
        let directory = client.open_directory(ROOT).unwrap();
        for (offset, size) in
            [(u64::MAX, 4096), (1 << 62, 4096), (12345, 4096), (0, 0), (0, 8), (0, u32::MAX)]
        {
            for opcode in [Opcode::ReadDir, Opcode::ReadDirPlus] {
                let read = abi::ReadIn { fh: directory, offset, size, ..abi::ReadIn::default() };
                let _ = client.ask(opcode, ROOT, read.as_bytes());
            }
        }
        assert_eq!(client.read(node, fh, 0, 100).unwrap(), b"content");
        assert_eq!(client.list(ROOT).unwrap(), ["file"]);
        // All begins anew: nothing of before is known.
        client.init(common::offers()).unwrap();
        assert_eq!(client.read(node, fh, 0, 100), Err(raw(Errno::BADF)));
        assert!(client.find(ROOT, "file").is_ok());
    });
}

/// A share with links out of it, beside what is nobody's business.
fn place() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let (share, outside) = (directory.path().join("share"), directory.path().join("outside"));
    for path in [&share, &outside, &share.join("d")] {
        fs::create_dir(path).unwrap();
    }
    fs::write(outside.join("secret"), "secret").unwrap();
    symlink(&outside, share.join("o")).unwrap();
    symlink("../outside/secret", share.join("l")).unwrap();
    fs::write(share.join("f"), "inside").unwrap();
    (directory, outside)
}

/// One number of those that bounds are made of.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0..12_u64,
        1 => Just(u64::MAX),
        1 => Just(1 << 32),
        1 => Just(1 << 63),
        1 => 0..5000_u64,
        1 => any::<u64>(),
    ]
}

/// The operation, the node, numbers, and names of a request that may or may not make sense.
type Nonsense = (u32, u64, Vec<u64>, Vec<&'static str>, u16);

fn nonsense() -> impl Strategy<Value = Nonsense> {
    let name = prop_oneof![
        Just("f"),
        Just("l"),
        Just("o"),
        Just("d"),
        Just(".."),
        Just("../outside/new"),
        Just("o/new"),
        Just("new"),
        Just(""),
        Just("user.a"),
        Just("\u{7f}"),
    ];
    let numbers = prop::collection::vec(number(), 0..14);
    (
        1..60_u32,
        number(),
        numbers,
        prop::collection::vec(name, 0..3),
        prop_oneof![8 => Just(0_u16), 1 => any::<u16>()],
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever comes, in whatever order, nothing outside is touched, and the service still serves.
    #[test]
    fn nonsense_harms_nobody(requests in prop::collection::vec(nonsense(), 1..400)) {
        let (directory, outside) = place();
        Client::run(Share::new(directory.path().join("share")), move |mut client| {
            for name in ["f", "l", "o", "d"] {
                client.find(ROOT, name).unwrap();
            }
            for (opcode, node, numbers, names, extension) in requests {
                // INIT and DESTROY forget everything: then the rest is refused without being looked at.
                if [Opcode::Init as u32, Opcode::Destroy as u32].contains(&opcode) {
                    continue;
                }
                // A disk that this test fills is no gain.
                if opcode == Opcode::Fallocate as u32 && numbers.iter().any(|number| *number > 1 << 20) {
                    continue;
                }
                let mut body: Vec<u8> = numbers.iter().flat_map(|number| number.to_ne_bytes()).collect();
                for name in names {
                    body.extend(text(name));
                }
                let header = InHeader {
                    len: (abi::IN_HEADER + body.len()) as u32,
                    opcode,
                    unique: 3,
                    nodeid: node,
                    total_extlen: extension,
                    ..InHeader::default()
                };
                let mut request = [header.as_bytes(), &body].concat();
                let (outcome, reply) = client.raw(&mut request, 8192);
                if let Outcome::Reply(length) = outcome {
                    assert!((16..=8192).contains(&length) && reply.len() == length);
                }
            }
            assert!(client.ask(Opcode::StatFs, ROOT, &[]).is_ok());
        });
        let names: Vec<_> = fs::read_dir(&outside).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        prop_assert_eq!(names, ["secret"]);
        prop_assert_eq!(fs::read(outside.join("secret")).unwrap(), b"secret");
        prop_assert_eq!(fs::metadata(outside.join("secret")).unwrap().nlink(), 1);
    }
}
