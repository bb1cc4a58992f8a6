//! Performers that lie are dropped, and the next one is asked.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

mod common;

use common::performers::{Dialler, Performers};
use common::{Client, offers, text};
use kso_files::Share;
use kso_files::abi::{self, InHeader, Opcode, OutHeader, ROOT};
use kso_files::relay::Relay;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use zerocopy::{FromBytes, IntoBytes};

const HELLO: &[u8; 32] = b"ksofiles\x01\0\0\0\0\0\0\x000123456789abcdef";

/// Reads a request.
fn request(mut stream: &UnixStream) -> Option<(InHeader, Vec<u8>)> {
    let mut head = [0; abi::IN_HEADER];
    stream.read_exact(&mut head).ok()?;
    let header = InHeader::read_from_bytes(&head).unwrap();
    let mut body = vec![0; header.len as usize - head.len()];
    stream.read_exact(&mut body).ok()?;
    Some((header, body))
}

fn reply(unique: u64, error: i32, body: &[u8]) -> Vec<u8> {
    let header = OutHeader { len: (abi::OUT_HEADER + body.len()) as u32, error, unique };
    [header.as_bytes(), body].concat()
}

/// What a true performer of the directory agrees to.
fn agreed(directory: &Path) -> u64 {
    let share = Share::new(directory);
    let out = std::thread::spawn(move || Client::unmounted(share).init(offers()).unwrap());
    let out = abi::InitOut::read_from_prefix(&out.join().unwrap()).unwrap().0;
    u64::from(out.flags) | u64::from(out.flags2) << 32
}

/// Agrees to `features`, and answers what then is asked as `lie` wants.
fn liar(stream: &UnixStream, features: u64, mut lie: impl FnMut(&InHeader, &[u8]) -> Option<Vec<u8>>) {
    let mut writing = stream;
    if writing.write_all(HELLO).is_err() {
        return;
    }
    while let Some((header, body)) = request(stream) {
        let answer = if header.opcode == Opcode::Init as u32 {
            let out = abi::InitOut {
                major: 7,
                minor: 40,
                flags: features as u32,
                flags2: (features >> 32) as u32,
                max_write: 1 << 20,
                ..abi::InitOut::default()
            };
            Some(reply(header.unique, 0, out.as_bytes()))
        } else {
            lie(&header, &body)
        };
        match answer {
            Some(answer) => {
                if writing.write_all(&answer).is_err() {
                    return;
                }
            }
            None => return,
        }
    }
}

fn entry(nodeid: u64, ino: u64, mode: u32) -> abi::EntryOut {
    abi::EntryOut {
        nodeid,
        attr: abi::Attr { ino, mode, ..abi::Attr::default() },
        ..abi::EntryOut::default()
    }
}

type Lie = fn(&InHeader) -> Vec<u8>;

#[test]
fn the_next_one_is_asked() {
    let lies: Vec<(&str, Lie)> = vec![
        ("another's number", |header| reply(header.unique + 2, 0, entry(2, 3, 0o100_644).as_bytes())),
        ("an odd number", |header| reply(header.unique | 1, 0, &[])),
        ("too short", |header| reply(header.unique, 0, &[0; 127])),
        ("too long", |header| reply(header.unique, 0, &[0; 129])),
        ("nothing at all", |header| reply(header.unique, 0, &[])),
        ("a frame without end", |_| [u32::MAX.as_bytes(), &[0; 4000]].concat()),
        ("a frame without a header", |_| [15_u32.as_bytes(), &[0; 4000]].concat()),
        ("an error that is none", |header| reply(header.unique, 5, &[])),
        ("an error of nobody's", |header| reply(header.unique, -5000, &[])),
        ("the least number", |header| reply(header.unique, i32::MIN, &[])),
        ("an error with a body", |header| reply(header.unique, -5, &[1; 8])),
        ("no kind of file", |header| reply(header.unique, 0, entry(2, 3, 0o030_644).as_bytes())),
        ("the same twice", |header| {
            let one = reply(header.unique, -2, &[]);
            [one.clone(), one].concat()
        }),
        ("endless data", |_| vec![0x55; 8 << 20]),
    ];
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("file"), b"0123456789").unwrap();
    let features = agreed(directory.path());
    for (name, lie) in lies {
        let performers = Performers::new(Share::new(directory.path()));
        performers.next(move |stream| liar(&stream, features, |header, _| Some(lie(header))));
        let mut client = Client::relayed(Arc::new(Dialler(performers.clone())));
        if name == "the same twice" {
            // The first was an answer.
            let _ = client.find(ROOT, "file");
        }
        let node = client.find(ROOT, "file").unwrap_or_else(|error| panic!("{name}: {error}"));
        let fh = client.open(node, 0).unwrap();
        assert_eq!(client.read(node, fh, 0, 100).unwrap(), b"0123456789", "{name}");
        assert_eq!(performers.dials.load(std::sync::atomic::Ordering::SeqCst), 2, "{name}");
    }
}

