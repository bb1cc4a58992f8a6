//! Asking the host's name servers.
//!
//! ```text
//!   ask -- UDP -- answer ------------------------------------------> done
//!              -- truncated -- TCP to the same server -- answer ---> done
//!              -- error code, ICMP error, no answer in time -- next server -- ... -- SERVFAIL
//! ```
//!
//! Each query has a socket of its own, connected to its server, so a port of the kernel's choice, and an ID of
//! its own: whoever cannot see the query cannot forge its answer (RFC 5452). An answer counts only if its ID
//! and its question, letter for letter, are those of the query. Nothing waits: the broker's loop calls.

use super::conf::ResolvConf;
use hickory_proto::op::Message;
use kso_wire::{MAX_DNS, RequestId};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// At most so many queries are under way; one more is answered with SERVFAIL.
const MAX_QUERIES: usize = 256;
/// A query ends after this time, whatever happens: programs give up on theirs (resolv.conf(5), 5 s twice).
const GIVE_UP: Duration = Duration::from_secs(10);
/// How long one try takes at most if there are other servers.
const PATIENCE_OF_MANY: Duration = Duration::from_secs(2);
/// And if there is one: a datagram that got lost is sent again before the program asks again.
const PATIENCE_OF_ONE: Duration = Duration::from_secs(3);
/// Response codes after which another server is asked: SERVFAIL, NOTIMP, REFUSED.
const NEXT_SERVER: [u8; 3] = [2, 4, 5];

/// Who asked.
pub(crate) type Asker = (u64, RequestId);

/// A query that ended.
#[derive(Debug)]
pub(crate) struct Done {
    pub asker: Asker,
    /// The answer with the ID of the query; `None`: no server gave one.
    pub answer: Option<Vec<u8>>,
    /// The query.
    pub query: Vec<u8>,
    /// How long it took.
    pub took: Duration,
}

#[derive(Debug)]
enum Leg {
    Udp(OwnedFd),
    Tcp { socket: OwnedFd, sent: usize, read: Vec<u8> },
}

#[derive(Debug)]
struct Job {
    asker: Asker,
    /// As it came, with its own ID.
    query: Vec<u8>,
    /// The ID on the way.
    id: [u8; 2],
    tries: usize,
    leg: Option<Leg>,
    server: usize,
    deadline: Instant,
    started: Instant,
    /// An error code from a server: better than none.
    second_best: Option<Vec<u8>>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Forwarder {
    jobs: Vec<Option<Job>>,
    busy: usize,
    conf: ResolvConf,
    /// The server that answered last is asked first.
    preferred: usize,
    /// Marks the events of this forwarder in the loop.
    token: u64,
    buffer: Vec<u8>,
}

impl Forwarder {
    pub fn new(conf: ResolvConf, token: u64) -> Self {
        Self { jobs: Vec::new(), busy: 0, conf, preferred: 0, token, buffer: Vec::new() }
    }

    /// The servers changed. Queries under way go on.
    pub fn configure(&mut self, conf: ResolvConf) {
        if conf != self.conf {
            self.conf = conf;
            self.preferred = 0;
        }
    }

    /// Asks. What ends at once is told at once.
    pub fn ask(&mut self, epoll: BorrowedFd<'_>, asker: Asker, query: Vec<u8>, now: Instant) -> Option<Done> {
        let job = Job {
            asker,
            query,
            id: Message::query().metadata.id.to_be_bytes(),
            tries: 0,
            leg: None,
            server: self.preferred,
            deadline: now,
            started: now,
            second_best: None,
        };
        if self.busy >= MAX_QUERIES || job.query.len() < 12 || job.query.len() > MAX_DNS {
            return Some(job.finish(None, now));
        }
        let slot = match self.jobs.iter().position(Option::is_none) {
            Some(slot) => slot,
            None => {
                self.jobs.push(None);
                self.jobs.len() - 1
            }
        };
        self.busy += 1;
        self.advance(epoll, slot, job, now)
    }

    /// The answer is no longer wanted.
    pub fn forget(&mut self, asker: Asker) {
        self.forget_if(|found| found == asker);
    }

    /// Nor is any of this session's.
    pub fn forget_session(&mut self, session: u64) {
        self.forget_if(|(found, _)| found == session);
    }

    fn forget_if(&mut self, matches: impl Fn(Asker) -> bool) {
        for slot in &mut self.jobs {
            if slot.as_ref().is_some_and(|job| matches(job.asker)) {
                *slot = None;
                self.busy -= 1;
            }
        }
    }

    pub fn next_deadline(&self) -> Option<Instant> {
        if self.busy == 0 {
            return None;
        }
        self.jobs.iter().flatten().map(|job| job.deadline).min()
    }

