//! The table and the plots of the guest's rows.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use kso_vm::Kernel;

use super::cost::{MEMORY, SOAK, SOAK_CONNECTIONS, START};
use super::net::Way;
use super::rows::{PAIR, ROWS, Row, Target};
use crate::report::{Facts, number};
use crate::samples::Samples;
use crate::sandbox::Tools;
use crate::stats::{Summary, paired_ratios, summary};
use crate::svg;

pub const DATA: &str = "guest.csv";
const TABLE: &str = "guest.md";
const PLOT: &str = "guest.svg";
const SOAK_PLOT: &str = "guest-soak.svg";

/// `kso vm -- true` over a bare boot.
const START_MAX_MS: f64 = 400.0;
const BROKER_MAX_MIB: f64 = 10.0;
/// Of 200,000 connections, no byte shall stay: this is the guest's own unrest.
const GROWTH_MAX_MIB: f64 = 4.0;

const PREFACE: &str = "\
Written by `make bench` (`cargo run --release -p kso-benches -- guest`; one row again: `... guest --only NAME`).
The raw data, one line for each repetition, is [guest.csv](guest.csv).

One microVM under `kso vm` has kso's vsock device and three virtio-net NICs at once, by a tap, QEMU's slirp and passt. An
address chooses the way; client, guest and the server on the host are the same. Everything runs in user, network and pid
namespaces of the benchmark's own. *native* is client and server on the host's loopback, with no guest. The ways alternate
within each repetition of each row, so that what the machine does to one it does to all. A client that uses a NIC is
supervised as the others are: that costs its `connect` one notification, and its data nothing. Figures are medians with
quartiles; ratios are taken within repetitions. More is better but for times and memory. Guest to guest: two guests of
one broker, which also have a tap each on one bridge.
";

/// Where and with what the figures were got.
pub fn facts(tools: &Tools, kernel: &Kernel, date: Option<&str>) -> String {
    let accelerator = kso_vm::accelerator(kernel).name();
    let versions = [
        ("QEMU", vec!["qemu-system-x86_64", "--version"]),
        ("passt", vec!["dpkg-query", "-W", "-f", "${Version}\\n", "passt"]),
    ];
    let mut facts = Facts::gather(&tools.kso, None, &Samples::default());
    facts.keep_only(&["- machine", "- kernel", "- kso"]);
    facts
        .add(format!("- guest: Linux {}, one processor, 512 MiB, accelerator {accelerator}", kernel.release));
    for (name, command) in versions {
        facts.add_version(name, &command);
    }
    if let Some(date) = date {
        facts.add(format!("- date: {date}"));
    }
    facts.text()
}

pub fn write(output: &Path, samples: &Samples, facts: &str, failures: &[String]) -> Result<()> {
    let mut text = format!("# The microVM compared\n\n{PREFACE}\n{facts}\n\n{}", table(samples));
    text.push_str(&plots(output, samples)?);
    if !failures.is_empty() {
        text.push_str("## What failed\n\n");
        for failure in failures {
            let _ = writeln!(text, "- {}", failure.replace('\n', " "));
        }
    }
    save(output, TABLE, &text)
}

