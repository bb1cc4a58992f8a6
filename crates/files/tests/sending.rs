//! Files that are opened by the numbers that the client knows them by.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{Client, is_root};
use kso_files::abi::{Opcode, ReleaseIn};
use kso_files::{Files, Performer, Share};
use rustix::fs::OFlags;
use rustix::io::Errno;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use zerocopy::IntoBytes;

fn content(files: &Files, node: u64) -> Result<Vec<u8>, Errno> {
    let file = files.open(node)?;
    let mut bytes = vec![0; 100];
    let count = rustix::io::pread(file.as_fd(), &mut bytes, 0)?;
    bytes.truncate(count);
    Ok(bytes)
}

/// The files of a client whose requests are performed here.
fn files(client: &Client) -> Files {
    let Performer::Local(service) = &client.performer else { panic!("performed elsewhere") };
    Files::of(service.clone())
}

#[test]
fn what_was_looked_up_can_be_opened_unless_it_may_change() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_owned();
    fs::write(path.join("file"), "what is in it").unwrap();
    fs::create_dir(path.join("directory")).unwrap();
    std::os::unix::fs::symlink("file", path.join("link")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        path.join("pipe"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    Client::run(Share::new(&path), move |mut client| {
        let files = files(&client);
        let file = client.find(1, "file").unwrap();
        assert_eq!(content(&files, file).unwrap(), b"what is in it");
        for name in ["directory", "link", "pipe"] {
            let node = client.find(1, name).unwrap();
            assert_eq!(content(&files, node), Err(Errno::INVAL), "{name}");
        }
        for nothing in [0, 1 << 32 | file, u64::MAX] {
            assert!(content(&files, nothing).is_err());
        }
        let reading = client.open(file, OFlags::RDONLY.bits()).unwrap();
        assert!(content(&files, file).is_ok());
        // It may have changes that are not here.
        let writing = [OFlags::WRONLY, OFlags::RDWR].map(|flags| client.open(file, flags.bits()).unwrap());
        let (made, handle) = client.create(1, "new", OFlags::RDWR.bits(), 0o600).unwrap();
        assert_eq!(content(&files, made), Err(Errno::BUSY));
        for fh in writing {
            assert_eq!(content(&files, file), Err(Errno::BUSY));
            let release = ReleaseIn { fh, ..ReleaseIn::default() };
            client.ask(Opcode::Release, file, release.as_bytes()).unwrap();
        }
        assert_eq!(content(&files, file).unwrap(), b"what is in it");
        let release = ReleaseIn { fh: handle, ..ReleaseIn::default() };
        client.ask(Opcode::Release, made, release.as_bytes()).unwrap();
        assert_eq!(content(&files, made).unwrap(), b"");
        // Its name is gone, and it is not.
        fs::remove_file(path.join("file")).unwrap();
        assert_eq!(content(&files, file).unwrap(), b"what is in it");
        let release = ReleaseIn { fh: reading, ..ReleaseIn::default() };
        client.ask(Opcode::Release, file, release.as_bytes()).unwrap();
        client.forget(file, 1);
        assert!(content(&files, file).is_err());
    });
}

#[test]
fn what_a_view_hides_stays_hidden() {
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    if !is_root() {
        // Who may not read it has it hidden by the kernel.
        return;
    }
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let secret = directory.path().join("secret");
    fs::write(&secret, "keys").unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    let name = directory.path().file_name().unwrap().to_str().unwrap().to_owned();
    Client::run(Share::system(&[]), move |mut client| {
        let files = files(&client);
        let mut node = 1;
        for part in ["var", "tmp", &name, "secret"] {
            node = client.find(node, part).unwrap();
        }
        assert_eq!(content(&files, node), Err(Errno::ACCESS));
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(content(&files, node).unwrap(), b"keys");
        drop(directory);
    });
}
