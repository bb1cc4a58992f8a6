//! The network of a kernel: a namespace with one interface, and a cable to where its user wants it.
//!
//! It is made anew for each start: gVisor takes the addresses away from the interface that it serves.

use crate::make::{StartError, find};
use ipnet::{IpNet, Ipv4Net};
use kso_core::kernels::{Attach, KernelSpec};
use kso_sys::standin;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// The interface inside.
const INSIDE: &str = "eth0";
/// Networks of four addresses in 198.19.0.0/16 (RFC 2544).
const NETWORKS: u32 = 16_384;

/// See the module.
#[derive(Debug)]
pub(crate) struct Network {
    /// The namespace.
    pub namespace: OwnedFd,
    outside: String,
    attach: Attach,
}

impl Network {
    /// The addresses of a kernel that has none, and its gateway: unlikely to be another's.
    pub fn default_addresses() -> (Vec<IpNet>, Vec<IpAddr>) {
        let base = u32::from(Ipv4Addr::new(198, 19, 0, 0)) + 4 * (std::process::id() % NETWORKS);
        let address = Ipv4Net::new(Ipv4Addr::from(base + 2), 30).map(IpNet::V4);
        (address.into_iter().collect(), vec![Ipv4Addr::from(base + 1).into()])
    }

    /// Makes it.
    pub fn make(spec: &KernelSpec, number: u64) -> Result<Self, StartError> {
        let (addresses, gateways) = if spec.addresses.is_empty() {
            Self::default_addresses()
        } else {
            (spec.addresses.clone(), spec.gateways.clone())
        };
        let (namespace, ()) = standin::new_network(|| Ok(()))
            .map_err(StartError::step("make a network namespace (it takes root)"))?;
        let inside = format!("/proc/{}/fd/{}", std::process::id(), namespace.as_raw_fd());
        let outside = format!("kso{:x}-{:x}", std::process::id(), number & 0xffff);
        // Undone by `end` from here on.
        let network = Self { namespace, outside, attach: spec.attach.clone() };
        let target = network.target();
        let ip = |place: &str, words: &[&str]| ip(place, words);
        let target_text = target.display().to_string();
        ip(
            &inside,
            &["link", "add", INSIDE, "type", "veth", "peer", "name", &network.outside, "netns", &target_text],
        )?;
        ip(&inside, &["link", "set", "lo", "up"])?;
        for address in &addresses {
            let text = address.to_string();
            let mut words = vec!["addr", "add", &text, "dev", INSIDE];
            if address.addr().is_ipv6() {
                // Its duplicates would be looked for, and it be of no use meanwhile.
                words.push("nodad");
            }
            ip(&inside, &words)?;
        }
        ip(&inside, &["link", "set", INSIDE, "up"])?;
        match &network.attach {
            Attach::Bridge(bridge) => {
                ip(&target_text, &["link", "set", &network.outside, "master", bridge])?;
            }
            Attach::Host | Attach::Namespace(_) => {
                for gateway in &gateways {
                    let prefix = addresses.iter().find(|address| address.contains(gateway));
                    let Some(prefix) = prefix.map(IpNet::prefix_len) else { continue };
                    let text = format!("{gateway}/{prefix}");
                    let mut words = vec!["addr", "add", &text, "dev", &network.outside];
                    if gateway.is_ipv6() {
                        words.push("nodad");
                    }
                    ip(&target_text, &words)?;
                }
            }
        }
        ip(&target_text, &["link", "set", &network.outside, "up"])?;
        for gateway in &gateways {
            let family = if gateway.is_ipv4() { "-4" } else { "-6" };
            ip(&inside, &[family, "route", "add", "default", "via", &gateway.to_string()])?;
        }
        Ok(network)
    }

    fn target(&self) -> PathBuf {
        match &self.attach {
            Attach::Namespace(path) => path.clone(),
            Attach::Host | Attach::Bridge(_) => format!("/proc/{}/ns/net", std::process::id()).into(),
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // The namespace may be held by what dies slowly; the cable must not be in the way of the next.
        let _ = ip(&self.target().display().to_string(), &["link", "del", &self.outside]);
    }
}

/// Runs ip(8) in a network namespace.
pub(crate) fn ip(namespace: &str, words: &[&str]) -> Result<(), StartError> {
    let Some(program) = find("ip") else {
        return Err(StartError::Missing { what: "ip".into(), hint: "apt-get install iproute2" });
    };
    let enter = || -> io::Result<std::process::Output> {
        let file = std::fs::File::open(namespace)?;
        std::thread::scope(|scope| {
            let run = || {
                standin::enter_network(file.as_fd())?;
                Command::new(&program).args(words).stdin(Stdio::null()).output()
            };
            scope.spawn(run).join().map_err(|_| io::Error::other("a thread panicked"))?
        })
    };
    let command = format!("ip {}", words.join(" "));
    let output = enter().map_err(StartError::step(format!("run `{command}`")))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(StartError::Command { command, said })
}
