//! Debian's kernels, fetched into the cache by the system's own apt: signatures are checked, nothing is installed.

use super::{Kernel, KernelError, Origin, cache_directory, in_tree};
use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Versions by which people know the releases of Debian.
const VERSIONS: &[(&str, &str)] =
    &[("5.10", "bullseye"), ("6.1", "bookworm"), ("6.12", "trixie"), ("7.2", "sid")];
/// Releases that get no security updates of their own.
const UNRELEASED: &[&str] = &["sid", "unstable", "testing"];
/// The keys of Debian's archive.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// A kernel's package needs no more of its own kind than these.
const MAX_PACKAGES: usize = 8;

/// Why no kernel was fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Not on Debian.
    #[error(
        "{what} is missing: kernels are fetched by Debian's apt. Where there is none, name a kernel with --kernel-image"
    )]
    NoApt {
        /// The missing file or command.
        what: &'static str,
    },
    /// The system's sources name no mirror of Debian.
    #[error("no mirror of Debian is named in /etc/apt/sources.list or /etc/apt/sources.list.d")]
    NoMirror,
    /// The release's name is nothing like one.
    #[error(
        "{0}: not a release of Debian (as bookworm, trixie, sid) nor a version of its kernels (5.10, 6.1, 6.12, 7.2)"
    )]
    Name(String),
    /// A command failed.
    #[error("{command} failed:\n{output}")]
    Command {
        /// Which.
        command: String,
        /// What it said last.
        output: String,
    },
    /// The packages are not what they were.
    #[error("the packages of {release} have no kernel in them that kso understands")]
    NotFound {
        /// Debian's release.
        release: String,
    },
    /// Files.
    #[error("cannot keep a kernel in {}: {source}", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The cache.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

/// Fetches the newest kernel for virtual machines of a release of Debian: a version of `VERSIONS`, a release's name,
/// or nothing for the release this system is. `progress` hears what is done.
///
/// # Errors
/// See [`FetchError`].
pub fn fetch(wanted: Option<&str>, mut progress: impl FnMut(&str)) -> Result<Kernel, FetchError> {
    if !Path::new(KEYRING).exists() {
        return Err(FetchError::NoApt { what: KEYRING });
    }
    let release = match wanted {
        Some(name) => release_named(name)?,
        None => own_release(),
    };
    let mirrors = Mirrors::of(&system_sources()).ok_or(FetchError::NoMirror)?;
    let kept =
        cache_directory().map_err(|source| FetchError::Io { path: PathBuf::from("the cache"), source })?;
    let failed = |source| FetchError::Io { path: kept.clone(), source };
    fs::create_dir_all(&kept).map_err(failed)?;
    let work = tempfile::Builder::new().prefix(".fetch-").tempdir_in(&kept).map_err(failed)?;

    let apt = Apt::new(work.path(), &mirrors.sources(&release)).map_err(failed)?;
    progress(&format!("reading the package lists of {release}"));
    apt.run("apt-get", &["update", "-qq"])?;
    let packages = apt.packages()?;
    progress(&format!("fetching {}", packages.join(" ")));
    let words: Vec<&str> =
        ["download", "-qq"].into_iter().chain(packages.iter().map(String::as_str)).collect();
    apt.run("apt-get", &words)?;
    let tree = work.path().join("tree");
    for file in fs::read_dir(work.path()).map_err(failed)?.flatten() {
        if file.path().extension().is_some_and(|extension| extension == "deb") {
            run(Command::new("dpkg-deb").arg("-x").arg(file.path()).arg(&tree))?;
        }
    }
    let missing = || FetchError::NotFound { release: release.clone() };
    let kernel = in_tree(&tree, Origin::Cache).into_iter().next().ok_or_else(missing)?;
    let place = kept.join(&kernel.release);
    let _ = fs::remove_dir_all(&place);
    fs::rename(&tree, &place).map_err(failed)?;
    in_tree(&place, Origin::Cache).into_iter().next().ok_or_else(missing)
}

