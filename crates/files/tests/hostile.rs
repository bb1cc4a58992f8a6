//! A client that means ill: nothing outside the share is reached, and nothing is broken.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

mod common;

use common::{Client, is_root, text};
use kso_files::abi::{self, InHeader, Opcode, ROOT};
use kso_files::{Outcome, Share};
use rustix::fs::OFlags;
use rustix::io::Errno;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use zerocopy::IntoBytes;

fn raw(error: Errno) -> i32 {
    error.raw_os_error()
}

/// A share beside things that are none of its client's.
struct Place {
    _directory: tempfile::TempDir,
    share: PathBuf,
    outside: PathBuf,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (share, outside) = (directory.path().join("share"), directory.path().join("outside"));
        fs::create_dir(&share).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("secret"), "secret").unwrap();
        symlink(&outside, share.join("out")).unwrap();
        symlink(outside.join("secret"), share.join("leak")).unwrap();
        symlink("../outside/new", share.join("dangling")).unwrap();
        fs::create_dir(share.join("d")).unwrap();
        fs::write(share.join("d/file"), "inside").unwrap();
        Self { _directory: directory, share, outside }
    }

    fn untouched(&self) {
        let names: Vec<_> =
            fs::read_dir(&self.outside).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["secret"]);
        assert_eq!(fs::read(self.outside.join("secret")).unwrap(), b"secret");
    }
}

const WRITE: u32 = OFlags::RDWR.bits();

#[test]
fn names_that_are_paths_are_refused_everywhere() {
    let place = Place::new();
    Client::run(Share::new(&place.share), |mut client| {
        let d = client.find(ROOT, "d").unwrap();
        for name in ["..", ".", "", "../outside", "d/file", "/etc/passwd", "out/secret", "d/..", "./d"] {
            assert_eq!(client.lookup(ROOT, name).unwrap_err(), raw(Errno::INVAL), "{name:?}");
            assert_eq!(client.lookup(d, name).unwrap_err(), raw(Errno::INVAL), "{name:?}");
            assert_eq!(client.create(d, name, WRITE, 0o666).unwrap_err(), raw(Errno::INVAL));
            for opcode in [Opcode::Unlink, Opcode::RmDir] {
                assert_eq!(client.ask(opcode, d, &text(name)), Err(raw(Errno::INVAL)));
            }
            let make = abi::MkDirIn { mode: 0o777, umask: 0 };
            assert_eq!(client.struct_and_name(Opcode::MkDir, d, &make, name), Err(raw(Errno::INVAL)));
            let node = abi::MkNodIn { mode: 0o100_644, ..abi::MkNodIn::default() };
            assert_eq!(client.struct_and_name(Opcode::MkNod, d, &node, name), Err(raw(Errno::INVAL)));
            let link = abi::LinkIn { oldnodeid: d };
            assert_eq!(client.struct_and_name(Opcode::Link, ROOT, &link, name), Err(raw(Errno::INVAL)));
            let both = [ROOT.as_bytes(), &text("d"), &text(name)].concat();
            assert_eq!(client.ask(Opcode::Rename, ROOT, &both), Err(raw(Errno::INVAL)));
            let link = [text(name), text("target")].concat();
            assert_eq!(client.ask(Opcode::SymLink, ROOT, &link), Err(raw(Errno::INVAL)));
        }
    });
    place.untouched();
}

#[test]
fn a_symbolic_link_is_never_followed() {
    let place = Place::new();
    Client::run(Share::new(&place.share), |mut client| {
        for name in ["out", "leak", "dangling"] {
            let node = client.find(ROOT, name).unwrap();
            assert_eq!(client.open(node, 0), Err(raw(Errno::NXIO)), "{name}");
            assert_eq!(client.open(node, WRITE), Err(raw(Errno::NXIO)));
            assert!(client.open_directory(node).is_err());
            assert!(client.lookup(node, "secret").is_err());
            assert!(client.create(node, "new", WRITE, 0o666).is_err());
            assert!(client.ask(Opcode::Unlink, node, &text("secret")).is_err());
            // An existing name is not created, and what it points to neither.
            assert!(client.create(ROOT, name, WRITE, 0o666).is_err());
            assert!(client.create(ROOT, name, WRITE | OFlags::TRUNC.bits(), 0o666).is_err());
            let set = abi::SetAttrIn { valid: abi::Valid::SIZE.bits(), size: 0, ..abi::SetAttrIn::default() };
            assert!(client.ask(Opcode::SetAttr, node, set.as_bytes()).is_err());
            let set =
                abi::SetAttrIn { valid: abi::Valid::MODE.bits(), mode: 0o777, ..abi::SetAttrIn::default() };
            assert!(client.ask(Opcode::SetAttr, node, set.as_bytes()).is_err());
            let get = [abi::GetXattrIn { size: 0, padding: 0 }.as_bytes(), &text("user.x")].concat();
            assert!(client.ask(Opcode::GetXattr, node, &get).is_err());
        }
        // A hard link to a link is a link.
        let leak = client.find(ROOT, "leak").unwrap();
        client.struct_and_name(Opcode::Link, ROOT, &abi::LinkIn { oldnodeid: leak }, "again").unwrap();
        let again = client.find(ROOT, "again").unwrap();
        assert_eq!(again, leak);
    });
    place.untouched();
    assert!(place.share.join("again").is_symlink());
}

