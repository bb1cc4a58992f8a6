//! The first steps: what every program needs to see of its kernel, and the modules that lead to the host.

use kso_wire::machine::Machine;
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, finit_module, reboot};
use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Modules of the initramfs, numbered in the order of loading.
const MODULES: &str = "/modules";
/// A word of the kernel's command line: tell that init runs, and restart.
const PROBE: &str = "kso.probe";
/// What is told then.
const PROBED: &str = "kso: init runs";

/// Mounts /dev, /proc and /sys, and loads the modules.
pub fn boot() -> Result<(), String> {
    let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
    let mounts: [(&str, &str, MountFlags); 3] = [
        ("proc", "/proc", flags | MountFlags::NODEV),
        ("sysfs", "/sys", flags | MountFlags::NODEV),
        ("devtmpfs", "/dev", flags),
    ];
    for (kind, place, flags) in mounts {
        fs::create_dir_all(place).map_err(|error| format!("cannot make {place}: {error}"))?;
        mount_at(kind, Path::new(place), kind, flags, None)?;
    }
    if has_word(PROBE) {
        eprintln!("{PROBED}");
        restart();
    }
    load_modules(Path::new(MODULES))
}

/// Whether this word is on the kernel's command line.
pub fn has_word(word: &str) -> bool {
    fs::read_to_string("/proc/cmdline").is_ok_and(|line| line.split_whitespace().any(|one| one == word))
}

/// What this guest is as an external kernel, if it is one.
pub fn provider() -> Result<Option<Machine>, String> {
    let line = fs::read_to_string("/proc/cmdline").map_err(|error| format!("cannot read /proc: {error}"))?;
    Machine::parse(&line).map_err(|error| error.to_string())
}

/// mount(2), with the words of an error.
pub fn mount_at(
    source: &str,
    place: &Path,
    kind: &str,
    flags: MountFlags,
    options: Option<&CStr>,
) -> Result<(), String> {
    mount(source, place, kind, flags, options)
        .map_err(|error| format!("cannot mount {kind} ({source}) on {}: {error}", place.display()))
}

fn load_modules(directory: &Path) -> Result<(), String> {
    let Ok(entries) = fs::read_dir(directory) else { return Ok(()) };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        let loaded = File::open(&path).and_then(|file| match finit_module(&file, c"", 0) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
            Err(error) => Err(io::Error::from(error)),
        });
        loaded.map_err(|error| format!("cannot load the module {}: {error}", path.display()))?;
        // Its memory is the guest's.
        let _ = fs::remove_file(&path);
    }
    Ok(())
}

/// Ends the machine: its emulator does not restart it.
pub fn restart() -> ! {
    let _ = reboot(RebootCommand::Restart);
    loop {
        // Only without the privilege that pid 1 has.
        std::thread::sleep(Duration::from_secs(1));
    }
}
