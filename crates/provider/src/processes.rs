//! Processes and the sockets they have, from proc(5).

use std::collections::HashMap;
use std::fs;

/// At most so many processes of a tree are looked at.
const MAX_PROCESSES: usize = 4096;

/// A process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its number on this kernel.
    pub pid: u32,
    /// Its name.
    pub program: String,
}

/// The process `root` and all below it. Orphans in a PID namespace become children of its first process, so
/// with that one as root nothing of a sandbox is left out.
#[must_use]
pub fn tree(root: u32) -> Vec<Process> {
    let mut children: HashMap<u32, Vec<Process>> = HashMap::new();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Some((program, parent)) =
            fs::read_to_string(format!("/proc/{pid}/stat")).ok().and_then(|text| stat(&text))
        else {
            continue;
        };
        let process = Process { pid, program };
        if pid == root {
            found.push(process);
        } else {
            children.entry(parent).or_default().push(process);
        }
    }
    let mut next = 0;
    while let Some(process) = found.get(next)
        && found.len() < MAX_PROCESSES
    {
        let below = children.remove(&process.pid).unwrap_or_default();
        found.extend(below);
        next += 1;
    }
    found
}

/// Name and parent in a line of /proc/PID/stat. The name is in parentheses and may have any in it.
fn stat(text: &str) -> Option<(String, u32)> {
    let (head, tail) = text.rsplit_once(')')?;
    let (_, name) = head.split_once('(')?;
    Some((name.to_owned(), tail.split_ascii_whitespace().nth(1)?.parse().ok()?))
}

/// The inodes of the sockets that a process has. Of another user's process none are seen.
#[must_use]
pub fn sockets(pid: u32) -> Vec<u32> {
    fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let target = fs::read_link(entry.path()).ok()?;
            target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
        })
        .collect()
}

/// Whether a process lives in the same user namespace as this one; `None` when that cannot be seen.
#[must_use]
pub fn in_our_user_namespace(pid: u32) -> Option<bool> {
    let of = |who: &str| fs::read_link(format!("/proc/{who}/ns/user")).ok();
    Some(of("self")? == of(&pid.to_string())?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn our_own_child_and_socket_are_found() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let inode = rustix::fs::fstat(listener.as_fd()).unwrap().st_ino;
        assert!(sockets(std::process::id()).iter().any(|&found| u64::from(found) == inode));
        let mut child = std::process::Command::new("sleep").arg("5").spawn().unwrap();
        let tree = tree(std::process::id());
        assert_eq!(tree.first().unwrap().pid, std::process::id());
        assert!(tree.iter().any(|process| process.pid == child.id()));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(in_our_user_namespace(std::process::id()), Some(true));
        assert_eq!(in_our_user_namespace(u32::MAX), None);
    }

    #[test]
    fn a_name_with_parentheses_is_read() {
        assert_eq!(stat("12 (a) b) (c)) S 7 1 1"), Some(("a) b) (c)".into(), 7)));
        assert_eq!(stat("12 a"), None);
    }
}
