//! Metrics in the text format of Prometheus, over HTTP on an address or a unix socket.
//!
//! Nothing is kept for them but the numbers of `totals`: the text is made when it is read.

use crate::config::BrokerError;
use crate::totals::Totals;
use kso_core::config::MetricsAddress;
use kso_kernels::Status;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::net::{RecvFlags, SendFlags, SocketFlags};
use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Most scrapes at one time.
const MAX_CLIENTS: usize = 16;
/// Longest head of a request, bytes.
const MAX_REQUEST: usize = 8192;
/// A scrape ends after this time, finished or not.
const PATIENCE: Duration = Duration::from_secs(10);

/// The state at one time.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot<'a> {
    pub totals: &'a Totals,
    pub sessions: usize,
    pub listeners: usize,
    /// External kernels, if there are any.
    pub kernels: Vec<Status>,
}

type Labels = Vec<(&'static str, String)>;

impl Snapshot<'_> {
    fn text(&self) -> String {
        let mut registry = Registry::with_prefix("kso");
        let mut count = |name: &str, help: &str, label: &'static str, values: &[(&str, u64)]| {
            if let ("", [(_, number)]) = (label, values) {
                let counter: Counter = Counter::default();
                counter.inc_by(*number);
                return registry.register(name, help, counter);
            }
            let family = Family::<Labels, Counter>::default();
            for (value, number) in values {
                family.get_or_create(&vec![(label, (*value).to_owned())]).inc_by(*number);
            }
            registry.register(name, help, family);
        };
        let totals = self.totals;
        let results = |ok, failed, denied| [("ok", ok), ("failed", failed), ("denied", denied)];
        count(
            "connects",
            "Streams asked for, by what came of the attempt at once",
            "result",
            &results(totals.connects_ok, totals.connects_failed, totals.connects_denied),
        );
        count(
            "datagram_flows",
            "Datagram flows asked for",
            "result",
            &results(totals.flows_ok, totals.flows_failed, totals.flows_denied),
        );
        let echoes = [("ok", totals.echoes_ok), ("failed", totals.echoes_failed)];
        count("echo_flows", "ICMP echo flows asked for", "result", &echoes);
        let codes: Vec<(&str, u64)> =
            totals.queries.iter().map(|(code, number)| (&**code, *number)).collect();
        count("dns_queries", "Names asked for, by response code", "rcode", &codes);
        let denied = totals.connects_denied + totals.flows_denied + totals.names_denied;
        count("denials", "What policy refused", "", &[("", denied)]);
        count("accepts", "Connections that came by published listeners", "", &[("", totals.accepts)]);
        let bytes = [("in", totals.bytes_in), ("out", totals.bytes_out)];
        count("bytes", "Bytes of streams that have ended, as the sandbox sees them", "direction", &bytes);
        count("sendfile_calls", "Parts of files sent for guests", "", &[("", totals.files_sent)]);
        count("sendfile_bytes", "Bytes of files sent for guests", "", &[("", totals.file_bytes_sent)]);
        count("sessions_opened", "Sessions opened", "", &[("", totals.sessions_opened)]);
        let mut gauge = |name: &str, help: &str, value: usize| {
            let gauge: Gauge = Gauge::default();
            gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
            registry.register(name, help, gauge);
        };
        gauge("sessions", "Sessions now", self.sessions);
        gauge("listeners", "Published listeners now", self.listeners);
        if !self.kernels.is_empty() {
            self.add_kernels(&mut registry);
        }
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = encode(&mut text, &registry);
        text
    }

    fn add_kernels(&self, registry: &mut Registry) {
        let labels =
            |kernel: &Status| vec![("kernel", kernel.name.clone()), ("make", kernel.make.name().to_owned())];
        let mut gauge = |name: &str, help: &str, value: fn(&Status) -> u64| {
            let family = Family::<Labels, Gauge>::default();
            for kernel in &self.kernels {
                family.get_or_create(&labels(kernel)).set(i64::try_from(value(kernel)).unwrap_or(i64::MAX));
            }
            registry.register(name, help, family);
        };
        gauge("kernel_up", "Whether an external kernel serves now", |one| u64::from(one.state == "up"));
        gauge("kernel_streams", "Connections on an external kernel now", |one| one.streams as u64);
        gauge("kernel_listeners", "Listeners on an external kernel now", |one| one.listeners as u64);
        gauge("kernel_uptime_seconds", "Seconds since it is up", |one| {
            one.up_since.map_or(0, |since| since.elapsed().as_secs())
        });
        let family = Family::<Labels, Counter>::default();
        for kernel in &self.kernels {
            family.get_or_create(&labels(kernel)).inc_by(kernel.deaths);
        }
        registry.register("kernel_deaths", "How often an external kernel died", family);
    }
}

