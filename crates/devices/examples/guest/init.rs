//! The guest's side: /init.

use crate::host::{PUBLISHED, SERVICES};
use crate::pattern::Pattern;
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, init_module, reboot};
use socket2::{Domain, SockAddr, Socket, Type};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown};
use std::time::{Duration, Instant};

mod bench;
mod net;

pub fn run() -> ! {
    let outcome = std::panic::catch_unwind(|| {
        for (kind, at) in
            [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("debugfs", "/sys/kernel/debug")]
        {
            let _ = mount(kind, at, kind, MountFlags::empty(), c"");
        }
        let mut modules: Vec<_> =
            std::fs::read_dir("/modules").unwrap().flatten().map(|e| e.path()).collect();
        modules.sort();
        for module in modules {
            if let Err(error) = init_module(&std::fs::read(&module).unwrap(), c"") {
                println!("{}: {error}", module.display());
            }
        }
        let _ = std::fs::write("/sys/kernel/debug/sched/features", "NO_WAKEUP_PREEMPTION");
        match std::env::args().nth(1).as_deref() {
            Some(mode) if mode.starts_with("bench") => {
                bench::run(mode.trim_start_matches("bench").trim_start_matches('-'))
            }
            _ => check(),
        }
    });
    println!("{}", if outcome.is_ok() { "ALL PASSED" } else { "FAILED" });
    let _ = reboot(RebootCommand::Restart);
    loop {
        std::thread::park();
    }
}

pub fn address(host: Ipv4Addr, port: u16) -> SockAddr {
    SockAddr::vsock(host.into(), port.into())
}

/// Largest buffer, so that the window is the device's to say.
const BUFFER: u64 = 4 << 20;

pub fn vsock() -> Socket {
    let socket = Socket::new(Domain::VSOCK, Type::STREAM, None).unwrap();
    net::set_buffer(&socket, BUFFER);
    socket
}

/// A service of the host's.
pub fn service(letter: u8, numbers: &[u64]) -> Socket {
    let socket = vsock();
    socket.connect(&address(Ipv4Addr::LOCALHOST, SERVICES)).unwrap();
    hello(&socket, letter, numbers);
    socket
}

pub fn hello(mut socket: &Socket, letter: u8, numbers: &[u64]) {
    let numbers = numbers.iter().flat_map(|number| number.to_le_bytes());
    socket.write_all(&[letter].into_iter().chain(numbers).collect::<Vec<_>>()).unwrap();
}

