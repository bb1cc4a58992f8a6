//! The reader of an image, behind a guard.

use super::ImageError;
use ext4_view::{Ext4, Ext4Error, Ext4Read, FileType, Metadata};
use rustix::io::Errno;
use std::error::Error;
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// After so many panics nothing is read any more.
const MOST_PANICS: u32 = 8;
/// Groups of blocks: the reader makes room for as many as the superblock claims. (512 TiB, as they usually are.)
const MOST_GROUPS: u64 = 1 << 22;
/// Entries of a directory.
const MOST_ENTRIES: usize = 1 << 20;
/// Bytes of a symbolic link (`PATH_MAX`).
const MOST_LINK: u64 = 4096;

/// Reads without a position of its own: several share the descriptor.
struct Reader(Arc<File>);

impl Ext4Read for Reader {
    fn read(&mut self, start: u64, into: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync + 'static>> {
        Ok(self.0.read_exact_at(into, start)?)
    }
}

/// See the module.
pub(super) struct Disk {
    system: Ext4,
    panics: u32,
}

/// A file that is open.
pub(super) struct Open(ext4_view::File);

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk").field("panics", &self.panics).finish_non_exhaustive()
    }
}

impl fmt::Debug for Open {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Open").finish_non_exhaustive()
    }
}

fn errno(error: &Ext4Error) -> Errno {
    match error {
        Ext4Error::NotFound => Errno::NOENT,
        Ext4Error::NotADirectory => Errno::NOTDIR,
        Ext4Error::IsADirectory => Errno::ISDIR,
        Ext4Error::IsASpecialFile => Errno::NXIO,
        Ext4Error::NotASymlink | Ext4Error::MalformedPath => Errno::INVAL,
        Ext4Error::TooManySymlinks => Errno::LOOP,
        Ext4Error::FileTooLarge => Errno::FBIG,
        Ext4Error::PathTooLong => Errno::NAMETOOLONG,
        other => {
            tracing::debug!(%other, "an image cannot be read");
            Errno::IO
        }
    }
}

/// The bits of the mode that tell what it is (inode(7)).
pub(super) fn kind_bits(kind: FileType) -> u32 {
    match kind {
        FileType::Fifo => 0o010_000,
        FileType::CharacterDevice => 0o020_000,
        FileType::Directory => 0o040_000,
        FileType::BlockDevice => 0o060_000,
        FileType::Regular => 0o100_000,
        FileType::Symlink => 0o120_000,
        FileType::Socket => 0o140_000,
    }
}

/// Whether the superblock claims what can be (Documentation/filesystems/ext4/super.rst).
fn plausible(file: &File) -> Result<(), ImageError> {
    const AT: u64 = 1024;
    // In bytes from there: s_blocks_count_lo, s_blocks_per_group, s_feature_incompat, s_blocks_count_hi.
    let number = |at: u64| -> Result<u64, ImageError> {
        let mut bytes = [0; 4];
        let short = |_| ImageError::Unreadable("it is too short".into());
        file.read_exact_at(&mut bytes, AT + at).map_err(short)?;
        Ok(u32::from_le_bytes(bytes).into())
    };
    // `INCOMPAT_64BIT`.
    const WIDE: u64 = 0x80;
    let high = if number(0x60)? & WIDE != 0 { number(0x150)? } else { 0 };
    let blocks = number(0x4)? | high << 32;
    let of_a_group = number(0x20)?.max(1);
    if blocks / of_a_group > MOST_GROUPS {
        return Err(ImageError::Unreadable("it claims to be too large".into()));
    }
    Ok(())
}

impl Disk {
    pub fn open(file: &Arc<File>) -> Result<Self, ImageError> {
        plausible(file)?;
        let reader = Box::new(Reader(file.clone()));
        let loaded = catch_unwind(AssertUnwindSafe(|| Ext4::load(reader)));
        let unreadable = |why: String| ImageError::Unreadable(why);
        let system = loaded
            .map_err(|_| unreadable("its reader gave up".into()))?
            .map_err(|error| unreadable(error.to_string()))?;
        Ok(Self { system, panics: 0 })
    }

    fn guard<T>(&mut self, what: impl FnOnce(&Ext4) -> Result<T, Ext4Error>) -> Result<T, Errno> {
        if self.panics >= MOST_PANICS {
            return Err(Errno::IO);
        }
        // What the reader holds between calls it only reads.
        match catch_unwind(AssertUnwindSafe(|| what(&self.system))) {
            Ok(result) => result.map_err(|error| errno(&error)),
            Err(_) => {
                self.panics += 1;
                tracing::error!(panics = self.panics, "the reader of an image panicked");
                Err(Errno::IO)
            }
        }
    }

    /// What is at a path, itself and not what it links to. None of the path's directories is a link.
    pub fn look(&mut self, path: &[u8]) -> Result<Metadata, Errno> {
        self.guard(|system| system.symlink_metadata(path))
    }

    /// Where a link leads.
    pub fn read_link(&mut self, path: &[u8]) -> Result<Vec<u8>, Errno> {
        if self.look(path)?.len() > MOST_LINK {
            return Err(Errno::NAMETOOLONG);
        }
        self.guard(|system| {
            let target = system.read_link(path)?;
            let bytes: &[u8] = target.as_ref();
            Ok(bytes.to_vec())
        })
    }

