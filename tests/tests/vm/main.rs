//! `kso vm` as its user sees it: no VM seems to be there, whatever happens to it.
//!
//! What programs do in a guest is tested by the other suites with `KSO_TEST_CLIENT=vm`.
#![forbid(unsafe_code)]

mod conformance;
mod files;
mod hostile;
mod killed;
mod lifecycle;
mod many;
mod sendfile;
mod terminal;

use std::time::Duration;

/// Whether the long tests are wanted, too: `make test-all`.
fn everything() -> bool {
    std::env::var_os("KSO_TEST_ALL").is_some()
}

/// For what takes no time but the guest's own.
const LIMIT: Duration = Duration::from_secs(120);
