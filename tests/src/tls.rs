//! A certificate authority of the test's own, made with openssl(1).

use std::path::{Path, PathBuf};
use std::process::Command;

/// A CA and a server certificate for the origin's names and addresses.
#[derive(Debug)]
pub struct Authority {
    /// The CA's certificate.
    pub ca: PathBuf,
    /// The server's certificate.
    pub certificate: PathBuf,
    /// The server's key.
    pub key: PathBuf,
}

fn openssl(directory: &Path, arguments: &str) {
    let output = Command::new("openssl")
        .args(arguments.split_whitespace())
        .current_dir(directory)
        .output()
        .expect("openssl(1) runs");
    assert!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

impl Authority {
    /// Makes both in `directory`.
    pub(crate) fn new(directory: &Path) -> Self {
        openssl(
            directory,
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 -subj /CN=kso-test-ca \
             -keyout ca.key -out ca.pem",
        );
        openssl(
            directory,
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 -subj /CN=origin.test \
             -addext subjectAltName=DNS:origin.test,DNS:*.origin.test,DNS:v4.test,DNS:v6.test,DNS:other.test,IP:10.77.0.2,IP:fd77::2 \
             -addext basicConstraints=critical,CA:FALSE \
             -CA ca.pem -CAkey ca.key -keyout server.key -out server.pem",
        );
        Self {
            ca: directory.join("ca.pem"),
            certificate: directory.join("server.pem"),
            key: directory.join("server.key"),
        }
    }
}
