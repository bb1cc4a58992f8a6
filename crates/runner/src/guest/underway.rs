//! Connections under way whose socket the program has closed.
//!
//! AF_VSOCK says nothing to the device when a socket is closed while it connects, and a helper's call keeps it alive:
//! so the connection outside would be made, and the peer would see it come and go. One that takes long is looked for among
//! the descriptors of all processes; if nobody has it, the broker is told, and the device's RST ends the helper's call.

use super::GuestRunner;
use kso_wire::MAX_PENDING;
use kso_wire::guest::ToHost;
use std::collections::{HashMap, HashSet};
use std::fs;
use std::time::{Duration, Instant};

/// A connection that takes longer is looked after.
const LONG: Duration = Duration::from_millis(500);
/// So often.
const EVERY: Duration = Duration::from_secs(1);

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Underway {
    /// By vsock port: since when, the socket's inode, and whether it was missed before.
    connections: HashMap<u32, (Instant, u64, bool)>,
    look_at: Option<Instant>,
}

impl Underway {
    pub(super) fn remove(&mut self, port: u32) {
        self.connections.remove(&port);
        if self.connections.is_empty() {
            self.look_at = None;
        }
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.look_at
    }
}

impl GuestRunner {
    pub(super) fn is_underway(&mut self, port: u32, inode: u64) {
        if self.underway.connections.len() < MAX_PENDING {
            let now = Instant::now();
            self.underway.connections.insert(port, (now, inode, false));
            self.underway.look_at.get_or_insert(now + LONG);
        }
    }

    /// Gives up connections that nobody has.
    pub(super) fn abandon(&mut self, now: Instant) {
        self.receive_control();
        let all = &mut self.underway.connections;
        self.underway.look_at = (!all.is_empty()).then_some(now + EVERY);
        if !all.values().any(|(since, ..)| now.duration_since(*since) >= LONG) {
            return;
        }
        let held = held_sockets();
        let mut missed = Vec::new();
        for (&port, (since, inode, before)) in all.iter_mut() {
            if now.duration_since(*since) < LONG || held.contains(inode) {
                *before = false;
            } else if std::mem::replace(before, true) {
                // Twice: it could have been on its way from one process to another.
                missed.push(port);
            }
        }
        for port in missed {
            self.underway.remove(port);
            let _ = self.control.send(&ToHost::Abandon { local_port: port });
        }
    }
}

/// The inodes of the sockets that other processes have.
fn held_sockets() -> HashSet<u64> {
    let own = std::process::id();
    let Ok(processes) = fs::read_dir("/proc") else { return HashSet::new() };
    let others = processes
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|process| *process != own);
    others
        .filter_map(|process| fs::read_dir(format!("/proc/{process}/fd")).ok())
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let link = fs::read_link(entry.path()).ok()?;
            link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
        })
        .collect()
}
