//! Servers that play the outside.

use crate::{Authority, Netns, Running, argv};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

/// HTTP on port 80 and HTTPS on port 443 of all the origin's addresses (`tests/programs/http_origin.py`).
#[derive(Debug)]
pub struct HttpOrigin {
    process: Running,
}

impl HttpOrigin {
    pub(crate) fn start(netns: &Netns, authority: &Authority) -> Self {
        let words = ["ip", "netns", "exec", netns.name(), "/usr/bin/python3", "-u"];
        let mut process = argv(words)
            .arg(crate::program("http_origin.py"))
            .arg(authority.certificate.display().to_string())
            .arg(authority.key.display().to_string())
            .spawn();
        process.wait_for("ready");
        Self { process }
    }

    /// The requests it saw, one line each.
    pub fn log(&self) -> String {
        self.process.text()
    }
}

/// A TCP server on a thread per connection. What it does with a connection, its first byte says:
///
/// `e` echo · `h` half-close at once, then echo what comes as `got N` at the other's half-close ·
/// `r` reset · `a` the peer's address · `c` close · `s` say nothing · `f` a flood of 8 MiB, then close.
#[derive(Debug)]
pub struct EchoServer {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    accepted: Arc<AtomicUsize>,
}

fn serve(mut stream: TcpStream, peer: SocketAddr) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut what = [0; 1];
    if stream.read(&mut what)? == 0 {
        return Ok(());
    }
    match what[0] {
        b'e' => {
            let mut buffer = vec![0; 65536];
            loop {
                let n = stream.read(&mut buffer)?;
                if n == 0 {
                    return Ok(());
                }
                stream.write_all(&buffer[..n])?;
            }
        }
        b'h' => {
            stream.write_all(b"bye\n")?;
            stream.shutdown(Shutdown::Write)?;
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest)?;
            Ok(())
        }
        b'g' => {
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest)?;
            stream.write_all(format!("got {}\n", rest.len()).as_bytes())
        }
        b'r' => socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)),
        b'a' => stream.write_all(format!("{} {}\n", peer.ip().to_canonical(), peer.port()).as_bytes()),
        b's' => {
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).map(drop)
        }
        b'f' => {
            let block = vec![b'f'; 1 << 16];
            (0..128).try_for_each(|_| stream.write_all(&block))
        }
        _ => Ok(()),
    }
}

impl EchoServer {
    /// Listens on `address` in `netns`.
    pub fn start(netns: &Netns, address: &str) -> Self {
        let listener = netns.listen(address);
        let address = listener.local_addr().expect("bound");
        let (stop, accepted) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (stopped, count) = (stop.clone(), accepted.clone());
        listener.set_nonblocking(true).expect("non-blocking");
        std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, peer)) => {
                        count.fetch_add(1, Ordering::Relaxed);
                        let _ = stream.set_nonblocking(false);
                        std::thread::spawn(move || serve(stream, peer));
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(1)),
                }
            }
        });
        Self { address, stop, accepted }
    }

    /// Connections accepted so far.
    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::Relaxed)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for EchoServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// A UDP server: echoes each datagram; `who` is answered with the sender's address, `big N` with N bytes.
#[derive(Debug)]
pub struct UdpEcho {
    stop: Arc<AtomicBool>,
    received: Arc<AtomicUsize>,
}

impl UdpEcho {
    /// Binds `address` in `netns`.
    pub fn start(netns: &Netns, address: &str) -> Self {
        let socket: UdpSocket = netns.udp(address);
        socket.set_read_timeout(Some(Duration::from_millis(50))).expect("a limit");
        let _ = socket2::SockRef::from(&socket).set_recv_buffer_size(4 << 20);
        let (stop, received) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (stopped, count) = (stop.clone(), received.clone());
        std::thread::spawn(move || {
            let mut buffer = vec![0; 65536];
            while !stopped.load(Ordering::Relaxed) {
                let Ok((n, peer)) = socket.recv_from(&mut buffer) else { continue };
                count.fetch_add(1, Ordering::Relaxed);
                let datagram = &buffer[..n];
                let answer = match std::str::from_utf8(datagram) {
                    Ok("who") => format!("{} {}", peer.ip().to_canonical(), peer.port()).into_bytes(),
                    Ok(text) if text.starts_with("big ") => {
                        vec![b'b'; text[4..].trim().parse::<usize>().unwrap_or(0).min(65507)]
                    }
                    _ => datagram.to_vec(),
                };
                let _ = socket.send_to(&answer, peer);
            }
        });
        Self { stop, received }
    }

    /// Datagrams received so far.
    pub fn received(&self) -> usize {
        self.received.load(Ordering::Relaxed)
    }
}

impl Drop for UdpEcho {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// A listener that never accepts and whose backlog is full: a connect to it stays pending.
#[derive(Debug)]
pub struct FullBacklog {
    listener: TcpListener,
    _fillers: Vec<Socket>,
}

impl FullBacklog {
    /// Listens on `address` in `netns`.
    pub fn start(netns: &Netns, address: &str) -> Self {
        let address: SocketAddr = address.parse().expect("an address");
        let (listener, fillers) = netns.enter(|| {
            let listener = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))
                .expect("a socket");
            listener.set_reuse_address(true).expect("an option");
            listener.bind(&SockAddr::from(address)).expect("bind");
            listener.listen(0).expect("listen");
            let fillers = (0..3)
                .map(|_| {
                    let socket =
                        Socket::new(Domain::for_address(address), Type::STREAM, None).expect("a socket");
                    socket.set_nonblocking(true).expect("non-blocking");
                    let _ = socket.connect(&SockAddr::from(address));
                    socket
                })
                .collect();
            (TcpListener::from(listener), fillers)
        });
        std::thread::sleep(Duration::from_millis(50));
        Self { listener, _fillers: fillers }
    }

    /// Accepts all that wait, which lets pending connects through at their next SYN.
    pub fn drain(&self) -> Vec<TcpStream> {
        self.listener.set_nonblocking(true).expect("non-blocking");
        std::iter::from_fn(|| self.listener.accept().ok().map(|(stream, _)| stream)).collect()
    }
}
