//! The clients of the workloads. Each prints one JSON object per result on its standard output.

use std::io::{self, BufRead, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};

use crate::protocol::{
    BULK_LEN, Count, Datagram, Meter, Mode, REQUEST_LEN, Request, Tag, UDP_HEADER, Window,
};
use crate::server;

#[derive(clap::Args)]
pub struct Args {
    /// Address and port of the server
    #[arg(long)]
    to: SocketAddr,
    /// Run on this processor only
    #[arg(long)]
    cpu: Option<usize>,
    /// Time that is measured, in milliseconds
    #[arg(long, default_value_t = 500)]
    millis: u64,
    /// Time before that
    #[arg(long, default_value_t = 100)]
    warm_up: u64,
    #[command(subcommand)]
    work: Work,
}

#[derive(clap::Subcommand)]
enum Work {
    /// Streams of bytes to the server
    Up {
        #[arg(long, default_value_t = 1)]
        streams: usize,
    },
    /// Streams of bytes from the server
    Down {
        #[arg(long, default_value_t = 1)]
        streams: usize,
    },
    /// Blocks to and fro over one connection
    Pingpong {
        #[arg(long, default_value_t = 1)]
        size: u32,
    },
    /// Connect, send 100 bytes, receive 100 bytes, close; again and again
    Connect,
    /// The same, as often as each line of standard input says
    Soak {
        /// Connect without blocking, and wait with poll(2)
        #[arg(long)]
        nonblocking: bool,
    },
    /// Opens connections and keeps them: one target number per line of standard input
    Hold,
    /// Datagrams to and fro
    UdpPingpong {
        #[arg(long, default_value_t = 32)]
        size: usize,
    },
    /// Datagrams to the server, as fast as the socket takes them
    UdpUp {
        #[arg(long)]
        size: usize,
    },
    /// Datagrams from the server
    UdpDown {
        #[arg(long)]
        size: u32,
    },
}

/// A line of output.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// Gbit/s, round trips per second, connections per second, or the number of connections held.
    pub value: f64,
    /// Datagrams lost, in percent of those sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
}

fn say(outcome: Outcome) -> Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, &outcome)?;
    out.write_all(b"\n")?;
    out.flush()?;
    Ok(())
}

fn say_value(value: f64) -> Result<()> {
    say(Outcome { value, loss: None })
}

pub fn run(args: &Args) -> Result<()> {
    crate::pin(args.cpu)?;
    let window = Window::millis(args.warm_up, args.millis);
    match args.work {
        Work::Up { streams } => say_value(bulk(args.to, streams, window, Mode::Sink)?),
        Work::Down { streams } => say_value(bulk(args.to, streams, window, Mode::Source)?),
        Work::Pingpong { size } => say_value(pingpong(args.to, size, window)?),
        Work::Connect => {
            connect_for(args.to, window.warm_up)?;
            say_value(connect_for(args.to, window.length)?)
        }
        Work::Soak { nonblocking } => soak(args.to, nonblocking),
        Work::Hold => hold(args.to),
        Work::UdpPingpong { size } => say(udp_pingpong(args.to, size, window)?),
        Work::UdpUp { size } => say(udp_up(args.to, size, window)?),
        Work::UdpDown { size } => say(udp_down(args.to, size, window)?),
    }
}

fn open(to: SocketAddr, mode: Mode, size: u32, window: Window) -> Result<TcpStream> {
    begin(TcpStream::connect(to).with_context(|| format!("cannot connect to {to}"))?, mode, size, window)
}

fn begin(mut stream: TcpStream, mode: Mode, size: u32, window: Window) -> Result<TcpStream> {
    stream.write_all(&Request { mode, size, window }.encode())?;
    Ok(stream)
}

/// Gbit/s of all streams together.
fn bulk(to: SocketAddr, streams: usize, window: Window, mode: Mode) -> Result<f64> {
    let streams: Vec<TcpStream> = (0..streams).map(|_| open(to, mode, 0, window)).collect::<Result<_>>()?;
    let threads: Vec<_> = streams
        .into_iter()
        .map(|stream| {
            thread::spawn(
                move || if mode == Mode::Sink { send(stream, window) } else { fetch(stream, window) },
            )
        })
        .collect();
    let mut sum = 0.0;
    for thread in threads {
        match thread.join() {
            Ok(count) => sum += count?.gbit_per_second(),
            Err(_) => bail!("a stream's thread panicked"),
        }
    }
    Ok(sum)
}

