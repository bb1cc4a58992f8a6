//! The first root of a guest: this very program as `/init`, and the modules it loads before it can reach the host.

use crate::cpio::Archive;
use crate::kernels::Kernel;
use crate::modules::{Index, ModuleError};
use crate::{MachineKind, cache, elf};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Changes with what is put in.
const VERSION: &str = "2";
/// So many are kept, for other kernels and for other builds of kso.
const KEPT: usize = 12;
/// What a guest with programs needs: its way to the host, its files, its packets.
const NEEDED: &[&str] = &["vmw_vsock_virtio_transport", "virtiofs", "overlay", "tun"];
/// What it does without: connections to its own published ports then take the way through the host, and the peer of a
/// socket that was shut down is forgotten.
const WELCOME: &[&str] = &["vsock_loopback", "vsock_diag"];
/// What a guest needs that is an external kernel: its way to the host, and a network card.
const PROVIDER: &[&str] = &["vmw_vsock_virtio_transport", "virtio_net"];
/// This very program.
const OWN: &str = "/proc/self/exe";

/// What an initramfs has in it, besides the modules by which a guest finds its devices.
#[derive(Clone, Copy, Debug)]
pub struct Contents<'a> {
    /// The kso command, which is init.
    pub program: &'a Path,
    needed: &'static [&'static str],
    welcome: &'static [&'static str],
    /// More modules.
    pub modules: &'a [String],
}

impl<'a> Contents<'a> {
    /// For a guest with programs: this very program is init.
    #[must_use]
    pub fn guest(modules: &'a [String]) -> Self {
        Self { program: Path::new(OWN), needed: NEEDED, welcome: WELCOME, modules }
    }

    /// For a guest that is an external kernel.
    #[must_use]
    pub fn provider(program: &'a Path, modules: &'a [String]) -> Self {
        Self { program, needed: PROVIDER, welcome: &[], modules }
    }
}

/// Why there is no initramfs.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// The kernel's modules.
    #[error("kernel {release} cannot be used: {source}")]
    Modules {
        /// Of which kernel.
        release: String,
        /// Why.
        source: ModuleError,
    },
    /// Our own program, or the cache.
    #[error("cannot make an initramfs in {}: {source}", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The initramfs for this kernel and this build of kso: from the cache, or made and put there.
///
/// # Errors
/// See [`InitramfsError`].
pub fn compose(
    kernel: &Kernel,
    kind: MachineKind,
    contents: &Contents<'_>,
) -> Result<PathBuf, InitramfsError> {
    let failed = |path: &Path, source| InitramfsError::Io { path: path.to_owned(), source };
    let directory =
        cache::directory().map_err(|source| failed(Path::new("the cache"), source))?.join("initramfs");
    let own = contents.program;
    let identify = |path: &Path| identity(path).map_err(|source| failed(path, source));
    let (modules_identity, own_identity) = (identify(&kernel.modules)?, identify(own)?);
    let key = cache::key([
        VERSION.as_bytes(),
        kernel.release.as_bytes(),
        kind.name().as_bytes(),
        modules_identity.as_bytes(),
        own_identity.as_bytes(),
        contents.needed.join(" ").as_bytes(),
        contents.modules.join(" ").as_bytes(),
    ]);
    let path = directory.join(format!("{}-{key}.cpio", kernel.release));
    if path.exists() {
        return Ok(path);
    }
    let unusable = |source| InitramfsError::Modules { release: kernel.release.clone(), source };
    let index = Index::read(&kernel.modules).map_err(unusable)?;
    let mut wanted = vec![kind.transport()];
    wanted.extend(contents.needed);
    wanted.extend(contents.welcome.iter().filter(|name| index.has(name)));
    wanted.extend(contents.modules.iter().map(String::as_str));
    let mut archive = Archive::default();
    archive.directory("dev", 0o755);
    archive.device("dev/console", 0o600, (5, 1));
    let program = fs::read(own).map_err(|source| failed(own, source))?;
    archive.file("init", 0o755, &elf::strip(program));
    archive.directory("modules", 0o755);
    // Numbered as they are to be loaded.
    for (number, module) in index.load(&wanted).map_err(unusable)?.iter().enumerate() {
        archive.file(&format!("modules/{number:02}-{}.ko", module.name), 0o644, &module.object);
    }
    cache::write(&path, &archive.finish()).map_err(|source| failed(&directory, source))?;
    forget_oldest(&directory);
    Ok(path)
}

/// What changes with a file's contents, without reading it.
pub(crate) fn identity(path: &Path) -> io::Result<String> {
    let file = fs::metadata(path)?;
    let modified = (file.mtime(), file.mtime_nsec());
    Ok(format!("{} {} {} {modified:?} {}", file.dev(), file.ino(), file.size(), path.display()))
}

fn forget_oldest(directory: &Path) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    let mut files: Vec<_> = entries
        .flatten()
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .filter(|(_, path)| path.extension().is_some_and(|extension| extension == "cpio"))
        .collect();
    files.sort();
    let surplus = files.len().saturating_sub(KEPT);
    for (_, path) in files.iter().take(surplus) {
        let _ = fs::remove_file(path);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_the_newest_stay() {
        let directory = tempfile::tempdir().unwrap();
        for number in 0..KEPT + 3 {
            let path = directory.path().join(format!("{number:02}.cpio"));
            let file = fs::File::create(path).unwrap();
            let age = std::time::Duration::from_secs(u64::try_from(100 - number).unwrap());
            file.set_modified(std::time::SystemTime::now() - age).unwrap();
        }
        fs::write(directory.path().join("other"), "").unwrap();
        forget_oldest(directory.path());
        let mut left: Vec<_> =
            fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left.len(), KEPT + 1);
        assert_eq!(left.first().unwrap(), "03.cpio");
    }
}
