//! A whole gateway on a true TUN device, in a network namespace of the fuzzer's own: the sandbox's packets, the
//! broker's answers, the outside's bytes and time come in any order.
//!
//! The input is 16 bytes that say how the broker answers, then steps ([`World::step`]). When all flows have had
//! their time, nothing may be left: no flow, no descriptor.
#![no_main]

use kso_gateway::{Gateway, GatewayConfig};
use kso_wire::{
    Answer, BrokerLink, Caller, Errno, Failure, Protocol, Publication, Reply, Request, RequestId, Submitted,
    TunAddresses,
};
use libfuzzer_sys::fuzz_target;
use std::cell::RefCell;
use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

const DEVICE: &str = "fuzz0";
const PUBLISHED: u16 = 9999;

/// The input, read from its beginning; zeros after its end.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn short(&mut self) -> u16 {
        u16::from_be_bytes([self.byte(), self.byte()])
    }

    fn bytes(&mut self, length: usize) -> &'a [u8] {
        let (first, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        first
    }
}

/// A broker that answers as the input says.
struct Broker {
    modes: [u8; 16],
    asked: usize,
    pending: Vec<(RequestId, Request)>,
    streams: SocketAddr,
    datagrams: SocketAddr,
}

impl Broker {
    fn answer(&self, request: &Request, mode: u8) -> Answer {
        match mode % 16 {
            0 => return Answer::plain(Err(Failure::denied(Errno::EACCES))),
            1 => {
                return Answer::plain(Err(Failure::kernel(Errno::ALL[usize::from(mode) % Errno::ALL.len()])));
            }
            // Answers that do not fit.
            2 => return Answer::plain(Ok(Reply::StayInside)),
            3 => return Answer::plain(Ok(Reply::Socket { local: None })),
            _ => {}
        }
        let socket =
            |local: UdpSocket| Answer::with(Reply::Socket { local: local.local_addr().ok() }, local.into());
        match request {
            Request::Connect(_) => {
                // Nobody listens at port 1.
                let to = if mode & 16 == 0 { self.streams } else { SocketAddr::new(self.streams.ip(), 1) };
                match connecting(to) {
                    Some(fd) => Answer::with(Reply::Socket { local: None }, fd),
                    None => Answer::plain(Err(Failure::kernel(Errno::ECONNREFUSED))),
                }
            }
            Request::OpenDatagram(_) => {
                let to =
                    if mode & 16 == 0 { self.datagrams } else { SocketAddr::new(self.datagrams.ip(), 1) };
                let local = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a UDP socket");
                local.connect(to).expect("loopback");
                local.set_nonblocking(true).expect("a flag");
                socket(local)
            }
            Request::BindDatagram(_) => {
                let local = UdpSocket::bind((Ipv4Addr::LOCALHOST, PUBLISHED)).expect("a UDP socket");
                local.set_nonblocking(true).expect("a flag");
                socket(local)
            }
            Request::OpenEcho(_) => match raw_icmp() {
                Some(fd) => Answer::with(Reply::Echo { raw: true }, fd),
                None => Answer::plain(Err(Failure::kernel(Errno::EPERM))),
            },
            Request::Resolve(query) => {
                let mut answer = query.clone();
                if let Some(flags) = answer.get_mut(2) {
                    *flags |= 0x80;
                }
                answer.resize(answer.len() + usize::from(mode) * 40, mode);
                Answer::plain(Ok(Reply::Resolved(answer)))
            }
            Request::Listen(_) | Request::Release(_) => Answer::plain(Ok(Reply::StayInside)),
        }
    }
}

impl BrokerLink for Broker {
    fn submit(&mut self, id: RequestId, _caller: &Caller, request: Request) -> Submitted {
        assert!(id.is_gateway());
        let mode = self.modes[self.asked % self.modes.len()];
        self.asked += 1;
        if mode & 0x80 != 0 {
            self.pending.push((id, request));
            return Submitted::Pending;
        }
        Submitted::Done(self.answer(&request, mode))
    }

