//! The Markdown table and the plots, from the data.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::rows::{self, Row, Section, Target};
use crate::samples::Samples;
use crate::sandbox::Variant;
use crate::special::{HELD, MEMORY, SOAK, START, UNSHARE};
use crate::stats::{Summary, paired_ratios, summary};
use crate::svg;

pub const DATA: &str = "sandbox.csv";
/// The row that is no measurement but says how long each repetition was.
pub const SETTINGS: &str = "settings";
const TABLE: &str = "sandbox.md";
const SOAK_PLOT: &str = "sandbox-soak.svg";

/// Limits of the rows that are no ratios.
const START_MAX_MS: f64 = 25.0;
const RESIDENT_MAX_KIB: f64 = 15.0 * 1024.0;
const CONNECTION_MAX_B: f64 = 4096.0;
/// What the rate at the end of the soak may fall short of the rate at its start: the machine's own noise.
const SOAK_NOISE: f64 = 0.05;
/// What the resident set may grow by during the soak.
const SOAK_GROWTH_KIB: f64 = 1024.0;

/// Where and with what the figures were got.
pub struct Facts {
    lines: Vec<String>,
}

impl Facts {
    pub fn gather(kso: &Path, date: Option<String>, samples: &Samples) -> Facts {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let cpus = read("/proc/cpuinfo");
        let model = cpus.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
        let model = model.trim_start_matches(['\t', ' ', ':']);
        let count = cpus.lines().filter(|line| line.starts_with("processor")).count();
        let mut lines = vec![
            format!("- machine: {count} processors, {model}"),
            format!("- kernel: Linux {}", read("/proc/sys/kernel/osrelease").trim()),
        ];
        let kso = kso.to_string_lossy().into_owned();
        for (name, command) in [
            ("kso", vec![kso.as_str(), "--version"]),
            ("pasta (package passt)", vec!["dpkg-query", "-W", "-f", "${Version}\\n", "passt"]),
            ("slirp4netns", vec!["slirp4netns", "--version"]),
            ("iperf3", vec!["iperf3", "--version"]),
        ] {
            if let Some(version) = version(&command) {
                lines.push(format!("- {name}: {version}"));
            }
        }
        if let Some(time) = summary(&samples.values(SETTINGS, "all")) {
            let millis = time.median;
            lines.push(format!("- time measured in each repetition: {millis} ms (iperf3: whole seconds)"));
        }
        lines.extend(date.map(|date| format!("- date: {date}")));
        Facts { lines }
    }

    /// Leaves out those that begin otherwise.
    pub fn keep_only(&mut self, beginnings: &[&str]) {
        self.lines.retain(|line| beginnings.iter().any(|beginning| line.starts_with(beginning)));
    }

    pub fn add(&mut self, line: String) {
        self.lines.push(line);
    }

    pub fn add_version(&mut self, name: &str, command: &[&str]) {
        self.lines.extend(version(command).map(|version| format!("- {name}: {version}")));
    }

    pub fn text(&self) -> String {
        self.lines.join("\n")
    }
}

/// The line of the output that has the version in it.
fn version(command: &[&str]) -> Option<String> {
    let (program, arguments) = command.split_first()?;
    let output = Command::new(program).args(arguments).output().ok()?;
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let line =
        text.lines().find(|line| !line.contains("syslog") && line.contains(|c: char| c.is_ascii_digit()))?;
    Some(line.trim().to_owned())
}

/// `kso-bench report`.
pub fn again(output: &Path, kso: Option<&Path>, date: Option<String>) -> Result<()> {
    let samples = Samples::load(&output.join(DATA))?;
    ensure!(!samples.is_empty(), "no data in {}", output.display());
    let beside = std::env::current_exe()?.with_file_name("kso");
    write(output, &samples, &Facts::gather(kso.unwrap_or(&beside), date, &samples), &[])
}

