//! Random operations (`tests/programs/randomfs.c`), which give the same wherever they are performed.

use crate::{Cmd, argv, c_program};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// A sequence of operations.
#[derive(Clone, Copy, Debug)]
pub struct RandomRun {
    /// Which.
    pub seed: u64,
    /// How many.
    pub count: u32,
}

impl RandomRun {
    /// Those that a test asks for, unless `KSO_TEST_SEED` (a number, or `random`) and `KSO_TEST_OPERATIONS` say otherwise.
    pub fn new(seed: u64, count: u32) -> Self {
        let seed = match std::env::var("KSO_TEST_SEED").as_deref() {
            Ok("random") => std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(seed, |now| u64::from(now.subsec_nanos()) ^ now.as_secs()),
            Ok(text) => text.parse().expect("KSO_TEST_SEED is a number, or random"),
            Err(_) => seed,
        };
        let count = std::env::var("KSO_TEST_OPERATIONS")
            .map_or(count, |text| text.parse().expect("KSO_TEST_OPERATIONS is a number"));
        println!("KSO_TEST_SEED={seed} KSO_TEST_OPERATIONS={count}");
        Self { seed, count }
    }

    /// The command that performs them below a directory, which is made. `left_out`: what FUSE of this kernel or in this mode cannot
    /// do; the program says.
    pub fn command(self, directory: &Path, left_out: &str) -> Cmd {
        fs::create_dir(directory).expect("a directory");
        fs::set_permissions(directory, fs::Permissions::from_mode(0o777)).expect("chmod");
        let (program, directory) = (c_program("randomfs"), directory.display().to_string());
        argv([program, self.seed.to_string(), self.count.to_string(), directory, left_out.to_owned()])
    }

    /// Panics, with the first difference, unless two runs gave the same.
    #[track_caller]
    pub fn compare(self, what: &str, native: &str, other: &str) {
        let (mut ours, mut theirs) = (native.lines(), other.lines());
        let mut before: Vec<&str> = Vec::new();
        loop {
            let (one, another) = (ours.next(), theirs.next());
            assert!(
                one == another,
                "{what}: seed {} differs\nbefore:\n  {}\nnatively:\n  {}\nhere:\n  {}",
                self.seed,
                before.join("\n  "),
                one.unwrap_or("(nothing)"),
                another.unwrap_or("(nothing)")
            );
            let Some(line) = one else { return };
            before.push(line);
            if before.len() > 40 {
                before.remove(0);
            }
        }
    }
}

/// The command that tells all that is to be seen of a directory.
pub fn tree(directory: &Path) -> Cmd {
    argv([c_program("randomfs"), "tree".to_owned(), directory.display().to_string()])
}
