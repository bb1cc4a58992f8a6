//! The external kernels of running brokers.

use crate::commands::control;
use crate::commands::ps::{printable, uptime};
use crate::output;
use kso_broker::{KernelReport, Question, Report};
use serde::Serialize;
use std::fmt::Write as _;
use std::time::SystemTime;

/// A kernel, and whose it is.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct External {
    /// The broker's process.
    broker: u32,
    /// The names of its sessions.
    sessions: Vec<String>,
    #[serde(flatten)]
    kernel: KernelReport,
}

/// Asks every broker of this user. One that does not answer is left out.
pub fn all() -> Vec<External> {
    let mut found = Vec::new();
    for path in control::sockets() {
        match control::ask_once::<Report>(&path, &Question::Ps) {
            Ok(Some(report)) => found.extend(of(report)),
            Ok(None) => {}
            Err(error) => output::error(&error),
        }
    }
    found
}

fn of(report: Report) -> impl Iterator<Item = External> {
    let Report { broker, sessions, kernels } = report;
    let sessions: Vec<String> = sessions.into_iter().map(|session| session.name).collect();
    kernels.into_iter().map(move |kernel| External { broker, sessions: sessions.clone(), kernel })
}

/// For a person; nothing if there are none.
pub fn table(kernels: &[External], colour: bool, now: SystemTime) -> String {
    if kernels.is_empty() {
        return String::new();
    }
    let [bold, red, green, dim, plain] =
        if colour { ["\x1b[1m", "\x1b[31m", "\x1b[32m", "\x1b[2m", "\x1b[0m"] } else { [""; 5] };
    let head = ["NAME", "MAKE", "STATE", "UP", "STREAMS", "LISTENERS", "DEATHS", "BROKER"].map(str::to_owned);
    let rows: Vec<[String; 8]> = kernels.iter().map(row).collect();
    let mut widths = head.clone().map(|word| word.chars().count());
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |row: &[String; 8], state: &str| {
        let mut line = String::new();
        for (place, (cell, width)) in row.iter().zip(widths).enumerate() {
            let (on, off) = if place == 2 { (state, plain) } else { ("", "") };
            let _ = write!(line, "{on}{cell:width$}{off}  ");
        }
        line.trim_end().to_owned()
    };
    let mut text = format!("\nExternal kernels of running brokers:\n{bold}{}{plain}\n", line(&head, ""));
    for (row, External { kernel, sessions, .. }) in rows.iter().zip(kernels) {
        let state = match kernel.state.as_str() {
            "up" => green,
            "idle" | "starting" => "",
            _ => red,
        };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{}", line(row, state));
        for detail in details(kernel, sessions, now) {
            let _ = writeln!(text, "  {dim}{detail}{plain}");
        }
    }
    text
}

fn row(one: &External) -> [String; 8] {
    let External { broker, kernel, .. } = one;
    [
        printable(&kernel.name),
        printable(&kernel.make),
        printable(&kernel.state),
        kernel.uptime.map_or_else(|| "-".into(), uptime),
        kernel.streams.to_string(),
        kernel.listeners.to_string(),
        kernel.deaths.to_string(),
        broker.to_string(),
    ]
}

fn details(kernel: &KernelReport, sessions: &[String], now: SystemTime) -> Vec<String> {
    let mut details = Vec::new();
    if !kernel.version.is_empty() {
        details.push(printable(&kernel.version));
    }
    if !kernel.services.is_empty() {
        let addresses: Vec<String> = kernel.addresses.iter().map(ToString::to_string).collect();
        let at = if addresses.is_empty() { String::new() } else { format!(" at {}", addresses.join(", ")) };
        details.push(printable(&format!("serves {}{at}", kernel.services.join(", "))));
    }
    if !sessions.is_empty() {
        details.push(printable(&format!("for {}", sessions.join(", "))));
    }
    if let Some(died) = kernel.last_death {
        let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let reason = kernel.last_death_reason.as_deref().unwrap_or("unknown");
        details.push(printable(&format!("down {} ago: {reason}", uptime(now - died))));
    }
    details
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn kernel(name: &str, state: &str) -> External {
        let kernel = KernelReport {
            name: name.into(),
            make: "gvisor".into(),
            state: state.into(),
            version: "Linux 4.4.0".into(),
            services: vec!["tcp-connect".into(), "tcp-listen".into()],
            addresses: vec![std::net::Ipv4Addr::new(10, 0, 0, 2).into()],
            streams: 3,
            listeners: 1,
            uptime: (state == "up").then_some(61.0),
            deaths: 2,
            last_death: Some(100.0),
            last_death_reason: Some("its channel\x1b ended".into()),
        };
        External { broker: 77, sessions: vec!["web".into()], kernel }
    }

    #[test]
    fn people_see_each_kernel_and_its_last_death() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(105);
        let text = table(&[kernel("a", "up"), kernel("second", "down")], false, now);
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines.contains(&"NAME    MAKE    STATE  UP     STREAMS  LISTENERS  DEATHS  BROKER"),
            "{text}"
        );
        assert!(lines.contains(&"a       gvisor  up     1m01s  3        1          2       77"), "{text}");
        assert!(lines.contains(&"second  gvisor  down   -      3        1          2       77"), "{text}");
        assert!(lines.contains(&"  serves tcp-connect, tcp-listen at 10.0.0.2"), "{text}");
        assert!(lines.contains(&"  down 5s ago: its channel? ended"), "{text}");
        assert!(!text.contains('\x1b'));
        assert!(table(&[kernel("a", "up")], true, now).contains("\x1b[32mup"), "state in colour");
        assert_eq!(table(&[], true, now), "");
    }
}
