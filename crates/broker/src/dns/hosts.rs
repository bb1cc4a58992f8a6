//! The host's `/etc/hosts` (hosts(5)), read again when it changes.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// A change is seen after this time at the latest.
const LOOK: Duration = Duration::from_secs(1);
/// Longest file that is read, bytes.
const MAX_FILE: u64 = 4 << 20;

/// A small text file that is watched by its time of change.
#[derive(Debug)]
pub(crate) struct Watched {
    path: PathBuf,
    looked: Option<Instant>,
    changed: Option<(SystemTime, u64)>,
    /// Counts the changes.
    pub version: u64,
    /// What it says.
    pub text: Arc<str>,
}

impl Watched {
    pub fn new(path: PathBuf) -> Self {
        let mut file = Self { path, looked: None, changed: None, version: 0, text: "".into() };
        file.look(Instant::now());
        file
    }

    /// Reads it again if it changed. Costs nothing if it was looked at just now.
    pub fn look(&mut self, now: Instant) {
        if self.looked.is_some_and(|looked| now.duration_since(looked) < LOOK) {
            return;
        }
        self.looked = Some(now);
        let found = fs::metadata(&self.path).ok().filter(|found| found.len() <= MAX_FILE);
        let changed = found.and_then(|found| Some((found.modified().ok()?, found.len())));
        if changed == self.changed {
            return;
        }
        self.changed = changed;
        self.version += 1;
        self.text = changed.and_then(|_| fs::read_to_string(&self.path).ok()).unwrap_or_default().into();
    }
}

/// The first name of `address` in the text of a hosts file.
pub(crate) fn name_of(text: &str, address: IpAddr) -> Option<&str> {
    text.lines().find_map(|line| {
        let mut words = line.split('#').next()?.split_ascii_whitespace();
        let found: IpAddr = words.next()?.parse().ok()?;
        if found.to_canonical() == address { words.next() } else { None }
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_seen() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("hosts");
        let mut file = Watched::new(path.clone());
        assert_eq!(&*file.text, "");
        fs::write(&path, "192.0.2.1 one # two\n").unwrap();
        file.look(Instant::now());
        assert_eq!(&*file.text, "");
        file.look(Instant::now() + LOOK);
        assert_eq!(name_of(&file.text, [192, 0, 2, 1].into()), Some("one"));
        assert_eq!(name_of(&file.text, [192, 0, 2, 2].into()), None);
    }
}
