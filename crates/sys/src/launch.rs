//! Starting another program that shall not outlive us, and the time stamp counter it needs to be told.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// Starts `command` in a process group of its own. It gets these descriptors under their own numbers, and is killed when
/// the calling *thread* ends, however that happens (prctl(2), `PR_SET_PDEATHSIG`): call it on one that lasts.
///
/// # Errors
/// fork(2), execve(2).
pub fn spawn_tied(mut command: Command, inherited: &[BorrowedFd<'_>]) -> io::Result<Child> {
    let numbers: Vec<i32> = inherited.iter().map(AsRawFd::as_raw_fd).collect();
    let parent = std::process::id();
    command.process_group(0);
    let prepare = move || {
        super::process::die_with_parent()?;
        // SAFETY: no memory is involved.
        if unsafe { libc::getppid() } as u32 != parent {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        for &number in &numbers {
            // SAFETY: plain fcntl; the descriptor is open, for the parent holds it borrowed until spawn returns.
            if unsafe { libc::fcntl(number, libc::F_SETFD, 0) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec and calls only what is async-signal-safe: prctl, getppid and fcntl.
    // It allocates nothing: io::Error::from_raw_os_error does not.
    unsafe { command.pre_exec(prepare) };
    command.spawn()
}

/// The frequency of the time stamp counter, kHz, measured for so long.
#[cfg(target_arch = "x86_64")]
#[must_use]
pub fn tsc_khz(time: Duration) -> Option<u64> {
    // SAFETY: every x86-64 processor has the instruction; it touches no memory.
    let stamp = || (Instant::now(), unsafe { core::arch::x86_64::_rdtsc() });
    let (start, first) = stamp();
    std::thread::sleep(time);
    let (end, last) = stamp();
    let nanoseconds = u64::try_from(end.duration_since(start).as_nanos()).ok().filter(|&time| time > 0)?;
    u64::try_from(u128::from(last.wrapping_sub(first)) * 1_000_000 / u128::from(nanoseconds)).ok()
}

/// There is none.
#[cfg(not(target_arch = "x86_64"))]
#[must_use]
pub fn tsc_khz(_: Duration) -> Option<u64> {
    None
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::process::Stdio;

    #[test]
    fn a_tied_program_has_its_descriptors_and_a_group_of_its_own() {
        let file = std::fs::File::open("/proc/self/status").unwrap();
        let number = file.as_raw_fd();
        let mut command = Command::new("sh");
        command
            .arg("-c")
            .arg(format!("head -c 5 <&{number}; ps -o pgid= $$ | tr -d ' '"))
            .stdout(Stdio::piped());
        let child = spawn_tied(command, &[file.as_fd()]).unwrap();
        let pid = child.id();
        let output = child.wait_with_output().unwrap();
        assert!(output.stdout.starts_with(b"Name:"), "{output:?}");
        assert_ne!(pid, std::process::id());
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn the_counter_has_a_plausible_frequency() {
        let khz = tsc_khz(Duration::from_millis(20)).unwrap();
        assert!((100_000..20_000_000).contains(&khz), "{khz}");
    }
}
