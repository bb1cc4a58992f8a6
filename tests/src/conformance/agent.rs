//! Programs that take locks as they are told (`tests/programs/locker.py`), on several kernels at once.

use crate::{Cmd, Running, argv, program, seconds};
use std::path::Path;
use std::time::{Duration, Instant};

/// One of them.
#[derive(Debug)]
pub struct Agent {
    name: String,
    running: Running,
    asked: u32,
    interruptible: bool,
}

/// A lock by three interfaces.
const KINDS: [&str; 3] = ["posix", "ofd", "flock"];

impl Agent {
    /// The command that is to be spawned where the agent shall be.
    pub fn command(file: &Path) -> Cmd {
        argv(["/usr/bin/python3", "-u", &program("locker.py"), &file.display().to_string()]).hold()
    }

    /// A spawned one.
    pub fn new(name: &str, running: Running) -> Self {
        Self { name: name.to_owned(), running, asked: 0, interruptible: true }
    }

    /// On a kernel that waits for locks deaf to signals: virtiofs sends no interrupts (fs/fuse/virtio_fs.c).
    #[must_use]
    pub fn not_interrupted(mut self) -> Self {
        self.interruptible = false;
        self
    }

    /// Sends a command, and returns the number by which its answer is known.
    pub fn send(&mut self, command: &str) -> u32 {
        self.asked += 1;
        let number = self.asked;
        self.running.send(&format!("{number} {command}\n"));
        number
    }

    fn answer_to(&self, number: u32) -> Option<String> {
        let start = format!("{number}: ");
        self.running.text().lines().find_map(|line| Some(line.strip_prefix(&start)?.to_owned()))
    }

    /// Waits for an answer.
    #[track_caller]
    pub fn wait(&mut self, number: u32) -> String {
        // There are hundreds of them: each is looked for often.
        let start = Instant::now();
        while self.answer_to(number).is_none() {
            assert!(self.running.running(), "{} ended: {}", self.name, self.running.errors());
            assert!(start.elapsed() < seconds(120), "{} does not answer {number}", self.name);
            std::thread::sleep(Duration::from_micros(500));
        }
        self.answer_to(number).unwrap_or_default()
    }

    /// Sends a command and waits for its answer.
    #[track_caller]
    pub fn ask(&mut self, command: &str) -> String {
        let number = self.send(command);
        self.wait(number)
    }

    #[track_caller]
    fn must(&mut self, command: &str, expected: &str) {
        let answer = self.ask(command);
        assert_eq!(answer, expected, "{}: {command}", self.name);
    }

    /// Ends it.
    pub fn finish(self) {
        // Counted from its start.
        self.running.finish(seconds(900)).ok();
    }
}

/// Checks, for each two agents and each kind of lock, that what one holds the other does not get until it is let go of. All have
/// the same file open, and each is on a kernel of its own, or by a mount of its own.
#[track_caller]
pub fn locks_are_shared(agents: &mut [Agent]) {
    for one in 0..agents.len() {
        for other in 0..agents.len() {
            if one == other {
                continue;
            }
            let [first, second] = agents.get_disjoint_mut([one, other]).expect("two of them");
            for kind in KINDS {
                exclusive(first, second, kind);
                shared(first, second, kind);
                waited_for(first, second, kind);
                died(first, second, kind);
            }
            if second.interruptible {
                interrupted(first, second);
            }
            apart(first, second);
        }
    }
    for agent in agents {
        own_processes(agent);
    }
}

fn exclusive(first: &mut Agent, second: &mut Agent, kind: &str) {
    first.must(&format!("{kind} w 0 10"), "ok");
    second.must(&format!("{kind} w 5 10"), "EAGAIN");
    second.must(&format!("{kind} r 0 1"), "EAGAIN");
    if kind != "flock" {
        second.must(&format!("{kind} w 10 5"), "ok");
        first.must(&format!("{kind} w 0 0"), "EAGAIN");
        // The holder is a process of another kernel: none that could be named.
        let answer = second.ask(&format!("get {kind} w 0 5"));
        assert!(matches!(answer.as_str(), "w 0 10 0" | "w 0 10 -1"), "{}: {answer}", second.name);
        second.must(&format!("{kind} u 10 5"), "ok");
        // A hole in the middle.
        first.must(&format!("{kind} u 3 2"), "ok");
        second.must(&format!("{kind} w 3 2"), "ok");
        second.must(&format!("{kind} w 2 2"), "EAGAIN");
        second.must(&format!("{kind} u 0 0"), "ok");
    }
    first.must(&format!("{kind} u 0 0"), "ok");
    second.must(&format!("{kind} w 0 0"), "ok");
    second.must(&format!("{kind} u 0 0"), "ok");
}

fn shared(first: &mut Agent, second: &mut Agent, kind: &str) {
    first.must(&format!("{kind} r 0 10"), "ok");
    second.must(&format!("{kind} r 0 10"), "ok");
    first.must(&format!("{kind} w 0 10"), "EAGAIN");
    second.must(&format!("{kind} u 0 10"), "ok");
    // An upgrade of flock(2) that failed has let go of the lock, as flock(2) says.
    first.must(&format!("{kind} w 0 10"), "ok");
    first.must(&format!("{kind} u 0 10"), "ok");
}

fn waited_for(first: &mut Agent, second: &mut Agent, kind: &str) {
    for release in [format!("{kind} u 0 10"), "reopen".to_owned()] {
        first.must(&format!("{kind} w 0 10"), "ok");
        let waiting = second.send(&format!("wait {kind} w 0 10"));
        // It has come to the waiting when it answers to another question behind that.
        second.must("pass", "ok");
        assert_eq!(second.answer_to(waiting), None, "{} has what is held", second.name);
        first.must(&release, "ok");
        assert_eq!(second.wait(waiting), "ok", "{} waited", second.name);
        first.must(&format!("{kind} r 0 10"), "EAGAIN");
        second.must(&format!("{kind} u 0 10"), "ok");
    }
}

fn died(first: &mut Agent, second: &mut Agent, kind: &str) {
    let answer = first.ask(&format!("child {kind} w 0 10"));
    assert!(answer.starts_with("ok "), "{}: {answer}", first.name);
    second.must(&format!("{kind} w 0 10"), "EAGAIN");
    first.must("kill", "ok");
    second.must(&format!("wait {kind} w 0 10"), "ok");
    second.must(&format!("{kind} u 0 10"), "ok");
}

fn interrupted(first: &mut Agent, second: &mut Agent) {
    first.must("posix w 0 10", "ok");
    second.must("interrupted posix w 0 10", "EINTR");
    first.must("posix u 0 10", "ok");
    // What was interrupted is not got later.
    first.must("posix w 0 10", "ok");
    first.must("posix u 0 10", "ok");
}

/// flock(2) and fcntl(2) know nothing of each other.
fn apart(first: &mut Agent, second: &mut Agent) {
    first.must("flock w 0 0", "ok");
    second.must("posix w 0 0", "ok");
    first.must("flock u 0 0", "ok");
    second.must("posix u 0 0", "ok");
}

/// Of its own kernel's processes a program is told which one holds a lock.
fn own_processes(agent: &mut Agent) {
    let answer = agent.ask("child posix w 3 7");
    let child = answer.strip_prefix("ok ").unwrap_or_else(|| panic!("{}: {answer}", agent.name)).to_owned();
    agent.must("get posix r 0 0", &format!("w 3 7 {child}"));
    agent.must("get posix r 0 3", "free");
    agent.must("kill", "ok");
}
