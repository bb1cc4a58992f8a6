//! A client's requests and the answers of a performer that lies, as the relay of files sees them.
//!
//! Whatever is said, nothing panics, what the client is told fits what it asked, and all that is kept in mind fits together. The
//! input is a list of steps: what the client asks, what the performer answers, deaths.
#![no_main]

use kso_files::abi::{self, Features, InHeader, Opcode, OutHeader, ROOT};
use kso_files::relay::{Fared, Trial};
use libfuzzer_sys::fuzz_target;
use zerocopy::{FromBytes, IntoBytes};

/// The input, read from its beginning; zeros after its end.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn bytes(&mut self, length: usize) -> &'a [u8] {
        let (first, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        first
    }
}

/// A request that was sent.
struct Sent {
    unique: u64,
    opcode: Opcode,
}

/// What an opcode is asked with, but for names: mostly zeros, some of the input's.
fn ask(opcode: Opcode, input: &mut Input<'_>, numbers: &[u64]) -> Vec<u8> {
    let head = match opcode {
        Opcode::Lookup
        | Opcode::Unlink
        | Opcode::RmDir
        | Opcode::SymLink
        | Opcode::ReadLink
        | Opcode::StatFs => 0,
        Opcode::Rename | Opcode::Link | Opcode::MkDir | Opcode::Open | Opcode::OpenDir | Opcode::Access => 8,
        Opcode::Rename2 | Opcode::Create | Opcode::TmpFile | Opcode::MkNod | Opcode::GetAttr => 16,
        Opcode::Release | Opcode::Flush | Opcode::Lseek | Opcode::StatX => 24,
        Opcode::Fallocate | Opcode::Ioctl => 32,
        Opcode::Read | Opcode::Write | Opcode::ReadDir | Opcode::ReadDirPlus => 40,
        Opcode::SetLk | Opcode::SetLkW | Opcode::GetLk => 48,
        Opcode::CopyFileRange | Opcode::CopyFileRange64 => 56,
        Opcode::SetAttr => 88,
        _ => 16,
    };
    let mut body = vec![0; head];
    // Numbers that were told, where numbers stand.
    for room in body.chunks_exact_mut(8).take(4) {
        let which = usize::from(input.byte());
        if let Some(number) = numbers.get(which) {
            room.copy_from_slice(&number.to_ne_bytes());
        }
    }
    let changes = usize::from(input.byte() % 8);
    for _ in 0..changes {
        let (at, byte) = (usize::from(input.byte()), input.byte());
        if let Some(room) = body.get_mut(at) {
            *room = byte;
        }
    }
    let length = usize::from(input.byte() % 64);
    body.extend_from_slice(input.bytes(length));
    if input.byte() & 1 == 0 {
        body.extend_from_slice(b"\0other\0");
    }
    body
}

