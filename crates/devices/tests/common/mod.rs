//! A guest's driver in this process, and an outside that does what a test says.
#![allow(dead_code)]

use kso_devices::vhost::{Memory, Queue};
use kso_devices::vsock::packet::{HEADER, Header, Op, STREAM};
use kso_devices::vsock::{End, Endpoint, GuestId, Hub, Outside, Verdict};
use kso_wire::Errno;
use kso_wire::guest::{GUEST_CID, StreamKey};
use std::collections::{HashMap, VecDeque};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};

const SIZE: u16 = 64;
const RX_BUFFERS: u64 = 0x10_0000;
const RX_BUFFER: u32 = 4096;
const TX_BUFFERS: u64 = 0x20_0000;
const TX_BUFFER: u64 = 0x1_1000;
const WRITE: u16 = 2;
const NEXT: u16 = 1;

/// One queue, as a driver sees it.
struct Virtqueue {
    memory: Arc<Memory>,
    base: u64,
    available: u16,
    used: u16,
    _notifiers: [OwnedFd; 2],
}

impl Virtqueue {
    fn new(memory: &Arc<Memory>, base: u64, event_idx: bool) -> (Self, Queue) {
        let rings = [base, base + 0x1000, base + 0x2000];
        let (queue, notifiers) = Queue::in_memory(Arc::clone(memory), SIZE, rings, event_idx).unwrap();
        let memory = Arc::clone(memory);
        (Virtqueue { memory, base, available: 0, used: 0, _notifiers: notifiers }, queue)
    }

    fn describe(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = self.base + u64::from(index) * 16;
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(u32::from(next) << 16 | u32::from(flags), GuestAddress(at + 12)).unwrap();
    }

    fn offer(&mut self, head: u16) {
        let ring = self.base + 0x1000;
        let slot = ring + 4 + u64::from(self.available % SIZE) * 2;
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.memory.write_obj(self.available, GuestAddress(ring + 2)).unwrap();
    }

    fn used(&mut self) -> Option<(u16, u32)> {
        let ring = self.base + 0x2000;
        let index: u16 = self.memory.read_obj(GuestAddress(ring + 2)).unwrap();
        if index == self.used {
            return None;
        }
        let slot = ring + 4 + u64::from(self.used % SIZE) * 8;
        self.used = self.used.wrapping_add(1);
        let head: u32 = self.memory.read_obj(GuestAddress(slot)).unwrap();
        Some((head as u16, self.memory.read_obj(GuestAddress(slot + 4)).unwrap()))
    }
}

/// A guest: sends packets, and keeps what it was sent.
pub struct Driver {
    pub memory: Arc<Memory>,
    rx: Virtqueue,
    tx: Virtqueue,
    free: VecDeque<u16>,
    pub came: VecDeque<(Header, Vec<u8>)>,
    /// Whether buffers are given back at once.
    pub supplies: bool,
    spare: Vec<u16>,
}

impl Driver {
    pub fn new(hub: &mut Hub, event_idx: bool) -> (Self, GuestId) {
        let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), 16 << 20)]).unwrap());
        let (rx, rx_queue) = Virtqueue::new(&memory, 0, event_idx);
        let (tx, tx_queue) = Virtqueue::new(&memory, 0x8000, event_idx);
        let guest = hub.add_guest(Endpoint::Queues(rx_queue, tx_queue)).unwrap();
        let free = (0..SIZE / 2).collect();
        let spare = (0..SIZE).collect();
        let mut driver = Driver { memory, rx, tx, free, came: VecDeque::new(), supplies: true, spare };
        driver.supply();
        (driver, guest)
    }

    /// Gives the device buffers for packets.
    pub fn supply(&mut self) {
        for index in self.spare.drain(..) {
            let buffer = RX_BUFFERS + u64::from(index) * u64::from(RX_BUFFER);
            self.rx.describe(index, buffer, RX_BUFFER, WRITE, 0);
            self.rx.offer(index);
        }
    }

    /// Takes the buffers away that the device has: it has none from now on.
    pub fn starve(&mut self) {
        self.supplies = false;
    }

    /// Whether a packet can be sent now.
    pub fn can_send(&mut self) -> bool {
        while let Some((head, _)) = self.tx.used() {
            self.free.push_back(head / 2);
        }
        !self.free.is_empty()
    }

    pub fn send_raw(&mut self, header: &[u8], payload: &[u8]) {
        assert!(self.can_send(), "no descriptors: the device holds them");
        let slot = self.free.pop_front().unwrap();
        let buffer = TX_BUFFERS + u64::from(slot) * TX_BUFFER;
        self.memory.write_slice(header, GuestAddress(buffer)).unwrap();
        self.memory.write_slice(payload, GuestAddress(buffer + 64)).unwrap();
        let more = if payload.is_empty() { 0 } else { NEXT };
        self.tx.describe(slot * 2, buffer, header.len() as u32, more, slot * 2 + 1);
        self.tx.describe(slot * 2 + 1, buffer + 64, payload.len() as u32, 0, 0);
        self.tx.offer(slot * 2);
    }

    pub fn send(&mut self, header: &Header, payload: &[u8]) {
        self.send_raw(&header.bytes(), payload);
    }

    pub fn packet(&mut self, key: StreamKey, op: Op, payload: &[u8]) {
        self.send(&Header { len: payload.len() as u32, ..from_guest(key, op) }, payload);
    }

    /// Collects what came.
    pub fn receive(&mut self) {
        while let Some((head, len)) = self.rx.used() {
            let mut bytes = vec![0; len as usize];
            let buffer = RX_BUFFERS + u64::from(head) * u64::from(RX_BUFFER);
            self.memory.read_slice(&mut bytes, GuestAddress(buffer)).unwrap();
            let (header, payload) = bytes.split_first_chunk::<HEADER>().unwrap();
            let header = Header::parse(header);
            assert_eq!(header.len as usize, payload.len());
            self.came.push_back((header, payload.to_vec()));
            self.spare.push(head);
        }
        if self.supplies {
            self.supply();
        }
    }

    pub fn next(&mut self) -> Option<(Header, Vec<u8>)> {
        self.receive();
        self.came.pop_front()
    }

    /// The next packet is this one.
    #[track_caller]
    pub fn expect(&mut self, op: Op) -> Header {
        let (header, _) = self.next().unwrap_or_else(|| panic!("{op:?} did not come"));
        assert_eq!(header.operation(), Some(op), "{header:?}");
        header
    }
}

