//! What becomes of a client's files and requests when the kernel that performs them dies, rule by rule.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

mod common;

use common::performers::{Cut, Dialler, Performers};
use common::{Client, text};
use kso_files::abi::{self, Opcode, ROOT};
use kso_files::{Cache, Outcome, Share};
use rustix::fs::OFlags;
use rustix::io::Errno;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use zerocopy::IntoBytes;

const READ: u32 = OFlags::RDONLY.bits();
const BOTH: u32 = OFlags::RDWR.bits();

fn raw(errno: Errno) -> i32 {
    errno.raw_os_error()
}

/// A directory that performers share with one client.
struct Place {
    performers: Arc<Performers>,
    client: Client,
    directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let performers = Self::performers(directory.path());
        let client = Client::relayed(Arc::new(Dialler(performers.clone())));
        Self { performers, client, directory }
    }

    fn performers(directory: &Path) -> Arc<Performers> {
        Performers::new(Share { cache: Cache::None, ..Share::new(directory) })
    }

    /// One with a directory and a file in it: their nodes.
    fn with_file() -> (Self, u64, u64) {
        let mut place = Self::new();
        fs::create_dir(place.path("d")).unwrap();
        fs::write(place.path("d/file"), b"0123456789").unwrap();
        let d = place.client.find(ROOT, "d").unwrap();
        let file = place.client.find(d, "file").unwrap();
        (place, d, file)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn sync(&mut self, node: u64, fh: u64) -> common::Reply {
        self.client.ask(Opcode::Fsync, node, abi::FsyncIn { fh, ..abi::FsyncIn::default() }.as_bytes())
    }

    fn lock(&mut self, node: u64, fh: u64, owner: u64, kind: u32) -> common::Reply {
        self.client.ask(Opcode::SetLk, node, range(fh, owner, kind).as_bytes())
    }
}

fn range(fh: u64, owner: u64, kind: u32) -> abi::LkIn {
    let lk = abi::FileLock { start: 0, end: 9, kind, pid: 1 };
    abi::LkIn { fh, owner, lk, ..abi::LkIn::default() }
}

#[test]
fn nodes_and_open_files_outlive_their_performer() {
    let (mut place, d, file) = Place::with_file();
    let fh = place.client.open(file, BOTH | OFlags::TRUNC.bits() | OFlags::CREATE.bits()).unwrap();
    place.client.write(file, fh, 0, b"written").unwrap();
    let listed = place.client.open_directory(d).unwrap();
    for round in 0..5 {
        place.performers.kill();
        assert_eq!(place.client.read(file, fh, 0, 100).unwrap(), b"written", "in round {round}");
        place.performers.kill();
        place.client.write(file, fh, 0, b"written").unwrap();
        place.performers.kill();
        assert_eq!(place.client.list(d).unwrap(), ["file"]);
        // A directory that was open is read on.
        let read = abi::ReadIn { fh: listed, size: 4096, ..abi::ReadIn::default() };
        assert!(!place.client.ask(Opcode::ReadDir, d, read.as_bytes()).unwrap().is_empty());
        // The client's numbers stay what they are.
        place.performers.kill();
        assert_eq!(place.client.find(ROOT, "d").unwrap(), d);
        assert_eq!(place.client.find(d, "file").unwrap(), file);
    }
    assert_eq!(place.performers.dials.load(Ordering::SeqCst), 21);
    let release = abi::ReleaseIn { fh, ..abi::ReleaseIn::default() };
    place.performers.kill();
    place.client.ask(Opcode::Release, file, release.as_bytes()).unwrap();
    assert_eq!(place.client.read(file, fh, 0, 1), Err(raw(Errno::BADF)));
}

