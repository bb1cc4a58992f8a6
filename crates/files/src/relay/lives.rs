//! The life of a stream: its beginning, what is read from it, and its end.

use super::asked::{Asked, From};
use super::replies::judge;
use super::rules::Fate;
use super::{Inner, MAX_DEATHS, Phase};
use crate::abi::{self, Features, IN_HEADER, InHeader, OUT_HEADER, Opcode, OutHeader};
use crate::frames::{Frames, Link, Malformed};
use crate::hello::{self, Boot, HELLO};
use crate::inodes::lock;
use crate::request::Operation;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};
use zerocopy::{FromBytes, IntoBytes};

/// A file service says at once who it is.
const HELLO_LIMIT: Duration = Duration::from_secs(20);
/// An answer that the relay itself waits for.
const CALL_LIMIT: Duration = Duration::from_secs(90);

/// A connection whose other end has said who it is.
#[derive(Debug)]
pub(super) struct Greeted {
    pub stream: OwnedFd,
    pub boot: Boot,
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("it was closed")]
    Closed,
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("the file service lies: {0}")]
    Lie(&'static str),
}

/// Why a question of the relay's own has no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CallError {
    /// The performer says so.
    Errno(Errno),
    /// It is gone.
    Gone,
}

impl Inner {
    /// Dials, and hears who answers.
    pub(super) fn greet(&self) -> io::Result<Greeted> {
        let stream = self.dial.dial()?;
        rustix::io::ioctl_fionbio(&stream, true)?;
        let mut heard = [0; HELLO];
        let mut got = 0;
        let until = Instant::now() + HELLO_LIMIT;
        while got < HELLO {
            let left = until.saturating_duration_since(Instant::now());
            let left = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
            let mut polled = [PollFd::new(&stream, PollFlags::IN)];
            match poll(&mut polled, Some(&left)) {
                Ok(0) => {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "the file service says nothing"));
                }
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            match rustix::io::read(&stream, heard.get_mut(got..).unwrap_or_default()) {
                Ok(0) => {
                    let text = "the file service closed the stream before it said a word (its log says why)";
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
                }
                Ok(count) => got += count,
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let boot = hello::decode(&heard).map_err(io::Error::other)?;
        Ok(Greeted { stream, boot })
    }

    /// Reads what the performer of a life says, in a thread of its own, until the end.
    pub(super) fn read(self: &Arc<Self>, link: Arc<Link>, reader: UnixStream, life: u64) -> io::Result<()> {
        let inner = self.clone();
        std::thread::Builder::new().name("kso-relay-read".into()).spawn(move || {
            let mut frames = Frames::new(reader, OUT_HEADER);
            let mut frame = Vec::new();
            let end = loop {
                match frames.next(&mut frame) {
                    Ok(true) => {
                        if let Err(lie) = inner.replied(life, &mut frame) {
                            break End::Lie(lie);
                        }
                    }
                    Ok(false) => break End::Closed,
                    Err(error) => break error.into(),
                }
            };
            inner.ended(life, &link, &end);
        })?;
        Ok(())
    }

    /// A reply came.
    fn replied(&self, life: u64, frame: &mut [u8]) -> Result<(), &'static str> {
        let (header, _) = OutHeader::read_from_prefix(frame).map_err(|_| "a reply without a header")?;
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        if state.tables.life() != life {
            // Nobody waits for what this one says.
            return Ok(());
        }
        state.heard = Instant::now();
        if state.pinged == Some(header.unique) {
            state.pinged = None;
            return Ok(());
        }
        let ticket = header.unique;
        let asked = state.asked.get(&ticket).filter(|asked| asked.life == Some(life));
        let asked = asked.ok_or("it answers what was not asked")?;
        let (_, body) = frame.split_at_mut_checked(OUT_HEADER).ok_or("a reply without a header")?;
        let error = judge(&mut state.tables, asked, header.error, body)?;
        let Some(asked) = state.take(ticket) else { return Ok(()) };
        if matches!(asked.from, From::Client { .. }) {
            state.fruitless = 0;
        }
        drop(guard);
        self.pass(ticket, asked, error, frame);
        Ok(())
    }

    /// Passes a reply on to who waits for it.
    fn pass(&self, ticket: u64, asked: Asked, error: Option<Errno>, frame: &mut [u8]) {
        match (&asked.from, error) {
            (From::Client { unique, .. }, None) => {
                super::places::patch(frame, size_of::<u32>() * 2, *unique);
                self.completer.reply(ticket, frame);
                self.room.notify_all();
            }
            (From::Relay(to), None) => {
                let _ = to.try_send(Ok(frame.get(OUT_HEADER..).unwrap_or_default().to_vec()));
            }
            _ => self.answer(ticket, asked, error),
        }
    }

