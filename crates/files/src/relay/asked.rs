//! A request that is under way, from when the client asks to when it is answered.
//!
//! ```text
//!   waiting: for a performer, or for a node or file to be found again there
//!      |  sent (all of it, or what was sent is of no use to anyone)
//!      v
//!   asked, in one life of the performer ---- answered
//!      |  the life ends
//!      +--> not sent whole, or once is as good as twice: waiting    (rules.rs)
//!      +--> otherwise: EIO
//! ```

use super::nodes::Missing;
use super::places::{Number, Place, Places, limit, patch};
use super::rules::{Fate, fate};
use super::tables::Tables;
use crate::abi::{self, Features, IN_HEADER, InHeader, OUT_HEADER, Opcode};
use crate::request::{self, Operation, Request};
use rustix::fs::OFlags;
use rustix::io::Errno;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;

/// Where `ReadIn::size` stands.
const READ_SIZE: usize = IN_HEADER + 16;

/// Who waits for the answer.
#[derive(Debug)]
pub(super) enum From {
    /// The client, who calls it by this number, and has room for so many bytes of reply.
    Client { unique: u64, room: usize },
    /// The relay itself.
    Relay(SyncSender<Result<Vec<u8>, Errno>>),
}

/// A request under way.
#[derive(Debug)]
pub(super) struct Asked {
    pub from: From,
    pub opcode: Opcode,
    /// As it is sent. Shared with who sends it.
    pub frame: Arc<Vec<u8>>,
    /// The client's own numbers in it.
    pub places: Places,
    pub long_xattr: bool,
    /// The life in which it was asked, if it was.
    pub life: Option<u64>,
    /// Whether it was sent whole.
    pub sent: Arc<AtomicBool>,
    /// Lives that ended over it.
    pub deaths: u32,
    /// How much had been written when an fsync was asked for.
    pub written: u64,
}

/// What is to be done with a request now.
#[derive(Debug)]
pub(super) enum Now {
    /// Sent: these bytes.
    Send(Arc<Vec<u8>>),
    /// Answered, with an error or 0.
    Answer(Option<Errno>),
    /// This node must be found again first.
    Node(u64),
    /// This file must be opened again first.
    File(u64),
}

impl Asked {
    /// One in which no numbers are the client's.
    pub fn own(from: From, opcode: Opcode, frame: Vec<u8>, long_xattr: bool) -> Self {
        Self {
            from,
            opcode,
            frame: Arc::new(frame),
            places: Places::default(),
            long_xattr,
            life: None,
            sent: Arc::default(),
            deaths: 0,
            written: 0,
        }
    }

