//! Frames from a hostile network into a stack with a listener, connections under way, and a program that talks.
//!
//! The input is a sequence of steps: what to do, how long, and for a frame what follows the hardware addresses. Checksums pass
//! (`cfg(fuzzing)` in smoltcp). Whatever comes, the stack lives, and what it keeps is bounded.
#![no_main]

use kso_netstack::{Config, Event, Link, Options, Stack};
use libfuzzer_sys::fuzz_target;
use std::time::{Duration, Instant};

const OWN: [u8; 6] = [2, 0, 0, 0, 0, 1];
const PEER: [u8; 6] = [2, 0, 0, 0, 0, 2];
const BACKLOG: i32 = 8;

#[derive(Default)]
struct Counting(usize);

impl Link for Counting {
    fn send(&mut self, frame: &[u8]) {
        assert!((24..=24 + 65_535).contains(&frame.len()));
        self.0 += 1;
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut now = Instant::now();
    let addresses = vec!["10.0.0.1/24".parse().expect("one"), "fd00::1/64".parse().expect("one")];
    let gateways = vec!["10.0.0.254".parse().expect("one")];
    let config = Config { addresses, gateways, mtu: 1500, offload: true };
    let mut stack = Stack::new(&config, OWN, 7, now).expect("a stack");
    stack.listen(1, "[::]:80".parse().expect("one"), BACKLOG, Options::default()).expect("a listener");
    let mut ids = Vec::new();
    for peer in ["10.0.0.2:443", "[fd00::2]:443", "192.0.2.1:443"] {
        ids.extend(
            stack.connect(peer.parse().expect("one"), 40_000, Options::default(), now).map(|(id, _)| id),
        );
    }
    let mut link = Counting::default();
    let mut rest = bytes;
    while let Some((&[step, low, high], after)) = rest.split_first_chunk::<3>() {
        rest = after;
        let number = usize::from(u16::from_le_bytes([low, high]));
        let id = ids.get(number % ids.len().max(1)).copied();
        match (step % 8, id) {
            (0, Some(id)) => {
                let sent = stack.socket(id).map(|socket| socket.send_slice(&vec![step; number]).is_ok());
                stack.touch(id, sent == Some(true));
            }
            (1, Some(id)) => {
                let mut room = vec![0; number];
                if let Some(socket) = stack.socket(id) {
                    let _ = socket.recv_slice(&mut room);
                }
                stack.touch(id, false);
            }
            (2, Some(id)) => {
                if let Some(socket) = stack.socket(id) {
                    socket.close();
                }
                stack.release(id);
            }
            (3, _) => ids.extend(stack.accept(1).map(|(id, _)| id)),
            (4, _) => now += Duration::from_millis(number as u64),
            (5, Some(id)) if number % 16 == 0 => stack.abort(id),
            _ => {
                let (body, after) = rest.split_at(number.min(rest.len()));
                rest = after;
                let mut frame = vec![step & 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
                frame.extend_from_slice(&OWN);
                frame.extend_from_slice(&PEER);
                frame.extend_from_slice(body);
                stack.input(&frame, &mut link, now);
            }
        }
        stack.run_due(&mut link, now);
        stack.flush(&mut link, now);
        while let Some(event) = stack.next_event() {
            if let Event::Failed(id, _) = event {
                ids.retain(|other| *other != id);
            }
        }
        if ids.len() > 64 {
            break;
        }
        assert!(stack.connections() <= ids.len() + 2 * BACKLOG as usize + 128, "{}", stack.connections());
    }
});
