//! The server of the workloads: one TCP listener and one UDP socket on the same port.
//!
//! Short requests are answered by the accepting thread itself; a stream gets a thread of its own. The server says
//! `ready` on its standard output and ends when its standard input does, so that it cannot outlive the harness.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::protocol::{
    BULK_LEN, Count, Datagram, Meter, Mode, REQUEST_LEN, Request, Tag, UDP_HEADER, Window,
};

/// Asked for on both ends of every UDP socket; the kernel caps it at net.core.rmem_max.
pub const UDP_BUFFER: usize = 4 << 20;
/// Bytes of the largest UDP payload.
pub const DATAGRAM_MAX: usize = 65_507;

#[derive(clap::Args)]
pub struct Args {
    /// Address to listen on
    #[arg(long, default_value_t = Ipv4Addr::LOCALHOST)]
    bind: Ipv4Addr,
    #[arg(long)]
    port: u16,
    /// Run on this processor only
    #[arg(long)]
    cpu: Option<usize>,
}

pub fn run(args: &Args) -> Result<()> {
    crate::pin(args.cpu)?;
    let address = SocketAddr::from((args.bind, args.port));
    let listener = listen(address).with_context(|| format!("cannot listen on {address}"))?;
    let datagrams = UdpSocket::bind(address).with_context(|| format!("cannot bind UDP {address}"))?;
    let socket = socket2::SockRef::from(&datagrams);
    socket.set_recv_buffer_size(UDP_BUFFER)?;
    socket.set_send_buffer_size(UDP_BUFFER)?;
    thread::spawn(move || serve_datagrams(&datagrams));
    thread::spawn(move || accept(&listener));
    println!("ready");
    io::stdout().flush()?;
    let mut rest = Vec::new();
    io::stdin().read_to_end(&mut rest)?;
    Ok(())
}

/// A listener with the longest backlog the kernel gives: the soak must not wait for SYN retries.
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(4096)?;
    Ok(socket.into())
}

fn accept(listener: &TcpListener) {
    let mut held = Vec::new();
    loop {
        let Ok((mut stream, _)) = listener.accept() else {
            // Most likely out of descriptors: give the others time to close.
            thread::sleep(Duration::from_millis(10));
            continue;
        };
        let mut bytes = [0; REQUEST_LEN];
        if stream.read_exact(&mut bytes).is_err() {
            continue;
        }
        let Some(request) = Request::decode(&bytes) else { continue };
        match request.mode {
            Mode::Reply => drop(stream.write_all(&bytes)),
            Mode::Hold => {
                if stream.write_all(b"h").is_ok() {
                    held.push(stream);
                }
            }
            Mode::Echo | Mode::Sink | Mode::Source => {
                thread::spawn(move || serve(stream, request));
            }
        }
    }
}

/// Ends with the connection, whatever ends that.
fn serve(mut stream: TcpStream, request: Request) -> io::Result<()> {
    match request.mode {
        Mode::Echo => echo(&mut stream, request.size),
        Mode::Sink => {
            let count = receive(&mut stream, request.window)?;
            stream.write_all(&count.encode())
        }
        Mode::Source => loop {
            stream.write_all(&[0x5a; BULK_LEN])?;
        },
        Mode::Reply | Mode::Hold => Ok(()),
    }
}

fn echo(stream: &mut TcpStream, size: u32) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut block = vec![0; usize::try_from(size).unwrap_or(1).clamp(1, 1 << 20)];
    loop {
        stream.read_exact(&mut block)?;
        stream.write_all(&block)?;
    }
}

/// Reads until the end of the stream and counts what came in the window.
pub fn receive(stream: &mut TcpStream, window: Window) -> io::Result<Count> {
    let mut buffer = vec![0; BULK_LEN];
    let mut meter = Meter::fixed(window);
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(meter.count()),
            bytes => meter.add(bytes),
        };
    }
}

/// Counts of the one run that is being received.
struct Blast {
    run: u32,
    meter: Meter,
}

fn serve_datagrams(socket: &UdpSocket) {
    let mut buffer = vec![0; DATAGRAM_MAX];
    let mut blast: Option<Blast> = None;
    loop {
        let Ok((length, peer)) = socket.recv_from(&mut buffer) else { continue };
        let Some(bytes) = buffer.get(..length) else { continue };
        let Some(header) = Datagram::decode(bytes) else { continue };
        match header.tag {
            Tag::Ping => drop(socket.send_to(bytes, peer)),
            Tag::Blast => match &mut blast {
                Some(blast) if blast.run == header.run => {
                    blast.meter.add(length);
                }
                _ => {
                    let mut meter = Meter::open_ended(WARM_UP);
                    meter.add(length);
                    blast = Some(Blast { run: header.run, meter });
                }
            },
            Tag::Ask => {
                let count = match &blast {
                    Some(blast) if blast.run == header.run => blast.meter.count(),
                    _ => Count::default(),
                };
                let mut answer = vec![0; UDP_HEADER];
                Datagram { tag: Tag::Answer, ..header }.encode(&mut answer);
                answer.extend(count.encode());
                drop(socket.send_to(&answer, peer));
            }
            Tag::Pull => pull(socket, peer, header),
            Tag::Answer | Tag::End => {}
        }
    }
}

/// The receiver of a bulk of datagrams does not count what comes in this time from the first.
pub const WARM_UP: Duration = Duration::from_millis(50);

fn pull(socket: &UdpSocket, peer: SocketAddr, asked: Datagram) {
    let size = usize::try_from(asked.size).unwrap_or(0).clamp(UDP_HEADER, DATAGRAM_MAX);
    let sent = blast(asked.run, size, Duration::from_millis(u64::from(asked.millis)), |bytes| {
        socket.send_to(bytes, peer)
    });
    let mut end = vec![0; UDP_HEADER];
    Datagram { tag: Tag::End, number: sent, ..asked }.encode(&mut end);
    for _ in 0..10 {
        thread::sleep(Duration::from_millis(5));
        drop(socket.send_to(&end, peer));
    }
}

/// Sends as fast as the socket takes it; returns how many datagrams it took.
pub fn blast(run: u32, size: usize, time: Duration, mut send: impl FnMut(&[u8]) -> io::Result<usize>) -> u64 {
    let mut bytes = vec![0; size];
    let end = Instant::now() + time;
    let mut sent = 0;
    while Instant::now() < end {
        Datagram { tag: Tag::Blast, run, number: sent, size: 0, millis: 0 }.encode(&mut bytes);
        // ENOBUFS and a late ICMP error are not fatal: the receiver's count is what matters.
        if send(&bytes).is_ok() {
            sent += 1;
        }
    }
    sent
}
