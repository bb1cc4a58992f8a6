//! The network of a kernel: one interface, and a cable to where its user wants it.
//!
//! ```text
//!   gVisor            namespace of its own: eth0 ==veth== cable --- host, bridge or namespace
//!   virtual machine   eth0 ==== virtio-net, QEMU ==TAP=== cable --- host, bridge or namespace
//! ```
//!
//! It is made anew for each start: gVisor takes the addresses away from the interface that it serves.

use crate::make::{StartError, find};
use ipnet::{IpNet, Ipv4Net};
use kso_core::kernels::{Attach, KernelSpec};
use kso_sys::standin;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};

/// The interface inside.
const INSIDE: &str = "eth0";
/// Networks of four addresses in 198.19.0.0/16 (RFC 2544).
const NETWORKS: u32 = 16_384;

/// The addresses of a kernel that has none, and its gateway: unlikely to be those of another process, or of another kernel
/// of this one.
pub(crate) fn default_addresses(kernel: usize) -> (Vec<IpNet>, Vec<IpAddr>) {
    let kernel = u32::try_from(kernel).unwrap_or_default();
    let number = std::process::id().wrapping_mul(8).wrapping_add(kernel) % NETWORKS;
    let base = u32::from(Ipv4Addr::new(198, 19, 0, 0)) + 4 * number;
    let address = Ipv4Net::new(Ipv4Addr::from(base + 2), 30).map(IpNet::V4);
    (address.into_iter().collect(), vec![Ipv4Addr::from(base + 1).into()])
}

/// The end of a cable that is not the kernel's. Removed when dropped.
#[derive(Debug)]
struct Cable {
    name: String,
    attach: Attach,
}

impl Cable {
    /// One that is not there yet.
    fn new(attach: &Attach) -> Self {
        static NEXT: AtomicU16 = AtomicU16::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self { name: format!("kso{:x}-{number:x}", std::process::id()), attach: attach.clone() }
    }

    /// The network namespace in which it is.
    fn target(&self) -> String {
        match &self.attach {
            Attach::Namespace(path) => path.display().to_string(),
            Attach::Host | Attach::Bridge(_) => format!("/proc/{}/ns/net", std::process::id()),
        }
    }

    /// Gives it the gateways' addresses, or its bridge, and brings it up.
    fn set_up(&self, addresses: &[IpNet], gateways: &[IpAddr]) -> Result<(), StartError> {
        let target = self.target();
        match &self.attach {
            Attach::Bridge(bridge) => ip(&target, &["link", "set", &self.name, "master", bridge])?,
            Attach::Host | Attach::Namespace(_) => {
                for gateway in gateways {
                    let prefix = addresses.iter().find(|address| address.contains(gateway));
                    let Some(prefix) = prefix.map(IpNet::prefix_len) else { continue };
                    let text = format!("{gateway}/{prefix}");
                    let mut words = vec!["addr", "add", &text, "dev", &self.name];
                    if gateway.is_ipv6() {
                        words.push("nodad");
                    }
                    ip(&target, &words)?;
                }
            }
        }
        ip(&target, &["link", "set", &self.name, "up"])
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        // A namespace may be held by what dies slowly; the cable must not be in the way of the next.
        let _ = ip(&self.target(), &["link", "del", &self.name]);
    }
}

/// A network card's other end: a TAP device.
#[derive(Debug)]
pub(crate) struct Tap {
    _cable: Cable,
}

impl Tap {
    /// Makes it: the device is for QEMU.
    pub fn make(spec: &KernelSpec) -> Result<(Self, OwnedFd), StartError> {
        let cable = Cable::new(&spec.attach);
        let made = within(&cable.target(), || kso_sys::tap::for_machine(&cable.name));
        let device = made.map_err(StartError::step("make a TAP device (it takes root and /dev/net/tun)"))?;
        cable.set_up(&spec.addresses, &spec.gateways)?;
        Ok((Self { _cable: cable }, device))
    }
}

/// A namespace with an interface, for gVisor.
#[derive(Debug)]
pub(crate) struct Network {
    /// The namespace.
    pub namespace: OwnedFd,
    _cable: Cable,
}

impl Network {
    /// Makes it.
    pub fn make(spec: &KernelSpec) -> Result<Self, StartError> {
        let KernelSpec { addresses, gateways, .. } = spec;
        let (namespace, ()) = standin::new_network(|| Ok(()))
            .map_err(StartError::step("make a network namespace (it takes root)"))?;
        let inside = format!("/proc/{}/fd/{}", std::process::id(), namespace.as_raw_fd());
        let cable = Cable::new(&spec.attach);
        let target = cable.target();
        ip(&inside, &["link", "add", INSIDE, "type", "veth", "peer", "name", &cable.name, "netns", &target])?;
        ip(&inside, &["link", "set", "lo", "up"])?;
        for address in addresses {
            let text = address.to_string();
            let mut words = vec!["addr", "add", &text, "dev", INSIDE];
            if address.addr().is_ipv6() {
                // Its duplicates would be looked for, and it be of no use meanwhile.
                words.push("nodad");
            }
            ip(&inside, &words)?;
        }
        ip(&inside, &["link", "set", INSIDE, "up"])?;
        cable.set_up(addresses, gateways)?;
        for gateway in gateways {
            let family = if gateway.is_ipv4() { "-4" } else { "-6" };
            ip(&inside, &[family, "route", "add", "default", "via", &gateway.to_string()])?;
        }
        Ok(Self { namespace, _cable: cable })
    }
}

/// Does `work` on a thread in a network namespace.
fn within<T: Send>(namespace: &str, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let file = std::fs::File::open(namespace)?;
    std::thread::scope(|scope| {
        let run = || {
            standin::enter_network(file.as_fd())?;
            work()
        };
        scope.spawn(run).join().map_err(|_| io::Error::other("a thread panicked"))?
    })
}

/// Runs ip(8) in a network namespace.
pub(crate) fn ip(namespace: &str, words: &[&str]) -> Result<(), StartError> {
    let Some(program) = find("ip") else {
        return Err(StartError::Missing { what: "ip".into(), hint: "apt-get install iproute2" });
    };
    let run = || Command::new(&program).args(words).stdin(Stdio::null()).output();
    let command = format!("ip {}", words.join(" "));
    let output = within(namespace, run).map_err(StartError::step(format!("run `{command}`")))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(StartError::Command { command, said })
}
