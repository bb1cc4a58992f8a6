//! vsock against tap, alternating.

use super::{address, hello, net, vsock};
use crate::host::SERVICES;
use socket2::{Domain, SockAddr, Socket, Type};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4};
use std::time::Instant;

fn connect(tap: bool) -> Socket {
    if tap {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_tcp_nodelay(true).unwrap();
        let there = SocketAddrV4::new(Ipv4Addr::new(10, 99, 0, 1), SERVICES);
        socket.connect(&SockAddr::from(there)).unwrap();
        return socket;
    }
    let socket = vsock();
    socket.connect(&address(Ipv4Addr::LOCALHOST, SERVICES)).unwrap();
    socket
}

fn up(tap: bool, bytes: u64) -> f64 {
    let mut socket = connect(tap);
    hello(&socket, b'z', &[]);
    let buffer = vec![0; 256 << 10];
    let start = Instant::now();
    let mut left = bytes;
    while left > 0 {
        let part = left.min(buffer.len() as u64) as usize;
        socket.write_all(&buffer[..part]).unwrap();
        left -= part as u64;
    }
    socket.shutdown(Shutdown::Write).unwrap();
    socket.read_exact(&mut [0]).unwrap();
    bytes as f64 / start.elapsed().as_secs_f64() / 1e6
}

fn down(tap: bool, bytes: u64) -> f64 {
    let mut socket = connect(tap);
    let mut buffer = vec![0; 256 << 10];
    let start = Instant::now();
    hello(&socket, b'y', &[bytes]);
    let mut got = 0;
    while got < bytes {
        let count = socket.read(&mut buffer).unwrap();
        assert!(count > 0);
        got += count as u64;
    }
    bytes as f64 / start.elapsed().as_secs_f64() / 1e6
}

fn ping(tap: bool, rounds: u32) -> f64 {
    let mut socket = connect(tap);
    hello(&socket, b'e', &[]);
    let start = Instant::now();
    for _ in 0..rounds {
        socket.write_all(b"p").unwrap();
        socket.read_exact(&mut [0]).unwrap();
    }
    start.elapsed().as_secs_f64() * 1e6 / f64::from(rounds)
}

fn connections(tap: bool, count: u32) -> f64 {
    let start = Instant::now();
    for _ in 0..count {
        let mut socket = connect(tap);
        hello(&socket, b'r', &[]);
        socket.write_all(&[b'q'; 99]).unwrap();
        socket.read_exact(&mut [0; 100]).unwrap();
    }
    f64::from(count) / start.elapsed().as_secs_f64()
}

fn streams(tap: bool, bytes: u64) -> f64 {
    let start = Instant::now();
    let threads: Vec<_> = (0..8).map(|_| std::thread::spawn(move || up(tap, bytes / 8))).collect();
    threads.into_iter().for_each(|thread| {
        thread.join().unwrap();
    });
    bytes as f64 / start.elapsed().as_secs_f64() / 1e6
}

type Measure = (&'static str, fn(bool) -> f64);

pub fn run(only: &str) {
    let tap = std::path::Path::new("/sys/class/net/eth0").exists();
    if tap {
        net::configure(2, [10, 99, 0, 2]);
        std::thread::sleep(std::time::Duration::from_millis(300));
    }
    let measures: [Measure; 5] = [
        ("up MB/s", |tap| up(tap, 256 << 20)),
        ("down MB/s", |tap| down(tap, 256 << 20)),
        ("up 8 streams MB/s", |tap| streams(tap, 256 << 20)),
        ("ping us", |tap| ping(tap, 3000)),
        ("connections /s", |tap| connections(tap, 500)),
    ];
    for (name, measure) in measures.into_iter().filter(|(name, _)| name.starts_with(only)) {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..7 {
            ours.push(measure(false));
            if tap {
                theirs.push(measure(true));
            }
        }
        ours.sort_by(f64::total_cmp);
        theirs.sort_by(f64::total_cmp);
        let median = |sorted: &[f64]| sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN);
        println!(
            "{name}: vsock {:.0}, tap {:.0}, ratio {:.2}  {ours:.0?} {theirs:.0?}",
            median(&ours),
            median(&theirs),
            median(&ours) / median(&theirs)
        );
    }
}
