//! A running QEMU.
//!
//! ```text
//!   start --> [QEMU runs] -- console bytes --> serve_console
//!                 |  the guest powers off, panics, is killed
//!                 v
//!             ended_fd readable --> wait
//! ```
//!
//! QEMU dies with the thread that started it, and has no file of its own anywhere: whatever is killed, nothing stays behind.

use crate::qemu::{self, MachineConfig};
use rustix::event::epoll;
use rustix::process::{PidfdFlags, pidfd_open};
use std::collections::VecDeque;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Duration;

/// So much of a console is remembered, bytes.
const MAX_CONSOLE: usize = 64 << 10;
/// So much is read at a time, bytes.
const CHUNK: usize = 4096;
/// So many chunks are read before others get their turn.
const MAX_CHUNKS: usize = 16;
/// So many of the last lines are told when something went wrong.
const TOLD_LINES: usize = 20;
/// In a second (sysconf(3), `_SC_CLK_TCK`): the same on every Linux that QEMU runs on.
const TICKS: u64 = 100;
/// So long is the time stamp counter measured: enough for one part in a hundred thousand.
const MEASURED: Duration = Duration::from_millis(8);

/// Why a machine did not start.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// No emulator.
    #[error(
        "{} is missing, which runs the guest. On Debian:\n  apt-get install --no-install-recommends qemu-system-x86",
        qemu.display()
    )]
    NoQemu {
        /// What was looked for.
        qemu: PathBuf,
    },
    /// It could not be started.
    #[error("cannot start {}: {source}", qemu.display())]
    Start {
        /// The emulator.
        qemu: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Pipes, epoll.
    #[error("cannot watch the guest: {0}")]
    Watch(#[from] io::Error),
}

/// A running QEMU. Dropping it kills it.
#[derive(Debug)]
pub struct Machine {
    child: Child,
    pidfd: OwnedFd,
    events: OwnedFd,
    console: Option<ChildStdout>,
    complaints: Option<ChildStderr>,
    console_tail: VecDeque<u8>,
    complaint_tail: VecDeque<u8>,
}

impl Machine {
    /// Starts QEMU. Its devices must listen already.
    ///
    /// # Errors
    /// See [`MachineError`].
    pub fn start(config: &MachineConfig) -> Result<Self, MachineError> {
        let tsc = if config.accelerator == qemu::Accelerator::Tcg { tsc_khz() } else { None };
        let mut command = Command::new(&config.qemu);
        command.args(qemu::arguments(config, tsc));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = kso_sys::launch::spawn_tied(command, &config.inherited()).map_err(|source| {
            let qemu = config.qemu.clone();
            match source.kind() {
                io::ErrorKind::NotFound => MachineError::NoQemu { qemu },
                _ => MachineError::Start { qemu, source },
            }
        })?;
        let (console, complaints) = (child.stdout.take(), child.stderr.take());
        match watch(&child, console.as_ref(), complaints.as_ref()) {
            Ok((pidfd, events)) => Ok(Self {
                child,
                pidfd,
                events,
                console,
                complaints,
                console_tail: VecDeque::new(),
                complaint_tail: VecDeque::new(),
            }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error.into())
            }
        }
    }

    /// Readable when QEMU has ended.
    #[must_use]
    pub fn ended_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Readable when there is something for [`Self::serve_console`].
    #[must_use]
    pub fn console_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    /// Reads what the guest wrote to its console, and QEMU to its standard error. Call it whenever there is some, or
    /// the guest will wait. What the guest wrote is handed to `show`, too; it is the guest's, and may hold anything.
    pub fn serve_console(&mut self, show: &mut dyn FnMut(&[u8])) {
        if let Some(console) = &mut self.console
            && !drain(console, &mut self.console_tail, show)
        {
            self.console = None;
        }
        if let Some(complaints) = &mut self.complaints
            && !drain(complaints, &mut self.complaint_tail, &mut |_| {})
        {
            self.complaints = None;
        }
    }

    /// The console's last lines, and what QEMU itself had to say, fit for a terminal: what to tell when a guest did not
    /// come up.
    #[must_use]
    pub fn last_words(&self) -> String {
        let mut text = last_lines(&self.complaint_tail);
        let console = last_lines(&self.console_tail);
        if !console.is_empty() {
            if !text.is_empty() {
                text.push('\n');
            }
            text.push_str("the guest's console ends with:\n");
            text.push_str(&console);
        }
        text
    }

    /// Everything that is remembered of the console.
    #[must_use]
    pub fn console(&self) -> Vec<u8> {
        self.console_tail.iter().copied().collect()
    }

    /// How much of a processor QEMU has used: the guest runs, whatever else it does.
    #[must_use]
    pub fn processor_time(&self) -> Option<Duration> {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).ok()?;
        // After the name, which may hold anything: utime and stime are the 14th and 15th field (proc(5)).
        let mut fields = text.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
        let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        Some(Duration::from_millis(user.saturating_add(system).saturating_mul(1000) / TICKS))
    }

    /// QEMU's number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it now. The guest has no disk, so nothing can be lost but what it still wanted to say.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// waitpid(2).
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn watch(
    child: &Child,
    console: Option<&ChildStdout>,
    complaints: Option<&ChildStderr>,
) -> io::Result<(OwnedFd, OwnedFd)> {
    let pid = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw);
    let pid = pid.ok_or(io::ErrorKind::InvalidData)?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let pipes = [console.map(AsFd::as_fd), complaints.map(AsFd::as_fd)];
    for pipe in pipes.into_iter().flatten() {
        // Our end only: QEMU's is another file.
        rustix::io::ioctl_fionbio(pipe, true)?;
        epoll::add(&events, pipe, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
    }
    Ok((pidfd, events))
}

