//! What the processes of a sandbox's machinery cost, read from /proc.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

/// Sums over the processes of one program.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    pub processes: u64,
    /// Resident bytes, shared pages counted in each process.
    pub resident: u64,
    /// Resident bytes, a shared page divided among its users.
    pub proportional: u64,
    pub descriptors: u64,
    pub threads: u64,
}

/// The usage of `root` and of those of its descendants that run the same executable: kso's supervisor and init,
/// not the program in the sandbox.
pub fn usage(root: u32) -> Result<Usage> {
    let program = executable(root);
    ensure!(program.is_some(), "process {root} has ended");
    let parents = parents();
    let mut tree = vec![root];
    let mut at = 0;
    while let Some(pid) = tree.get(at).copied() {
        tree.extend(parents.iter().filter(|(_, parent)| *parent == pid).map(|(child, _)| *child));
        at += 1;
    }
    let mut sum = Usage::default();
    for pid in tree.into_iter().filter(|pid| executable(*pid) == program) {
        add(&mut sum, &PathBuf::from(format!("/proc/{pid}")));
    }
    Ok(sum)
}

fn executable(pid: u32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/exe")).ok()
}

/// Every process with its parent.
fn parents() -> Vec<(u32, u32)> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(|pid: u32| {
            let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            // proc_pid_stat(5): the name may contain anything, so count from the last parenthesis.
            let parent = text.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
            Some((pid, parent))
        })
        .collect()
}

fn add(sum: &mut Usage, process: &Path) {
    sum.processes += 1;
    let status = fs::read_to_string(process.join("status")).unwrap_or_default();
    sum.resident += field(&status, "VmRSS:") * 1024;
    sum.threads += field(&status, "Threads:");
    let rollup = fs::read_to_string(process.join("smaps_rollup")).unwrap_or_default();
    sum.proportional += field(&rollup, "Pss:") * 1024;
    sum.descriptors += fs::read_dir(process.join("fd")).map_or(0, |entries| entries.count() as u64);
}

fn field(text: &str, name: &str) -> u64 {
    text.lines()
        .find_map(|line| line.strip_prefix(name))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn own_usage() {
        let usage = usage(std::process::id()).unwrap();
        assert!(usage.processes >= 1 && usage.resident > 0 && usage.descriptors > 2 && usage.threads >= 1);
    }

    #[test]
    fn fields() {
        assert_eq!(field("Name:\tx\nVmRSS:\t  12 kB\n", "VmRSS:"), 12);
        assert_eq!(field("", "VmRSS:"), 0);
    }
}
