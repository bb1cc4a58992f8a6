//! What a file service says first: which kernel performs.
//!
//! ```text
//!   "ksofiles"   version: u32   0: u32   boot: 16 bytes, all 0 if unknown          (little endian)
//! ```

/// Bytes of it.
pub(crate) const HELLO: usize = 32;
const MAGIC: &[u8; 8] = b"ksofiles";
const VERSION: u32 = 1;

/// One life of a kernel: what it has not written to its disks is lost when another begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Boot([u8; 16]);

impl Boot {
    /// This kernel's. Not every kernel tells.
    pub fn own() -> Self {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
        Self(u128::from_str_radix(&digits, 16).unwrap_or(0).to_be_bytes())
    }

    /// Whether both are surely the same.
    pub fn is(self, other: Self) -> bool {
        self == other && self.0 != [0; 16]
    }
}

/// Why a stream is no file service's.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Strange {
    /// It says something else.
    #[error("what answers is no file service of kso's")]
    Magic,
    /// It is another version.
    #[error(
        "the file service speaks version {0} of the stream, this kso version {VERSION}: use the same kso on both sides"
    )]
    Version(u32),
}

/// What is said.
pub(crate) fn encode(boot: Boot) -> [u8; HELLO] {
    let mut hello = [0; HELLO];
    for (to, from) in
        hello.iter_mut().zip(MAGIC.iter().copied().chain(VERSION.to_le_bytes()).chain([0; 4]).chain(boot.0))
    {
        *to = from;
    }
    hello
}

/// What was heard.
pub(crate) fn decode(hello: &[u8; HELLO]) -> Result<Boot, Strange> {
    let (magic, rest) = hello.split_first_chunk::<8>().ok_or(Strange::Magic)?;
    let (version, rest) = rest.split_first_chunk::<4>().ok_or(Strange::Magic)?;
    let (_, boot) = rest.split_last_chunk::<16>().ok_or(Strange::Magic)?;
    match u32::from_le_bytes(*version) {
        _ if magic != MAGIC => Err(Strange::Magic),
        VERSION => Ok(Boot(*boot)),
        other => Err(Strange::Version(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_are_these() {
        let boot = Boot(*b"0123456789abcdef");
        assert_eq!(&encode(boot), b"ksofiles\x01\0\0\0\0\0\0\x000123456789abcdef");
        assert_eq!(decode(&encode(boot)), Ok(boot));
        assert_eq!(decode(b"ksofiles\x02\0\0\0\0\0\0\x000123456789abcdef"), Err(Strange::Version(2)));
        assert_eq!(decode(&[b'H'; HELLO]), Err(Strange::Magic));
    }

    #[test]
    fn a_kernel_is_itself_only_if_it_says_so() {
        assert!(Boot::own().is(Boot::own()));
        assert!(!Boot([0; 16]).is(Boot([0; 16])));
        assert!(!Boot([1; 16]).is(Boot([2; 16])));
    }
}
