//! What a person sees on standard error.

use std::io::{IsTerminal, Write};
use tracing_subscriber::EnvFilter;

/// Logs go to standard error: warnings by default, more with `-v`, or as `KSO_LOG` says.
pub fn init_logs(verbosity: u8) {
    let default = match verbosity {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    start_logs(EnvFilter::try_from_env("KSO_LOG").unwrap_or_else(|_| EnvFilter::new(default)));
}

/// Logs of a guest go to its console, at the level that the launcher told.
pub fn init_guest_logs(level: &str) {
    start_logs(EnvFilter::new(level));
}

fn start_logs(filter: EnvFilter) {
    // A second call (in a test) changes nothing.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(colour())
        .with_target(false)
        .try_init();
}

/// Whether standard error takes colour: a terminal, and no `NO_COLOR`.
pub fn colour() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none()
}

/// Prints an error with its causes, without those that the line before says already.
pub fn error(error: &anyhow::Error) {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    let (red, plain) = if colour() { ("\x1b[1;31m", "\x1b[0m") } else { ("", "") };
    let _ = writeln!(std::io::stderr(), "{red}kso:{plain} {text}");
}
