//! `-v` and `--share`: which directory a program sees, and who performs it.
//!
//! ```text
//!   -v ./site:/srv:ro                      a directory of this host
//!   -v box:/srv/data:/data                 of the kernel `box`
//!   -v box,spare:/srv/data:/data:shared    of `box`; of `spare` while `box` is down
//! ```
//!
//! ```text
//!   volume  = [ kernel { "," kernel } ":" ] path ":" where [ ":" option { "," option } ]
//!   option  = "ro" | "rw" | "shared" | "cache=" ( "none" | "shared" | "auto" | "always" )
//!   share   = path [ ":ro" ]
//! ```
//!
//! A kernel's name has no `/`, and a path of another kernel begins with one: that tells them apart. Paths are bytes: they need
//! not be UTF-8.

use crate::routes::{HOST, MAX_KERNELS, is_kernel_name};
use kso_wire::provide::{Caching, MAX_PATH};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

/// A volume, or a directory to share, that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FilesError {
    /// It has not the form.
    #[error(
        "the form is PATH:WHERE or KERNEL:PATH:WHERE, then :ro, :shared or :cache=MODE if wanted: -v ./site:/srv:ro"
    )]
    Form,
    /// What stands behind the second path is no option.
    #[error("`{0}` is no option: ro, rw, shared, cache=none, cache=shared, cache=auto or cache=always")]
    Option(String),
    /// A kernel's name is none.
    #[error("`{0}` is no name of a kernel: letters, digits, - and _; a path begins with / or ./")]
    Kernel(String),
    /// The same kernel again.
    #[error("the kernel `{0}` is named twice")]
    Twice(String),
    /// Too many kernels.
    #[error("at most {MAX_KERNELS} kernels can be named")]
    TooMany,
    /// A path cannot be used.
    #[error("{path}: {why}")]
    Path {
        /// Which.
        path: String,
        /// Why not.
        why: &'static str,
    },
}

fn unusable(path: &Path, why: &'static str) -> FilesError {
    FilesError::Path { path: path.display().to_string(), why }
}

/// A directory that a program sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// The kernels that can perform it, in order; none: it is this host's own.
    pub kernels: Vec<String>,
    /// Where it is there. Of this host it may be relative.
    pub source: PathBuf,
    /// Where the program sees it: absolute and plain.
    pub target: PathBuf,
    /// Nothing is to be written.
    pub read_only: bool,
    /// What is remembered of it; `None`: what is usual.
    pub caching: Option<Caching>,
}

impl Volume {
    /// Reads `-v`'s argument.
    ///
    /// # Errors
    /// See [`FilesError`].
    pub fn parse(text: &OsStr) -> Result<Self, FilesError> {
        let (before, last) = split_last(text.as_bytes()).ok_or(FilesError::Form)?;
        // The path inside is absolute, and no option begins with a slash.
        let (rest, target, options) = match split_last(before) {
            Some((rest, target)) if !last.starts_with(b"/") && target.starts_with(b"/") => {
                (rest, target, last)
            }
            _ => (before, last, &[][..]),
        };
        let (kernels, source) = match rest.iter().position(|&byte| byte == b':') {
            Some(at) if is_kernels(rest, at) => {
                let (names, path) = rest.split_at(at);
                (kernels(names)?, path.get(1..).unwrap_or_default())
            }
            _ => (Vec::new(), rest),
        };
        let mut volume = Self {
            kernels,
            source: PathBuf::from(OsStr::from_bytes(source)),
            target: PathBuf::from(OsStr::from_bytes(target)),
            read_only: false,
            caching: None,
        };
        if source.is_empty() || target.is_empty() || last.is_empty() {
            return Err(FilesError::Form);
        }
        volume.options(options)?;
        volume.check()
    }

    fn options(&mut self, options: &[u8]) -> Result<(), FilesError> {
        for option in options.split(|&byte| byte == b',').filter(|_| !options.is_empty()) {
            match option {
                b"ro" => self.read_only = true,
                b"rw" => self.read_only = false,
                b"shared" | b"cache=shared" | b"cache=none" => self.caching = Some(Caching::None),
                b"cache=auto" => self.caching = Some(Caching::Auto),
                b"cache=always" => self.caching = Some(Caching::Always),
                other => return Err(FilesError::Option(String::from_utf8_lossy(other).into_owned())),
            }
        }
        Ok(())
    }

    fn check(mut self) -> Result<Self, FilesError> {
        if !is_plain(&self.target) || self.target == Path::new("/") {
            return Err(unusable(
                &self.target,
                "inside it needs an absolute path without .., other than the root",
            ));
        }
        self.target = self.target.components().collect();
        // The host alone is this process itself: there is nobody to ask.
        if self.kernels == [HOST] {
            self.kernels.clear();
        }
        if !self.kernels.is_empty() {
            self.source = absolute(&self.source)?;
        }
        Ok(self)
    }

    /// Whether another kernel performs it.
    #[must_use]
    pub fn is_elsewhere(&self) -> bool {
        !self.kernels.is_empty()
    }
}

/// A directory that a kernel shows to its brokers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shared {
    /// Which.
    pub directory: PathBuf,
    /// Nothing is to be written.
    pub read_only: bool,
}

impl Shared {
    /// Reads `DIR` or `DIR:ro`.
    ///
    /// # Errors
    /// See [`FilesError`].
    pub fn parse(text: &OsStr) -> Result<Self, FilesError> {
        let bytes = text.as_bytes();
        let (bytes, read_only) = match bytes.strip_suffix(b":ro") {
            Some(rest) => (rest, true),
            None => (bytes.strip_suffix(b":rw").unwrap_or(bytes), false),
        };
        let directory = absolute(Path::new(OsStr::from_bytes(bytes)))?;
        Ok(Self { directory, read_only })
    }
}