#[derive(Debug)]
struct Client {
    socket: OwnedFd,
    request: Vec<u8>,
    answer: Vec<u8>,
    sent: usize,
    until: Instant,
}

enum Step {
    Wait,
    Answer,
    Over,
}

/// Serves scrapes.
#[derive(Debug)]
pub(crate) struct Exporter {
    listener: OwnedFd,
    path: Option<PathBuf>,
    clients: HashMap<u32, Client>,
    next: u32,
    token: u64,
}

impl Exporter {
    /// Listens on `ADDRESS:PORT` or `unix:PATH`. `tokens`: of its listener and of its clients.
    pub fn new(epoll: BorrowedFd<'_>, text: &str, tokens: (u64, u64)) -> Result<Self, BrokerError> {
        let error = |reason: String| BrokerError::Metrics { address: text.to_owned(), reason };
        let address: MetricsAddress = text.parse().map_err(|why: &'static str| error(why.to_owned()))?;
        let listen = || -> io::Result<(OwnedFd, Option<PathBuf>)> {
            Ok(match address {
                MetricsAddress::Tcp(address) => {
                    let listener = TcpListener::bind(address)?;
                    listener.set_nonblocking(true)?;
                    (listener.into(), None)
                }
                MetricsAddress::Unix(path) => {
                    crate::control::remove_stale(&path)?;
                    let listener = UnixListener::bind(&path)?;
                    fs::set_permissions(&path, fs::Permissions::from_mode(0o660))?;
                    listener.set_nonblocking(true)?;
                    (listener.into(), Some(path))
                }
            })
        };
        let (listener, path) = listen().map_err(|why| error(why.to_string()))?;
        epoll::add(epoll, &listener, EventData::new_u64(tokens.0), EventFlags::IN)
            .map_err(|why| error(why.to_string()))?;
        Ok(Self { listener, path, clients: HashMap::new(), next: 0, token: tokens.1 })
    }

    /// A client came.
    pub fn accept(&mut self, epoll: BorrowedFd<'_>) {
        let now = Instant::now();
        self.clients.retain(|_, client| client.until > now);
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        while let Ok(socket) = rustix::net::accept_with(self.listener.as_fd(), flags) {
            if self.clients.len() >= MAX_CLIENTS {
                continue;
            }
            self.next = self.next.wrapping_add(1);
            let data = EventData::new_u64(self.token | u64::from(self.next));
            let flags = EventFlags::IN | EventFlags::OUT | EventFlags::ET;
            if epoll::add(epoll, &socket, data, flags).is_ok() {
                let client = Client {
                    socket,
                    request: Vec::new(),
                    answer: Vec::new(),
                    sent: 0,
                    until: now + PATIENCE,
                };
                self.clients.insert(self.next, client);
            }
        }
    }

    /// A client can be read or written.
    pub fn ready(&mut self, key: u32, snapshot: &Snapshot<'_>) {
        let Some(client) = self.clients.get_mut(&key) else { return };
        let mut step = client.read();
        if let Step::Answer = step {
            if client.answer.is_empty() {
                client.answer = answer(&client.request, snapshot);
            }
            step = client.write();
        }
        if let Step::Over = step {
            self.clients.remove(&key);
        }
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = fs::remove_file(path);
        }
    }
}

