//! A client that says whatever a test wants.
#![allow(
    dead_code,
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

use kso_files::abi::{self, Features, InHeader, OutHeader};
use kso_files::relay::{Dial, Relay};
use kso_files::{Completer, Outcome, Performer, Pieces, Server, Service, Share};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};
use vm_memory::VolatileSlice;
use zerocopy::{FromBytes, Immutable, IntoBytes};

pub mod performers;

/// Late replies, for a test to look at.
#[derive(Debug, Default)]
pub struct Late {
    replies: Mutex<Vec<(u64, Vec<u8>)>>,
    changed: Condvar,
}

impl Completer for Late {
    fn reply(&self, ticket: u64, reply: &[u8]) {
        self.replies.lock().unwrap().push((ticket, reply.to_vec()));
        self.changed.notify_all();
    }
}

impl Late {
    /// The reply of this ticket, if it has come.
    pub fn get(&self, ticket: u64) -> Option<Vec<u8>> {
        let mut replies = self.replies.lock().unwrap();
        let at = replies.iter().position(|late| late.0 == ticket)?;
        Some(replies.swap_remove(at).1)
    }

    /// The same, when it has come.
    pub fn wait_reply(&self, ticket: u64) -> Vec<u8> {
        let until = Instant::now() + Duration::from_secs(120);
        while Instant::now() < until {
            if let Some(reply) = self.get(ticket) {
                return reply;
            }
            let replies = self.replies.lock().unwrap();
            drop(self.changed.wait_timeout(replies, Duration::from_millis(10)).unwrap());
        }
        panic!("no reply for {ticket}");
    }

    /// The error in it, or 0.
    pub fn wait(&self, ticket: u64) -> i32 {
        let reply = self.wait_reply(ticket);
        -OutHeader::read_from_prefix(&reply).unwrap().0.error
    }
}

pub struct Client {
    pub performer: Performer,
    pub server: Server,
    pub late: Arc<Late>,
    pub unique: u64,
    pub user: (u32, u32),
}

pub type Reply = Result<Vec<u8>, i32>;

/// All that Linux offers.
pub fn offers() -> u64 {
    Features::all().bits() & !Features::NO_OPEN_SUPPORT.bits() & !Features::NO_OPENDIR_SUPPORT.bits()
}

