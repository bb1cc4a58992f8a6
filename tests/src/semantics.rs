//! The list of differences that are allowed between a program run natively and under kso.

use serde::Deserialize;
use std::collections::BTreeMap;

/// `tests/semantics.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Semantics {
    /// The differences, in no order.
    #[serde(default)]
    pub difference: Vec<Difference>,
}

/// Tests whose result differs, and why.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Difference {
    /// `private` or `external`, the mode of loopback, or `both`.
    pub mode: String,
    /// The tests' identities; a `*` at the end stands for any rest.
    pub tests: Vec<String>,
    /// What is the result natively, and under kso: `ok`, `fail`, `error`, `skip`.
    pub native: String,
    /// The same under kso.
    pub kso: String,
    /// Why it must or may be so.
    pub reason: String,
    /// The result depends on timing: an entry that does not show up is not stale.
    #[serde(default)]
    pub flaky: bool,
}

/// The list.
pub fn load() -> Semantics {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/semantics.toml");
    let text = std::fs::read_to_string(path).expect("tests/semantics.toml");
    toml::from_str(&text).unwrap_or_else(|error| panic!("{path}: {error}"))
}

impl Difference {
    fn covers(&self, mode: &str, test: &str, native: &str, kso: &str) -> bool {
        (self.mode == mode || self.mode == "both")
            && self.native == native
            && self.kso == kso
            && self.tests.iter().any(|pattern| match pattern.strip_suffix('*') {
                Some(start) => test.starts_with(start),
                None => pattern == test,
            })
    }
}

/// The tests whose results differ and that are not listed.
pub fn unlisted(
    semantics: &Semantics,
    mode: &str,
    native: &BTreeMap<String, String>,
    kso: &BTreeMap<String, String>,
) -> Vec<String> {
    let missing = "missing".to_owned();
    let tests: std::collections::BTreeSet<&String> = native.keys().chain(kso.keys()).collect();
    tests
        .into_iter()
        .filter(|test| {
            let (n, k) = (native.get(*test).unwrap_or(&missing), kso.get(*test).unwrap_or(&missing));
            n != k && !semantics.difference.iter().any(|entry| entry.covers(mode, test, n, k))
        })
        .cloned()
        .collect()
}

/// Compares results by test; a line for each difference that is not listed and each entry that is stale.
/// Entries of tests outside `modules` are not looked at.
pub fn compare(
    semantics: &Semantics,
    mode: &str,
    modules: &[&str],
    native: &BTreeMap<String, String>,
    kso: &BTreeMap<String, String>,
) -> Vec<String> {
    let missing = "missing".to_owned();
    let mut wrong = Vec::new();
    let mut used = vec![false; semantics.difference.len()];
    let tests: std::collections::BTreeSet<&String> = native.keys().chain(kso.keys()).collect();
    for test in tests {
        let (n, k) = (native.get(test).unwrap_or(&missing), kso.get(test).unwrap_or(&missing));
        if n == k {
            continue;
        }
        let mut listed = false;
        for (entry, used) in semantics.difference.iter().zip(&mut used) {
            if entry.covers(mode, test, n, k) {
                listed = true;
                *used = true;
            }
        }
        if !listed {
            wrong.push(format!(
                "{test}: natively {n}, under kso ({mode}) {k}: not listed in tests/semantics.toml"
            ));
        }
    }
    for (entry, used) in semantics.difference.iter().zip(used) {
        let here = entry
            .tests
            .iter()
            .any(|t| modules.iter().any(|module| t.starts_with(&format!("test.{module}."))));
        if !used && !entry.flaky && here && entry.mode == mode {
            wrong.push(format!("stale entry ({mode}): {:?} no longer differ", entry.tests));
        }
    }
    wrong
}
