//! The `kso` command: a program runs on one kernel and has its sockets performed by another.
#![forbid(unsafe_code)]

mod commands;
mod output;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Run programs whose network is performed by another kernel.
#[derive(Parser)]
#[command(name = "kso", version, about, propagate_version = true, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  kso run -- curl https://example.org            a program in a sandbox, on this host's sockets
  kso run -p 8080:80 -- nginx -g 'daemon off;'   publish its port 80 as 127.0.0.1:8080
  kso run --allow '*.debian.org:443' -- bash     reach these names only
  kso vm -- curl https://example.org             the same in a microVM, on a kernel of its own
  kso ps                                         what runs, and its connections
  kso doctor                                     what can run here, and what is missing
  kso trace                                      each connect, listen, accept, resolve and denial, live";

#[derive(Subcommand)]
enum Command {
    /// Run a program in a sandbox on this host, with no network of its own
    Run(Box<commands::run::RunArgs>),
    /// Run a program in a microVM: a kernel of its own, and this host's sockets and files
    Vm(Box<commands::vm::VmArgs>),
    /// Run a program in a guest that something else started, with the sockets of its host (inside that guest)
    Guest(commands::guest::GuestArgs),
    /// Serve sessions of other processes on a unix socket
    Broker(commands::broker::BrokerArgs),
    /// List sessions with their listeners and connections
    Ps(commands::ps::PsArgs),
    /// Follow what sessions do: one line for each connect, listen, accept, resolve and denial
    Trace(commands::trace::TraceArgs),
    /// Perform operations on sockets and files of this kernel for a broker on another
    Provide(commands::provide::ProvideArgs),
    /// List the kernels that guests can run and the external kernels of brokers, or fetch one
    Kernels(commands::kernels::KernelsArgs),
    /// Say what can run on this machine, and what is missing
    Doctor(commands::doctor::DoctorArgs),
}

fn main() -> ExitCode {
    if kso_guest::is_init() {
        kso_guest::main(output::init_guest_logs);
    }
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Run(args) => commands::run::run(&args),
        Command::Vm(args) => commands::vm::run(&args),
        Command::Guest(args) => commands::guest::run(args),
        Command::Broker(args) => commands::broker::run(args),
        Command::Ps(args) => commands::ps::run(args),
        Command::Trace(args) => commands::trace::run(args),
        Command::Provide(args) => commands::provide::run(&args),
        Command::Kernels(args) => commands::kernels::run(args),
        Command::Doctor(args) => commands::doctor::run(&args),
    };
    result.unwrap_or_else(|error| {
        output::error(&error);
        // As docker and env do: 125 is our own failure, not the program's.
        ExitCode::from(125)
    })
}
