//! Requests and replies of every kind, as they pass.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

use super::{Fared, Trial};
use crate::abi::*;
use proptest::prelude::*;
use zerocopy::{FromBytes, IntoBytes};

const FILE: u32 = 0o100_644;
const DIRECTORY: u32 = 0o040_755;

fn request(opcode: Opcode, nodeid: u64, body: &[u8]) -> Vec<u8> {
    let len = (IN_HEADER + body.len()) as u32;
    let header = InHeader { len, opcode: opcode as u32, unique: 77, nodeid, ..InHeader::default() };
    [header.as_bytes(), body].concat()
}

fn entry(nodeid: u64, ino: u64, mode: u32) -> EntryOut {
    let attr = Attr { ino, mode, ..Attr::default() };
    EntryOut { nodeid, generation: 5, attr, ..EntryOut::default() }
}

fn text(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}

impl Trial {
    fn sent(&mut self, opcode: Opcode, node: u64, body: &[u8]) -> InHeader {
        match self.ask(&request(opcode, node, body), 1 << 20) {
            Fared::Sent(frame) => InHeader::read_from_prefix(&frame).unwrap().0,
            other => panic!("{opcode:?}: {other:?}"),
        }
    }

    /// A request that is answered so.
    fn told(
        &mut self,
        opcode: Opcode,
        node: u64,
        body: &[u8],
        answer: &[u8],
    ) -> Result<Vec<u8>, &'static str> {
        let unique = self.sent(opcode, node, body).unique;
        let header = OutHeader { len: (OUT_HEADER + answer.len()) as u32, error: 0, unique };
        let reply = self.answer([header.as_bytes(), answer].concat())?;
        let header = OutHeader::read_from_prefix(&reply).unwrap().0;
        assert_eq!((header.unique, header.error), (77, 0));
        Ok(reply[OUT_HEADER..].to_vec())
    }

    fn enter(&mut self, opcode: Opcode, parent: u64, body: &[u8], answer: EntryOut) -> u64 {
        let body = self.told(opcode, parent, body, answer.as_bytes()).unwrap();
        let told = EntryOut::read_from_prefix(&body).unwrap().0;
        assert_eq!(EntryOut { nodeid: answer.nodeid, ..told }, answer, "only the number changes");
        told.nodeid
    }
}

#[test]
fn entries_get_the_clients_numbers() {
    let mut trial = Trial::default();
    let d = trial.enter(Opcode::Lookup, ROOT, &text("d"), entry(1000, 10, DIRECTORY));
    assert_eq!(trial.sent(Opcode::StatFs, d, &[]).nodeid, 1000);
    let mut made = Vec::new();
    for (index, (opcode, head)) in [
        (Opcode::MkNod, MkNodIn::default().as_bytes().to_vec()),
        (Opcode::MkDir, MkDirIn::default().as_bytes().to_vec()),
        (Opcode::SymLink, Vec::new()),
        (Opcode::Link, LinkIn { oldnodeid: d }.as_bytes().to_vec()),
    ]
    .into_iter()
    .enumerate()
    {
        let there = 2000 + index as u64;
        let body = [head, text("name"), text("target")].concat();
        let own = trial.enter(opcode, d, &body, entry(there, there, FILE));
        assert_eq!(trial.sent(Opcode::StatFs, own, &[]).nodeid, there, "{opcode:?}");
        made.push(own);
    }
    // The same again is the same.
    assert_eq!(trial.enter(Opcode::Lookup, d, &text("x"), entry(2000, 2000, FILE)), made[0]);
    // None is none.
    let none = trial.told(Opcode::Lookup, d, &text("y"), EntryOut::default().as_bytes()).unwrap();
    assert_eq!(none, EntryOut::default().as_bytes());
    assert!(
        trial
            .told(Opcode::MkDir, d, &[vec![0; 8], text("y")].concat(), EntryOut::default().as_bytes())
            .is_err()
    );
    assert_eq!(trial.count(), 2 + made.len());
}

