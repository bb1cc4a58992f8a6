//! The user's terminal, raw while the guest's program has one of its own.

use kso_wire::job::WindowSize;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// A terminal in raw mode. Dropping it restores what was.
#[derive(Debug)]
pub struct RawTerminal {
    terminal: OwnedFd,
    before: Termios,
}

impl RawTerminal {
    /// Keys go to the guest as they are: its terminal gives them their meaning.
    pub fn enter(terminal: impl AsFd) -> io::Result<Self> {
        let terminal = terminal.as_fd().try_clone_to_owned()?;
        let before = tcgetattr(&terminal)?;
        let entered = Self { terminal, before };
        entered.again()?;
        Ok(entered)
    }

    /// Raw again after [`Self::restore`].
    pub fn again(&self) -> io::Result<()> {
        let mut raw = self.before.clone();
        raw.make_raw();
        // What was typed ahead is kept.
        Ok(tcsetattr(&self.terminal, OptionalActions::Drain, &raw)?)
    }

    /// As it was before.
    pub fn restore(&self) {
        let _ = tcsetattr(&self.terminal, OptionalActions::Drain, &self.before);
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        self.restore();
    }
}

/// The size of a terminal; 80 by 24 for one that does not know.
pub fn size(terminal: impl AsFd) -> WindowSize {
    match tcgetwinsize(terminal) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => {
            WindowSize { rows: size.ws_row, columns: size.ws_col }
        }
        _ => WindowSize { rows: 24, columns: 80 },
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::LocalModes;

    #[test]
    fn a_terminal_is_raw_only_as_long_as_it_must_be() {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let path = ptsname(&master, Vec::new()).unwrap();
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY;
        let terminal = rustix::fs::open(path, flags, rustix::fs::Mode::empty()).unwrap();
        let canonical = || tcgetattr(&terminal).unwrap().local_modes.contains(LocalModes::ICANON);
        assert!(canonical());
        let raw = RawTerminal::enter(&terminal).unwrap();
        assert!(!canonical());
        raw.restore();
        assert!(canonical());
        raw.again().unwrap();
        assert!(!canonical());
        drop(raw);
        assert!(canonical());
        assert_eq!(size(&terminal), WindowSize { rows: 24, columns: 80 });
    }
}
