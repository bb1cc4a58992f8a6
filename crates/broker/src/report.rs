//! What `kso ps` shows.

use crate::external::External;
use crate::guest::{Guests, Shown};
use crate::session::{Session, SessionId};
use kso_kernels::Status;
use kso_provider::diagnostics::{self, Socket};
use kso_provider::processes;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::SystemTime;

/// Most connections of a session that are listed.
const MAX_CONNECTIONS: usize = 10_000;

/// The answer to [`crate::Question::Ps`]: one JSON line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The broker's process.
    pub broker: u32,
    /// Its sessions.
    pub sessions: Vec<SessionReport>,
    /// Its external kernels, if a route names one.
    #[serde(default)]
    pub kernels: Vec<KernelReport>,
}

/// A session.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SessionReport {
    /// Its number.
    pub session: u64,
    /// The process that runs it.
    pub pid: u32,
    /// Its name.
    pub name: String,
    /// What it runs.
    pub command: String,
    /// Seconds since it began.
    pub uptime: f64,
    /// When it began, seconds since 1970.
    pub started: f64,
    /// Processes in it.
    pub processes: usize,
    /// Streams that it asked for.
    pub connects: u64,
    /// Of these, such as failed at once.
    pub failed: u64,
    /// What policy refused.
    pub denied: u64,
    /// Datagram flows.
    pub flows: u64,
    /// Echo flows.
    pub echoes: u64,
    /// Names asked for.
    pub queries: u64,
    /// Its listeners outside.
    pub listeners: Vec<ListenerReport>,
    /// Its connections, as they are now.
    pub connections: Vec<ConnectionReport>,
}

/// A published listener.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenerReport {
    /// Its address inside.
    pub inside: SocketAddr,
    /// Its address outside.
    pub outside: SocketAddr,
    /// Its processes.
    pub programs: Vec<String>,
}

/// A connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionReport {
    /// A process that has it.
    pub pid: u32,
    /// Its name.
    pub program: String,
    /// `in` came by a listener, `out` was opened inside.
    pub direction: String,
    /// Its address outside.
    pub local: SocketAddr,
    /// The other end.
    pub peer: SocketAddr,
    /// The names by which the session knows that.
    pub names: Vec<String>,
    /// `established`, `syn-sent`, ...
    pub state: String,
    /// Bytes received.
    pub bytes_in: u64,
    /// Bytes sent.
    pub bytes_out: u64,
}

impl Report {
    /// Adds what other kernels have: they are asked, not this one.
    pub(crate) fn add_external(&mut self, external: &External) {
        for shown in external.shown() {
            let session = self.sessions.iter_mut().find(|session| session.session == shown.session);
            let Some(session) = session else { continue };
            let programs = Vec::new();
            session.listeners.push(ListenerReport { inside: shown.inside, outside: shown.outside, programs });
        }
        self.kernels = external.kernels().statuses().into_iter().map(KernelReport::from).collect();
    }
}

impl From<Status> for KernelReport {
    fn from(status: Status) -> Self {
        let seconds =
            |at: SystemTime| at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let (died, reason) = status.last_death.unzip();
        Self {
            name: status.name,
            make: status.make.name().into(),
            state: status.state.into(),
            version: status.version,
            services: status.services.into_iter().map(Into::into).collect(),
            addresses: status.addresses,
            streams: status.streams,
            listeners: status.listeners,
            uptime: status.up_since.map(|since| since.elapsed().as_secs_f64()),
            deaths: status.deaths,
            last_death: died.map(seconds),
            last_death_reason: reason,
        }
    }
}

/// An external kernel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KernelReport {
    /// Its name.
    pub name: String,
    /// Its make.
    pub make: String,
    /// `idle`, `starting`, `up`, `draining`, `down` or `aside`.
    pub state: String,
    /// Its version.
    pub version: String,
    /// What it serves.
    pub services: Vec<String>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Connections now.
    pub streams: usize,
    /// Listeners now.
    pub listeners: usize,
    /// Seconds since it is up.
    pub uptime: Option<f64>,
    /// How often it died.
    pub deaths: u64,
    /// When it died last, seconds since 1970.
    pub last_death: Option<f64>,
    /// Why.
    pub last_death_reason: Option<String>,
}

