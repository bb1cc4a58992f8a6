//! `kso ps`: what runs, and its connections.

use super::control;
use anyhow::Result;
use clap::Args;
use kso_broker::{ConnectionReport, Question, Report, SessionReport};
use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::process::ExitCode;

const EXAMPLES: &str = "\
Examples:
  kso ps                    sessions, their listeners and connections
  kso ps web                of the session that is named (or numbered) so
  kso ps --json | jq '.sessions[].listeners'";

/// Options of `kso ps`.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct PsArgs {
    /// One JSON document instead of a table
    #[arg(long)]
    json: bool,

    /// Only the session of this number or name
    #[arg(value_name = "SESSION")]
    session: Option<String>,
}

/// Asks every broker of this user.
///
/// # Errors
/// A broker of another version answers what is not understood.
pub fn run(args: PsArgs) -> Result<ExitCode> {
    let mut sessions = Vec::new();
    for path in control::sockets() {
        match control::ask_once::<Report>(&path, &Question::Ps) {
            Ok(Some(report)) => sessions.extend(report.sessions),
            Ok(None) => {}
            Err(error) => crate::output::error(&error),
        }
    }
    if let Some(wanted) = &args.session {
        sessions.retain(|session| session.name == *wanted || session.session.to_string() == *wanted);
    }
    let text = if args.json {
        format!("{}\n", serde_json::to_string_pretty(&serde_json::json!({ "sessions": sessions }))?)
    } else {
        table(&sessions, std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none())
    };
    // A closed pipe is no error of ours.
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(ExitCode::from(u8::from(args.session.is_some() && sessions.is_empty())))
}

fn table(sessions: &[SessionReport], colour: bool) -> String {
    let (bold, dim, plain) = if colour { ("\x1b[1m", "\x1b[2m", "\x1b[0m") } else { ("", "", "") };
    let mut text = String::new();
    if sessions.is_empty() {
        return "no sessions\n".into();
    }
    for session in sessions {
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "{bold}{} {}{plain}  up {}  {} processes  {} connects ({} failed, {} denied)  {} udp  {} names",
            session.session,
            printable(&session.name),
            uptime(session.uptime),
            session.processes,
            session.connects,
            session.failed,
            session.denied,
            session.flows,
            session.queries,
        );
        let _ = writeln!(text, "  {dim}{}{plain}", printable(&session.command));
        for listener in &session.listeners {
            let programs = listener.programs.iter().map(|name| printable(name)).collect::<Vec<_>>().join(" ");
            let _ = writeln!(text, "  listen {} <- {}  {programs}", listener.inside, listener.outside);
        }
        for connection in &session.connections {
            let _ = writeln!(text, "  {}", line(connection));
        }
    }
    text
}

fn line(connection: &ConnectionReport) -> String {
    let arrow = if connection.direction == "in" { "<-" } else { "->" };
    let name = connection.names.first().map(|name| format!("{} ", printable(name))).unwrap_or_default();
    format!(
        "{}[{}] {arrow} {name}{}  {}  in {} out {}",
        printable(&connection.program),
        connection.pid,
        connection.peer,
        connection.state,
        bytes(connection.bytes_in),
        bytes(connection.bytes_out),
    )
}

/// Names come from programs: nothing of them reaches the terminal but what is shown.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

pub fn uptime(seconds: f64) -> String {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let seconds = seconds.max(0.0) as u64;
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{:02}h", seconds / 86_400, seconds / 3600 % 24),
    }
}

#[allow(clippy::cast_precision_loss)] // Three digits are shown.
fn bytes(number: u64) -> String {
    match number {
        0..1_000 => format!("{number} B"),
        1_000..1_000_000 => format!("{:.1} kB", number as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", number as f64 / 1e6),
        _ => format!("{:.1} GB", number as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_read_times_and_sizes() {
        assert_eq!(
            [uptime(5.9), uptime(61.0), uptime(3_660.0), uptime(90_000.0)],
            ["5s", "1m01s", "1h01m", "1d01h"]
        );
        assert_eq!([bytes(999), bytes(1_500), bytes(2_000_000)], ["999 B", "1.5 kB", "2.0 MB"]);
        assert_eq!(printable("a\x1b[2J"), "a?[2J");
    }
}