impl Client {
    fn read(&mut self) -> Step {
        let mut buffer = [0; 2048];
        loop {
            if self.request.windows(4).any(|window| window == b"\r\n\r\n") {
                return Step::Answer;
            }
            if self.request.len() > MAX_REQUEST {
                return Step::Over;
            }
            match rustix::net::recv(&self.socket, &mut buffer[..], RecvFlags::empty()) {
                Ok((0, _)) => return Step::Over,
                Ok((count, _)) => self.request.extend_from_slice(buffer.get(..count).unwrap_or_default()),
                Err(rustix::io::Errno::AGAIN) => return Step::Wait,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return Step::Over,
            }
        }
    }

    fn write(&mut self) -> Step {
        while let Some(rest) = self.answer.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match rustix::net::send(&self.socket, rest, SendFlags::NOSIGNAL) {
                Ok(count) => self.sent += count,
                Err(rustix::io::Errno::AGAIN) => return Step::Wait,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => break,
            }
        }
        Step::Over
    }
}

/// The whole response to a request (RFC 9112); the connection ends with it.
fn answer(request: &[u8], snapshot: &Snapshot<'_>) -> Vec<u8> {
    let line = request.split(|&byte| byte == b'\r').next().unwrap_or_default();
    let mut words = line.split(|&byte| byte == b' ');
    let (status, kind, body) = match (words.next(), words.next()) {
        (Some(b"GET"), Some(b"/metrics" | b"/")) => {
            ("200 OK", "application/openmetrics-text; version=1.0.0; charset=utf-8", snapshot.text())
        }
        (Some(b"GET"), _) => ("404 Not Found", "text/plain", "metrics are at /metrics\n".to_owned()),
        _ => ("405 Method Not Allowed", "text/plain", "GET /metrics\n".to_owned()),
    };
    let length = body.len();
    format!("HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}")
        .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use kso_core::kernels::Make;

    #[test]
    fn the_text_has_every_number() {
        let mut totals = Totals { connects_ok: 3, connects_denied: 2, bytes_in: 77, ..Totals::default() };
        totals.resolved("NXDOMAIN");
        let kernel = Status {
            name: "web".into(),
            make: Make::Gvisor,
            state: "up",
            version: String::new(),
            services: Vec::new(),
            addresses: Vec::new(),
            streams: 4,
            listeners: 1,
            up_since: Some(Instant::now()),
            deaths: 2,
            last_death: None,
        };
        let snapshot = Snapshot { totals: &totals, sessions: 1, listeners: 0, kernels: vec![kernel] };
        let text = String::from_utf8(answer(b"GET /metrics HTTP/1.1\r\n\r\n", &snapshot)).unwrap_or_default();
        for line in [
            "HTTP/1.1 200 OK",
            "kso_connects_total{result=\"ok\"} 3",
            "kso_denials_total 2",
            "kso_bytes_total{direction=\"in\"} 77",
            "kso_dns_queries_total{rcode=\"NXDOMAIN\"} 1",
            "kso_sessions 1",
            "kso_kernel_up{kernel=\"web\",make=\"gvisor\"} 1",
            "kso_kernel_streams{kernel=\"web\",make=\"gvisor\"} 4",
            "kso_kernel_deaths_total{kernel=\"web\",make=\"gvisor\"} 2",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
        assert!(answer(b"GET /x HTTP/1.1\r\n\r\n", &snapshot).starts_with(b"HTTP/1.1 404"));
        assert!(answer(b"POST / HTTP/1.1\r\n\r\n", &snapshot).starts_with(b"HTTP/1.1 405"));
    }
}