#[test]
fn files_get_the_clients_numbers() {
    let mut trial = Trial::default();
    let create = [CreateIn { flags: 2, ..CreateIn::default() }.as_bytes(), &text("name")].concat();
    let out = OpenOut { fh: 500, open_flags: 32, backing_id: 0 };
    for (opcode, there) in [(Opcode::Create, 3000_u64), (Opcode::TmpFile, 3001)] {
        let answer = [entry(there, there, FILE).as_bytes(), out.as_bytes()].concat();
        let told = trial.told(opcode, ROOT, &create, &answer).unwrap();
        let (told_entry, rest) = EntryOut::read_from_prefix(&told).unwrap();
        let told_open = OpenOut::read_from_bytes(rest).unwrap();
        assert_eq!(OpenOut { fh: 500, ..told_open }, out);
        let read = ReadIn { fh: told_open.fh, size: 9, ..ReadIn::default() };
        let Fared::Sent(frame) = trial.ask(&request(Opcode::Read, told_entry.nodeid, read.as_bytes()), 20)
        else {
            panic!("{opcode:?}")
        };
        let sent = ReadIn::read_from_bytes(&frame[IN_HEADER..]).unwrap();
        // There is room for four bytes and a header.
        assert_eq!((sent.fh, sent.size), (500, 4));
    }
    for opcode in [Opcode::Open, Opcode::OpenDir] {
        let told = trial.told(opcode, ROOT, OpenIn::default().as_bytes(), out.as_bytes()).unwrap();
        let told = OpenOut::read_from_bytes(&told).unwrap();
        assert_ne!(told.fh, 500);
        let release = ReleaseIn { fh: told.fh, ..ReleaseIn::default() };
        let Fared::Sent(frame) = trial.ask(&request(Opcode::Release, ROOT, release.as_bytes()), 20) else {
            panic!("{opcode:?}")
        };
        assert_eq!(ReleaseIn::read_from_bytes(&frame[IN_HEADER..]).unwrap().fh, 500);
        // It is closed from then on.
        let bad = rustix::io::Errno::BADF.raw_os_error();
        assert_eq!(trial.ask(&request(Opcode::Release, ROOT, release.as_bytes()), 20), Fared::Answered(bad));
        // A file of another kernel backs nothing here.
        let lie = OpenOut { open_flags: OpenReply::PASSTHROUGH.bits(), backing_id: 1, ..out };
        assert!(trial.told(opcode, ROOT, OpenIn::default().as_bytes(), lie.as_bytes()).is_err());
    }
}

fn dirent(plus: Option<EntryOut>, name: &[u8]) -> Vec<u8> {
    let dirent = Dirent { ino: 9, off: 1, namelen: name.len() as u32, kind: 8 };
    let head = plus.map(|entry| entry.as_bytes().to_vec()).unwrap_or_default();
    let mut one = [&head, dirent.as_bytes(), name].concat();
    one.resize(one.len().next_multiple_of(8), 0);
    one
}

#[test]
fn lists_of_entries_get_the_clients_numbers() {
    let mut trial = Trial::default();
    let out = OpenOut { fh: 500, ..OpenOut::default() };
    let told = trial.told(Opcode::OpenDir, ROOT, OpenIn::default().as_bytes(), out.as_bytes()).unwrap();
    let fh = OpenOut::read_from_bytes(&told).unwrap().fh;
    let read = ReadIn { fh, size: 4096, ..ReadIn::default() };
    let names = [dirent(None, b"."), dirent(None, b"one")].concat();
    assert_eq!(trial.told(Opcode::ReadDir, ROOT, read.as_bytes(), &names).unwrap(), names);
    let plus = [
        dirent(Some(entry(4000, 40, DIRECTORY)), b".."),
        dirent(Some(entry(4001, 41, FILE)), b"one"),
        dirent(Some(EntryOut::default()), b"two"),
    ]
    .concat();
    let told = trial.told(Opcode::ReadDirPlus, ROOT, read.as_bytes(), &plus).unwrap();
    assert_eq!(told.len(), plus.len());
    assert_eq!(told[..128], [0; 128], "what a kernel does not count is not told");
    let one = EntryOut::read_from_prefix(&told[160..]).unwrap().0;
    assert_eq!(trial.sent(Opcode::StatFs, one.nodeid, &[]).nodeid, 4001);
    assert_eq!(EntryOut { nodeid: 4001, ..one }, entry(4001, 41, FILE));
    assert_eq!(trial.take_forgotten(), [(4000, 1)]);
    for wrong in [
        dirent(None, b"a/b"),
        dirent(None, b"a\0b"),
        dirent(None, b""),
        dirent(None, &[b'x'; 2000]),
        dirent(None, b"cut")[..26].to_vec(),
        vec![1; 10],
    ] {
        assert!(trial.told(Opcode::ReadDir, ROOT, read.as_bytes(), &wrong).is_err(), "{wrong:?}");
    }
}

