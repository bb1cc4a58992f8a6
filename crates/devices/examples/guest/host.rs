//! The host's side: QEMU, a hub, and an outside that lets everything through.

use crate::{image, services};
use kso_devices::vsock::{End, Endpoint, GuestId, Hub, Limits, Outside, Verdict};
use kso_wire::Errno;
use kso_wire::guest::{StreamKey, address_of, ports};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::{Domain, Socket, Type};
use std::collections::HashSet;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The port of the guest's listener, and that of the host's that leads to it.
pub const PUBLISHED: u16 = 7000;
pub const SERVICES: u16 = 7001;

#[derive(Default)]
struct Broker {
    output: Vec<u8>,
    open: HashSet<(GuestId, StreamKey)>,
    ended: u64,
    failed: u64,
    gone: bool,
    verbose: bool,
    second: Option<GuestId>,
}

impl Outside for Broker {
    fn request(&mut self, guest: GuestId, stream: StreamKey) -> Verdict {
        if self.verbose {
            eprintln!("request {stream:?}");
        }
        if stream.peer_cid == 2 && stream.peer_port == ports::CONTROL {
            return Verdict::Control;
        }
        // To the guest itself, or another one, memory to memory.
        if stream.peer_cid == u32::from(Ipv4Addr::new(10, 0, 0, 1)) {
            let there = StreamKey {
                local_port: stream.peer_port,
                peer_cid: u32::from(Ipv4Addr::new(10, 0, 0, 2)),
                peer_port: stream.local_port,
            };
            return Verdict::Guest(self.second.unwrap_or(guest), there);
        }
        let Some(address) = address_of(stream.peer_cid) else { return Verdict::Refused(Errno::ECONNREFUSED) };
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket.set_tcp_nodelay(true).unwrap();
        match socket.connect(&SocketAddrV4::new(address, stream.peer_port as u16).into()) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(115) => {}
            Err(error) => return Verdict::Refused(kso_sys::errno::of(&error)),
        }
        Verdict::Socket(OwnedFd::from(socket))
    }

    fn established(&mut self, guest: GuestId, stream: StreamKey, _: Option<BorrowedFd<'_>>) {
        assert!(self.open.insert((guest, stream)), "{stream:?} twice");
    }

    fn failed(&mut self, _: GuestId, stream: StreamKey, errno: Errno) {
        self.failed += 1;
        if self.verbose {
            eprintln!("failed {stream:?}: {errno:?}");
        }
    }

    fn rejected(&mut self, _: GuestId, stream: StreamKey, _: OwnedFd) {
        eprintln!("rejected {stream:?}");
    }

    fn ended(&mut self, guest: GuestId, stream: StreamKey, end: End) {
        let control = stream.peer_cid == 2;
        assert!(control || self.open.remove(&(guest, stream)), "{stream:?} was not open");
        self.ended += 1;
        if self.verbose {
            eprintln!("ended {stream:?} {end:?}");
        }
    }

    fn control(&mut self, _: GuestId, bytes: &[u8]) -> Result<(), String> {
        self.output.extend_from_slice(bytes);
        Ok(())
    }

    fn control_output(&mut self, _: GuestId) -> Option<&mut Vec<u8>> {
        Some(&mut self.output)
    }

    fn gone(&mut self, guest: GuestId) {
        self.open.retain(|(other, _)| *other != guest);
        self.gone = true;
    }
}

pub fn tsc_khz() -> u64 {
    // Kernels report it in the log and in BogoMIPS, which is twice the MHz.
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let line = info.lines().find(|line| line.starts_with("bogomips")).unwrap();
    (line.split(':').nth(1).unwrap().trim().parse::<f64>().unwrap() * 500.0) as u64
}