/// Looks at the kernel now.
pub(crate) fn report(sessions: &mut HashMap<u64, Session>, guests: &Guests) -> Report {
    let mut sockets: HashMap<u32, Socket> = HashMap::new();
    if let Err(error) = diagnostics::sockets(|socket| {
        sockets.insert(socket.inode, socket);
    }) {
        tracing::warn!(%error, "the kernel's sockets cannot be read");
    }
    let by_cookie: HashMap<u64, &Socket> = sockets.values().map(|socket| (socket.cookie, socket)).collect();
    let all = sessions.values_mut().map(|session| {
        let mut report = one(session, &sockets);
        if let Some(guest) = guests.of_session(SessionId(session.id)) {
            // Its processes are not this kernel's: what is found here is its machine.
            report.processes = 0;
            for listener in &mut report.listeners {
                let program = guests.listener_program(guest, listener.outside);
                listener.programs = program.into_iter().map(str::to_owned).collect();
            }
            report.connections = of_guest(session, guests.shown(guest), &by_cookie);
        }
        report
    });
    let mut sessions: Vec<_> = all.collect();
    sessions.sort_by_key(|session| session.session);
    Report { broker: std::process::id(), sessions, kernels: Vec::new() }
}

fn of_guest<'a>(
    session: &Session,
    streams: impl Iterator<Item = Shown<'a>>,
    sockets: &HashMap<u64, &Socket>,
) -> Vec<ConnectionReport> {
    let line = |stream: Shown<'_>| {
        let socket = stream.cookie.and_then(|cookie| sockets.get(&cookie));
        let otherwise = if stream.open { "established" } else { "syn-sent" };
        ConnectionReport {
            pid: stream.caller.pid,
            program: stream.caller.program.clone(),
            direction: if stream.inward { "in" } else { "out" }.into(),
            local: stream.local.or(socket.map(|socket| socket.local)).unwrap_or(stream.peer),
            peer: stream.peer,
            names: session.names_for_people(stream.peer.ip()),
            state: socket.map_or(otherwise, |socket| state(socket.state)).into(),
            bytes_in: socket.map_or(0, |socket| socket.traffic.bytes_in),
            bytes_out: socket.map_or(0, |socket| socket.traffic.bytes_out),
        }
    };
    let mut connections: Vec<_> = streams.take(MAX_CONNECTIONS).map(line).collect();
    connections.sort_by_key(|connection| (connection.pid, connection.peer, connection.local));
    connections
}

fn one(session: &mut Session, sockets: &HashMap<u32, Socket>) -> SessionReport {
    let processes = if session.pid == 0 { Vec::new() } else { processes::tree(session.pid) };
    let mut listeners: HashMap<u64, ListenerReport> = session
        .listeners
        .live()
        .iter()
        .map(|one| {
            (one.cookie, ListenerReport { inside: one.inner, outside: one.outer, programs: Vec::new() })
        })
        .collect();
    let outer: Vec<u16> = listeners.values().map(|listener| listener.outside.port()).collect();
    let mut connections: HashMap<u64, ConnectionReport> = HashMap::new();
    for process in &processes {
        for socket in processes::sockets(process.pid).iter().filter_map(|inode| sockets.get(inode)) {
            if let Some(listener) = listeners.get_mut(&socket.cookie) {
                if !listener.programs.contains(&process.program) {
                    listener.programs.push(process.program.clone());
                }
            } else if !socket.listens() && connections.len() < MAX_CONNECTIONS {
                connections.entry(socket.cookie).or_insert_with(|| ConnectionReport {
                    pid: process.pid,
                    program: process.program.clone(),
                    direction: if outer.contains(&socket.local.port()) { "in" } else { "out" }.into(),
                    local: socket.local,
                    peer: socket.peer,
                    names: session.names_for_people(socket.peer.ip()),
                    state: state(socket.state).into(),
                    bytes_in: socket.traffic.bytes_in,
                    bytes_out: socket.traffic.bytes_out,
                });
            }
        }
    }
    let mut listeners: Vec<_> = listeners.into_values().collect();
    listeners.sort_by_key(|listener| (listener.inside.port(), listener.outside));
    let mut connections: Vec<_> = connections.into_values().collect();
    connections.sort_by_key(|connection| (connection.pid, connection.peer, connection.local));
    let started = session.started_at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    SessionReport {
        session: session.id,
        pid: session.pid,
        name: session.name.clone(),
        command: session.command.clone(),
        uptime: session.started.elapsed().as_secs_f64(),
        started: started.as_secs_f64(),
        // The first is the supervisor itself.
        processes: processes.len().saturating_sub(1),
        connects: session.counts.connects,
        failed: session.counts.failed,
        denied: session.counts.denied,
        flows: session.counts.flows,
        echoes: session.counts.echoes,
        queries: session.counts.queries,
        listeners,
        connections,
    }
}

/// As ss(8) names it.
fn state(state: u8) -> &'static str {
    match state {
        1 => "established",
        2 => "syn-sent",
        3 => "syn-recv",
        4 => "fin-wait-1",
        5 => "fin-wait-2",
        6 => "time-wait",
        8 => "close-wait",
        9 => "last-ack",
        10 => "listening",
        11 => "closing",
        _ => "closed",
    }
}
