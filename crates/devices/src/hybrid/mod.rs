//! Guests whose VMM has a vsock device of its own and joins it to unix sockets, as Firecracker does (its docs/vsock.md): only
//! CID 2 leads out.
//!
//! ```text
//!   guest to host    the VMM connects to PATH_1 (control), PATH_2 (packets), ...: kso_wire::guest::ports
//!                    PATH_7: 8 bytes of a Ticket first; 1 byte, 0, goes back once the connection outside is up
//!   host to guest    we connect to PATH, say "CONNECT port\n" and hear "OK port\n"
//! ```
//!
//! Bytes pass through this process: one copy more than with [`crate::vsock::Hub`], which asks the same [`Outside`].

mod link;

use crate::vsock::{End, GuestId, Outside, Verdict};
use kso_wire::Errno;
use kso_wire::guest::{StreamKey, ports};
use link::{Link, Progress, Role};
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// Numbers of guests here: apart from those of a hub.
const FIRST_GUEST: u32 = 1 << 31;
/// The host's CID (`VMADDR_CID_HOST`, vsock(7)).
const HOST_CID: u32 = 2;
/// Ports on which we listen for the VMM.
const PORTS: std::ops::RangeInclusive<u32> = ports::CONTROL..=ports::STREAMS;
/// Most connections of a guest.
const MAX_LINKS: usize = 16_384;
/// Events taken at once.
const EVENTS: usize = 64;
/// Connections of a VMM that are accepted before others have their turn.
const TURN: usize = 32;

#[derive(Debug)]
struct Guest {
    path: PathBuf,
    listeners: Vec<(u32, UnixListener, PathBuf)>,
    names: HashMap<StreamKey, u32>,
    control: Option<u32>,
    links: usize,
}

impl Drop for Guest {
    fn drop(&mut self) {
        for (_, _, path) in &self.listeners {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Hybrid {
    epoll: OwnedFd,
    guests: HashMap<GuestId, Guest>,
    links: HashMap<u32, Link>,
    next_guest: u32,
    next_link: u32,
}

/// A listener's event has this bit and the guest's number above, and the port below.
const LISTENER: u64 = 1 << 63;

impl Hybrid {
    /// Without guests.
    ///
    /// # Errors
    /// Descriptors ran out.
    pub fn new() -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Self {
            epoll,
            guests: HashMap::new(),
            links: HashMap::new(),
            next_guest: FIRST_GUEST,
            next_link: 0,
        })
    }

    /// Readable when [`Self::run_ready`] has something to do.
    #[must_use]
    pub fn poll_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Whether a guest is one of these.
    #[must_use]
    pub fn has(guest: GuestId) -> bool {
        guest.0 >= FIRST_GUEST
    }

    /// A guest whose VMM has its vsock socket at `path`.
    ///
    /// # Errors
    /// A socket cannot be made beside it.
    pub fn add_guest(&mut self, path: &Path) -> io::Result<GuestId> {
        let id = GuestId(self.next_guest);
        let mut guest = Guest {
            path: path.to_owned(),
            listeners: Vec::new(),
            names: HashMap::new(),
            control: None,
            links: 0,
        };
        for port in PORTS {
            let mut name = OsString::from(path);
            name.push(format!("_{port}"));
            let name = PathBuf::from(name);
            let listener = UnixListener::bind(&name)?;
            listener.set_nonblocking(true)?;
            let data = EventData::new_u64(LISTENER | u64::from(id.0) << 8 | u64::from(port));
            guest.listeners.push((port, listener, name));
            if let Some((_, listener, _)) = guest.listeners.last() {
                epoll::add(&self.epoll, listener, data, EventFlags::IN)?;
            }
        }
        self.next_guest = self.next_guest.wrapping_add(1).max(FIRST_GUEST);
        self.guests.insert(id, guest);
        Ok(id)
    }

    /// Drops a guest and its streams. [`Outside::gone`] is not called.
    pub fn remove_guest(&mut self, guest: GuestId) {
        self.guests.remove(&guest);
        self.links.retain(|_, link| link.guest != guest);
    }

    /// The socket of a stream.
    #[must_use]
    pub fn socket(&self, guest: GuestId, stream: StreamKey) -> Option<BorrowedFd<'_>> {
        let number = self.guests.get(&guest)?.names.get(&stream)?;
        self.links.get(number)?.far.as_ref().map(AsFd::as_fd)
    }