/// A body that may be right, of what the performer answers.
fn answer(opcode: Opcode, input: &mut Input<'_>) -> Vec<u8> {
    let right = match opcode {
        Opcode::Lookup | Opcode::MkNod | Opcode::MkDir | Opcode::SymLink | Opcode::Link => 128,
        Opcode::Create | Opcode::TmpFile => 144,
        Opcode::Open | Opcode::OpenDir => 16,
        Opcode::GetAttr | Opcode::SetAttr => 104,
        Opcode::StatX => 288,
        Opcode::StatFs => 80,
        Opcode::Write | Opcode::CopyFileRange | Opcode::CopyFileRange64 | Opcode::Lseek => 8,
        Opcode::GetLk => 24,
        Opcode::Ioctl => 16,
        Opcode::ReadDirPlus => 128 + 32,
        Opcode::ReadDir => 32,
        _ => 0,
    };
    let mut body = vec![0; right];
    if right >= 128 {
        let entry = abi::EntryOut {
            nodeid: u64::from(input.byte()),
            generation: u64::from(input.byte() % 4),
            attr: abi::Attr {
                ino: u64::from(input.byte() % 16),
                mode: u32::from(input.byte() % 16) << 12,
                ..abi::Attr::default()
            },
            ..abi::EntryOut::default()
        };
        body[..128].copy_from_slice(entry.as_bytes());
    }
    let head = if opcode == Opcode::ReadDirPlus { 128 } else { 0 };
    if matches!(opcode, Opcode::ReadDir | Opcode::ReadDirPlus) {
        let dirent = abi::Dirent { ino: 1, off: 1, namelen: u32::from(input.byte() % 16), kind: 4 };
        body[head..head + 24].copy_from_slice(dirent.as_bytes());
        let name = input.bytes(8);
        body[head + 24..head + 24 + name.len()].copy_from_slice(name);
        // Several, perhaps.
        let one = body.clone();
        for _ in 0..input.byte() % 4 {
            body.extend_from_slice(&one);
        }
    }
    let changes = usize::from(input.byte() % 8);
    for _ in 0..changes {
        let (at, byte) = (usize::from(input.byte()), input.byte());
        if let Some(room) = body.get_mut(at) {
            *room = byte;
        }
    }
    match input.byte() % 8 {
        0 => body.truncate(usize::from(input.byte())),
        1 => {
            let length = usize::from(input.byte());
            body.extend_from_slice(input.bytes(length));
        }
        _ => {}
    }
    body
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let features = match input.byte() % 3 {
        0 => Features::empty(),
        1 => Features::SETXATTR_EXT | Features::WRITEBACK_CACHE,
        _ => Features::NO_OPEN_SUPPORT | Features::NO_OPENDIR_SUPPORT,
    };
    let mut trial = Trial::new(features);
    let mut sent: Vec<Sent> = Vec::new();
    // Numbers of nodes and files that the client was told.
    let mut numbers = vec![ROOT];
    let mut lost = None;
    while !input.0.is_empty() {
        match input.byte() % 8 {
            0..=2 => {
                let Some(opcode) = Opcode::of(u32::from(input.byte() % 56)) else { continue };
                let node = numbers[usize::from(input.byte()) % numbers.len()];
                let body = ask(opcode, &mut input, &numbers);
                let header = InHeader {
                    len: (abi::IN_HEADER + body.len()) as u32,
                    opcode: opcode as u32,
                    unique: 1 << 40,
                    nodeid: node,
                    ..InHeader::default()
                };
                let room = usize::from(input.byte()) * 16;
                match trial.ask(&[header.as_bytes(), &body].concat(), room) {
                    Fared::Sent(frame) => {
                        let (header, _) = InHeader::read_from_prefix(&frame).expect("a header");
                        assert_eq!(header.len as usize, frame.len());
                        sent.push(Sent { unique: header.unique, opcode });
                    }
                    Fared::Lost(node, _) => lost = Some(node),
                    Fared::Closed(file) => trial.reopened(file, u64::from(input.byte())),
                    Fared::Answered(_) | Fared::Kept => {}
                }
            }
            3..=5 => {
                let at = usize::from(input.byte());
                let Some(one) = sent.get(at % sent.len().max(1)) else { continue };
                let (unique, opcode) = (one.unique, one.opcode);
                let body = answer(opcode, &mut input);
                let error = match input.byte() {
                    byte @ 0..=15 => -i32::from(byte),
                    16 => i32::MIN,
                    17 => 5,
                    _ => 0,
                };
                let header = OutHeader { len: (abi::OUT_HEADER + body.len()) as u32, error, unique };
                let Ok(told) = trial.answer([header.as_bytes(), &body].concat()) else { continue };
                sent.retain(|sent| sent.unique != unique);
                let (header, told) = OutHeader::read_from_prefix(&told).expect("a header");
                assert_eq!(header.unique, 1 << 40, "another's reply");
                assert!(header.error == 0 || told.is_empty());
                if numbers.len() < 256 && header.error == 0 {
                    // As a client reads it: node first, file at the end.
                    if let Ok((entry, _)) = abi::EntryOut::read_from_prefix(told)
                        && !matches!(
                            opcode,
                            Opcode::Read | Opcode::ReadDir | Opcode::ReadDirPlus | Opcode::StatX
                        )
                    {
                        numbers.push(entry.nodeid);
                    }
                    if matches!(opcode, Opcode::Open | Opcode::OpenDir | Opcode::Create | Opcode::TmpFile)
                        && let Some((_, open)) = told.split_at_checked(told.len() - 16)
                        && let Ok((fh, _)) = u64::read_from_prefix(open)
                    {
                        numbers.push(fh);
                    }
                }
            }
            6 => {
                let before = sent.len();
                let fates = trial.die();
                // Those that were asked again before are among them.
                assert!(fates.iter().sum::<usize>() >= before, "a request got lost");
                sent.clear();
            }
            _ => {
                if let Some(node) = lost.take() {
                    let body = answer(Opcode::Lookup, &mut input);
                    if let Ok((entry, _)) = abi::EntryOut::read_from_prefix(&body) {
                        trial.found(node, &entry);
                    }
                } else {
                    let node = numbers[usize::from(input.byte()) % numbers.len()];
                    let header = InHeader {
                        len: 48,
                        opcode: Opcode::Forget as u32,
                        nodeid: node,
                        ..InHeader::default()
                    };
                    let lookups = u64::from(input.byte());
                    trial.ask(&[header.as_bytes(), lookups.as_bytes()].concat(), 0);
                }
            }
        }
        trial.count();
    }
    assert!(trial.take_forgotten().len() <= bytes.len());
});