fn split_last(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = bytes.iter().rposition(|&byte| byte == b':')?;
    Some((bytes.get(..at)?, bytes.get(at + 1..)?))
}

/// Whether what stands before the colon at `at` names kernels.
fn is_kernels(rest: &[u8], at: usize) -> bool {
    let (names, path) = rest.split_at(at);
    !names.is_empty() && !names.contains(&b'/') && path.starts_with(b":/")
}

fn kernels(names: &[u8]) -> Result<Vec<String>, FilesError> {
    let mut kernels = Vec::new();
    for name in names.split(|&byte| byte == b',') {
        let name = String::from_utf8_lossy(name).into_owned();
        if !is_kernel_name(&name) {
            return Err(FilesError::Kernel(name));
        }
        if kernels.contains(&name) {
            return Err(FilesError::Twice(name));
        }
        if kernels.len() >= MAX_KERNELS {
            return Err(FilesError::TooMany);
        }
        kernels.push(name);
    }
    Ok(kernels)
}

fn is_plain(path: &Path) -> bool {
    path.is_absolute() && path.components().all(|part| !matches!(part, Component::ParentDir))
}

/// A path on another kernel: nothing of this one helps to understand it.
fn absolute(path: &Path) -> Result<PathBuf, FilesError> {
    if !is_plain(path) {
        return Err(unusable(path, "it has to be an absolute path without .."));
    }
    if path.as_os_str().len() > MAX_PATH {
        return Err(unusable(path, "it is too long"));
    }
    Ok(path.components().collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(text: &str) -> Volume {
        Volume::parse(OsStr::new(text)).unwrap()
    }

    #[test]
    fn a_volume_of_this_host_is_read() {
        let one = read("/tmp:/srv");
        assert_eq!((one.source, one.target, one.read_only), ("/tmp".into(), "/srv".into(), false));
        assert!(one.kernels.is_empty() && one.caching.is_none());
        assert_eq!(read("./site:/srv/:ro").target, PathBuf::from("/srv"));
        assert!(read("site:/srv:ro").kernels.is_empty());
        assert_eq!(read("site:/srv:ro").source, PathBuf::from("site"));
        assert!(!read("/tmp:/srv:rw").read_only);
        assert_eq!(read("/a:b:/srv").source, PathBuf::from("/a:b"));
        assert_eq!(read("../x:/y:/z").source, PathBuf::from("../x:/y"));
        assert_eq!(read("/tmp:/srv:ro,shared").caching, Some(Caching::None));
        // The host by its name.
        assert_eq!(read("host:/tmp:/srv"), read("/tmp:/srv"));
    }

    #[test]
    fn a_volume_of_other_kernels_is_read() {
        let one = read("box:/srv/data:/data");
        assert_eq!((one.kernels.as_slice(), one.source), (&["box".to_owned()][..], "/srv/data".into()));
        let one = read("box,host:/a:b:/data:cache=always,ro");
        assert_eq!((one.kernels.len(), one.source), (2, "/a:b".into()));
        assert_eq!((one.read_only, one.caching), (true, Some(Caching::Always)));
    }

    #[test]
    fn errors_say_what_to_do() {
        for (text, why) in [
            ("", "the form is"),
            ("/tmp", "the form is"),
            (":/srv", "the form is"),
            ("/tmp:", "the form is"),
            ("/tmp:srv", "absolute path"),
            ("/tmp:/", "other than the root"),
            ("/tmp:/a/../b", "without .."),
            ("box:/tmp:/srv:fast", "no option"),
            ("box:/tmp:/srv:", "the form is"),
            ("a b:/tmp:/srv", "no name of a kernel"),
            ("a,a:/tmp:/srv", "twice"),
            ("a,:/tmp:/srv", "no name of a kernel"),
            ("a,b,c,d,e,f,g,h,i,j,k,l,m,n,o,p,q:/tmp:/srv", "at most 16"),
            ("box:/tmp/../x:/srv", "without .."),
        ] {
            let error = Volume::parse(OsStr::new(text)).unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn a_shared_directory_is_read() {
        let read = |text: &str| Shared::parse(OsStr::new(text));
        assert_eq!(read("/srv/").unwrap(), Shared { directory: "/srv".into(), read_only: false });
        assert_eq!(read("/srv:ro").unwrap(), Shared { directory: "/srv".into(), read_only: true });
        assert!(read("srv").unwrap_err().to_string().contains("absolute"));
        assert!(read("/srv/../etc").unwrap_err().to_string().contains("without .."));
    }

    proptest! {
        #[test]
        fn whatever_is_read_is_plain(bytes in proptest::collection::vec(
            proptest::sample::select(&b"ab/.:,=ro-\xff"[..]), 0..32))
        {
            if let Ok(volume) = Volume::parse(OsStr::from_bytes(&bytes)) {
                prop_assert!(is_plain(&volume.target) && volume.target != Path::new("/"));
                prop_assert!(!volume.source.as_os_str().is_empty());
                prop_assert!(!volume.is_elsewhere() || is_plain(&volume.source));
            }
        }

        #[test]
        fn what_is_written_is_read(kernel in "[a-z]{1,8}", path in "(/[a-z:]{1,6}){1,3}", inside in "(/[a-z]{1,6}){1,3}") {
            let volume = Volume::parse(OsStr::new(&format!("{kernel}:{path}:{inside}:ro"))).unwrap();
            prop_assert_eq!(volume.is_elsewhere(), kernel != HOST);
            prop_assert_eq!(volume.target, PathBuf::from(&inside));
            prop_assert_eq!(volume.source, PathBuf::from(&path));
        }
    }
}
