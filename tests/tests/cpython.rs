//! CPython's own suites (Debian: libpython3.11-testsuite), natively and under `kso run` in both modes of loopback.
//!
//! Results are compared test by test. A difference must be listed in `tests/semantics.toml` with its reason;
//! an entry that no longer shows up fails too. A test whose results differ is run twice again on either side
//! first: many of them depend on timing.
#![forbid(unsafe_code)]

use kso_tests::{Output, World, argv, program, seconds, semantics};
use serde::Deserialize;
use std::collections::BTreeMap;

#[derive(Deserialize)]
struct Line {
    test: Option<String>,
    result: Option<String>,
    detail: Option<String>,
    end: Option<u32>,
}

type Results = BTreeMap<String, String>;

fn parse(out: &Output, details: &mut BTreeMap<String, String>) -> (Results, bool) {
    let mut results = Results::new();
    let mut ended = false;
    for line in out.text().lines() {
        let Ok(line) = serde_json::from_str::<Line>(line) else { continue };
        ended |= line.end.is_some();
        if let (Some(test), Some(result)) = (line.test, line.result) {
            if result != "ok" {
                details.insert(test.clone(), line.detail.unwrap_or_default());
            }
            results.insert(test, result);
        }
    }
    (results, ended)
}

fn command(world: &World, arguments: &[&str]) -> kso_tests::Cmd {
    let cwd = world.path("cpython");
    std::fs::create_dir_all(&cwd).expect("a directory");
    argv(["/usr/bin/python3", &program("cpython_runner.py")].into_iter().chain(arguments.iter().copied()))
        .cwd(cwd)
        .env("TMPDIR", world.path("."))
        .limit(seconds(600))
}

const MODES: [(&str, &str); 2] = [("private", "--loopback private"), ("external", "--loopback external")];

fn suite(module: &str) {
    let worlds = [World::new(), World::new(), World::new()];
    let run = |index: usize, arguments: &[&str]| {
        let world = &worlds[index];
        let cmd = command(world, arguments);
        if index == 0 { world.native(cmd) } else { world.kso(MODES[index - 1].1, cmd) }
    };
    let outputs = std::thread::scope(|scope| {
        let run = &run;
        [0, 1, 2]
            .map(|index| scope.spawn(move || run(index, &[module])))
            .map(|thread| thread.join().expect("no panic"))
    });
    let mut details = [BTreeMap::new(), BTreeMap::new(), BTreeMap::new()];
    let mut results: Vec<Results> = Vec::new();
    let mut wrong = Vec::new();
    for (index, out) in outputs.iter().enumerate() {
        let (result, ended) = parse(out, &mut details[index]);
        if !ended {
            wrong.push(format!("{module} did not come to its end: {}", out.report()));
        }
        results.push(result);
    }
    assert!(results[0].len() > 1, "no tests natively: {}", outputs[0].report());
    let list = semantics::load();
    // What differs is tried again, alone and one after the other.
    for _ in 0..2 {
        let again: Vec<String> = MODES
            .iter()
            .enumerate()
            .flat_map(|(i, (mode, _))| semantics::unlisted(&list, mode, &results[0], &results[i + 1]))
            .collect::<std::collections::BTreeSet<_>>()
            .into_iter()
            .take(60)
            .collect();
        if again.is_empty() {
            break;
        }
        eprintln!("again: {again:?}");
        let mut arguments = vec!["--only"];
        arguments.extend(again.iter().map(String::as_str));
        for index in 0..3 {
            let (fresh, _) = parse(&run(index, &arguments), &mut details[index]);
            for (test, result) in fresh {
                let old = results[index].entry(test).or_insert_with(|| result.clone());
                if *old != "ok" {
                    *old = result;
                }
            }
        }
    }
    for (index, (mode, _)) in MODES.iter().enumerate() {
        for line in semantics::compare(&list, mode, &[module], &results[0], &results[index + 1]) {
            let test = line.split(": ").next().unwrap_or_default();
            let detail = details[index + 1].get(test).or_else(|| details[0].get(test));
            wrong.push(format!("{line}\n{}", detail.map_or("", String::as_str)));
        }
    }
    let count = |results: &Results, what: &str| results.values().filter(|result| *result == what).count();
    for (name, results) in ["natively", "private", "external"].iter().zip(&results) {
        println!(
            "{module} {name}: {} tests, {} ok, {} skipped",
            results.len(),
            count(results, "ok"),
            count(results, "skip")
        );
    }
    assert!(wrong.is_empty(), "{} differences:\n{}", wrong.len(), wrong.join("\n"));
    for world in &worlds {
        world.nothing_left();
    }
}

macro_rules! suites {
    ($($module:ident)*) => {$(
        #[test]
        fn $module() {
            suite(stringify!($module));
        }
    )*};
}

suites! {
    test_asyncio
    test_socket
    test_ssl
    test_selectors
    test_epoll
    test_httplib
    test_urllib2_localnet
    test_socketserver
    test_ftplib
    test_smtplib
}
