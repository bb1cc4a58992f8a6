//! pjdfstest: what POSIX says of files, some hundred cases.

use crate::{Cmd, argv};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// What became of each case: `ok`, `fail` or `skip`.
pub type Results = BTreeMap<String, String>;

/// Users and groups that every Debian has, and the features that Linux's file systems have.
const CONFIGURATION: &str = r#"
[features]
posix_fallocate = {}
rename_ctime = {}
stat_st_birthtime = {}
utime_now = {}
utimensat = {}

[settings]
naptime = 0.02
allow_remount = false
expected_failures = []

[dummy_auth]
entries = [ENTRIES]
"#;

/// The suite, where any program can execute it.
#[derive(Clone, Debug)]
pub struct Pjdfstest {
    program: PathBuf,
    configuration: PathBuf,
}

impl Pjdfstest {
    /// Copies the program (`scripts/install-deps test` installs it) to `directory`, which guests see.
    pub fn new(directory: &Path) -> Self {
        let home = std::env::var("HOME").unwrap_or_else(|_| "/root".to_owned());
        let installed = Path::new(&home).join(".cache/kso/tools/bin/pjdfstest");
        assert!(installed.exists(), "{} is missing: `make deps`", installed.display());
        let (program, configuration) = (directory.join("pjdfstest"), directory.join("pjdfstest.toml"));
        fs::copy(installed, &program).expect("a copy");
        let entries = r#"["nobody", "nogroup"], ["www-data", "www-data"]"#;
        fs::write(&configuration, CONFIGURATION.replace("ENTRIES", entries)).expect("a file");
        Self { program, configuration }
    }

    /// The command that runs it below a directory, which is made.
    pub fn command(&self, directory: &Path) -> Cmd {
        fs::create_dir(directory).expect("a directory");
        fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).expect("chmod");
        let words = [
            self.program.display().to_string(),
            "-c".to_owned(),
            self.configuration.display().to_string(),
            "-s".to_owned(),
            "/dev/shm".to_owned(),
            "-p".to_owned(),
            directory.display().to_string(),
        ];
        argv(words).env("NO_COLOR", "1")
    }
}

/// Reads what it printed.
pub fn parse(text: &str) -> Results {
    let mut results = Results::new();
    for line in text.lines().filter(|line| !line.starts_with(char::is_whitespace)) {
        let mut words = line.split_whitespace();
        let (Some(name), Some(result)) = (words.next(), words.next()) else { continue };
        let result = match result {
            "ok" => "ok",
            "FAILED" => "fail",
            "skipped" => "skip",
            _ => continue,
        };
        results.insert(format!("test.pjdfstest.{name}"), result.to_owned());
    }
    results
}
