//! The kernels there are: the system's own, those in the cache, and any that a user names.

mod fetch;
mod version;

pub use fetch::{FetchError, fetch};

use crate::cache;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Bytes of a bzImage that hold its header (Documentation/arch/x86/boot.rst).
const SETUP: usize = 0x8000;
/// Longest release (`__NEW_UTS_LEN`).
const MAX_RELEASE: usize = 64;

/// A kernel that a guest can run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// What `uname -r` says under it.
    pub release: String,
    /// The bzImage.
    pub image: PathBuf,
    /// The directory of its modules.
    pub modules: PathBuf,
    /// Whence it is.
    pub origin: Origin,
}

/// Whence a kernel is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Installed on this system.
    System,
    /// Fetched by `kso kernels fetch`.
    Cache,
    /// Named by the user.
    Given,
}

impl Origin {
    /// In a word.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Cache => "cache",
            Self::Given => "given",
        }
    }
}

/// Which kernel is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// The newest of the system, otherwise the newest of the cache.
    #[default]
    Newest,
    /// The newest of this version (`6.12`) or exactly this release, wherever it is.
    Release(String),
    /// This image.
    Image {
        /// A bzImage.
        image: PathBuf,
        /// The directory of its modules; otherwise where its release has it, beside the image or on this system.
        modules: Option<PathBuf>,
    },
}

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// None at all.
    #[error(
        "there is no kernel for a guest: neither /boot nor the cache has one with its modules. Fetch Debian's with\n  kso kernels fetch"
    )]
    None,
    /// None of this release.
    #[error("there is no kernel {wanted} here{}. Fetch it with\n  kso kernels fetch {wanted}", known(.there))]
    NoRelease {
        /// What was asked for.
        wanted: String,
        /// What there is.
        there: Vec<String>,
    },
    /// The image cannot be read.
    #[error("cannot read the kernel {}: {source}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no bzImage.
    #[error("{} is no Linux kernel image (a bzImage, such as /boot/vmlinuz-*)", path.display())]
    NotAKernel {
        /// Which.
        path: PathBuf,
    },
    /// Its modules were not found.
    #[error("no modules of {release} were found for {}: name their directory with --modules", image.display())]
    NoModules {
        /// Of which.
        image: PathBuf,
        /// Its release.
        release: String,
    },
}

fn known(there: &[String]) -> String {
    if there.is_empty() { String::new() } else { format!(" (there are: {})", there.join(", ")) }
}

/// The kernel that is wanted.
///
/// # Errors
/// See [`KernelError`].
pub fn find(choice: &Choice) -> Result<Kernel, KernelError> {
    match choice {
        Choice::Newest => list().into_iter().next().ok_or(KernelError::None),
        Choice::Release(wanted) => {
            let kernels = list();
            let there = kernels.iter().map(|kernel| kernel.release.clone()).collect();
            let found = kernels.into_iter().find(|kernel| version::is_of(&kernel.release, wanted));
            found.ok_or(KernelError::NoRelease { wanted: wanted.clone(), there })
        }
        Choice::Image { image, modules } => given(image, modules.as_deref()),
    }
}

/// All kernels of the system, newest first, and then those of the cache.
#[must_use]
pub fn list() -> Vec<Kernel> {
    let mut kernels = in_tree(Path::new("/"), Origin::System);
    kernels.sort_by(|one, other| version::compare(&other.release, &one.release));
    let mut cached = Vec::new();
    if let Ok(directory) = cache_directory()
        && let Ok(entries) = fs::read_dir(directory)
    {
        let trees = entries.flatten().filter(|entry| !entry.file_name().as_encoded_bytes().starts_with(b"."));
        cached.extend(trees.flat_map(|entry| in_tree(&entry.path(), Origin::Cache)));
    }
    cached.sort_by(|one, other| version::compare(&other.release, &one.release));
    kernels.extend(cached);
    kernels
}

/// Where fetched kernels are: a directory for each.
///
/// # Errors
/// Neither `$XDG_CACHE_HOME` nor `$HOME` is set.
pub fn cache_directory() -> io::Result<PathBuf> {
    Ok(cache::directory()?.join("kernels"))
}

