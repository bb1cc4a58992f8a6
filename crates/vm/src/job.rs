//! The launcher's side of [`kso_wire::job`].
//!
//! ```text
//!   [waiting] -- Ready: Start is sent --> [starting] -- Started --> [running] -- Ended --> [over]
//!       |                                     |  Failed                 |
//!       +---- the guest goes away ------------+-------------------------+-----> Lost: [over]
//! ```

use kso_wire::VERSION;
use kso_wire::frame::{self, Frames};
use kso_wire::job::{Ended, Start, ToInit, ToLauncher, WindowSize};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{SystemTime, UNIX_EPOCH};

/// So much waits to be sent at most, bytes: beyond what Start takes, a guest that does not listen misses signals.
const MAX_WAITING: usize = frame::MAX_FRAME + (64 << 10);
/// So much is read at a time, bytes.
const CHUNK: usize = 4096;

/// What is heard of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobEvent {
    /// Init runs, and has been told what to start.
    Ready {
        /// The guest kernel's release.
        kernel: String,
    },
    /// The program runs.
    Started,
    /// It could not be run.
    Failed {
        /// For a person.
        reason: String,
        /// Exit status.
        status: u8,
    },
    /// It ended.
    Ended(Ended),
    /// The guest broke off, or does not speak as it should.
    Lost(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Waiting,
    Starting,
    Running,
    Over,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Job {
    socket: OwnedFd,
    events: OwnedFd,
    frames: Frames,
    /// Until it is sent.
    start: Option<Box<Start>>,
    waiting: Vec<u8>,
    watches_output: bool,
    state: State,
}

impl Job {
    /// A job, and the socket that is to be joined to the guest's stream to [`kso_wire::guest::ports::JOB`].
    ///
    /// # Errors
    /// Command line and environment are too long together; no descriptors are left.
    pub fn new(start: Start) -> io::Result<(Self, OwnedFd)> {
        // Encoded once for its length: it is told at once if it is too long.
        let start = ToInit::Start(Box::new(start));
        frame::append(&start, &mut Vec::new()).map_err(|error| {
            io::Error::other(format!(
                "the command line and the environment are too long for a guest: {error}"
            ))
        })?;
        let ToInit::Start(start) = start else { return Err(io::ErrorKind::InvalidInput.into()) };
        let (socket, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&events, &socket, EventData::new_u64(0), EventFlags::IN)?;
        let job = Self {
            socket,
            events,
            frames: Frames::default(),
            start: Some(start),
            waiting: Vec::new(),
            watches_output: false,
            state: State::Waiting,
        };
        Ok((job, theirs))
    }

    /// Readable when [`Self::run_ready`] has something to do.
    #[must_use]
    pub fn poll_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    /// The program runs, or did.
    #[must_use]
    pub fn has_started(&self) -> bool {
        matches!(self.state, State::Running | State::Over)
    }

    /// Sends the program a signal (Linux's number), or its whole process group, as a key of a terminal does.
    pub fn signal(&mut self, number: u8, group: bool) {
        self.tell(&ToInit::Signal { number, group });
    }

    /// The terminal has another size.
    pub fn resize(&mut self, size: WindowSize) {
        self.tell(&ToInit::Resize(size));
    }

    /// Sends and receives what it can.
    pub fn run_ready(&mut self) -> Vec<JobEvent> {
        let mut heard = Vec::new();
        if let Err(reason) = self.receive(&mut heard).and_then(|()| self.send()) {
            self.lost(reason, &mut heard);
        }
        heard
    }

    fn tell(&mut self, message: &ToInit) {
        let room = MAX_WAITING.saturating_sub(self.waiting.len());
        if self.state == State::Running && room > 0 && frame::append(message, &mut self.waiting).is_ok() {
            // A broken stream is found when it is read.
            let _ = self.send();
        }
    }

    fn receive(&mut self, heard: &mut Vec<JobEvent>) -> Result<(), String> {
        let mut chunk = [0; CHUNK];
        while self.state != State::Over {
            match recv(&self.socket, &mut chunk, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err("the guest broke off".into()),
                Ok((count, _)) => {
                    self.frames.push(chunk.get(..count).unwrap_or_default());
                    while let Some(message) = self.frames.next_message().map_err(|error| error.to_string())? {
                        self.handle(message, heard)?;
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(format!("the guest broke off: {error}")),
            }
        }
        Ok(())
    }

    fn handle(&mut self, message: ToLauncher, heard: &mut Vec<JobEvent>) -> Result<(), String> {
        let (state, event) = match (self.state, message) {
            (State::Waiting, ToLauncher::Ready { version, .. }) if version != VERSION => {
                return Err(format!("the guest speaks version {version} of kso's protocol, not {VERSION}"));
            }
            (State::Waiting, ToLauncher::Ready { kernel, .. }) => {
                if let Some(mut start) = self.start.take() {
                    // The guest's clock is set by it.
                    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                    start.time = (now.as_secs().cast_signed(), now.subsec_nanos());
                    frame::append(&ToInit::Start(start), &mut self.waiting)
                        .map_err(|error| error.to_string())?;
                }
                (State::Starting, JobEvent::Ready { kernel })
            }
            (State::Starting, ToLauncher::Started) => (State::Running, JobEvent::Started),
            (State::Starting, ToLauncher::Failed { reason, status }) => {
                (State::Over, JobEvent::Failed { reason, status })
            }
            (State::Running, ToLauncher::Ended(ended)) => (State::Over, JobEvent::Ended(ended)),
            (state, message) => return Err(format!("the guest said {message:?} while {state:?}")),
        };
        self.state = state;
        heard.push(event);
        Ok(())
    }

    fn send(&mut self) -> Result<(), String> {
        while !self.waiting.is_empty() {
            match send(&self.socket, &self.waiting, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => drop(self.waiting.drain(..count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(format!("the guest broke off: {error}")),
            }
        }
        let wanted = !self.waiting.is_empty();
        if wanted != self.watches_output {
            let flags = if wanted { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
            epoll::modify(&self.events, &self.socket, EventData::new_u64(0), flags)
                .map_err(|e| e.to_string())?;
            self.watches_output = wanted;
        }
        Ok(())
    }

    fn lost(&mut self, reason: String, heard: &mut Vec<JobEvent>) {
        if self.state != State::Over {
            heard.push(JobEvent::Lost(reason));
        }
        self.state = State::Over;
        // Its end would be told again and again.
        let _ = epoll::delete(&self.events, &self.socket);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]
pub(crate) mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    pub(crate) fn start(words: usize) -> Start {
        Start {
            command: vec![b"echo".to_vec(); words],
            environment: vec![(b"A".to_vec(), vec![0xff, b'=']); 2],
            directory: b"/".to_vec(),
            user: 0,
            group: 0,
            groups: vec![],
            terminal: None,
            error_apart: false,
            hostname: "kso".into(),
            mounts: vec![],
            resolv_conf: vec![],
            tun: kso_wire::TunAddresses::standard(),
            publish: vec![],
            loopback: kso_wire::LoopbackMode::Private,
            inside: vec![],
            io_uring: false,
            open_files: (1, 2),
            time: (3, 4),
            log: "warn".into(),
        }
    }

    pub(crate) fn say(guest: &mut UnixStream, message: &ToLauncher) {
        let mut bytes = Vec::new();
        frame::append(message, &mut bytes).unwrap();
        guest.write_all(&bytes).unwrap();
    }

    pub(crate) fn ready() -> ToLauncher {
        ToLauncher::Ready { version: VERSION, kernel: "6.1".into() }
    }

    #[test]
    fn a_job_goes_its_way_whatever_its_size() {
        let (mut job, socket) = Job::new(start(60_000)).unwrap();
        let mut guest = UnixStream::from(socket);
        job.signal(15, false);
        say(&mut guest, &ready());
        assert_eq!(job.run_ready(), [JobEvent::Ready { kernel: "6.1".into() }]);
        guest.set_nonblocking(true).unwrap();
        let (mut frames, mut chunk) = (Frames::default(), vec![0; 65536]);
        let received = loop {
            if let Ok(count) = guest.read(&mut chunk) {
                frames.push(&chunk[..count]);
            }
            match frames.next_message::<ToInit>().unwrap() {
                Some(message) => break message,
                None => assert_eq!(job.run_ready(), []),
            }
        };
        let ToInit::Start(received) = received else { panic!("{received:?}") };
        assert!(received.time.0 > 1_700_000_000, "the time is that of sending");
        assert_eq!(Start { time: (3, 4), ..*received }, start(60_000));
        assert_eq!(frames.next_message::<ToInit>().unwrap(), None, "no signal before it runs");
        say(&mut guest, &ToLauncher::Started);
        assert_eq!(job.run_ready(), [JobEvent::Started]);
        job.resize(WindowSize { rows: 5, columns: 6 });
        let count = guest.read(&mut chunk).unwrap();
        frames.push(&chunk[..count]);
        let resize = ToInit::Resize(WindowSize { rows: 5, columns: 6 });
        assert_eq!(frames.next_message::<ToInit>().unwrap(), Some(resize));
        say(&mut guest, &ToLauncher::Ended(Ended::Killed(9)));
        drop(guest);
        assert_eq!(
            job.run_ready(),
            [JobEvent::Ended(Ended::Killed(9))],
            "what comes after the end is nothing"
        );
    }

    #[test]
    fn a_guest_that_breaks_off_or_babbles_is_lost_once() {
        let (mut job, socket) = Job::new(start(1)).unwrap();
        drop(socket);
        assert!(matches!(job.run_ready().as_slice(), [JobEvent::Lost(_)]));
        assert_eq!(job.run_ready(), []);

        for babble in [ToLauncher::Started, ToLauncher::Ended(Ended::Exited(0))] {
            let (mut job, socket) = Job::new(start(1)).unwrap();
            say(&mut UnixStream::from(socket), &babble);
            assert!(matches!(job.run_ready().as_slice(), [JobEvent::Lost(_)]));
        }
        let (mut job, socket) = Job::new(start(1)).unwrap();
        let mut guest = UnixStream::from(socket);
        say(&mut guest, &ToLauncher::Ready { version: VERSION + 1, kernel: String::new() });
        assert!(matches!(job.run_ready().as_slice(), [JobEvent::Lost(text)] if text.contains("version")));
    }

    #[test]
    fn what_is_too_long_is_refused_at_once() {
        let mut long = start(1);
        long.environment = vec![(vec![b'x'; frame::MAX_FRAME], vec![])];
        assert!(Job::new(long).unwrap_err().to_string().contains("too long"));
    }
}
