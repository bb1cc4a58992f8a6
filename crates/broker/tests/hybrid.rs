//! A guest whose VMM carries CID 2 only: a stand-in that speaks the protocol of Firecracker's vsock socket.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use common::{config, free_port};
use kso_broker::Broker;
use kso_broker::guest::Devices;
use kso_wire::frame::{Frames, append};
use kso_wire::guest::{GuestReply, GuestRequest, Prepare, StreamCall, StreamKey, ToGuest, ToHost, ports};
use kso_wire::{Caller, Connect, Errno, Family, Hello, Listen, Origin, SocketOptions, VERSION};
use rustix::event::epoll;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A broker in a thread, as `kso broker` runs it, and the guest's end of the VMM's socket.
struct World {
    path: PathBuf,
    vmm: UnixListener,
    control: UnixStream,
    frames: Frames,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
    _directory: tempfile::TempDir,
}

impl World {
    fn new(hello: Hello) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("v.sock");
        let vmm = UnixListener::bind(&path).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let (ready, started) = std::sync::mpsc::channel();
        let (stopped, socket) = (stop.clone(), path.clone());
        let thread = std::thread::spawn(move || {
            let mut broker = Broker::new(config()).unwrap();
            let mut devices = Devices::new().unwrap();
            let guest = devices.add_hybrid(&mut broker, &socket, &hello).unwrap();
            ready.send(()).unwrap();
            let idle = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
            while !stopped.load(Ordering::Relaxed) {
                let soon = Instant::now() + Duration::from_millis(5);
                let next = broker.next_deadline().map_or(soon, |at| at.min(soon));
                let (ready, _) = devices.wait(idle.as_fd(), Some(next)).unwrap();
                devices.run_ready(&mut broker, ready);
                broker.run_ready();
                devices.serve_orders(&mut broker);
            }
            devices.remove(&mut broker, guest);
        });
        started.recv().unwrap();
        let control = connect(&path, ports::CONTROL);
        let mut world = Self {
            path,
            vmm,
            control,
            frames: Frames::default(),
            stop,
            thread: Some(thread),
            _directory: directory,
        };
        world.say(&ToHost::Hello { version: VERSION, datagram_segments: false });
        assert!(matches!(world.hear(), ToGuest::Welcome(_)));
        world
    }

    fn say(&mut self, message: &ToHost) {
        let mut bytes = Vec::new();
        append(message, &mut bytes).unwrap();
        self.control.write_all(&bytes).unwrap();
    }

    fn hear(&mut self) -> ToGuest {
        loop {
            if let Some(message) = self.frames.next_message().unwrap() {
                return message;
            }
            let mut buffer = [0; 4096];
            let count = self.control.read(&mut buffer).unwrap();
            assert!(count > 0, "the control stream ended");
            self.frames.push(&buffer[..count]);
        }
    }

    fn ask(&mut self, request: GuestRequest) -> Result<GuestReply, kso_wire::Failure> {
        self.say(&ToHost::Ask { id: 1, caller: Caller::default(), request });
        match self.hear() {
            ToGuest::Answered { id: 1, result } => result,
            other => panic!("{other:?}"),
        }
    }

    /// As a runner connects: announced, and then by a ticket.
    fn connect(&mut self, local_port: u32, peer: SocketAddr) -> UnixStream {
        let connect_ = Connect {
            peer,
            family: Family::V4,
            local: None,
            options: SocketOptions::default(),
            origin: Origin::Intercepted,
        };
        self.say(&ToHost::Prepare(Prepare { local_port, caller: Caller::default(), connect: connect_ }));
        // Two connections of a VMM have no order: a runner waits for an answer to something it asks in between.
        let release = GuestRequest::Release("127.0.0.1:1".parse().unwrap());
        self.ask(release).unwrap();
        let mut stream = connect(&self.path, ports::STREAMS);
        stream.write_all(&(7_u64 << 32 | u64::from(local_port)).to_le_bytes()).unwrap();
        stream
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let joined = self.thread.take().unwrap().join();
        assert!(joined.is_ok() || std::thread::panicking());
        let left = std::fs::read_dir(self._directory.path()).unwrap().count();
        assert!(left == 1 || std::thread::panicking(), "sockets are left behind");
    }
}

fn connect(path: &std::path::Path, port: u32) -> UnixStream {
    let stream = UnixStream::connect(format!("{}_{port}", path.display())).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream
}

fn host(port: u16) -> SocketAddr {
    SocketAddr::from(([198, 18, 0, 1], port))
}