    /// Goes on with those whose time is up.
    pub fn expire(&mut self, epoll: BorrowedFd<'_>, now: Instant, done: &mut Vec<Done>) {
        if self.busy == 0 {
            return;
        }
        for slot in 0..self.jobs.len() {
            if let Some(job) = self.jobs.get_mut(slot).and_then(|job| job.take_if(|job| job.deadline <= now))
            {
                done.extend(self.advance(epoll, slot, job, now));
            }
        }
    }

    /// Something happened to the socket of a query.
    pub fn ready(&mut self, epoll: BorrowedFd<'_>, slot: usize, now: Instant) -> Option<Done> {
        let mut job = self.jobs.get_mut(slot)?.take()?;
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(MAX_DNS + 1, 0);
        let result = job.read(&mut buffer);
        // 64 KiB are held only while something is read.
        drop(buffer);
        match result {
            Progress::Wait => {
                if let Some(place) = self.jobs.get_mut(slot) {
                    *place = Some(job);
                }
                None
            }
            Progress::Answer(answer) => {
                let code = answer.get(3).map_or(0, |flags| flags & 0x0f);
                if NEXT_SERVER.contains(&code) {
                    job.second_best = Some(answer);
                    return self.advance(epoll, slot, job, now);
                }
                self.preferred = job.server;
                self.busy -= 1;
                Some(job.finish(Some(answer), now))
            }
            Progress::Truncated(answer) => {
                job.second_best = Some(answer);
                self.connect_tcp(epoll, slot, job, now)
            }
            Progress::Failed => self.advance(epoll, slot, job, now),
        }
    }

    /// The next try, or the end.
    fn advance(&mut self, epoll: BorrowedFd<'_>, slot: usize, mut job: Job, now: Instant) -> Option<Done> {
        job.leg = None;
        let servers = self.conf.servers.len().max(1);
        loop {
            // A server that gave an error code is not asked again.
            let most = if job.second_best.is_some() { servers } else { servers * self.conf.attempts };
            if job.tries >= most || now.duration_since(job.started) >= GIVE_UP {
                self.busy -= 1;
                let answer = job.second_best.take();
                return Some(job.finish(answer, now));
            }
            job.server = (self.preferred + job.tries) % servers;
            job.tries += 1;
            if self.conf.use_tcp {
                return self.connect_tcp(epoll, slot, job, now);
            }
            if let Some(server) = self.conf.servers.get(job.server)
                && let Ok(socket) = job.send_datagram(*server)
                && self.watch(epoll, &socket, slot, EventFlags::IN).is_ok()
            {
                job.leg = Some(Leg::Udp(socket));
                job.deadline = self.patience(&job, now);
                self.put(slot, job);
                return None;
            }
        }
    }

    fn connect_tcp(
        &mut self,
        epoll: BorrowedFd<'_>,
        slot: usize,
        mut job: Job,
        now: Instant,
    ) -> Option<Done> {
        job.leg = None;
        if let Some(server) = self.conf.servers.get(job.server)
            && let Ok(socket) = connect(*server, SocketType::STREAM)
            && self.watch(epoll, &socket, slot, EventFlags::IN | EventFlags::OUT | EventFlags::ET).is_ok()
        {
            job.leg = Some(Leg::Tcp { socket, sent: 0, read: Vec::new() });
            job.deadline = self.patience(&job, now);
            self.put(slot, job);
            return None;
        }
        self.advance(epoll, slot, job, now)
    }

    fn put(&mut self, slot: usize, job: Job) {
        if let Some(place) = self.jobs.get_mut(slot) {
            *place = Some(job);
        }
    }

    fn patience(&self, job: &Job, now: Instant) -> Instant {
        let most = if self.conf.servers.len() > 1 { PATIENCE_OF_MANY } else { PATIENCE_OF_ONE };
        (now + self.conf.timeout.min(most)).min(job.started + GIVE_UP)
    }

    fn watch(
        &self,
        epoll: BorrowedFd<'_>,
        socket: &OwnedFd,
        slot: usize,
        flags: EventFlags,
    ) -> Result<(), ()> {
        let data = EventData::new_u64(self.token | u64::try_from(slot).unwrap_or(u64::MAX));
        epoll::add(epoll, socket, data, flags).map_err(|_| ())
    }
}

enum Progress {
    Wait,
    Answer(Vec<u8>),
    Truncated(Vec<u8>),
    Failed,
}

fn connect(server: SocketAddr, kind: SocketType) -> rustix::io::Result<OwnedFd> {
    let family = if server.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, kind, flags, None)?;
    match rustix::net::connect(&socket, &server) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error),
    }
}

impl Job {
    /// The query with the ID of the way.
    fn on_the_way(&self) -> Vec<u8> {
        let mut bytes = self.query.clone();
        if let Some(id) = bytes.first_chunk_mut::<2>() {
            *id = self.id;
        }
        bytes
    }

