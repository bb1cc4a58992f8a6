//! `kso doctor`: what can run on this machine, and what is missing. Each line is tried, not guessed.

mod kernels;
mod run;
mod vm;

use crate::output;
use anyhow::{Result, bail};
use clap::Args;
use serde::Serialize;
use std::fmt::Write as _;
use std::io::{IsTerminal as _, Write as _};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

const EXAMPLES: &str = "\
Examples:
  kso doctor                 everything
  kso doctor vm              only what kso vm needs, with this as exit status
  kso doctor kernel:gvisor   only what this make of external kernel needs
  kso doctor --json | jq '.can'

Everything is tried: namespaces and filters are made, a sandbox runs, a guest boots (which can take some seconds
where it is emulated). Nothing stays behind but what kso vm keeps in its cache, too.

Lines: ok; less (it works, with the drawback that is told); missing (with what to do).
Exit status: 0 if what was asked for can run, 1 if something is missing for it. Without WHAT that is kso run alone:
  the rest is shown, and not everybody wants it.";

/// Options of `kso doctor`.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct DoctorArgs {
    /// One JSON document instead of a table
    #[arg(long)]
    json: bool,

    /// Only this: run, vm, or a make of external kernel (kernel:gvisor, ...)
    #[arg(value_name = "WHAT")]
    what: Vec<String>,
}

/// What came of looking at something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// As it should be.
    Ok,
    /// It works without, in a lesser way.
    Less,
    /// It does not.
    Missing,
}

/// A line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Check {
    name: String,
    state: State,
    /// What was found.
    found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

impl Check {
    fn ok(name: &str, found: impl Into<String>) -> Self {
        Self { name: name.into(), state: State::Ok, found: found.into(), advice: None }
    }

    fn less(name: &str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { name: name.into(), state: State::Less, found: found.into(), advice: Some(advice.into()) }
    }

    fn missing(name: &str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { name: name.into(), state: State::Missing, found: found.into(), advice: Some(advice.into()) }
    }
}

/// What belongs together: something that can run, or cannot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Subject {
    /// As it is asked for.
    name: String,
    /// For a person.
    #[serde(skip)]
    title: String,
    can: bool,
    checks: Vec<Check>,
}

impl Subject {
    fn new(name: &str, title: impl Into<String>, checks: Vec<Check>) -> Self {
        let can = checks.iter().all(|check| check.state != State::Missing);
        Self { name: name.into(), title: title.into(), can, checks }
    }
}

/// Looks at everything that was asked for.
///
/// # Errors
/// There is no such thing.
pub fn run(args: &DoctorArgs) -> Result<ExitCode> {
    output::init_logs(0);
    let known: Vec<String> = ["run", "vm"].map(str::to_owned).into_iter().chain(kernels::names()).collect();
    if let Some(strange) = args.what.iter().find(|what| !known.contains(what)) {
        bail!("there is nothing called {strange} to look at: {}", known.join(", "));
    }
    let wanted = |name: &str| args.what.is_empty() || args.what.iter().any(|what| what == name);
    let mut subjects = Vec::new();
    // First, while this process has one thread: it forks.
    if wanted("run") {
        subjects.push(run::look());
    }
    if wanted("vm") {
        subjects.push(vm::look());
    }
    subjects.extend(kernels::look(wanted));
    let judged = |subject: &&Subject| !args.what.is_empty() || subject.name == "run";
    let can = subjects.iter().filter(judged).all(|subject| subject.can);
    let text = if args.json {
        json(&subjects)?
    } else {
        table(&subjects, std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none())
    };
    // A closed pipe is no error of ours.
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(ExitCode::from(u8::from(!can)))
}

fn json(subjects: &[Subject]) -> Result<String> {
    let can: serde_json::Map<String, serde_json::Value> =
        subjects.iter().map(|subject| (subject.name.clone(), subject.can.into())).collect();
    let document = serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"),
        "can": can,
        "subjects": subjects,
    });
    Ok(format!("{}\n", serde_json::to_string_pretty(&document)?))
}

