//! `kso broker`: sessions of other processes.

use crate::output;
use anyhow::{Context, Result, bail};
use clap::Args;
use kso_broker::{BrokerConfig, Control, KernelsConfig, ServeConfig, runtime_directory};
use kso_core::config::{Config, Guest, MetricsAddress, VsockSocket};
use std::path::PathBuf;
use std::process::ExitCode;

const EXAMPLES: &str = "\
Examples:
  kso broker                                    on broker.sock in the runtime directory
  kso broker --listen /run/kso/broker.sock --group kso --metrics 127.0.0.1:9464
  kso broker --config kso.toml                  rules for all sessions, limits of publishing, guests, kernels, routes
  kso broker --vsock-socket /run/kso/web.vsock  the device of a guest that something else starts
  kso run --broker /run/kso/broker.sock -- CMD  a session of it

The runtime directory is $KSO_RUNTIME_DIR, else $XDG_RUNTIME_DIR/kso, else /run/kso (root) or /tmp/kso-UID.
Rules of the broker only take away: what they permit a session still has to permit itself.";

/// Options of `kso broker`.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct BrokerArgs {
    /// Listen on this unix socket
    #[arg(long, value_name = "PATH")]
    listen: Option<PathBuf>,

    /// Serve the vsock device of a guest that something else starts on this socket (vhost-user); the guest is named
    /// as the file is, without what follows its last dot (repeatable; with rules and files: --config)
    #[arg(long, value_name = "PATH")]
    vsock_socket: Vec<PathBuf>,

    /// Configuration (TOML): socket, rules, limits of publishing, metrics, guests, external kernels and routes
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Let this group (name or number) use the socket, too
    #[arg(long, value_name = "GROUP")]
    group: Option<String>,

    /// Allow all sessions only what a rule allows (repeatable)
    #[arg(long, value_name = "RULE")]
    allow: Vec<String>,

    /// Deny all sessions what a rule names (repeatable; wins over --allow)
    #[arg(long, value_name = "RULE")]
    deny: Vec<String>,

    /// Serve Prometheus metrics on this address (ADDRESS:PORT, or unix:PATH)
    #[arg(long, value_name = "ADDRESS")]
    metrics: Option<String>,

    /// Print each event of every session to standard error
    #[arg(long)]
    trace: bool,

    /// More of what happens, on standard error (repeatable)
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// The configuration is wrong, or the socket cannot be made.
pub fn run(args: BrokerArgs) -> Result<ExitCode> {
    output::init_logs(args.verbose);
    kso_broker::serve(config(args)?)?;
    Ok(ExitCode::SUCCESS)
}

fn config(args: BrokerArgs) -> Result<ServeConfig> {
    let file = match &args.config {
        None => Config::default(),
        Some(path) => {
            let text =
                std::fs::read_to_string(path).with_context(|| format!("--config {}", path.display()))?;
            Config::parse(&text).with_context(|| format!("--config {}", path.display()))?
        }
    };
    let default = BrokerConfig::default();
    let mut rules = file.rules;
    rules.extend(args.allow.into_iter().map(|rule| (true, rule)));
    rules.extend(args.deny.into_iter().map(|rule| (false, rule)));
    let metrics = args.metrics.or_else(|| {
        file.metrics.map(|address| match address {
            MetricsAddress::Tcp(address) => address.to_string(),
            MetricsAddress::Unix(path) => format!("unix:{}", path.display()),
        })
    });
    let max_sessions = file.max_sessions.map(|most| usize::try_from(most).unwrap_or(usize::MAX));
    Ok(ServeConfig {
        socket: args.listen.or(file.socket).unwrap_or_else(|| runtime_directory().join("broker.sock")),
        group: args.group.as_deref().map(group).transpose()?,
        guests: file.guests.into_iter().chain(args.vsock_socket.into_iter().map(guest)).collect(),
        broker: BrokerConfig {
            rules,
            no_net: file.no_net,
            publish: args.config.is_some().then_some(file.publish),
            max_sessions: max_sessions.unwrap_or(default.max_sessions),
            trace: args.trace,
            metrics,
            kernels: KernelsConfig { kernels: file.kernels, program: None },
            routes: file.routes,
            control: Control::Broker,
            ..default
        },
    })
}

/// A guest without rules of its own.
fn guest(socket: PathBuf) -> Guest {
    Guest {
        name: socket.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
        vsock: VsockSocket::VhostUser(socket),
        rules: Vec::new(),
        no_net: false,
        publish: Vec::new(),
        shares: Vec::new(),
    }
}

/// A group by number, or by name in /etc/group (group(5)).
fn group(text: &str) -> Result<u32> {
    if let Ok(number) = text.parse() {
        return Ok(number);
    }
    let file = std::fs::read_to_string("/etc/group").context("cannot read /etc/group")?;
    let number = file.lines().find_map(|line| {
        let mut fields = line.split(':');
        if fields.next() == Some(text) { fields.nth(1)?.parse().ok() } else { None }
    });
    match number {
        Some(number) => Ok(number),
        None => bail!("--group {text}: there is no such group in /etc/group"),
    }
}
