//! Whether sockets still exist, asked without holding them: an epoll registration does not outlive its file, and
//! `/proc/self/fdinfo` lists those that live.

use rustix::event::epoll;
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// Sockets by cookie, and what is known of each.
#[derive(Debug)]
pub(super) struct Watch<T> {
    watch: OwnedFd,
    held: HashMap<u64, T>,
}

impl<T> Watch<T> {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { watch: epoll::create(epoll::CreateFlags::CLOEXEC)?, held: HashMap::new() })
    }

    pub(super) fn len(&self) -> usize {
        self.held.len()
    }

    /// Watches a socket. Our own copies of it must be closed, or it never ends.
    pub(super) fn add(&mut self, socket: BorrowedFd<'_>, cookie: u64, value: T) -> io::Result<()> {
        epoll::add(&self.watch, socket, epoll::EventData::new_u64(cookie), epoll::EventFlags::empty())?;
        self.held.insert(cookie, value);
        Ok(())
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &T> {
        self.held.values()
    }

    pub(super) fn values_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.held.values_mut()
    }

    /// Takes out those that are closed.
    pub(super) fn take_closed(&mut self) -> Vec<T> {
        if self.held.is_empty() {
            return Vec::new();
        }
        let path = format!("/proc/self/fdinfo/{}", self.watch.as_raw_fd());
        let Ok(text) = std::fs::read_to_string(path) else { return Vec::new() };
        let alive: Vec<u64> = text
            .lines()
            .filter_map(|line| line.split_once("data:")?.1.split_whitespace().next())
            .filter_map(|data| u64::from_str_radix(data, 16).ok())
            .collect();
        let closed: Vec<u64> = self.held.keys().copied().filter(|cookie| !alive.contains(cookie)).collect();
        closed.iter().filter_map(|cookie| self.held.remove(cookie)).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_socket_ends_with_its_last_descriptor() {
        let mut watch = Watch::new().unwrap();
        let sockets = [1, 2].map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
        for (cookie, socket) in (1..).zip(&sockets) {
            watch.add(socket.as_fd(), cookie, cookie).unwrap();
        }
        let [one, two] = sockets;
        let copy = two.try_clone().unwrap();
        drop(two);
        assert!(watch.take_closed().is_empty());
        drop(one);
        assert_eq!(watch.take_closed(), [1]);
        drop(copy);
        assert_eq!(watch.take_closed(), [2]);
        assert_eq!(watch.len(), 0);
    }
}
