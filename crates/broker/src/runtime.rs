//! The runtime directory: where the control sockets of running brokers are.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// `$KSO_RUNTIME_DIR`, else `$XDG_RUNTIME_DIR/kso`, else `/run/kso` for root and `/tmp/kso-UID` for others.
#[must_use]
pub fn runtime_directory() -> PathBuf {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let uid = rustix::process::geteuid();
    set("KSO_RUNTIME_DIR")
        .or_else(|| set("XDG_RUNTIME_DIR").map(|directory| directory.join("kso")))
        .unwrap_or_else(|| {
            if uid.is_root() { "/run/kso".into() } else { format!("/tmp/kso-{}", uid.as_raw()).into() }
        })
}

/// Makes the directory, for this user alone. One that is another's is refused: whoever owns it could put
/// sockets of his own there.
pub(crate) fn prepare(directory: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).recursive(false).create(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if let Some(parent) = directory.parent() {
                fs::create_dir_all(parent)?;
            }
            DirBuilder::new().mode(0o700).create(directory)?;
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        other => other?,
    }
    let found = fs::symlink_metadata(directory)?;
    let uid = rustix::process::geteuid().as_raw();
    if !found.is_dir() || found.uid() != uid || found.mode() & 0o022 != 0 {
        let why = format!("{} is not this user's own directory", directory.display());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    }
    Ok(())
}

/// The control sockets in `directory`: path and process.
#[must_use]
pub fn control_sockets(directory: &Path) -> Vec<(PathBuf, u32)> {
    let mut found: Vec<_> = fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            let stem = name.to_str()?.strip_suffix(".sock")?;
            let pid = stem.strip_prefix("run-").or_else(|| stem.strip_prefix("broker-"))?.parse().ok()?;
            Some((entry.path(), pid))
        })
        .collect();
    found.sort_by_key(|(_, pid)| *pid);
    found
}

/// Removes the sockets that processes left behind when they were killed.
pub(crate) fn sweep(directory: &Path) {
    for (path, pid) in control_sockets(directory) {
        if !Path::new("/proc").join(pid.to_string()).exists() {
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn dead_sockets_are_swept_and_strange_files_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let own = format!("run-{}.sock", std::process::id());
        for name in ["run-4194999.sock", "broker-4194998.sock", own.as_str(), "other.sock", "run-x.sock"] {
            fs::write(at(name), "").unwrap();
        }
        assert_eq!(control_sockets(directory.path()).len(), 3);
        sweep(directory.path());
        assert_eq!(control_sockets(directory.path()), [(at(&own), std::process::id())]);
        assert!(at("other.sock").exists());
    }

    #[test]
    fn a_directory_of_others_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b");
        prepare(&path).unwrap();
        prepare(&path).unwrap();
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        assert!(prepare(&path).is_err());
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(directory.path(), &link).unwrap();
        assert!(prepare(&link).is_err());
    }
}