#[test]
fn a_ticket_leads_to_what_was_announced() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut world = World::new(common::allow(&["host"]));
    let mut stream = world.connect(5000, host(port));
    let (mut accepted, peer) = listener.accept().unwrap();
    let mut byte = [9];
    stream.read_exact(&mut byte).unwrap();
    assert_eq!(byte, [0]);
    assert_eq!(world.hear(), ToGuest::Established { local_port: 5000, local: peer });
    let key = StreamKey { local_port: 5000, peer_cid: 2, peer_port: ports::STREAMS };
    let asked = world.ask(GuestRequest::Stream(key, StreamCall::LocalAddress));
    assert_eq!(asked, Ok(GuestReply::Address(peer)));

    // Much, both ways, and a half-close.
    let sent: Vec<u8> = (0..3_000_000_u32).map(|index| (index % 251) as u8).collect();
    let (copy, mut writer) = (sent.clone(), stream.try_clone().unwrap());
    let thread = std::thread::spawn(move || {
        writer.write_all(&copy).unwrap();
        writer.shutdown(std::net::Shutdown::Write).unwrap();
    });
    let mut read = Vec::new();
    accepted.read_to_end(&mut read).unwrap();
    assert!(read == sent);
    thread.join().unwrap();
    let thread = std::thread::spawn(move || accepted.write_all(&sent).map(|()| sent).unwrap());
    read.clear();
    stream.read_to_end(&mut read).unwrap();
    assert!(read == thread.join().unwrap());

    let port = free_port();
    let mut refused = world.connect(5001, host(port));
    assert_eq!(refused.read(&mut byte).unwrap(), 0);
    let ToGuest::Failed { local_port: 5001, failure } = world.hear() else { panic!() };
    assert_eq!(failure.errno, Errno::ECONNREFUSED);
    // Nothing was announced for this one.
    let mut strange = connect(&world.path, ports::STREAMS);
    strange.write_all(&9_u64.to_le_bytes()).unwrap();
    assert_eq!(strange.read(&mut byte).unwrap(), 0);
}

#[test]
fn a_listener_is_dialled_by_the_vmms_socket() {
    let port = free_port();
    let mut world = World::new(common::publish(&[format!("{port}:80")]));
    let listen = Listen {
        local: "0.0.0.0:80".parse().unwrap(),
        family: Family::V4,
        backlog: Some(8),
        options: SocketOptions::default(),
    };
    let listening = world.ask(GuestRequest::Listen { listen, vsock_port: 9000 });
    let Ok(GuestReply::Listening(outer)) = listening else { panic!("{listening:?}") };
    let mut outside = TcpStream::connect(outer).unwrap();
    let dial = |world: &World| {
        let (stream, _) = world.vmm.accept().unwrap();
        let mut line = String::new();
        let mut reader = BufReader::new(stream);
        reader.read_line(&mut line).unwrap();
        assert_eq!(line, "CONNECT 9000\n");
        reader.into_inner()
    };
    // Nobody listens in the guest yet: the VMM closes. It is tried again.
    drop(dial(&world));
    let mut inside = dial(&world);
    inside.write_all(b"OK 1073741824\nfirst").unwrap();
    let stream = StreamKey { local_port: 9000, peer_cid: 2, peer_port: 1_073_741_824 };
    assert_eq!(world.hear(), ToGuest::Named { stream, address: outside.local_addr().unwrap() });
    let mut read = [0; 5];
    outside.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"first");
    outside.write_all(b"hello").unwrap();
    inside.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"hello");
    let asked = world.ask(GuestRequest::Stream(stream, StreamCall::PeerAddress));
    assert_eq!(asked, Ok(GuestReply::Address(outside.local_addr().unwrap())));
}

#[test]
fn a_guest_that_babbles_is_dropped_and_may_come_again() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut world = World::new(common::allow(&["host"]));
    let _packets = connect(&world.path, ports::PACKETS);
    let mut stream = world.connect(5000, host(port));
    let mut byte = [9];
    stream.read_exact(&mut byte).unwrap();
    world.control.write_all(&[0xff; 32]).unwrap();
    assert!(matches!(stream.read(&mut byte), Ok(0) | Err(_)));
    world.control = connect(&world.path, ports::CONTROL);
    world.frames = Frames::default();
    world.say(&ToHost::Hello { version: VERSION, datagram_segments: false });
    assert!(matches!(world.hear(), ToGuest::Welcome(_)));
    let mut packets = connect(&world.path, ports::PACKETS);
    packets.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let waits = packets.read(&mut byte).unwrap_err();
    assert_eq!(waits.kind(), std::io::ErrorKind::WouldBlock, "its packets are carried again");
    let mut stream = world.connect(5000, host(port));
    stream.read_exact(&mut byte).unwrap();
}
