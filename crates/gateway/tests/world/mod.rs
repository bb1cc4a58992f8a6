//! Network namespaces of a test's own, a gateway between them, and a broker that opens plain sockets.
//!
//! ```text
//!   guest (kso0: 198.18.0.2) -- gateway -- host (10.9.0.1) -- peer (10.9.0.2) -- far (10.10.0.2)
//! ```
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, dead_code)]

use kso_gateway::{Gateway, GatewayConfig, GatewayStats};
use kso_wire::{
    Answer, BrokerLink, Caller, Errno, Failure, Family, Reply, Request, RequestId, Submitted, TunAddresses,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

/// Flows to this port are denied.
pub const DENIED: u16 = 6666;
/// The first attempt to open a flow to this port finds too many open files.
pub const SCARCE: u16 = 6667;

static COUNT: AtomicU32 = AtomicU32::new(0);

/// Runs `f` in a network namespace.
pub fn within<R: Send>(namespace: &str, f: impl FnOnce() -> R + Send) -> R {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                enter(namespace);
                f()
            })
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

pub fn enter(namespace: &str) {
    let file = File::open(format!("/run/netns/{namespace}")).expect("a network namespace of our own");
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).expect("setns");
}

pub fn run(command: &str) -> String {
    let output = Command::new("sh").arg("-c").arg(command).output().unwrap();
    assert!(
        output.status.success(),
        "{command}: {}{}\nthis test needs root and iproute2",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub struct World {
    pub guest: String,
    pub host: String,
    pub peer: String,
    pub far: String,
    stop: Option<Sender<Control>>,
    thread: Option<std::thread::JoinHandle<()>>,
    /// Written to wake the gateway's thread.
    wake: OwnedFd,
}

enum Control {
    Stats(Sender<GatewayStats>),
    /// Pretend that so much time has passed.
    Expire(Duration, Sender<GatewayStats>),
}

impl World {
    pub fn new() -> Self {
        Self::with(GatewayConfig::default(), false)
    }

    /// The TUN is another kernel's, and its packets come as frames.
    pub fn framed() -> Self {
        Self::build(GatewayConfig::default(), false, true)
    }

    /// `late`: the broker answers later.
    pub fn with(config: GatewayConfig, late: bool) -> Self {
        Self::build(config, late, false)
    }

    fn build(config: GatewayConfig, late: bool, framed: bool) -> Self {
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = |role: &str| format!("ksogw-{}-{number}-{role}", std::process::id());
        let (guest, host, peer, far) = (name("guest"), name("host"), name("peer"), name("far"));
        run(&format!(
            "for n in {guest} {host} {peer} {far}; do ip netns add $n && ip -n $n link set lo up; done
            ip -n {host} link add v0 type veth peer name v0 netns {peer}
            ip -n {peer} link add v1 type veth peer name v1 netns {far}
            ip -n {host} addr add 10.9.0.1/24 dev v0; ip -n {host} addr add fd09::1/64 dev v0 nodad
            ip -n {peer} addr add 10.9.0.2/24 dev v0; ip -n {peer} addr add fd09::2/64 dev v0 nodad
            ip -n {peer} addr add 10.10.0.1/24 dev v1; ip -n {peer} addr add fd10::1/64 dev v1 nodad
            ip -n {far} addr add 10.10.0.2/24 dev v1; ip -n {far} addr add fd10::2/64 dev v1 nodad
            ip -n {host} link set v0 up; ip -n {peer} link set v0 up
            ip -n {peer} link set v1 up; ip -n {far} link set v1 up
            ip -n {host} route add default via 10.9.0.2; ip -n {host} -6 route add default via fd09::2
            ip -n {far} route add default via 10.10.0.1; ip -n {far} -6 route add default via fd10::1
            ip netns exec {peer} sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
            ip netns exec {host} sysctl -qw net.ipv4.icmp_ratelimit=0 net.ipv6.icmp.ratelimit=0
            ip netns exec {peer} sysctl -qw net.ipv4.icmp_ratelimit=0 net.ipv6.icmp.ratelimit=0"
        ));
        let tun = within(&guest, || {
            let tun = kso_sys::tun::create("kso0").expect("a TUN: this test needs root and /dev/net/tun");
            let before = Instant::now();
            kso_sys::tun::configure("kso0", &TunAddresses::standard(), 65_535).expect("configure");
            assert!(before.elapsed() < Duration::from_millis(100), "{:?}", before.elapsed());
            // Answers find their way at once, not when a work queue of the kernel has had its turn.
            assert!(run("ip -6 route get fd6b:736f::2").starts_with("local"));
            tun
        });
        let (stop, control) = channel();
        let wake = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
        let woken = wake.try_clone().unwrap();
        let namespace = host.clone();
        let (ready, started) = channel();
        let thread = std::thread::spawn(move || {
            enter(&namespace);
            let gateway = if framed {
                Gateway::framed(frames_of(tun), config.clone()).unwrap()
            } else {
                Gateway::new(tun, config.clone()).unwrap()
            };
            drive(gateway, config, late, &control, &woken, &ready);
        });
        started.recv().expect("the gateway has started");
        Self { guest, host, peer, far, stop: Some(stop), thread: Some(thread), wake }
    }

    fn tell(&self, control: Control) {
        self.stop.as_ref().unwrap().send(control).unwrap();
        rustix::io::write(&self.wake, &1_u64.to_ne_bytes()).unwrap();
    }

    pub fn stats(&self) -> GatewayStats {
        let (sender, receiver) = channel();
        self.tell(Control::Stats(sender));
        receiver.recv().unwrap()
    }

    pub fn expire(&self, after: Duration) -> GatewayStats {
        let (sender, receiver) = channel();
        self.tell(Control::Expire(after, sender));
        receiver.recv().unwrap()
    }

    /// A UDP socket in a namespace.
    pub fn udp(&self, namespace: &str, address: &str) -> UdpSocket {
        let socket = within(namespace, || UdpSocket::bind(address).unwrap());
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket
    }

    /// A UDP echo server, for as long as the program runs.
    pub fn udp_echo(&self, namespace: &str, address: &str) {
        let socket = self.udp(namespace, address);
        socket.set_read_timeout(None).unwrap();
        std::thread::spawn(move || {
            let mut buffer = vec![0; 65_536];
            while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(&buffer[..length], from);
            }
        });
    }

    pub fn listener(&self, namespace: &str, address: &str) -> TcpListener {
        within(namespace, || TcpListener::bind(address).unwrap())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.take();
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !std::thread::panicking()
        {
            panic!("the gateway panicked");
        }
        for namespace in [&self.guest, &self.host, &self.peer, &self.far] {
            let _ = Command::new("ip").args(["netns", "del", namespace]).status();
        }
    }
}

/// A stream of a TUN's packets, as a guest's runner makes it.
fn frames_of(tun: OwnedFd) -> OwnedFd {
    use std::io::{Read, Write};
    let tun = std::sync::Arc::new(kso_sys::tun::Tun::from_fd(tun).unwrap());
    assert!(tun.has_vnet_header());
    rustix::io::ioctl_fionbio(tun.as_fd(), false).unwrap();
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let (mut out, from) = (theirs.try_clone().unwrap(), tun.clone());
    std::thread::spawn(move || {
        let mut packet = vec![0; 70_000];
        while let Ok(length) = rustix::io::read(&*from, &mut packet) {
            let mut frame = Vec::new();
            kso_wire::frame::append_bytes(&packet[..length], &mut frame).unwrap();
            if out.write_all(&frame).is_err() {
                break;
            }
        }
    });
    std::thread::spawn(move || {
        let mut theirs = theirs;
        let mut length = [0; 4];
        while theirs.read_exact(&mut length).is_ok() {
            let mut packet = vec![0; u32::from_le_bytes(length) as usize];
            theirs.read_exact(&mut packet).unwrap();
            let _ = rustix::io::write(&*tun, &packet);
        }
    });
    ours.into()
}

fn drive(
    mut gateway: Gateway,
    config: GatewayConfig,
    late: bool,
    control: &Receiver<Control>,
    wake: &OwnedFd,
    ready: &Sender<()>,
) {
    let mut link = Link::new(config, late);
    gateway.start(&mut link).unwrap();
    answer_late(&mut gateway, &mut link);
    ready.send(()).unwrap();
    loop {
        let timeout = gateway.next_deadline().map(|at| at.saturating_duration_since(Instant::now()));
        let timeout = timeout.map(|timeout| Timespec::try_from(timeout).unwrap());
        let mut polled =
            [PollFd::from_borrowed_fd(gateway.poll_fd(), PollFlags::IN), PollFd::new(wake, PollFlags::IN)];
        poll(&mut polled, timeout.as_ref()).unwrap();
        let [packets, woken] = polled.map(|polled| polled.revents());
        if woken.contains(PollFlags::IN) {
            let mut count = [0; 8];
            let _ = rustix::io::read(wake, &mut count);
        }
        let now = Instant::now();
        if packets.contains(PollFlags::IN) {
            gateway.run_ready(now, &mut link);
        }
        answer_late(&mut gateway, &mut link);
        if gateway.next_deadline().is_some_and(|deadline| deadline <= now) {
            gateway.expire(now, &mut link);
        }
        loop {
            match control.try_recv() {
                Ok(Control::Stats(sender)) => sender.send(gateway.stats()).unwrap(),
                Ok(Control::Expire(after, sender)) => {
                    gateway.expire(now + after, &mut link);
                    sender.send(gateway.stats()).unwrap();
                }
                Err(std::sync::mpsc::TryRecvError::Empty) => break,
                Err(std::sync::mpsc::TryRecvError::Disconnected) => return,
            }
        }
    }
}

fn answer_late(gateway: &mut Gateway, link: &mut Link) {
    while let Some((id, answer)) = link.completed() {
        gateway.answered(id, answer, Instant::now(), link);
    }
}

/// A broker that opens plain sockets in the namespace of its thread.
struct Link {
    config: GatewayConfig,
    late: bool,
    waiting: VecDeque<(RequestId, Answer)>,
    ports: HashMap<SocketAddr, u16>,
    scarce: bool,
}

impl Link {
    fn new(config: GatewayConfig, late: bool) -> Self {
        Self { config, late, waiting: VecDeque::new(), ports: HashMap::new(), scarce: true }
    }

    /// The gateway's address stands for the host's loopback.
    fn translate(&self, peer: SocketAddr) -> SocketAddr {
        match peer.ip() {
            ip if !self.config.addresses.is_gateway(ip) => peer,
            IpAddr::V4(_) => SocketAddr::new(Ipv4Addr::LOCALHOST.into(), peer.port()),
            IpAddr::V6(_) => SocketAddr::new(Ipv6Addr::LOCALHOST.into(), peer.port()),
        }
    }

    fn perform(&mut self, request: Request) -> std::io::Result<(Reply, Option<OwnedFd>)> {
        match request {
            Request::OpenDatagram(open) => {
                let peer = self.translate(open.peer);
                let socket = Socket::new(Domain::for_address(peer), Type::DGRAM, None)?;
                socket.set_reuse_address(true)?;
                let any: IpAddr =
                    if peer.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
                let port = self.ports.get(&open.guest).copied().unwrap_or(0);
                socket.bind(&SocketAddr::new(any, port).into())?;
                self.ports.insert(open.guest, socket.local_addr()?.as_socket().unwrap().port());
                socket.connect(&peer.into())?;
                socket.set_nonblocking(true)?;
                Ok((Reply::Socket { local: None }, Some(socket.into())))
            }
            Request::BindDatagram(bind) => {
                let publication = &self.config.publish[bind.publication as usize];
                let address = publication.address.unwrap_or(match bind.family {
                    Family::V4 => Ipv4Addr::LOCALHOST.into(),
                    Family::V6 => Ipv6Addr::LOCALHOST.into(),
                });
                let socket = UdpSocket::bind((address, publication.outer_port))?;
                let local = socket.local_addr().ok();
                Ok((Reply::Socket { local }, Some(socket.into())))
            }
            Request::OpenEcho(open) => {
                let (domain, protocol) = match open.peer {
                    IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
                    IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
                };
                let (socket, raw) = match Socket::new(domain, Type::DGRAM, Some(protocol)) {
                    Ok(socket) => (socket, false),
                    Err(_) => (Socket::new(domain, Type::RAW, Some(protocol))?, true),
                };
                socket.connect(&SocketAddr::new(open.peer, 0).into())?;
                Ok((Reply::Echo { raw }, Some(socket.into())))
            }
            Request::Connect(connect) => {
                let peer = self.translate(connect.peer);
                let socket = Socket::new(Domain::for_address(peer), Type::STREAM, None)?;
                socket.set_nonblocking(true)?;
                match socket.connect(&SockAddr::from(peer)) {
                    Err(error) if error.raw_os_error() != Some(115) => Err(error),
                    _ => Ok((Reply::Socket { local: None }, Some(socket.into()))),
                }
            }
            // Names that begin with L have long answers.
            Request::Resolve(mut message) => {
                message[2] |= 0x80;
                if message.get(13) == Some(&b'L') {
                    message.resize(2000, 0);
                }
                Ok((Reply::Resolved(message), None))
            }
            _ => Err(std::io::ErrorKind::Unsupported.into()),
        }
    }
}

impl BrokerLink for Link {
    fn submit(&mut self, id: RequestId, _: &Caller, request: Request) -> Submitted {
        let port = match &request {
            Request::OpenDatagram(open) => open.peer.port(),
            Request::Connect(connect) => connect.peer.port(),
            _ => 0,
        };
        let answer = if port == DENIED {
            Answer::plain(Err(Failure::denied(Errno::EACCES)))
        } else if port == SCARCE && std::mem::take(&mut self.scarce) {
            Answer::plain(Err(Failure::kernel(Errno::EMFILE)))
        } else {
            match self.perform(request) {
                Ok((reply, Some(descriptor))) => Answer::with(reply, descriptor),
                Ok((reply, None)) => Answer::plain(Ok(reply)),
                Err(error) => Answer::plain(Err(Failure::kernel(kso_sys::errno::of(&error)))),
            }
        };
        if self.late {
            self.waiting.push_back((id, answer));
            Submitted::Pending
        } else {
            Submitted::Done(answer)
        }
    }

    fn forget(&mut self, id: RequestId) {
        self.waiting.retain(|(waiting, _)| *waiting != id);
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn completed(&mut self) -> Option<(RequestId, Answer)> {
        self.waiting.pop_front()
    }
}
