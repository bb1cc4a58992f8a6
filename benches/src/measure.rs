//! One measurement: a server, a client, one of them in a sandbox.

use std::cell::Cell;
use std::ffi::OsString;
use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::client::Outcome;
use crate::rows::{Pin, Row, Via, Work};
use crate::sandbox::{Job, Reach, Tools, Variant};

/// Beyond the time that is measured: start, connect, drain, end.
const PATIENCE: Duration = Duration::from_secs(15);
const PORTS: std::ops::Range<u16> = 5000..10_000;

/// Measures rows.
pub struct Bench {
    pub tools: Tools,
    /// Time measured in each repetition.
    pub millis: u64,
    /// Overrides what the rows say.
    pub pin: Option<Pin>,
    port: Cell<u16>,
}

impl Bench {
    pub fn new(tools: Tools, millis: u64, pin: Option<Pin>) -> Bench {
        Bench { tools, millis, pin, port: Cell::new(PORTS.start) }
    }

    /// A port that was not used just now: TIME_WAIT of one repetition must not meet the next.
    pub fn next_port(&self) -> u16 {
        let port = self.port.get();
        self.port.set(if port + 1 < PORTS.end { port + 1 } else { PORTS.start });
        port
    }

    pub fn measure(&self, row: &Row, variant: Variant) -> Result<Outcome> {
        let port = self.next_port();
        let pin = self.pin.unwrap_or(row.pin);
        match row.work {
            Work::Iperf { .. } | Work::IperfUdp(_) => self.iperf(row, variant, port, pin),
            _ => self.own(row, variant, port, pin),
        }
    }

    fn own(&self, row: &Row, variant: Variant, port: u16, pin: Pin) -> Result<Outcome> {
        let _server = self.start_server(row.via, variant, port, pin)?;
        let mut command = self.client_command(row.via, variant, port, pin)?;
        let (name, option, value) = match row.work {
            Work::Up(streams) => ("up", "--streams", streams),
            Work::Down(streams) => ("down", "--streams", streams),
            Work::Pingpong(size) => ("pingpong", "--size", size),
            Work::UdpPingpong(size) => ("udp-pingpong", "--size", size),
            Work::UdpUp(size) => ("udp-up", "--size", size),
            Work::UdpDown(size) => ("udp-down", "--size", size),
            Work::Connect | Work::Iperf { .. } | Work::IperfUdp(_) => ("connect", "", 0),
        };
        command.push(name.into());
        if !option.is_empty() {
            command.extend([option.into(), value.to_string().into()]);
        }
        let mut client = self.start_client(row.via, variant, port, &command)?;
        let line = client.line(Duration::from_millis(self.millis) + PATIENCE)?;
        serde_json::from_str(&line).with_context(|| format!("the client says `{line}`"))
    }

    pub fn start_server(&self, via: Via, variant: Variant, port: u16, pin: Pin) -> Result<Job> {
        let mut command: Vec<OsString> = vec![self.tools.this.clone().into(), "server".into()];
        let bind = if via == Via::In { Ipv4Addr::UNSPECIFIED } else { Ipv4Addr::LOCALHOST };
        command.extend(["--bind".into(), bind.to_string().into(), "--port".into(), port.to_string().into()]);
        if let Some(cpu) = pin.server() {
            command.extend(["--cpu".into(), cpu.to_string().into()]);
        }
        let inside = if via == Via::In { variant } else { Variant::Native };
        let mut job = Job::start(&self.tools, inside, Reach::In(port), &command)?;
        job.expect_line("ready", PATIENCE).context("server")?;
        Ok(job)
    }

    /// The beginning of a client's command line.
    pub fn client_command(&self, via: Via, variant: Variant, port: u16, pin: Pin) -> Result<Vec<OsString>> {
        let host = if via == Via::Out { variant.host()? } else { Ipv4Addr::LOCALHOST };
        let mut command: Vec<OsString> = vec![self.tools.this.clone().into(), "client".into()];
        command.extend(["--to".into(), format!("{host}:{port}").into()]);
        command.extend(["--millis".into(), self.millis.to_string().into()]);
        if let Some(cpu) = pin.client() {
            command.extend(["--cpu".into(), cpu.to_string().into()]);
        }
        Ok(command)
    }

    pub fn start_client(&self, via: Via, variant: Variant, port: u16, command: &[OsString]) -> Result<Job> {
        let inside = if via == Via::Out { variant } else { Variant::Native };
        Job::start(&self.tools, inside, Reach::Out(port), command).context("client")
    }

    fn iperf(&self, row: &Row, variant: Variant, port: u16, pin: Pin) -> Result<Outcome> {
        let (server_in, client_in) = match row.via {
            Via::In => (variant, Variant::Native),
            Via::Out => (Variant::Native, variant),
        };
        let number = port.to_string();
        let mut command = on_cpu(pin.server(), &["iperf3", "-4", "-s", "-1", "--forceflush", "-p", &number]);
        let mut server = Job::start(&self.tools, server_in, Reach::In(port), &command)?;
        while !server.line(PATIENCE).context("iperf3 -s")?.contains("listening") {}
        let host = if row.via == Via::Out { variant.host()? } else { Ipv4Addr::LOCALHOST }.to_string();
        // iperf3 counts whole seconds only.
        let seconds = self.millis.div_ceil(1000).max(1).to_string();
        command = on_cpu(pin.client(), &["iperf3", "-4", "-c", &host, "-p", &number, "-J", "-t", &seconds]);
        match row.work {
            Work::Iperf { streams, reverse } => {
                command.extend(["-P".into(), streams.to_string().into()]);
                command.extend(reverse.then(|| "-R".into()));
            }
            Work::IperfUdp(size) => {
                command.extend(["-u", "-b", "0", "-l", &size.to_string()].map(OsString::from));
            }
            _ => {}
        }
        let mut client =
            Job::start(&self.tools, client_in, Reach::Out(port), &command).context("iperf3 -c")?;
        let text = client.output(Duration::from_millis(self.millis) + PATIENCE)?;
        let report: IperfReport = serde_json::from_str(&text).context("the report of iperf3")?;
        ensure!(report.error.is_none(), "iperf3: {}", report.error.unwrap_or_default());
        let end = report.end.context("a report of iperf3 without an end")?;
        let received = end.sum_received.or(end.sum).context("a report of iperf3 without a sum")?;
        Ok(Outcome { value: received.bits_per_second / 1e9, loss: received.lost_percent })
    }
}

fn on_cpu(cpu: Option<usize>, command: &[&str]) -> Vec<OsString> {
    let cpu = cpu.map(|cpu| cpu.to_string());
    let prefix = cpu.iter().flat_map(|cpu| ["taskset", "-c", cpu]);
    prefix.chain(command.iter().copied()).map(OsString::from).collect()
}

/// The parts of `iperf3 -J` that are used.
#[derive(Deserialize)]
struct IperfReport {
    error: Option<String>,
    end: Option<IperfEnd>,
}

#[derive(Deserialize)]
struct IperfEnd {
    sum_received: Option<IperfSum>,
    sum: Option<IperfSum>,
}

#[derive(Deserialize)]
struct IperfSum {
    bits_per_second: f64,
    lost_percent: Option<f64>,
}