fn save(output: &Path, name: &str, text: &str) -> Result<()> {
    let path = output.join(name);
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn shown(found: Option<Summary>) -> String {
    found.map_or("–".into(), |one| {
        format!("{} ({}–{})", number(one.median), number(one.low), number(one.high))
    })
}

fn ratio(samples: &Samples, (row, way): (&str, Way), (base, than): (&str, Way)) -> Option<Summary> {
    summary(&paired_ratios(&samples.of(row, way.name()), &samples.of(base, than.name())))
}

/// What is wanted, what there is, and whether that does.
fn judged(samples: &Samples, row: &Row, target: &Target) -> (String, String, &'static str) {
    let (base, than, least) = match *target {
        Target::Of(way, least) => (row.name, way, least),
        Target::OfRow(name, least) => (name, Way::Kso, least),
    };
    let what = if base == row.name { than.name() } else { base };
    let found = ratio(samples, (row.name, Way::Kso), (base, than));
    let verdict = match found {
        None => "–",
        Some(found) if found.median >= least => "met",
        Some(_) => "**missed**",
    };
    (format!("≥ {} of {what}", number(least)), shown(found), verdict)
}

pub fn table(samples: &Samples) -> String {
    let mut text = String::new();
    rows_table(&mut text, samples, "Guest and host", ROWS, &Way::ALL);
    rows_table(&mut text, samples, "Guest to guest", PAIR, &[Way::Kso, Way::Tap]);
    costs_table(&mut text, samples);
    text
}

/// What the README shows.
pub fn readme(samples: &Samples) -> String {
    let ways = [Way::Kso, Way::Tap, Way::Slirp, Way::Passt];
    let names: Vec<&str> = ways.iter().map(|way| way.name()).collect();
    let mut text =
        format!("| in one guest | {} | kso : tap |\n|---|{}---|\n", names.join(" | "), "---|".repeat(4));
    for row in ROWS.iter().chain(PAIR) {
        let cells: Vec<String> = ways
            .iter()
            .map(|way| summary(&samples.values(row.name, way.name())))
            .map(|found| found.map_or("–".into(), |found| number(found.median)))
            .collect();
        let Some(ratio) = ratio(samples, (row.name, Way::Kso), (row.name, Way::Tap)) else { continue };
        let (cells, ratio) = (cells.join(" | "), number(ratio.median));
        let _ = writeln!(text, "| {}, {} | {cells} | {ratio}× |", row.title, row.unit());
    }
    text
}

fn rows_table(text: &mut String, samples: &Samples, title: &str, rows: &[Row], ways: &[Way]) {
    let there = |row: &&Row| ways.iter().any(|way| !samples.of(row.name, way.name()).is_empty());
    let rows: Vec<&Row> = rows.iter().filter(there).collect();
    if rows.is_empty() {
        return;
    }
    let names: Vec<&str> = ways.iter().map(|way| way.name()).collect();
    let _ = writeln!(text, "## {title}\n\n| row | unit | {} | kso : target | target | |", names.join(" | "));
    let _ = writeln!(text, "|---|---|{}---|---|---|", "---|".repeat(names.len()));
    for row in rows {
        let cells: Vec<String> =
            names.iter().map(|name| shown(summary(&samples.values(row.name, name)))).collect();
        let judged: Vec<_> = row.targets.iter().map(|target| judged(samples, row, target)).collect();
        let (ratios, wanted, verdicts): (Vec<_>, Vec<_>, Vec<_>) =
            judged.into_iter().map(|(wanted, found, verdict)| (found, wanted, verdict)).collect();
        let _ = writeln!(
            text,
            "| `{}` {} | {} | {} | {} | {} | {} |",
            row.name,
            row.title,
            row.unit(),
            cells.join(" | "),
            ratios.join("<br>"),
            wanted.join("<br>"),
            verdicts.join("<br>")
        );
    }
    text.push('\n');
}

/// The medians of the first and of the last quarter.
fn ends(values: &[f64]) -> Option<(f64, f64)> {
    let quarter = (values.len() / 4).max(1);
    let first = summary(values.get(..quarter)?)?.median;
    let last = summary(values.get(values.len().checked_sub(quarter)?..)?)?.median;
    Some((first, last))
}

fn costs_table(text: &mut String, samples: &Samples) {
    let mut rows = String::new();
    let verdict = |met: bool| if met { "met" } else { "**missed**" };
    let start = |variant: &str| summary(&samples.values(START, variant));
    if let (Some(bare), Some(whole)) = (start("bare"), start("kso")) {
        let over = whole.median - bare.median;
        let _ = writeln!(rows, "| bare boot to /init, ms | {} | | |", shown(Some(bare)));
        let _ = writeln!(rows, "| `kso vm -- true`, ms | {} | | |", shown(Some(whole)));
        let met = verdict(over <= START_MAX_MS);
        let _ = writeln!(rows, "| the difference, ms | {over:.0} | ≤ {START_MAX_MS} | {met} |");
    }
    for (when, title) in [("idle", "before any connection"), ("after", "after all of the above")] {
        if let Some(found) = summary(&samples.values(&format!("{MEMORY}/{when}"), "kso")) {
            let met = verdict(found.median <= BROKER_MAX_MIB);
            let size = number(found.median);
            let _ = writeln!(
                rows,
                "| launcher, broker and devices, {title}, MiB | {size} | ≤ {BROKER_MAX_MIB} | {met} |"
            );
        }
    }
    let soak = |what: &str| ends(&samples.values(&format!("{SOAK}/{what}"), "kso"));
    if let Some((first, last)) = soak("available") {
        let met = verdict(first - last <= GROWTH_MAX_MIB);
        let _ = writeln!(
            rows,
            "| guest memory available over {SOAK_CONNECTIONS} non-blocking connects, first and last quarter, MiB | \
             {first:.1}, {last:.1} | at most {GROWTH_MAX_MIB} less | {met} |"
        );
    }
    for (what, title) in [
        ("slab", "the guest kernel's own objects meanwhile, MiB"),
        ("broker", "launcher, broker and devices meanwhile, MiB"),
        ("rate", "connections/s meanwhile"),
    ] {
        if let Some((first, last)) = soak(what) {
            let _ = writeln!(rows, "| {title} | {}, {} | | |", number(first), number(last));
        }
    }
    if !rows.is_empty() {
        let _ = writeln!(text, "## What a guest costs\n\n| | | target | |\n|---|---|---|---|\n{rows}");
    }
}

fn plots(output: &Path, samples: &Samples) -> Result<String> {
    let mut text = String::from("## Plots\n\n");
    let names: Vec<&str> = Way::ALL.iter().map(|way| way.name()).collect();
    let groups: Vec<svg::Group> = ROWS.iter().chain(PAIR).filter_map(|row| group(samples, row)).collect();
    if !groups.is_empty() {
        let title = "In one guest: ratio to virtio-net on tap (more is better)";
        save(output, PLOT, &svg::bars(title, &names, &groups, 1.0))?;
        let _ = writeln!(text, "![Guest]({PLOT})\n");
    }
    let panels: Vec<svg::Panel> =
        [("available", "MiB available in the guest"), ("rate", "connections per second")]
            .into_iter()
            .filter_map(|(what, title)| {
                let values = samples.of(&format!("{SOAK}/{what}"), "kso");
                let points: Vec<(f64, f64)> =
                    values.into_iter().map(|(chunk, value)| (f64::from(chunk) + 1.0, value)).collect();
                let series = vec![svg::Series { name: "kso".into(), colour: 1, points }];
                (!series.iter().all(|one| one.points.is_empty()))
                    .then(|| svg::Panel { title: title.to_owned(), series })
            })
            .collect();
    if !panels.is_empty() {
        let title = format!("{SOAK_CONNECTIONS} non-blocking connections of one guest");
        save(output, SOAK_PLOT, &svg::lines(&title, &panels, "part of the run"))?;
        let _ = writeln!(text, "![Soak]({SOAK_PLOT})\n");
    }
    Ok(text)
}

/// Native is left out: it would dwarf the others, and no guest reaches it.
fn group(samples: &Samples, row: &Row) -> Option<svg::Group> {
    let bars: Vec<svg::Bar> = Way::ALL
        .iter()
        .enumerate()
        .filter(|(_, way)| **way != Way::Native)
        .filter_map(|(series, way)| {
            let ratio = ratio(samples, (row.name, *way), (row.name, Way::Tap))?;
            let value = summary(&samples.values(row.name, way.name()))?;
            let label = format!("{}× ({} {})", number(ratio.median), number(value.median), row.unit());
            Some(svg::Bar { series, value: ratio.median, low: ratio.low, high: ratio.high, label })
        })
        .collect();
    (!bars.is_empty()).then(|| svg::Group { title: row.title.to_owned(), bars })
}