    fn send_datagram(&self, server: SocketAddr) -> rustix::io::Result<OwnedFd> {
        let socket = connect(server, SocketType::DGRAM)?;
        rustix::net::send(&socket, &self.on_the_way(), SendFlags::empty())?;
        Ok(socket)
    }

    fn finish(mut self, answer: Option<Vec<u8>>, now: Instant) -> Done {
        let own = self.query.first_chunk::<2>().copied().unwrap_or_default();
        let answer = answer.map(|mut answer| {
            if let Some(id) = answer.first_chunk_mut::<2>() {
                *id = own;
            }
            answer
        });
        self.leg = None;
        Done { asker: self.asker, answer, query: self.query, took: now.duration_since(self.started) }
    }

    fn read(&mut self, buffer: &mut [u8]) -> Progress {
        match self.leg.take() {
            Some(Leg::Udp(socket)) => {
                let progress = self.read_datagrams(&socket, buffer);
                self.leg = Some(Leg::Udp(socket));
                progress
            }
            Some(Leg::Tcp { socket, mut sent, mut read }) => {
                let progress = self.stream(&socket, &mut sent, &mut read, buffer);
                self.leg = Some(Leg::Tcp { socket, sent, read });
                progress.unwrap_or(Progress::Failed)
            }
            None => Progress::Failed,
        }
    }

    fn read_datagrams(&self, socket: &OwnedFd, buffer: &mut [u8]) -> Progress {
        loop {
            match rustix::net::recv(socket, &mut *buffer, RecvFlags::empty()) {
                Ok((length, _)) => {
                    let message = buffer.get(..length).unwrap_or_default();
                    // What does not match is not for us, or forged: the right one may still come.
                    if self.is_answered_by(message) {
                        let truncated = message.get(2).is_some_and(|flags| flags & 0x02 != 0);
                        let answer = message.to_vec();
                        return if truncated {
                            Progress::Truncated(answer)
                        } else {
                            Progress::Answer(answer)
                        };
                    }
                }
                Err(rustix::io::Errno::AGAIN) => return Progress::Wait,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return Progress::Failed,
            }
        }
    }

    /// Writes what is left of the query and reads what is there of the answer (RFC 1035, 4.2.2).
    fn stream(
        &self,
        socket: &OwnedFd,
        sent: &mut usize,
        read: &mut Vec<u8>,
        buffer: &mut [u8],
    ) -> Result<Progress, rustix::io::Errno> {
        let query = self.on_the_way();
        let mut framed = u16::try_from(query.len()).unwrap_or(u16::MAX).to_be_bytes().to_vec();
        framed.extend(query);
        while let Some(rest) = framed.get(*sent..).filter(|rest| !rest.is_empty()) {
            match rustix::net::send(socket, rest, SendFlags::NOSIGNAL) {
                Ok(count) => *sent += count,
                Err(rustix::io::Errno::AGAIN) => return Ok(Progress::Wait),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        loop {
            match rustix::net::recv(socket, &mut *buffer, RecvFlags::empty()) {
                Ok((0, _)) => return Ok(Progress::Failed),
                Ok((count, _)) => read.extend_from_slice(buffer.get(..count).unwrap_or_default()),
                Err(rustix::io::Errno::AGAIN) => return Ok(Progress::Wait),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error),
            }
            if let Some((length, rest)) = read.split_first_chunk::<2>()
                && let Some(message) = rest.get(..usize::from(u16::from_be_bytes(*length)))
            {
                let good = self.is_answered_by(message);
                return Ok(if good { Progress::Answer(message.to_vec()) } else { Progress::Failed });
            }
        }
    }

    /// Whether the ID and the question of `message` are the query's.
    fn is_answered_by(&self, message: &[u8]) -> bool {
        let Some(question) = question_of(&self.query) else { return false };
        let answer = message.get(2).is_some_and(|flags| flags & 0x80 != 0);
        // Some servers leave the question out of an error.
        let bare =
            message.get(4..6) == Some(&[0, 0]) && message.get(3).is_some_and(|flags| flags & 0x0f != 0);
        message.first_chunk::<2>() == Some(&self.id)
            && answer
            && (bare
                || message.get(4..6) == Some(&[0, 1])
                    && message.get(12..12 + question.len()) == Some(question))
    }
}

/// The bytes of the first question: labels, type, class.
fn question_of(message: &[u8]) -> Option<&[u8]> {
    let mut at = 12;
    loop {
        match usize::from(*message.get(at)?) {
            0 => return message.get(12..at + 5),
            length @ 1..=63 => at += length + 1,
            // A question that begins a message has nothing to point to.
            _ => return None,
        }
    }
}
