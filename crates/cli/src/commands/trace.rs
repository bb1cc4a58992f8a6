//! `kso trace`: what sessions do, as they do it.

use super::control;
use anyhow::{Context, Result};
use clap::Args;
use kso_broker::{Lost, Question, event_line};
use kso_core::event::{Event, Kind};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::HashMap;
use std::io::{self, ErrorKind, IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;

/// New brokers are looked for so often.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 300_000_000 };

const EXAMPLES: &str = "\
Examples:
  kso trace                 every session of this user, also those that begin later
  kso trace web             the session that is named (or numbered) so, until it ends
  kso trace --json | jq 'select(.event == \"denied\")'
  kso run --trace -- CMD    from the first connect on";

/// Options of `kso trace`.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct TraceArgs {
    /// One JSON object a line
    #[arg(long)]
    json: bool,

    /// Only the session of this number or name
    #[arg(value_name = "SESSION")]
    session: Option<String>,
}

struct Source {
    stream: UnixStream,
    read: Vec<u8>,
}

enum Flow {
    On,
    End,
}

/// Follows until Ctrl-C, or the end of the session that was named.
///
/// # Errors
/// A broker of another version answers what is not understood.
pub fn run(args: TraceArgs) -> Result<ExitCode> {
    let question = Question::Trace { session: args.session.clone() };
    let mut sources: HashMap<PathBuf, Source> = HashMap::new();
    let colour = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let mut known = false;
    loop {
        for path in control::sockets() {
            if !sources.contains_key(&path)
                && let Some(stream) = control::ask(&path, &question)?
            {
                stream.set_nonblocking(true)?;
                sources.insert(path, Source { stream, read: Vec::new() });
            }
        }
        if let Some(wanted) = &args.session {
            // It ended without a word: its broker was killed.
            let there = is_there(wanted)?;
            if known && !there {
                return Ok(ExitCode::SUCCESS);
            }
            if !known && !there {
                anyhow::bail!("no session is named or numbered {wanted}: see kso ps");
            }
            known = true;
        }
        let paths: Vec<PathBuf> = sources.keys().cloned().collect();
        let mut polled: Vec<PollFd<'_>> =
            sources.values().map(|source| PollFd::new(&source.stream, PollFlags::IN)).collect();
        match poll(&mut polled, Some(&LOOK)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot wait for events"),
        }
        let ready: Vec<bool> = polled.iter().map(|one| !one.revents().is_empty()).collect();
        drop(polled);
        for (path, ready) in paths.iter().zip(ready) {
            if !ready {
                continue;
            }
            let Some(source) = sources.get_mut(path) else { continue };
            let open = source.fill();
            for line in source.lines() {
                if let Flow::End = print(&line, &args, colour)? {
                    return Ok(ExitCode::SUCCESS);
                }
            }
            if !open {
                sources.remove(path);
            }
        }
    }
}

fn is_there(wanted: &str) -> Result<bool> {
    for path in control::sockets() {
        let report = control::ask_once::<kso_broker::Report>(&path, &Question::Ps)?;
        let named = |session: &kso_broker::SessionReport| {
            session.name == wanted || session.session.to_string() == wanted
        };
        if report.is_some_and(|report| report.sessions.iter().any(named)) {
            return Ok(true);
        }
    }
    Ok(false)
}

impl Source {
    /// Reads what is there. False: the broker is gone.
    fn fill(&mut self) -> bool {
        let mut buffer = [0; 16 * 1024];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return false,
                Ok(count) => self.read.extend_from_slice(buffer.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
    }

    fn lines(&mut self) -> Vec<Vec<u8>> {
        let Some(end) = self.read.iter().rposition(|&byte| byte == b'\n') else { return Vec::new() };
        let whole: Vec<u8> = self.read.drain(..=end).collect();
        whole.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()).map(<[u8]>::to_vec).collect()
    }
}

fn print(line: &[u8], args: &TraceArgs, colour: bool) -> Result<Flow> {
    let mut out = io::stdout().lock();
    let event = match serde_json::from_slice::<Event>(line) {
        Ok(event) => event,
        Err(error) => {
            let lost: Lost = serde_json::from_slice(line)
                .map_err(|_| error)
                .context("the broker is of another version of kso")?;
            eprintln!("kso: {} events were lost: this terminal was too slow", lost.lost);
            return Ok(Flow::On);
        }
    };
    let written = if args.json {
        out.write_all(line).and_then(|()| out.write_all(b"\n"))
    } else {
        writeln!(out, "{}", event_line(&event, colour))
    };
    let over = args.session.is_some() && matches!(event.kind, Kind::SessionEnd(_));
    // Who reads us has read enough.
    Ok(if over || written.is_err() { Flow::End } else { Flow::On })
}
