//! What is shared, and how.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How long the client may believe what it was told of names and attributes under [`Cache::Auto`].
const AUTO: Duration = Duration::from_secs(1);
/// The same of directories that change when the host is upgraded, if at all.
const SYSTEM: Duration = Duration::from_secs(300);
/// The same under [`Cache::Always`].
const ALWAYS: Duration = Duration::from_secs(86_400);

/// What the client may remember.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// Nothing: each read and each look at a name is a request.
    None,
    /// Names and attributes for a second; data until the file's times tell that it changed, looked at on each `open`. Sound
    /// where the host or other guests write too.
    #[default]
    Auto,
    /// Everything, for ever. For what nobody else writes.
    Always,
}

/// What becomes of other mounts below the directory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Submounts {
    /// They are empty directories; a file that is a mount is itself. File systems by which the host's kernel speaks
    /// (/proc, /sys and kin) are always hidden.
    Hidden,
    /// They are part of one file system, with inode numbers of their own.
    Joined,
    /// The client is told of them, and gives them device numbers of their own.
    #[default]
    Announced,
}

/// As whom files are touched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Owner {
    /// As root by whoever asks: new files belong to the caller. Without privilege the same as `Own(None)`.
    #[default]
    Caller,
    /// All as the user that this process runs as; with a pair, its own user and group are seen as these.
    Own(Option<(u32, u32)>),
}

/// A shared directory.
#[derive(Clone, Debug)]
pub struct Share {
    /// Where it is.
    pub directory: PathBuf,
    /// Which part of it is seen.
    pub view: View,
    /// Nothing is written.
    pub read_only: bool,
    /// The client knows that, by a mount which is read-only: nothing is opened for writing. Where it does not, it has to ask
    /// for each `open`.
    pub mounted_read_only: bool,
    /// What the client remembers.
    pub cache: Cache,
    /// Writes are kept back by the client until it likes or is asked to. Sound only if nobody else writes.
    pub writeback: bool,
    /// Other mounts below.
    pub submounts: Submounts,
    /// As whom.
    pub owner: Owner,
    /// Device nodes may be made.
    pub devices: bool,
    /// ACLs are checked.
    pub acl: bool,
    /// At most so many descriptors are held; `None`: a part of what this process may have.
    pub descriptors: Option<usize>,
}

impl Share {
    /// All of a directory, to read and write.
    #[must_use]
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
            view: View::whole(),
            read_only: false,
            mounted_read_only: false,
            cache: Cache::default(),
            writeback: false,
            submounts: Submounts::default(),
            owner: Owner::default(),
            devices: false,
            acl: true,
            descriptors: None,
        }
    }

    /// The same, read only, and mounted so.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self.mounted_read_only = true;
        self.acl = false;
        self
    }

    /// A root for a guest: the host's system directories, read-only. See [`View::system`].
    #[must_use]
    pub fn system(own: &[&Path]) -> Self {
        let mut share = Self::new("/").read_only();
        share.view = View::system(own);
        share.submounts = Submounts::Joined;
        share
    }
}

/// Which part of a tree is seen. A share that does not show all is always read-only: a directory that is moved would carry
/// what is hidden in it to where it is not.
#[derive(Clone, Debug)]
pub struct View(pub(crate) Region);

/// How a directory and what is below it is seen.
#[derive(Clone, Debug)]
pub(crate) struct Region {
    /// The names that are seen; `None`: all.
    part: Option<Arc<HashMap<OsString, Region>>>,
    /// Files that only some users of the host may read can be read.
    pub private: bool,
    /// It seldom changes.
    pub steady: bool,
}

/// Directories of the system that [`View::system`] shows.
const SYSTEM_DIRECTORIES: &[&str] = &[
    "/bin", "/etc", "/gnu", "/lib", "/lib32", "/lib64", "/libo32", "/libx32", "/nix", "/opt", "/sbin",
    "/snap", "/srv", "/usr", "/var",
];
/// Directories that are there, but empty.
const EMPTY_DIRECTORIES: &[&str] =
    &["/boot", "/dev", "/home", "/media", "/mnt", "/proc", "/root", "/run", "/sys", "/tmp"];

impl Region {
    /// Nothing below is seen.
    pub fn empty() -> Self {
        Self { part: Some(Arc::default()), private: false, steady: true }
    }

    /// How the entry `name` is seen; `None`: not at all.
    pub fn child(&self, name: &OsStr) -> Option<Self> {
        match &self.part {
            None => Some(self.clone()),
            Some(part) => part.get(name).cloned(),
        }
    }

    /// All below is seen.
    pub fn is_whole(&self) -> bool {
        self.part.is_none()
    }

    /// How long the client believes it.
    pub fn validity(&self, cache: Cache) -> Duration {
        match cache {
            Cache::None => Duration::ZERO,
            Cache::Auto if self.steady => SYSTEM,
            Cache::Auto => AUTO,
            Cache::Always => ALWAYS,
        }
    }

    fn insert(&mut self, path: &Path, region: Self) {
        let Some(part) = &mut self.part else { return };
        let mut names = path.components();
        let name = names.find_map(|component| match component {
            Component::Normal(name) => Some(name),
            _ => None,
        });
        let Some(name) = name else { return };
        let part = Arc::make_mut(part);
        let rest = names.as_path();
        if rest.as_os_str().is_empty() {
            part.insert(name.to_owned(), region);
        } else {
            part.entry(name.to_owned()).or_insert_with(Self::empty).insert(rest, region);
        }
    }
}

impl View {
    /// Everything.
    #[must_use]
    pub fn whole() -> Self {
        Self(Region { part: None, private: true, steady: false })
    }

    /// What a program needs of the host's root: the system's directories, without files that not every user of the host may read
    /// (keys, password hashes) and without the homes of users; and all of the directories `own`. What is a place for
    /// mounts or temporary files is there, but empty.
    #[must_use]
    pub fn system(own: &[&Path]) -> Self {
        let mut root = Region::empty();
        for directory in SYSTEM_DIRECTORIES {
            root.insert(Path::new(directory), Region { part: None, private: false, steady: true });
        }
        for directory in EMPTY_DIRECTORIES {
            root.insert(Path::new(directory), Region::empty());
        }
        for directory in own.iter().filter(|directory| !below_system(directory)) {
            root.insert(directory, Region { part: None, private: true, steady: false });
        }
        Self(root)
    }

    pub(crate) fn is_whole(&self) -> bool {
        self.0.is_whole()
    }
}

/// A directory that is shown already, and whose secrets do not become the user's by his standing in it.
fn below_system(directory: &Path) -> bool {
    SYSTEM_DIRECTORIES.iter().any(|system| directory.starts_with(system))
}