fn table(subjects: &[Subject], colour: bool) -> String {
    let [bold, red, green, yellow, plain] =
        if colour { ["\x1b[1m", "\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[0m"] } else { [""; 5] };
    let names = subjects.iter().flat_map(|subject| &subject.checks).map(|check| check.name.chars().count());
    let width = names.max().unwrap_or_default();
    // "missing" and the blanks between columns.
    let margin = " ".repeat(2 + 7 + 2 + width + 2);
    let mut text = String::new();
    for subject in subjects {
        let (style, can) = if subject.can { (green, "yes") } else { (red, "no") };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{bold}{}{plain}: {style}{can}{plain}", subject.title);
        for check in &subject.checks {
            let (style, word) = match check.state {
                State::Ok => (green, "ok"),
                State::Less => (yellow, "less"),
                State::Missing => (red, "missing"),
            };
            let lines = check.found.lines().chain(check.advice.iter().flat_map(|advice| advice.lines()));
            let mut lines = lines.filter(|line| !line.trim().is_empty());
            let first = lines.next().unwrap_or_default();
            let line = format!("  {style}{word:7}{plain}  {:width$}  {first}", check.name);
            let _ = writeln!(text, "{}", line.trim_end());
            for line in lines {
                let _ = writeln!(text, "{margin}{line}");
            }
        }
    }
    text
}

/// Runs a command, within a time: what it printed (both streams), and whether it succeeded.
fn attempt(command: &mut Command, limit: Duration) -> Result<String, String> {
    let failed = |error: std::io::Error| error.to_string();
    let mut said = tempfile::tempfile().map_err(failed)?;
    let (out, errors) = (said.try_clone().map_err(failed)?, said.try_clone().map_err(failed)?);
    let mut child = command.stdin(Stdio::null()).stdout(out).stderr(errors).spawn().map_err(failed)?;
    let until = Instant::now() + limit;
    let status = loop {
        match child.try_wait().map_err(failed)? {
            Some(status) => break status,
            None if Instant::now() > until => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("it did not end within {} s", limit.as_secs()));
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let mut text = Vec::new();
    std::io::Seek::rewind(&mut said).map_err(failed)?;
    std::io::Read::read_to_end(&mut said, &mut text).map_err(failed)?;
    let text = String::from_utf8_lossy(&text).trim().to_owned();
    if status.success() { Ok(text) } else { Err(if text.is_empty() { status.to_string() } else { text }) }
}

/// A kso of its own, with these words.
fn own(words: &[&str]) -> Result<Command, String> {
    let program = std::env::current_exe().map_err(|error| format!("cannot find kso itself: {error}"))?;
    let mut command = Command::new(program);
    command.args(words);
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subjects() -> Vec<Subject> {
        let kvm = Check::less("KVM", "/dev/kvm is not there", "guests are emulated");
        let qemu = Check::missing("QEMU", "", "apt-get install qemu\nor another");
        vec![
            Subject::new("run", "kso run", vec![Check::ok("Linux", "6.18"), kvm]),
            Subject::new("vm", "kso vm", vec![qemu]),
        ]
    }

    #[test]
    fn a_table_says_what_to_do() {
        let text = table(&subjects(), false);
        let expected = "kso run: yes\n  ok       Linux  6.18\n  less     KVM    /dev/kvm is not there\n                  guests are emulated\n\
            kso vm: no\n  missing  QEMU   apt-get install qemu\n                  or another\n";
        assert_eq!(text, expected);
        assert!(table(&subjects(), true).contains("\x1b[31mmissing"), "state in colour");
    }

    #[test]
    fn what_is_less_can_run_all_the_same() -> Result<()> {
        let document: serde_json::Value = serde_json::from_str(&json(&subjects())?)?;
        assert_eq!(document.get("can"), Some(&serde_json::json!({ "run": true, "vm": false })));
        let check = document.pointer("/subjects/0/checks/1");
        assert_eq!(check.and_then(|check| check.get("state")), Some(&"less".into()));
        Ok(())
    }

    #[test]
    fn a_command_that_fails_or_hangs_says_so() {
        let shell = |script: &str, limit| attempt(Command::new("sh").args(["-c", script]), limit);
        assert_eq!(shell("echo one", Duration::from_secs(60)), Ok("one".into()));
        assert_eq!(shell("echo why >&2; exit 3", Duration::from_secs(60)), Err("why".into()));
        assert!(
            shell("exec sleep 100", Duration::from_millis(50)).is_err_and(|why| why.contains("end within"))
        );
        assert!(attempt(&mut Command::new("/nonexistent"), Duration::ZERO).is_err());
    }
}
