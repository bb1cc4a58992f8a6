//! Running commands with a time limit, in the foreground and in the background.

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use std::ffi::OsString;
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A command to run natively or under kso.
#[derive(Clone, Debug)]
pub struct Cmd {
    pub(crate) argv: Vec<String>,
    pub(crate) environment: Vec<(String, String)>,
    pub(crate) directory: Option<String>,
    pub(crate) stdin: Vec<u8>,
    pub(crate) hold: bool,
    pub(crate) limit: Duration,
}

/// A command from its words.
pub fn argv<S: Into<String>>(words: impl IntoIterator<Item = S>) -> Cmd {
    Cmd {
        argv: words.into_iter().map(Into::into).collect(),
        environment: Vec::new(),
        directory: None,
        stdin: Vec::new(),
        hold: false,
        limit: Duration::from_secs(60),
    }
}

/// A shell command.
pub fn sh(script: impl Into<String>) -> Cmd {
    argv(["sh".to_owned(), "-c".to_owned(), script.into()])
}

impl Cmd {
    /// With one more argument.
    #[must_use]
    pub fn arg(mut self, argument: impl Into<String>) -> Self {
        self.argv.push(argument.into());
        self
    }

    /// With a variable set.
    #[must_use]
    pub fn env(mut self, key: &str, value: impl Into<String>) -> Self {
        self.environment.push((key.to_owned(), value.into()));
        self
    }

    /// With standard input.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// With standard input that stays open until [`Running::release`].
    #[must_use]
    pub fn hold(mut self) -> Self {
        self.hold = true;
        self
    }

    /// In a directory.
    #[must_use]
    pub fn cwd(mut self, directory: impl Into<String>) -> Self {
        self.directory = Some(directory.into());
        self
    }

    /// With another time limit than a minute.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// With `words` before it.
    #[must_use]
    pub fn prefixed<S: Into<String>>(mut self, words: impl IntoIterator<Item = S>) -> Self {
        self.argv = words.into_iter().map(Into::into).chain(self.argv).collect();
        self
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.argv[0]);
        command.args(&self.argv[1..]).process_group(0);
        command.envs(self.environment.iter().map(|(k, v)| (OsString::from(k), OsString::from(v))));
        if let Some(directory) = &self.directory {
            command.current_dir(directory);
        }
        command
    }

    /// Starts it in the background, its output collected.
    pub fn spawn(&self) -> Running {
        let child = self
            .command()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{:?}: {error}", self.argv));
        Running::new(child, self)
    }

    /// Runs it to its end, or to its time limit.
    pub fn run(&self) -> Output {
        self.spawn().finish(self.limit)
    }
}

/// What a command printed and how it ended.
#[derive(Clone, Debug)]
pub struct Output {
    /// The command.
    pub argv: Vec<String>,
    /// What it wrote.
    pub stdout: Vec<u8>,
    /// What it complained.
    pub stderr: Vec<u8>,
    /// `None`: it was killed at its time limit.
    pub status: Option<ExitStatus>,
    /// How long it took.
    pub elapsed: Duration,
}

impl Output {
    /// Its exit code, if it exited.
    pub fn code(&self) -> Option<i32> {
        self.status.and_then(|status| status.code())
    }

    /// The signal that ended it, if one did.
    pub fn signal(&self) -> Option<i32> {
        self.status.and_then(|status| status.signal())
    }

    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Everything, for a failure message.
    pub fn report(&self) -> String {
        let ending = match self.status {
            None => "KILLED at its time limit".to_owned(),
            Some(status) => status.to_string(),
        };
        format!(
            "$ {}\n{ending} after {:?}\n--- stdout\n{}\n--- stderr\n{}",
            self.argv.join(" "),
            self.elapsed,
            tail(&self.text()),
            tail(&self.errors())
        )
    }

    /// Panics unless it exited with 0; gives itself back.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert!(self.code() == Some(0), "failed: {}", self.report());
        self
    }

    /// Panics unless it exited with `code`.
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        assert!(self.code() == Some(code), "expected exit status {code}: {}", self.report());
        self
    }

    /// Panics unless standard output contains `text`.
    #[track_caller]
    pub fn shows(self, text: &str) -> Self {
        assert!(self.text().contains(text), "expected {text:?} in stdout: {}", self.report());
        self
    }

    /// Panics unless standard error contains `text`.
    #[track_caller]
    pub fn complains(self, text: &str) -> Self {
        assert!(self.errors().contains(text), "expected {text:?} in stderr: {}", self.report());
        self
    }
}

fn tail(text: &str) -> &str {
    let cut = text.len().saturating_sub(6000);
    let cut = (cut..text.len()).find(|&i| text.is_char_boundary(i)).unwrap_or(cut);
    text.get(cut..).unwrap_or(text)
}

