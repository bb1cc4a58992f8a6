//! The thread that finds a performer, and finds again there what the client knows.

use super::asked::{From, Now};
use super::files::File;
use super::lives::CallError;
use super::nodes::Missing;
use super::{ATTEMPTS, Agreed, Inner, LOST, Phase, QUIET};
use crate::abi::{self, EntryOut, Features, InitIn, InitOut, Opcode, OpenIn, OpenOut};
use crate::frames::Link;
use crate::inodes::lock;
use crate::request::Operation;
use crate::service::MAX_WRITE;
use rustix::io::Errno;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};
use zerocopy::IntoBytes;

/// Between the first attempts, and between later ones.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// However many attempts are left, those who wait are told after this.
const DEADLINE: Duration = Duration::from_secs(60);
/// Directories above a node: none of a kernel's paths has more.
const MAX_DEPTH: usize = 2048;
/// Requests of the relay's own are root's: it is the client that checked.
const ROOT_USER: (u32, u32) = (0, 0);

impl Inner {
    /// What the thread does.
    pub(super) fn mend(self: Arc<Self>) {
        loop {
            let mut state = lock(&self.state);
            let ticket = loop {
                let phase = state.phase;
                if phase == Phase::Closed {
                    return;
                }
                // Others could take what is locked.
                if phase == Phase::Away && state.agreed.is_some() && state.tables.files.has_locks() {
                    break None;
                }
                if let Some(ticket) = state.waiting.pop_front() {
                    break Some(ticket);
                }
                let quiet = state.link.is_some().then_some(QUIET);
                state = match quiet {
                    None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                    Some(quiet) => {
                        let waited = self.changed.wait_timeout(state, quiet);
                        drop(waited.unwrap_or_else(PoisonError::into_inner));
                        self.pass_forgotten();
                        self.listen();
                        lock(&self.state)
                    }
                };
            };
            drop(state);
            match ticket {
                Some(ticket) => self.perform(ticket),
                None => {
                    let _ = self.reconnect();
                }
            }
        }
    }

    /// Brings a request on its way.
    fn perform(self: &Arc<Self>, ticket: u64) {
        let mut state = lock(&self.state);
        let Some(asked) = state.asked.get(&ticket) else { return };
        if asked.opcode == Opcode::Init {
            drop(state);
            return self.begin(ticket);
        }
        if state.phase != Phase::Ready {
            drop(state);
            if self.reconnect().is_err() {
                return;
            }
            state = lock(&self.state);
        }
        loop {
            let state_now = &mut *state;
            let Some(asked) = state_now.asked.get_mut(&ticket) else { return };
            let found = match asked.prepare(ticket, &mut state_now.tables) {
                Now::Send(frame) => {
                    let (sent, link) = (asked.sent.clone(), state_now.link.clone());
                    drop(state);
                    if let Some(link) = link {
                        let _ = link.send(&frame, Some(&sent));
                    }
                    return;
                }
                Now::Answer(error) => {
                    if let Some(asked) = state_now.take(ticket) {
                        self.answer(ticket, asked, error);
                    }
                    return;
                }
                Now::Node(node) => {
                    drop(state);
                    self.find(node, 0).map(drop)
                }
                Now::File(file) => {
                    drop(state);
                    self.reopen(file)
                }
            };
            state = lock(&self.state);
            match found {
                Ok(()) if state.phase == Phase::Ready => {}
                Ok(()) | Err(CallError::Gone) => {
                    // The next performer, then.
                    if state.asked.contains_key(&ticket) {
                        state.waiting.push_front(ticket);
                    }
                    return;
                }
                Err(CallError::Errno(error)) => {
                    if let Some(asked) = state.take(ticket) {
                        self.answer(ticket, asked, Some(error));
                    }
                    return;
                }
            }
        }
    }

    /// Nobody is there: all of this client who wait are told.
    fn fail_all(&self, client: u64) {
        let mut state = lock(&self.state);
        if state.phase == Phase::Closed || state.client != client {
            return;
        }
        state.phase = Phase::Lost(Instant::now() + LOST);
        state.fruitless = 0;
        let tickets: Vec<u64> =
            state.asked.iter().filter(|(_, asked)| asked.life.is_none()).map(|(ticket, _)| *ticket).collect();
        state.waiting.clear();
        for ticket in tickets {
            if let Some(asked) = state.take(ticket) {
                self.answer(ticket, asked, Some(Errno::IO));
            }
        }
    }

