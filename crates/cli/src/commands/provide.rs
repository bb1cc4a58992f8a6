//! `kso provide`: operations on sockets and files of this kernel, for a broker on another.

mod certs;
mod tls;

use crate::output;
use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use kso_core::files;
use kso_provider::server::{Door, Export, Limits, Shared};
use kso_sys::process::Signals;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::ffi::OsString;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

const EXAMPLES: &str = "\
Where it listens:
  --listen unix:/run/kso/p.sock     in another network namespace of this host; its user:
    kso run --kernel p=provider,path=/run/kso/p.sock -- CMD
  --listen tcp:0.0.0.0:7443 --tls-ca ca.pem --tls-cert p.pem --tls-key p.key
                                    on another machine, over mutual TLS 1.3; its user there:
    kso run --kernel p=remote,address=HOST:7443,ca=ca.pem,cert=broker.pem,key=broker.key -- CMD
  --listen fd:3                     one connected stream socket that is inherited, as by runsc --pass-fd 3:3

Certificates are made by: kso provide certs DIR --name HOST

Files:
  --share /srv --share /etc/ssl:ro  nothing but these and what is beneath; links do not lead out; their user:
    kso run --external p=provider,path=/run/kso/p.sock -v p:/srv/data:/mnt -- CMD

On a kernel of its own (gVisor) kso starts it by itself: kso run --kernel gvisor -- CMD.
SIGTERM ends it when its connections have ended, or after half a minute.";

/// How long connections may take to end.
const DRAIN: Duration = Duration::from_secs(31);

/// Options of `kso provide`.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct ProvideArgs {
    #[command(subcommand)]
    command: Option<ProvideCommand>,

    /// Where brokers come from: unix:PATH, tcp:ADDRESS:PORT with TLS, or fd:NUMBER for one that is connected already
    #[arg(long, value_name = "ADDRESS", required = true)]
    listen: Option<String>,

    #[command(flatten)]
    tls: tls::TlsArgs,

    /// Connections of one broker at one time
    #[arg(long, value_name = "N", default_value_t = Limits::default().streams)]
    max_streams: usize,

    /// Listeners of one broker at one time
    #[arg(long, value_name = "N", default_value_t = Limits::default().listeners)]
    max_listeners: usize,

    /// An address to tell brokers instead of this kernel's own (repeatable; the first of a family is the one that
    /// connections come from)
    #[arg(long, value_name = "ADDRESS")]
    address: Vec<IpAddr>,

    /// A directory that brokers may have, or a part of it (repeatable)
    #[arg(long, value_name = "DIR[:ro]")]
    share: Vec<OsString>,

    /// Directories of one broker at one time
    #[arg(long, value_name = "N", default_value_t = Limits::default().shares)]
    max_shares: usize,

    /// More of what happens, on standard error (repeatable)
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
}

#[derive(Subcommand, Debug)]
enum ProvideCommand {
    /// Make certificates for a provider on another machine and its brokers
    Certs(certs::CertsArgs),
}

/// Serves until SIGTERM or SIGINT; with `fd:`, until the broker is gone.
///
/// # Errors
/// The address is wrong, or cannot be listened on.
pub fn run(args: &ProvideArgs) -> Result<ExitCode> {
    output::init_logs(args.verbose);
    if let Some(ProvideCommand::Certs(args)) = &args.command {
        return certs::run(args);
    }
    let listen = args.listen.as_deref().unwrap_or_default();
    let (_, hard) = kso_sys::process::open_files_limit().context("cannot read the limit of open files")?;
    let _ = kso_sys::process::set_open_files_limit(hard, hard);
    let limits = Limits {
        streams: args.max_streams,
        listeners: args.max_listeners,
        shares: args.max_shares,
        ..Limits::default()
    };
    let mut shared = Shared::default();
    shared.addresses.clone_from(&args.address);
    for text in &args.share {
        let what = || format!("--share {}", text.display());
        let one = files::Shared::parse(text).with_context(what)?;
        shared.exports.push(Export::open(&one.directory, one.read_only).with_context(what)?);
    }
    match listen.split_once(':') {
        Some(("fd", number)) => {
            args.tls.refuse(listen)?;
            let number: i32 =
                number.parse().context("--listen fd:NUMBER takes the number of a descriptor")?;
            let socket = kso_sys::process::inherited(number)
                .with_context(|| format!("--listen fd:{number}: there is no such descriptor"))?;
            shared.serve(socket, limits)?;
        }
        Some(("unix", path)) if !path.is_empty() => {
            args.tls.refuse(listen)?;
            serve_unix(Path::new(path), &shared, limits)?;
        }
        Some(("tcp", address)) => tls::serve(address, &args.tls, &shared, limits, &take_signals()?)?,
        _ => bail!("--listen {listen}: it is unix:PATH, tcp:ADDRESS:PORT or fd:NUMBER"),
    }
    Ok(ExitCode::SUCCESS)
}

/// What ends it.
fn take_signals() -> Result<Signals> {
    use rustix::process::Signal;
    Signals::take(&[Signal::TERM.as_raw(), Signal::INT.as_raw()]).context("cannot take signals")
}

/// Takes nothing new, and waits until connections have ended, in it and in `elsewhere`.
fn drain(shared: &Shared, signals: &Signals, elsewhere: impl Fn() -> usize) {
    shared.draining.store(true, Ordering::Relaxed);
    let until = Instant::now() + DRAIN;
    while shared.sessions() + elsewhere() > 0 && Instant::now() < until {
        // A second signal ends it at once.
        let mut polled = [PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN)];
        if poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 100_000_000 })) != Ok(0) {
            break;
        }
    }
}

/// Removes the socket of an earlier provider, unless that still answers.
fn remove_stale(path: &PathBuf) -> Result<()> {
    use std::os::unix::fs::FileTypeExt;
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => {
            if std::os::unix::net::UnixStream::connect(path).is_ok() {
                bail!("--listen unix:{}: another provider listens there", path.display());
            }
            std::fs::remove_file(path)?;
            Ok(())
        }
        Ok(_) => bail!("--listen unix:{}: there is something that is no socket", path.display()),
        Err(_) => Ok(()),
    }
}

fn serve_unix(path: &Path, shared: &Shared, limits: Limits) -> Result<()> {
    let signals = take_signals()?;
    remove_stale(&path.to_owned())?;
    let listener =
        UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    // Whoever connects has this user's network.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    tracing::info!(path = %path.display(), "provider ready");
    let mut door = Door::new(shared.clone(), limits)?;
    loop {
        let wait = door.next_deadline().map(|at| at.saturating_duration_since(Instant::now()));
        let wait = wait.and_then(|wait| Timespec::try_from(wait).ok());
        let mut polled = [
            PollFd::new(&listener, PollFlags::IN),
            PollFd::new(&signals, PollFlags::IN),
            PollFd::from_borrowed_fd(door.poll_fd(), PollFlags::IN),
        ];
        match poll(&mut polled, wait.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if signals.next().is_some() {
            break;
        }
        if let Ok((stream, _)) = listener.accept() {
            door.admit(stream.into());
        }
        door.run_ready();
    }
    let _ = std::fs::remove_file(path);
    drain(shared, &signals, || 0);
    Ok(())
}
