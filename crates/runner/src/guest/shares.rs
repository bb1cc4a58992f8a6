//! Which files are the host's, and what their server calls them.
//!
//! A file of virtiofs has a number that its server gave it when it was looked up. The guest's kernel keeps it, and tells it by
//! name_to_handle_at(2) of an open descriptor: no path is looked at, and nobody is asked. Which server it was, the mount tells by its
//! tag. File systems that programs may mount themselves (FUSE) are told apart by their kind: their numbers are not the host's.

use kso_sys::file::FileHandle;
use rustix::fs::{AtFlags, FileType, OFlags, StatxFlags, fcntl_getfl, statx};
use std::collections::HashMap;
use std::io;
use std::os::fd::BorrowedFd;

/// So many file systems are remembered.
const MAX_KNOWN: usize = 256;
/// Longest list of mounts that is read, bytes.
const MAX_LIST: u64 = 4 << 20;

/// A file of the host's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SharedFile {
    /// The tag of its share.
    pub share: String,
    /// Its number.
    pub node: u64,
}

type Device = (u32, u32);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Shares {
    /// The tags of shares, by their device: `None` for what is no share.
    known: HashMap<Device, Option<String>>,
}

impl Shares {
    /// What a descriptor is open on for reading. `None`: nothing of the host's.
    pub(super) fn find(&mut self, file: BorrowedFd<'_>) -> io::Result<Option<SharedFile>> {
        let flags = fcntl_getfl(file)?;
        if flags.contains(OFlags::PATH) || flags & OFlags::RWMODE == OFlags::WRONLY {
            return Ok(None);
        }
        // What never changes is known without asking the host.
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let stat = statx(file, c"", flags, StatxFlags::TYPE)?;
        if FileType::from_raw_mode(stat.stx_mode.into()) != FileType::RegularFile {
            return Ok(None);
        }
        let Some(share) = self.share((stat.stx_dev_major, stat.stx_dev_minor))? else { return Ok(None) };
        let Some(node) = FileHandle::of(file)?.fuse_node() else { return Ok(None) };
        Ok(Some(SharedFile { share, node }))
    }

    fn share(&mut self, device: Device) -> io::Result<Option<String>> {
        if let Some(known) = self.known.get(&device) {
            return Ok(known.clone());
        }
        let mut list = String::new();
        io::Read::read_to_string(
            &mut io::Read::take(std::fs::File::open("/proc/self/mountinfo")?, MAX_LIST),
            &mut list,
        )?;
        let found = of_device(&list, device);
        if self.known.len() >= MAX_KNOWN {
            self.known.clear();
        }
        self.known.insert(device, found.clone());
        Ok(found)
    }
}

/// The tag of the share that is mounted as this device (proc_pid_mountinfo(5)).
fn of_device(list: &str, (major, minor): Device) -> Option<String> {
    let device = format!("{major}:{minor}");
    list.lines().find_map(|line| {
        let (mount, system) = line.split_once(" - ")?;
        if mount.split(' ').nth(2)? != device {
            return None;
        }
        let mut words = system.split(' ');
        let (kind, tag) = (words.next()?, words.next()?);
        // A tag with a space or the like is written otherwise than it is.
        let plain = kind == "virtiofs" && !tag.contains('\\') && tag.len() <= kso_wire::guest::MAX_SHARE;
        plain.then(|| tag.to_owned())
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    const LIST: &str = "22 1 0:20 / / rw,relatime - overlay overlay rw,lowerdir=/kso/lower\n\
        23 22 0:21 / /kso/lower ro,relatime - virtiofs kso0 ro\n\
        30 22 0:33 / /srv rw,nosuid,nodev,relatime shared:1 - virtiofs kso1 rw\n\
        31 22 0:34 / /fuse rw - fuse.sshfs kso1 rw,user_id=0\n\
        32 22 0:35 / /odd rw - virtiofs a\\040b rw\n\
        33 30 0:36 / /srv/sub rw\n";

    #[test]
    fn a_share_is_known_by_its_device() {
        assert_eq!(of_device(LIST, (0, 33)).as_deref(), Some("kso1"));
        assert_eq!(of_device(LIST, (0, 21)).as_deref(), Some("kso0"));
        for other in [20, 34, 35, 36, 3, 333] {
            assert_eq!(of_device(LIST, (0, other)), None, "0:{other}");
        }
    }

    #[test]
    fn files_that_are_not_the_hosts_are_not_found() {
        let mut shares = Shares::default();
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        assert_eq!(shares.find(file.as_fd()).unwrap(), None);
        let (pipe, _) = std::io::pipe().unwrap();
        assert_eq!(shares.find(pipe.as_fd()).unwrap(), None);
        assert_eq!(shares.known.len(), 1);
    }
}