#[test]
fn what_was_renamed_is_found_by_its_new_name() {
    let (mut place, d, file) = Place::with_file();
    let fh = place.client.open(file, READ).unwrap();
    let both = [ROOT.as_bytes(), &text("file"), &text("moved")].concat();
    place.client.ask(Opcode::Rename, d, &both).unwrap();
    place.performers.kill();
    assert_eq!(place.client.read(file, fh, 0, 4).unwrap(), b"0123");
    // The directory too, with what is in it.
    let back = [d.as_bytes(), &text("moved"), &text("file")].concat();
    place.client.ask(Opcode::Rename, ROOT, &back).unwrap();
    let both = [ROOT.as_bytes(), &text("d"), &text("e")].concat();
    place.client.ask(Opcode::Rename, ROOT, &both).unwrap();
    place.performers.kill();
    assert_eq!(place.client.read(file, fh, 0, 4).unwrap(), b"0123");
    // Exchanged with another.
    let (other, _) = place.client.create(d, "other", BOTH, 0o644).unwrap();
    let exchange = abi::Rename2In { newdir: d, flags: 2, padding: 0 };
    let body = [exchange.as_bytes(), &text("other"), &text("file")].concat();
    place.client.ask(Opcode::Rename2, d, &body).unwrap();
    place.performers.kill();
    assert_eq!(place.client.read(file, fh, 0, 4).unwrap(), b"0123");
    assert_eq!(place.client.find(d, "file").unwrap(), other);
    // A second name serves when the first is gone.
    place.client.struct_and_name(Opcode::Link, ROOT, &abi::LinkIn { oldnodeid: file }, "link").unwrap();
    place.client.ask(Opcode::Unlink, d, &text("other")).unwrap();
    place.performers.kill();
    assert_eq!(place.client.read(file, fh, 0, 4).unwrap(), b"0123");
}

#[test]
fn what_is_not_the_same_any_more_is_stale() {
    let stale = raw(Errno::STALE);
    // Another file of the name.
    let (mut place, d, file) = Place::with_file();
    let fh = place.client.open(file, READ).unwrap();
    fs::rename(place.path("d/file"), place.path("away")).unwrap();
    fs::write(place.path("d/file"), b"another").unwrap();
    place.performers.kill();
    assert_eq!(place.client.read(file, fh, 0, 4), Err(stale));
    assert_eq!(place.client.open(file, READ), Err(stale));
    let get = abi::GetAttrIn::default();
    assert_eq!(place.client.ask(Opcode::GetAttr, file, get.as_bytes()), Err(stale));
    // The client looks again, and gets another node; the first, found where it is now, serves again.
    let another = place.client.find(d, "file").unwrap();
    assert_ne!(another, file);
    assert_eq!(place.client.find(ROOT, "away").unwrap(), file);
    assert_eq!(place.client.read(file, fh, 0, 4).unwrap(), b"0123");

    // None.
    let (mut place, d, file) = Place::with_file();
    fs::remove_dir_all(place.path("d")).unwrap();
    place.performers.kill();
    assert_eq!(place.client.open(file, READ), Err(stale));
    assert_eq!(place.client.lookup(d, "file").unwrap_err(), stale);

    // What has no name, but is open.
    let (mut place, d, file) = Place::with_file();
    let fh = place.client.open(file, READ).unwrap();
    let create =
        abi::CreateIn { flags: BOTH | OFlags::TMPFILE.bits(), mode: 0o600, ..abi::CreateIn::default() };
    let temporary = place.client.ask(Opcode::TmpFile, d, &[create.as_bytes(), &text("x")].concat());
    place.client.ask(Opcode::Unlink, d, &text("file")).unwrap();
    assert_eq!(place.client.read(file, fh, 0, 4).unwrap(), b"0123");
    place.performers.kill();
    assert_eq!(place.client.read(file, fh, 0, 4), Err(stale));
    if let Ok(reply) = temporary {
        let number = |at: usize| u64::from_ne_bytes(reply[at..at + 8].try_into().unwrap());
        assert_eq!(place.client.read(number(0), number(128), 0, 4), Err(stale));
    }

    // The same number in another life: a new file that got it.
    let (mut place, _, file) = Place::with_file();
    let before = fs::metadata(place.path("d/file")).unwrap();
    for _ in 0..100 {
        fs::remove_file(place.path("d/file")).unwrap();
        fs::write(place.path("d/file"), b"another").unwrap();
        if std::os::unix::fs::MetadataExt::ino(&fs::metadata(place.path("d/file")).unwrap())
            == std::os::unix::fs::MetadataExt::ino(&before)
        {
            break;
        }
    }
    place.performers.kill();
    assert_eq!(place.client.open(file, READ), Err(stale));
}

