//! A command on a pseudoterminal, as a person would run it.

use crate::Cmd;
use rustix::process::{Pid, Signal, kill_process_group};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A session leader with a controlling terminal of its own.
#[derive(Debug)]
pub struct Pty {
    child: Child,
    control: File,
    screen: Arc<Mutex<Vec<u8>>>,
}

impl Pty {
    /// Starts `cmd` on a terminal of `rows` by `columns`.
    pub fn spawn(cmd: &Cmd, rows: u16, columns: u16) -> Self {
        let control = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("a pty");
        grantpt(&control).expect("grantpt");
        unlockpt(&control).expect("unlockpt");
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let name = ptsname(&control, Vec::new()).expect("ptsname");
        let name = name.to_str().expect("a path").to_owned();
        let terminal = File::options().read(true).write(true).open(&name).expect("the terminal");
        tcsetwinsize(&terminal, size).expect("a size");
        // setsid(1) makes the terminal on its standard input the controlling one, and executes in place.
        let mut command = Command::new("setsid");
        command.arg("--ctty").args(&cmd.argv).envs(cmd.environment.iter().map(|(k, v)| (k, v)));
        command.stdin(terminal.try_clone().expect("dup")).stdout(terminal.try_clone().expect("dup"));
        command.stderr(terminal);
        let child = command.spawn().expect("setsid(1) runs");
        drop(command);
        let control = File::from(control);
        let mut reader = control.try_clone().expect("dup");
        let screen = Arc::<Mutex<Vec<u8>>>::default();
        let into = screen.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // EIO when the last holder of the terminal is gone.
            while let Ok(n @ 1..) = reader.read(&mut buffer) {
                into.lock().expect("no panic").extend_from_slice(&buffer[..n]);
            }
        });
        Self { child, control, screen }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What was printed so far.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.screen.lock().expect("no panic")).into_owned()
    }

    /// Waits until `text` was printed.
    #[track_caller]
    pub fn wait_for(&self, text: &str) {
        let start = Instant::now();
        while !self.text().contains(text) {
            assert!(
                start.elapsed() < Duration::from_secs(15),
                "{text:?} never came on the terminal: {:?}",
                self.text()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Types.
    pub fn send(&mut self, keys: &str) {
        self.control.write_all(keys.as_bytes()).expect("the terminal takes it");
    }

    /// Changes the window's size; the kernel sends SIGWINCH.
    pub fn resize(&self, rows: u16, columns: u16) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.control, size).expect("a size");
    }

    /// Waits for its end.
    #[track_caller]
    pub fn finish(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                return status;
            }
            assert!(start.elapsed() < Duration::from_secs(15), "it does not end: {:?}", self.text());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Pty {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
            let _ = self.child.wait();
        }
    }
}
