//! Who the program is inside: the same as outside (user_namespaces(7)).

use rustix::process::{getgid, getuid};
use std::fs;
use std::io;

/// Writes the id maps of `pid`'s user namespace. With the privilege to do so every id that exists here is
/// mapped to itself, so that a server can change to its own user; without it only the caller's own.
pub(super) fn write_maps(pid: u32) -> io::Result<()> {
    let whole = identity("/proc/self/uid_map").and_then(|uids| {
        fs::write(format!("/proc/{pid}/uid_map"), uids)?;
        fs::write(format!("/proc/{pid}/gid_map"), identity("/proc/self/gid_map")?)
    });
    match whole {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => own_only(pid),
        Err(error) => Err(error),
    }
}

fn own_only(pid: u32) -> io::Result<()> {
    let (uid, gid) = (getuid().as_raw(), getgid().as_raw());
    fs::write(format!("/proc/{pid}/uid_map"), format!("{uid} {uid} 1"))?;
    // Without this the gid map may not be written by an unprivileged process.
    fs::write(format!("/proc/{pid}/setgroups"), "deny")?;
    fs::write(format!("/proc/{pid}/gid_map"), format!("{gid} {gid} 1"))
}

/// A map of every id of our own namespace to itself.
fn identity(own: &str) -> io::Result<String> {
    Ok(identity_of(&fs::read_to_string(own)?))
}

fn identity_of(map: &str) -> String {
    map.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let (inside, _, count) = (words.next()?, words.next()?, words.next()?);
            Some(format!("{inside} {inside} {count}\n"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_extent_is_mapped_to_itself() {
        assert_eq!(super::identity_of("  0  100000  1000\n1000 1000 1\n"), "0 0 1000\n1000 1000 1\n");
    }
}
