//! `kso-bench run`: every row, its variants in turn, the repetitions interleaved.

use std::collections::HashMap;
use std::env;
use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::measure::Bench;
use crate::namespace;
use crate::report;
use crate::rows::{self, Pin, Row, Work};
use crate::samples::Samples;
use crate::sandbox::{Tools, Variant};
use crate::special;

#[derive(clap::Args)]
pub struct Args {
    /// Three short repetitions: to see that everything works (about three minutes)
    #[arg(long)]
    quick: bool,
    /// Only rows whose names begin so, with the other rows' data kept; may be given more than once
    #[arg(long, value_name = "ROW")]
    only: Vec<String>,
    /// Only these variants (native is always measured)
    #[arg(long, value_name = "VARIANT", value_delimiter = ',')]
    variants: Vec<String>,
    /// Repetitions of native and kso [default: 11, or 3 with --quick]
    #[arg(long)]
    repetitions: Option<u32>,
    /// Milliseconds measured in each repetition [default: 400, or 250 with --quick]
    #[arg(long)]
    millis: Option<u64>,
    /// Where client and server run, instead of what each row says
    #[arg(long)]
    pin: Option<Pin>,
    /// Directory for the data, the table and the plots [default: docs/bench, or target/bench with --quick]
    #[arg(long)]
    output: Option<PathBuf>,
    /// The kso to measure [default: beside this program]
    #[arg(long)]
    kso: Option<PathBuf>,
    /// Date to print in the table
    #[arg(long)]
    date: Option<String>,
    /// Stay root: no user namespace. pasta is left out, as it gives up its rights and then cannot work
    #[arg(long)]
    as_root: bool,
    /// Only list the rows
    #[arg(long)]
    list: bool,
    /// Set by the program itself when it runs again in its own namespaces
    #[arg(long, hide = true)]
    inside: bool,
}

/// Repetitions of pasta and slirp4netns: they are far from native, so fewer tell enough.
const OTHERS: u32 = 7;
/// A variant that failed so often in a row is given up for it.
const FAILURES_MAX: u32 = 2;

impl Args {
    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|prefix| name.starts_with(prefix.as_str()))
    }

    fn wants_variant(&self, variant: Variant) -> bool {
        if self.as_root && matches!(variant, Variant::Pasta | Variant::PastaSplice) {
            return false;
        }
        variant == Variant::Native
            || self.variants.is_empty()
            || self.variants.iter().any(|name| name == variant.name())
    }

    /// iperf3 measures whole seconds, and native reads the same in quick runs: one row of it will do.
    fn rows(&self) -> Vec<Row> {
        let quick = |row: &Row| !self.quick || !row.is_iperf() || matches!(row.work, Work::IperfUdp(_));
        rows::all().into_iter().filter(|row| self.wants(row.name) && quick(row)).collect()
    }
}

pub fn run(args: &Args) -> Result<()> {
    if args.list {
        for row in rows::all() {
            println!("{:30} {} ({})", row.name, row.title, row.section.title());
        }
        for name in [special::START, special::MEMORY, special::SOAK] {
            println!("{name}");
        }
        return Ok(());
    }
    for name in &args.variants {
        ensure!(Variant::from_name(name).is_some(), "no variant is called `{name}`");
    }
    if !args.inside {
        return namespace::enter(args.as_root);
    }
    namespace::prepare()?;
    let scratch = tempfile::tempdir()?;
    let this = env::current_exe()?;
    let kso = args.kso.clone().unwrap_or_else(|| this.with_file_name("kso"));
    // A relative path must hold in the sandboxes too.
    let kso = kso.canonicalize().unwrap_or(kso);
    let tools = Tools { kso, this, scratch: scratch.path().to_owned() };
    let millis = args.millis.unwrap_or(if args.quick { 250 } else { 400 });
    let bench = Bench::new(tools, millis, args.pin);
    let mut session = Session { args, with_kso: bench.tools.kso.exists(), samples: Samples::default() };
    if !session.with_kso {
        eprintln!("{} does not exist: kso is left out", bench.tools.kso.display());
    }
    session.samples.add(report::SETTINGS, "all", 0, millis as f64, "ms");
    let start = Instant::now();
    let mut failures = Vec::new();
    for row in args.rows() {
        session.row(&bench, &row, &mut failures);
    }
    session.special(&bench, &mut failures);
    eprintln!("measured in {:.0} s", start.elapsed().as_secs_f64());
    for failure in &failures {
        eprintln!("failed: {failure}");
    }
    let fallback = if args.quick { "target/bench" } else { "docs/bench" };
    let output = args.output.clone().unwrap_or_else(|| fallback.into());
    fs::create_dir_all(&output).with_context(|| format!("cannot make {}", output.display()))?;
    let path = output.join(report::DATA);
    let mut samples = if args.only.is_empty() { Samples::default() } else { Samples::load(&path)? };
    samples.replace(session.samples);
    samples.save(&path)?;
    let facts = report::Facts::gather(&bench.tools.kso, args.date.clone(), &samples);
    report::write(&output, &samples, &facts, &failures)?;
    println!("{}", report::table(&samples));
    println!("The data, the table and the plots are in {}", output.display());
    Ok(())
}

