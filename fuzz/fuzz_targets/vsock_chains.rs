//! What a guest writes into its memory: rings, descriptors, packets, in any order, and what the far ends do meanwhile.
#![no_main]

use kso_devices::vhost::{Memory, Queue};
use kso_devices::vsock::packet::{Header, STREAM};
use kso_devices::vsock::{End, Endpoint, GuestId, Hub, Limits, Outside, Verdict};
use kso_wire::Errno;
use kso_wire::guest::{GUEST_CID, StreamKey};
use libfuzzer_sys::fuzz_target;
use std::io::{Read, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress};

const MEMORY: usize = 1 << 18;
const SIZE: u16 = 16;
/// Rings of RX, then of TX.
const BASES: [u64; 2] = [0, 0x1000];
/// Where packets and buffers are put that are well formed.
const PACKETS: u64 = 0x4000;

#[derive(Default)]
struct World {
    far: Vec<UnixStream>,
    output: Vec<u8>,
    open: Vec<StreamKey>,
}

impl Outside for World {
    fn request(&mut self, guest: GuestId, stream: StreamKey) -> Verdict {
        match stream.peer_port % 4 {
            0 => Verdict::Refused(Errno::ECONNREFUSED),
            1 => Verdict::Control,
            2 => Verdict::Guest(guest, StreamKey { local_port: 7, peer_cid: 9, peer_port: stream.local_port }),
            _ if self.far.len() > 16 => Verdict::Refused(Errno::EMFILE),
            _ => {
                let (near, far) = UnixStream::pair().unwrap();
                far.set_nonblocking(true).unwrap();
                self.far.push(far);
                Verdict::Socket(near.into())
            }
        }
    }

    fn established(&mut self, _: GuestId, stream: StreamKey, _: Option<BorrowedFd<'_>>) {
        assert!(!self.open.contains(&stream));
        self.open.push(stream);
        self.output.extend(b"established");
    }

    fn failed(&mut self, _: GuestId, stream: StreamKey, _: Errno) {
        assert!(!self.open.contains(&stream));
        self.output.extend(b"failed");
    }

    fn rejected(&mut self, _: GuestId, _: StreamKey, _: OwnedFd) {}

    fn ended(&mut self, _: GuestId, stream: StreamKey, _: End) {
        self.open.retain(|open| *open != stream);
    }

    fn control(&mut self, _: GuestId, bytes: &[u8]) -> Result<(), String> {
        if bytes.first() == Some(&0xff) { Err("no message".into()) } else { Ok(()) }
    }

    fn control_output(&mut self, _: GuestId) -> Option<&mut Vec<u8>> {
        self.output.truncate(4096);
        Some(&mut self.output)
    }

    fn gone(&mut self, _: GuestId) {
        self.open.clear();
    }
}

struct Guest {
    memory: Arc<Memory>,
    available: [u16; 2],
}

impl Guest {
    fn write<T: vm_memory::ByteValued>(&self, value: T, address: u64) {
        let _ = self.memory.write_obj(value, GuestAddress(address));
    }

    fn offer(&mut self, queue: usize, head: u16) {
        let ring = BASES[queue] + 0x400;
        self.write(head, ring + 4 + u64::from(self.available[queue] % SIZE) * 2);
        self.available[queue] = self.available[queue].wrapping_add(1);
        self.write(self.available[queue], ring + 2);
    }

    fn describe(&mut self, queue: usize, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = BASES[queue] + u64::from(index % SIZE) * 16;
        self.write(address, at);
        self.write(len, at + 8);
        self.write(u32::from(next) << 16 | u32::from(flags), at + 12);
    }
}

fuzz_target!(|input: &[u8]| {
    let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap());
    let event_idx = input.len() % 2 == 0;
    let queue = |base| {
        let rings = [base, base + 0x400, base + 0x800];
        Queue::in_memory(Arc::clone(&memory), SIZE, rings, event_idx).unwrap().0
    };
    let mut hub = Hub::new(Limits { streams: 32, half_open: 16, held: 1 << 20 }).unwrap();
    let id = hub.add_guest(Endpoint::Queues(queue(BASES[0]), queue(BASES[1]))).unwrap();
    let mut world = World::default();
    let mut guest = Guest { memory, available: [0; 2] };
    let mut rest = input;
    let mut take = |count: usize| {
        let (part, after) = rest.split_at(count.min(rest.len()));
        rest = after;
        let mut bytes = [0; 16];
        bytes[..part.len()].copy_from_slice(part);
        (!part.is_empty()).then_some(bytes)
    };
    while let Some([action, a, b, c, d, e, f, g, ..]) = take(8) {
        let word = u32::from_le_bytes([c, d, e, f]);
        match action % 8 {
            // Anything, anywhere in the rings.
            0 => guest.write(word, u64::from(u16::from_le_bytes([a, b]) % 0x1c00) & !3),
            // A descriptor.
            1 => {
                let address = u64::from(word) % (MEMORY as u64 + 64);
                guest.describe(usize::from(a & 1), b.into(), address, u32::from(g) * 37, u16::from(a >> 1) % 8, b.into());
            }
            2 => guest.offer(usize::from(a & 1), b.into()),
            // A buffer that is well formed.
            3 => {
                let index = u16::from(b) % SIZE;
                let len = 44 + u32::from(g) * 8;
                guest.describe(0, index, PACKETS + 0x1_0000 + u64::from(index) * 4096, len, 2, 0);
                guest.offer(0, index);
            }
            // A packet that is well formed.
            4 | 5 => {
                let index = u16::from(b) % SIZE;
                let header = Header {
                    src_cid: GUEST_CID.into(),
                    dst_cid: (9 + u64::from(c % 2)) << (if c == 255 { 40 } else { 0 }),
                    src_port: u32::from(d % 4) + 6,
                    dst_port: u32::from(d / 4 % 8),
                    len: if a > 250 { word } else { u32::from(e) * 16 },
                    kind: if g == 255 { 2 } else { STREAM },
                    op: u16::from(a % 9),
                    flags: f.into(),
                    buf_alloc: 1 << (g % 32),
                    fwd_cnt: u32::from(g) * u32::from(e),
                };
                let address = PACKETS + u64::from(index) * 4096;
                let _ = guest.memory.write_slice(&header.bytes(), GuestAddress(address));
                guest.describe(1, index, address, 44 + u32::from(e) * 16, 0, 0);
                guest.offer(1, index);
            }
            // The far ends.
            6 => {
                let at = usize::from(a) % world.far.len().max(1);
                match (world.far.get_mut(at), b % 4) {
                    (Some(far), 0) => drop(far.write(&vec![1; usize::from(c) * 64])),
                    (Some(far), 1) => drop(far.read(&mut vec![0; usize::from(c) * 64])),
                    (Some(far), 2) => drop(far.shutdown(std::net::Shutdown::Write)),
                    (Some(_), _) => drop(world.far.swap_remove(at)),
                    (None, _) => {
                        let (near, far) = UnixStream::pair().unwrap();
                        let key = StreamKey { local_port: 6 + u32::from(c % 4), peer_cid: 9, peer_port: 3 };
                        if hub.dial(id, key, near.into()).is_ok() {
                            world.far.push(far);
                        }
                    }
                }
            }
            _ => hub.run_ready(&mut world),
        }
    }
    hub.run_ready(&mut world);
    hub.run_ready(&mut world);
    hub.remove_guest(id);
    hub.run_ready(&mut world);
});
