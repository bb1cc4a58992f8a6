//! `kso-bench guest`: a microVM's outsourced sockets against virtio-net by tap, slirp and passt in the same guest.

pub mod agent;
mod cost;
pub mod machine;
pub mod net;
mod pair;
mod report;
mod rows;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kso_vm::{Choice, Kernel};

use crate::client::Outcome;
use crate::namespace;
use crate::samples::Samples;
use crate::sandbox::{Job, Tools};
use crate::stats::summary;
use agent::Request;
use machine::Guest;
use net::{Outside, Way};
use rows::Row;

#[derive(clap::Args)]
pub struct Args {
    /// Few short repetitions: to see that everything works (about three minutes)
    #[arg(long)]
    quick: bool,
    /// Only rows whose names begin so, with the other rows' data kept; may be given more than once
    #[arg(long, value_name = "ROW")]
    only: Vec<String>,
    /// Only these ways
    #[arg(long, value_name = "WAY", value_delimiter = ',')]
    ways: Vec<String>,
    /// Repetitions [default: 11, or 3 with --quick]
    #[arg(long)]
    repetitions: Option<u32>,
    /// Milliseconds measured in each repetition [default: 1000, or 400 with --quick]
    #[arg(long)]
    millis: Option<u64>,
    /// The guest's kernel, of those that `kso kernels` lists
    #[arg(long, default_value = "6.1")]
    kernel: String,
    /// Directory for the data, the table and the plots [default: docs/bench, or target/bench with --quick]
    #[arg(long)]
    output: Option<PathBuf>,
    /// The kso to measure [default: beside this program]
    #[arg(long)]
    kso: Option<PathBuf>,
    /// Date to print in the table
    #[arg(long)]
    date: Option<String>,
    /// Another option for `kso vm`; may be given more than once
    #[arg(long, allow_hyphen_values = true)]
    vm_option: Vec<String>,
    /// Set by the program itself when it runs again in its own namespaces
    #[arg(long, hide = true)]
    inside: bool,
}

/// Where the results are that the README shows, too.
const PUBLISHED: &str = "docs/bench";
/// Time before what is measured.
const WARM_UP_MILLIS: u64 = 300;
/// Beyond the time that is measured.
const PATIENCE: Duration = Duration::from_secs(30);
/// Where the servers listen, natively and for the guest.
const PORT: u16 = 5000;
/// A way that failed so often in a row is given up for it.
const FAILURES_MAX: usize = 2;

impl Args {
    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|prefix| name.starts_with(prefix.as_str()))
    }

    fn ways(&self) -> Vec<Way> {
        let wanted = |way: &Way| self.ways.is_empty() || self.ways.iter().any(|name| name == way.name());
        Way::ALL.into_iter().filter(wanted).collect()
    }

    fn repetitions(&self) -> u32 {
        self.repetitions.unwrap_or(if self.quick { 3 } else { 11 })
    }

    fn millis(&self) -> u64 {
        self.millis.unwrap_or(if self.quick { 400 } else { 1000 })
    }
}

/// A run that is being made.
struct Run<'a> {
    args: &'a Args,
    tools: Tools,
    kernel: Kernel,
    samples: Samples,
    failures: Vec<String>,
}

pub fn run(args: &Args) -> Result<()> {
    if !args.inside {
        return namespace::enter(false);
    }
    namespace::prepare()?;
    let scratch = tempfile::tempdir()?;
    let this = env::current_exe()?;
    let kso = args.kso.clone().unwrap_or_else(|| this.with_file_name("kso"));
    let kso = kso.canonicalize().with_context(|| format!("{} (make build)", kso.display()))?;
    let kernel = kso_vm::kernels::find(&Choice::Release(args.kernel.clone()))?;
    let tools = Tools { kso, this, scratch: scratch.path().to_owned() };
    let mut run = Run { args, tools, kernel, samples: Samples::default(), failures: Vec::new() };
    let start = Instant::now();
    run.note("the guest", Run::guest);
    run.note(pair::NAME, Run::pair);
    run.note(cost::START, Run::start);
    eprintln!("measured in {:.0} s", start.elapsed().as_secs_f64());
    for failure in &run.failures {
        eprintln!("failed: {failure}");
    }
    let fallback = if args.quick { "target/bench" } else { PUBLISHED };
    let output = args.output.clone().unwrap_or_else(|| fallback.into());
    fs::create_dir_all(&output).with_context(|| format!("cannot make {}", output.display()))?;
    let path = output.join(report::DATA);
    let mut samples = if args.only.is_empty() { Samples::default() } else { Samples::load(&path)? };
    samples.replace(run.samples);
    samples.save(&path)?;
    let facts = report::facts(&run.tools, &run.kernel, args.date.as_deref());
    report::write(&output, &samples, &facts, &run.failures)?;
    if output == Path::new(PUBLISHED) {
        crate::readme::update(Path::new("README.md"), "bench-guest", &report::readme(&samples))?;
    }
    println!("{}", report::table(&samples));
    println!("The data, the table and the plots are in {}", output.display());
    Ok(())
}