    /// What is asked for. The numbers in it are the performer's, or the client's: see `places`.
    pub fn request(&self) -> Option<Request<'_>> {
        let header: InHeader = request::header(&self.frame)?;
        Request::parse(header, self.frame.get(IN_HEADER..)?, self.long_xattr).ok()
    }

    /// Makes it ready to be sent as `ticket`, or says what is missing.
    pub fn prepare(&mut self, ticket: u64, tables: &mut Tables) -> Now {
        if let Some(now) = self.without_asking(tables) {
            return now;
        }
        let mut numbers: [Option<(usize, u64)>; 4] = [None; 4];
        let mut node = 0;
        for (number, place) in numbers.iter_mut().zip(self.places.iter()) {
            let found = match place.number {
                Number::Node => {
                    node = place.own;
                    tables.nodes.there(place.own)
                }
                Number::File => self.file(place, node, tables),
            };
            *number = match (found, place.number) {
                (Ok(there), _) => Some((place.at, there)),
                (Err(Missing::Error(error)), _) => return Now::Answer(Some(error)),
                (Err(Missing::Lost), Number::Node) => return Now::Node(place.own),
                (Err(Missing::Lost), Number::File) => return Now::File(place.own),
            };
        }
        let room = match self.from {
            From::Client { room, .. } => room,
            From::Relay(_) => usize::MAX,
        };
        self.note(tables);
        let frame = Arc::make_mut(&mut self.frame);
        patch(frame, size_of::<u32>() * 2, ticket);
        for (at, there) in numbers.into_iter().flatten() {
            patch(frame, at, there);
        }
        if matches!(self.opcode, Opcode::Read | Opcode::ReadDir | Opcode::ReadDirPlus) {
            limit(frame, READ_SIZE, room.saturating_sub(OUT_HEADER));
        }
        self.life = Some(tables.life());
        self.sent = Arc::default();
        Now::Send(self.frame.clone())
    }

    fn file(&self, place: &Place, node: u64, tables: &Tables) -> Result<u64, Missing> {
        // Where nothing need be opened, this is how it is named.
        let implicit = tables.has(Features::NO_OPEN_SUPPORT) || tables.has(Features::NO_OPENDIR_SUPPORT);
        let closing = matches!(self.opcode, Opcode::Release | Opcode::ReleaseDir);
        if place.own == 0 && implicit { Ok(0) } else { tables.files.there(place.own, node, closing) }
    }

    /// What needs no performer.
    pub fn without_asking(&self, tables: &mut Tables) -> Option<Now> {
        let failed = |error| Some(Now::Answer(Some(error)));
        let file = self.places.file().unwrap_or(0);
        let node = self.places.node();
        match self.opcode {
            Opcode::Release | Opcode::ReleaseDir => {
                // What is not open there needs no closing.
                let lost = file == 0 || tables.files.there(file, node, true) == Err(Missing::Lost);
                lost.then(|| {
                    let _ = tables.files.close(file, node);
                    Now::Answer(None)
                })
            }
            Opcode::Fsync | Opcode::FsyncDir if tables.files.tell_loss(file) => failed(Errno::IO),
            Opcode::SyncFs if tables.files.tell_any_loss() => failed(Errno::IO),
            Opcode::SetLk | Opcode::SetLkW => match self.request()?.operation {
                Operation::SetLk(lock) | Operation::SetLkW(lock)
                    if lock.lk.kind != super::held::NONE && !tables.files.may_lock(node, &lock) =>
                {
                    failed(Errno::NOLCK)
                }
                _ => None,
            },
            Opcode::Open | Opcode::OpenDir | Opcode::Create | Opcode::TmpFile if !tables.files.has_room() => {
                failed(Errno::NFILE)
            }
            _ => None,
        }
    }

    /// Takes note of what is about to be changed.
    fn note(&mut self, tables: &mut Tables) {
        let node = self.places.node();
        match self.opcode {
            Opcode::Fsync | Opcode::FsyncDir => self.written = tables.nodes.written(node),
            Opcode::Write => {
                let on_disk = |flags| OFlags::from_bits_retain(flags).intersects(OFlags::DSYNC);
                let write = self.request().map(|request| request.operation);
                if !matches!(write, Some(Operation::Write(write)) if on_disk(write.flags) && write.write_flags & abi::WRITE_CACHE == 0)
                {
                    tables.nodes.wrote(node);
                }
            }
            Opcode::CopyFileRange | Opcode::CopyFileRange64 => tables.nodes.wrote(self.places.other_node()),
            Opcode::Rename | Opcode::Rename2 => {
                tables.nodes.wrote(node);
                tables.nodes.wrote(self.places.other_node());
            }
            Opcode::Open => {
                let open = self.request().map(|request| request.operation);
                if matches!(open, Some(Operation::Open(open)) if OFlags::from_bits_retain(open.flags).contains(OFlags::TRUNC))
                {
                    tables.nodes.wrote(node);
                }
            }
            Opcode::Fallocate
            | Opcode::SetAttr
            | Opcode::SetXattr
            | Opcode::RemoveXattr
            | Opcode::SymLink
            | Opcode::MkNod
            | Opcode::MkDir
            | Opcode::Unlink
            | Opcode::RmDir
            | Opcode::Link
            | Opcode::Create => tables.nodes.wrote(node),
            Opcode::Release | Opcode::ReleaseDir => {
                // No kernel names it again, whatever becomes of the request.
                let _ = tables.files.close(self.places.file().unwrap_or(0), node);
            }
            _ => {}
        }
    }

    /// What becomes of it now that its performer is dead.
    pub fn fate(&self, kept_back: bool) -> Fate {
        if !self.sent.load(Ordering::SeqCst) {
            // A closed file is closed, asked or not.
            return match self.opcode {
                Opcode::Release | Opcode::ReleaseDir => Fate::Done,
                _ => Fate::Again,
            };
        }
        self.request().map_or(Fate::Failed, |request| fate(&request.operation, kept_back))
    }
}
