//! Starting a command natively, or inside kso, pasta or slirp4netns, with the host's loopback within reach.

use std::ffi::OsString;
use std::fmt;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::{Pid, Signal, kill_process_group};
use serde::{Deserialize, Serialize};

use crate::namespace::PASTA_GATEWAY;

/// The gateway of a kso sandbox: on it `--allow host` reaches the host's loopback.
const KSO_GATEWAY: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
/// The same of slirp4netns, and the address it gives to the sandbox.
const SLIRP_GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const SLIRP_GUEST: &str = "10.0.2.100";
/// The largest MTU slirp4netns takes; its manual recommends it for speed.
const SLIRP_MTU: &str = "--mtu=65520";

/// What a command runs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Variant {
    Native,
    Kso,
    /// By pasta's TAP and its gateway address.
    Pasta,
    /// By pasta's `-T`/`-U`: ports named beforehand, reached on the sandbox's own loopback, spliced.
    PastaSplice,
    Slirp,
}

impl Variant {
    pub const ALL: [Variant; 5] =
        [Variant::Native, Variant::Kso, Variant::Pasta, Variant::PastaSplice, Variant::Slirp];

    pub fn name(self) -> &'static str {
        match self {
            Variant::Native => "native",
            Variant::Kso => "kso",
            Variant::Pasta => "pasta",
            Variant::PastaSplice => "pasta-splice",
            Variant::Slirp => "slirp4netns",
        }
    }

    pub fn from_name(name: &str) -> Option<Variant> {
        Variant::ALL.into_iter().find(|variant| variant.name() == name)
    }

    /// The address by which the host's loopback is reached from inside.
    pub fn host(self) -> Result<Ipv4Addr> {
        Ok(match self {
            Variant::Native | Variant::PastaSplice => Ipv4Addr::LOCALHOST,
            Variant::Kso => KSO_GATEWAY,
            Variant::Pasta => PASTA_GATEWAY.parse()?,
            Variant::Slirp => SLIRP_GATEWAY,
        })
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The programs to use.
#[derive(Clone, Debug)]
pub struct Tools {
    pub kso: PathBuf,
    pub this: PathBuf,
    pub scratch: PathBuf,
}

/// Which way connections are opened, and at which port the server listens.
#[derive(Clone, Copy, Debug)]
pub enum Reach {
    /// From inside to the host's loopback.
    Out(u16),
    /// From the host to a published port.
    In(u16),
}

/// A running command with what carries its network; ended when dropped.
pub struct Job {
    child: Child,
    helper: Option<Child>,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
    errors: Arc<Mutex<String>>,
    what: String,
}

/// At most so much of what a job writes to standard error is kept.
const ERRORS_MAX: usize = 16 << 10;

impl Job {
    pub fn start(tools: &Tools, variant: Variant, reach: Reach, command: &[OsString]) -> Result<Job> {
        match variant {
            Variant::Native => Job::spawn(&[], command),
            Variant::Kso => {
                let mut wrapper: Vec<OsString> = vec![tools.kso.clone().into(), "run".into()];
                match reach {
                    Reach::Out(port) => wrapper.extend(["--allow".into(), format!("host:{port}").into()]),
                    Reach::In(port) => wrapper.extend([
                        "-p".into(),
                        format!("{port}:{port}").into(),
                        "-p".into(),
                        format!("{port}:{port}/udp").into(),
                    ]),
                }
                wrapper.push("--".into());
                Job::spawn(&wrapper, command)
            }
            Variant::Pasta | Variant::PastaSplice => {
                let port = |wanted: bool, port: u16| if wanted { port.to_string() } else { "none".into() };
                let (inwards, outwards) = match reach {
                    Reach::In(number) => (port(true, number), port(false, 0)),
                    Reach::Out(number) => (port(false, 0), port(variant == Variant::PastaSplice, number)),
                };
                let mut wrapper: Vec<OsString> = vec!["pasta".into()];
                wrapper.extend(["-f", "-q", "-4", "--config-net"].map(OsString::from));
                for (option, value) in
                    [("-t", &inwards), ("-u", &inwards), ("-T", &outwards), ("-U", &outwards)]
                {
                    wrapper.extend([option.into(), value.into()]);
                }
                wrapper.push("--".into());
                Job::spawn(&wrapper, command)
            }
            Variant::Slirp => Job::start_slirp(tools, reach, command),
        }
    }

    /// `unshare -n` waits at a gate until slirp4netns has configured its network.
    fn start_slirp(tools: &Tools, reach: Reach, command: &[OsString]) -> Result<Job> {
        let mut wrapper: Vec<OsString> = vec!["unshare".into(), "--net".into()];
        wrapper.extend([tools.this.clone().into(), "gate".into(), "--".into()]);
        let mut job = Job::spawn(&wrapper, command)?;
        job.expect_line("gate", Duration::from_secs(5))?;
        let socket = tools.scratch.join(format!("slirp-{}.sock", job.child.id()));
        let helper = Command::new("slirp4netns")
            .args(["--configure", SLIRP_MTU, "--api-socket"])
            .arg(&socket)
            .args([&job.child.id().to_string(), "tap0"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .context("cannot start slirp4netns")?;
        job.helper = Some(helper);
        wait_for_interface(job.child.id(), "tap0")?;
        if let Reach::In(port) = reach {
            for protocol in ["tcp", "udp"] {
                slirp_forward(&socket, protocol, port)?;
            }
        }
        job.say("go")?;
        Ok(job)
    }

    pub fn spawn(wrapper: &[OsString], command: &[OsString]) -> Result<Job> {
        let mut words = wrapper.iter().chain(command);
        let program = words.next().context("an empty command")?;
        let mut child = Command::new(program)
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let input = child.stdin.take();
        let (sender, lines) = channel();
        if let Some(stdout) = child.stdout.take() {
            thread::spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(|line| line.ok()) {
                    if sender.send(line).is_err() {
                        break;
                    }
                }
            });
        }
        let errors = Arc::new(Mutex::new(String::new()));
        if let Some(stderr) = child.stderr.take() {
            let errors = Arc::clone(&errors);
            thread::spawn(move || keep_errors(stderr, &errors));
        }
        Ok(Job { child, helper: None, input, lines, errors, what: program.display().to_string() })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Writes a line to the command's standard input.
    pub fn say(&mut self, line: &str) -> Result<()> {
        let input = self.input.as_mut().context("no standard input")?;
        input.write_all(format!("{line}\n").as_bytes())?;
        input.flush()?;
        Ok(())
    }

    /// The next line of its standard output.
    pub fn line(&mut self, wait: Duration) -> Result<String> {
        match self.lines.recv_timeout(wait) {
            Ok(line) => Ok(line),
            Err(RecvTimeoutError::Timeout) => Err(self.failure(&format!("says nothing for {wait:?}"))),
            Err(RecvTimeoutError::Disconnected) => {
                let status = self.child.wait()?;
                Err(self.failure(&format!("ended early ({status})")))
            }
        }
    }

    pub fn expect_line(&mut self, wanted: &str, wait: Duration) -> Result<()> {
        let line = self.line(wait)?;
        if line.trim() != wanted {
            return Err(self.failure(&format!("said `{line}` instead of `{wanted}`")));
        }
        Ok(())
    }

    /// All the output up to its end.
    pub fn output(&mut self, wait: Duration) -> Result<String> {
        let end = Instant::now() + wait;
        let mut text = String::new();
        loop {
            match self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    text.push_str(&line);
                    text.push('\n');
                }
                Err(RecvTimeoutError::Disconnected) => return Ok(text),
                Err(RecvTimeoutError::Timeout) => return Err(self.failure(&format!("not done in {wait:?}"))),
            }
        }
    }

    fn failure(&self, what: &str) -> anyhow::Error {
        let errors = self.errors.lock().map(|errors| errors.trim().to_owned()).unwrap_or_default();
        anyhow!("{} {what}{}{errors}", self.what, if errors.is_empty() { "" } else { ": " })
    }
}

