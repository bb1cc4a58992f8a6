#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

use super::*;
use crate::vsock::packet::STREAM;
use proptest::prelude::*;
use std::collections::VecDeque;

const KEY: StreamKey = StreamKey { local_port: 1, peer_cid: 0x0a00_0001, peer_port: 443 };

fn header(op: Op) -> Header {
    Header { op: op as u16, kind: STREAM, buf_alloc: 1 << 18, ..Header::default() }
}

/// A guest that keeps to the rules, as Linux does; its queues; and a far end that takes and gives.
struct Simulation {
    stream: Stream,
    to_guest: VecDeque<Header>,
    to_host: VecDeque<Header>,

    // The guest's kernel.
    buffer: u32,
    connected: bool,
    unread: u32,
    passed_on: u32,
    told_passed_on: u32,
    host_window: u32,
    host_forwarded: u32,
    guest_sent: u32,
    guest_finished: bool,
    guest_saw_end: bool,
    guest_received: u64,

    // The far end, and what is held for it.
    held: u32,
    far_taken: u64,
    far_gave: u64,
    far_pending: u64,
    far_finished: bool,
    far_saw_end: bool,
    guest_meant: u64,
}

impl Simulation {
    fn new(buffer: u32) -> Self {
        let request = Header { buf_alloc: buffer, ..header(Op::Request) };
        Simulation {
            stream: Stream::requested(KEY, &request),
            to_guest: VecDeque::new(),
            to_host: VecDeque::new(),
            buffer,
            connected: false,
            unread: 0,
            passed_on: 0,
            told_passed_on: 0,
            host_window: 0,
            host_forwarded: 0,
            guest_sent: 0,
            guest_finished: false,
            guest_saw_end: false,
            guest_received: 0,
            held: 0,
            far_taken: 0,
            far_gave: 0,
            far_pending: 0,
            far_finished: false,
            far_saw_end: false,
            guest_meant: 0,
        }
    }

    fn guest_packet(&mut self, op: Op, len: u32, flags: u32) {
        self.told_passed_on = self.passed_on;
        let packet = Header { buf_alloc: self.buffer, fwd_cnt: self.passed_on, len, flags, ..header(op) };
        self.to_host.push_back(packet);
    }

    /// The guest's program writes, as far as the guest's kernel lets it.
    fn guest_writes(&mut self, bytes: u32) {
        let in_flight = self.guest_sent.wrapping_sub(self.host_forwarded);
        // The cap by its own buffer is that of newer kernels: the harder case.
        let room = self.host_window.min(self.buffer).saturating_sub(in_flight);
        let bytes = bytes.min(room).min(1 << 16);
        if self.connected && !self.guest_finished && bytes > 0 {
            self.guest_sent = self.guest_sent.wrapping_add(bytes);
            self.guest_meant += u64::from(bytes);
            self.guest_packet(Op::Data, bytes, 0);
        }
    }

    fn guest_reads(&mut self, bytes: u32) {
        let bytes = bytes.min(self.unread);
        self.unread -= bytes;
        self.passed_on = self.passed_on.wrapping_add(bytes);
        // virtio_transport_stream_do_dequeue: tell when less than a packet's worth is known to be free.
        let free = self.buffer.saturating_sub(self.passed_on.wrapping_sub(self.told_passed_on));
        if bytes > 0 && free < 1 << 16 {
            self.guest_packet(Op::CreditUpdate, 0, 0);
        }
    }

    fn guest_finishes(&mut self) {
        if self.connected && !self.guest_finished {
            self.guest_finished = true;
            self.guest_packet(Op::Shutdown, 0, NO_SEND);
        }
    }

    fn guest_receives(&mut self) {
        let Some(packet) = self.to_guest.pop_front() else { return };
        (self.host_window, self.host_forwarded) = (packet.buf_alloc, packet.fwd_cnt);
        match packet.operation().unwrap() {
            Op::Response => self.connected = true,
            Op::Data => {
                assert!(self.connected && !self.guest_saw_end);
                self.unread += packet.len;
                assert!(self.unread <= self.buffer, "credit exceeded");
                self.guest_received += u64::from(packet.len);
            }
            Op::Shutdown => {
                assert_eq!(packet.flags, NO_SEND);
                self.guest_saw_end = true;
            }
            Op::CreditUpdate => {}
            other => panic!("{other:?}"),
        }
    }

    fn host_receives(&mut self) {
        let Some(packet) = self.to_host.pop_front() else { return };
        match self.stream.packet(&packet) {
            Effect::None => {}
            Effect::Deliver(bytes) => {
                assert_eq!(bytes, packet.len);
                self.held += bytes;
                assert!(self.held <= LARGEST_WINDOW);
            }
            Effect::Finish => self.far_saw_end = true,
            other => panic!("{other:?} for {packet:?}"),
        }
    }

    fn far_takes(&mut self, bytes: u32) {
        let bytes = bytes.min(self.held);
        self.held -= bytes;
        self.far_taken += u64::from(bytes);
        if bytes > 0 {
            self.stream.forwarded(bytes);
        }
    }

    fn host_sends(&mut self, bytes: u32) {
        while let Some(packet) = self.stream.next_owed() {
            self.to_guest.push_back(packet);
        }
        let bytes = u64::from(bytes).min(self.far_pending).min(self.stream.room().into()) as u32;
        if bytes > 0 {
            self.far_pending -= u64::from(bytes);
            let packet = self.stream.data_header(bytes);
            self.to_guest.push_back(packet);
        }
        if self.far_finished && self.far_pending == 0 {
            self.stream.finish();
        }
    }