pub fn write(output: &Path, samples: &Samples, facts: &Facts, failures: &[String]) -> Result<()> {
    let mut text = String::from("# The sandbox compared\n\n");
    text.push_str(PREFACE);
    let _ = writeln!(text, "\n{}\n", facts.lines.join("\n"));
    text.push_str(&table(samples));
    text.push_str(&plots(output, samples)?);
    if !failures.is_empty() {
        text.push_str("## Repetitions that failed\n\n");
        for failure in failures {
            let _ = writeln!(text, "- {}", failure.replace('\n', " "));
        }
    }
    save(output, TABLE, &text)
}

const PREFACE: &str = "\
Written by `make bench` (`cargo run --release -p kso-benches -- run`; one row again: `... run --only NAME`).
The raw data, one line for each repetition, is [sandbox.csv](sandbox.csv).

Everything runs rootless in user, network and pid namespaces that the benchmark makes for itself. *native*: client
and server on that namespace's loopback. *kso*, *pasta*, *slirp4netns*: one of the two in a sandbox, the other on the
same loopback, reached by the sandbox's gateway address or by a published port. *pasta-splice*: pasta's `-T`/`-U`,
which joins loopback to loopback for ports named beforehand. The variants alternate within each row, each repetition
with fresh processes; native and kso are repeated more often. \"One processor\" and \"two processors\" say where client
and server are pinned; streams are always measured across two; what carries the sandbox's network is never pinned.
Figures are medians with quartiles; so are the ratios, which are taken between neighbouring repetitions. More is better
except for `start` and memory.
";

fn save(output: &Path, name: &str, text: &str) -> Result<()> {
    let path = output.join(name);
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Three digits that matter, without an exponent.
pub fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn with_quartiles(summary: &Summary) -> String {
    format!("{} ({}–{})", number(summary.median), number(summary.low), number(summary.high))
}

/// The median and quartiles of the ratios of neighbouring repetitions: what the machine does to one for a while
/// it does to the other as well.
fn ratio(samples: &Samples, row: &str, variant: Variant, base: Variant) -> Option<Summary> {
    summary(&paired_ratios(&samples.of(row, variant.name()), &samples.of(row, base.name())))
}

fn verdict(met: bool) -> &'static str {
    if met { "met" } else { "**missed**" }
}

/// All the sections.
pub fn table(samples: &Samples) -> String {
    let mut text = String::new();
    for section in Section::ALL {
        let rows: Vec<Row> = rows::all()
            .into_iter()
            .filter(|row| row.section == section)
            .filter(|row| Variant::ALL.iter().any(|v| !samples.of(row.name, v.name()).is_empty()))
            .collect();
        if let Some(first) = rows.first() {
            let units = if section == Section::Datagrams {
                "Gbit/s received, or round trips/s"
            } else {
                first.unit()
            };
            let _ = writeln!(text, "## {} ({units})\n", section.title());
            section_table(&mut text, samples, &rows);
        }
    }
    text.push_str(&start_table(samples));
    text.push_str(&memory_table(samples));
    text.push_str(&soak_table(samples));
    text
}

fn section_table(text: &mut String, samples: &Samples, rows: &[Row]) {
    let names: Vec<&str> = Variant::ALL.iter().map(|variant| variant.name()).collect();
    let _ = writeln!(text, "| row | {} | kso : native | kso : pasta | target | |", names.join(" | "));
    let _ = writeln!(text, "|---|{}---|---|---|---|", "---|".repeat(names.len()));
    for row in rows {
        let cells: Vec<String> = names.iter().map(|name| cell(samples, row.name, name)).collect();
        let native = ratio(samples, row.name, Variant::Kso, Variant::Native);
        let pasta = ratio(samples, row.name, Variant::Kso, Variant::Pasta);
        let (target, reached) = match row.target {
            Target::OfNative(least) => {
                (format!("≥ {least} of native"), native.map(|got| got.median >= least))
            }
            Target::OfPasta(least) => (format!("≥ {least} of pasta"), pasta.map(|got| got.median >= least)),
        };
        let shown = |ratio: Option<Summary>| ratio.map_or("–".into(), |ratio| with_quartiles(&ratio));
        let _ = writeln!(
            text,
            "| `{}` {} | {} | {} | {} | {target} | {} |",
            row.name,
            row.title,
            cells.join(" | "),
            shown(native),
            shown(pasta),
            reached.map_or("–", verdict)
        );
    }
    text.push('\n');
}