    /// Asks the guest to take a stream: [`Outside::established`] or [`Outside::rejected`] will tell.
    ///
    /// # Errors
    /// The socket, if the VMM does not listen.
    pub fn dial(&mut self, guest: GuestId, stream: StreamKey, socket: OwnedFd) -> Result<(), OwnedFd> {
        let Some(known) = self.guests.get(&guest).filter(|known| known.links < MAX_LINKS) else {
            return Err(socket);
        };
        let near = match connect(&known.path) {
            Ok(near) => near,
            Err(error) => {
                tracing::debug!(%error, path = %known.path.display(), "the VMM does not take a connection");
                return Err(socket);
            }
        };
        let mut link = Link::new(guest, near, Role::Dialled { key: stream, line: Vec::new() });
        link.greet(format!("CONNECT {}\n", stream.local_port).as_bytes());
        link.far = Some(socket);
        let number = self.insert(link);
        self.name(guest, stream, number);
        Ok(())
    }

    fn name(&mut self, guest: GuestId, stream: StreamKey, number: u32) {
        if let Some(guest) = self.guests.get_mut(&guest) {
            guest.names.insert(stream, number);
        }
    }

    fn insert(&mut self, link: Link) -> u32 {
        while self.links.contains_key(&self.next_link) {
            self.next_link = self.next_link.wrapping_add(1);
        }
        let number = self.next_link;
        self.next_link = number.wrapping_add(1);
        watch(&self.epoll, &link.near, number);
        if let Some(guest) = self.guests.get_mut(&link.guest) {
            guest.links += 1;
        }
        self.links.insert(number, link);
        number
    }

    /// Sends what was written to control outputs.
    pub fn flush(&mut self, outside: &mut dyn Outside) {
        let controls: Vec<u32> = self.guests.values().filter_map(|guest| guest.control).collect();
        for number in controls {
            self.serve(number, outside);
        }
    }

