//! Kernel modules: which files they are, what they depend on, and their contents.
//!
//! Where depmod has not run (a package that was only unpacked) there is no modules.dep: names then come from
//! modules.order, and dependencies from the modules' own description (`.modinfo`), which is what depmod reads too.

use crate::elf;
use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Longest module that is read, bytes once it is unpacked.
const MAX_MODULE: u64 = 64 << 20;
/// What follows a signature (kernel/module/signing.c), and bytes of the description before it.
const SIGNATURE_MARK: &[u8] = b"~Module signature appended~\n";
const SIGNATURE_DESCRIPTION: usize = 12;

/// Why modules cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ModuleError {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel has no such module, nor is it built in.
    #[error("the kernel has no module {name}, and it is not built in ({} does not name it)", directory.display())]
    Missing {
        /// Which.
        name: String,
        /// The kernel's modules.
        directory: PathBuf,
    },
    /// A module's file is of no format that kso knows.
    #[error("{}: not a kernel module that kso can read", path.display())]
    Format {
        /// Which.
        path: PathBuf,
    },
}

/// A module, unpacked.
#[derive(Debug, PartialEq, Eq)]
pub struct Module {
    /// As the kernel spells it, with underscores.
    pub name: String,
    /// Its object file.
    pub object: Vec<u8>,
}

/// What modules a kernel has.
#[derive(Debug, Default)]
pub struct Index {
    directory: PathBuf,
    files: HashMap<String, PathBuf>,
    built_in: HashSet<String>,
}

impl Index {
    /// Reads what `directory` (/lib/modules/RELEASE) lists.
    pub fn read(directory: &Path) -> Result<Self, ModuleError> {
        let text = |name: &str| {
            let path = directory.join(name);
            fs::read_to_string(&path).map_err(|source| ModuleError::Read { path, source })
        };
        let listed = text("modules.dep").or_else(|_| text("modules.order"))?;
        let built_in = text("modules.builtin").unwrap_or_default();
        Ok(Self::parse(directory, &listed, &built_in))
    }

    /// `listed` is modules.dep (`FILE: FILE...`) or modules.order (`FILE`).
    fn parse(directory: &Path, listed: &str, built_in: &str) -> Self {
        let files = listed.lines().filter_map(|line| {
            let file = line.split(':').next()?.trim();
            Some((name_of(file)?, directory.join(file)))
        });
        Self {
            directory: directory.to_owned(),
            files: files.collect(),
            built_in: built_in.lines().filter_map(name_of).collect(),
        }
    }

    /// The modules of these names with all that they need, in the order in which they are to be loaded. Those that are
    /// built in are left out.
    pub fn load(&self, wanted: &[&str]) -> Result<Vec<Module>, ModuleError> {
        let (mut loaded, mut seen) = (Vec::new(), HashSet::new());
        for name in wanted {
            self.visit(name, &mut seen, &mut loaded)?;
        }
        Ok(loaded)
    }

    /// Whether there is such a module, or it is built in.
    pub fn has(&self, name: &str) -> bool {
        self.files.contains_key(name) || self.built_in.contains(name)
    }

    fn visit(
        &self,
        name: &str,
        seen: &mut HashSet<String>,
        loaded: &mut Vec<Module>,
    ) -> Result<(), ModuleError> {
        if self.built_in.contains(name) || !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let path = self.files.get(name).ok_or_else(|| ModuleError::Missing {
            name: name.to_owned(),
            directory: self.directory.clone(),
        })?;
        let path = &packed(path);
        let object = unpack(path)?;
        let description =
            elf::section(&object, ".modinfo").ok_or_else(|| ModuleError::Format { path: path.clone() })?;
        for dependency in dependencies(description) {
            self.visit(&dependency, seen, loaded)?;
        }
        loaded.push(Module { name: name.to_owned(), object: without_signature(object) });
        Ok(())
    }
}

/// The module's name in the path of its file: underscores, as the kernel has it, whatever the file's name says.
fn name_of(path: &str) -> Option<String> {
    let file = path.trim().rsplit('/').next()?;
    let (name, rest) = file.split_once(".ko")?;
    matches!(rest, "" | ".xz" | ".zst" | ".gz").then(|| name.replace('-', "_"))
}

/// Names in `depends=` of a module's description, a list of `key=value` that end with NUL.
fn dependencies(description: &[u8]) -> Vec<String> {
    let values = description.split(|&byte| byte == 0).filter_map(|entry| entry.strip_prefix(b"depends="));
    values
        .flat_map(|value| value.split(|&byte| byte == b','))
        .filter(|name| !name.is_empty())
        .map(|name| String::from_utf8_lossy(name).replace('-', "_"))
        .collect()
}

/// modules.order has a module's name as it was built, from Linux 6.12 on; its file may have been packed since.
fn packed(path: &Path) -> PathBuf {
    let with = |extension: &str| {
        let mut name = path.as_os_str().to_owned();
        name.push(extension);
        PathBuf::from(name)
    };
    let found = ["", ".xz", ".zst", ".gz"].into_iter().map(with).find(|path| path.exists());
    found.unwrap_or_else(|| path.to_owned())
}

