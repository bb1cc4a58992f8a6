//! The client's side of the control sockets of running brokers.

use anyhow::{Context, Result};
use kso_broker::{Question, control_sockets, runtime_directory};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A broker that does not answer within this time is left out.
const PATIENCE: Duration = Duration::from_secs(5);

/// The control sockets there are.
pub fn sockets() -> Vec<PathBuf> {
    control_sockets(&runtime_directory()).into_iter().map(|(path, _)| path).collect()
}

/// Asks a broker; its lines are to be read from what is returned. `None`: it is gone.
pub fn ask(path: &Path, question: &Question) -> Result<Option<UnixStream>> {
    let Ok(mut stream) = UnixStream::connect(path) else { return Ok(None) };
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = serde_json::to_vec(question).context("cannot write the question")?;
    line.push(b'\n');
    Ok(stream.write_all(&line).is_ok().then_some(stream))
}

/// Asks a broker for one line.
pub fn ask_once<T: serde::de::DeserializeOwned>(path: &Path, question: &Question) -> Result<Option<T>> {
    let Some(stream) = ask(path, question)? else { return Ok(None) };
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut line = String::new();
    let read = BufReader::new(stream).read_line(&mut line);
    if !matches!(read, Ok(1..)) {
        return Ok(None);
    }
    let answer = serde_json::from_str(&line)
        .with_context(|| format!("{} is of another version of kso", path.display()))?;
    Ok(Some(answer))
}