    fn forget(&mut self, id: RequestId) {
        self.pending.retain(|(pending, _)| *pending != id);
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn completed(&mut self) -> Option<(RequestId, Answer)> {
        None
    }
}

fn connecting(to: SocketAddr) -> Option<OwnedFd> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with};
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).ok()?;
    match connect(&socket, &to) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Some(socket),
        Err(_) => None,
    }
}

fn raw_icmp() -> Option<OwnedFd> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, ipproto, socket_with};
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::INET, SocketType::RAW, flags, Some(ipproto::ICMP)).ok()?;
    connect(&socket, &SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).ok()?;
    Some(socket)
}

/// The sandbox's side of a TCP connection: what it sends next, and what it expects.
#[derive(Clone, Copy, Default)]
struct Sequence {
    own: u32,
    other: u32,
}

struct World {
    gateway: Gateway,
    /// Puts packets into the TUN as the sandbox's kernel would, and sees those that the gateway writes.
    wire: OwnedFd,
    listener: TcpListener,
    datagrams: UdpSocket,
    now: Instant,
    /// The lowest free descriptor when nothing is open.
    lowest: i32,
    /// And how many sockets are open then.
    sockets: usize,
}

/// What one input made.
struct Run {
    broker: Broker,
    accepted: Vec<TcpStream>,
    sequences: HashMap<u16, Sequence>,
    sender: Option<SocketAddr>,
}

const GUEST_V4: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 2);

fn guest_v6() -> Ipv6Addr {
    Ipv6Addr::new(0xfd6b, 0x736f, 0, 0, 0, 0, 0, 2)
}

fn destinations(six: bool, index: u8) -> IpAddr {
    match (six, index % 4) {
        (false, 0) => Ipv4Addr::new(198, 18, 0, 1).into(),
        (false, 1) => Ipv4Addr::new(127, 0, 0, 1).into(),
        (false, 2) => Ipv4Addr::new(192, 0, 2, 1).into(),
        (false, _) => Ipv4Addr::new(224, 0, 0, 251).into(),
        (true, 0) => Ipv6Addr::new(0xfd6b, 0x736f, 0, 0, 0, 0, 0, 1).into(),
        (true, 1) => Ipv6Addr::LOCALHOST.into(),
        (true, 2) => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into(),
        (true, _) => Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0xfb).into(),
    }
}

fn sum(bytes: &[u8], start: u32) -> u32 {
    bytes.chunks(2).fold(start, |sum, pair| {
        let sum = sum + (u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)));
        (sum & 0xffff) + (sum >> 16)
    })
}

/// An IP packet from the sandbox with right checksums. `at`: where the checksum of the payload is.
fn packet(to: IpAddr, protocol: u8, mut payload: Vec<u8>, at: usize) -> Vec<u8> {
    let length = payload.len() as u16;
    let (mut packet, addresses) = match to {
        IpAddr::V4(to) => {
            let mut header = vec![0x45, 0, 0, 0, 0, 1, 0, 0, 64, protocol, 0, 0];
            header[2..4].copy_from_slice(&(length.saturating_add(20)).to_be_bytes());
            header.extend(GUEST_V4.octets());
            header.extend(to.octets());
            let check = !(sum(&header, 0) as u16);
            header[10..12].copy_from_slice(&check.to_be_bytes());
            (header, [&GUEST_V4.octets()[..], &to.octets()].concat())
        }
        IpAddr::V6(to) => {
            let mut header = vec![0x60, 0, 0, 0, 0, 0, protocol, 64];
            header[4..6].copy_from_slice(&length.to_be_bytes());
            header.extend(guest_v6().octets());
            header.extend(to.octets());
            (header, [guest_v6().octets(), to.octets()].concat())
        }
    };
    let pseudo = if protocol == 1 { 0 } else { sum(&addresses, u32::from(protocol) + u32::from(length)) };
    if let Some(place) = payload.get_mut(at..at + 2) {
        place.fill(0);
        let check = match !(sum(&payload, pseudo) as u16) {
            0 => 0xffff_u16,
            check => check,
        };
        payload[at..at + 2].copy_from_slice(&check.to_be_bytes());
    }
    packet.extend(payload);
    packet
}