fn unpack(path: &Path) -> Result<Vec<u8>, ModuleError> {
    let failed = |source| ModuleError::Read { path: path.to_owned(), source };
    let file = fs::File::open(path).map_err(failed)?;
    let mut object = Vec::new();
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("ko") => file.take(MAX_MODULE).read_to_end(&mut object).map(drop),
        Some("gz") => flate2::read::GzDecoder::new(file).take(MAX_MODULE).read_to_end(&mut object).map(drop),
        Some("xz") => {
            let packed = &mut io::BufReader::new(file);
            lzma_rs::xz_decompress(packed, &mut object)
                .map_err(|error| io::Error::other(format!("{error:?}")))
        }
        Some("zst") => match ruzstd::decoding::StreamingDecoder::new(file) {
            Ok(decoder) => decoder.take(MAX_MODULE).read_to_end(&mut object).map(drop),
            Err(error) => Err(io::Error::other(error.to_string())),
        },
        _ => return Err(ModuleError::Format { path: path.to_owned() }),
    }
    .map_err(failed)?;
    Ok(object)
}

/// The module without the signature behind it. Checking one takes an emulated processor many milliseconds, and says
/// nothing here: who gives the guest its modules gave it its kernel.
fn without_signature(mut object: Vec<u8>) -> Vec<u8> {
    let length = object.strip_suffix(SIGNATURE_MARK).and_then(|rest| {
        // struct module_signature ends with the signature's length, big-endian.
        let signature = u32::from_be_bytes(*rest.last_chunk()?);
        rest.len().checked_sub(SIGNATURE_DESCRIPTION)?.checked_sub(usize::try_from(signature).ok()?)
    });
    if let Some(length) = length {
        object.truncate(length);
    }
    object
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    /// A relocatable object with nothing but a .modinfo.
    fn object(description: &[u8]) -> Vec<u8> {
        let names = b"\0.modinfo\0.shstrtab\0";
        let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
        bytes.resize(64, 0);
        let first = bytes.len();
        bytes.extend_from_slice(description);
        let second = bytes.len();
        bytes.extend_from_slice(names);
        let table = bytes.len();
        bytes[0x28..0x30].copy_from_slice(&(table as u64).to_le_bytes());
        bytes[0x3c..0x3e].copy_from_slice(&3_u16.to_le_bytes());
        bytes[0x3e..0x40].copy_from_slice(&2_u16.to_le_bytes());
        for (name, start, length) in [(0, 0, 0), (1, first, description.len()), (10, second, names.len())] {
            let mut header = vec![0; 64];
            header[..4].copy_from_slice(&(name as u32).to_le_bytes());
            header[0x18..0x20].copy_from_slice(&(start as u64).to_le_bytes());
            header[0x20..0x28].copy_from_slice(&(length as u64).to_le_bytes());
            bytes.extend_from_slice(&header);
        }
        bytes
    }

    #[test]
    fn modules_come_after_what_they_need_however_they_are_packed() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| fs::write(directory.path().join(name), bytes).unwrap();
        write("virtio_ring.ko", &object(b"depends=\0"));
        let mut packed = Vec::new();
        lzma_rs::xz_compress(&mut object(b"license=GPL\0depends=virtio_ring\0").as_slice(), &mut packed)
            .unwrap();
        write("virtio.ko.xz", &packed);
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        io::Write::write_all(&mut encoder, &object(b"depends=virtio,virtio_ring,vsock\0")).unwrap();
        write("virtio-mmio.ko.gz", &encoder.finish().unwrap());
        let signed =
            [&object(b"\0"), [7; 40].as_slice(), &[0; 8], &40_u32.to_be_bytes(), SIGNATURE_MARK].concat();
        let zst =
            ruzstd::encoding::compress_to_vec(signed.as_slice(), ruzstd::encoding::CompressionLevel::Fastest);
        write("tun.ko.zst", &zst);
        write("modules.order", b"tun.ko\nvirtio-mmio.ko.gz\nvirtio.ko.xz\nvirtio_ring.ko\n");
        write("modules.builtin", b"kernel/net/vsock.ko\n");

        let index = Index::read(directory.path()).unwrap();
        let modules = index.load(&["tun", "virtio_mmio", "vsock", "virtio"]).unwrap();
        let names: Vec<&str> = modules.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["tun", "virtio_ring", "virtio", "virtio_mmio"]);
        assert_eq!(modules[0].object, object(b"\0"), "the signature is gone");
        assert!(index.has("vsock") && !index.has("overlay"));
        let error = index.load(&["overlay"]).unwrap_err().to_string();
        assert!(error.contains("no module overlay"), "{error}");
    }

    #[test]
    fn modules_dep_names_the_same_files() {
        let listed = "kernel/a/virtio-ring.ko.xz:\nkernel/b/tun.ko.xz: kernel/a/virtio-ring.ko.xz\n";
        let index = Index::parse(Path::new("/m"), listed, "");
        assert_eq!(index.files["virtio_ring"], Path::new("/m/kernel/a/virtio-ring.ko.xz"));
        assert_eq!(index.files["tun"], Path::new("/m/kernel/b/tun.ko.xz"));
        assert_eq!(name_of("kernel/README"), None);
    }

    #[test]
    fn a_module_whose_description_is_garbage_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("tun.ko"), b"no module").unwrap();
        let index = Index::parse(directory.path(), "tun.ko\n", "");
        assert!(matches!(index.load(&["tun"]), Err(ModuleError::Format { .. })));
    }
}
