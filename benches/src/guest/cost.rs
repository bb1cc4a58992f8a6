//! What a guest costs: its start, the broker's memory, and its own memory over many connections.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

use super::agent::Request;
use super::machine::{self, Guest};
use super::net::Way;
use super::{PORT, Run};
use crate::client::Outcome;

pub const START: &str = "start";
pub const MEMORY: &str = "broker-memory";
pub const SOAK: &str = "soak";
/// Connections of the soak.
pub const SOAK_CONNECTIONS: u32 = 200_000;
/// Parts of it.
const CHUNKS: u32 = 40;
const CHUNK_PATIENCE: Duration = Duration::from_secs(120);

impl Run<'_> {
    /// `kso vm -- true` and a bare boot to /init, in turns.
    pub fn start(&mut self) -> Result<()> {
        if !self.args.wants(START) {
            return Ok(());
        }
        for repetition in 0..if self.args.quick { 3 } else { 15 } {
            let bare = machine::bare_boot(&self.kernel)?;
            self.samples.add(START, "bare", repetition, bare, "ms");
            let whole = machine::whole(&self.tools, &self.kernel)?;
            self.samples.add(START, "kso", repetition, whole, "ms");
        }
        Ok(())
    }

    /// Resident memory of the launcher, which is broker and devices in one, apart from the guest's memory.
    pub fn broker_memory(&mut self, guest: &Guest, when: &str) -> Result<()> {
        if self.args.wants(MEMORY) {
            let resident = private_memory(guest.pid())? as f64 / 1024.0;
            self.samples.add(&format!("{MEMORY}/{when}"), "kso", 0, resident, "MiB");
        }
        Ok(())
    }

    /// Many non-blocking connects: does the guest's memory stay?
    pub fn soak(&mut self, guest: &mut Guest) -> Result<()> {
        if !self.args.wants(SOAK) {
            return Ok(());
        }
        let count = if self.args.quick { SOAK_CONNECTIONS / 10 } else { SOAK_CONNECTIONS };
        let name = "soak";
        let words = ["client", "--to", &format!("{}:{PORT}", Way::Kso.host()), "soak", "--nonblocking"];
        guest.ask(&Request::Start(name.into(), words.map(str::to_owned).into()), CHUNK_PATIENCE)?;
        for chunk in 0..CHUNKS {
            let line = guest
                .ask(&Request::Ask(name.into(), Some((count / CHUNKS).to_string())), CHUNK_PATIENCE)
                .with_context(|| format!("after {chunk} chunks"))?;
            let outcome: Outcome = serde_json::from_str(&line)?;
            self.samples.add(&format!("{SOAK}/rate"), "kso", chunk, outcome.value, "connections/s");
            for (what, field) in [("available", "MemAvailable"), ("slab", "SUnreclaim")] {
                let value: f64 = guest.ask(&Request::Memory(field.into()), CHUNK_PATIENCE)?.parse()?;
                self.samples.add(&format!("{SOAK}/{what}"), "kso", chunk, value / 1024.0, "MiB");
            }
            let broker = private_memory(guest.pid())? as f64 / 1024.0;
            self.samples.add(&format!("{SOAK}/broker"), "kso", chunk, broker, "MiB");
        }
        guest.ask(&Request::Stop(name.into()), CHUNK_PATIENCE)?;
        Ok(())
    }
}

/// Resident KiB of a process but for what it shares with QEMU: the guest's memory is a memfd.
fn private_memory(pid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).context("the launcher's memory")?;
    Ok(resident_apart_from_memfd(&text))
}

fn resident_apart_from_memfd(smaps: &str) -> u64 {
    let mut counts = true;
    let mut sum = 0;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("Rss:") if counts => {
                sum += words.next().and_then(|number| number.parse::<u64>().ok()).unwrap_or(0);
            }
            // proc_pid_smaps(5): the header of a mapping begins with its addresses.
            Some(first) if first.contains('-') && !first.ends_with(':') => counts = !line.contains("/memfd:"),
            _ => {}
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_not_the_brokers() {
        let smaps = "00400000-00452000 r-xp 00000000 08:02 1 /usr/bin/kso\nSize: 328 kB\nRss: 100 kB\n\
                     7f00-7f01 rw-s 00000000 00:01 9 /memfd:memory-backend-memfd (deleted)\nRss: 5000 kB\n\
                     7f02-7f03 rw-p 00000000 00:00 0\nRss: 20 kB\nVmFlags: rd\n";
        assert_eq!(resident_apart_from_memfd(smaps), 120);
    }
}