#[test]
fn a_directory_that_becomes_a_link_leads_nowhere() {
    let place = Place::new();
    let (share, outside) = (place.share.clone(), place.outside.clone());
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let swapping = std::thread::spawn({
        let stop = stop.clone();
        move || {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                // Any of these may fail: the client makes files there.
                let _ = fs::create_dir(share.join("x"));
                let _ = fs::rename(share.join("x"), share.join("y"));
                let _ = symlink(&outside, share.join("x"));
                let _ = fs::remove_file(share.join("x"));
                let _ = fs::remove_dir_all(share.join("y"));
            }
        }
    });
    Client::run(Share::new(&place.share), |mut client| {
        for round in 0..20_000 {
            let Ok(node) = client.find(ROOT, "x") else { continue };
            assert!(client.find(node, "secret").is_err(), "in round {round}");
            if let Ok((file, fh)) = client.create(node, "evil", WRITE, 0o666) {
                let _ = client.write(file, fh, 0, b"evil");
                let release = abi::ReleaseIn { fh, ..abi::ReleaseIn::default() };
                client.ask(Opcode::Release, file, release.as_bytes()).unwrap();
                client.forget(file, 1);
            }
            client.forget(node, 1);
        }
    });
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    swapping.join().unwrap();
    place.untouched();
}

#[test]
fn numbers_that_were_never_given_out_are_refused() {
    let place = Place::new();
    Client::run(Share::new(&place.share), |mut client| {
        let d = client.find(ROOT, "d").unwrap();
        let file = client.find(d, "file").unwrap();
        let fh = client.open(file, WRITE).unwrap();
        for node in [0, 77, d + (1 << 32), u64::MAX, 1 << 63] {
            let get = abi::GetAttrIn::default();
            assert_eq!(client.ask(Opcode::GetAttr, node, get.as_bytes()), Err(raw(Errno::STALE)));
            assert_eq!(client.lookup(node, "d").unwrap_err(), raw(Errno::STALE));
            assert_eq!(client.read(node, fh, 0, 10), Err(raw(Errno::BADF)));
            client.forget(node, 1);
        }
        // A handle is of its node only.
        assert_eq!(client.read(d, fh, 0, 10), Err(raw(Errno::BADF)));
        for handle in [0, fh + 1, fh + (1 << 32), u64::MAX] {
            assert_eq!(client.read(file, handle, 0, 10), Err(raw(Errno::BADF)));
            assert_eq!(client.write(file, handle, 0, b"x"), Err(raw(Errno::BADF)));
        }
        let release = abi::ReleaseIn { fh, ..abi::ReleaseIn::default() };
        client.ask(Opcode::Release, file, release.as_bytes()).unwrap();
        assert_eq!(client.ask(Opcode::Release, file, release.as_bytes()), Err(raw(Errno::BADF)));
        assert_eq!(client.read(file, fh, 0, 10), Err(raw(Errno::BADF)));
        // Forgotten more often than looked up, it is gone; the root never is.
        client.forget(file, u64::MAX);
        assert_eq!(client.open(file, 0), Err(raw(Errno::STALE)));
        client.forget(ROOT, u64::MAX);
        assert!(client.find(ROOT, "d").is_ok());
    });
}