impl World {
    fn new() -> Self {
        // SAFETY: changes only the network namespace of this thread.
        unsafe {
            assert!(
                libc::unshare(libc::CLONE_NEWNET) == 0,
                "a network namespace is needed; without root, run under `unshare -Ur`: {}",
                std::io::Error::last_os_error()
            );
        }
        let tun = kso_sys::tun::create(DEVICE).expect("a TUN device");
        // Other addresses than the sandbox's: else the kernel here would answer what the gateway sends.
        let pair = |host| {
            [
                Ipv4Addr::new(10, 9, 9, host).into(),
                Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, host.into()).into(),
            ]
        };
        let elsewhere = TunAddresses { guest: pair(2), gateway: pair(1) };
        kso_sys::tun::configure(DEVICE, &elsewhere, 65_535).expect("addresses");
        let publish = vec![Publication {
            address: Some(Ipv4Addr::LOCALHOST.into()),
            outer_port: PUBLISHED,
            inner_port: 53,
            protocol: Protocol::Udp,
        }];
        let config = GatewayConfig { publish, ..GatewayConfig::default() };
        let gateway = Gateway::new(tun, config).expect("a gateway");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a listener");
        listener.set_nonblocking(true).expect("a flag");
        let datagrams = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket");
        datagrams.set_nonblocking(true).expect("a flag");
        let mut world = Self {
            gateway,
            wire: packet_socket(),
            listener,
            datagrams,
            now: Instant::now(),
            lowest: 0,
            sockets: 0,
        };
        let mut run = world.run([4; 16]);
        world.gateway.start(&mut run.broker).expect("the published port");
        world.end(run);
        (world.lowest, world.sockets) = (lowest_free(), sockets());
        world
    }

    fn run(&self, modes: [u8; 16]) -> Run {
        let streams = self.listener.local_addr().expect("bound");
        let datagrams = self.datagrams.local_addr().expect("bound");
        let broker = Broker { modes, asked: 0, pending: Vec::new(), streams, datagrams };
        Run { broker, accepted: Vec::new(), sequences: HashMap::new(), sender: None }
    }

    fn step(&mut self, run: &mut Run, input: &mut Input<'_>) {
        match input.byte() % 8 {
            0 => {
                let length = usize::from(input.short() % 2000);
                self.inject(input.bytes(length));
            }
            1 => {
                let (flags, port, length) = (input.byte(), input.byte(), input.short() % 3000);
                let mut segment = vec![0x10, port & 3, 0, if flags & 4 == 0 { 53 } else { 80 }];
                segment.extend((length + 8).to_be_bytes());
                segment.extend([0, 0]);
                // A DNS question, or anything.
                segment.extend_from_slice(input.bytes(usize::from(length)));
                segment.resize(usize::from(length) + 8, port);
                self.inject(&packet(destinations(flags & 8 != 0, flags), 17, segment, 6));
            }
            2 => self.segment(run, input),
            3 => {
                let shift = input.byte() % 20;
                self.now += Duration::from_millis(u64::from(input.short()) << shift >> 4);
                self.gateway.expire(self.now, &mut run.broker);
            }
            4 if !run.broker.pending.is_empty() => {
                let index = usize::from(input.byte()) % run.broker.pending.len();
                let (id, request) = run.broker.pending.swap_remove(index);
                let answer = run.broker.answer(&request, input.byte());
                self.gateway.answered(id, answer, self.now, &mut run.broker);
            }
            5 => self.outside(run, input),
            6 => {
                let mut buffer = [0; 4096];
                while let Ok((_, sender)) = self.datagrams.recv_from(&mut buffer) {
                    run.sender = Some(sender);
                }
                let length = usize::from(input.short());
                let payload = vec![7; length.min(65_507)];
                let to = match run.sender {
                    Some(sender) if length & 1 == 0 => sender,
                    _ => SocketAddr::from((Ipv4Addr::LOCALHOST, PUBLISHED)),
                };
                let _ = self.datagrams.send_to(&payload, to);
            }
            _ => {
                let (flags, length) = (input.byte(), usize::from(input.short() % 3000));
                let six = flags & 8 != 0;
                let mut message = vec![if six { 128 } else { 8 }, 0, 0, 0, 0, flags & 3, 0, 1];
                message.resize(length + 8, flags);
                self.inject(&packet(destinations(six, flags), if six { 58 } else { 1 }, message, 2));
            }
        }
        self.gateway.run_ready(self.now, &mut run.broker);
        self.learn(run);
        if let Ok((stream, _)) = self.listener.accept() {
            let _ = stream.set_nonblocking(true);
            run.accepted.push(stream);
        }
    }

    /// A TCP segment near to what the gateway expects.
    fn segment(&mut self, run: &mut Run, input: &mut Input<'_>) {
        let (flow, flags, length) = (input.byte(), input.byte(), input.short() % 3000);
        let (behind, acknowledged) = (i32::from(input.byte() as i8), i32::from(input.byte() as i8));
        let window = input.short();
        let port = 5000 + u16::from(flow & 3);
        let state = run.sequences.entry(port).or_default();
        let own = state.own.wrapping_add_signed(behind / 8);
        let other = state.other.wrapping_add_signed(acknowledged / 8);
        let mut segment = port.to_be_bytes().to_vec();
        segment.extend(if flow & 4 == 0 { 80_u16 } else { 53 }.to_be_bytes());
        segment.extend(own.to_be_bytes());
        segment.extend(other.to_be_bytes());
        segment.extend([0x50, flags]);
        segment.extend(window.to_be_bytes());
        segment.extend([0; 4]);
        let length = if flags & 2 != 0 { 0 } else { length };
        segment.extend_from_slice(input.bytes(usize::from(length)));
        segment.resize(usize::from(length) + 20, flow);
        let step = u32::from(length) + u32::from(flags & 1) + u32::from(flags >> 1 & 1);
        state.own = own.wrapping_add(step);
        let peer = if flow & 4 == 0 { 2 } else { 0 };
        self.inject(&packet(destinations(flow & 8 != 0, peer), 6, segment, 16));
    }

    /// Something happens at the other end of a stream.
    fn outside(&mut self, run: &mut Run, input: &mut Input<'_>) {
        let (what, which, length) = (input.byte(), input.byte(), input.short());
        if run.accepted.is_empty() {
            return;
        }
        let which = usize::from(which) % run.accepted.len();
        let stream = &mut run.accepted[which];
        match what % 5 {
            0 => drop(stream.write(&vec![1; usize::from(length)])),
            1 => drop(stream.read(&mut vec![0; usize::from(length)])),
            2 => drop(stream.shutdown(Shutdown::Write)),
            3 => drop(stream.shutdown(Shutdown::Both)),
            _ => drop(run.accepted.swap_remove(which)),
        }
    }

    fn inject(&self, packet: &[u8]) {
        // SAFETY: the buffer and its length belong together; the descriptor is open.
        unsafe {
            libc::send(self.wire.as_raw_fd(), packet.as_ptr().cast(), packet.len(), libc::MSG_DONTWAIT)
        };
    }

    /// Looks at what the gateway wrote, for the sequence numbers.
    fn learn(&self, run: &mut Run) {
        let mut buffer = [0_u8; 128];
        loop {
            // SAFETY: the buffer and its length belong together; the descriptor is open.
            let read = unsafe {
                let flags = libc::MSG_DONTWAIT | libc::MSG_TRUNC;
                libc::recv(self.wire.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), flags)
            };
            let Ok(length) = usize::try_from(read) else { return };
            let (start, protocol) = match buffer[0] >> 4 {
                4 => (usize::from(buffer[0] & 15) * 4, buffer[9]),
                6 => (40, buffer[6]),
                _ => continue,
            };
            let Some(tcp) = buffer.get(start..start + 20).filter(|_| protocol == 6 && length >= start + 20)
            else {
                continue;
            };
            let port = u16::from_be_bytes([tcp[2], tcp[3]]);
            let header = usize::from(tcp[12] >> 4) * 4;
            let payload = length.saturating_sub(start + header) as u32;
            let ends = u32::from(tcp[13] & 1) + u32::from(tcp[13] >> 1 & 1);
            let state = run.sequences.entry(port).or_default();
            state.other = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]).wrapping_add(payload + ends);
        }
    }

    /// Everything has had its time: nothing is left.
    fn end(&mut self, mut run: Run) {
        run.accepted.clear();
        while let Ok((stream, _)) = self.listener.accept() {
            drop(stream);
        }
        for (id, request) in std::mem::take(&mut run.broker.pending) {
            let answer = run.broker.answer(&request, 0);
            self.gateway.answered(id, answer, self.now, &mut run.broker);
        }
        run.broker.modes = [0; 16];
        for _ in 0..12 {
            self.gateway.run_ready(self.now, &mut run.broker);
            self.now += Duration::from_secs(24 * 3600);
            self.gateway.expire(self.now, &mut run.broker);
        }
        while let Ok((stream, _)) = self.listener.accept() {
            drop(stream);
        }
        self.learn(&mut run);
        let mut buffer = [0; 1];
        while self.datagrams.recv_from(&mut buffer).is_ok() {}
        let stats = self.gateway.stats();
        assert_eq!((stats.flows, stats.echoes, stats.streams), (0, 0, 0), "{stats:?}");
    }
}