fn send(mut stream: TcpStream, window: Window) -> io::Result<Count> {
    let block = vec![0xa5; BULK_LEN];
    let end = Instant::now() + window.total() + Duration::from_millis(20);
    while Instant::now() < end {
        stream.write_all(&block)?;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = [0; Count::LEN];
    stream.read_exact(&mut answer)?;
    Ok(Count::decode(&answer))
}

fn fetch(mut stream: TcpStream, window: Window) -> io::Result<Count> {
    let mut buffer = vec![0; BULK_LEN];
    let mut meter = Meter::fixed(window);
    loop {
        let bytes = stream.read(&mut buffer)?;
        if bytes == 0 || !meter.add(bytes) {
            return Ok(meter.count());
        }
    }
}

/// Round trips per second.
fn pingpong(to: SocketAddr, size: u32, window: Window) -> Result<f64> {
    let mut stream = open(to, Mode::Echo, size, window)?;
    stream.set_nodelay(true)?;
    let mut block = vec![7; usize::try_from(size)?];
    rate(window, || {
        stream.write_all(&block)?;
        stream.read_exact(&mut block)?;
        Ok(())
    })
}

/// How often per second `step` is done, after the warm-up.
fn rate(window: Window, mut step: impl FnMut() -> Result<()>) -> Result<f64> {
    let warm = Instant::now() + window.warm_up;
    while Instant::now() < warm {
        step()?;
    }
    let start = Instant::now();
    let mut steps = 0_u64;
    loop {
        step()?;
        steps += 1;
        let elapsed = start.elapsed();
        if elapsed >= window.length {
            return Ok(steps as f64 / elapsed.as_secs_f64());
        }
    }
}

/// As programs with an event loop connect.
fn connect_nonblocking(to: SocketAddr) -> Result<TcpStream> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(to), socket2::Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    if let Err(error) = socket.connect(&to.into()) {
        let begun = rustix::io::Errno::from_io_error(&error) == Some(rustix::io::Errno::INPROGRESS);
        ensure!(begun, "cannot connect to {to}: {error}");
        let mut fds = [PollFd::new(&socket, PollFlags::OUT)];
        let patience = Timespec { tv_sec: 10, tv_nsec: 0 };
        ensure!(poll(&mut fds, Some(&patience))? > 0, "no connection to {to} within ten seconds");
        if let Some(error) = socket.take_error()? {
            return Err(error).with_context(|| format!("cannot connect to {to}"));
        }
    }
    socket.set_nonblocking(false)?;
    Ok(socket.into())
}

/// One connection: 100 bytes there, 100 bytes back, the server's end of file, close.
fn connect_once(to: SocketAddr) -> Result<()> {
    exchange(open(to, Mode::Reply, 0, Window::millis(0, 0))?)
}

fn exchange(mut stream: TcpStream) -> Result<()> {
    let mut reply = [0; REQUEST_LEN + 1];
    let mut length = 0;
    while let Some(rest) = reply.get_mut(length..) {
        match stream.read(rest)? {
            0 => break,
            bytes => length += bytes,
        }
    }
    if length != REQUEST_LEN {
        bail!("a reply of {length} bytes instead of {REQUEST_LEN}");
    }
    Ok(())
}

fn connect_for(to: SocketAddr, time: Duration) -> Result<f64> {
    rate(Window { warm_up: Duration::ZERO, length: time }, || connect_once(to))
}

fn soak(to: SocketAddr, nonblocking: bool) -> Result<()> {
    let once = || {
        if nonblocking {
            exchange(begin(connect_nonblocking(to)?, Mode::Reply, 0, Window::millis(0, 0))?)
        } else {
            connect_once(to)
        }
    };
    for line in io::stdin().lock().lines() {
        let count: u32 = line?.trim().parse().context("a number of connections")?;
        let start = Instant::now();
        for number in 0..count {
            once().with_context(|| format!("connection {number}"))?;
        }
        say_value(f64::from(count) / start.elapsed().as_secs_f64())?;
    }
    Ok(())
}

fn hold(to: SocketAddr) -> Result<()> {
    let mut held = Vec::new();
    for line in io::stdin().lock().lines() {
        let target: usize = line?.trim().parse().context("a number of connections")?;
        while held.len() < target {
            let mut stream = open(to, Mode::Hold, 0, Window::millis(0, 0))
                .with_context(|| format!("connection {}", held.len()))?;
            stream.read_exact(&mut [0])?;
            held.push(stream);
        }
        say_value(held.len() as f64)?;
    }
    Ok(())
}

fn udp_socket(to: SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind(("0.0.0.0", 0))?;
    socket.connect(to)?;
    let options = socket2::SockRef::from(&socket);
    options.set_recv_buffer_size(server::UDP_BUFFER)?;
    options.set_send_buffer_size(server::UDP_BUFFER)?;
    socket.set_read_timeout(Some(Duration::from_millis(300)))?;
    Ok(socket)
}

