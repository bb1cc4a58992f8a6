//! A guest that is an external kernel: `kso_wire::machine` says what it is told.
//!
//! ```text
//!   network card --> disks, mounted --> PROVIDE: a listener for streams, then the control stream to the host
//!                                          | provider, until the host closes that
//!                    disks, unmounted <----+
//! ```

use crate::boot::mount_at;
use crate::{host, machine};
use kso_provider::server::{Door, Limits, Shared};
use kso_sys::{link, process, vsock};
use kso_wire::guest::ports;
use kso_wire::machine::{Disk, Machine};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::{MountFlags, UnmountFlags, mount_remount, unmount};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The network card's name: the only one's.
const CARD: &str = "eth0";
/// What a disk's file system is.
const FILE_SYSTEM: &str = "ext4";
/// Devices show up within this time.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often they are looked for.
const PAUSE: Duration = Duration::from_millis(10);
/// Streams that may wait to be taken.
const BACKLOG: i32 = 4096;
/// Descriptors: two for each stream, and more.
const OPEN_FILES: u64 = 262_144;
/// Memory for each stream that there may be, bytes.
const EACH: u64 = 32 << 10;

/// Serves until the host has enough.
pub fn run(told: &Machine) -> Result<(), String> {
    machine::settings();
    let _ = process::set_open_files_limit(OPEN_FILES, OPEN_FILES);
    wait_for(|| link::set_up(CARD, &told.addresses, &told.gateways))
        .map_err(|error| format!("cannot set up the network card: {error}"))?;
    let mut mounted = Mounted(Vec::new());
    for disk in &told.disks {
        mounted.mount(disk)?;
    }
    let shared = Shared::default();
    let limits = Limits { streams: streams(), ..Limits::default() };
    // It listens before the host knows that it is there.
    let listener = listen().map_err(|error| format!("cannot listen for streams: {error}"))?;
    let door = Door::new(shared.clone(), limits).map_err(|error| format!("cannot take streams: {error}"))?;
    std::thread::Builder::new()
        .name("kso-door".into())
        .spawn(move || admit(&listener, door))
        .map_err(|error| format!("cannot start a thread: {error}"))?;
    let control =
        host::connect_first(ports::PROVIDE).map_err(|error| format!("cannot reach the broker: {error}"))?;
    shared.serve(control, limits).map_err(|error| error.to_string())
}

/// As many streams as its memory holds.
fn streams() -> usize {
    let info = rustix::system::sysinfo();
    let memory = info.totalram.saturating_mul(info.mem_unit.into());
    usize::try_from(memory / EACH).unwrap_or(usize::MAX).clamp(1024, Limits::default().streams)
}

fn listen() -> io::Result<OwnedFd> {
    let listener = vsock::socket()?;
    vsock::bind(listener.as_fd(), ports::PROVIDE)?;
    rustix::net::listen(&listener, BACKLOG)?;
    rustix::io::ioctl_fionbio(&listener, true)?;
    Ok(listener)
}

/// Takes streams for as long as the machine runs.
fn admit(listener: &OwnedFd, mut door: Door) {
    loop {
        let wait = door.next_deadline().map(|at| at.saturating_duration_since(Instant::now()));
        let wait = wait.and_then(|wait| Timespec::try_from(wait).ok());
        let mut polled =
            [PollFd::new(listener, PollFlags::IN), PollFd::from_borrowed_fd(door.poll_fd(), PollFlags::IN)];
        let _ = poll(&mut polled, wait.as_ref());
        loop {
            match vsock::accept(listener.as_fd()) {
                Ok((stream, _)) => door.admit(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    // Memory or descriptors: there may be some again soon.
                    tracing::warn!(%error, "a stream cannot be taken");
                    std::thread::sleep(PAUSE);
                    break;
                }
            }
        }
        door.run_ready();
    }
}

/// Tries until it works, for a while.
fn wait_for<T>(attempt: impl Fn() -> io::Result<T>) -> io::Result<T> {
    let until = Instant::now() + PATIENCE;
    loop {
        match attempt() {
            Err(error)
                if Instant::now() < until
                    && matches!(error.raw_os_error(), Some(NO_DEVICE | NO_FILE | NO_SUCH)) =>
            {
                std::thread::sleep(PAUSE);
            }
            done => return done,
        }
    }
}

/// What says that a device is not there yet.
const NO_DEVICE: i32 = rustix::io::Errno::NODEV.raw_os_error();
const NO_FILE: i32 = rustix::io::Errno::NOENT.raw_os_error();
const NO_SUCH: i32 = rustix::io::Errno::NXIO.raw_os_error();

/// Disks, unmounted in the other order when it is dropped.
struct Mounted(Vec<PathBuf>);

impl Mounted {
    fn mount(&mut self, disk: &Disk) -> Result<(), String> {
        let device = wait_for(|| find(&disk.serial))
            .map_err(|error| format!("the disk for {} is not there: {error}", disk.target))?;
        let target = PathBuf::from(&disk.target);
        fs::create_dir_all(&target)
            .map_err(|error| format!("cannot make the mount point {}: {error}", disk.target))?;
        let mut flags = MountFlags::NOSUID | MountFlags::NODEV;
        flags.set(MountFlags::RDONLY, disk.read_only);
        mount_at(&device, &target, FILE_SYSTEM, flags, None)?;
        self.0.push(target);
        Ok(())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        for target in self.0.iter().rev() {
            // Whoever still uses it can no longer write.
            if unmount(target, UnmountFlags::empty()).is_err()
                && let Err(error) = mount_remount(target, MountFlags::RDONLY, "")
            {
                tracing::warn!(%error, target = %target.display(), "a disk stays mounted");
            }
        }
        rustix::fs::sync();
    }
}

/// The disk with this serial number.
fn find(serial: &str) -> io::Result<String> {
    for entry in fs::read_dir("/sys/block")?.flatten() {
        let path: PathBuf = entry.path().join("serial");
        if read(&path).is_some_and(|found| found.trim_end_matches(['\n', '\0']) == serial)
            && let Some(name) = entry.file_name().to_str()
        {
            return Ok(format!("/dev/{name}"));
        }
    }
    Err(rustix::io::Errno::NOENT.into())
}

fn read(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok()
}