fn lowest_free() -> i32 {
    // SAFETY: a duplicate that is closed at once.
    unsafe {
        let fd = libc::dup(0);
        libc::close(fd);
        fd
    }
}

fn sockets() -> usize {
    let list = std::fs::read_dir("/proc/self/fd").expect("procfs");
    let target = |entry: &std::fs::DirEntry| std::fs::read_link(entry.path()).unwrap_or_default();
    list.flatten().filter(|entry| target(entry).to_string_lossy().starts_with("socket:")).count()
}

/// A packet socket on the TUN device (`packet(7)`).
fn packet_socket() -> OwnedFd {
    // SAFETY: plain system calls with structures that live through them; the descriptor is new.
    unsafe {
        let all = (libc::ETH_P_ALL as u16).to_be();
        let raw = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(all));
        assert!(raw >= 0, "{}", std::io::Error::last_os_error());
        let socket = OwnedFd::from_raw_fd(raw);
        let name = std::ffi::CString::new(DEVICE).expect("no NUL");
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = all;
        address.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as i32;
        let length = size_of::<libc::sockaddr_ll>() as u32;
        let bound = libc::bind(raw, std::ptr::from_ref(&address).cast(), length);
        assert_eq!(bound, 0, "{}", std::io::Error::last_os_error());
        socket
    }
}

thread_local! {
    static WORLD: RefCell<World> = RefCell::new(World::new());
}

fuzz_target!(|bytes: &[u8]| {
    let Some((modes, bytes)) = bytes.split_first_chunk::<16>() else { return };
    WORLD.with_borrow_mut(|world| {
        let mut run = world.run(*modes);
        let mut input = Input(bytes);
        for _ in 0..200 {
            if input.0.is_empty() {
                break;
            }
            world.step(&mut run, &mut input);
        }
        world.end(run);
        if lowest_free() != world.lowest {
            // The sanitizer's symbolizer may have taken some: only sockets count.
            assert_eq!(sockets(), world.sockets, "a descriptor was left");
        }
    });
});
