//! A directory of this host, and the same one as the file service shows it.

use kso_files::mount::{MountOptions, Mounted, mount};
use kso_files::{Cache, Share};
use kso_tests::argv;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A directory with room for mounts.
#[derive(Debug)]
pub struct Place {
    mounts: Vec<Mounted>,
    /// File systems of this host's, made for a test.
    systems: Vec<PathBuf>,
    directory: TempDir,
}

/// How the service is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// As `-v` does.
    Auto,
    /// Nothing is remembered.
    None,
    /// Everything is, and writes are kept back.
    Writeback,
    /// All nodes but the root are held by handles.
    FewDescriptors,
    /// The kernel reads and writes by itself.
    Passthrough,
}

impl Place {
    /// With a directory `behind`.
    pub fn new() -> Self {
        assert!(rustix::process::geteuid().is_root(), "this mounts: run it as root");
        let directory = tempfile::Builder::new().prefix("kso-test-").tempdir().expect("a directory in /tmp");
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
        let place = Self { mounts: Vec::new(), systems: Vec::new(), directory };
        fs::create_dir(place.path("behind")).expect("a directory");
        place
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Mounts another file system on `behind`.
    pub fn on(&mut self, kind: &str, options: &str, device: &str) {
        let behind = self.path("behind");
        argv(["mount", "-t", kind, "-o", options, device, &behind.display().to_string()]).run().ok();
        self.systems.push(behind);
    }

    /// Shows `behind` at `name`.
    pub fn show(&mut self, name: &str, mode: Mode) -> PathBuf {
        let front = self.path(name);
        fs::create_dir(&front).expect("a directory");
        let mut share = Share::new(self.path("behind"));
        share.devices = true;
        let mut options = MountOptions { passthrough: false, no_privilege: false, ..MountOptions::default() };
        match mode {
            Mode::Auto => {}
            Mode::None => share.cache = Cache::None,
            Mode::Writeback => (share.cache, share.writeback) = (Cache::Always, true),
            Mode::FewDescriptors => share.descriptors = Some(60),
            Mode::Passthrough => options.passthrough = true,
        }
        self.mounts.push(mount(share, &front, options).expect("a mount"));
        front
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.mounts.clear();
        for path in &self.systems {
            unmount(path);
        }
    }
}

fn unmount(path: &Path) {
    let _ = rustix::mount::unmount(path, rustix::mount::UnmountFlags::DETACH);
}