impl Run<'_> {
    fn note(&mut self, what: &str, step: fn(&mut Self) -> Result<()>) {
        if let Err(error) = step(self) {
            self.failures.push(format!("{what}: {error:#}"));
        }
    }

    /// A server on the host, for every way at once.
    fn server(&self, port: u16) -> Result<Job> {
        let this = self.tools.this.display().to_string();
        let words = [&this, "server", "--bind", "0.0.0.0", "--port", &port.to_string()];
        let mut job = Job::spawn(&[], &words.map(Into::into))?;
        job.expect_line("ready", PATIENCE).context("server")?;
        Ok(job)
    }

    /// The rows of one guest and its host, and what kso costs there.
    fn guest(&mut self) -> Result<()> {
        let rows: Vec<&Row> = rows::ROWS.iter().filter(|row| self.args.wants(row.name)).collect();
        if rows.is_empty() && !self.args.wants(cost::MEMORY) && !self.args.wants(cost::SOAK) {
            return Ok(());
        }
        let mut outside = Outside::make(&self.tools.scratch)?;
        outside.start_passt()?;
        let _server = self.server(PORT)?;
        let mut options = vec!["--allow".to_owned(), format!("host:{PORT}")];
        options.extend(["--inside".to_owned(), net::NETWORKS.to_owned()]);
        options.extend(net::MODULES.iter().flat_map(|module| ["--module".to_owned(), (*module).to_owned()]));
        for word in Way::NICS.iter().flat_map(|way| way.qemu(outside.socket())) {
            options.extend(["--qemu-arg".to_owned(), word]);
        }
        options.extend(self.args.vm_option.iter().cloned());
        let mut guest = Guest::start(&self.tools, &self.kernel, &options)?;
        for way in Way::NICS {
            if let Some(address) = way.guest() {
                guest.ask(&Request::Address(way.mac().into(), address.into()), PATIENCE)?;
            }
        }
        self.broker_memory(&guest, "idle")?;
        self.interleaved(&rows, &self.args.ways(), &mut |run, row, way| run.measure(row, way, &mut guest))?;
        self.broker_memory(&guest, "after")?;
        self.soak(&mut guest)
    }

    /// Every row by every way, again and again: what the machine does for a while to one it does to all.
    fn interleaved(
        &mut self,
        rows: &[&Row],
        ways: &[Way],
        measure: &mut dyn FnMut(&mut Self, &Row, Way) -> Result<f64>,
    ) -> Result<()> {
        let mut ways = ways.to_vec();
        let mut failed: Vec<(&str, Way)> = Vec::new();
        for repetition in 0..self.args.repetitions() {
            for row in rows {
                for way in ways.clone() {
                    if failed.iter().filter(|one| **one == (row.name, way)).count() >= FAILURES_MAX {
                        continue;
                    }
                    match measure(self, row, way) {
                        Ok(value) => self.samples.add(row.name, way.name(), repetition, value, row.unit()),
                        Err(error) => {
                            failed.push((row.name, way));
                            self.failures.push(format!(
                                "{} {} {repetition}: {error:#}",
                                row.name,
                                way.name()
                            ));
                        }
                    }
                }
            }
            eprintln!("repetition {}", repetition + 1);
            // No way always follows the same one.
            ways.reverse();
            if repetition % 2 == 1 {
                ways.rotate_left(1);
            }
        }
        self.summarise(rows, &ways);
        Ok(())
    }

    fn summarise(&self, rows: &[&Row], ways: &[Way]) {
        for row in rows {
            eprintln!("{}: {}", row.name, row.title);
            for way in Way::ALL.into_iter().filter(|way| ways.contains(way)) {
                if let Some(found) = summary(&self.samples.values(row.name, way.name())) {
                    let [low, median, high] =
                        [found.low, found.median, found.high].map(crate::report::number);
                    eprintln!("    {:8} {median:>8} ({low} to {high}) {}", way.name(), row.unit());
                }
            }
        }
    }

    fn client(&self, to: &str, row: &Row) -> Vec<String> {
        let millis = self.args.millis().to_string();
        let mut words: Vec<String> =
            ["client", "--to", to, "--millis", &millis, "--warm-up", &WARM_UP_MILLIS.to_string()]
                .map(str::to_owned)
                .into();
        words.extend(row.words());
        words
    }

    fn patience(&self) -> Duration {
        PATIENCE + Duration::from_millis(self.args.millis() + WARM_UP_MILLIS)
    }

    fn measure(&mut self, row: &Row, way: Way, guest: &mut Guest) -> Result<f64> {
        let words = self.client(&format!("{}:{PORT}", way.host()), row);
        let line = if way == Way::Native {
            let mut command = vec![self.tools.this.clone().into()];
            command.extend(words.iter().map(Into::into));
            Job::spawn(&[], &command)?.line(self.patience())?
        } else {
            guest.ask(&Request::Run(words), self.patience())?
        };
        let outcome: Outcome =
            serde_json::from_str(&line).with_context(|| format!("the client says `{line}`"))?;
        ensure!(outcome.value > 0.0, "nothing came");
        Ok(row.value(outcome.value))
    }
}