#[test]
fn answers_have_their_lengths() {
    for (opcode, body, right) in [
        (Opcode::GetAttr, vec![0; 16], vec![104]),
        (Opcode::SetAttr, vec![0; 88], vec![104]),
        (Opcode::StatX, vec![0; 24], vec![288]),
        (Opcode::ReadLink, vec![], vec![1, 8, 16, 50, 80, 100, 101, 104, 105, 288, 289, 4095]),
        (Opcode::StatFs, vec![], vec![80]),
        (Opcode::GetXattr, [100_u32.as_bytes(), &[0; 4], b"x\0"].concat(), vec![0, 1, 8, 16, 50, 80, 100]),
        (Opcode::GetXattr, [0_u32.as_bytes(), &[0; 4], b"x\0"].concat(), vec![8]),
        (Opcode::ListXattr, [100_u32.as_bytes(), &[0; 4]].concat(), vec![0, 1, 8, 16, 50, 80, 100]),
        (Opcode::RemoveXattr, b"x\0".to_vec(), vec![0]),
        (Opcode::Unlink, b"x\0".to_vec(), vec![0]),
        (Opcode::RmDir, b"x\0".to_vec(), vec![0]),
        (Opcode::Rename, [ROOT.as_bytes(), b"x\0y\0"].concat(), vec![0]),
        (Opcode::Access, vec![0; 8], vec![0]),
        (Opcode::SyncFs, vec![0; 8], vec![0]),
    ] {
        for length in [0, 1, 8, 16, 50, 80, 100, 101, 104, 105, 288, 289, 4095, 4096, 100_000] {
            let result = Trial::default().told(opcode, ROOT, &body, &vec![0; length]);
            assert_eq!(result.is_ok(), right.contains(&length), "{opcode:?}: {length}");
        }
    }
}

