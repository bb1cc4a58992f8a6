//! How each make of kernel is started and stopped.

use crate::carrier::Carrier;
use crate::gvisor::Gvisor;
use crate::netstack::Netstack;
use crate::remote::Remote;
use crate::vm::Vm;
use kso_core::files;
use kso_core::kernels::{KernelSpec, Make};
use kso_files::image::Image;
use kso_provider::relay::stream_pair;
use kso_provider::server::{Export, Limits, Shared};
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Child;

/// How the kernel of a virtual machine is had.
const FETCH: &str = "kso kernels fetch";

/// Why a kernel does not start. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Something is not installed.
    #[error("{what} is missing: {hint}")]
    Missing {
        /// What.
        what: String,
        /// What to do.
        hint: &'static str,
    },
    /// Certificates cannot be used.
    #[error(transparent)]
    Identity(#[from] Box<kso_tls::identity::IdentityError>),
    /// A step failed.
    #[error("cannot {what}: {source}")]
    Step {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// There is no Linux for a virtual machine.
    #[error(transparent)]
    Linux(#[from] kso_vm::KernelError),
    /// It cannot be prepared for one.
    #[error(transparent)]
    Initramfs(#[from] kso_vm::initramfs::InitramfsError),
    /// There is no virtual machine.
    #[error(transparent)]
    Machine(#[from] kso_vm::MachineError),
    /// A command failed, and said this.
    #[error("`{command}` failed: {said}")]
    Command {
        /// What was run.
        command: String,
        /// What it printed.
        said: String,
    },
}

impl StartError {
    pub(crate) fn step(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Step { what, source }
    }
}

/// A kernel that was started.
#[derive(Debug)]
pub(crate) struct Started {
    /// The control stream to its provider.
    pub control: OwnedFd,
    /// What has to be ended with it.
    pub keep: Keep,
}

/// What a kernel consists of on this host.
#[derive(Debug)]
pub(crate) enum Keep {
    /// Nothing: it ends with its control stream.
    Nothing,
    /// A gVisor sandbox.
    Gvisor(Box<Gvisor>),
    /// The connections to a provider elsewhere.
    Remote(Box<Remote>),
    /// A stack on a thread of this process.
    Netstack(Box<Netstack>),
    /// A virtual machine.
    Vm(Box<Vm>),
}

impl Keep {
    /// What makes its streams, if no descriptor can be passed to it.
    pub fn carrier(&mut self) -> Option<&mut dyn Carrier> {
        match self {
            Self::Nothing | Self::Gvisor(_) | Self::Netstack(_) => None,
            Self::Remote(remote) => Some(&mut **remote),
            Self::Vm(vm) => Some(&mut **vm),
        }
    }

    /// Ends it, whatever state it is in. `in_order`: it did not fail, and may take leave.
    pub fn end(self, in_order: bool) {
        match self {
            // Dropped, its connections are closed.
            Self::Nothing | Self::Remote(_) => {}
            Self::Vm(vm) => vm.end(in_order),
            Self::Gvisor(gvisor) => gvisor.end(),
            Self::Netstack(netstack) => netstack.end(),
        }
    }
}

/// Starts a kernel. `program`: the kso command, to run inside.
pub(crate) fn start(spec: &KernelSpec, program: &Path, number: u64) -> Result<Started, StartError> {
    match spec.make {
        Make::Host => host(spec),
        Make::Image => image(spec),
        Make::Provider => {
            let path = spec.path.clone().unwrap_or_default();
            let stream = UnixStream::connect(&path)
                .and_then(|stream| stream.set_nonblocking(true).map(|()| stream))
                .map_err(StartError::step(format!(
                    "reach the provider at {} (start one with: kso provide --listen unix:PATH)",
                    path.display()
                )))?;
            Ok(Started { control: stream.into(), keep: Keep::Nothing })
        }
        Make::Gvisor => {
            let (gvisor, control) = Gvisor::start(spec, program, number)?;
            Ok(Started { control, keep: Keep::Gvisor(Box::new(gvisor)) })
        }
        Make::Remote => {
            let (remote, control) = Remote::start(spec)?;
            Ok(Started { control, keep: Keep::Remote(Box::new(remote)) })
        }
        Make::Netstack => {
            let (netstack, control) = Netstack::start(spec)?;
            Ok(Started { control, keep: Keep::Netstack(Box::new(netstack)) })
        }
        Make::Vm => {
            let (vm, control) = Vm::start(spec, program)?;
            Ok(Started { control, keep: Keep::Vm(Box::new(vm)) })
        }
    }
}

/// A provider on a thread of this process.
fn host(spec: &KernelSpec) -> Result<Started, StartError> {
    let (control, other) = stream_pair().map_err(StartError::step("make a stream"))?;
    let addresses: Vec<IpAddr> = spec.addresses.iter().map(ipnet::IpNet::addr).collect();
    let mut shared = Shared::default();
    shared.addresses = addresses;
    // Who runs this can have any directory of the host as it is: unless told, nothing is kept from him.
    let all = files::Shared { directory: "/".into(), read_only: false };
    let shares = if spec.shares.is_empty() { std::slice::from_ref(&all) } else { &spec.shares };
    for files::Shared { directory, read_only } in shares {
        let step = StartError::step(format!("share {}", directory.display()));
        shared.exports.push(Export::open(directory, *read_only).map_err(step)?);
    }
    in_thread(shared, control, other)
}

/// A provider on a thread of this process, for the files of an image.
fn image(spec: &KernelSpec) -> Result<Started, StartError> {
    let (control, other) = stream_pair().map_err(StartError::step("make a stream"))?;
    let path = spec.path.clone().unwrap_or_default();
    let step = StartError::step(format!("use the image {}", path.display()));
    let image = Image::open(&path).map_err(|error| step(io::Error::other(error)))?;
    let exports = vec![Export::image(image)];
    let mut shared = Shared::default();
    (shared.exports, shared.files_only) = (exports, true);
    in_thread(shared, control, other)
}

fn in_thread(shared: Shared, control: OwnedFd, other: OwnedFd) -> Result<Started, StartError> {
    std::thread::Builder::new()
        .name("kso-provider".into())
        .spawn(move || {
            if let Err(error) = shared.serve(other, Limits::default()) {
                tracing::warn!(%error, "the host's provider ended");
            }
        })
        .map_err(StartError::step("start a thread"))?;
    Ok(Started { control, keep: Keep::Nothing })
}

/// What is missing here for a make of kernel; nothing: it can run.
#[must_use]
pub fn missing(make: Make) -> Vec<String> {
    let mut missing = Vec::new();
    if matches!(make, Make::Host | Make::Provider | Make::Remote | Make::Image) {
        return missing;
    }
    if !rustix::process::geteuid().is_root() {
        missing.push("root: it needs network namespaces and virtual cables".into());
    }
    if make == Make::Netstack {
        missing.extend(crate::netstack::missing());
        return missing;
    }
    let commands = if make == Make::Vm {
        if kso_vm::kernels::list().is_empty() {
            missing.push(format!("a kernel with its modules: {FETCH}"));
        }
        if !Path::new("/dev/net/tun").exists() {
            missing.push("/dev/net/tun: modprobe tun".into());
        }
        &[("ip", "iproute2"), (kso_vm::default_qemu(), "qemu-system-x86")][..]
    } else {
        if crate::gvisor::find_runsc().is_none() {
            missing.push(format!("runsc: {}", crate::gvisor::INSTALL));
        }
        &[("ip", "iproute2"), ("unshare", "util-linux"), ("nsenter", "util-linux")][..]
    };
    for (command, package) in commands {
        if find(command).is_none() {
            missing.push(format!("{command}: apt-get install {package}"));
        }
    }
    missing
}

/// A command in PATH, or where administrators' commands are.
pub(crate) fn find(command: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/local/bin", "/usr/bin"].map(PathBuf::from))
        .map(|directory| directory.join(command))
        .find(|path| path.is_file())
}

/// Waits for a child that was told to end, or was killed.
pub(crate) fn reap(mut child: Child) {
    let _ = child.kill();
    let _ = child.wait();
}
