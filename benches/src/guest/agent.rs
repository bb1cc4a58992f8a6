//! What the harness has done inside a guest: one JSON request a line on standard input, one answer a line.
//!
//! ```text
//!   kso-bench guest --pipe--> kso vm --stream--> kso-bench agent --> its clients and servers
//! ```
//!
//! One guest boots for a whole run, so that every way out of it is measured in the same machine.

use std::collections::HashMap;
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::process::{Child, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

/// Something to do in the guest. Commands are words for this very program, unless they begin with a path.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// Run a command to its end: its output.
    Run(Vec<String>),
    /// Start a command, whose standard input stays open, under a name.
    Start(String, Vec<String>),
    /// A line for such a command, if there is one to say; then its next line.
    Ask(String, Option<String>),
    /// Close its standard input and wait for its end.
    Stop(String),
    /// Give the NIC with this MAC address an IPv4 address and bring it up.
    Address(String, String),
    /// A number of /proc/meminfo, KiB.
    Memory(String),
}

/// What came of it.
pub type Answer = Result<String, String>;

struct Process {
    child: Child,
    output: BufReader<ChildStdout>,
}

/// `kso-bench agent`.
pub fn run() -> Result<()> {
    let mut processes = HashMap::new();
    println!("agent");
    for line in io::stdin().lock().lines() {
        let answer: Answer = serde_json::from_str(&line?)
            .context("a request")
            .and_then(|request| serve(request, &mut processes))
            .map_err(|error| format!("{error:#}"));
        let mut out = io::stdout().lock();
        serde_json::to_writer(&mut out, &answer)?;
        out.write_all(b"\n")?;
        out.flush()?;
    }
    for (_, mut process) in processes {
        let _ = process.child.kill();
    }
    Ok(())
}

fn serve(request: Request, processes: &mut HashMap<String, Process>) -> Result<String> {
    match request {
        Request::Run(words) => output(&words),
        Request::Start(name, words) => {
            let mut child = command(&words)?.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
            let output = BufReader::new(child.stdout.take().context("no output")?);
            processes.insert(name, Process { child, output });
            Ok(String::new())
        }
        Request::Ask(name, line) => {
            let process = processes.get_mut(&name).context("there is no such command")?;
            if let Some(line) = line {
                let input = process.child.stdin.as_mut().context("no input")?;
                writeln!(input, "{line}")?;
            }
            let mut answer = String::new();
            ensure!(process.output.read_line(&mut answer)? > 0, "{name} ended");
            Ok(answer.trim_end().to_owned())
        }
        Request::Stop(name) => {
            let mut process = processes.remove(&name).context("there is no such command")?;
            drop(process.child.stdin.take());
            Ok(process.child.wait()?.to_string())
        }
        Request::Address(mac, address) => {
            let nic = nic(&mac)?;
            for words in [vec!["address", "add", &address, "dev", &nic], vec!["link", "set", &nic, "up"]] {
                let words = ["/sbin/ip"].into_iter().chain(words).map(str::to_owned).collect::<Vec<_>>();
                output(&words)?;
            }
            Ok(nic)
        }
        Request::Memory(name) => {
            let text = fs::read_to_string("/proc/meminfo")?;
            let line = text.lines().find_map(|line| line.strip_prefix(&name)?.strip_prefix(':'));
            Ok(line.and_then(|rest| rest.split_whitespace().next()).context("no such number")?.to_owned())
        }
    }
}

fn command(words: &[String]) -> Result<Command> {
    let (first, rest) = words.split_first().context("an empty command")?;
    if first.starts_with('/') {
        let mut command = Command::new(first);
        command.args(rest);
        return Ok(command);
    }
    let mut command = Command::new(std::env::current_exe()?);
    command.args(words);
    Ok(command)
}

fn output(words: &[String]) -> Result<String> {
    let done = command(words)?.stdin(Stdio::null()).output()?;
    if !done.status.success() {
        bail!("{}: {} {}", words.join(" "), done.status, String::from_utf8_lossy(&done.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&done.stdout).trim_end().to_owned())
}

/// The name of a NIC.
fn nic(mac: &str) -> Result<String> {
    for entry in fs::read_dir("/sys/class/net")?.flatten() {
        let address = fs::read_to_string(entry.path().join("address")).unwrap_or_default();
        if address.trim() == mac {
            return Ok(entry.file_name().to_string_lossy().into_owned());
        }
    }
    bail!("no NIC has the address {mac}")
}