impl Client {
    /// Mounts a share. Runs in a thread of its own, because a worker takes its thread over.
    pub fn run(share: Share, test: impl FnOnce(Client) + Send + 'static) {
        let thread = std::thread::spawn(move || {
            let mut client = Self::unmounted(share);
            client.init(offers()).unwrap();
            test(client);
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    }

    pub fn unmounted(share: Share) -> Self {
        let late = Arc::new(Late::default());
        let performer = Performer::Local(Service::new(share, late.clone()).unwrap());
        Self::of(performer, late)
    }

    fn of(performer: Performer, late: Arc<Late>) -> Self {
        let server = performer.server().unwrap();
        Client { performer, server, late, unique: 1, user: (0, 0) }
    }

    /// One whose requests others perform. It has mounted.
    pub fn relayed(dial: Arc<dyn Dial>) -> Self {
        let late = Arc::new(Late::default());
        let mut client = Self::of(Performer::Relayed(Relay::new(dial, late.clone()).unwrap()), late);
        client.init(offers()).unwrap();
        client
    }

    pub fn init(&mut self, offered: u64) -> Reply {
        let init = abi::InitIn { major: 7, minor: 40, max_readahead: 0, flags: offered as u32 };
        let more = (offered >> 32) as u32;
        self.ask(abi::Opcode::Init, 0, &[init.as_bytes(), more.as_bytes(), &[0; 44]].concat())
    }

    /// Sends bytes, and returns what came.
    pub fn raw(&mut self, request: &mut [u8], room: usize) -> (Outcome, Vec<u8>) {
        // Scattered, as a guest's memory is.
        let middle = request.len() / 3;
        let (front, back) = request.split_at_mut(middle);
        let readable = [VolatileSlice::from(front), VolatileSlice::from(back)];
        let mut reply = vec![0xaa; room];
        let outcome = {
            let (front, back) = reply.split_at_mut(room / 2);
            let writable = [VolatileSlice::from(front), VolatileSlice::from(back)];
            self.server.serve(Pieces::new(&readable), Pieces::new(&writable))
        };
        if let Outcome::Reply(length) = outcome {
            reply.truncate(length);
        }
        (outcome, reply)
    }

    pub fn ask(&mut self, opcode: abi::Opcode, node: u64, body: &[u8]) -> Reply {
        let (outcome, reply) = self.begin(opcode, node, body);
        self.end(outcome, reply)
    }

    /// The answer, as soon as it is there.
    pub fn end(&self, outcome: Outcome, reply: Vec<u8>) -> Reply {
        let reply = match outcome {
            Outcome::Reply(_) => reply,
            Outcome::Later(ticket) => self.late.wait_reply(ticket),
            Outcome::Silent => return Err(0),
        };
        let (header, data) = OutHeader::read_from_prefix(&reply).unwrap();
        assert_eq!(header.len as usize, reply.len());
        match header.error {
            0 => Ok(data.to_vec()),
            error => {
                assert!(data.is_empty() && error < 0);
                Err(-error)
            }
        }
    }

    /// Asks, and does not wait.
    pub fn begin(&mut self, opcode: abi::Opcode, node: u64, body: &[u8]) -> (Outcome, Vec<u8>) {
        self.unique += 2;
        let header = InHeader {
            len: (abi::IN_HEADER + body.len()) as u32,
            opcode: opcode as u32,
            unique: self.unique,
            nodeid: node,
            uid: self.user.0,
            gid: self.user.1,
            pid: 1,
            total_extlen: 0,
            padding: 0,
        };
        let mut request = [header.as_bytes(), body].concat();
        self.raw(&mut request, (1 << 20) + 4096)
    }

    pub fn get<T: FromBytes>(&mut self, opcode: abi::Opcode, node: u64, body: &[u8]) -> Result<T, i32> {
        Ok(T::read_from_prefix(&self.ask(opcode, node, body)?).unwrap().0)
    }

    pub fn lookup(&mut self, parent: u64, name: &str) -> Result<abi::EntryOut, i32> {
        self.get(abi::Opcode::Lookup, parent, &text(name))
    }

    /// As `lookup`, where no entry is told as an entry of no node.
    pub fn find(&mut self, parent: u64, name: &str) -> Result<u64, i32> {
        match self.lookup(parent, name)?.nodeid {
            0 => Err(libc_noent()),
            node => Ok(node),
        }
    }

    pub fn open(&mut self, node: u64, flags: u32) -> Result<u64, i32> {
        let open = abi::OpenIn { flags, open_flags: 0 };
        Ok(self.get::<abi::OpenOut>(abi::Opcode::Open, node, open.as_bytes())?.fh)
    }

    pub fn open_directory(&mut self, node: u64) -> Result<u64, i32> {
        let open = abi::OpenIn::default();
        Ok(self.get::<abi::OpenOut>(abi::Opcode::OpenDir, node, open.as_bytes())?.fh)
    }

    pub fn create(&mut self, parent: u64, name: &str, flags: u32, mode: u32) -> Result<(u64, u64), i32> {
        let create = abi::CreateIn { flags, mode, umask: 0, open_flags: 0 };
        let body = [create.as_bytes(), &text(name)].concat();
        let reply = self.ask(abi::Opcode::Create, parent, &body)?;
        let (entry, rest) = abi::EntryOut::read_from_prefix(&reply).unwrap();
        let (open, _) = abi::OpenOut::read_from_prefix(rest).unwrap();
        Ok((entry.nodeid, open.fh))
    }

    pub fn read(&mut self, node: u64, fh: u64, offset: u64, size: u32) -> Reply {
        let read = abi::ReadIn { fh, offset, size, ..abi::ReadIn::default() };
        self.ask(abi::Opcode::Read, node, read.as_bytes())
    }

    pub fn write(&mut self, node: u64, fh: u64, offset: u64, data: &[u8]) -> Result<u32, i32> {
        let write = abi::WriteIn { fh, offset, size: data.len() as u32, ..abi::WriteIn::default() };
        let body = [write.as_bytes(), data].concat();
        Ok(self.get::<abi::WriteOut>(abi::Opcode::Write, node, &body)?.size)
    }

    /// Names in a directory, but for the dots.
    pub fn list(&mut self, node: u64) -> Result<Vec<String>, i32> {
        let fh = self.open_directory(node)?;
        let mut names = Vec::new();
        let mut offset = 0;
        loop {
            let read = abi::ReadIn { fh, offset, size: 512, ..abi::ReadIn::default() };
            let reply = self.ask(abi::Opcode::ReadDir, node, read.as_bytes())?;
            let mut rest = reply.as_slice();
            if rest.is_empty() {
                break;
            }
            while !rest.is_empty() {
                let (dirent, tail) = abi::Dirent::read_from_prefix(rest).unwrap();
                let name = std::str::from_utf8(&tail[..dirent.namelen as usize]).unwrap();
                if name != "." && name != ".." {
                    names.push(name.to_owned());
                }
                offset = dirent.off;
                rest = &rest[(24 + dirent.namelen as usize).next_multiple_of(8)..];
            }
        }
        names.sort();
        Ok(names)
    }

    pub fn forget(&mut self, node: u64, count: u64) {
        let reply = self.ask(abi::Opcode::Forget, node, &count.to_ne_bytes());
        assert_eq!(reply, Err(0));
    }

    pub fn struct_and_name<T: IntoBytes + Immutable>(
        &mut self,
        opcode: abi::Opcode,
        node: u64,
        head: &T,
        name: &str,
    ) -> Reply {
        self.ask(opcode, node, &[head.as_bytes(), &text(name)].concat())
    }
}

pub fn text(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}

fn libc_noent() -> i32 {
    rustix::io::Errno::NOENT.raw_os_error()
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