/// Reads what is there; false at its end.
fn drain(from: &mut impl Read, tail: &mut VecDeque<u8>, show: &mut dyn FnMut(&[u8])) -> bool {
    let mut chunk = [0; CHUNK];
    for _ in 0..MAX_CHUNKS {
        match from.read(&mut chunk) {
            Ok(0) => return false,
            Ok(count) => {
                let bytes = chunk.get(..count).unwrap_or_default();
                show(bytes);
                tail.extend(bytes);
                let surplus = tail.len().saturating_sub(MAX_CONSOLE);
                tail.drain(..surplus);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
        }
    }
    true
}

/// The last lines, or those from a panic on: what follows it may be long. Without anything that a terminal would obey.
fn last_lines(bytes: &VecDeque<u8>) -> String {
    let bytes: Vec<u8> = bytes.iter().copied().collect();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<String> = text
        .lines()
        .map(|line| line.chars().filter(|c| !c.is_control() || *c == '\t').collect::<String>())
        .filter(|line| !line.trim().is_empty())
        .collect();
    let panicked = lines.iter().rposition(|line| line.contains("Kernel panic - not syncing"));
    let first = lines.len().saturating_sub(TOLD_LINES).min(panicked.unwrap_or(usize::MAX));
    lines
        .get(first..)
        .unwrap_or_default()
        .iter()
        .take(TOLD_LINES)
        .map(|line| format!("  {}", line.trim_end()))
        .collect::<Vec<_>>()
        .join("\n")
}

/// The frequency of the host's time stamp counter, kHz. It is the same until the host restarts: measured once.
fn tsc_khz() -> Option<u64> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let file = crate::cache::directory().ok().map(|directory| directory.join("tsc"));
    let known = file.as_ref().and_then(|file| std::fs::read_to_string(file).ok()).and_then(|text| {
        let (of, khz) = text.split_once(' ')?;
        if of == boot.trim() { khz.trim().parse().ok() } else { None }
    });
    known.or_else(|| {
        let khz = kso_sys::launch::tsc_khz(MEASURED)?;
        if let Some(file) = file {
            let _ = crate::cache::write(&file, format!("{} {khz}\n", boot.trim()).as_bytes());
        }
        Some(khz)
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_is_remembered_is_bounded_and_fit_to_show() {
        let mut tail = VecDeque::new();
        let text = "x".repeat(MAX_CONSOLE) + "\r\n\x1b[31mpanic\x07\r\n\r\n";
        let mut shown = 0;
        let mut from = text.as_bytes();
        while drain(&mut from, &mut tail, &mut |bytes| shown += bytes.len()) {}
        assert_eq!((shown, tail.len()), (text.len(), MAX_CONSOLE));
        assert!(last_lines(&tail).ends_with("\n  [31mpanic"));
        assert_eq!(last_lines(&VecDeque::new()), "");
    }

    #[test]
    fn a_missing_emulator_is_told() {
        let config = MachineConfig {
            qemu: "/nowhere/qemu".into(),
            kernel: "/k".into(),
            initramfs: "/i".into(),
            kind: qemu::MachineKind::Microvm,
            accelerator: qemu::Accelerator::Kvm,
            memory: 64,
            cpus: 1,
            vsock: None,
            file_systems: vec![],
            nics: vec![],
            disks: vec![],
            append: vec![],
            arguments: vec![],
            talkative: false,
        };
        let error = Machine::start(&config).unwrap_err();
        assert!(error.to_string().contains("apt-get install"), "{error}");
    }
}
