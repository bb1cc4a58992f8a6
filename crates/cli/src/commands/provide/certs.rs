//! `kso provide certs`: what both sides of a remote provider need to trust each other.

use anyhow::{Context, Result};
use clap::Args;
use kso_tls::certs;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

const EXAMPLES: &str = "\
Examples:
  kso provide certs certs --name p.example.org                    an authority, and certificates for a provider and brokers
  kso provide certs certs --name q.example.org --name 192.0.2.7   for another provider, with two names, of the same authority

Keep ca.key to yourself. A broker needs ca.pem, broker.pem and broker.key.";

/// Options of `kso provide certs`.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct CertsArgs {
    /// Where to put them; an authority that is there is used
    #[arg(value_name = "DIR")]
    directory: PathBuf,

    /// A name or address that the provider is reached by (repeatable; the first names the files)
    #[arg(long = "name", value_name = "HOST", required = true)]
    names: Vec<String>,
}

/// Makes them, and says how they are used.
///
/// # Errors
/// See [`certs::CertsError`].
pub fn run(args: &CertsArgs) -> Result<ExitCode> {
    let made = certs::make(&args.directory, &args.names).context("cannot make certificates")?;
    let directory = args.directory.display();
    let (provider, broker) = (made.provider.display(), made.broker.display());
    let key = |path: &PathBuf| path.with_extension("key").display().to_string();
    let host = args.names.first().map(String::as_str).unwrap_or_default();
    let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    // A closed pipe is no error of ours.
    let _ = writeln!(
        std::io::stdout(),
        "{authority} the authority {directory}/ca.pem\nmade {provider}{new_broker}\n\n\
         There:  kso provide --listen tcp:0.0.0.0:7443 --tls-ca {directory}/ca.pem --tls-cert {provider} --tls-key {provider_key}\n\
         Here:   kso run --kernel far=remote,address={host}:7443,ca={directory}/ca.pem,cert={broker},key={broker_key} -- CMD",
        authority = if made.authority { "made" } else { "used" },
        new_broker = if made.broker_is_new { format!("\nmade {broker}") } else { String::new() },
        provider_key = key(&made.provider),
        broker_key = key(&made.broker),
    );
    Ok(ExitCode::SUCCESS)
}