type Shared = Arc<Mutex<Vec<u8>>>;

/// A command in the background. Dropped, its process group is killed.
#[derive(Debug)]
pub struct Running {
    child: Child,
    argv: Vec<String>,
    stdin: Option<ChildStdin>,
    stdout: Shared,
    stderr: Shared,
    readers: Vec<JoinHandle<()>>,
    start: Instant,
    ended: bool,
}

fn collect(mut from: impl Read + Send + 'static, into: Shared) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut buffer = [0; 65536];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            into.lock().expect("no reader panics").extend_from_slice(&buffer[..n]);
        }
    })
}

impl Running {
    fn new(mut child: Child, cmd: &Cmd) -> Self {
        let (stdout, stderr) = (Shared::default(), Shared::default());
        let mut readers = Vec::new();
        if let Some(pipe) = child.stdout.take() {
            readers.push(collect(pipe, stdout.clone()));
        }
        if let Some(pipe) = child.stderr.take() {
            readers.push(collect(pipe, stderr.clone()));
        }
        let mut stdin = child.stdin.take();
        if let Some(mut pipe) = stdin.take_if(|_| !cmd.hold) {
            let bytes = cmd.stdin.clone();
            std::thread::spawn(move || pipe.write_all(&bytes));
        }
        Self {
            child,
            argv: cmd.argv.clone(),
            stdin,
            stdout,
            stderr,
            readers,
            start: Instant::now(),
            ended: false,
        }
    }

    /// Its process id: of kso itself when it runs under kso (`ip netns exec` executes in place).
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn raw(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Sends a signal to the process alone.
    pub fn signal(&self, signal: Signal) {
        let _ = kill_process(self.raw(), signal);
    }

    /// Writes to a standard input that is held open.
    pub fn send(&mut self, text: &str) {
        self.stdin.as_mut().expect("held").write_all(text.as_bytes()).expect("it reads");
    }

    /// Closes a standard input that is held open.
    pub fn release(&mut self) {
        self.stdin = None;
    }

    /// What it wrote so far.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout.lock().expect("no reader panics")).into_owned()
    }

    /// What it complained so far.
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr.lock().expect("no reader panics")).into_owned()
    }

    /// Whether it still runs.
    pub fn running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits until its output contains `text`; panics when it ends first or after twenty seconds
    /// (longer for a guest).
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) {
        let start = Instant::now();
        let limit = crate::Client::current().patience(Duration::from_secs(20));
        loop {
            if self.text().contains(text) || self.errors().contains(text) {
                return;
            }
            let ended = !self.running();
            if (ended && !self.text().contains(text)) || start.elapsed() > limit {
                std::thread::sleep(Duration::from_millis(50));
                if self.text().contains(text) || self.errors().contains(text) {
                    return;
                }
                let why = if ended { "it ended" } else { "the time was over" };
                panic!(
                    "{why} before {text:?} came: {}\n--- stdout\n{}\n--- stderr\n{}",
                    self.argv.join(" "),
                    self.text(),
                    self.errors()
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for its end; kills its process group at the limit.
    pub fn finish(mut self, limit: Duration) -> Output {
        self.stdin = None;
        let mut status = None;
        while self.start.elapsed() < limit {
            if let Ok(Some(ended)) = self.child.try_wait() {
                status = Some(ended);
                break;
            }
            std::thread::sleep(Duration::from_millis(3));
        }
        let elapsed = self.start.elapsed();
        if status.is_none() {
            let _ = kill_process_group(self.raw(), Signal::KILL);
            let _ = self.child.wait();
        }
        self.ended = true;
        // A process left behind would hold the pipes: then the readers never end, which is a leak to report.
        let end = Instant::now();
        while !self.readers.iter().all(JoinHandle::is_finished) {
            if end.elapsed() > Duration::from_secs(5) {
                panic!(
                    "something still holds the output of {} after its end ({status:?})\n{}\n{}",
                    self.argv.join(" "),
                    self.text(),
                    self.errors()
                );
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let stdout = self.stdout.lock().expect("no reader panics").clone();
        let stderr = self.stderr.lock().expect("no reader panics").clone();
        Output { argv: self.argv.clone(), stdout, stderr, status, elapsed }
    }

    /// Sends SIGTERM and waits for the end.
    pub fn terminate(self) -> Output {
        self.signal(Signal::TERM);
        let limit = self.start.elapsed() + Duration::from_secs(15);
        self.finish(limit)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.ended {
            let _ = kill_process_group(self.raw(), Signal::KILL);
            let _ = self.child.wait();
        }
    }
}
