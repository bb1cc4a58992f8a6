//! External kernels for programs under test: gVisor, and Linux in a virtual machine, on cables to the origin.

use crate::{Running, World, argv, sh};
use rustix::process::{Pid, Signal, kill_process};
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How a kernel is made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Death {
    /// Its process is killed.
    Kill,
    /// It panics.
    Panic,
    /// Its process is stopped.
    Freeze,
}

impl Death {
    /// In a word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill -9",
            Self::Panic => "panic",
            Self::Freeze => "freeze",
        }
    }
}

/// A kernel that tests can make fail.
#[derive(Debug)]
pub struct External {
    /// As routes call it.
    pub name: &'static str,
    /// Its address.
    pub address: &'static str,
    /// What `--kernel` and `--external` take.
    pub flag: String,
    /// Its QEMU's monitor.
    monitor: Option<String>,
}

/// Whether gVisor is installed; says so if not.
pub fn has_gvisor() -> bool {
    let place = "command -v runsc || test -x \"$HOME/.cache/kso/gvisor/usr/bin/runsc\"";
    let installed = std::env::var_os("KSO_RUNSC").is_some() || sh(place).run().code() == Some(0);
    if !installed {
        eprintln!("runsc is not installed: NOT TESTED (kso doctor says how)");
    }
    installed
}

impl External {
    /// gVisor; `None` where it is not installed.
    pub fn gvisor(world: &World) -> Option<Self> {
        if !has_gvisor() {
            return None;
        }
        let cable = format!("attach=netns:/run/netns/{}", world.origin.name());
        let flag = format!("gvisor,address=10.79.0.2/24,gateway=10.79.0.1,patience_ms=3000,{cable}");
        Some(Self { name: "gvisor", address: "10.79.0.2", flag, monitor: None })
    }

    /// A Linux other than this system's own, if there is one; `more` settings.
    pub fn machine(world: &World, more: &str) -> Self {
        let known = world.kso_command(["kernels"]).run().ok().text();
        let kernel = if known.contains(" 6.12.") { "6.12" } else { "6.1" };
        let monitor = world.path("monitor");
        let flag = format!(
            "deb=vm,kernel={kernel},address=10.80.0.2/24,gateway=10.80.0.1,patience_ms=3000,\
             attach=netns:/run/netns/{},append=unknown_nmi_panic,append=sysctl.kernel.panic_on_unrecovered_nmi=1,\
             qemu=-monitor,qemu=unix:{monitor},,server=on,,wait=off{more}",
            world.origin.name()
        );
        Self { name: "deb", address: "10.80.0.2", flag, monitor: Some(monitor) }
    }

    /// Its process on the host, QEMU or gVisor's sandbox, under this kso.
    pub fn process(&self, kso: &Running) -> Option<Pid> {
        let what = match &self.monitor {
            Some(monitor) => format!("qemu-system.*{monitor}"),
            // It has no environment by which it could be found.
            None => format!("runsc-sandbox.*kso-{}-", kso.pid()),
        };
        let found = argv(["pgrep", "-f", &what]).run().text();
        Pid::from_raw(found.split_whitespace().next()?.parse().ok()?)
    }

    /// Makes it fail.
    #[track_caller]
    pub fn die(&self, kso: &Running, death: Death) {
        let process = self.process(kso).expect("it runs");
        match (death, &self.monitor) {
            (Death::Kill, _) => kill_process(process, Signal::KILL).expect("kill"),
            (Death::Freeze, _) => kill_process(process, Signal::STOP).expect("stop"),
            (Death::Panic, Some(monitor)) => {
                let mut monitor = UnixStream::connect(monitor).expect("QEMU's monitor");
                monitor.write_all(b"nmi\n").expect("it listens");
                // It answers, or is gone: until then the command may not have been read.
                let _ = monitor.set_read_timeout(Some(Duration::from_secs(10)));
                let mut byte = [0; 256];
                while let Ok(1..) = std::io::Read::read(&mut monitor, &mut byte) {
                    if byte.contains(&b'i') {
                        break;
                    }
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            (Death::Panic, None) => panic!("gVisor has no panic"),
        }
    }

    /// Whether a program under `kso --trace` was told that it is up, and not since that it is down.
    pub fn is_up(&self, running: &Running) -> bool {
        let (up, down) = (format!("kernel {} up", self.name), format!("kernel {} down", self.name));
        let text = running.errors();
        text.lines()
            .rev()
            .find(|line| line.contains(&up) || line.contains(&down))
            .is_some_and(|line| line.contains(&up))
    }
}

impl World {
    /// Connects from the origin again and again, for a minute (longer for a guest).
    #[track_caller]
    pub fn reach(&self, address: &str) -> TcpStream {
        let until = Instant::now() + crate::Client::current().patience(Duration::from_secs(60));
        let to: SocketAddr = address.parse().expect("an address");
        loop {
            match self.origin.enter(|| TcpStream::connect_timeout(&to, Duration::from_millis(500))) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a limit");
                    return stream;
                }
                Err(error) if Instant::now() > until => panic!("nobody listens at {address}: {error}"),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }
}
