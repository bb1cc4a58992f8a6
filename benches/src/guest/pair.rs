//! Two guests of one broker, and two taps on a bridge between the same two.

use std::time::Duration;

use anyhow::{Context, Result};

use super::agent::Request;
use super::machine::Guest;
use super::net::{self, Way};
use super::rows::{PAIR, Row};
use super::{PATIENCE, Run};
use crate::client::Outcome;
use crate::namespace::ip;
use crate::sandbox::Job;

pub const NAME: &str = "pair";
/// The server's port that is published: its connections are outsourced.
const PUBLISHED: u16 = 5001;
/// And the one that stays inside: it is reached by the guest's NIC.
const INSIDE: u16 = 5002;
const CLIENT: &str = "bench-client";
const SERVER: &str = "bench-server";

struct Pair {
    client: Guest,
    _server: Guest,
    /// Where the server is, outsourced.
    outsourced: String,
    _broker: Job,
}

impl Run<'_> {
    pub fn pair(&mut self) -> Result<()> {
        let rows: Vec<&Row> = PAIR.iter().filter(|row| self.args.wants(row.name)).collect();
        if rows.is_empty() {
            return Ok(());
        }
        let mut pair = self.start_pair()?;
        let ways: Vec<Way> =
            [Way::Kso, Way::Tap].into_iter().filter(|way| self.args.ways().contains(way)).collect();
        self.interleaved(&rows, &ways, &mut |run, row, way| {
            let to = match way {
                Way::Kso => pair.outsourced.clone(),
                _ => format!("{}:{INSIDE}", address(SERVER)),
            };
            let line = pair.client.ask(&Request::Run(run.client(&to, row)), run.patience())?;
            let outcome: Outcome =
                serde_json::from_str(&line).with_context(|| format!("the client says `{line}`"))?;
            Ok(row.value(outcome.value))
        })
    }

    fn start_pair(&self) -> Result<Pair> {
        let socket = self.tools.scratch.join("broker.sock");
        let words = [self.tools.kso.as_os_str(), "broker".as_ref(), "--listen".as_ref(), socket.as_os_str()];
        let broker = Job::spawn(&[], &words.map(Into::into))?;
        wait_for(&socket)?;
        ip(&["link", "add", "bridge0", "type", "bridge"])?;
        ip(&["link", "set", "bridge0", "up"])?;
        let start = |name: &str, options: &[&str]| -> Result<Guest> {
            let tap = if name == SERVER { "tap2" } else { "tap1" };
            net::tap(tap)?;
            ip(&["link", "set", tap, "master", "bridge0"])?;
            let mut words = vec!["--broker".to_owned(), socket.display().to_string()];
            words.extend(["--name".to_owned(), name.to_owned()]);
            words.extend(["--inside".to_owned(), net::NETWORKS.to_owned()]);
            words.extend(net::MODULES.iter().flat_map(|name| ["--module".to_owned(), (*name).to_owned()]));
            let back_end = format!("tap,id=tap,ifname={tap},script=no,downscript=no");
            for word in net::nic(&back_end, "tap", mac(name)) {
                words.extend(["--qemu-arg".to_owned(), word]);
            }
            words.extend(options.iter().map(|word| (*word).to_owned()));
            let mut guest =
                Guest::start(&self.tools, &self.kernel, &words).with_context(|| name.to_owned())?;
            guest.ask(&Request::Address(mac(name).into(), format!("{}/24", address(name))), PATIENCE)?;
            Ok(guest)
        };
        let published = format!("{PUBLISHED}:{PUBLISHED}");
        let mut server = start(SERVER, &["-p", &published])?;
        let mut client = start(CLIENT, &["--allow", &format!("{SERVER}.kso.internal:{PUBLISHED}")])?;
        for port in [PUBLISHED, INSIDE] {
            let words = ["server", "--bind", "0.0.0.0", "--port", &port.to_string()].map(str::to_owned);
            let name = port.to_string();
            server.ask(&Request::Start(name.clone(), words.into()), PATIENCE)?;
            server.ask(&Request::Ask(name, None), PATIENCE)?;
        }
        let name = format!("{SERVER}.kso.internal");
        let found = client
            .ask(&Request::Run(["/usr/bin/getent", "ahostsv4", &name].map(str::to_owned).into()), PATIENCE)?;
        let found = found.split_whitespace().next().context("the server has no address")?;
        Ok(Pair { outsourced: format!("{found}:{PUBLISHED}"), client, _server: server, _broker: broker })
    }
}

fn mac(name: &str) -> &'static str {
    if name == SERVER { "52:54:00:00:00:12" } else { "52:54:00:00:00:11" }
}

fn address(name: &str) -> &'static str {
    if name == SERVER { "10.79.4.2" } else { "10.79.4.1" }
}

fn wait_for(socket: &std::path::Path) -> Result<()> {
    for _ in 0..500 {
        if socket.exists() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    anyhow::bail!("kso broker makes no socket")
}