#[test]
fn strangers_are_not_believed() {
    let directory = tempfile::tempdir().unwrap();
    let hellos: Vec<Vec<u8>> = vec![
        b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n".to_vec(),
        b"ksofiles\x07\0\0\0\0\0\0\x000123456789abcdef".to_vec(),
        b"ksofiles".to_vec(),
        Vec::new(),
    ];
    for hello in hellos {
        let performers = Performers::new(Share::new(directory.path()));
        performers.next(move |mut stream| {
            let _ = stream.write_all(&hello);
        });
        let relay =
            Relay::new(Arc::new(Dialler(performers.clone())), Arc::new(common::Late::default())).unwrap();
        assert!(relay.reach().is_err());
        assert!(relay.reach().is_ok());
    }
}

#[test]
fn a_performer_that_can_less_is_not_taken_for_the_one_before() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("file"), b"0123456789").unwrap();
    let performers = Performers::new(Share::new(directory.path()));
    let mut client = Client::relayed(Arc::new(Dialler(performers.clone())));
    let node = client.find(ROOT, "file").unwrap();
    for _ in 0..3 {
        performers.next(|stream| {
            let mut writing = &stream;
            writing.write_all(HELLO).unwrap();
            let (header, _) = request(&stream).unwrap();
            let out = abi::InitOut { major: 7, minor: 40, max_write: 1 << 20, ..abi::InitOut::default() };
            writing.write_all(&reply(header.unique, 0, out.as_bytes())).unwrap();
            // It is left at once.
            assert!(request(&stream).is_none());
        });
    }
    performers.kill();
    assert_eq!(client.find(ROOT, "file").unwrap(), node);
    assert_eq!(performers.dials.load(std::sync::atomic::Ordering::SeqCst), 5);
}

#[test]
fn one_that_becomes_another_node_is_dropped() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("file"), b"0123456789").unwrap();
    let performers = Performers::new(Share::new(directory.path()));
    let features = agreed(directory.path());
    performers.next(move |stream| {
        let mut asked = 0;
        liar(&stream, features, |header, _| {
            asked += 1;
            Some(reply(header.unique, 0, entry(7, 100 + asked, 0o100_644).as_bytes()))
        });
    });
    let mut client = Client::relayed(Arc::new(Dialler(performers.clone())));
    let lie = client.find(ROOT, "file").unwrap();
    let node = client.lookup(ROOT, "file").unwrap();
    assert_ne!(node.nodeid, lie);
    assert_eq!(node.attr.size, 10);
    // What it said of the node was never true of any.
    assert_eq!(client.open(lie, 0), Err(rustix::io::Errno::STALE.raw_os_error()));
    let entries = client.ask(Opcode::Lookup, ROOT, &text("none"));
    assert!(entries.is_err() || entries.unwrap()[..8] == [0; 8]);
}