/// A run that is being made.
struct Session<'a> {
    args: &'a Args,
    with_kso: bool,
    samples: Samples,
}

impl Session<'_> {
    fn takes(&self, variant: Variant) -> bool {
        self.args.wants_variant(variant) && (variant != Variant::Kso || self.with_kso)
    }

    fn repetitions(&self, variant: Variant) -> u32 {
        let most = self.args.repetitions.unwrap_or(if self.args.quick { 3 } else { 11 });
        match variant {
            Variant::Native | Variant::Kso => most,
            Variant::Pasta | Variant::PastaSplice | Variant::Slirp => most.min(OTHERS),
        }
    }

    fn row(&mut self, bench: &Bench, row: &Row, failures: &mut Vec<String>) {
        let mut variants: Vec<Variant> =
            row.variants().into_iter().filter(|variant| self.takes(*variant)).collect();
        let mut failed: HashMap<Variant, u32> = HashMap::new();
        let most = variants.iter().map(|variant| self.repetitions(*variant)).max().unwrap_or(0);
        eprintln!("{}: {}", row.name, row.title);
        for repetition in 0..most {
            for variant in variants.clone() {
                let failures_so_far = failed.get(&variant).copied().unwrap_or(0);
                if repetition >= self.repetitions(variant) || failures_so_far >= FAILURES_MAX {
                    continue;
                }
                match bench.measure(row, variant) {
                    Ok(outcome) => {
                        let name = variant.name();
                        self.samples.add(row.name, name, repetition, outcome.value, row.unit());
                        if let Some(loss) = outcome.loss {
                            self.samples.add(&format!("{}/loss", row.name), name, repetition, loss, "%");
                        }
                    }
                    Err(error) => {
                        *failed.entry(variant).or_default() += 1;
                        failures.push(format!("{} {variant} {repetition}: {error:#}", row.name));
                    }
                }
            }
            // To and fro, so that no variant always follows the same one.
            variants.reverse();
            if repetition % 2 == 1 {
                variants.rotate_left(1);
            }
        }
        self.summarise(row);
    }

    fn summarise(&self, row: &Row) {
        for variant in row.variants() {
            if let Some(summary) = crate::stats::summary(&self.samples.values(row.name, variant.name())) {
                eprintln!(
                    "    {:13} {:>10} ({} to {}, {} times) {}",
                    variant.name(),
                    report::number(summary.median),
                    report::number(summary.low),
                    report::number(summary.high),
                    summary.count,
                    row.unit()
                );
            }
        }
    }

    fn special(&mut self, bench: &Bench, failures: &mut Vec<String>) {
        let quick = self.args.quick;
        let (args, with_kso) = (self.args, self.with_kso);
        let takes = |variant| args.wants_variant(variant) && (variant != Variant::Kso || with_kso);
        let mut note = |what: &str, result: Result<()>| {
            if let Err(error) = result {
                failures.push(format!("{what}: {error:#}"));
            }
        };
        if self.args.wants(special::START) {
            eprintln!("{}", special::START);
            let repetitions = if quick { 7 } else { 31 };
            let kinds: Vec<Variant> =
                [Variant::Kso, Variant::Pasta].into_iter().filter(|kind| takes(*kind)).collect();
            note(special::START, special::start(bench, repetitions, &kinds, &mut self.samples));
        }
        if self.args.wants(special::MEMORY) && self.takes(Variant::Kso) {
            eprintln!("{}", special::MEMORY);
            note(special::MEMORY, special::memory(bench, if quick { 1 } else { 7 }, &mut self.samples));
        }
        if self.args.wants(special::SOAK) {
            let count = if quick { 20_000 } else { 200_000 };
            let variants: Vec<Variant> =
                [Variant::Native, Variant::Kso].into_iter().filter(|variant| takes(*variant)).collect();
            eprintln!("{}: {count} connections", special::SOAK);
            note(special::SOAK, special::soak(bench, count, &variants, &mut self.samples));
        }
    }
}