fn cell(samples: &Samples, row: &str, variant: &str) -> String {
    let Some(found) = summary(&samples.values(row, variant)) else { return "–".into() };
    let loss = summary(&samples.values(&format!("{row}/loss"), variant));
    let loss = loss.filter(|loss| loss.median >= 0.05).map(|loss| format!(", {:.1} % lost", loss.median));
    with_quartiles(&found) + &loss.unwrap_or_default()
}

fn start_table(samples: &Samples) -> String {
    let median = |variant: &str| summary(&samples.values(START, variant));
    let Some(base) = median(UNSHARE) else { return String::new() };
    let mut text = format!("## Start (ms, {} times)\n\n", base.count);
    text.push_str("| command | time | over `unshare -Urn true` | target | |\n|---|---|---|---|---|\n");
    for (variant, command) in [
        (UNSHARE, "unshare -Urn true"),
        (Variant::Kso.name(), "kso run -- true"),
        (Variant::Pasta.name(), "pasta -- true"),
    ] {
        let Some(found) = median(variant) else { continue };
        let over = found.median - base.median;
        let (target, reached) = if variant == Variant::Kso.name() {
            (format!("≤ {START_MAX_MS} ms"), verdict(over <= START_MAX_MS))
        } else {
            (String::new(), "")
        };
        let shown = with_quartiles(&found);
        let _ = writeln!(text, "| `{command}` | {shown} | {over:.1} | {target} | {reached} |");
    }
    text + "\n"
}

fn memory_table(samples: &Samples) -> String {
    let median = |what: &str, held: u32| {
        summary(&samples.values(&format!("{MEMORY}/{what}-{held}"), "kso")).map(|found| found.median)
    };
    let mut text = String::from("## Memory of kso's processes (supervisor with broker, and init)\n\n");
    text.push_str("| open connections | resident KiB | proportional KiB | descriptors | threads | bytes each | target | |\n");
    text.push_str("|---|---|---|---|---|---|---|---|\n");
    let mut any = false;
    for held in HELD {
        let Some(resident) = median("rss", held) else { continue };
        any = true;
        let shown = |what: &str| median(what, held).map_or("–".into(), |value| format!("{value:.0}"));
        let each = median("per-connection", held);
        let (target, met) = match each {
            None => ("≤ 15 MiB in all", resident <= RESIDENT_MAX_KIB),
            Some(each) => ("≤ 4 KiB each", each <= CONNECTION_MAX_B),
        };
        let _ = writeln!(
            text,
            "| {held} | {resident:.0} | {} | {} | {} | {} | {target} | {} |",
            shown("pss"),
            shown("descriptors"),
            shown("threads"),
            each.map_or("–".into(), |each| format!("{each:.0}")),
            verdict(met)
        );
    }
    if any { text + "\n" } else { String::new() }
}

/// The medians of the first and of the last quarter.
fn ends(values: &[f64]) -> Option<(f64, f64)> {
    let quarter = (values.len() / 4).max(1);
    let first = summary(values.get(..quarter)?)?.median;
    let last = summary(values.get(values.len().checked_sub(quarter)?..)?)?.median;
    Some((first, last))
}