#[test]
fn lengths_that_lie_are_refused() {
    let place = Place::new();
    Client::run(Share::new(&place.share), |mut client| {
        let d = client.find(ROOT, "d").unwrap();
        let file = client.find(d, "file").unwrap();
        let fh = client.open(file, WRITE).unwrap();
        // More is said to be written than is there.
        let write = abi::WriteIn { fh, size: 4096, ..abi::WriteIn::default() };
        assert_eq!(client.ask(Opcode::Write, file, write.as_bytes()), Err(raw(Errno::INVAL)));
        let write = abi::WriteIn { fh, size: u32::MAX, offset: u64::MAX, ..abi::WriteIn::default() };
        assert_eq!(client.ask(Opcode::Write, file, write.as_bytes()), Err(raw(Errno::INVAL)));
        // More is asked for than there is room.
        assert_eq!(client.read(file, fh, 0, u32::MAX).unwrap(), b"inside");
        assert_eq!(client.read(file, fh, u64::MAX, 10), Err(raw(Errno::INVAL)));
        // A header whose length is wrong, bodies that end early, extensions that are not there.
        for (length, body, extension) in
            [(0, 8, 0), (39, 0, 0), (41, 0, 0), (u32::MAX, 16, 0), (56, 16, 9), (48, 8, 1)]
        {
            let header = InHeader {
                len: length,
                opcode: Opcode::Read as u32,
                nodeid: file,
                total_extlen: extension,
                ..InHeader::default()
            };
            let mut request = [header.as_bytes(), &vec![0xff; body]].concat();
            let (outcome, reply) = client.raw(&mut request, 4096);
            assert_eq!(outcome, Outcome::Reply(16), "{length} {body}");
            assert_eq!(reply[4..8], (-raw(Errno::INVAL)).to_ne_bytes());
        }
        // No header, no room.
        assert_eq!(client.raw(&mut [0; 39], 100).0, Outcome::Silent);
        let header = InHeader { len: 40, opcode: Opcode::StatFs as u32, nodeid: ROOT, ..InHeader::default() };
        assert_eq!(client.raw(&mut header.as_bytes().to_vec(), 0).0, Outcome::Silent);
        assert_eq!(client.raw(&mut header.as_bytes().to_vec(), 15).0, Outcome::Silent);
        assert_eq!(client.raw(&mut header.as_bytes().to_vec(), 20).0, Outcome::Reply(16));
        // Names without an end, and without end.
        assert_eq!(client.ask(Opcode::Lookup, ROOT, b"abc"), Err(raw(Errno::INVAL)));
        assert_eq!(client.lookup(ROOT, &"n".repeat(256)).unwrap_err(), raw(Errno::NAMETOOLONG));
        assert_eq!(client.lookup(ROOT, &"n".repeat(100_000)).unwrap_err(), raw(Errno::NAMETOOLONG));
        assert_eq!(client.lookup(ROOT, &"n".repeat(200_000)).unwrap_err(), raw(Errno::INVAL));
        // Forgets by the billion.
        let batch = abi::BatchForgetIn { count: u32::MAX, dummy: 0 };
        assert_eq!(client.ask(Opcode::BatchForget, 0, batch.as_bytes()), Err(raw(Errno::INVAL)));
        assert!(client.find(ROOT, "d").is_ok());
    });
}

#[test]
fn what_is_no_file_is_not_opened() {
    let place = Place::new();
    let fifo = rustix::fs::open(&place.share, OFlags::RDONLY, rustix::fs::Mode::empty()).unwrap();
    rustix::fs::mkfifoat(&fifo, "fifo", rustix::fs::Mode::RWXU).unwrap();
    if is_root() {
        let null = rustix::fs::makedev(1, 3);
        rustix::fs::mknodat(
            &fifo,
            "null",
            rustix::fs::FileType::CharacterDevice,
            rustix::fs::Mode::RWXU,
            null,
        )
        .unwrap();
    }
    Client::run(Share::new(&place.share), |mut client| {
        for name in ["fifo", "null"] {
            let Ok(node) = client.find(ROOT, name) else { continue };
            // This would wait for a writer, or worse.
            assert_eq!(client.open(node, 0), Err(raw(Errno::NXIO)));
            assert_eq!(client.open(node, WRITE), Err(raw(Errno::NXIO)));
            assert!(client.create(ROOT, name, WRITE, 0o666).is_err());
            let set = abi::SetAttrIn { valid: abi::Valid::SIZE.bits(), ..abi::SetAttrIn::default() };
            assert!(client.ask(Opcode::SetAttr, node, set.as_bytes()).is_err());
        }
        // sda, made by a guest, would be the host's.
        for kind in [0o020_666, 0o060_666] {
            let make = abi::MkNodIn { mode: kind, rdev: 0x800, ..abi::MkNodIn::default() };
            assert_eq!(client.struct_and_name(Opcode::MkNod, ROOT, &make, "sda"), Err(raw(Errno::PERM)));
        }
    });
}