#[test]
fn a_node_is_the_same_by_its_inode_and_generation_only() {
    let file = entry(1000, 10, FILE);
    for (found, same) in [
        (EntryOut { nodeid: 3, ..file }, true),
        (EntryOut { generation: 6, ..file }, false),
        (entry(1000, 11, FILE), false),
        (entry(1000, 10, DIRECTORY), false),
        (EntryOut::default(), false),
    ] {
        let mut trial = Trial::default();
        let own = trial.enter(Opcode::Lookup, ROOT, &text("file"), file);
        trial.die();
        let get = request(Opcode::StatFs, own, &[]);
        assert_eq!(trial.ask(&get, 99), Fared::Lost(own, vec![b"file".as_slice().into()]));
        assert_eq!(trial.found(own, &found), same);
        match trial.ask(&get, 99) {
            Fared::Sent(frame) => {
                assert_eq!(InHeader::read_from_prefix(&frame).unwrap().0.nodeid, found.nodeid)
            }
            other => assert_eq!((other, same), (Fared::Answered(116), false)),
        }
        // The client itself may find it, wherever it is.
        let again = trial.enter(Opcode::Lookup, ROOT, &text("moved"), EntryOut { nodeid: 55, ..file });
        if !same {
            assert_eq!((again, trial.sent(Opcode::StatFs, own, &[]).nodeid), (own, 55));
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Lookup(u8, u8, u8),
    Unlink(u8, u8),
    Rename(u8, u8, u8, u8, bool),
    Forget(u8, u8),
    Die,
}

proptest! {
    #[test]
    fn nodes_fit_each_other_whatever_happens(steps in prop::collection::vec(prop_oneof![
        6 => (0..12_u8, 0..4_u8, 0..12_u8).prop_map(|(p, n, i)| Step::Lookup(p, n, i)),
        1 => (0..12_u8, 0..4_u8).prop_map(|(p, n)| Step::Unlink(p, n)),
        2 => (0..12_u8, 0..4_u8, 0..12_u8, 0..4_u8, any::<bool>())
            .prop_map(|(p, n, q, m, x)| Step::Rename(p, n, q, m, x)),
        3 => (0..12_u8, 0..3_u8).prop_map(|(i, n)| Step::Forget(i, n)),
        1 => Just(Step::Die),
    ], 0..80)) {
        let mut trial = Trial::default();
        // What the client knows: own numbers by inode, and how often it looked each up.
        let mut known: Vec<(u64, u64)> = vec![(ROOT, 1)];
        let names = ["a", "b", "c", "d"];
        let mut life = 0_u64;
        for step in steps {
            match step {
                Step::Lookup(parent, name, inode) => {
                    let parent = known[usize::from(parent) % known.len()].0;
                    let inode = u64::from(inode);
                    let answer = entry(100 * life + inode + 2, inode + 2, DIRECTORY);
                    let asked = trial.ask(&request(Opcode::Lookup, parent, &text(names[usize::from(name)])), 999);
                    let Fared::Sent(frame) = asked else { continue };
                    let unique = InHeader::read_from_prefix(&frame).unwrap().0.unique;
                    let header = OutHeader { len: 144, error: 0, unique };
                    let reply = trial.answer([header.as_bytes(), answer.as_bytes()].concat()).unwrap();
                    let own = EntryOut::read_from_prefix(&reply[OUT_HEADER..]).unwrap().0.nodeid;
                    match known.iter_mut().find(|known| known.0 == own) {
                        Some(known) => known.1 += 1,
                        None => known.push((own, 1)),
                    }
                }
                Step::Unlink(parent, name) => {
                    let parent = known[usize::from(parent) % known.len()].0;
                    let body = text(names[usize::from(name)]);
                    if matches!(trial.ask(&request(Opcode::Unlink, parent, &body), 99), Fared::Sent(_)) {
                        let header = OutHeader { len: 16, error: 0, unique: trial.last() };
                        trial.answer(header.as_bytes().to_vec()).unwrap();
                    }
                }
                Step::Rename(parent, old, other, new, exchange) => {
                    let parent = known[usize::from(parent) % known.len()].0;
                    let newdir = known[usize::from(other) % known.len()].0;
                    let head = Rename2In { newdir, flags: u32::from(exchange) * 2, padding: 0 };
                    let (old, new) = (text(names[usize::from(old)]), text(names[usize::from(new)]));
                    let body = [head.as_bytes(), &old, &new].concat();
                    if matches!(trial.ask(&request(Opcode::Rename2, parent, &body), 99), Fared::Sent(_)) {
                        let header = OutHeader { len: 16, error: 0, unique: trial.last() };
                        trial.answer(header.as_bytes().to_vec()).unwrap();
                    }
                }
                Step::Forget(inode, lookups) => {
                    let at = usize::from(inode) % known.len();
                    let (own, count) = &mut known[at];
                    let lookups = u64::from(lookups).min(*count);
                    trial.ask(&request(Opcode::Forget, *own, lookups.as_bytes()), 0);
                    *count -= lookups;
                    if *count == 0 && *own != ROOT {
                        known.swap_remove(at);
                    } else {
                        *count = (*count).max(1);
                    }
                }
                Step::Die => {
                    life += 1;
                    trial.die();
                }
            }
            prop_assert!(trial.count() >= known.len());
        }
        for (own, count) in known {
            trial.ask(&request(Opcode::Forget, own, count.as_bytes()), 0);
        }
        // Directories that name each other in a circle cannot be, but a liar may say so: they alone may be left.
        let _ = trial.count();
    }
}