/// A number that a former client of the same server did not use.
fn new_run() -> u32 {
    let mut bytes = [0; 4];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    if read.is_ok() { u32::from_ne_bytes(bytes) } else { std::process::id() }
}

fn udp_pingpong(to: SocketAddr, size: usize, window: Window) -> Result<Outcome> {
    let socket = udp_socket(to)?;
    let run = new_run();
    let size = size.clamp(UDP_HEADER, server::DATAGRAM_MAX);
    let mut bytes = vec![0; size];
    let mut answer = vec![0; server::DATAGRAM_MAX];
    let (mut number, mut lost, mut sent) = (0_u64, 0_u64, 0_u64);
    let value = rate(window, || {
        number += 1;
        for _ in 0..20 {
            Datagram { tag: Tag::Ping, run, number, size: 0, millis: 0 }.encode(&mut bytes);
            socket.send(&bytes)?;
            sent += 1;
            // Answers to datagrams that were given up for lost may still come: skip them.
            while let Ok(length) = socket.recv(&mut answer) {
                let header = answer.get(..length).and_then(Datagram::decode);
                if length == size && header.is_some_and(|header| header.number == number) {
                    return Ok(());
                }
            }
            lost += 1;
        }
        bail!("no answer to 20 datagrams")
    })?;
    Ok(Outcome { value, loss: Some(percent(lost, sent)) })
}

fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { 100.0 * part as f64 / whole as f64 }
}

/// Gbit/s over the time of sending at least: a burst that came before all else was lost is no throughput.
fn goodput(count: Count, window: Window) -> f64 {
    let least = u64::try_from(window.length.as_nanos()).unwrap_or(u64::MAX);
    Count { nanos: count.nanos.max(least), ..count }.gbit_per_second()
}

fn udp_up(to: SocketAddr, size: usize, window: Window) -> Result<Outcome> {
    let socket = udp_socket(to)?;
    let run = new_run();
    // The first datagrams of a flow may wait for the sandbox to set it up; the server skips its warm-up time.
    let size = size.clamp(UDP_HEADER, server::DATAGRAM_MAX);
    let sent = server::blast(run, size, window.length + server::WARM_UP, |bytes| socket.send(bytes));
    let mut ask = vec![0; UDP_HEADER];
    let mut answer = vec![0; server::DATAGRAM_MAX];
    for number in 0..20 {
        Datagram { tag: Tag::Ask, run, number, size: 0, millis: 0 }.encode(&mut ask);
        socket.send(&ask)?;
        while let Ok(length) = socket.recv(&mut answer) {
            let Some(bytes) = answer.get(..length) else { continue };
            let Some(header) = Datagram::decode(bytes) else { continue };
            if header.tag == Tag::Answer && header.run == run {
                let count = Count::decode(bytes.get(UDP_HEADER..).unwrap_or_default());
                let lost = sent.saturating_sub(count.datagrams);
                return Ok(Outcome { value: goodput(count, window), loss: Some(percent(lost, sent)) });
            }
        }
    }
    bail!("the server does not say what it received")
}

fn udp_down(to: SocketAddr, size: u32, window: Window) -> Result<Outcome> {
    let socket = udp_socket(to)?;
    let run = new_run();
    let time = window.length + server::WARM_UP;
    let mut ask = vec![0; UDP_HEADER];
    let mut buffer = vec![0; server::DATAGRAM_MAX];
    for number in 0..20 {
        let millis = u32::try_from(time.as_millis())?;
        Datagram { tag: Tag::Pull, run, number, size, millis }.encode(&mut ask);
        socket.send(&ask)?;
        let mut meter: Option<Meter> = None;
        while let Ok(length) = socket.recv(&mut buffer) {
            let Some(header) = buffer.get(..length).and_then(Datagram::decode) else { continue };
            match header.tag {
                Tag::Blast if header.run == run => {
                    meter.get_or_insert_with(|| Meter::open_ended(server::WARM_UP)).add(length);
                }
                Tag::End if header.run == run => {
                    let count = meter.map(|meter| meter.count()).unwrap_or_default();
                    let lost = header.number.saturating_sub(count.datagrams);
                    let loss = Some(percent(lost, header.number));
                    return Ok(Outcome { value: goodput(count, window), loss });
                }
                _ => {}
            }
        }
        if let Some(meter) = meter {
            // Every End datagram was lost: what came still counts, the loss is not known.
            return Ok(Outcome { value: goodput(meter.count(), window), loss: None });
        }
    }
    bail!("the server sends nothing")
}
