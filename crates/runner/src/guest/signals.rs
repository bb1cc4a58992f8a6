//! Whether a caller that waits has a signal to take.
//!
//! A call that the supervisor has taken is not interrupted by signals (`SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV`): that
//! keeps the short ones whole. One that waits for the world outside is looked after here: its signals are read in
//! `/proc/TID/status` (proc_pid_status(5)), and the call is answered with `ERESTARTSYS`. The kernel replaces
//! that number only on the way to a signal's handler, so it must be certain that *this* thread was chosen for the
//! signal (`complete_signal` in kernel/signal.c): a signal to the thread itself always is; one to the process goes
//! to its leader if that takes it, else to some thread that does.

use std::fs;

/// `SIGSTOP`, `SIGTSTP`, `SIGTTIN`, `SIGTTOU` (signal(7)): no handler runs, but the thread has to leave its call to stop.
const STOPPING: u64 = 0b1111 << 18;

/// The signals of a thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status {
    process: u32,
    threads: u32,
    pending: u64,
    shared: u64,
    blocked: u64,
    caught: u64,
    ignored: u64,
}

/// What a look at a caller said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// Nothing to take.
    Quiet,
    /// A signal may be its own: if it is still there at the next look, it is.
    Perhaps,
    /// It is to run a handler.
    Interrupted,
}

impl Status {
    /// Reads the text of `/proc/TID/status`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut status = Self::default();
        for line in text.lines() {
            let Some((name, value)) = line.split_once(':') else { continue };
            let value = value.trim();
            let mask = || u64::from_str_radix(value, 16).ok();
            match name {
                "Tgid" => status.process = value.parse().ok()?,
                "Threads" => status.threads = value.parse().ok()?,
                "SigPnd" => status.pending = mask()?,
                "ShdPnd" => status.shared = mask()?,
                "SigBlk" => status.blocked = mask()?,
                "SigIgn" => status.ignored = mask()?,
                "SigCgt" => status.caught = mask()?,
                _ => {}
            }
        }
        (status.process != 0).then_some(status)
    }

    /// The status of a thread; `None` if it is gone.
    #[must_use]
    pub fn of(tid: u32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{tid}/status")).ok()?)
    }

    /// Its process.
    #[must_use]
    pub fn process(&self) -> u32 {
        self.process
    }

    fn takes(&self, signals: u64) -> u64 {
        signals & (self.caught | STOPPING & !self.ignored) & !self.blocked
    }
}

/// Looks at the thread `tid`. `others` gives the status of every thread of its process: asked for only if it matters.
#[must_use]
pub fn look(tid: u32, status: &Status, others: impl FnOnce() -> Vec<(u32, Status)>) -> Look {
    if status.takes(status.pending) != 0 {
        return Look::Interrupted;
    }
    let shared = status.takes(status.shared);
    if shared == 0 {
        return Look::Quiet;
    }
    if status.threads == 1 {
        return Look::Interrupted;
    }
    if tid == status.process {
        return Look::Perhaps;
    }
    let alone = others().iter().all(|(other, status)| *other == tid || status.takes(shared) == 0);
    if alone { Look::Perhaps } else { Look::Quiet }
}

/// The status of every thread of a process.
#[must_use]
pub fn all_of(process: u32) -> Vec<(u32, Status)> {
    let Ok(entries) = fs::read_dir(format!("/proc/{process}/task")) else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|tid| Some((tid, Status::of(tid)?)))
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const TEXT: &str = "Name:\tx\nTgid:\t7\nPid:\t7\nThreads:\t1\nSigQ:\t0/1\nSigPnd:\t0000000000000000\n\
        ShdPnd:\t0000000000000200\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000001000\nSigCgt:\t0000000000000200\n";

    #[test]
    fn the_text_is_read() {
        let status = Status::parse(TEXT).unwrap();
        assert_eq!((status.process, status.threads, status.shared, status.caught), (7, 1, 0x200, 0x200));
        assert_eq!(Status::parse("nonsense"), None);
        assert!(Status::of(std::process::id()).is_some());
    }

    #[test]
    fn only_the_thread_that_takes_a_signal_is_interrupted() {
        let status = Status::parse(TEXT).unwrap();
        let nobody = Vec::new;
        assert_eq!(look(7, &status, nobody), Look::Interrupted);
        assert_eq!(look(7, &Status { blocked: 0x200, ..status }, nobody), Look::Quiet);
        assert_eq!(
            look(7, &Status { caught: 0, shared: 1 << 19, ..status }, nobody),
            Look::Interrupted,
            "Ctrl-Z"
        );
        assert_eq!(
            look(7, &Status { caught: 0, ..status }, nobody),
            Look::Quiet,
            "ignored, or it would be dead"
        );
        let many = Status { threads: 2, ..status };
        assert_eq!(look(7, &many, nobody), Look::Perhaps, "the leader is chosen first");
        assert_eq!(look(8, &many, || vec![(7, many), (8, many)]), Look::Quiet, "the leader takes it");
        let deaf = Status { blocked: 0x200, ..many };
        assert_eq!(look(8, &many, || vec![(7, deaf), (8, many)]), Look::Perhaps);
        let own = Status { pending: 0x200, shared: 0, ..many };
        assert_eq!(look(8, &own, nobody), Look::Interrupted);
    }
}