/// What is asked, of a directory `d`, a file in it and its open file; and whether it is asked again.
type Case = (&'static str, Opcode, fn(u64, u64, u64) -> (u64, Vec<u8>), bool);

fn cases() -> Vec<Case> {
    fn create(d: u64, flags: OFlags) -> (u64, Vec<u8>) {
        let create = abi::CreateIn { flags: flags.bits() | BOTH, mode: 0o644, ..abi::CreateIn::default() };
        (d, [create.as_bytes(), &text("new")].concat())
    }
    fn open(file: u64, flags: OFlags) -> (u64, Vec<u8>) {
        (file, abi::OpenIn { flags: flags.bits() | BOTH, open_flags: 0 }.as_bytes().to_vec())
    }
    fn write(file: u64, fh: u64, flags: OFlags) -> (u64, Vec<u8>) {
        let write = abi::WriteIn { fh, offset: 10, size: 3, flags: flags.bits(), ..abi::WriteIn::default() };
        (file, [write.as_bytes(), b"abc"].concat())
    }
    fn xattr(file: u64, flags: u32) -> (u64, Vec<u8>) {
        let set = abi::SetXattrIn { size: 1, flags, ..abi::SetXattrIn::default() };
        (file, [set.as_bytes(), &text("user.x"), b"y"].concat())
    }
    vec![
        ("lookup", Opcode::Lookup, |d, _, _| (d, text("file")), true),
        ("getattr", Opcode::GetAttr, |_, f, _| (f, abi::GetAttrIn::default().as_bytes().to_vec()), true),
        ("open", Opcode::Open, |_, f, _| open(f, OFlags::empty()), true),
        ("open truncating", Opcode::Open, |_, f, _| open(f, OFlags::TRUNC), false),
        ("opendir", Opcode::OpenDir, |d, _, _| (d, abi::OpenIn::default().as_bytes().to_vec()), true),
        ("create", Opcode::Create, |d, _, _| create(d, OFlags::CREATE), true),
        ("create anew", Opcode::Create, |d, _, _| create(d, OFlags::CREATE | OFlags::EXCL), false),
        ("write", Opcode::Write, |_, f, fh| write(f, fh, OFlags::empty()), true),
        ("append", Opcode::Write, |_, f, fh| write(f, fh, OFlags::APPEND), false),
        (
            "read",
            Opcode::Read,
            |_, f, fh| (f, abi::ReadIn { fh, size: 4, ..abi::ReadIn::default() }.as_bytes().to_vec()),
            true,
        ),
        (
            "truncate",
            Opcode::SetAttr,
            |_, f, _| {
                let valid = abi::Valid::SIZE.bits();
                (f, abi::SetAttrIn { valid, size: 5, ..abi::SetAttrIn::default() }.as_bytes().to_vec())
            },
            true,
        ),
        (
            "fsync",
            Opcode::Fsync,
            |_, f, fh| (f, abi::FsyncIn { fh, ..abi::FsyncIn::default() }.as_bytes().to_vec()),
            true,
        ),
        (
            "flush",
            Opcode::Flush,
            |_, f, fh| (f, abi::FlushIn { fh, ..abi::FlushIn::default() }.as_bytes().to_vec()),
            true,
        ),
        ("statfs", Opcode::StatFs, |d, _, _| (d, Vec::new()), true),
        (
            "fallocate",
            Opcode::Fallocate,
            |_, f, fh| {
                (f, abi::FallocateIn { fh, length: 99, ..abi::FallocateIn::default() }.as_bytes().to_vec())
            },
            true,
        ),
        ("lock", Opcode::SetLk, |_, f, fh| (f, range(fh, 5, 1).as_bytes().to_vec()), true),
        ("setxattr", Opcode::SetXattr, |_, f, _| xattr(f, 0), true),
        ("setxattr anew", Opcode::SetXattr, |_, f, _| xattr(f, 1), false),
        (
            "mkdir",
            Opcode::MkDir,
            |d, _, _| (d, [abi::MkDirIn { mode: 0o755, umask: 0 }.as_bytes(), &text("new")].concat()),
            false,
        ),
        (
            "mknod",
            Opcode::MkNod,
            |d, _, _| {
                let make = abi::MkNodIn { mode: 0o100_644, ..abi::MkNodIn::default() };
                (d, [make.as_bytes(), &text("new")].concat())
            },
            false,
        ),
        ("symlink", Opcode::SymLink, |d, _, _| (d, [text("new"), text("to")].concat()), false),
        ("unlink", Opcode::Unlink, |d, _, _| (d, text("file")), false),
        (
            "rename",
            Opcode::Rename,
            |d, _, _| (d, [d.as_bytes(), &text("file"), &text("new")].concat()),
            false,
        ),
        (
            "link",
            Opcode::Link,
            |d, f, _| (d, [abi::LinkIn { oldnodeid: f }.as_bytes(), &text("new")].concat()),
            false,
        ),
        (
            "release",
            Opcode::Release,
            |_, f, fh| (f, abi::ReleaseIn { fh, ..abi::ReleaseIn::default() }.as_bytes().to_vec()),
            true,
        ),
    ]
}

#[test]
fn a_request_that_was_sent_is_repeated_only_if_twice_is_as_once() {
    for (name, opcode, body, again) in cases() {
        for performed in [false, true] {
            let (mut place, d, file) = Place::with_file();
            let fh = place.client.open(file, BOTH).unwrap();
            let (node, body) = body(d, file, fh);
            // Without xattrs on this file system there is nothing to see.
            let xattr = matches!(opcode, Opcode::SetXattr);
            place.performers.cut(match performed {
                true => Cut::Unanswered(opcode as u32),
                false => Cut::Unperformed(opcode as u32),
            });
            let result = place.client.ask(opcode, node, &body);
            assert!(place.performers.was_cut(), "{name}");
            match result {
                Ok(_) => assert!(again, "{name}, performed: {performed}"),
                Err(error) if error == raw(Errno::OPNOTSUPP) => assert!(xattr, "{name}"),
                Err(error) => {
                    assert!(!again && error == raw(Errno::IO), "{name}, performed: {performed}: {error}")
                }
            }
            // Whatever became of it, the client goes on, and what was appended was appended once at most.
            assert!(place.client.list(d).unwrap().len() <= 2, "{name}");
            let found =
                if performed && matches!(opcode, Opcode::Unlink | Opcode::Rename) { "new" } else { "file" };
            let expected = match opcode {
                Opcode::Write if again || performed => 13,
                Opcode::SetAttr => 5,
                Opcode::Fallocate => 99,
                Opcode::Open if !again && performed => 0,
                _ => 10,
            };
            if let Ok(meta) = fs::metadata(place.path("d").join(found)) {
                assert_eq!(meta.len(), expected, "{name}, performed: {performed}");
            }
            // A renamed file is found under whichever name it has.
            if opcode == Opcode::Rename {
                assert_eq!(place.client.read(file, fh, 0, 4).unwrap(), b"0123", "performed: {performed}");
            }
        }
    }
}

#[test]
fn what_was_not_sent_whole_is_sent_again() {
    let (mut place, d, file) = Place::with_file();
    let fh = place.client.open(file, BOTH | OFlags::APPEND.bits()).unwrap();
    // More than a socket holds: it breaks off in the middle.
    let data = vec![b'x'; 1 << 20];
    place.performers.cut(Cut::Within(Opcode::Write as u32));
    let flags = OFlags::APPEND.bits();
    let write = abi::WriteIn { fh, size: data.len() as u32, flags, ..abi::WriteIn::default() };
    let body = [write.as_bytes(), &data].concat();
    place.client.ask(Opcode::Write, file, &body).unwrap();
    assert!(place.performers.was_cut());
    assert_eq!(fs::metadata(place.path("d/file")).unwrap().len(), 10 + (1 << 20));
    // What comes when nobody is there waits for somebody, whatever it is.
    for name in ["a", "b", "c", "e"] {
        place.performers.kill();
        place.performers.refuse(2);
        let make = abi::MkDirIn { mode: 0o755, umask: 0 };
        place.client.struct_and_name(Opcode::MkDir, d, &make, name).unwrap();
    }
    assert_eq!(place.client.list(d).unwrap(), ["a", "b", "c", "e", "file"]);
    assert_eq!(place.performers.count(Opcode::MkDir as u32), 4);
}

#[test]
fn locks_are_taken_again_before_others_can() {
    let (mut place, _, file) = Place::with_file();
    let mut other = Client::relayed(Arc::new(Dialler(place.performers.clone())));
    let d = other.find(ROOT, "d").unwrap();
    let theirs = other.find(d, "file").unwrap();
    let their_fh = other.open(theirs, BOTH).unwrap();
    let fh = place.client.open(file, BOTH).unwrap();
    place.lock(file, fh, 11, 1).unwrap();
    let flock = abi::LkIn { lk_flags: abi::LK_FLOCK, ..range(fh, 12, 1) };
    place.client.ask(Opcode::SetLk, file, flock.as_bytes()).unwrap();
    // All performers die, this client's too, whose locks come back by themselves.
    let dials = place.performers.dials.load(Ordering::SeqCst);
    place.performers.kill();
    let locked = place.performers.count(Opcode::SetLk as u32);
    for _ in 0..3000 {
        if place.performers.count(Opcode::SetLk as u32) >= locked + 2 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    assert!(place.performers.dials.load(Ordering::SeqCst) > dials);
    // Its last one may be under way; what is asked through it comes after.
    place.client.read(file, fh, 0, 1).unwrap();
    let again = raw(Errno::AGAIN);
    assert_eq!(other.ask(Opcode::SetLk, theirs, range(their_fh, 13, 1).as_bytes()), Err(again));
    let flock = abi::LkIn { lk_flags: abi::LK_FLOCK, ..range(their_fh, 14, 1) };
    assert_eq!(other.ask(Opcode::SetLk, theirs, flock.as_bytes()), Err(again));
    // Given back, they are not taken again.
    place.lock(file, fh, 11, 2).unwrap();
    let flock = abi::LkIn { lk_flags: abi::LK_FLOCK, ..range(fh, 12, 2) };
    place.client.ask(Opcode::SetLk, file, flock.as_bytes()).unwrap();
    place.performers.kill();
    assert_eq!(place.client.read(file, fh, 0, 4).unwrap(), b"0123");
    other.ask(Opcode::SetLk, theirs, range(their_fh, 13, 1).as_bytes()).unwrap();
}

#[test]
fn a_lock_that_another_has_meanwhile_is_lost_with_an_error() {
    let (mut place, _, file) = Place::with_file();
    let fh = place.client.open(file, BOTH).unwrap();
    let unlocked = place.client.open(file, BOTH).unwrap();
    place.lock(file, fh, 11, 1).unwrap();
    // Somebody on the host takes it in the moment in which nobody holds it.
    let thief = fs::File::options().read(true).write(true).open(place.path("d/file")).unwrap();
    let steal = kso_sys::file::RangeLock { kind: 1, start: 0, length: 1 };
    place.performers.next(move |_| {
        for _ in 0..6000 {
            if steal.set(std::os::fd::AsFd::as_fd(&thief)).is_ok() {
                // Held for as long as the test.
                std::mem::forget(thief);
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    });
    place.performers.kill();
    assert_eq!(place.client.read(file, fh, 0, 4), Err(raw(Errno::IO)));
    assert_eq!(place.client.write(file, fh, 0, b"x"), Err(raw(Errno::IO)));
    // Other open files of it are as they were, and so is a new one.
    assert_eq!(place.client.read(file, unlocked, 0, 4).unwrap(), b"0123");
    let release = abi::ReleaseIn { fh, ..abi::ReleaseIn::default() };
    place.client.ask(Opcode::Release, file, release.as_bytes()).unwrap();
    let fh = place.client.open(file, BOTH).unwrap();
    assert_eq!(place.client.read(file, fh, 0, 4).unwrap(), b"0123");
}

#[test]
fn who_waits_for_a_lock_waits_on() {
    let (mut place, _, file) = Place::with_file();
    let fh = place.client.open(file, BOTH).unwrap();
    let waiting = place.client.open(file, BOTH).unwrap();
    place.lock(file, fh, 21, 1).unwrap();
    let (outcome, _) = place.client.begin(Opcode::SetLkW, file, range(waiting, 22, 1).as_bytes());
    let Outcome::Later(ticket) = outcome else { panic!("{outcome:?}") };
    // It is in nobody's way.
    assert_eq!(place.client.read(file, fh, 0, 4).unwrap(), b"0123");
    place.performers.kill();
    assert_eq!(place.client.read(file, fh, 0, 4).unwrap(), b"0123");
    assert_eq!(place.client.late.get(ticket), None);
    place.lock(file, fh, 21, 2).unwrap();
    assert_eq!(place.client.late.wait(ticket), 0);
    // A signal ends another's waiting.
    let (outcome, _) = place.client.begin(Opcode::SetLkW, file, range(fh, 21, 1).as_bytes());
    let unique = place.client.unique;
    let Outcome::Later(ticket) = outcome else { panic!("{outcome:?}") };
    for _ in 0..3000 {
        // The request may not have come yet, as on any transport: a kernel repeats the signal, too.
        place.client.begin(Opcode::Interrupt, 0, abi::InterruptIn { unique }.as_bytes());
        if let Some(reply) = place.client.late.get(ticket) {
            assert_eq!(reply[4..8], (-raw(Errno::INTR)).to_ne_bytes());
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("a signal did not end the waiting");
}

#[test]
fn what_was_not_synced_when_a_kernel_died_is_told_once() {
    let (mut place, d, file) = Place::with_file();
    let fh = place.client.open(file, BOTH).unwrap();
    let second = place.client.open(file, BOTH).unwrap();
    let another = |place: &mut Place| {
        place.performers.boot.fetch_add(1, Ordering::SeqCst);
        place.performers.kill();
    };
    place.client.write(file, fh, 0, b"lost?").unwrap();
    another(&mut place);
    assert_eq!(place.sync(file, fh), Err(raw(Errno::IO)));
    place.sync(file, fh).unwrap();
    // Each open file tells it.
    assert_eq!(place.sync(file, second), Err(raw(Errno::IO)));
    place.sync(file, second).unwrap();
    // What is on disk is not lost.
    place.client.write(file, fh, 0, b"kept").unwrap();
    place.sync(file, second).unwrap();
    another(&mut place);
    place.sync(file, fh).unwrap();
    // Nor is anything if the kernel lives, and only the process died.
    place.client.write(file, fh, 0, b"kept").unwrap();
    place.performers.kill();
    place.sync(file, fh).unwrap();
    // Writes that are synced by themselves.
    let write = abi::WriteIn { fh, size: 1, flags: OFlags::DSYNC.bits(), ..abi::WriteIn::default() };
    place.client.ask(Opcode::Write, file, &[write.as_bytes(), b"x"].concat()).unwrap();
    another(&mut place);
    place.sync(file, fh).unwrap();
    // A name that was made, and its directory not synced.
    let listed = place.client.open_directory(d).unwrap();
    place.client.create(d, "new", BOTH, 0o644).unwrap();
    another(&mut place);
    let sync = abi::FsyncIn { fh: listed, ..abi::FsyncIn::default() };
    assert_eq!(place.client.ask(Opcode::FsyncDir, d, sync.as_bytes()), Err(raw(Errno::IO)));
    place.client.ask(Opcode::FsyncDir, d, sync.as_bytes()).unwrap();
}

#[test]
fn what_is_forgotten_is_forgotten_there_too() {
    let (mut place, d, file) = Place::with_file();
    place.client.find(d, "file").unwrap();
    place.client.forget(file, 1);
    assert!(place.client.open(file, READ).is_ok());
    place.client.forget(file, 1);
    assert_eq!(place.client.open(file, READ), Err(raw(Errno::STALE)));
    // The numbers of things that are not there are nobody's.
    for node in [0, 77, u64::MAX] {
        assert_eq!(place.client.lookup(node, "d").unwrap_err(), raw(Errno::STALE));
        place.client.forget(node, u64::MAX);
    }
    assert_eq!(place.client.read(d, 77, 0, 1), Err(raw(Errno::BADF)));
    place.client.forget(ROOT, u64::MAX);
    // A directory that only its entries need is found again for their sake.
    let file = place.client.find(d, "file").unwrap();
    place.client.forget(d, u64::MAX);
    place.performers.kill();
    assert!(place.client.open(file, READ).is_ok());
    assert!(place.performers.count(Opcode::Forget as u32) >= 2);
}

#[test]
fn a_client_that_mounts_anew_knows_nothing_of_before() {
    let (mut place, d, file) = Place::with_file();
    let fh = place.client.open(file, READ).unwrap();
    place.client.ask(Opcode::Destroy, 0, &[]).unwrap();
    assert_eq!(place.client.read(file, fh, 0, 1), Err(raw(Errno::IO)));
    place.client.init(common::offers()).unwrap();
    assert_eq!(place.client.open(d, READ), Err(raw(Errno::STALE)));
    let d = place.client.find(ROOT, "d").unwrap();
    assert_eq!(place.client.list(d).unwrap(), ["file"]);
    place.client.performer.disconnect();
    assert_eq!(place.client.lookup(ROOT, "d").unwrap_err(), raw(Errno::IO));
}

#[test]
fn when_nobody_performs_any_more_requests_fail() {
    let (mut place, d, _) = Place::with_file();
    place.performers.kill();
    place.performers.refuse(usize::MAX);
    // After all attempts; who asks soon after that need not wait for more.
    assert_eq!(place.client.lookup(d, "file").unwrap_err(), raw(Errno::IO));
    let dials = place.performers.dials.load(Ordering::SeqCst);
    assert_eq!(place.client.lookup(d, "file").unwrap_err(), raw(Errno::IO));
    assert_eq!(place.performers.dials.load(Ordering::SeqCst), dials);
    // When there is one again, all goes on.
    place.performers.refuse(0);
    for _ in 0..3000 {
        if place.client.lookup(d, "file").is_ok() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("the relay did not come back");
}
