//! `kso run`: a program in a sandbox on this host.

mod session;
mod supervise;

use super::program::ProgramArgs;
use crate::output;
use anyhow::Result;
use clap::Args;
use kso_wire::{Protocol, Publication};
use std::process::ExitCode;

const EXAMPLES: &str = "\
Examples:
  kso run -- curl https://example.org
  kso run -p 8080:80 -- nginx -g 'daemon off;'
  kso run -p 0.0.0.0:5353:53/udp -- dnsmasq -d
  kso run --allow '*.debian.org:443' --allow 10.0.0.0/8:5432/tcp -- ./app
  kso run --allow host:8000 -- curl http://host.kso.internal:8000/
  kso run --no-net -- make test
  kso run --kernel gvisor -p 8080:80 -- nginx -g 'daemon off;'
  kso run --kernel netstack,address=10.77.0.2/24,gateway=10.77.0.1 -- curl http://10.77.0.1:8000/
  kso run -v ./site:/srv:ro -- ./server
  kso run --external box=provider,path=/run/kso/p.sock -v box:/srv/data:/mnt -- ls /mnt
  kso run --external gvisor,share=/srv -v gvisor,host:/srv:/mnt:ro -- ./server

Rules: NAME, *.NAME, ADDRESS, CIDR, host (this host's own loopback) or *,
  then :PORT or :LOW-HIGH, then /tcp, /udp or /icmp. A deny rule wins over an allow rule;
  with an allow rule, what none allows is denied. docs/policy.md has the whole language.

Directories (-v): PATH:WHERE is one of this host; KERNEL:PATH:WHERE one that an external kernel performs, with its own file
  system code; KERNEL,KERNEL:PATH:WHERE is performed by the first of them that is up, and files that are open go on elsewhere.
  Options after WHERE: ro, shared (others write there too), cache=none|shared|auto|always. WHERE has to be there.

Exit status: the program's own; 128+N if signal N ended it; 125 if kso failed,
  126 if the program cannot be executed, 127 if it was not found.";

/// Options of `kso run`.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct RunArgs {
    /// Go on where the kernel refuses socket filters to this user: rules then hold only for programs that
    /// do not race the supervisor
    #[arg(long)]
    unlocked: bool,

    /// Have this external kernel perform the program's TCP (gvisor or netstack; repeatable, with settings: kso provide --help)
    #[arg(long, value_name = "NAME[=MAKE][,KEY=VALUE]")]
    kernel: Vec<String>,

    /// More of what happens, on standard error (repeatable)
    #[arg(long, action = clap::ArgAction::Count)]
    verbose: u8,

    #[command(flatten)]
    program: ProgramArgs,
}

/// Runs it.
///
/// # Errors
/// The options are wrong, or the sandbox cannot be made.
pub fn run(args: &RunArgs) -> Result<ExitCode> {
    output::init_logs(args.verbose);
    let hello = args.program.hello()?;
    let status = supervise::supervise(args, hello)?;
    Ok(ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX)))
}

/// What is published of the sandbox's TCP ports.
fn publishing(publish: &[Publication]) -> kso_runner::Publishing {
    let mut tcp = publish.iter().filter(|one| one.protocol == Protocol::Tcp).peekable();
    if tcp.peek().is_none() {
        kso_runner::Publishing::Nothing
    } else if tcp.any(|one| one.inner_port == 0) {
        kso_runner::Publishing::Everything
    } else {
        kso_runner::Publishing::Ports
    }
}
