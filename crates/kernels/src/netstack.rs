//! smoltcp on a thread of this process, on a TAP of its own.
//!
//! The TAP is made where its cable goes: it is its own far end, and vanishes with the stack. The stack is as big as the
//! thread: when it panics its control stream ends and its connections are reset, as with any kernel that dies.

use crate::make::{StartError, find};
use crate::network::ip;
use ipnet::{IpNet, Ipv4Net};
use kso_core::kernels::{Attach, KernelSpec};
use kso_netstack::{Config, Tap};
use kso_provider::relay::stream_pair;
use kso_sys::standin;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Networks of four addresses in 198.19.0.0/16 (RFC 2544), and how far ours are from gVisor's.
const NETWORKS: u32 = 16_384;
const FAR: u32 = 5461;
/// The longest packet of a TAP whose far end is ours: `ETH_MAX_MTU` without the Ethernet header.
const LONG: usize = 65_521;
/// The longest packet on a bridge, where others are.
const SHORT: usize = 1500;
/// How long a stack may take to end.
const PATIENCE: Duration = Duration::from_secs(2);

/// Numbers the interfaces of this process.
static NEXT: AtomicU32 = AtomicU32::new(0);

/// See the module.
#[derive(Debug)]
pub(crate) struct Netstack {
    thread: Option<JoinHandle<()>>,
    interface: String,
    place: PathBuf,
}

/// The addresses of a stack that has none, and its gateway: unlikely to be another's.
pub(crate) fn default_addresses() -> (Vec<IpNet>, Vec<IpAddr>) {
    let network = (std::process::id() + FAR) % NETWORKS;
    let base = u32::from(Ipv4Addr::new(198, 19, 0, 0)) + 4 * network;
    let address = Ipv4Net::new(Ipv4Addr::from(base + 2), 30).map(IpNet::V4);
    (address.into_iter().collect(), vec![Ipv4Addr::from(base + 1).into()])
}

/// What it needs here and does not have.
pub(crate) fn missing() -> Vec<String> {
    let mut missing = Vec::new();
    if find("ip").is_none() {
        missing.push("ip: apt-get install iproute2".into());
    }
    if !Path::new("/dev/net/tun").exists() {
        missing.push("/dev/net/tun: modprobe tun".into());
    }
    missing
}

impl Netstack {
    pub fn start(spec: &KernelSpec) -> Result<(Self, OwnedFd), StartError> {
        let (addresses, gateways) = if spec.addresses.is_empty() {
            default_addresses()
        } else {
            (spec.addresses.clone(), spec.gateways.clone())
        };
        let place = match &spec.attach {
            Attach::Namespace(path) => path.clone(),
            Attach::Host | Attach::Bridge(_) => format!("/proc/{}/ns/net", std::process::id()).into(),
        };
        let number = NEXT.fetch_add(1, Ordering::Relaxed) & 0xffff;
        let interface = format!("ksn{:x}-{number:x}", std::process::id());
        let tap = make_tap(&place, &interface)
            .map_err(StartError::step("make a TAP (it takes root, and the tun driver: modprobe tun)"))?;
        // From here on it goes with its descriptor.
        let mtu = match &spec.attach {
            Attach::Bridge(_) => SHORT,
            Attach::Host | Attach::Namespace(_) => LONG,
        };
        let place_text = place.display().to_string();
        let run = |words: &[&str]| ip(&place_text, words);
        run(&["link", "set", &interface, "mtu", &mtu.to_string()])?;
        match &spec.attach {
            Attach::Bridge(bridge) => run(&["link", "set", &interface, "master", bridge])?,
            Attach::Host | Attach::Namespace(_) => {
                for gateway in &gateways {
                    let prefix = addresses.iter().find(|address| address.contains(gateway));
                    let Some(prefix) = prefix.map(IpNet::prefix_len) else { continue };
                    let text = format!("{gateway}/{prefix}");
                    let mut words = vec!["addr", "add", &text, "dev", &interface];
                    if gateway.is_ipv6() {
                        words.push("nodad");
                    }
                    run(&words)?;
                }
            }
        }
        run(&["link", "set", &interface, "up"])?;
        let config = Config { addresses, gateways, mtu, offload: true };
        let (control, other) = stream_pair().map_err(StartError::step("make a stream"))?;
        let name = spec.name.clone();
        let thread = std::thread::Builder::new()
            .name("kso-netstack".into())
            .spawn(move || {
                if let Err(error) = kso_netstack::serve(other, Tap::new(tap), &config) {
                    tracing::warn!(kernel = name, %error, "a stack ended");
                }
            })
            .map_err(StartError::step("start a thread"))?;
        Ok((Self { thread: Some(thread), interface, place }, control))
    }

    /// Ends it. Its control stream is closed already, so its thread ends; if that hangs, its interface goes without it.
    pub fn end(mut self) {
        let Some(thread) = self.thread.take() else { return };
        let until = Instant::now() + PATIENCE;
        while !thread.is_finished() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        if thread.is_finished() {
            let _ = thread.join();
            return;
        }
        tracing::error!(interface = self.interface, "the thread of a stack hangs, and is left behind");
        let _ = ip(&self.place.display().to_string(), &["link", "del", &self.interface]);
    }
}

/// Makes the TAP in the network namespace at `place`.
fn make_tap(place: &Path, interface: &str) -> io::Result<OwnedFd> {
    let namespace = std::fs::File::open(place)?;
    std::thread::scope(|scope| {
        let make = || {
            standin::enter_network(namespace.as_fd())?;
            kso_sys::tap::create(interface)
        };
        scope.spawn(make).join().map_err(|_| io::Error::other("a thread panicked"))?
    })
}
