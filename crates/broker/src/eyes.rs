//! Who watches, and what they are told.
//!
//! Events are made only while somebody watches: [`Eyes::open`] is what every request asks first. A client that
//! reads too slowly loses events, and is told how many when it reads again; nothing waits for it.

use kso_core::event::{Event, Kind};
use kso_wire::Caller;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::net::{RecvFlags, SendFlags};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::io::{self, IsTerminal, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::SystemTime;

/// Most clients at one time.
const MAX_CLIENTS: usize = 64;
/// Most bytes that wait for a client.
const MAX_WAITING: usize = 256 * 1024;
/// Longest question of a client, bytes.
const MAX_QUESTION: usize = 4096;

/// What a client of the control socket asks: one JSON line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case")]
pub enum Question {
    /// What runs.
    Ps,
    /// Tell events as they happen.
    Trace {
        /// Of this session alone: its number or its name.
        session: Option<String>,
    },
}

/// What a client is told between events: one JSON line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lost {
    /// So many events were not told, because they were not read in time.
    pub lost: u64,
}

#[derive(Debug)]
struct Client {
    socket: OwnedFd,
    asked: Vec<u8>,
    waiting: Vec<u8>,
    lost: u64,
    /// `Some`: it is told events, of one session or of all.
    tracing: Option<Option<String>>,
    gone: bool,
}

impl Client {
    fn push(&mut self, line: &[u8]) {
        if self.waiting.len() + line.len() > MAX_WAITING {
            self.lost += 1;
            return;
        }
        if self.lost > 0 {
            let lost = std::mem::take(&mut self.lost);
            self.waiting.extend_from_slice(&line_of(&Lost { lost }));
        }
        self.waiting.extend_from_slice(line);
        self.flush();
    }

    fn flush(&mut self) {
        while !self.waiting.is_empty() && !self.gone {
            match rustix::net::send(&self.socket, &self.waiting, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(count) => {
                    self.waiting.drain(..count);
                }
                Err(rustix::io::Errno::AGAIN) => return,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => self.gone = true,
            }
        }
        self.waiting.shrink_to(MAX_QUESTION);
    }

    /// The next question, if it is there.
    fn read(&mut self) -> Option<Result<Question, serde_json::Error>> {
        let mut buffer = [0; MAX_QUESTION];
        loop {
            match rustix::net::recv(&self.socket, &mut buffer[..], RecvFlags::DONTWAIT) {
                Ok((0, _)) => self.gone = true,
                Ok((count, _)) => {
                    self.asked.extend_from_slice(buffer.get(..count).unwrap_or_default());
                    self.gone |= self.asked.len() > MAX_QUESTION;
                }
                Err(rustix::io::Errno::AGAIN) => break,
                Err(rustix::io::Errno::INTR) => continue,
                Err(_) => self.gone = true,
            }
            if self.gone {
                break;
            }
        }
        let end = self.asked.iter().position(|&byte| byte == b'\n')?;
        let line: Vec<u8> = self.asked.drain(..=end).collect();
        Some(serde_json::from_slice(&line))
    }
}

fn line_of(value: &impl Serialize) -> Vec<u8> {
    let mut line = serde_json::to_vec(value).unwrap_or_default();
    line.push(b'\n');
    line
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Eyes {
    /// Events are printed on standard error, with colour on a terminal.
    print: Option<bool>,
    /// Bytes are counted for metrics.
    metrics: bool,
    clients: HashMap<u32, Client>,
    next: u32,
    /// Some client traces.
    traced: bool,
    token: u64,
}

impl Eyes {
    pub fn new(print: bool, metrics: bool, token: u64) -> Self {
        let print = print.then(|| io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none());
        Self { print, metrics, clients: HashMap::new(), next: 0, traced: false, token }
    }

    /// Whether anybody watches.
    pub fn open(&self) -> bool {
        self.traced || self.metrics || self.print.is_some()
    }

    /// Whether anybody is told of each event.
    pub fn tells(&self) -> bool {
        self.traced || self.print.is_some()
    }

    /// Tells those who watch.
    pub fn see(&mut self, session: u64, name: &str, caller: &Caller, kind: Kind) {
        if !self.tells() {
            return;
        }
        let event = Event {
            time: SystemTime::now().into(),
            session,
            pid: caller.pid,
            program: caller.program.clone(),
            kind,
        };
        if let Some(colour) = self.print {
            let _ = writeln!(io::stderr(), "{}", event_line(&event, colour));
        }
        if self.traced {
            let line = line_of(&event);
            let number = session.to_string();
            for client in self.clients.values_mut() {
                match &client.tracing {
                    Some(Some(only)) if *only != number && only != name => {}
                    Some(_) => client.push(&line),
                    None => {}
                }
            }
        }
    }

    /// A new client.
    pub fn add(&mut self, epoll: BorrowedFd<'_>, socket: OwnedFd) {
        if self.clients.len() >= MAX_CLIENTS {
            return;
        }
        self.next = self.next.wrapping_add(1);
        // Edge-triggered: told once when it can be written again, and never in between.
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        if epoll::add(epoll, &socket, EventData::new_u64(self.token | u64::from(self.next)), flags).is_ok() {
            let client = Client {
                socket,
                asked: Vec::new(),
                waiting: Vec::new(),
                lost: 0,
                tracing: None,
                gone: false,
            };
            self.clients.insert(self.next, client);
        }
    }

    /// A client can be read or written. True: it asks for what [`crate::report`] makes.
    pub fn ready(&mut self, key: u32) -> bool {
        let Some(client) = self.clients.get_mut(&key) else { return false };
        client.flush();
        let mut ps = false;
        match client.read() {
            Some(Ok(Question::Ps)) => ps = true,
            Some(Ok(Question::Trace { session })) => client.tracing = Some(session),
            Some(Err(error)) => {
                tracing::debug!(%error, "a client asked what is not understood");
                client.gone = true;
            }
            None => {}
        }
        if client.gone {
            self.clients.remove(&key);
        }
        self.traced = self.clients.values().any(|client| client.tracing.is_some());
        ps && self.clients.contains_key(&key)
    }

    /// Tells one client.
    pub fn tell(&mut self, key: u32, value: &impl Serialize) {
        if let Some(client) = self.clients.get_mut(&key) {
            client.push(&line_of(value));
        }
    }
}

/// An event for a person: denials and errors stand out.
#[must_use]
pub fn event_line(event: &Event, colour: bool) -> String {
    let style = match &event.kind {
        _ if !colour => "",
        Kind::Denied(_) => "\x1b[31m",
        Kind::Connect(kso_core::event::Connect { error: Some(_), .. })
        | Kind::Listen(kso_core::event::Listen { error: Some(_), .. })
        | Kind::Closed(kso_core::event::Closed { error: Some(_), .. }) => "\x1b[33m",
        Kind::SessionStart(_) | Kind::SessionEnd(_) => "\x1b[1m",
        Kind::Closed(_) => "\x1b[2m",
        _ => "",
    };
    if style.is_empty() { event.to_string() } else { format!("{style}{event}\x1b[0m") }
}
