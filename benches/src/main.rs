//! Measures `kso run` against native loopback, pasta and slirp4netns, in namespaces of its own.
//!
//! `kso-bench run` is the whole; `server` and `client` are the workloads that it starts. It knows kso only as a
//! command, as its users do.

mod client;
mod measure;
mod namespace;
mod procfs;
mod protocol;
mod report;
mod rows;
mod run;
mod samples;
mod sandbox;
mod server;
mod special;
mod stats;
mod svg;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use rustix::thread::{CpuSet, sched_setaffinity};

#[derive(Parser)]
#[command(about = "Measures `kso run` against native loopback, pasta and slirp4netns")]
enum Command {
    /// Measure every row and write the data, the table and the plots
    Run(run::Args),
    /// Write the table and the plots again from the data
    Report {
        #[arg(long, default_value = "docs/bench")]
        output: PathBuf,
        #[arg(long)]
        kso: Option<PathBuf>,
        #[arg(long)]
        date: Option<String>,
    },
    /// The workloads' server
    Server(server::Args),
    /// A workload's client
    Client(client::Args),
    /// Wait for a line on standard input, then run a command
    #[command(hide = true)]
    Gate {
        #[arg(last = true)]
        command: Vec<OsString>,
    },
}

fn main() -> ExitCode {
    match dispatch(&Command::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kso-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(command: &Command) -> Result<()> {
    match command {
        Command::Run(args) => run::run(args),
        Command::Report { output, kso, date } => report::again(output, kso.as_deref(), date.clone()),
        Command::Server(args) => server::run(args),
        Command::Client(args) => client::run(args),
        Command::Gate { command } => sandbox::gate(command),
    }
}

/// Keeps this process, and the threads it starts later, on one processor.
fn pin(cpu: Option<usize>) -> Result<()> {
    let Some(cpu) = cpu else { return Ok(()) };
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).with_context(|| format!("cannot run on processor {cpu}"))
}