fn number(mut socket: &Socket) -> u64 {
    let mut bytes = [0; 8];
    socket.read_exact(&mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

fn upload(bytes: u64, piece: usize) {
    let mut socket = service(b'u', &[bytes]);
    Pattern::new(bytes).send(&mut socket, bytes, piece).unwrap();
    socket.shutdown(Shutdown::Write).unwrap();
    assert_eq!(number(&socket), bytes);
    assert_eq!(socket.read(&mut [0]).unwrap(), 0);
}

fn download(bytes: u64, piece: usize, back: bool) {
    let mut socket = service(b'd', &[bytes, bytes]);
    assert_eq!(Pattern::new(bytes).check(&mut socket, u64::MAX, piece).unwrap(), bytes);
    if back {
        // The other half is still open.
        Pattern::new(bytes + 1).send(&mut socket, bytes, piece).unwrap();
    }
}

fn duplex(bytes: u64) {
    let socket = service(b'e', &[]);
    let mut sender = socket.try_clone().unwrap();
    let thread = std::thread::spawn(move || {
        Pattern::new(7).send(&mut sender, bytes, 30_000).unwrap();
        sender.shutdown(Shutdown::Write).unwrap();
    });
    assert_eq!(Pattern::new(7).check(&mut &socket, u64::MAX, 40_000).unwrap(), bytes);
    thread.join().unwrap();
}

fn request() {
    let mut socket = service(b'r', &[]);
    socket.write_all(&[b'q'; 99]).unwrap();
    let mut reply = [0; 100];
    socket.read_exact(&mut reply).unwrap();
    assert_eq!(reply[..99], [b'q'; 99]);
}

fn refused() {
    for _ in 0..50 {
        let error = vsock().connect(&address(Ipv4Addr::LOCALHOST, 1)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(104), "{error}");
    }
}

fn slow() {
    let mut slow = service(b's', &[3]);
    let sender = std::thread::spawn(move || {
        Pattern::new(3).send(&mut slow, 24 << 20, 1 << 16).unwrap();
        slow.shutdown(Shutdown::Write).unwrap();
        assert_eq!(number(&slow), 24 << 20);
    });
    // Nobody else waits for it.
    let start = Instant::now();
    (0..100).for_each(|_| request());
    upload(4 << 20, 1 << 16);
    assert!(!sender.is_finished() && start.elapsed() < Duration::from_secs(5));
    sender.join().unwrap();
}

/// What was written before close() arrives.
fn orphan() {
    for _ in 0..20 {
        let mut socket = service(b's', &[3]);
        Pattern::new(3).send(&mut socket, 1 << 20, 1 << 16).unwrap();
    }
}

fn reset() {
    let mut socket = service(b'x', &[]);
    let start = Instant::now();
    assert_eq!(socket.read(&mut [0]).unwrap_or(0), 0);
    assert!(socket.write(&[0]).is_err());
    assert!(start.elapsed() < Duration::from_millis(500));
}

fn many(streams: u64) {
    let threads: Vec<_> = (0..streams)
        .map(|stream| {
            std::thread::spawn(move || match stream % 3 {
                0 => upload(1_000_000 + stream, 10_000),
                1 => download(1_000_000 + stream, 10_000, false),
                _ => duplex(500_000),
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

/// The host's listener is asked, through the outside network of the host itself: guest to host to guest.
fn accept() {
    let listener = vsock();
    listener.bind(&SockAddr::vsock(u32::MAX, PUBLISHED.into())).unwrap();
    listener.listen(16).unwrap();
    for round in 0..20 {
        let mut out = vsock();
        out.connect(&address(Ipv4Addr::LOCALHOST, PUBLISHED)).unwrap();
        let (mut inward, peer) = listener.accept().unwrap();
        assert_eq!(peer.as_vsock_address().unwrap().0, u32::from(Ipv4Addr::LOCALHOST));
        let thread = std::thread::spawn(move || {
            Pattern::new(round).send(&mut out, 300_000, 9_000).unwrap();
            out.shutdown(Shutdown::Write).unwrap();
            Pattern::new(round).check(&mut out, u64::MAX, 10_000).unwrap()
        });
        assert_eq!(Pattern::new(round).check(&mut inward, u64::MAX, 10_000).unwrap(), 300_000);
        Pattern::new(round).send(&mut inward, 200_000, 9_000).unwrap();
        drop(inward);
        assert_eq!(thread.join().unwrap(), 200_000);
    }
}

/// Memory to memory, to itself.
fn joined() {
    let listener = vsock();
    listener.bind(&SockAddr::vsock(u32::MAX, 5000)).unwrap();
    listener.listen(16).unwrap();
    let there = address(Ipv4Addr::new(10, 0, 0, 1), 5000);
    let start = Instant::now();
    let bytes = 64 << 20;
    for _ in 0..3 {
        let mut out = vsock();
        out.connect(&there).unwrap();
        let (mut inward, _) = listener.accept().unwrap();
        let thread = std::thread::spawn(move || {
            Pattern::new(9).send(&mut out, bytes, 1 << 16).unwrap();
            out.shutdown(Shutdown::Write).unwrap();
            Pattern::new(8).check(&mut out, u64::MAX, 1 << 16).unwrap()
        });
        assert_eq!(Pattern::new(9).check(&mut inward, u64::MAX, 1 << 16).unwrap(), bytes);
        Pattern::new(8).send(&mut inward, 1000, 9_000).unwrap();
        drop(inward);
        assert_eq!(thread.join().unwrap(), 1000);
    }
    println!("joined: {:.0} MB/s", 3.0 * bytes as f64 / start.elapsed().as_secs_f64() / 1e6);
    assert!(vsock().connect(&address(Ipv4Addr::new(10, 0, 0, 1), 5001)).is_err());
}

fn control() {
    let mut socket = vsock();
    socket.connect(&SockAddr::vsock(2, 1)).unwrap();
    for round in 0..20 {
        Pattern::new(round).send(&mut socket, 100_000, 10_000).unwrap();
        assert_eq!(Pattern::new(round).check(&mut socket, 100_000, 10_000).unwrap(), 100_000);
    }
}

fn check() {
    let timed = |name: &str, test: &dyn Fn()| {
        let start = Instant::now();
        test();
        println!("pass {name} {:?}", start.elapsed());
    };
    timed("request", &request);
    timed("control", &control);
    timed("upload", &|| upload(64 << 20, 1 << 16));
    timed("upload in small pieces", &|| upload(1 << 20, 100));
    timed("download", &|| download(64 << 20, 1 << 16, false));
    timed("download in small pieces", &|| download(1 << 20, 100, false));
    timed("download, then back", &|| download(8 << 20, 1 << 16, true));
    timed("duplex", &|| duplex(16 << 20));
    timed("refused", &refused);
    timed("reset", &reset);
    timed("2000 requests", &|| (0..2000).for_each(|_| request()));
    timed("slow reader", &slow);
    timed("orphans", &orphan);
    timed("many streams", &|| many(48));
    timed("accept", &accept);
    timed("joined", &joined);
}