pub fn from_guest(key: StreamKey, op: Op) -> Header {
    Header {
        src_cid: GUEST_CID.into(),
        dst_cid: key.peer_cid.into(),
        src_port: key.local_port,
        dst_port: key.peer_port,
        kind: STREAM,
        op: op as u16,
        buf_alloc: 1 << 18,
        ..Header::default()
    }
}

pub fn key(local_port: u32) -> StreamKey {
    StreamKey { local_port, peer_cid: 0x0a00_0001, peer_port: 80 }
}

#[derive(Debug, PartialEq, Eq)]
pub enum Told {
    Established(GuestId, StreamKey),
    Failed(GuestId, StreamKey, Errno),
    Rejected(GuestId, StreamKey),
    Ended(GuestId, StreamKey, End),
    Sent(GuestId, u64, Result<Option<u64>, Errno>),
    Gone(GuestId),
}

/// An outside whose sockets are pairs.
#[derive(Default)]
pub struct World {
    pub verdicts: VecDeque<Verdict>,
    pub requests: Vec<StreamKey>,
    pub told: Vec<Told>,
    pub output: HashMap<GuestId, Vec<u8>>,
    pub control: Vec<u8>,
}

impl World {
    /// The next REQUEST gets this socket's other end.
    pub fn offer(&mut self) -> UnixStream {
        let (near, far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        far.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        self.verdicts.push_back(Verdict::Socket(near.into()));
        far
    }
}

impl Outside for World {
    fn request(&mut self, _: GuestId, stream: StreamKey) -> Verdict {
        self.requests.push(stream);
        self.verdicts.pop_front().unwrap_or(Verdict::Refused(Errno::ECONNREFUSED))
    }

    fn established(&mut self, guest: GuestId, stream: StreamKey, _: Option<BorrowedFd<'_>>) {
        self.told.push(Told::Established(guest, stream));
        if let Some(output) = self.output.get_mut(&guest) {
            output.extend(b"up ");
        }
    }

    fn failed(&mut self, guest: GuestId, stream: StreamKey, errno: Errno) {
        self.told.push(Told::Failed(guest, stream, errno));
        if let Some(output) = self.output.get_mut(&guest) {
            output.extend(b"failed ");
        }
    }

    fn rejected(&mut self, guest: GuestId, stream: StreamKey, _: OwnedFd) {
        self.told.push(Told::Rejected(guest, stream));
    }

    fn ended(&mut self, guest: GuestId, stream: StreamKey, end: End) {
        self.told.push(Told::Ended(guest, stream, end));
    }

    fn sent(&mut self, guest: GuestId, ticket: u64, result: Result<Option<u64>, Errno>) {
        self.told.push(Told::Sent(guest, ticket, result));
    }

    fn control(&mut self, _: GuestId, bytes: &[u8]) -> Result<(), String> {
        self.control.extend(bytes);
        if bytes.starts_with(b"nonsense") { Err("nonsense".into()) } else { Ok(()) }
    }

    fn control_output(&mut self, guest: GuestId) -> Option<&mut Vec<u8>> {
        self.output.get_mut(&guest)
    }

    fn gone(&mut self, guest: GuestId) {
        self.told.push(Told::Gone(guest));
    }
}

/// Runs until nothing is left to do.
pub fn settle(hub: &mut Hub, world: &mut World) {
    hub.run_ready(world);
    while hub.next_deadline().is_some_and(|at| at <= std::time::Instant::now()) {
        hub.run_ready(world);
    }
}
