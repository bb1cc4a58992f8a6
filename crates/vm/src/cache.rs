//! Where what was made once is kept.

use std::io;
use std::path::{Path, PathBuf};

/// `$XDG_CACHE_HOME/kso`, by default `~/.cache/kso` (XDG base directory specification).
pub fn directory() -> io::Result<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
    base.map(|base| base.join("kso")).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::NotFound,
            "there is no cache directory: neither $XDG_CACHE_HOME nor $HOME is set",
        )
    })
}

/// Writes a file that others see whole or not at all.
pub fn write(path: &Path, contents: &[u8]) -> io::Result<()> {
    let parent = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    std::fs::create_dir_all(parent)?;
    let mut file = tempfile::NamedTempFile::new_in(parent)?;
    io::Write::write_all(&mut file, contents)?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

/// A name for whatever is made of these words: FNV-1a, 64 bits. Nobody chooses them to collide: the cache is the user's.
pub fn key<'a>(words: impl IntoIterator<Item = &'a [u8]>) -> String {
    const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(PRIME);
    let hash = words.into_iter().fold(OFFSET, |hash, word| {
        // The end of a word counts, too.
        word.iter().chain(&[0xff, 0]).fold(hash, step)
    });
    format!("{hash:016x}")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn keys_tell_words_apart() {
        let key_of = |words: &[&str]| key(words.iter().map(|word| word.as_bytes()));
        assert_eq!(key_of(&["6.1", "a"]), key_of(&["6.1", "a"]));
        assert_ne!(key_of(&["6.1", "a"]), key_of(&["6.1a"]));
        assert_ne!(key_of(&["6.1", "a"]), key_of(&["6.1", "b"]));
    }

    #[test]
    fn a_file_is_replaced_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deep/file");
        write(&path, b"one").unwrap();
        write(&path, b"two").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }
}