    fn step(&mut self, (action, amount): (u8, u32)) {
        let amount = amount.min(self.buffer.saturating_mul(4));
        match action {
            0 => self.stream.opened(),
            1 => self.guest_writes(amount),
            2 => self.guest_reads(amount),
            3 => self.guest_receives(),
            4 => self.host_receives(),
            5 => self.far_takes(amount),
            6 => self.host_sends(amount),
            7 if !self.far_finished => {
                self.far_pending += u64::from(amount);
                self.far_gave += u64::from(amount);
            }
            8 if amount % 64 == 0 => self.guest_finishes(),
            9 if amount % 64 == 0 => self.far_finished = true,
            10 => self.guest_packet_if_open(Op::CreditRequest),
            _ => {}
        }
    }

    fn guest_packet_if_open(&mut self, op: Op) {
        if self.connected {
            self.guest_packet(op, 0, 0);
        }
    }

    /// Everything that may happen happens, until nothing more does.
    fn settle(&mut self) {
        self.stream.opened();
        self.far_finished = true;
        let goal = self.guest_meant + 16 * u64::from(self.buffer);
        for _ in 0..200_000 {
            self.host_sends(u32::MAX);
            self.guest_receives();
            self.guest_reads(u32::MAX);
            self.host_receives();
            self.far_takes(u32::MAX);
            if self.connected && self.guest_meant < goal {
                self.guest_writes(u32::MAX);
            } else {
                self.guest_finishes();
            }
            if self.guest_saw_end && self.far_saw_end && self.held == 0 && self.to_host.is_empty() {
                return;
            }
        }
        panic!("stalled: {:?}", self.stream);
    }
}

proptest! {
    #[test]
    fn nothing_is_lost_and_every_stream_ends(
        buffer in prop_oneof![1_u32..2000, 1_u32 << 16..1 << 18, Just(4 << 20)],
        steps in proptest::collection::vec((0_u8..11, prop_oneof![0_u32..100, 0_u32..300_000]), 0..300),
    ) {
        let mut simulation = Simulation::new(buffer);
        for step in steps {
            simulation.step(step);
        }
        simulation.settle();
        prop_assert_eq!(simulation.guest_received, simulation.far_gave);
        prop_assert_eq!(simulation.far_taken, simulation.guest_meant);
    }

    /// Whatever a guest sends, what is held for it stays within the largest window, and nothing is sent beyond the
    /// room that it told.
    #[test]
    fn nonsense_is_bounded(
        packets in proptest::collection::vec((0_u16..9, any::<u32>(), any::<[u32; 3]>(), 0_u32..70_000), 0..200),
        dialled in any::<bool>(),
    ) {
        let mut stream = if dialled { Stream::dialled(KEY) } else { Stream::requested(KEY, &header(Op::Request)) };
        stream.opened();
        let mut held = 0_u32;
        for (op, len, [flags, buf_alloc, fwd_cnt], taken) in packets {
            let len = if len % 2 == 0 { len % 70_000 } else { len };
            let packet = Header { op, len, flags, buf_alloc, fwd_cnt, ..header(Op::Data) };
            match stream.packet(&packet) {
                Effect::Deliver(bytes) => held += bytes,
                Effect::None | Effect::Finish | Effect::Taken => {}
                _ => break,
            }
            prop_assert!(held <= LARGEST_WINDOW);
            let taken = taken.min(held);
            held -= taken;
            stream.forwarded(taken);
            while let Some(packet) = stream.next_owed() {
                prop_assert!(packet.buf_alloc <= LARGEST_WINDOW);
            }
            prop_assert!(stream.room() <= buf_alloc);
        }
    }
}

#[test]
fn a_window_grows_with_a_far_end_that_keeps_up_and_only_then() {
    let mut simulation = Simulation::new(LARGEST_WINDOW);
    simulation.stream.opened();
    let mut write = |takes: bool| {
        for _ in 0..400 {
            simulation.host_sends(0);
            simulation.guest_receives();
            simulation.guest_writes(1 << 16);
            simulation.host_receives();
            simulation.far_takes(if takes { u32::MAX } else { 0 });
        }
        (simulation.host_window, simulation.held)
    };
    assert_eq!(write(false), (FIRST_WINDOW, FIRST_WINDOW));
    assert_eq!(write(true), (LARGEST_WINDOW, 0));
    // Up to half a window may be free without the guest knowing.
    let (window, held) = write(false);
    assert!(window == LARGEST_WINDOW && held > LARGEST_WINDOW / 2);
}

#[test]
fn a_closing_guest_is_answered_by_reset_whatever_it_shut_before() {
    for first in [NO_SEND, NO_RECEIVE, NO_SEND | NO_RECEIVE] {
        let mut stream = Stream::requested(KEY, &header(Op::Request));
        stream.opened();
        let effect = stream.packet(&Header { flags: first, ..header(Op::Shutdown) });
        let last = if first == NO_SEND | NO_RECEIVE {
            effect
        } else {
            stream.packet(&Header { flags: NO_SEND | NO_RECEIVE, ..header(Op::Shutdown) })
        };
        assert_eq!(last, Effect::Closed);
    }
}