#[test]
fn a_read_only_share_is_not_written() {
    let place = Place::new();
    Client::run(Share::new(&place.share).read_only(), |mut client| {
        let rofs = raw(Errno::ROFS);
        let d = client.find(ROOT, "d").unwrap();
        let file = client.find(d, "file").unwrap();
        for flags in [WRITE, OFlags::WRONLY.bits(), OFlags::TRUNC.bits()] {
            assert_eq!(client.open(file, flags), Err(rofs));
        }
        assert_eq!(client.create(d, "new", WRITE, 0o666), Err(rofs));
        assert_eq!(client.ask(Opcode::Unlink, d, &text("file")), Err(rofs));
        assert_eq!(client.ask(Opcode::RmDir, ROOT, &text("d")), Err(rofs));
        let both = [ROOT.as_bytes(), &text("d"), &text("e")].concat();
        assert_eq!(client.ask(Opcode::Rename, ROOT, &both), Err(rofs));
        assert_eq!(client.ask(Opcode::SymLink, ROOT, &[text("s"), text("t")].concat()), Err(rofs));
        assert_eq!(
            client.struct_and_name(Opcode::Link, ROOT, &abi::LinkIn { oldnodeid: file }, "l"),
            Err(rofs)
        );
        assert_eq!(client.struct_and_name(Opcode::MkDir, ROOT, &abi::MkDirIn::default(), "m"), Err(rofs));
        let set = abi::SetAttrIn { valid: abi::Valid::MODE.bits(), ..abi::SetAttrIn::default() };
        assert_eq!(client.ask(Opcode::SetAttr, file, set.as_bytes()), Err(rofs));
        let fh = client.open(file, 0).unwrap();
        assert_eq!(client.write(file, fh, 0, b"x"), Err(rofs));
        let allocate = abi::FallocateIn { fh, length: 10, ..abi::FallocateIn::default() };
        assert_eq!(client.ask(Opcode::Fallocate, file, allocate.as_bytes()), Err(rofs));
        let set =
            [abi::SetXattrIn { size: 1, ..abi::SetXattrIn::default() }.as_bytes(), &text("user.x"), b"y"]
                .concat();
        assert_eq!(client.ask(Opcode::SetXattr, file, &set), Err(rofs));
        assert_eq!(client.ask(Opcode::RemoveXattr, file, &text("user.x")), Err(rofs));
        assert_eq!(client.read(file, fh, 0, 100).unwrap(), b"inside");
        assert_eq!(client.list(ROOT).unwrap(), ["d", "dangling", "leak", "out"]);
    });
    assert_eq!(fs::read(place.share.join("d/file")).unwrap(), b"inside");
}

#[test]
fn the_view_of_a_system_shows_no_secrets() {
    let place = Place::new();
    let own = place.share.clone();
    fs::set_permissions(own.join("d/file"), fs::Permissions::from_mode(0o600)).unwrap();
    Client::run(Share::system(&[&own]), move |mut client| {
        let names = client.list(ROOT).unwrap();
        assert!(
            names.iter().any(|name| name == "usr") && !names.iter().any(|name| name == "lost+found"),
            "{names:?}"
        );
        for empty in ["proc", "sys", "dev", "root", "run"] {
            let Ok(node) = client.find(ROOT, empty) else { continue };
            assert_eq!(client.list(node).unwrap(), Vec::<String>::new(), "{empty}");
            assert!(client.find(node, "self").is_err() && client.find(node, "null").is_err());
        }
        let etc = client.find(ROOT, "etc").unwrap();
        if is_root() {
            let shadow = client.find(etc, "shadow").unwrap();
            assert_eq!(client.open(shadow, 0), Err(raw(Errno::ACCESS)));
        }
        let passwd = client.find(etc, "passwd").unwrap();
        assert!(client.open(passwd, 0).is_ok());
        // The way to one's own directory shows nothing else, and there all is one's own.
        let mut node = ROOT;
        let mut path = PathBuf::from("/");
        for name in own.components().skip(1).map(|name| name.as_os_str().to_str().unwrap()) {
            if node != ROOT {
                assert_eq!(client.list(node).unwrap(), [name], "in {}", path.display());
            }
            node = client.find(node, name).unwrap();
            path.push(name);
        }
        let d = client.find(node, "d").unwrap();
        let file = client.find(d, "file").unwrap();
        let fh = client.open(file, 0).unwrap();
        assert_eq!(client.read(file, fh, 0, 10).unwrap(), b"inside");
    });
    assert!(
        kso_files::Service::new(
            Share { read_only: false, ..Share::system(&[]) },
            std::sync::Arc::new(common::Late::default())
        )
        .is_err()
    );
}