    /// Does what there is to do.
    pub fn run_ready(&mut self, outside: &mut dyn Outside) {
        let mut events = Vec::with_capacity(EVENTS);
        let none = Timespec::default();
        let _ = epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&none));
        for event in &events {
            let data = event.data.u64();
            if data & LISTENER != 0 {
                let guest = GuestId(((data & !LISTENER) >> 8) as u32);
                self.accept(guest, (data & 0xff) as u32, outside);
            } else {
                self.serve(data as u32, outside);
            }
        }
        self.flush(outside);
    }

    fn accept(&mut self, guest: GuestId, port: u32, outside: &mut dyn Outside) {
        for _ in 0..TURN {
            let Some(known) = self.guests.get_mut(&guest) else { return };
            let Some((_, listener, _)) = known.listeners.iter().find(|(other, ..)| *other == port) else {
                return;
            };
            let Ok((near, _)) = listener.accept() else { return };
            // Too many: this one is closed at once.
            if known.links >= MAX_LINKS || near.set_nonblocking(true).is_err() {
                continue;
            }
            if port == ports::STREAMS {
                self.insert(Link::new(guest, near.into(), Role::Ticket(Vec::new())));
                continue;
            }
            let key = StreamKey { local_port: 0, peer_cid: HOST_CID, peer_port: port };
            match outside.request(guest, key) {
                Verdict::Control => {
                    let number = self.insert(Link::new(guest, near.into(), Role::Control));
                    if let Some(known) = self.guests.get_mut(&guest) {
                        known.control = Some(number);
                    }
                }
                Verdict::Socket(socket) => {
                    let mut link = Link::new(guest, near.into(), Role::Service);
                    link.far = Some(socket);
                    let number = self.insert(link);
                    self.watch_far(number);
                }
                Verdict::Guest(..) | Verdict::Refused(_) => {}
            }
        }
    }

    fn watch_far(&self, number: u32) {
        if let Some(far) = self.links.get(&number).and_then(|link| link.far.as_ref()) {
            watch(&self.epoll, far, number);
        }
    }

    /// Serves a link as far as it goes.
    fn serve(&mut self, number: u32, outside: &mut dyn Outside) {
        while let Some(link) = self.links.get_mut(&number) {
            let guest = link.guest;
            match link.run(outside) {
                Progress::Waits => return,
                Progress::Requested(ticket) => {
                    let key = StreamKey {
                        local_port: ticket as u32,
                        peer_cid: HOST_CID,
                        peer_port: ports::STREAMS,
                    };
                    match outside.request(guest, key) {
                        Verdict::Socket(socket) => {
                            link.far = Some(socket);
                            link.role = Role::Connecting(key);
                            self.name(guest, key, number);
                            self.watch_far(number);
                        }
                        // The broker joins only guests of a hub.
                        Verdict::Control | Verdict::Guest(..) | Verdict::Refused(_) => {
                            return self.close(number, None);
                        }
                    }
                }
                Progress::Up(key) => {
                    outside.established(guest, key, link.far.as_ref().map(AsFd::as_fd));
                    link.role = Role::Open(key);
                    link.answer(&[0]);
                }
                Progress::Failed(key, errno) => {
                    self.close(number, Some(key));
                    return outside.failed(guest, key, errno);
                }
                Progress::Taken(key, port) => {
                    let named = StreamKey { local_port: key.local_port, peer_cid: HOST_CID, peer_port: port };
                    outside.renamed(guest, key, named);
                    outside.established(guest, named, link.far.as_ref().map(AsFd::as_fd));
                    link.role = Role::Open(named);
                    if let Some(known) = self.guests.get_mut(&guest) {
                        known.names.remove(&key);
                    }
                    self.name(guest, named, number);
                    self.watch_far(number);
                }
                Progress::Rejected(key) => {
                    let socket = link.far.take();
                    self.close(number, Some(key));
                    if let Some(socket) = socket {
                        outside.rejected(guest, key, socket);
                    }
                    return;
                }
                Progress::Over(key, errno) => {
                    let end = End { bytes_out: link.bytes_out(), bytes_in: link.bytes_in(), errno };
                    self.close(number, key);
                    if let Some(key) = key {
                        outside.ended(guest, key, end);
                    }
                    return;
                }
                Progress::Gone(reason) => {
                    // Who spoke for the guest is gone: so is all that it had.
                    if let Some(reason) = reason {
                        tracing::warn!(guest = guest.0, reason, "a guest is dropped");
                    }
                    self.links.retain(|_, link| link.guest != guest);
                    if let Some(known) = self.guests.get_mut(&guest) {
                        known.names.clear();
                        known.control = None;
                        known.links = 0;
                    }
                    return outside.gone(guest);
                }
            }
        }
    }

    fn close(&mut self, number: u32, key: Option<StreamKey>) {
        let Some(link) = self.links.remove(&number) else { return };
        if let Some(guest) = self.guests.get_mut(&link.guest) {
            guest.links = guest.links.saturating_sub(1);
            if let Some(key) = key
                && guest.names.get(&key) == Some(&number)
            {
                guest.names.remove(&key);
            }
        }
    }
}

fn watch(epoll: &OwnedFd, socket: impl AsFd, number: u32) {
    let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
    if let Err(error) = epoll::add(epoll, socket, EventData::new_u64(number.into()), flags) {
        tracing::warn!(%error, "a stream is not watched");
    }
}

fn connect(path: &Path) -> Result<OwnedFd, rustix::io::Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // A full queue is EAGAIN: it is tried again later, as everything that is rejected.
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

fn errno_of(error: rustix::io::Errno) -> Errno {
    kso_sys::errno::from_raw(error.raw_os_error())
}
