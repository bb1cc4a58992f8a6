//! Which files still live, without keeping them alive.
//!
//! An epoll registration ends with its file (epoll(7), "Will closing a file descriptor cause it to be
//! removed"), and `/proc/PID/fdinfo` of the epoll instance lists those there are (proc(5)). So a listener that
//! was handed to a program can be closed here at once, and asked for later.

use rustix::event::epoll;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// See the module.
#[derive(Debug)]
pub struct Watch {
    epoll: OwnedFd,
}

impl Watch {
    /// Watches nothing yet.
    ///
    /// # Errors
    /// `EMFILE`.
    pub fn new() -> io::Result<Self> {
        Ok(Self { epoll: epoll::create(epoll::CreateFlags::CLOEXEC)? })
    }

    /// Watches the file behind `file` under `key`.
    ///
    /// # Errors
    /// `ENOSPC` (fs.epoll.max_user_watches).
    pub fn add(&self, file: impl AsFd, key: u64) -> io::Result<()> {
        epoll::add(&self.epoll, file, epoll::EventData::new_u64(key), epoll::EventFlags::empty())?;
        Ok(())
    }

    /// Calls `each` with every key whose file lives.
    ///
    /// # Errors
    /// /proc cannot be read.
    pub fn alive(&self, mut each: impl FnMut(u64)) -> io::Result<()> {
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", self.epoll.as_raw_fd()))?;
        text.lines().filter_map(key).for_each(&mut each);
        Ok(())
    }
}

/// The key in `tfd:  5 events:  1d data:  7  pos:0 ino:6df sdev:8` (fs/eventpoll.c, ep_show_fdinfo).
fn key(line: &str) -> Option<u64> {
    let data = line.strip_prefix("tfd:")?.split_once("data:")?.1;
    u64::from_str_radix(data.split_ascii_whitespace().next()?, 16).ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_file_lives_as_long_as_anybody_has_it() {
        let watch = Watch::new().unwrap();
        let keys = || {
            let mut keys = Vec::new();
            watch.alive(|key| keys.push(key)).unwrap();
            keys.sort_unstable();
            keys
        };
        let one = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let two = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        watch.add(&one, 7).unwrap();
        watch.add(&two, u64::MAX).unwrap();
        let copy = one.try_clone().unwrap();
        drop(one);
        assert_eq!(keys(), [7, u64::MAX]);
        drop(copy);
        assert_eq!(keys(), [u64::MAX]);
        assert_eq!(key("pos:\t0"), None);
        assert_eq!(key("tfd: 1 data:"), None);
    }
}
