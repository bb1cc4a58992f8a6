//! The directories that a provider offers, or an image.
//!
//! A broker names a directory by its path; it gets it if an export is that directory or holds it. The way from the export to the
//! directory is resolved by the kernel beneath the export's own descriptor: neither `..` nor a link leads out.

use kso_files::image::Image;
use kso_wire::Errno;
use rustix::fs::{Mode, OFlags, ResolveFlags, openat, openat2};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

/// How often the kernel may be unsure whether something was renamed meanwhile (openat2(2), `EAGAIN`).
const ATTEMPTS: usize = 64;

/// A directory that is offered.
#[derive(Clone, Debug)]
pub struct Export {
    directory: PathBuf,
    read_only: bool,
    root: Root,
}

#[derive(Clone, Debug)]
enum Root {
    Directory(Arc<OwnedFd>),
    Image(Image),
}

impl Export {
    /// Offers a directory, by this path.
    ///
    /// # Errors
    /// It cannot be opened, or is none.
    pub fn open(directory: &Path, read_only: bool) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(directory, flags, Mode::empty())?;
        let root = Root::Directory(Arc::new(root));
        Ok(Self { directory: directory.components().collect(), read_only, root })
    }

    /// Offers all of an image, as the root.
    #[must_use]
    pub fn image(image: Image) -> Self {
        Self { directory: "/".into(), read_only: true, root: Root::Image(image) }
    }
}

/// A directory that was asked for and may be had.
#[derive(Debug)]
pub(super) enum Found {
    Directory { directory: OwnedFd, read_only: bool },
    Image { image: Image, path: PathBuf },
}

/// Looks a directory up in what is offered.
pub(super) fn find(exports: &[Export], path: &Path) -> Result<Found, Errno> {
    if exports.is_empty() {
        return Err(Errno::EOPNOTSUPP);
    }
    if !path.is_absolute() || path.components().any(|part| matches!(part, Component::ParentDir)) {
        return Err(Errno::EINVAL);
    }
    let inner = |export: &Export| path.strip_prefix(&export.directory).ok().map(Path::to_owned);
    // Of those that hold it the innermost says how.
    let holding = exports.iter().filter_map(|export| Some((export, inner(export)?)));
    let (export, rest) = holding.min_by_key(|(_, rest)| rest.components().count()).ok_or(Errno::EACCES)?;
    match &export.root {
        Root::Directory(root) => {
            let directory = beneath(root.as_fd(), &rest).map_err(|error| match error {
                rustix::io::Errno::XDEV => Errno::EACCES,
                other => crate::errno(other),
            })?;
            Ok(Found::Directory { directory, read_only: export.read_only })
        }
        Root::Image(image) => Ok(Found::Image { image: image.clone(), path: rest }),
    }
}

fn beneath(root: BorrowedFd<'_>, rest: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    if rest.as_os_str().is_empty() {
        return openat(root, c".", flags, Mode::empty());
    }
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    for _ in 0..ATTEMPTS {
        match openat2(root, rest, flags, Mode::empty(), resolve) {
            Err(rustix::io::Errno::AGAIN) => {}
            Err(rustix::io::Errno::NOSYS) => return step_by_step(root, rest),
            result => return result,
        }
    }
    Err(rustix::io::Errno::AGAIN)
}

/// For kernels without openat2 (gVisor): no link is followed at all.
fn step_by_step(root: BorrowedFd<'_>, rest: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut directory = openat(root, c".", flags, Mode::empty())?;
    for part in rest.components() {
        match part {
            Component::Normal(name) => directory = openat(&directory, name, flags, Mode::empty())?,
            Component::CurDir => {}
            _ => return Err(rustix::io::Errno::INVAL),
        }
    }
    Ok(directory)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn only_what_is_offered_is_found() {
        let place = tempfile::tempdir().unwrap();
        let path = |name: &str| place.path().join(name);
        for name in ["open/a/b", "open/secret", "closed"] {
            fs::create_dir_all(path(name)).unwrap();
        }
        fs::write(path("open/file"), "").unwrap();
        symlink("a", path("open/inside")).unwrap();
        symlink("../closed", path("open/outside")).unwrap();
        symlink(path("open/a"), path("open/absolute")).unwrap();
        symlink("/proc/self/cwd", path("open/magic")).unwrap();
        let exports =
            [Export::open(&path("open"), false).unwrap(), Export::open(&path("open/secret"), true).unwrap()];
        let find = |name: &str| {
            find(&exports, &path(name)).map(|found| match found {
                Found::Directory { read_only, .. } => read_only,
                Found::Image { .. } => panic!("there is none"),
            })
        };
        assert_eq!(
            (find("open"), find("open/a/b"), find("open/inside/b")),
            (Ok(false), Ok(false), Ok(false))
        );
        assert_eq!(find("open/secret"), Ok(true), "the innermost export says how");
        for name in ["closed", "opener", "open/outside", "open/absolute", "open/magic", ""] {
            assert_eq!(find(name), Err(Errno::EACCES), "{name}");
        }
        assert_eq!(find("open/missing"), Err(Errno::ENOENT));
        assert_eq!(find("open/file"), Err(Errno::ENOTDIR));
        assert_eq!(find("open/../closed"), Err(Errno::EINVAL));
        assert_eq!(super::find(&exports, Path::new("open")).unwrap_err(), Errno::EINVAL);
        assert_eq!(super::find(&[], Path::new("/")).unwrap_err(), Errno::EOPNOTSUPP);
        let Root::Directory(root) = &exports[0].root else { panic!("it is one") };
        let walk = |rest: &str| step_by_step(root.as_fd(), Path::new(rest)).is_ok();
        assert!(walk("a/b") && walk("a/./b"));
        assert!(!walk("inside") && !walk("outside") && !walk("../closed") && !walk("file"));
    }
}
