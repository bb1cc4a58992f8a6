//! Sockets made in advance.
//!
//! To make a socket and to lock it to its peer is a good part of what a short connection costs beyond the
//! kernel's own (where each lock has to be compiled, the most of it). For a peer that is connected to again and
//! again a thread does it beforehand, on a processor that has nothing else to do.
//!
//! ```text
//!   one connection soon after another --> a shelf of sockets locked to that peer, looked after each millisecond
//!   none for a moment ----------------> looked after when somebody takes from it
//!   none for a while -----------------> cleared
//! ```
//!
//! It also closes the sockets of the program for which such were swapped in.
//!
//! A socket of a shelf was not asked for by anybody yet: whether a connection is permitted is decided before one
//! is taken, each time. The caller never waits for the thread: it makes a socket itself when there is none.

use crate::stream::{self, Holder, Order};
use kso_wire::{Errno, Family};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// Sockets on a full shelf.
const FULL: usize = 32;
/// With so many left the thread is woken, if it sleeps.
const LOW: usize = 16;
/// So many peers have a shelf.
const SHELVES: usize = 8;
/// So many connections one soon after another make a peer worth a shelf.
const STREAK: u32 = 8;
/// What "soon after another" is.
const PAUSE: Duration = Duration::from_millis(50);
/// How often the thread looks while it is busy: to be woken each time would cost the caller more than that.
const TICK: Duration = Duration::from_millis(1);
/// A shelf that nobody took from for so long is cleared.
const STALE: Duration = Duration::from_millis(500);
/// So many sockets wait for the thread to close them.
const CLOSING: usize = 32;
/// Stack of the thread, bytes: it only makes system calls.
const STACK: usize = 64 << 10;

#[derive(Debug)]
struct Shelf {
    family: Family,
    peer: SocketAddr,
    sockets: Vec<OwnedFd>,
    streak: u32,
    used: Instant,
}

impl Shelf {
    fn is_for(&self, family: Family, peer: SocketAddr) -> bool {
        self.peer == peer && self.family == family
    }

    fn wants(&self, number: usize) -> bool {
        self.streak >= STREAK && self.sockets.len() < number
    }
}

#[derive(Debug, Default)]
struct Shared {
    /// Held for moments only, without a system call.
    shelves: Mutex<Vec<Shelf>>,
    /// What the thread is to close.
    closing: Mutex<Vec<OwnedFd>>,
    /// The thread comes by itself. Written under the lock of `closing`: nothing is left there when it sleeps.
    ticking: AtomicBool,
    ended: AtomicBool,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Stock {
    shared: Arc<Shared>,
    thread: Option<Thread>,
    /// No thread could be started: once is enough.
    without: bool,
}

impl Stock {
    /// [`stream::connect`], with a socket that was made in advance if there is one.
    ///
    /// # Errors
    /// As [`stream::connect`].
    pub fn connect(&mut self, order: &Order<'_>) -> Result<OwnedFd, Errno> {
        let made = if order.holder == Holder::Program { self.take(order.family, order.peer) } else { None };
        match made {
            Some(socket) => {
                stream::connect_locked(&socket, order)?;
                Ok(socket)
            }
            None => stream::connect(order),
        }
    }

    /// Closes a socket: when the thread comes by, if it does so anyhow.
    pub fn discard(&self, socket: OwnedFd) {
        if let Ok(mut closing) = self.shared.closing.try_lock()
            && self.shared.ticking.load(Ordering::Relaxed)
            && closing.len() < CLOSING
        {
            closing.push(socket);
        }
    }

    fn take(&mut self, family: Family, peer: SocketAddr) -> Option<OwnedFd> {
        let now = Instant::now();
        // Should the thread hold it, it would be no gain to wait.
        let mut shelves = self.shared.shelves.try_lock().ok()?;
        let full = shelves.len() >= SHELVES;
        let Some(shelf) = shelves.iter_mut().find(|shelf| shelf.is_for(family, peer)) else {
            let fresh = Shelf { family, peer, sockets: Vec::new(), streak: 1, used: now };
            let oldest = match shelves.iter_mut().min_by_key(|shelf| shelf.used) {
                Some(oldest) if full => Some(std::mem::replace(oldest, fresh)),
                _ => {
                    shelves.push(fresh);
                    None
                }
            };
            drop(shelves);
            // Closing is for outside of the lock.
            drop(oldest);
            return None;
        };
        shelf.streak =
            if now.duration_since(shelf.used) < PAUSE { shelf.streak.saturating_add(1) } else { 1 };
        shelf.used = now;
        let socket = shelf.sockets.pop();
        let low = shelf.wants(LOW);
        drop(shelves);
        if low {
            self.wake();
        }
        socket
    }

