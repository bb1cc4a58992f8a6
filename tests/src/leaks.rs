//! What a run leaves behind, and what a running kso holds.

use std::fs;
use std::time::{Duration, Instant};

/// How long what is not needed any more may be kept.
const SETTLING: Duration = Duration::from_secs(10);

/// What a process holds, read from /proc.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resources {
    /// Open descriptors.
    pub descriptors: usize,
    /// Threads.
    pub threads: usize,
    /// Resident memory, KiB.
    pub resident: usize,
}

impl Resources {
    /// Of process `pid`.
    pub fn of(pid: u32) -> Self {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process is there");
        let field = |name: &str| {
            status
                .lines()
                .find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok())
                .unwrap_or(0)
        };
        Self {
            descriptors: fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count),
            threads: field("Threads:"),
            resident: field("VmRSS:"),
        }
    }

    /// Of process `pid` once it holds no more than it may, or after a while: sockets that were made in advance are closed
    /// half a second after they were last wanted, later on a busy machine.
    pub fn settled(pid: u32, mut may: impl FnMut(&Self) -> bool) -> Self {
        let until = Instant::now() + SETTLING;
        loop {
            let now = Self::of(pid);
            if may(&now) || Instant::now() > until {
                return now;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Live processes (zombies apart) whose environment carries `mark`: kso and all that it started.
pub fn marked_processes(mark: &str) -> Vec<(u32, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        if environment.split(|&b| b == 0).any(|variable| variable == mark.as_bytes()) {
            let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if !command.is_empty() {
                found.push((pid, command.replace('\0', " ")));
            }
        }
    }
    found
}

/// Waits until no process carries `mark`.
#[track_caller]
pub fn wait_gone(mark: &str) {
    let start = std::time::Instant::now();
    loop {
        let left = marked_processes(mark);
        if left.is_empty() {
            return;
        }
        assert!(start.elapsed() < Duration::from_secs(5), "processes were left behind: {left:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
