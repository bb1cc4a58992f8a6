//! Guests: under `kso vm`, with the agent in them; and bare, with this program as their `/init`.

use std::ffi::OsString;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use kso_vm::{Kernel, Machine, MachineConfig, MachineKind};
use rustix::system::RebootCommand;

use super::agent::{Answer, Request};
use crate::sandbox::{Job, Tools};

/// A guest boots in a second or two, even emulated; not on a busy machine.
const BOOT_PATIENCE: Duration = Duration::from_secs(90);
/// What the bare guest says first: what kso's own init says when it is asked whether a kernel runs.
const HELLO: &str = "kso: init runs";

/// A guest under `kso vm`, with the agent in it.
pub struct Guest {
    job: Job,
}

impl Guest {
    /// Boots it with more options of `kso vm`.
    pub fn start(tools: &Tools, kernel: &Kernel, options: &[String]) -> Result<Guest> {
        let mut words: Vec<OsString> = vec![tools.kso.clone().into(), "vm".into()];
        words.extend(["--kernel".into(), kernel.release.clone().into()]);
        let place = tools.this.parent().context("a directory")?.display();
        words.extend(["-v".into(), format!("{place}:{place}:ro").into()]);
        words.extend(options.iter().map(OsString::from));
        words.extend(["--".into(), tools.this.clone().into(), "agent".into()]);
        let mut job = Job::spawn(&[], &words)?;
        job.expect_line("agent", BOOT_PATIENCE)?;
        Ok(Guest { job })
    }

    /// The launcher, which is the broker and has the device.
    pub fn pid(&self) -> u32 {
        self.job.pid()
    }

    /// Has something done in it.
    pub fn ask(&mut self, request: &Request, wait: Duration) -> Result<String> {
        self.job.say(&serde_json::to_string(request)?)?;
        let line = self.job.line(wait)?;
        let answer: Answer =
            serde_json::from_str(&line).with_context(|| format!("the agent says `{line}`"))?;
        answer.map_err(|error| anyhow!("in the guest: {error}"))
    }
}

/// Milliseconds from the start of QEMU to the first line of a bare `/init`: no device, nothing loaded.
pub fn bare_boot(kernel: &Kernel) -> Result<f64> {
    let accelerator = kso_vm::accelerator(kernel);
    let config = MachineConfig::new(kernel, MachineKind::Microvm, accelerator, &[])?;
    let start = Instant::now();
    let mut machine = Machine::start(&config)?;
    while !String::from_utf8_lossy(&machine.console()).contains(HELLO) {
        if start.elapsed() > BOOT_PATIENCE {
            bail!("the bare guest does not come up: {}", machine.last_words());
        }
        let mut fds =
            [rustix::event::PollFd::from_borrowed_fd(machine.console_fd(), rustix::event::PollFlags::IN)];
        let pause = rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 };
        rustix::event::poll(&mut fds, Some(&pause))?;
        machine.serve_console(&mut |_| {});
    }
    let elapsed = start.elapsed();
    machine.kill();
    machine.wait()?;
    Ok(elapsed.as_secs_f64() * 1e3)
}

/// Milliseconds that `kso vm -- true` takes.
pub fn whole(tools: &Tools, kernel: &Kernel) -> Result<f64> {
    let start = Instant::now();
    let output = Command::new(&tools.kso)
        .args(["vm", "--kernel", &kernel.release, "--", "true"])
        .stdin(Stdio::null())
        .output()
        .context("cannot start kso")?;
    let elapsed = start.elapsed();
    if !output.status.success() {
        bail!("`kso vm -- true` ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(elapsed.as_secs_f64() * 1e3)
}

/// This program as the first of a guest: it says so.
pub fn be_init() -> Result<()> {
    println!("{HELLO}");
    std::io::stdout().flush()?;
    rustix::system::reboot(RebootCommand::PowerOff)?;
    Ok(())
}
