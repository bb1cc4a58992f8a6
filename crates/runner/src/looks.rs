//! Files of `/proc` that are read for each call of a thread, kept open: opening one costs more than all else that is
//! done with it. Reading one again tells of what is so by then, and fails once its thread has ended
//! (`seq_show` in fs/proc/fd.c, `comm_show` in fs/proc/base.c).

use rustix::fs::{Mode, OFlags, open};
use rustix::io::pread;
use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;

/// So many threads are remembered.
const MAX_THREADS: usize = 64;
/// So many descriptors of each.
const MAX_INFOS: usize = 4;

/// The files of one thread.
#[derive(Debug, Default)]
struct Files {
    name: Option<OwnedFd>,
    infos: VecDeque<(i32, OwnedFd)>,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct Looks(HashMap<u32, Files>);

impl Looks {
    /// The name of what a thread runs; empty if it is gone.
    pub(crate) fn program(&mut self, tid: u32) -> String {
        let mut bytes = [0; kso_wire::MAX_PROGRAM];
        let files = self.files(tid);
        let kept = files.name.as_ref().and_then(|file| pread(file, &mut bytes, 0).ok());
        let read = kept.or_else(|| {
            files.name = open_file(format!("/proc/{tid}/comm"));
            pread(files.name.as_ref()?, &mut bytes, 0).ok()
        });
        let mut name =
            String::from_utf8_lossy(bytes.get(..read.unwrap_or(0)).unwrap_or_default()).trim_end().to_owned();
        while name.len() > kso_wire::MAX_PROGRAM {
            name.pop();
        }
        name
    }

    /// Whether a descriptor of a thread closes on exec. `None`: it has no such descriptor.
    pub(crate) fn closes_on_exec(&mut self, tid: u32, number: i32) -> Option<bool> {
        let files = self.files(tid);
        let kept = files.infos.iter().find(|(other, _)| *other == number);
        if let Some(flags) = kept.and_then(|(_, file)| flags(file)) {
            return Some(flags);
        }
        // Not kept, or it is of a thread that had this number before.
        files.infos.retain(|(other, _)| *other != number);
        let file = open_file(format!("/proc/{tid}/fdinfo/{number}"))?;
        let flags = flags(&file);
        files.infos.truncate(MAX_INFOS - 1);
        files.infos.push_front((number, file));
        flags
    }

    fn files(&mut self, tid: u32) -> &mut Files {
        if self.0.len() >= MAX_THREADS && !self.0.contains_key(&tid) {
            self.0.clear();
        }
        self.0.entry(tid).or_default()
    }
}

fn open_file(path: String) -> Option<OwnedFd> {
    open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()
}

fn flags(file: &OwnedFd) -> Option<bool> {
    let mut bytes = [0; 64];
    let length = pread(file, &mut bytes, 0).ok()?;
    // The flags are in the second line: proc_pid_fdinfo(5).
    let text = std::str::from_utf8(bytes.get(..length)?).ok()?;
    let flags = text.lines().find_map(|line| line.strip_prefix("flags:"))?;
    Some(OFlags::from_bits_retain(u32::from_str_radix(flags.trim(), 8).ok()?).contains(OFlags::CLOEXEC))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn a_kept_file_tells_of_what_has_the_number_by_then() {
        let mut looks = Looks::default();
        let own = std::process::id();
        let file = std::fs::File::open("/dev/null").unwrap();
        let number = file.as_raw_fd();
        assert_eq!(looks.closes_on_exec(own, number), Some(true));
        rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty()).unwrap();
        assert_eq!(looks.closes_on_exec(own, number), Some(false));
        assert_eq!(looks.closes_on_exec(own, 1_000_000), None);
        assert!(!looks.program(own).is_empty());
        assert_eq!(looks.program(own), looks.program(own));
        assert_eq!(looks.program(u32::MAX), "");
    }
}