fn soak_table(samples: &Samples) -> String {
    let mut rows = String::new();
    let mut add = |what: &str, values: &[f64], met: &dyn Fn(f64, f64) -> Option<bool>| {
        if let Some((first, last)) = ends(values) {
            let verdict = met(first, last).map_or("", verdict);
            let share = last / first;
            let (first, last) = (number(first), number(last));
            let _ = writeln!(rows, "| {what} | {first} | {last} | {share:.2} | {verdict} |");
        }
    };
    let rates = format!("{SOAK}/rate");
    let (native, kso) = (Variant::Native.name(), Variant::Kso.name());
    let ratios = paired_ratios(&samples.of(&rates, kso), &samples.of(&rates, native));
    add("native, connections/s", &samples.values(&rates, native), &|_, _| None);
    add("kso, connections/s", &samples.values(&rates, kso), &|_, _| None);
    add("kso : native", &ratios, &|first, last| Some(last >= first * (1.0 - SOAK_NOISE)));
    let cost = |what: &str| samples.values(&format!("{SOAK}/{what}"), kso);
    add("kso, resident KiB", &cost("rss"), &|first, last| Some(last <= first + SOAK_GROWTH_KIB));
    add("kso, descriptors", &cost("descriptors"), &|first, last| Some(last <= first));
    add("kso, threads", &cost("threads"), &|first, last| Some(last <= first));
    if rows.is_empty() {
        return rows;
    }
    "## Soak: 200,000 short connections through one sandbox\n\n\
     As many natively in between, in turns. Medians of the first and of the last quarter of the run. The ratio to \
     native may end at most 5 % lower, the resident set at most 1 MiB higher, the rest no higher.\n\n\
     | | first | last | last : first | |\n|---|---|---|---|---|\n"
        .to_owned()
        + &rows
        + "\n"
}

fn plots(output: &Path, samples: &Samples) -> Result<String> {
    let mut text = String::from("## Plots\n\n");
    let names: Vec<&str> = Variant::ALL.iter().map(|variant| variant.name()).collect();
    for section in Section::ALL {
        let groups: Vec<svg::Group> = rows::all()
            .iter()
            .filter(|row| row.section == section)
            .filter_map(|row| group(samples, row))
            .collect();
        if groups.is_empty() {
            continue;
        }
        let title = format!("{}: ratio to native loopback (more is better)", section.title());
        save(output, section.file(), &svg::bars(&title, &names, &groups, 1.0))?;
        let _ = writeln!(text, "![{}]({})\n", section.title(), section.file());
    }
    let panels: Vec<svg::Panel> = [("rate", "connections per second"), ("rss", "resident KiB of kso")]
        .into_iter()
        .filter_map(|(what, title)| soak_panel(samples, what, title))
        .collect();
    if !panels.is_empty() {
        let plot = svg::lines("Soak: 200,000 short connections", &panels, "part of the run");
        save(output, SOAK_PLOT, &plot)?;
        let _ = writeln!(text, "![Soak]({SOAK_PLOT})\n");
    }
    Ok(text)
}

fn group(samples: &Samples, row: &Row) -> Option<svg::Group> {
    let bars: Vec<svg::Bar> = Variant::ALL
        .iter()
        .enumerate()
        .filter_map(|(series, variant)| {
            let ratio = ratio(samples, row.name, *variant, Variant::Native)?;
            let value = summary(&samples.values(row.name, variant.name()))?;
            let label = format!("{}× ({})", number(ratio.median), number(value.median));
            Some(svg::Bar { series, value: ratio.median, low: ratio.low, high: ratio.high, label })
        })
        .collect();
    (!bars.is_empty()).then(|| svg::Group { title: row.title.to_owned(), bars })
}

fn soak_panel(samples: &Samples, what: &str, title: &str) -> Option<svg::Panel> {
    let series: Vec<svg::Series> = [(0, Variant::Native), (1, Variant::Kso)]
        .into_iter()
        .filter_map(|(colour, variant)| {
            let values = samples.of(&format!("{SOAK}/{what}"), variant.name());
            let points: Vec<(f64, f64)> =
                values.into_iter().map(|(chunk, value)| (f64::from(chunk) + 1.0, value)).collect();
            (!points.is_empty()).then(|| svg::Series { name: variant.name().into(), colour, points })
        })
        .collect();
    (!series.is_empty()).then(|| svg::Panel { title: title.to_owned(), series })
}
