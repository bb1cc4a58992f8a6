//! The archive that the kernel unpacks as its first root (Documentation/driver-api/early-userspace/buffer-format.rst, "newc").

/// File types of `st_mode` (inode(7)).
const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const CHARACTER: u32 = 0o020_000;
/// Headers, names and contents each begin on this boundary.
const ALIGNMENT: usize = 4;

/// An archive under construction. Everything belongs to root and is of the year 1970, so that the same contents
/// are the same bytes.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    pub fn directory(&mut self, name: &str, permissions: u32) {
        self.entry(name, DIRECTORY | permissions, (0, 0), &[]);
    }

    pub fn file(&mut self, name: &str, permissions: u32, contents: &[u8]) {
        self.entry(name, FILE | permissions, (0, 0), contents);
    }

    /// A character device.
    pub fn device(&mut self, name: &str, permissions: u32, number: (u32, u32)) {
        self.entry(name, CHARACTER | permissions, number, &[]);
    }

    pub fn finish(mut self) -> Vec<u8> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, (major, minor): (u32, u32), contents: &[u8]) {
        self.inode += 1;
        let size = u32::try_from(contents.len()).unwrap_or(u32::MAX);
        let name_size = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
        let links = 1;
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        let fields = [self.inode, mode, 0, 0, links, 0, size, 0, 0, major, minor, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(contents);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_what_the_format_says() {
        let mut archive = Archive::default();
        archive.directory("dev", 0o755);
        archive.device("dev/console", 0o600, (5, 1));
        archive.file("init", 0o755, b"hello");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % ALIGNMENT, 0);
        let (mut at, mut seen) = (0, Vec::new());
        while at < bytes.len() {
            assert_eq!(&bytes[at..at + 6], b"070701");
            let field = |index: usize| {
                let text = std::str::from_utf8(&bytes[at + 6 + 8 * index..at + 14 + 8 * index]).unwrap();
                usize::from_str_radix(text, 16).unwrap()
            };
            let (mode, size, device, length) = (field(1), field(6), (field(9), field(10)), field(11));
            let name = std::str::from_utf8(&bytes[at + 110..at + 110 + length - 1]).unwrap().to_owned();
            let contents = (at + 110 + length).next_multiple_of(4);
            seen.push((name, mode, device, bytes[contents..contents + size].to_vec()));
            at = (contents + size).next_multiple_of(4);
        }
        let entry =
            |name: &str, mode, device, contents: &[u8]| (name.to_owned(), mode, device, contents.to_vec());
        assert_eq!(
            seen,
            [
                entry("dev", 0o040_755, (0, 0), b""),
                entry("dev/console", 0o020_600, (5, 1), b""),
                entry("init", 0o100_755, (0, 0), b"hello"),
                entry("TRAILER!!!", 0, (0, 0), b""),
            ]
        );
    }
}