/// pasta's complaints about a missing system logger say nothing.
fn keep_errors(stderr: impl Read, errors: &Mutex<String>) {
    for line in BufReader::new(stderr).lines().map_while(|line| line.ok()) {
        if line.contains("to syslog") {
            continue;
        }
        if let Ok(mut kept) = errors.lock()
            && kept.len() < ERRORS_MAX
        {
            kept.push_str(&line);
            kept.push('\n');
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        // The end of its input ends a workload by itself, and with it the sandbox; what is left is killed.
        drop(self.input.take());
        let patience = Instant::now() + Duration::from_millis(300);
        while Instant::now() < patience && matches!(self.child.try_wait(), Ok(None)) {
            thread::sleep(Duration::from_millis(5));
        }
        for child in [Some(&mut self.child), self.helper.as_mut()].into_iter().flatten() {
            if matches!(child.try_wait(), Ok(None)) {
                let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
                if let Some(pid) = pid {
                    let _ = kill_process_group(pid, Signal::KILL);
                }
            }
            let _ = child.wait();
        }
    }
}

/// Looks for the interface with an address in the network namespace of `pid`.
fn wait_for_interface(pid: u32, name: &str) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(5);
    let route = PathBuf::from(format!("/proc/{pid}/net/route"));
    while Instant::now() < end {
        // Destination 00000000: slirp4netns sets the default route last.
        let text = std::fs::read_to_string(&route).unwrap_or_default();
        if text
            .lines()
            .any(|line| line.starts_with(name) && line.split_whitespace().nth(1) == Some("00000000"))
        {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(5));
    }
    bail!("slirp4netns does not set up {name}")
}

fn slirp_forward(socket: &Path, protocol: &str, port: u16) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(5);
    let mut stream = loop {
        match UnixStream::connect(socket) {
            Ok(stream) => break stream,
            Err(_) if Instant::now() < end => thread::sleep(Duration::from_millis(5)),
            Err(error) => return Err(error).context("cannot reach the API of slirp4netns"),
        }
    };
    let request = serde_json::json!({"execute": "add_hostfwd", "arguments": {
        "proto": protocol, "host_addr": "127.0.0.1", "host_port": port,
        "guest_addr": SLIRP_GUEST, "guest_port": port,
    }});
    stream.write_all(request.to_string().as_bytes())?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    if answer.contains("error") {
        bail!("slirp4netns: {answer}");
    }
    Ok(())
}

/// `kso-bench gate -- CMD`: waits for a line, then becomes CMD.
pub fn gate(command: &[OsString]) -> Result<()> {
    println!("gate");
    std::io::stdout().flush()?;
    // One byte at a time, past std's buffer: what follows the line is the command's input.
    let mut byte = [0_u8];
    while rustix::io::read(rustix::stdio::stdin(), &mut byte)? == 1 && byte != *b"\n" {}
    let (program, arguments) = command.split_first().context("no command")?;
    Err(Command::new(program).args(arguments).exec().into())
}