fn release_named(name: &str) -> Result<String, FetchError> {
    if let Some((_, release)) = VERSIONS.iter().find(|(version, _)| *version == name) {
        return Ok((*release).to_owned());
    }
    let plain = name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.chars().all(|c| c.is_ascii_lowercase() || c == '-');
    if plain { Ok(name.to_owned()) } else { Err(FetchError::Name(name.to_owned())) }
}

/// `VERSION_CODENAME` of this system, if it is Debian; sid has none.
fn own_release() -> String {
    let text = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let value = |key: &str| {
        text.lines()
            .find_map(|line| Some(line.strip_prefix(key)?.strip_prefix('=')?.trim_matches('"').to_owned()))
    };
    match (value("ID").as_deref(), value("VERSION_CODENAME")) {
        (Some("debian"), Some(name)) => name,
        _ => "sid".into(),
    }
}

/// The text of the system's own lists of sources.
fn system_sources() -> Vec<String> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        let mut more: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        more.sort();
        files.extend(more);
    }
    files.iter().filter_map(|path| fs::read_to_string(path).ok()).collect()
}

/// Where this system gets Debian from.
#[derive(Debug, PartialEq, Eq)]
struct Mirrors {
    archive: String,
    security: Option<String>,
}

impl Mirrors {
    /// The first mirror whose path ends in `debian`, and the first that ends in `debian-security`, in both formats of
    /// sources.list(5).
    fn of(texts: &[String]) -> Option<Self> {
        let lines = texts.iter().flat_map(|text| text.lines());
        let words = lines
            .filter(|line| line.starts_with("deb ") || line.starts_with("URIs:"))
            .flat_map(str::split_whitespace)
            .filter(|word| word.contains("://"))
            .map(|word| word.trim_end_matches('/'));
        let (mut archive, mut security) = (None, None);
        for word in words {
            match word.rsplit('/').next() {
                Some("debian") => archive = archive.or(Some(word.to_owned())),
                Some("debian-security") => security = security.or(Some(word.to_owned())),
                _ => {}
            }
        }
        Some(Self { archive: archive?, security })
    }

    fn sources(&self, release: &str) -> String {
        let mut text = format!("deb [signed-by={KEYRING}] {} {release} main\n", self.archive);
        if let Some(security) = &self.security
            && !UNRELEASED.contains(&release)
        {
            text.push_str(&format!("deb [signed-by={KEYRING}] {security} {release}-security main\n"));
        }
        text
    }
}

/// apt with lists and caches of its own.
struct Apt {
    directory: PathBuf,
    options: Vec<String>,
}

impl Apt {
    fn new(directory: &Path, sources: &str) -> io::Result<Self> {
        let place = |name: &str| directory.join(name).display().to_string();
        for name in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(directory.join(name))?;
        }
        fs::write(directory.join("sources.list"), sources)?;
        fs::write(directory.join("status"), "")?;
        let options = [
            ("Dir::Etc::sourcelist", place("sources.list")),
            ("Dir::Etc::sourceparts", "-".into()),
            ("Dir::Etc::preferences", "-".into()),
            ("Dir::Etc::preferencesparts", "-".into()),
            ("Dir::State::lists", place("lists")),
            ("Dir::State::status", place("status")),
            ("Dir::Cache", place("cache")),
            ("APT::Architecture", architecture().into()),
            ("APT::Get::List-Cleanup", "0".into()),
            ("Acquire::Languages", "none".into()),
            // As root apt downloads as another user, who may not enter this directory.
            ("APT::Sandbox::User", "".into()),
        ];
        let options = options.into_iter().map(|(name, value)| format!("-o{name}={value}")).collect();
        Ok(Self { directory: directory.to_owned(), options })
    }

    fn run(&self, program: &'static str, words: &[&str]) -> Result<String, FetchError> {
        // The options' values hold no spaces but those of a path, and no shell reads them.
        run(Command::new(program).args(&self.options).args(words).current_dir(&self.directory))
    }

    /// The packages that the one for virtual machines stands for.
    fn packages(&self) -> Result<Vec<String>, FetchError> {
        let mut wanted = vec![format!("linux-image-cloud-{}", architecture())];
        let mut seen = HashSet::new();
        let mut packages = Vec::new();
        while let Some(package) = wanted.pop() {
            if !seen.insert(package.clone()) || seen.len() > MAX_PACKAGES {
                continue;
            }
            let text = self.run("apt-cache", &["show", "--no-all-versions", &package])?;
            wanted.extend(kernel_parts(&text));
            if package.contains(|c: char| c.is_ascii_digit()) && package.chars().any(|c| c == '.') {
                packages.push(package);
            }
        }
        packages.sort();
        Ok(packages)
    }
}

