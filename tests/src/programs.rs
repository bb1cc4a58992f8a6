//! Guest programs: their sources are in `tests/programs`, their binaries in `target/kso-tests`.

use rustix::fs::{FlockOperation, flock};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The path of a source or script in `tests/programs`.
pub fn program(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs").join(name);
    assert!(path.exists(), "{} is missing", path.display());
    path.display().to_string()
}

pub(crate) fn output_directory() -> PathBuf {
    let target = crate::world::target_directory();
    let directory = target.parent().unwrap_or(&target).join("kso-tests");
    fs::create_dir_all(&directory).expect("the target directory can be written");
    directory
}

/// Builds `source` into `output` unless that is newer; tests in parallel wait for each other.
fn build(source: &str, output: &Path, compile: impl FnOnce(&Path) -> Command) {
    let newer = |path: &Path| fs::metadata(path).and_then(|m| m.modified()).ok();
    let lock = File::create(output.with_extension("lock")).expect("a lock file");
    flock(&lock, FlockOperation::LockExclusive).expect("flock works");
    if newer(output) > newer(Path::new(source)) {
        return;
    }
    let fresh = output.with_extension("new");
    let result = compile(&fresh).output().unwrap_or_else(|error| panic!("the compiler of {source}: {error}"));
    assert!(
        result.status.success(),
        "{source}: {}{}",
        String::from_utf8_lossy(&result.stdout),
        String::from_utf8_lossy(&result.stderr)
    );
    fs::rename(&fresh, output).expect("the binary can be put in place");
}

/// Compiles `tests/programs/NAME.c`; the path of the binary.
pub fn c_program(name: &str) -> String {
    let source = program(&format!("{name}.c"));
    let output = output_directory().join(name.replace('/', "-"));
    build(&source, &output, |to| {
        let mut cc = Command::new("cc");
        cc.args(["-O1", "-g", "-Wall", "-Wno-unused-result", "-pthread", "-o"]).arg(to).arg(&source);
        cc
    });
    output.display().to_string()
}

/// Compiles `tests/programs/NAME.go` to a static binary, offline, with the standard library alone.
pub fn go_program(name: &str) -> String {
    let source = program(&format!("{name}.go"));
    let directory = output_directory();
    let output = directory.join(format!("{name}-go"));
    build(&source, &output, |to| {
        let mut go = Command::new("go");
        go.args(["build", "-o"]).arg(to).arg(&source);
        go.env("CGO_ENABLED", "0").env("GOFLAGS", "-mod=mod").env("GOPROXY", "off").env("GO111MODULE", "off");
        go.env("GOCACHE", directory.join("go-cache"));
        go
    });
    output.display().to_string()
}

/// Compiles `tests/programs/NAME.java`; the directory of its classes.
pub fn java_program(name: &str) -> String {
    let source = program(&format!("{name}.java"));
    let output = output_directory().join(format!("{name}-classes"));
    build(&source, &output, |to| {
        let _ = fs::remove_dir_all(&output);
        let _ = fs::remove_dir_all(to);
        let mut javac = Command::new("javac");
        javac.arg("-d").arg(to).arg(&source);
        javac
    });
    output.display().to_string()
}
