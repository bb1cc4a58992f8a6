//! Rows that are no pairs of a client and a server's rate: start, memory, and the soak.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::client::Outcome;
use crate::measure::Bench;
use crate::procfs::usage;
use crate::rows::{Pin, Via};
use crate::samples::Samples;
use crate::sandbox::Variant;

pub const START: &str = "start";
pub const MEMORY: &str = "memory";
pub const SOAK: &str = "soak";
/// The variant of the row `start` against which the others are measured.
pub const UNSHARE: &str = "unshare";
/// Connections that are open when the memory is looked at.
pub const HELD: [u32; 3] = [0, 1000, 10_000];
/// Parts of the soak whose rates are compared.
const CHUNKS: u32 = 40;
const PATIENCE: Duration = Duration::from_secs(120);

/// How long `true` takes, in milliseconds, in each kind of sandbox.
pub fn start(bench: &Bench, repetitions: u32, kinds: &[Variant], samples: &mut Samples) -> Result<()> {
    let kso = bench.tools.kso.to_str().context("the path of kso is not UTF-8")?;
    let mut commands = vec![(UNSHARE, vec!["unshare", "-Urn", "true"])];
    for kind in kinds {
        let command = match kind {
            Variant::Kso => vec![kso, "run", "--", "true"],
            Variant::Pasta => vec!["pasta", "-f", "-q", "-4", "--config-net", "--", "true"],
            _ => continue,
        };
        commands.push((kind.name(), command));
    }
    for repetition in 0..repetitions {
        for (variant, command) in &commands {
            let millis = time(command)?;
            samples.add(START, variant, repetition, millis, "ms");
        }
        commands.rotate_left(1);
    }
    Ok(())
}

fn time(command: &[&str]) -> Result<f64> {
    let (program, arguments) = command.split_first().context("no command")?;
    let start = Instant::now();
    let status = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .with_context(|| format!("cannot start {program}"))?;
    let elapsed = start.elapsed();
    if !status.success() {
        bail!("`{}` ended with {status}", command.join(" "));
    }
    Ok(elapsed.as_secs_f64() * 1e3)
}

/// The memory of kso's processes with many connections open, each opened from inside and idle.
pub fn memory(bench: &Bench, repetitions: u32, samples: &mut Samples) -> Result<()> {
    for repetition in 0..repetitions {
        let port = bench.next_port();
        let _server = bench.start_server(Via::Out, Variant::Kso, port, Pin::Free)?;
        let mut command = bench.client_command(Via::Out, Variant::Kso, port, Pin::Free)?;
        command.push("hold".into());
        let mut client = bench.start_client(Via::Out, Variant::Kso, port, &command)?;
        let mut empty = 0;
        for held in HELD {
            client.say(&held.to_string())?;
            client.line(PATIENCE)?;
            let usage = usage(client.pid())?;
            let mut add = |what: &str, value: u64, unit: &str| {
                samples.add(&format!("{MEMORY}/{what}-{held}"), "kso", repetition, value as f64, unit);
            };
            add("rss", usage.resident / 1024, "KiB");
            add("pss", usage.proportional / 1024, "KiB");
            add("descriptors", usage.descriptors, "");
            add("threads", usage.threads, "");
            if held == 0 {
                empty = usage.resident;
            } else {
                let each = usage.resident.saturating_sub(empty) / u64::from(held);
                add("per-connection", each, "B");
            }
        }
    }
    Ok(())
}

/// Many short connections through one sandbox: the rate and what the sandbox costs, chunk by chunk. As many
/// connections are made natively in between, chunk about: what the machine does to one it does to the other.
pub fn soak(bench: &Bench, count: u32, variants: &[Variant], samples: &mut Samples) -> Result<()> {
    let chunk = (count / CHUNKS).max(1);
    let port = bench.next_port();
    let _server = bench.start_server(Via::Out, Variant::Native, port, Pin::Free)?;
    let mut clients = Vec::new();
    for variant in variants {
        let mut command = bench.client_command(Via::Out, *variant, port, Pin::Free)?;
        command.push("soak".into());
        clients.push((*variant, bench.start_client(Via::Out, *variant, port, &command)?));
    }
    for number in 0..CHUNKS {
        for (variant, client) in &mut clients {
            client.say(&chunk.to_string())?;
            let line = client.line(PATIENCE).with_context(|| format!("after {number} chunks of {chunk}"))?;
            let outcome: Outcome = serde_json::from_str(&line)?;
            let mut add = |what: &str, value: f64, unit: &str| {
                samples.add(&format!("{SOAK}/{what}"), variant.name(), number, value, unit);
            };
            add("rate", outcome.value, "connections/s");
            if *variant == Variant::Kso {
                let usage = usage(client.pid())?;
                add("rss", usage.resident as f64 / 1024.0, "KiB");
                add("descriptors", usage.descriptors as f64, "");
                add("threads", usage.threads as f64, "");
            }
        }
    }
    Ok(())
}