/// The packages of a kernel in `Depends:` of a package's description (deb-control(5)).
fn kernel_parts(description: &str) -> Vec<String> {
    let lines = description
        .lines()
        .filter_map(|line| line.strip_prefix("Depends:").or_else(|| line.strip_prefix("Pre-Depends:")));
    lines
        .flat_map(|line| line.split(','))
        // The first of several that would do.
        .filter_map(|part| part.split_whitespace().next())
        .filter(|name| {
            // linux-base-RELEASE lists the modules; linux-base, without one, is tools.
            ["linux-image-", "linux-binary-", "linux-modules-", "linux-base-"]
                .iter()
                .any(|kind| name.starts_with(kind))
        })
        .map(str::to_owned)
        .collect()
}

fn architecture() -> &'static str {
    if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }
}

/// Runs a command to its end; its standard output.
fn run(command: &mut Command) -> Result<String, FetchError> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.env("LC_ALL", "C").stdin(Stdio::null()).output().map_err(|error| {
        if error.kind() == io::ErrorKind::NotFound {
            FetchError::NoApt { what: if name == "dpkg-deb" { "dpkg-deb" } else { "apt-get" } }
        } else {
            FetchError::Command { command: name.clone(), output: error.to_string() }
        }
    })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(FetchError::Command { command: name, output: text.trim().to_owned() })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_are_those_of_the_system_in_either_format() {
        let new = "Types: deb\n# http://old.test/debian\nURIs: http://a.test/debian\nSuites: bookworm\n\n\
                   Types: deb\nURIs: http://s.test/debian-security/\n";
        let old = "# deb http://no.test/debian x main\ndeb [arch=amd64] https://b.test/x/debian/ sid main\n\
                   deb https://other.test/apt stable main\n";
        let mirrors =
            |texts: &[&str]| Mirrors::of(&texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>());
        let found = mirrors(&[old, new]).unwrap();
        assert_eq!(found.archive, "https://b.test/x/debian");
        assert_eq!(found.security.as_deref(), Some("http://s.test/debian-security"));
        assert_eq!(found.sources("trixie").lines().count(), 2);
        assert_eq!(found.sources("sid").lines().count(), 1);
        assert_eq!(mirrors(&["deb https://other.test/apt stable main"]), None);
    }

    #[test]
    fn versions_and_names_lead_to_releases() {
        assert_eq!(release_named("6.12").unwrap(), "trixie");
        assert_eq!(release_named("forky").unwrap(), "forky");
        for wrong in ["6.13", "", "../x", "-o"] {
            assert!(release_named(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_kernel_may_come_in_parts() {
        let description = "Package: linux-image-7.2.3-cloud-amd64\nPre-Depends: linux-base\n\
                           Depends: linux-binary-7.2.3-cloud-amd64 (= 7.2.3-1) | linux-image-x, linux-modules-7.2.3-cloud-amd64, kmod, linux-base (>= 4), linux-base-7.2.3-cloud-amd64\n\
                           Recommends: linux-image-other\n";
        assert_eq!(
            kernel_parts(description),
            [
                "linux-binary-7.2.3-cloud-amd64",
                "linux-modules-7.2.3-cloud-amd64",
                "linux-base-7.2.3-cloud-amd64"
            ]
        );
    }
}
