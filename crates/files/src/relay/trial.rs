//! The relay without threads and streams, for tests and fuzzing: what is asked, answered, and kept in mind.

use super::asked::{Asked, From, Now};
use super::places::{Places, patch};
use super::replies::judge;
use super::rules::Fate;
use super::tables::Tables;
use crate::abi::{EntryOut, Features, IN_HEADER, OUT_HEADER, Opcode, OutHeader};
use crate::request::{self, Operation, Request};
use std::collections::BTreeMap;
use zerocopy::FromBytes;

/// A client's requests and a performer's answers, one after the other.
#[derive(Debug)]
pub struct Trial {
    tables: Tables,
    asked: BTreeMap<u64, Asked>,
    next: u64,
}

/// What became of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fared {
    /// It was sent, so.
    Sent(Vec<u8>),
    /// It was answered here: with an error, or 0.
    Answered(i32),
    /// This node must be found again first, by these names.
    Lost(u64, Vec<Box<[u8]>>),
    /// This open file must be opened again first.
    Closed(u64),
    /// It is none that is passed on.
    Kept,
}

impl Default for Trial {
    fn default() -> Self {
        Self { tables: Tables::new(0), asked: BTreeMap::new(), next: 2 }
    }
}

impl Trial {
    /// With these features agreed on.
    #[must_use]
    pub fn new(features: Features) -> Self {
        let mut trial = Self::default();
        trial.tables.features = features;
        trial
    }

    /// The client asks.
    pub fn ask(&mut self, request: &[u8], room: usize) -> Fared {
        let Some(header) = request::header(request) else { return Fared::Kept };
        let long_xattr = self.tables.has(Features::SETXATTR_EXT);
        let body = request.get(IN_HEADER..).unwrap_or_default();
        let parsed = match Request::parse(header, body, long_xattr) {
            Ok(parsed) => parsed,
            Err(error) => return Fared::Answered(error.raw_os_error()),
        };
        let Some(opcode) = Opcode::of(header.opcode) else { return Fared::Kept };
        match parsed.operation {
            Operation::Forget(lookups) => {
                self.tables.nodes.forget(header.nodeid, lookups);
                return Fared::Kept;
            }
            Operation::BatchForget(_)
            | Operation::Other
            | Operation::Init { .. }
            | Operation::Destroy
            | Operation::Interrupt(_) => return Fared::Kept,
            _ => {}
        }
        let places = Places::of(request, opcode, &parsed.operation);
        let from = From::Client { unique: header.unique, room };
        let asked = Asked { places, ..Asked::own(from, opcode, request.to_vec(), long_xattr) };
        self.go_on(asked)
    }

    fn go_on(&mut self, mut asked: Asked) -> Fared {
        let ticket = self.next;
        match asked.prepare(ticket, &mut self.tables) {
            Now::Send(frame) => {
                self.next += 2;
                asked.sent.store(true, std::sync::atomic::Ordering::SeqCst);
                self.asked.insert(ticket, asked);
                Fared::Sent(frame.to_vec())
            }
            Now::Answer(error) => Fared::Answered(error.map_or(0, rustix::io::Errno::raw_os_error)),
            Now::Node(node) => {
                let names = self.tables.nodes.names(node).into_iter().map(|(_, name)| name).collect();
                Fared::Lost(node, names)
            }
            Now::File(file) => Fared::Closed(file),
        }
    }

    /// The performer answers: what the client is told.
    ///
    /// # Errors
    /// The answer is a lie.
    pub fn answer(&mut self, mut reply: Vec<u8>) -> Result<Vec<u8>, &'static str> {
        let (header, _) = OutHeader::read_from_prefix(&reply).map_err(|_| "no header")?;
        let asked = self.asked.get(&header.unique).ok_or("it answers what was not asked")?;
        let body = reply.get_mut(OUT_HEADER..).ok_or("no header")?;
        let error = judge(&mut self.tables, asked, header.error, body)?;
        let Some(Asked { from: From::Client { unique, .. }, .. }) = self.asked.remove(&header.unique) else {
            return Err("nobody asked");
        };
        match error {
            Some(error) => Ok(crate::bare_reply(unique, error.raw_os_error()).to_vec()),
            None => {
                patch(&mut reply, 8, unique);
                Ok(reply)
            }
        }
    }

    /// The performer dies. How many requests are asked again, are done, and have failed.
    pub fn die(&mut self) -> [usize; 3] {
        let life = self.tables.life() + 1;
        self.tables.begin(life);
        let kept_back = self.tables.has(Features::WRITEBACK_CACHE);
        let mut fates = [0; 3];
        for (_, asked) in std::mem::take(&mut self.asked) {
            let [again, done, failed] = &mut fates;
            match asked.fate(kept_back) {
                Fate::Again => {
                    *again += 1;
                    self.go_on(asked);
                }
                Fate::Done => *done += 1,
                Fate::Failed => *failed += 1,
            }
        }
        fates
    }

    /// A node that was lost was looked up again. Whether it is the same.
    pub fn found(&mut self, node: u64, entry: &EntryOut) -> bool {
        if entry.nodeid > crate::abi::ROOT && self.tables.nodes.found(node, entry) {
            return true;
        }
        self.tables.nodes.not_found(node);
        false
    }

    /// A file was opened again.
    pub fn reopened(&mut self, file: u64, there: u64) {
        self.tables.files.reopened(file, there);
    }

    /// The number of the request that was sent last.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.next - 2
    }

    /// What the performer is told to forget.
    pub fn take_forgotten(&mut self) -> Vec<(u64, u64)> {
        self.tables.nodes.take_forgotten()
    }

    /// How many nodes are kept, all of which fit each other.
    pub fn count(&mut self) -> usize {
        self.tables.nodes.count()
    }
}