    /// The stream of a life has ended: what was under way is asked again, or fails.
    fn ended(&self, life: u64, link: &Link, end: &End) {
        // First of all it is settled what was sent.
        link.end();
        let mut state = lock(&self.state);
        if state.tables.life() != life {
            return;
        }
        let ready = state.phase == Phase::Ready;
        drop(state.leave());
        state.fruitless += 1;
        let kept_back = state.tables.has(Features::WRITEBACK_CACHE);
        let mut answers = Vec::new();
        let mut tickets: Vec<u64> = state
            .asked
            .iter()
            .filter(|(_, asked)| asked.life == Some(life))
            .map(|(ticket, _)| *ticket)
            .collect();
        // As they were asked.
        tickets.sort_unstable();
        for ticket in tickets {
            let state = &mut *state;
            let Some(asked) = state.asked.get_mut(&ticket) else { continue };
            let fate = match asked.from {
                From::Relay(_) => Fate::Failed,
                From::Client { .. } => asked.fate(kept_back),
            };
            let sent = asked.sent.load(std::sync::atomic::Ordering::SeqCst);
            asked.deaths += u32::from(sent);
            let error = match fate {
                Fate::Again if asked.deaths < MAX_DEATHS => {
                    asked.life = None;
                    state.waiting.push_back(ticket);
                    continue;
                }
                Fate::Done => None,
                Fate::Again | Fate::Failed => Some(Errno::IO),
            };
            if let Some(asked) = state.take(ticket) {
                if let Some(Operation::Rename { old, new, .. }) = asked.request().map(|asked| asked.operation)
                {
                    let (from, to) = (asked.places.node(), asked.places.other_node());
                    state.tables.nodes.perhaps_renamed((from, old.bytes()), (to, new.bytes()));
                }
                answers.push((ticket, asked, error));
            }
        }
        let waiting = state.waiting.len();
        if ready {
            let failed = answers.iter().filter(|(_, _, error)| error.is_some()).count();
            tracing::warn!(reason = %end, again = waiting, failed, "the kernel that performs files is gone");
        } else {
            tracing::debug!(reason = %end, "a file service is gone before it was used");
        }
        drop(state);
        self.changed.notify_all();
        for (ticket, asked, error) in answers {
            // A channel that is dropped tells the relay.
            if matches!(asked.from, From::Client { .. }) {
                self.answer(ticket, asked, error);
            }
        }
    }

    /// Asks something of the relay's own, and waits for the answer.
    pub(super) fn call(
        &self,
        life: u64,
        opcode: Opcode,
        node: u64,
        user: (u32, u32),
        body: &[u8],
    ) -> Result<Vec<u8>, CallError> {
        let (to, answer) = sync_channel(1);
        let header = InHeader {
            len: (IN_HEADER + body.len()) as u32,
            opcode: opcode as u32,
            nodeid: node,
            uid: user.0,
            gid: user.1,
            ..InHeader::default()
        };
        let mut state = lock(&self.state);
        let Some(link) = state.link.clone().filter(|_| state.tables.life() == life) else {
            return Err(CallError::Gone);
        };
        if state.asked.is_empty() {
            state.heard = Instant::now();
        }
        let header = InHeader { unique: state.next_ticket, ..header };
        let mut asked = Asked::own(From::Relay(to), opcode, [header.as_bytes(), body].concat(), false);
        asked.life = Some(life);
        let (frame, sent) = (asked.frame.clone(), asked.sent.clone());
        let ticket = state.keep(asked);
        drop(state);
        if link.send(&frame, Some(&sent)).is_ok() {
            match answer.recv_timeout(CALL_LIMIT) {
                Ok(Ok(body)) => return Ok(body),
                Ok(Err(error)) => return Err(CallError::Errno(error)),
                // It is dropped, as one that is gone.
                Err(_) => link.end(),
            }
        }
        lock(&self.state).take(ticket);
        Err(CallError::Gone)
    }

    /// One structure of that kind is the answer, or the performer lies and is dropped.
    pub(super) fn exact<T: FromBytes>(&self, body: &[u8]) -> Result<T, CallError> {
        T::read_from_bytes(body).map_err(|_| {
            let link = lock(&self.state).link.clone();
            if let Some(link) = link {
                tracing::warn!("the file service lies: an answer of the wrong length");
                link.end();
            }
            CallError::Gone
        })
    }

    /// Asks whether a performer that was asked something is there, and drops one that has not said anything for long.
    pub(super) fn listen(&self) {
        let mut state = lock(&self.state);
        let Some(link) = state.link.clone() else { return };
        if !state.asked.values().any(|asked| asked.life.is_some()) {
            return;
        }
        let quiet = state.heard.elapsed();
        if quiet > super::PATIENCE {
            drop(state);
            tracing::warn!(seconds = quiet.as_secs(), "the file service is silent: it is given up");
            return link.end();
        }
        if quiet > super::QUIET && state.pinged.is_none() {
            let ticket = state.next_ticket;
            state.next_ticket += 2;
            state.pinged = Some(ticket);
            drop(state);
            link.offer(crate::frames::bare_request(crate::frames::PING, ticket).as_bytes());
        }
    }

    /// Whether the performer's answer to `INIT` is one that the client can work with.
    pub(super) fn check_init(out: &abi::InitOut, offered: Features) -> Result<Features, String> {
        if out.major != abi::MAJOR || !(abi::OLDEST_MINOR..=abi::MINOR).contains(&out.minor) {
            return Err(format!("it speaks FUSE {}.{}", out.major, out.minor));
        }
        let features = Features::from_bits_retain(u64::from(out.flags) | u64::from(out.flags2) << 32);
        if !offered.contains(features) {
            return Err(format!("it wants what nobody offered ({:?})", features.difference(offered)));
        }
        if out.max_write < 4096 {
            return Err(format!("it takes writes of {} bytes", out.max_write));
        }
        Ok(features)
    }
}
