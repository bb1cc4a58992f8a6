//! Measures `kso run` against native loopback, pasta and slirp4netns, and `kso vm` against NICs in the same guest, in
//! namespaces of its own.
//!
//! `kso-bench run`, `kso-bench guest` and `kso-bench files` are the whole; `server` and `client` are the workloads that they start. It knows
//! kso only as a command, as its users do, and its launcher for a guest without kso.

mod client;
mod files;
mod guest;
mod measure;
mod namespace;
mod procfs;
mod protocol;
mod readme;
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
#[command(about = "Measures `kso run` and `kso vm` against their like")]
enum Command {
    /// Measure every row and write the data, the table and the plots
    Run(run::Args),
    /// Measure microVMs, and write the data, the table and the plots
    Guest(guest::Args),
    /// Measure a guest's files, and write the data, the table and the plot
    Files(files::Args),
    /// A workload on files
    #[command(hide = true)]
    Disk(files::work::Args),
    /// What runs in a measured guest
    #[command(hide = true)]
    Agent,
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
    // The kernel gives its first program this name (init/main.c), and words of its own command line.
    let is_init = std::env::args_os().next().is_some_and(|name| name == "/init");
    if is_init && rustix::process::getpid().is_init() {
        let _ = guest::machine::be_init();
        return ExitCode::FAILURE;
    }
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
        Command::Guest(args) => guest::run(args),
        Command::Files(args) => files::run(args),
        Command::Disk(args) => files::work::run(args),
        Command::Agent => guest::agent::run(),
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