    fn wake(&mut self) {
        if let Some(thread) = &self.thread {
            if !self.shared.ticking.load(Ordering::Relaxed) {
                thread.unpark();
            }
            return;
        }
        if self.without {
            return;
        }
        let shared = Arc::clone(&self.shared);
        let builder = std::thread::Builder::new().name("kso-stock".into()).stack_size(STACK);
        match builder.spawn(move || shared.run()) {
            Ok(handle) => self.thread = Some(handle.thread().clone()),
            Err(error) => {
                tracing::debug!(%error, "no sockets are made in advance");
                self.without = true;
            }
        }
    }
}

impl Drop for Stock {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Release);
        if let Some(thread) = &self.thread {
            thread.unpark();
        }
    }
}

/// What the thread finds.
#[derive(Default)]
struct Look {
    /// A shelf that is not full.
    wanted: Option<(Family, SocketAddr)>,
    /// One is taken from right now.
    busy: bool,
    /// There are sockets that will become stale.
    left: bool,
}

impl Shared {
    fn run(&self) {
        while !self.ended.load(Ordering::Acquire) {
            let look = self.look();
            self.close(look.busy);
            match look.wanted {
                // Short of something, the thread waits too: whoever connects next tells of what.
                Some((family, peer)) if self.fill(family, peer) => {}
                _ if look.busy => std::thread::park_timeout(TICK),
                _ if look.left => std::thread::park_timeout(STALE),
                _ => std::thread::park(),
            }
        }
    }

    /// Closes what was left to the thread.
    fn close(&self, ticking: bool) {
        let mut closing = self.closing.lock().unwrap_or_else(PoisonError::into_inner);
        self.ticking.store(ticking, Ordering::Relaxed);
        let sockets = std::mem::take(&mut *closing);
        drop(closing);
        drop(sockets);
    }

    /// Clears what is stale, and tells what is to be done.
    fn look(&self) -> Look {
        let now = Instant::now();
        let mut shelves = self.shelves.lock().unwrap_or_else(PoisonError::into_inner);
        let mut stale = Vec::new();
        let mut look = Look::default();
        for shelf in shelves.iter_mut() {
            let idle = now.duration_since(shelf.used);
            if idle > STALE {
                shelf.streak = 0;
                stale.append(&mut shelf.sockets);
            }
            look.busy |= shelf.streak >= STREAK && idle < PAUSE;
            look.left |= !shelf.sockets.is_empty();
            if shelf.wants(FULL) {
                look.wanted = Some((shelf.family, shelf.peer));
            }
        }
        drop(shelves);
        // Closing is for outside of the lock.
        drop(stale);
        look
    }

    /// Makes a socket for a shelf. Whether it could.
    fn fill(&self, family: Family, peer: SocketAddr) -> bool {
        let Ok(socket) = stream::locked(family, peer) else { return false };
        let mut shelves = self.shelves.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(shelf) = shelves.iter_mut().find(|shelf| shelf.is_for(family, peer)) {
            shelf.sockets.push(socket);
        }
        true
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use kso_wire::SocketOptions;
    use std::net::{TcpListener, TcpStream};

    fn on_shelves(stock: &Stock) -> usize {
        stock.shared.shelves.lock().unwrap().iter().map(|shelf| shelf.sockets.len()).sum()
    }

    #[test]
    fn a_peer_that_comes_again_gets_sockets_from_a_shelf_which_is_cleared_later() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = listener.local_addr().unwrap();
        let options = SocketOptions::default();
        let order =
            Order { peer, family: Family::V4, port: None, options: &options, holder: Holder::Program };
        let mut stock = Stock::default();
        for _ in 1..STREAK {
            drop(stock.connect(&order).unwrap());
            assert!(stock.thread.is_none(), "a few connections are not worth a shelf");
        }
        let patience = Instant::now() + Duration::from_secs(10);
        while on_shelves(&stock) < FULL && Instant::now() < patience {
            drop(stock.connect(&order).unwrap());
            std::thread::sleep(Duration::from_millis(1));
        }
        let before = on_shelves(&stock);
        assert!(before > 0);
        let stream = TcpStream::from(stock.connect(&order).unwrap());
        assert_eq!(stream.peer_addr().unwrap(), peer);
        while on_shelves(&stock) > 0 && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(on_shelves(&stock), 0);
    }

    #[test]
    fn peers_that_come_once_leave_nothing() {
        let options = SocketOptions::default();
        let mut stock = Stock::default();
        for _ in 0..4 * SHELVES {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let peer = listener.local_addr().unwrap();
            stock
                .connect(&Order {
                    peer,
                    family: Family::V4,
                    port: None,
                    options: &options,
                    holder: Holder::Program,
                })
                .unwrap();
        }
        assert!(stock.thread.is_none());
        assert!(stock.shared.shelves.lock().unwrap().len() <= SHELVES);
    }
}