/// The kernels of a tree (of `/`, or of an unpacked package) that have modules, in no order.
fn in_tree(root: &Path, origin: Origin) -> Vec<Kernel> {
    let names = |directory: PathBuf| {
        let entries = fs::read_dir(directory).map(|entries| entries.flatten().collect::<Vec<_>>());
        entries.unwrap_or_default().into_iter().filter_map(|entry| entry.file_name().into_string().ok())
    };
    let images = names(root.join("boot")).filter_map(|name| {
        let release = name.strip_prefix("vmlinuz-")?.to_owned();
        Some((release, root.join("boot").join(name)))
    });
    // Where /boot is for the boot loader alone.
    let beside = names(root.join("usr/lib/modules")).filter_map(|release| {
        let image = root.join("usr/lib/modules").join(&release).join("vmlinuz");
        image.exists().then_some((release, image))
    });
    let mut kernels: Vec<Kernel> = Vec::new();
    for (release, image) in images.chain(beside) {
        if let Some(modules) = modules_of(root, &release)
            && kernels.iter().all(|kernel| kernel.release != release)
        {
            kernels.push(Kernel { release, image, modules, origin });
        }
    }
    kernels
}

fn modules_of(root: &Path, release: &str) -> Option<PathBuf> {
    let places = ["lib/modules", "usr/lib/modules"].map(|place| root.join(place).join(release));
    places
        .into_iter()
        .find(|place| place.join("modules.order").exists() || place.join("modules.dep").exists())
}

fn given(image: &Path, modules: Option<&Path>) -> Result<Kernel, KernelError> {
    let read = |source| KernelError::Read { path: image.to_owned(), source };
    let file = fs::File::open(image).map_err(read)?;
    let mut setup = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(file, SETUP as u64), &mut setup).map_err(read)?;
    let release =
        release_of(&setup).ok_or_else(|| KernelError::NotAKernel { path: image.to_owned() })?.to_owned();
    let modules = match modules {
        Some(modules) => Some(modules.to_owned()),
        // ROOT/boot/vmlinuz-RELEASE, then this system's.
        None => image
            .canonicalize()
            .ok()
            .and_then(|image| modules_of(image.parent()?.parent()?, &release))
            .or_else(|| modules_of(Path::new("/"), &release)),
    };
    let modules = modules
        .ok_or_else(|| KernelError::NoModules { image: image.to_owned(), release: release.clone() })?;
    Ok(Kernel { release, image: image.to_owned(), modules, origin: Origin::Given })
}

/// The release in a bzImage's header: `kernel_version` (at 0x20e) is where its text stands, less 0x200.
fn release_of(setup: &[u8]) -> Option<&str> {
    if setup.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let at = u16::from_le_bytes(*setup.get(0x20e..)?.first_chunk()?);
    let text = setup.get(usize::from(at) + 0x200..)?;
    let end = text.iter().take(MAX_RELEASE).position(|&byte| byte == b' ' || byte == 0)?;
    let text = std::str::from_utf8(text.get(..end)?).ok()?;
    // It becomes part of paths.
    text.chars().all(|c| c.is_ascii_alphanumeric() || ".+-_~".contains(c)).then_some(text)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    fn image(release: &str) -> Vec<u8> {
        let mut setup = vec![0; 0x1000];
        setup[0x202..0x206].copy_from_slice(b"HdrS");
        setup[0x20e..0x210].copy_from_slice(&0x100_u16.to_le_bytes());
        let text = format!("{release} (someone@somewhere) #1 SMP\0");
        setup[0x300..0x300 + text.len()].copy_from_slice(text.as_bytes());
        setup
    }

    #[test]
    fn a_given_image_tells_its_release_and_finds_the_modules_beside_it() {
        let root = tempfile::tempdir().unwrap();
        let modules = root.path().join("lib/modules/6.1.0-9-test");
        fs::create_dir_all(&modules).unwrap();
        fs::create_dir_all(root.path().join("boot")).unwrap();
        let path = root.path().join("boot/anything");
        fs::write(&path, image("6.1.0-9-test")).unwrap();
        let choice = Choice::Image { image: path.clone(), modules: None };
        assert!(matches!(find(&choice), Err(KernelError::NoModules { .. })));
        fs::write(modules.join("modules.order"), "").unwrap();
        let kernel = find(&choice).unwrap();
        assert_eq!(
            (kernel.release.as_str(), kernel.modules),
            ("6.1.0-9-test", modules.canonicalize().unwrap())
        );

        fs::write(root.path().join("boot/vmlinuz-6.1.0-9-test"), "").unwrap();
        fs::write(root.path().join("boot/vmlinuz-6.2"), "").unwrap();
        let listed = in_tree(root.path(), Origin::Cache);
        assert_eq!(listed.len(), 1, "without modules it is none: {listed:?}");

        fs::write(&path, image("../../etc")).unwrap();
        assert!(matches!(find(&choice), Err(KernelError::NotAKernel { .. })));
        fs::write(&path, "short").unwrap();
        assert!(matches!(find(&choice), Err(KernelError::NotAKernel { .. })));
    }
}
