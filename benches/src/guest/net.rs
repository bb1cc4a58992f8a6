//! The ways out of the measured guest, all of them at once: an address chooses one.
//!
//! ```text
//!   guest                              the benchmark's own network namespace
//!   vsock ----------------- kso vm --> the loopback, as 198.18.0.1
//!   eth 10.79.1.2 --------- tap -----> 10.79.1.1
//!   eth 10.79.2.15 -- QEMU's slirp --> the loopback, as 10.79.2.2
//!   eth 10.79.3.2 ------- passt -----> the loopback, as 10.79.3.1
//! ```

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::namespace::ip;

/// The networks of the NICs: connections to them stay inside the guest.
pub const NETWORKS: &str = "10.79.0.0/16";
/// What NICs need.
pub const MODULES: [&str; 1] = ["virtio_net"];

/// By which way the guest reaches the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Way {
    /// Client and server both on the host.
    Native,
    /// Outsourced.
    Kso,
    Tap,
    Slirp,
    Passt,
}

impl Way {
    pub const ALL: [Way; 5] = [Way::Native, Way::Kso, Way::Tap, Way::Slirp, Way::Passt];
    pub const NICS: [Way; 3] = [Way::Tap, Way::Slirp, Way::Passt];

    pub fn name(self) -> &'static str {
        match self {
            Way::Native => "native",
            Way::Kso => "kso",
            Way::Tap => "tap",
            Way::Slirp => "slirp",
            Way::Passt => "passt",
        }
    }

    /// The host, as it is reached.
    pub fn host(self) -> Ipv4Addr {
        match self {
            Way::Native => Ipv4Addr::LOCALHOST,
            Way::Kso => Ipv4Addr::new(198, 18, 0, 1),
            Way::Tap => Ipv4Addr::new(10, 79, 1, 1),
            Way::Slirp => Ipv4Addr::new(10, 79, 2, 2),
            Way::Passt => Ipv4Addr::new(10, 79, 3, 1),
        }
    }

    /// The guest's own address, for those that have a NIC.
    pub fn guest(self) -> Option<&'static str> {
        match self {
            Way::Native | Way::Kso => None,
            Way::Tap => Some("10.79.1.2/24"),
            Way::Slirp => Some("10.79.2.15/24"),
            Way::Passt => Some("10.79.3.2/24"),
        }
    }

    pub fn mac(self) -> &'static str {
        match self {
            Way::Native | Way::Kso => "",
            Way::Tap => "52:54:00:00:00:01",
            Way::Slirp => "52:54:00:00:00:02",
            Way::Passt => "52:54:00:00:00:03",
        }
    }

    /// QEMU's words for it.
    pub fn qemu(self, passt: &Path) -> Vec<String> {
        let back_end = match self {
            Way::Native | Way::Kso => return Vec::new(),
            Way::Tap => "tap,id=tap,ifname=tap0,script=no,downscript=no".to_owned(),
            Way::Slirp => "user,id=slirp,net=10.79.2.0/24,host=10.79.2.2,ipv6=off".to_owned(),
            Way::Passt => {
                format!("stream,id=passt,server=off,addr.type=unix,addr.path={}", passt.display())
            }
        };
        nic(&back_end, self.name(), self.mac())
    }
}

/// QEMU's words for a NIC of the kind that is measured: virtio, with all its offloads.
pub fn nic(back_end: &str, name: &str, mac: &str) -> Vec<String> {
    let device = format!("virtio-net-device,netdev={name},mac={mac}");
    ["-netdev", back_end, "-device", &device].map(str::to_owned).into()
}

/// A persistent TAP device, up.
pub fn tap(name: &str) -> Result<()> {
    ip(&["tuntap", "add", "dev", name, "mode", "tap"])?;
    ip(&["link", "set", name, "up"])
}

/// The host's side: devices and processes.
pub struct Outside {
    passt: Option<Child>,
    socket: PathBuf,
}

impl Outside {
    /// Makes tap0, and starts passt.
    pub fn make(scratch: &Path) -> Result<Outside> {
        tap("tap0")?;
        ip(&["address", "add", "10.79.1.1/24", "dev", "tap0"])?;
        let socket = scratch.join("passt.sock");
        Ok(Outside { passt: None, socket })
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// It ends with its guest, so each guest needs one.
    pub fn start_passt(&mut self) -> Result<()> {
        self.end_passt();
        let child = Command::new("passt")
            .args(["--foreground", "--quiet", "--ipv4-only", "--one-off", "--socket"])
            .arg(&self.socket)
            .args(["--address", "10.79.3.2", "--netmask", "24", "--gateway", "10.79.3.1"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start passt")?;
        self.passt = Some(child);
        let end = Instant::now() + Duration::from_secs(5);
        while !self.socket.exists() {
            if Instant::now() > end {
                bail!("passt makes no socket");
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    fn end_passt(&mut self) {
        if let Some(mut child) = self.passt.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = std::fs::remove_file(&self.socket);
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        self.end_passt();
    }
}
