//! A vsock device that does as Firecracker's does (its docs/vsock.md), for a guest under QEMU: it carries CID 2 only, and joins its
//! ports to unix sockets. Guest to host: PATH_PORT. Host to guest: PATH, `CONNECT PORT`, `OK PORT`.

use kso_devices::vsock::{End, Endpoint, GuestId, Hub, Limits, Outside, Verdict};
use kso_wire::Errno;
use kso_wire::guest::StreamKey;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::HashSet;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const HOST: u32 = 2;
/// Firecracker's first port for connections from the host.
const FIRST_PORT: u32 = 1 << 30;

/// How often it looks whether it shall end.
const LOOK: Duration = Duration::from_millis(20);

/// The device, in a thread of its own.
pub struct Vmm {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Vmm {
    /// Listens at `path` for the host and at `device` for QEMU.
    pub fn start(path: &str, device: &str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let host = UnixListener::bind(path).expect("a socket");
        let front = UnixListener::bind(device).expect("a socket");
        let (stopped, path) = (Arc::clone(&stop), path.to_owned());
        let thread = std::thread::spawn(move || serve(&path, &host, front, &stopped));
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(path: &str, host: &UnixListener, front: UnixListener, stop: &AtomicBool) {
    let mut hub = Hub::new(Limits::default()).expect("a hub");
    let guest = hub.add_guest(Endpoint::Listener(front)).expect("a guest");
    let mut joined = Joined { path: path.to_owned(), dialled: HashSet::new() };
    let mut next = FIRST_PORT;
    while !stop.load(Ordering::Relaxed) {
        let soon = Instant::now() + LOOK;
        let until = hub.next_deadline().map_or(soon, |at| at.min(soon));
        let wait = Timespec::try_from(until.saturating_duration_since(Instant::now())).expect("a short time");
        let mut polled =
            [PollFd::from_borrowed_fd(hub.poll_fd(), PollFlags::IN), PollFd::new(host, PollFlags::IN)];
        let _ = poll(&mut polled, Some(&wait));
        let came = !polled[1].revents().is_empty();
        hub.run_ready(&mut joined);
        if came && let Some((socket, local_port)) = asked(host) {
            let key = StreamKey { local_port, peer_cid: HOST, peer_port: next };
            next += 1;
            joined.dialled.insert(key);
            // Dropped: closed, which is a refusal.
            let _ = hub.dial(guest, key, socket);
        }
    }
}

/// A connection of the host's, and the port that it asks for.
fn asked(host: &UnixListener) -> Option<(OwnedFd, u32)> {
    let (stream, _) = host.accept().ok()?;
    // The line comes alone: what follows waits for the answer.
    let mut reader = BufReader::with_capacity(1, stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let port = line.strip_prefix("CONNECT ")?.trim_end().parse().ok()?;
    let stream = reader.into_inner();
    stream.set_nonblocking(true).ok()?;
    Some((stream.into(), port))
}

struct Joined {
    path: String,
    dialled: HashSet<StreamKey>,
}

impl Outside for Joined {
    fn request(&mut self, _: GuestId, stream: StreamKey) -> Verdict {
        // Firecracker drops packets to other CIDs in silence; nothing is to be sent there at all.
        assert_eq!(stream.peer_cid, HOST, "{stream:?}");
        match UnixStream::connect(format!("{}_{}", self.path, stream.peer_port)) {
            Ok(socket) if socket.set_nonblocking(true).is_ok() => Verdict::Socket(socket.into()),
            _ => Verdict::Refused(Errno::ECONNREFUSED),
        }
    }

    fn established(&mut self, _: GuestId, stream: StreamKey, socket: Option<BorrowedFd<'_>>) {
        if self.dialled.contains(&stream)
            && let Some(socket) = socket
            && let Ok(socket) = socket.as_fd().try_clone_to_owned()
        {
            let _ = writeln!(UnixStream::from(socket), "OK {}", stream.peer_port);
        }
    }

    fn failed(&mut self, _: GuestId, _: StreamKey, _: Errno) {}

    fn rejected(&mut self, _: GuestId, stream: StreamKey, _: OwnedFd) {
        self.dialled.remove(&stream);
    }

    fn ended(&mut self, _: GuestId, stream: StreamKey, _: End) {
        self.dialled.remove(&stream);
    }

    fn control(&mut self, _: GuestId, _: &[u8]) -> Result<(), String> {
        Ok(())
    }

    fn control_output(&mut self, _: GuestId) -> Option<&mut Vec<u8>> {
        None
    }

    fn gone(&mut self, _: GuestId) {
        self.dialled.clear();
    }
}
