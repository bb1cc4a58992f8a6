//! `kso provide --listen tcp:ADDRESS:PORT`: for brokers on other machines, over mutual TLS.

use super::drain;
use anyhow::{Context, Result, bail};
use clap::Args;
use kso_provider::server::{Limits, Shared};
use kso_sys::process::Signals;
use kso_tls::identity::{self, Files};
use kso_tls::{Arrival, Gate, Pump};
use rustix::event::{PollFd, PollFlags, poll};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;

/// Who we are, and whom we trust.
#[derive(Args, Debug)]
pub struct TlsArgs {
    /// With tcp: the provider's certificate, PEM (`kso provide certs` makes it)
    #[arg(long = "tls-cert", value_name = "FILE")]
    cert: Option<PathBuf>,

    /// With tcp: its key, PEM
    #[arg(long = "tls-key", value_name = "FILE")]
    key: Option<PathBuf>,

    /// With tcp: the authority that the certificates of brokers have to be of, PEM; whoever has none is refused
    #[arg(long = "tls-ca", value_name = "FILE")]
    ca: Option<PathBuf>,
}

impl TlsArgs {
    /// They are of use with tcp: only.
    pub fn refuse(&self, listen: &str) -> Result<()> {
        if self.cert.is_some() || self.key.is_some() || self.ca.is_some() {
            bail!("--tls-cert, --tls-key and --tls-ca are for --listen tcp:ADDRESS:PORT, not for {listen}");
        }
        Ok(())
    }

    fn files(&self) -> Result<Files> {
        match (&self.ca, &self.cert, &self.key) {
            (Some(ca), Some(cert), Some(key)) => {
                Ok(Files { ca: ca.clone(), cert: cert.clone(), key: key.clone() })
            }
            _ => bail!(
                "--listen tcp: takes --tls-ca, --tls-cert and --tls-key: both sides show certificates \
                 (kso provide certs DIR --name HOST makes them)"
            ),
        }
    }
}

/// Serves until a signal comes, and then until its connections have ended.
pub fn serve(
    address: &str,
    args: &TlsArgs,
    shared: &Shared,
    limits: Limits,
    signals: &Signals,
) -> Result<()> {
    let address: SocketAddr = address.parse().with_context(|| {
        format!("--listen tcp:{address}: it is tcp:ADDRESS:PORT, such as tcp:0.0.0.0:7443 or tcp:[::]:7443")
    })?;
    let config = identity::server(&args.files()?)?;
    let listener = TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    let pump = Arc::new(Pump::start().context("cannot start a thread")?);
    let arrived = {
        let shared = shared.clone();
        move |arrival| arrived(arrival, &shared, limits)
    };
    let gate = Gate::open(listener, config, Arc::clone(&pump), arrived).context("cannot start a thread")?;
    tracing::info!(%address, "provider ready");
    while signals.next().is_none() {
        match poll(&mut [PollFd::new(signals, PollFlags::IN)], None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    gate.shut();
    // The last bytes of streams are still on their way when their sessions have ended.
    drain(shared, signals, || pump.load());
    Ok(())
}

fn arrived(arrival: Arrival, shared: &Shared, limits: Limits) {
    match arrival {
        Arrival::Stream(ticket, stream) => {
            if let Err(error) = shared.claim(ticket, stream) {
                tracing::info!(%error, "a stream is closed again");
            }
        }
        Arrival::Control(stream, peer) => {
            tracing::info!(%peer, "a broker is connected");
            let shared = shared.clone();
            let started = std::thread::Builder::new().name("kso-provider".into()).spawn(move || {
                if let Err(fault) = shared.serve_with_tickets(stream, limits) {
                    tracing::warn!(%peer, %fault, "a broker is dropped");
                }
            });
            if let Err(error) = started {
                tracing::warn!(%peer, %error, "a broker cannot be served");
            }
        }
    }
}
