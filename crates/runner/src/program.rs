//! Starting a program under the filter, without namespaces: in a guest, which is one already.
//!
//! ```text
//!   supervisor                      program
//!     | -- fork ----------------------> |
//!     |                                 |  prepares: terminal, standard streams, directory
//!     | <---------- Filtered + notifier |  the filter is on
//!     | -- Go ------------------------> |  becomes its user, exec
//!     | <------- (closed), or Failed    |
//! ```

use crate::sandbox::channel::{Channel, Message};
use crate::sandbox::init;
use kso_sys::notify::{self, Rule};
use kso_sys::process::{self, Child, Signals};
use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_gid, set_thread_groups, set_thread_uid};
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

/// What to run.
#[derive(Debug)]
pub struct ProgramConfig {
    /// Program and arguments.
    pub command: Vec<OsString>,
    /// Its whole environment.
    pub environment: Vec<(OsString, OsString)>,
    /// Its working directory.
    pub directory: PathBuf,
    /// Its user, group and further groups; `None`: ours.
    pub identity: Option<(u32, u32, Vec<u32>)>,
    /// The filter.
    pub filter: Vec<Rule>,
    /// Soft and hard limit of its open files.
    pub open_files: (u64, u64),
}

/// A program that is about to start, or runs.
#[derive(Debug)]
pub struct Program {
    /// Its first process.
    pub child: Child,
    /// The filter's other end, until it is taken.
    pub notifier: Option<OwnedFd>,
    channel: Channel,
}

/// Why a program does not run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotStarted {
    /// For a person.
    pub reason: String,
    /// Exit status: 125, 126 or 127, as `docker run` has them.
    pub status: u8,
}

impl Program {
    /// Forks it; it waits for [`Self::go`]. `prepare` runs in it first. This process must have one thread.
    ///
    /// # Errors
    /// It could not be forked or prepared, or the kernel refuses the filter.
    pub fn start(
        config: &ProgramConfig,
        signals: &Signals,
        prepare: impl FnOnce() -> io::Result<()>,
    ) -> Result<Self, NotStarted> {
        let failed = |reason: String| NotStarted { reason, status: 125 };
        let error = |error: io::Error| failed(format!("cannot start the program: {error}"));
        let (ours, theirs) = Channel::pair().map_err(error)?;
        let child = process::fork(0, || {
            let not_started = become_program(config, signals, &theirs, prepare);
            // The status tells what the text cannot.
            let _ = theirs.send(Message::Failed(not_started.reason), &[]);
            i32::from(not_started.status)
        })
        .map_err(error)?;
        drop(theirs);
        match ours.receive().map_err(error)? {
            Some((Message::Filtered, mut descriptors)) => {
                let notifier = descriptors.pop_front();
                Ok(Self { child, notifier, channel: ours })
            }
            Some((Message::Failed(reason), _)) => Err(failed(reason)),
            _ => Err(failed("the program's process went away".into())),
        }
    }

    /// Lets it become the program.
    ///
    /// # Errors
    /// It is gone.
    pub fn go(&self) -> io::Result<()> {
        self.channel.send(Message::Go, &[])
    }

    /// Readable once [`Self::started`] can tell.
    #[must_use]
    pub fn started_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }

    /// Whether it became the program. Waits until that is known.
    ///
    /// # Errors
    /// It did not, and its process has ended.
    pub fn started(&self) -> Result<(), NotStarted> {
        match self.channel.receive() {
            Ok(Some((Message::Failed(reason), _))) => {
                let status = match process::wait(Some(self.child.pid)) {
                    Ok(Some((_, ended))) => u8::try_from(ended.shell_status()).unwrap_or(125),
                    _ => 125,
                };
                Err(NotStarted { reason, status })
            }
            _ => Ok(()),
        }
    }
}

/// Returns only if it could not.
fn become_program(
    config: &ProgramConfig,
    signals: &Signals,
    channel: &Channel,
    prepare: impl FnOnce() -> io::Result<()>,
) -> NotStarted {
    let failed =
        |what: &str, error: io::Error| NotStarted { reason: format!("cannot {what}: {error}"), status: 125 };
    let Some((program, arguments)) = config.command.split_first() else {
        return NotStarted { reason: "there is no program to run".into(), status: 125 };
    };
    if let Err(error) = prepare() {
        return failed("make the program's surroundings", error);
    }
    if let Err(error) = std::env::set_current_dir(&config.directory) {
        return failed(&format!("enter the working directory {}", config.directory.display()), error);
    }
    let (soft, hard) = config.open_files;
    let _ = process::set_open_files_limit(soft, hard);
    // While it is root: a filter needs privilege, or no-new-privs, which would take sudo away.
    let filtered = notify::install(&config.filter)
        .and_then(|notifier| channel.send(Message::Filtered, &[notifier.as_fd()]));
    if let Err(error) = filtered {
        return failed("install the seccomp filter", error);
    }
    match channel.receive() {
        Ok(Some((Message::Go, _))) => {}
        _ => return failed("start the program", io::ErrorKind::ConnectionAborted.into()),
    }
    if let Some((user, group, groups)) = &config.identity
        && let Err(error) = change_identity(*user, *group, groups)
    {
        return failed(&format!("become user {user} and group {group}"), error);
    }
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(config.environment.iter().map(|(name, value)| (name, value)));
    process::default_sigpipe();
    signals.restore_mask();
    let error = command.exec();
    NotStarted {
        reason: format!("cannot run {}: {error}", program.display()),
        status: u8::try_from(init::not_executed(&error)).unwrap_or(125),
    }
}

/// For good: of this, the only thread.
fn change_identity(user: u32, group: u32, groups: &[u32]) -> io::Result<()> {
    let groups: Vec<Gid> = groups.iter().map(|&group| Gid::from_raw(group)).collect();
    set_thread_groups(&groups)?;
    set_thread_gid(Gid::from_raw(group))?;
    Ok(set_thread_uid(Uid::from_raw(user))?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn config(words: &[&str]) -> ProgramConfig {
        ProgramConfig {
            command: words.iter().map(OsString::from).collect(),
            environment: vec![("PATH".into(), "/usr/bin:/bin".into())],
            directory: "/".into(),
            identity: None,
            filter: vec![],
            open_files: (64, 64),
        }
    }

    /// Tests have several threads, and so cannot fork: the part behind the fork is called in a process of its own by the
    /// tests of guests. What is left is that it is refused.
    #[test]
    fn a_process_with_threads_is_refused() {
        let signals = Signals::take(&[]).unwrap();
        let refused = Program::start(&config(&["true"]), &signals, || Ok(())).unwrap_err();
        assert_eq!(refused.status, 125);
    }
}
