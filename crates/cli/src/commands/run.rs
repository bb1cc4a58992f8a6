//! `kso run`: a program in a sandbox on this host.

mod session;
mod supervise;

use crate::output;
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use kso_core::publish;
use kso_wire::{Hello, LoopbackMode, Protocol, Publication, TunAddresses, VERSION};
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

/// Longest command line that `kso ps` shows, bytes.
const MAX_COMMAND: usize = 256;

const EXAMPLES: &str = "\
Examples:
  kso run -- curl https://example.org
  kso run -p 8080:80 -- nginx -g 'daemon off;'
  kso run -p 0.0.0.0:5353:53/udp -- dnsmasq -d
  kso run --allow '*.debian.org:443' --allow 10.0.0.0/8:5432/tcp -- ./app
  kso run --allow host:8000 -- curl http://host.kso.internal:8000/
  kso run --no-net -- make test

Rules: NAME, *.NAME, ADDRESS, CIDR, host (this host's own loopback) or *,
  then :PORT or :LOW-HIGH, then /tcp, /udp or /icmp. A deny rule wins over an allow rule;
  with an allow rule, what none allows is denied. docs/policy.md has the whole language.

Exit status: the program's own; 128+N if signal N ended it; 125 if kso failed,
  126 if the program cannot be executed, 127 if it was not found.";

/// Options of `kso run`.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct RunArgs {
    /// Allow only what a rule allows (repeatable)
    #[arg(long, value_name = "RULE")]
    allow: Vec<String>,

    /// Deny what a rule names (repeatable; wins over --allow)
    #[arg(long, value_name = "RULE")]
    deny: Vec<String>,

    /// No network outside the sandbox at all, names included
    #[arg(long, conflicts_with_all = ["allow", "publish"])]
    no_net: bool,

    /// Publish a port on 127.0.0.1 and ::1, or on the address given; `all` publishes each listener
    #[arg(short = 'p', long, value_name = "[ADDRESS:]HOST:GUEST[/udp]")]
    publish: Vec<String>,

    /// Which loopback 127.0.0.1 and ::1 are to TCP: the sandbox's own, or this host's
    #[arg(long, value_enum, default_value_t = Loopback::Private)]
    loopback: Loopback,

    /// Use the broker that listens on this socket instead of one of our own
    #[arg(long, value_name = "PATH")]
    broker: Option<PathBuf>,

    /// A name for `kso ps` and `kso trace`
    #[arg(long)]
    name: Option<String>,

    /// Let the program use io_uring; its connections then go by the TUN, which is slower
    #[arg(long)]
    io_uring: bool,

    /// Go on where the kernel refuses socket filters to this user: rules then hold only for programs that
    /// do not race the supervisor
    #[arg(long)]
    unlocked: bool,

    /// Print each connect, listen, accept, resolve and denial to standard error
    #[arg(long, conflicts_with = "broker")]
    trace: bool,

    /// Serve Prometheus metrics on this address (ADDRESS:PORT, or unix:PATH)
    #[arg(long, value_name = "ADDRESS", conflicts_with = "broker")]
    metrics: Option<String>,

    /// Set an environment variable (NAME alone: as it is here)
    #[arg(short = 'e', long = "env", value_name = "NAME=VALUE")]
    environment: Vec<OsString>,

    /// Working directory of the program
    #[arg(short = 'w', long, value_name = "DIR")]
    workdir: Option<PathBuf>,

    /// More of what happens, on standard error (repeatable)
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,

    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "CMD")]
    command: Vec<OsString>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Loopback {
    /// The sandbox's own
    Private,
    /// This host's
    External,
}

/// Runs it.
///
/// # Errors
/// The options are wrong, or the sandbox cannot be made.
pub fn run(args: RunArgs) -> Result<ExitCode> {
    output::init_logs(args.verbose);
    let hello = hello(&args)?;
    let status = supervise::supervise(&args, hello)?;
    Ok(ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX)))
}

fn hello(args: &RunArgs) -> Result<Hello> {
    let rules = args.allow.iter().map(|text| (true, text.clone()));
    let rules: Vec<_> = rules.chain(args.deny.iter().map(|text| (false, text.clone()))).collect();
    let publish = args.publish.iter().map(|text| Ok(publish::parse(text)?)).collect::<Result<Vec<_>>>()?;
    refuse_twice(&publish)?;
    let mut command = args.command.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
    while command.len() > MAX_COMMAND {
        command.pop();
    }
    let program = args.command.first().map(PathBuf::from);
    let program = program.as_deref().and_then(|path| path.file_name()).unwrap_or_default();
    Ok(Hello {
        version: VERSION,
        name: args.name.clone().unwrap_or_else(|| program.to_string_lossy().chars().take(64).collect()),
        command,
        pid: std::process::id(),
        rules,
        no_net: args.no_net,
        publish,
        loopback: match args.loopback {
            Loopback::Private => LoopbackMode::Private,
            Loopback::External => LoopbackMode::External,
        },
        tun: TunAddresses::standard(),
    })
}

/// The same port twice would fail later, or silently do half of what was asked.
fn refuse_twice(publish: &[Publication]) -> Result<()> {
    for (index, one) in publish.iter().enumerate() {
        for other in publish.iter().skip(index + 1).filter(|other| other.protocol == one.protocol) {
            let protocol = one.protocol.name();
            if one.address == other.address && one.outer_port == other.outer_port && one.outer_port != 0 {
                bail!("port {}/{protocol} is published twice: remove one -p", one.outer_port);
            }
            if one.protocol == Protocol::Tcp && one.inner_port == other.inner_port {
                bail!(
                    "port {}/{protocol} inside is published twice, and a listener has one address outside: \
                     publish it on 0.0.0.0 (-p 0.0.0.0:{}:{}) to reach it by every address",
                    one.inner_port,
                    one.outer_port,
                    one.inner_port
                );
            }
        }
    }
    Ok(())
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

/// `NAME=VALUE`, or `NAME` for the value it has here.
fn environment(args: &RunArgs) -> Result<Vec<(OsString, OsString)>> {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let mut variables = Vec::new();
    for text in &args.environment {
        let bytes = text.as_bytes();
        match bytes.iter().position(|&byte| byte == b'=') {
            Some(0) => bail!("-e {}: a variable has a name before its =", text.display()),
            Some(at) => {
                let (name, value) = bytes.split_at(at);
                let value = value.get(1..).unwrap_or_default();
                variables.push((OsString::from_vec(name.to_vec()), OsString::from_vec(value.to_vec())));
            }
            None => {
                if let Some(value) = std::env::var_os(text) {
                    variables.push((text.clone(), value));
                }
            }
        }
    }
    Ok(variables)
}

/// The text of `/etc/resolv.conf` inside: the gateway, and the host's search list and options.
fn resolv_conf(tun: &TunAddresses) -> String {
    let host = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let kept = host.lines().filter(|line| {
        ["search", "domain", "options"].iter().any(|word| line.split_whitespace().next() == Some(word))
    });
    let [gateway, _] = tun.gateway;
    let mut text = format!("# kso: names are resolved by the broker\nnameserver {gateway}\n");
    for line in kept {
        text.push_str(line);
        text.push('\n');
    }
    text
}

fn directory(args: &RunArgs) -> Result<Option<PathBuf>> {
    let Some(directory) = &args.workdir else { return Ok(None) };
    let canonical = directory.canonicalize().with_context(|| format!("-w {}", directory.display()))?;
    Ok(Some(canonical))
}
