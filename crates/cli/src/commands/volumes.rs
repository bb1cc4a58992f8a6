//! `-v`: the directories that a program sees, and who performs them.

use anyhow::{Context, Result, bail};
use kso_broker::{Broker, Directory, FilesRoute};
use kso_core::files::Volume;
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Reads all of `-v`. Those of this host exist; what is below another comes after it.
pub fn read(texts: &[OsString]) -> Result<Vec<Volume>> {
    let mut volumes: Vec<Volume> = Vec::new();
    for text in texts {
        let what = || format!("-v {}", text.display());
        let mut volume = Volume::parse(text).with_context(what)?;
        if !volume.is_elsewhere() {
            volume.source = existing(&volume.source).with_context(what)?;
        }
        // The last word about a place holds.
        volumes.retain(|other| other.target != volume.target);
        volumes.push(volume);
    }
    volumes.sort_by_key(|volume| volume.target.components().count());
    Ok(volumes)
}

/// A directory of this host, without links in its path.
pub fn existing(path: &Path) -> Result<PathBuf> {
    let found = path.canonicalize().with_context(|| path.display().to_string())?;
    if !found.is_dir() {
        bail!("{}: it is not a directory", path.display());
    }
    Ok(found)
}

/// As `-v` has it.
pub fn name(volume: &Volume) -> String {
    let (source, target) = (volume.source.display(), volume.target.display());
    if volume.is_elsewhere() {
        format!("-v {}:{source}:{target}", volume.kernels.join(","))
    } else {
        format!("-v {source}:{target}")
    }
}

/// The way to a volume that another kernel performs. That it can be had is seen here, and not by the program.
pub fn route(broker: &mut Broker, volume: &Volume) -> Result<Arc<FilesRoute>> {
    let directory = Directory {
        path: volume.source.as_os_str().as_bytes().to_vec(),
        read_only: volume.read_only,
        caching: volume.caching.unwrap_or_default(),
    };
    let route = broker.files(&volume.kernels, directory).with_context(|| name(volume))?;
    route.open().with_context(|| name(volume))?;
    Ok(Arc::new(route))
}

/// For a broker that is another process's: its kernels are not ours to ask.
pub fn refuse_elsewhere(volumes: &[Volume]) -> Result<()> {
    if let Some(volume) = volumes.iter().find(|volume| volume.is_elsewhere()) {
        bail!("{}: files of another kernel need a broker of our own: leave out --broker", name(volume));
    }
    Ok(())
}

/// What `kso run` mounts: in a sandbox the directories are this host's, so each place has to be there.
pub fn for_sandbox(volumes: &[Volume]) -> Result<Vec<kso_runner::Volume>> {
    let mut mounted: Vec<kso_runner::Volume> = Vec::new();
    for volume in volumes {
        let target = place(volume, &mounted)?;
        if target == Path::new("/") {
            bail!("{}: the root cannot be replaced", name(volume));
        }
        let source = (!volume.is_elsewhere()).then(|| volume.source.clone());
        mounted.push(kso_runner::Volume { source, target, read_only: volume.read_only });
    }
    Ok(mounted)
}

/// Where a volume is mounted: a directory of this host, or of one that is mounted already.
fn place(volume: &Volume, mounted: &[kso_runner::Volume]) -> Result<PathBuf> {
    let advice = || {
        let target = volume.target.display();
        format!("{}: make it first (mkdir -p {target}), or use kso vm, which needs no place", name(volume))
    };
    let found = volume.target.canonicalize().unwrap_or_else(|_| volume.target.clone());
    // The innermost was mounted last.
    let outer = mounted.iter().rev().find_map(|outer| Some((outer, found.strip_prefix(&outer.target).ok()?)));
    match outer {
        None => existing(&volume.target).with_context(advice),
        Some((kso_runner::Volume { source: Some(source), .. }, rest)) => {
            existing(&source.join(rest)).with_context(advice)?;
            Ok(found)
        }
        Some((other, _)) => bail!(
            "{}: it is within {}, which another kernel performs: mount it elsewhere, or use kso vm",
            name(volume),
            other.target.display()
        ),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    fn all(texts: &[&str]) -> Result<Vec<Volume>> {
        read(&texts.iter().map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn directories_of_this_host_exist_and_outer_ones_come_first() {
        let read = all(&["/tmp:/srv/a", "/usr:/srv", "box:/nowhere:/opt", "/:/srv:ro"]).unwrap();
        let targets: Vec<_> = read.iter().map(|volume| volume.target.display().to_string()).collect();
        assert_eq!(targets, ["/opt", "/srv", "/srv/a"]);
        assert!(read[1].read_only, "the last word holds");
        for wrong in ["/nonexistent:/srv", "/dev/null:/srv"] {
            assert!(all(&[wrong]).is_err(), "{wrong}");
        }
    }

    #[test]
    fn places_of_a_sandbox_are_there_and_not_within_what_is_elsewhere() {
        let place = tempfile::tempdir().unwrap();
        let path = |name: &str| place.path().join(name).display().to_string();
        std::fs::create_dir_all(path("a/b")).unwrap();
        let of = |texts: &[String]| {
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            for_sandbox(&all(&texts).unwrap()).map_err(|error| format!("{error:#}"))
        };
        let fine = of(&[format!("/usr:{}", path("a")), format!("box:/x:{}", path("a/bin"))]).unwrap();
        assert_eq!(fine.iter().map(|one| one.source.is_none()).collect::<Vec<_>>(), [false, true]);
        assert!(of(&[format!("/usr:{}", path("a")), format!("/usr:{}", path("a/b"))]).is_err());
        let missing = of(&[format!("/usr:{}", path("c"))]).unwrap_err();
        assert!(missing.contains("mkdir -p"), "{missing}");
        let within = of(&[format!("box:/x:{}", path("a")), format!("/usr:{}", path("a/b"))]).unwrap_err();
        assert!(within.contains("which another kernel performs"), "{within}");
    }
}
