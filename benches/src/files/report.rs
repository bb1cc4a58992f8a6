//! The table and the plot of the files' rows.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use kso_vm::Kernel;

use super::place::Way;
use super::rows::{PAGE_CACHE, ROWS, Row};
use crate::report::{Facts, number};
use crate::samples::Samples;
use crate::sandbox::Tools;
use crate::stats::{Summary, paired_ratios, summary};
use crate::svg;

pub const DATA: &str = "files.csv";
const TABLE: &str = "files.md";
const PLOT: &str = "files.svg";

const PREFACE: &str = "\
Written by `make bench` (`cargo run --release -p kso-benches -- files`; one row again: `... files --only NAME`).
The raw data, one line for each repetition, is [files.csv](files.csv).

One microVM under `kso vm` has the same files by three ways at once: kso's file service (`-v`), virtiofsd on the same
directory (cache=auto, as kso's), and an ext4 image on virtio-blk with a copy of them. *native* is the host itself, without a guest; there
all files are in memory. The ways alternate within each repetition of each row. nginx serves by way of kso's
sockets, or of virtio-net on a tap, to four clients on the host. Figures are medians with quartiles; ratios are taken within
repetitions. More is better.
";

/// Where and with what the figures were got.
pub fn facts(tools: &Tools, kernel: &Kernel, date: Option<&str>) -> String {
    let accelerator = kso_vm::accelerator(kernel).name();
    let mut facts = Facts::gather(&tools.kso, None, &Samples::default());
    facts.keep_only(&["- machine", "- kernel", "- kso"]);
    facts.add(format!("- guest: Linux {}, one processor, 1 GiB, accelerator {accelerator}", kernel.release));
    facts.add_version("QEMU", &["qemu-system-x86_64", "--version"]);
    facts.add_version("virtiofsd", &["virtiofsd", "--version"]);
    facts.add_version("nginx", &["nginx", "-v"]);
    if let Some(date) = date {
        facts.add(format!("- date: {date}"));
    }
    facts.text()
}

pub fn write(output: &Path, samples: &Samples, facts: &str, failures: &[String]) -> Result<()> {
    let mut text = format!("# Files compared\n\n{PREFACE}\n{facts}\n\n{}", table(samples));
    let names: Vec<&str> = Way::ALL.iter().map(|way| way.name()).collect();
    let groups: Vec<svg::Group> = ROWS.iter().filter_map(|row| group(samples, row)).collect();
    if !groups.is_empty() {
        let title = "A guest's files: ratio to virtiofsd in the same guest (more is better)";
        save(output, PLOT, &svg::bars(title, &names, &groups, 1.0))?;
        let _ = writeln!(text, "![Files]({PLOT})\n");
    }
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

fn ratio(samples: &Samples, row: &Row, way: Way, than: Way) -> Option<Summary> {
    summary(&paired_ratios(&samples.of(row.name, way.name()), &samples.of(row.name, than.name())))
}

pub fn table(samples: &Samples) -> String {
    let names: Vec<&str> = Way::ALL.iter().map(|way| way.name()).collect();
    let mut text = format!("| row | unit | {} | kso : target | target | |\n", names.join(" | "));
    let _ = writeln!(text, "|---|---|{}---|---|---|", "---|".repeat(names.len()));
    for row in ROWS.iter().filter(|row| !samples.of(row.name, Way::Kso.name()).is_empty()) {
        let cells: Vec<String> =
            names.iter().map(|name| shown(summary(&samples.values(row.name, name)))).collect();
        let (mut ratios, mut wanted, mut verdicts) = (Vec::new(), Vec::new(), Vec::new());
        for &(way, least) in row.targets {
            let found = ratio(samples, row, Way::Kso, way);
            verdicts.push(match found {
                None => "–",
                Some(found) if found.median >= least => "met",
                Some(_) => "**missed**",
            });
            ratios.push(shown(found));
            wanted.push(format!("≥ {} of {}", number(least), way.name()));
        }
        let _ = writeln!(
            text,
            "| `{}` {} | {} | {} | {} | {} | {} |",
            row.name,
            row.title,
            row.unit,
            cells.join(" | "),
            ratios.join("<br>"),
            wanted.join("<br>"),
            verdicts.join("<br>")
        );
    }
    text.push('\n');
    page_cache(&mut text, samples);
    text
}

fn page_cache(text: &mut String, samples: &Samples) {
    let of = |what: &str| samples.of(&format!("{PAGE_CACHE}/{what}"), Way::Kso.name());
    let (host, guests) = (of("host"), of("guests"));
    let Some(&(_, file)) = of("file").first() else { return };
    let _ = writeln!(
        text,
        "## One page cache\n\nGuests of 256 MiB each read one file of {file} MiB, one after the other.\n\n\
         | guests that have read it | the host's page cache grew by, MiB | the guests' own memory, MiB |\n|---|---|---|"
    );
    for ((count, cached), (_, own)) in host.into_iter().zip(guests) {
        let _ = writeln!(text, "| {count} | {} | {} |", number(cached), number(own));
    }
    text.push('\n');
}

/// What the README shows.
pub fn readme(samples: &Samples) -> String {
    let names: Vec<&str> = Way::ALL.iter().map(|way| way.name()).collect();
    let mut text = format!(
        "| files of one guest | {} | kso : virtiofsd |\n|---|{}---|\n",
        names.join(" | "),
        "---|".repeat(4)
    );
    for row in ROWS {
        let Some(ratio) = ratio(samples, row, Way::Kso, Way::Virtiofsd) else { continue };
        let cells: Vec<String> = names
            .iter()
            .map(|name| summary(&samples.values(row.name, name)))
            .map(|found| found.map_or("–".into(), |found| number(found.median)))
            .collect();
        let (cells, ratio) = (cells.join(" | "), number(ratio.median));
        let _ = writeln!(text, "| {}, {} | {cells} | {ratio}× |", row.title, row.unit);
    }
    text
}

/// Native is left out: it would dwarf the others.
fn group(samples: &Samples, row: &Row) -> Option<svg::Group> {
    let bars: Vec<svg::Bar> = Way::ALL
        .iter()
        .enumerate()
        .filter(|(_, way)| **way != Way::Native)
        .filter_map(|(series, way)| {
            let ratio = ratio(samples, row, *way, Way::Virtiofsd)?;
            let value = summary(&samples.values(row.name, way.name()))?;
            let label = format!("{}× ({} {})", number(ratio.median), number(value.median), row.unit);
            Some(svg::Bar { series, value: ratio.median, low: ratio.low, high: ratio.high, label })
        })
        .collect();
    (!bars.is_empty()).then(|| svg::Group { title: row.title.to_owned(), bars })
}
