//! gVisor: runsc with a provider inside, on a network of its own.
//!
//! The provider's control stream is an inherited socket pair (`--pass-fd`), and the streams of its sockets are descriptors that
//! are passed over it: the sandbox needs no unix socket of the host's file system, and no file but the kso command,
//! which it sees read-only.

use crate::make::{StartError, find, reap};
use crate::network::Network;
use kso_core::files::Shared;
use kso_core::kernels::KernelSpec;
use kso_provider::relay::stream_pair;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// How runsc is had.
pub(crate) const INSTALL: &str = "apt-get install -t bookworm-backports runsc, or https://gvisor.dev/docs/user_guide/install/ (KSO_RUNSC names another place)";
/// The number of the control stream inside.
const CONTROL: i32 = 3;

/// See the module.
#[derive(Debug)]
pub(crate) struct Gvisor {
    child: Child,
    runsc: PathBuf,
    name: String,
    // The order matters: the directory has runsc's state, the network its interface.
    directory: tempfile::TempDir,
    _network: Network,
}

/// Where runsc is: `$KSO_RUNSC`, the cache of kso, or PATH.
#[must_use]
pub fn find_runsc() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("KSO_RUNSC").filter(|path| !path.is_empty()) {
        return Some(path.into()).filter(|path: &PathBuf| path.is_file());
    }
    let cached =
        std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache/kso/gvisor/usr/bin/runsc"));
    find("runsc").or_else(|| cached.filter(|path| path.is_file()))
}

impl Gvisor {
    pub fn start(spec: &KernelSpec, program: &Path, number: u64) -> Result<(Self, OwnedFd), StartError> {
        let Some(runsc) = find_runsc() else {
            return Err(StartError::Missing { what: "runsc".into(), hint: INSTALL });
        };
        let directory = tempfile::Builder::new()
            .prefix("kso-gvisor-")
            .tempdir()
            .map_err(StartError::step("make a directory for gVisor"))?;
        let network = Network::make(spec)?;
        let namespace = format!("/proc/{}/fd/{}", std::process::id(), network.namespace.as_raw_fd());
        let root = directory.path().join("root");
        fs::create_dir_all(&root).map_err(StartError::step("make gVisor's root"))?;
        for shared in &spec.shares {
            let step = StartError::step(format!("share {}", shared.directory.display()));
            fs::read_dir(&shared.directory).map_err(step)?;
            let inside = shared.directory.strip_prefix("/").unwrap_or(&shared.directory);
            fs::create_dir_all(root.join(inside)).map_err(StartError::step("make gVisor's root"))?;
        }
        let config = bundle(&root, program, &namespace, &spec.shares);
        fs::write(directory.path().join("config.json"), config.to_string())
            .map_err(StartError::step("write gVisor's bundle"))?;
        let (control, given) = stream_pair().map_err(StartError::step("make a stream"))?;
        let name = format!("kso-{}-{number}", std::process::id());
        let child = Self::run(&runsc, directory.path(), &name, &namespace, given)?;
        Ok((Self { child, runsc, name, directory, _network: network }, control))
    }

    /// `runsc run`. This version refuses networks where /proc/sys/net/core is visible: an empty file system hides it.
    fn run(
        runsc: &Path,
        directory: &Path,
        name: &str,
        namespace: &str,
        control: OwnedFd,
    ) -> Result<Child, StartError> {
        // It travels as standard input: no other child that is started meanwhile can inherit it.
        let script = "mount -t tmpfs none /proc/sys/net/core && exec \"$@\" 3<&0 </dev/null";
        Command::new("nsenter")
            .arg(format!("--net={namespace}"))
            .args(["unshare", "--mount", "sh", "-c", script, "sh"])
            .arg(runsc)
            .arg(format!("--root={}", directory.join("state").display()))
            .args(["--platform=systrap", "--ignore-cgroups", "--network=sandbox", "--debug=false"])
            .args(["run", "--pass-fd", &format!("3:{CONTROL}")])
            .arg(format!("--bundle={}", directory.display()))
            .arg(name)
            .stdin(Stdio::from(control))
            .stdout(Stdio::null())
            .spawn()
            .map_err(StartError::step(format!("run {}", runsc.display())))
    }

    /// Ends it, also when it is stopped or hangs.
    pub fn end(self) {
        let Self { child, runsc, name, directory, _network } = self;
        let state = directory.path().join("state");
        // Its processes by their numbers: runsc's own kill waits for an answer of a sandbox that may hang.
        if let Some(pid) = sandbox_pid(&state) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        let deleted = Command::new(runsc)
            .arg(format!("--root={}", state.display()))
            .args(["delete", "-force", &name])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if let Err(error) = deleted {
            tracing::warn!(%error, "gVisor cannot be cleaned up");
        }
        reap(child);
    }
}

/// The process of the sandbox, as runsc's state file has it.
fn sandbox_pid(state: &Path) -> Option<rustix::process::Pid> {
    let mut files = fs::read_dir(state).ok()?.flatten().map(|file| file.path());
    let text =
        fs::read_to_string(files.find(|path| path.extension().is_some_and(|end| end == "state"))?).ok()?;
    let value: serde_json::Value = serde_json::from_str(&text).ok()?;
    let pid = value.pointer("/sandbox/pid").or_else(|| value.pointer("/Sandbox/pid"))?.as_i64()?;
    rustix::process::Pid::from_raw(i32::try_from(pid).ok()?)
}

/// What a provider needs for sockets.
const SOCKETS: &[&str] = &["CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_NET_ADMIN"];
/// What it needs, inside, for files of any owner.
const FILES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_SETUID",
    "CAP_SETGID",
    "CAP_SETFCAP",
];

/// An OCI bundle with nothing in it but the provider, and what it shares: gVisor's own file system code reads that, by way of its
/// gofer.
fn bundle(root: &Path, program: &Path, namespace: &str, shares: &[Shared]) -> serde_json::Value {
    let mut arguments = vec!["/kso".to_owned(), "provide".into(), "--listen".into(), format!("fd:{CONTROL}")];
    let mut mounts = vec![serde_json::json!({
        "destination": "/kso",
        "type": "bind",
        "source": program,
        "options": ["bind", "ro"]
    })];
    for Shared { directory, read_only } in shares {
        let (mode, suffix) = if *read_only { ("ro", ":ro") } else { ("rw", "") };
        mounts.push(serde_json::json!({
            "destination": directory,
            "type": "bind",
            "source": directory,
            "options": ["rbind", mode]
        }));
        arguments.extend(["--share".to_owned(), format!("{}{suffix}", directory.display())]);
    }
    let files = if shares.is_empty() { &[][..] } else { FILES };
    let capabilities: Vec<&str> = SOCKETS.iter().chain(files).copied().collect();
    serde_json::json!({
        "ociVersion": "1.0.0",
        "process": {
            "user": { "uid": 0, "gid": 0 },
            "args": arguments,
            "env": [],
            "cwd": "/",
            "capabilities": { "bounding": capabilities, "effective": capabilities, "permitted": capabilities },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 200_000, "soft": 200_000 }]
        },
        "root": { "path": root, "readonly": true },
        "hostname": "kso",
        "mounts": mounts,
        "linux": { "namespaces": [
            { "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" },
            { "type": "network", "path": namespace }
        ] }
    })
}