fn qemu(kernel: &Path, initrd: &Path, socket: &Path, words: &str) -> Vmm {
    let mut command = Command::new("qemu-system-x86_64");
    let append = format!(
        "console=ttyS0 panic=-1 quiet tsc=reliable tsc_early_khz={} {} -- {words}",
        tsc_khz(),
        std::env::var("KSO_APPEND").unwrap_or_default()
    );
    command
        .args(["-M", "microvm,accel=tcg,rtc=on,memory-backend=mem"])
        .args([
            "-object",
            "memory-backend-memfd,id=mem,size=512M,share=on",
            "-m",
            "512",
            "-smp",
            "1,maxcpus=2",
        ])
        .args([
            "-cpu",
            "max,-erms,-smap,-smep,-la57,-pku,-umip",
            "-no-reboot",
            "-nodefaults",
            "-no-user-config",
        ])
        .args(["-global", "virtio-mmio.force-legacy=false", "-serial", "stdio", "-display", "none"])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initrd)
        .args(["-append", &append])
        .arg("-chardev")
        .arg(format!("socket,id=cvs,path={}", socket.display()))
        .args(["-device", "vhost-user-vsock-device,chardev=cvs"])
        .stdin(Stdio::null());
    if let Ok(tap) = std::env::var("KSO_TAP") {
        command
            .args(["-netdev", &format!("tap,id=n0,ifname={tap},script=no,downscript=no")])
            .args(["-device", "virtio-net-device,netdev=n0"]);
    }
    Vmm(command.spawn().expect("qemu-system-x86_64"))
}

/// Ends with this program, also when a check fails.
struct Vmm(Child);

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn run(mode: &str) -> i32 {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(std::env::var("KSO_LOG").unwrap_or("warn".into()))
        .init();
    let kernel = PathBuf::from(std::env::var("KSO_KERNEL").unwrap_or("/tmp/kernels/6.1".into()));
    let scratch = tempfile::tempdir().unwrap();
    let initrd = scratch.path().join("initrd");
    std::fs::write(&initrd, image::build(&kernel)).unwrap();
    let vmlinuz = image::kernel(&kernel);

    let services = TcpListener::bind(("0.0.0.0", SERVICES)).unwrap();
    std::thread::spawn(move || services::serve(services));
    let published = TcpListener::bind(("127.0.0.1", PUBLISHED)).unwrap();
    published.set_nonblocking(true).unwrap();

    let mut hub = Hub::new(Limits::default()).unwrap();
    let socket = scratch.path().join("vsock");
    let guest = hub.add_guest(Endpoint::Listener(UnixListener::bind(&socket).unwrap())).unwrap();
    let mut broker = Broker { verbose: std::env::var("KSO_VERBOSE").is_ok(), ..Broker::default() };
    let mut vmm = qemu(&vmlinuz, &initrd, &socket, mode);

    let started = Instant::now();
    let limit = Duration::from_secs(std::env::var("KSO_SECONDS").map_or(120, |text| text.parse().unwrap()));
    let status = loop {
        if broker.gone
            && let Some(status) = vmm.0.try_wait().unwrap()
        {
            break status;
        }
        assert!(started.elapsed() < limit, "the guest takes too long");
        let wait = hub.next_deadline().map(|at| at.saturating_duration_since(Instant::now()));
        let wait = Timespec::try_from(wait.unwrap_or(if broker.gone {
            Duration::from_millis(10)
        } else {
            Duration::from_secs(1)
        }))
        .unwrap();
        let mut polled =
            [PollFd::new(&published, PollFlags::IN), PollFd::from_borrowed_fd(hub.poll_fd(), PollFlags::IN)];
        poll(&mut polled, Some(&wait)).unwrap();
        let came = polled[0].revents().contains(PollFlags::IN);
        if let Some(Ok((stream, SocketAddrV4Pair(peer)))) = came.then(|| published.accept().map(pair)) {
            stream.set_nonblocking(true).unwrap();
            let key = StreamKey {
                local_port: PUBLISHED.into(),
                peer_cid: (*peer.ip()).into(),
                peer_port: peer.port().into(),
            };
            hub.dial(guest, key, stream.into()).unwrap();
        }
        hub.run_ready(&mut broker);
    };
    eprintln!(
        "guest is gone, {status}; {} streams ended, {} failed, {} left",
        broker.ended,
        broker.failed,
        broker.open.len()
    );
    i32::from(!status.success())
}

struct SocketAddrV4Pair(SocketAddrV4);

fn pair(
    (stream, peer): (std::net::TcpStream, std::net::SocketAddr),
) -> (std::net::TcpStream, SocketAddrV4Pair) {
    let std::net::SocketAddr::V4(peer) = peer else { panic!("not IPv4") };
    (stream, SocketAddrV4Pair(peer))
}