    /// The names in a directory, and what they are.
    pub fn list(&mut self, path: &[u8]) -> Result<Vec<(Vec<u8>, u32)>, Errno> {
        self.guard(|system| {
            let mut entries = Vec::new();
            for entry in system.read_dir(path)?.take(MOST_ENTRIES) {
                let entry = entry?;
                let kind = entry.file_type().map_or(0, kind_bits);
                let name = entry.file_name();
                let bytes: &[u8] = name.as_ref();
                entries.push((bytes.to_vec(), kind));
            }
            Ok(entries)
        })
    }

    pub fn open_file(&mut self, path: &[u8]) -> Result<Open, Errno> {
        self.guard(|system| system.open(path)).map(Open)
    }

    /// Reads what there is, at most as much as `into` holds.
    pub fn read(&mut self, file: &mut Open, offset: u64, into: &mut [u8]) -> Result<usize, Errno> {
        self.guard(|_| {
            if file.0.position() != offset {
                file.0.seek_to(offset)?;
            }
            let mut count = 0;
            while let Some(rest) = into.get_mut(count..).filter(|rest| !rest.is_empty()) {
                match file.0.read_bytes(rest)? {
                    0 => break,
                    more => count += more,
                }
            }
            Ok(count)
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use std::process::Command;

    /// A small image with a little of everything and nothing that would find a change out; `None` without mke2fs.
    fn image() -> Option<Vec<u8>> {
        let place = tempfile::tempdir().unwrap();
        let (root, path) = (place.path().join("root"), place.path().join("image"));
        std::fs::create_dir_all(root.join("a/b")).unwrap();
        std::fs::write(root.join("a/big"), vec![7; 300_000]).unwrap();
        (0..40).for_each(|name| std::fs::write(root.join(format!("a/b/{name}")), "x").unwrap());
        std::os::unix::fs::symlink("a/b", root.join("short")).unwrap();
        std::os::unix::fs::symlink("x/".repeat(100), root.join("long")).unwrap();
        let made = Command::new("/usr/sbin/mke2fs")
            .args(["-q", "-t", "ext4", "-b", "1024", "-O", "^metadata_csum,^has_journal", "-d"])
            .args([&root, &path])
            .arg("1m")
            .status();
        if !made.is_ok_and(|status| status.success()) {
            eprintln!("there is no mke2fs: NOT TESTED (apt-get install e2fsprogs)");
            return None;
        }
        Some(std::fs::read(path).unwrap())
    }

    /// Reads all there is, with a bound. How many things were there.
    fn walk(disk: &mut Disk) -> usize {
        let (mut waiting, mut seen) = (vec![b"/".to_vec()], 0);
        let mut buffer = vec![0; 64 << 10];
        while let Some(path) = waiting.pop().filter(|_| seen < 500) {
            seen += 1;
            let Ok(found) = disk.look(&path) else { continue };
            if found.is_dir() {
                let names = disk.list(&path).unwrap_or_default().into_iter().map(|(name, _)| name);
                let inner = names.filter(|name| !matches!(&**name, b"." | b"..")).take(100);
                waiting.extend(inner.map(|name| [&path, &b"/"[..], &name].concat()));
            } else if found.is_symlink() {
                let _ = disk.read_link(&path);
            } else if let Ok(mut file) = disk.open_file(&path) {
                let _ = disk.read(&mut file, found.len() / 2, &mut buffer);
                let _ = disk.read(&mut file, 0, &mut buffer);
            }
        }
        seen
    }

    fn open(bytes: &[u8]) -> Result<Disk, ImageError> {
        use std::io::Write;
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        Disk::open(&Arc::new(file))
    }

    #[test]
    fn an_image_that_is_broken_breaks_nothing_else() {
        let Some(image) = image() else { return };
        assert!(walk(&mut open(&image).unwrap()) >= 47);
        let mut seed = 1_u64;
        let mut lot = |below: usize| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) as usize % below
        };
        // Where it matters: superblock, descriptors, inodes, directories; they are at the front.
        let front = image.len().min(200 << 10);
        for _ in 0..300 {
            let mut broken = image.clone();
            for _ in 0..=lot(16) {
                let at = 1024 + lot(front - 1024);
                if let Some(byte) = broken.get_mut(at) {
                    *byte = [0, 0xff, 0x80, 1][lot(4)];
                }
            }
            if let Ok(mut disk) = open(&broken) {
                walk(&mut disk);
            }
        }
    }

    #[test]
    fn what_claims_too_much_is_refused() {
        let Some(image) = image() else { return };
        let mut broken = image;
        // 2^32 blocks, in groups of 8.
        for (at, bytes) in [(0x4, [0xff; 4]), (0x20, [8, 0, 0, 0])] {
            broken.splice(1024 + at..1024 + at + 4, bytes);
        }
        assert!(open(&broken).unwrap_err().to_string().contains("too large"));
        assert!(open(&[0; 1100]).unwrap_err().to_string().contains("too short"));
        assert!(open(&[0; 4096]).unwrap_err().to_string().contains("no ext4"));
    }
}