    /// The client mounts.
    fn begin(self: &Arc<Self>, ticket: u64) {
        let state = lock(&self.state);
        let client = state.client;
        let request =
            state.asked.get(&ticket).and_then(|asked| asked.request()).map(|request| request.operation);
        let Some(Operation::Init { init, more }) = request else { return };
        let room = match state.asked.get(&ticket).map(|asked| &asked.from) {
            Some(From::Client { room, .. }) => *room,
            _ => 0,
        };
        drop(state);
        let mut offered = u64::from(init.flags);
        if offered & Features::INIT_EXT.bits() != 0 {
            offered |= u64::from(more) << 32;
        }
        // What is not known here cannot be passed on; and files of another kernel cannot back one's own.
        let offered = Features::from_bits_truncate(offered).difference(Features::PASSTHROUGH);
        let wanted = Agreed { init, features: offered, max_write: 0 };
        let result = self.connect(client, wanted, true);
        let mut state = lock(&self.state);
        if state.client != client {
            return;
        }
        let out = match result {
            Ok(mut out) => {
                let features = Features::from_bits_retain(u64::from(out.flags) | u64::from(out.flags2) << 32);
                out.max_write = out.max_write.min(MAX_WRITE);
                out.max_pages = out.max_pages.min((MAX_WRITE / 4096) as u16);
                (out.map_alignment, out.max_stack_depth) = (0, 0);
                state.agreed = Some(Agreed { init, features, max_write: out.max_write });
                state.tables.features = features;
                Some(out)
            }
            Err(reason) => {
                tracing::error!(%reason, "files of another kernel cannot be mounted");
                state.failure = Some(reason);
                None
            }
        };
        let Some(asked) = state.take(ticket) else { return };
        match (out, &asked.from) {
            (Some(out), From::Client { unique, .. }) if room >= abi::OUT_HEADER + size_of::<InitOut>() => {
                let len = (abi::OUT_HEADER + size_of::<InitOut>()) as u32;
                let header = abi::OutHeader { len, error: 0, unique: *unique };
                self.completer.reply(ticket, &[header.as_bytes(), out.as_bytes()].concat());
            }
            _ => self.answer(ticket, asked, Some(Errno::IO)),
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Finds a performer for a client that has mounted.
    fn reconnect(self: &Arc<Self>) -> Result<(), ()> {
        let state = lock(&self.state);
        let (client, agreed) = (state.client, state.agreed);
        drop(state);
        let Some(agreed) = agreed else { return Err(()) };
        match self.connect(client, agreed, false) {
            Ok(_) => Ok(()),
            Err(reason) => {
                tracing::error!(%reason, "no kernel performs these files any more: requests fail");
                self.fail_all(client);
                Err(())
            }
        }
    }

    /// Dials until there is a performer that agrees, or hope is lost.
    fn connect(self: &Arc<Self>, client: u64, wanted: Agreed, first: bool) -> Result<InitOut, String> {
        let until = Instant::now() + DEADLINE;
        // Performers that died before they had answered anything count as attempts too.
        let mut attempts = lock(&self.state).fruitless;
        let mut reason = "each dies over what it is asked first".to_owned();
        loop {
            if attempts >= ATTEMPTS || Instant::now() > until {
                return Err(reason);
            }
            self.pause(client, attempts)?;
            reason = match self.attempt(client, wanted, first) {
                Ok(out) => return Ok(out),
                Err(reason) => reason,
            };
            attempts += 1;
            let mut state = lock(&self.state);
            if let Some(link) = state.link.clone().filter(|_| state.client == client) {
                drop(state.leave());
                drop(state);
                link.end();
            }
            tracing::debug!(%reason, attempts, "a file service was dialled in vain");
        }
    }

    /// Before another attempt, the longer the more were in vain.
    fn pause(&self, client: u64, attempts: u32) -> Result<(), String> {
        let pause = match attempts {
            0 => Duration::ZERO,
            attempts => FIRST_PAUSE.saturating_mul(1 << (attempts - 1).min(16)).min(LONGEST_PAUSE),
        };
        let resume = Instant::now() + pause;
        let mut state = lock(&self.state);
        loop {
            if state.client != client || state.phase == Phase::Closed {
                return Err("the client is gone".to_owned());
            }
            let left = resume.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn attempt(self: &Arc<Self>, client: u64, wanted: Agreed, first: bool) -> Result<InitOut, String> {
        let spare = lock(&self.state).spare.take();
        let greeted = match spare {
            Some(greeted) => greeted,
            None => self.greet().map_err(|error| format!("no file service: {error}"))?,
        };
        let link = Arc::new(Link::new(greeted.stream).map_err(|error| error.to_string())?);
        let reader = link.reader().map_err(|error| error.to_string())?;
        let mut state = lock(&self.state);
        if state.client != client || state.phase == Phase::Closed {
            return Err("the client is gone".to_owned());
        }
        let life = state.tables.life();
        state.phase = Phase::Mending;
        state.link = Some(link.clone());
        state.heard = Instant::now();
        drop(state);
        self.read(link, reader, life).map_err(|error| format!("no thread: {error}"))?;
        let bits = wanted.features.bits();
        let init = InitIn { flags: bits as u32, ..wanted.init };
        let body = [init.as_bytes(), &((bits >> 32) as u32).to_ne_bytes(), &[0; 44]].concat();
        let gone = |error| match error {
            CallError::Errno(error) => format!("the file service refuses the mount: {error}"),
            CallError::Gone => "the file service is gone".to_owned(),
        };
        let body = self.call(life, Opcode::Init, 0, ROOT_USER, &body).map_err(gone)?;
        let out: InitOut = self.exact(&body).map_err(gone)?;
        let features = Self::check_init(&out, wanted.features)?;
        if !first && features != wanted.features {
            let missing = wanted.features.difference(features);
            return Err(format!("the file service lacks what the one before had ({missing:?})"));
        }
        if !first && out.max_write < wanted.max_write {
            return Err("the file service takes only smaller writes than the one before".to_owned());
        }
        let mut state = lock(&self.state);
        if state.tables.life() != life {
            return Err(gone(CallError::Gone));
        }
        let same = state.boot.is_some_and(|before| before.is(greeted.boot));
        if !same && state.boot.is_some() {
            state.tables.lose();
        }
        state.boot = Some(greeted.boot);
        let locked = state.tables.files.with_locks();
        drop(state);
        // Before anybody's requests.
        for file in locked {
            if self.reopen(file) == Err(CallError::Gone) {
                return Err(gone(CallError::Gone));
            }
        }
        let mut state = lock(&self.state);
        if state.tables.life() != life {
            return Err(gone(CallError::Gone));
        }
        state.phase = Phase::Ready;
        drop(state);
        if !first {
            tracing::info!("files are performed again");
        }
        Ok(out)
    }

    /// Looks a node up again, by its names, and those above it.
    fn find(&self, own: u64, depth: usize) -> Result<u64, CallError> {
        let state = lock(&self.state);
        let life = state.tables.life();
        match state.tables.nodes.there(own) {
            Ok(there) => return Ok(there),
            Err(Missing::Error(error)) => return Err(CallError::Errno(error)),
            Err(Missing::Lost) if depth > MAX_DEPTH => return Err(CallError::Errno(Errno::STALE)),
            Err(Missing::Lost) => {}
        }
        let names = state.tables.nodes.names(own);
        drop(state);
        for (parent, name) in names {
            let parent = match self.find(parent, depth + 1) {
                Ok(parent) => parent,
                Err(CallError::Errno(Errno::STALE)) => continue,
                Err(error) => return Err(error),
            };
            let body = [&*name, &[0]].concat();
            let entry: EntryOut = match self.call(life, Opcode::Lookup, parent, ROOT_USER, &body) {
                Ok(body) => self.exact(&body)?,
                Err(CallError::Errno(Errno::NOENT | Errno::NOTDIR | Errno::STALE | Errno::NAMETOOLONG)) => {
                    continue;
                }
                Err(error) => return Err(error),
            };
            let mut state = lock(&self.state);
            if state.tables.life() != life {
                return Err(CallError::Gone);
            }
            if entry.nodeid > abi::ROOT && state.tables.nodes.found(own, &entry) {
                return Ok(entry.nodeid);
            }
        }
        let mut state = lock(&self.state);
        if state.tables.life() != life {
            return Err(CallError::Gone);
        }
        state.tables.nodes.not_found(own);
        Err(CallError::Errno(Errno::STALE))
    }

    /// Opens a file again, and takes its locks.
    fn reopen(&self, own: u64) -> Result<(), CallError> {
        let state = lock(&self.state);
        let life = state.tables.life();
        let Some(file) = state.tables.files.get(own) else { return Ok(()) };
        let File { node, directory, flags, user, .. } = file.clone();
        drop(state);
        let there = self.find(node, 0)?;
        let opcode = if directory { Opcode::OpenDir } else { Opcode::Open };
        let open = OpenIn { flags, open_flags: 0 };
        let body = match self.call(life, opcode, there, user, open.as_bytes()) {
            Err(CallError::Errno(Errno::NOENT)) => return Err(CallError::Errno(Errno::STALE)),
            result => result?,
        };
        let out: OpenOut = self.exact(&body)?;
        let mut state = lock(&self.state);
        if state.tables.life() != life {
            return Err(CallError::Gone);
        }
        state.tables.files.reopened(own, out.fh);
        let locks = state.tables.files.locks(own);
        drop(state);
        for lock_in in locks {
            let lock_in = abi::LkIn { fh: out.fh, ..lock_in };
            match self.call(life, Opcode::SetLk, there, user, lock_in.as_bytes()) {
                Ok(_) => {}
                Err(CallError::Gone) => return Err(CallError::Gone),
                Err(CallError::Errno(error)) => {
                    tracing::warn!(%error, "a lock was lost with the kernel that had it: its holder gets EIO");
                    lock(&self.state).tables.files.broken(own);
                }
            }
        }
        Ok(())
    }
}
