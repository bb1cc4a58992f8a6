//! `kso-bench files`: a guest's outsourced files against virtiofsd and a disk of its own, in the same guest.
//!
//! ```text
//!   guest                                   host
//!   /srv/kso ------- virtiofs: kso vm ---->  SCRATCH/tree
//!   /srv/virtiofsd - virtiofs: virtiofsd ->  the same
//!   /srv/disk ------ virtio-blk, ext4 ---->  SCRATCH/disk.ext4, a copy of it
//! ```

mod http;
mod place;
mod report;
mod rows;
pub mod work;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kso_vm::{Choice, Kernel};

use crate::client::Outcome;
use crate::guest::agent::Request;
use crate::guest::machine::Guest;
use crate::namespace;
use crate::samples::Samples;
use crate::sandbox::{Job, Tools};
use place::{Outside, Way};
use rows::{Row, Work};

#[derive(clap::Args)]
pub struct Args {
    /// Few short repetitions: to see that everything works
    #[arg(long)]
    quick: bool,
    /// Only rows whose names begin so, with the other rows' data kept; may be given more than once
    #[arg(long, value_name = "ROW")]
    only: Vec<String>,
    /// Repetitions [default: 7, or 2 with --quick]
    #[arg(long)]
    repetitions: Option<u32>,
    /// Milliseconds measured in each repetition [default: 1000, or 300 with --quick]
    #[arg(long)]
    millis: Option<u64>,
    /// The guest's kernel, of those that `kso kernels` lists
    #[arg(long, default_value = "6.1")]
    kernel: String,
    /// Directory for the data, the table and the plot [default: docs/bench, or target/bench with --quick]
    #[arg(long)]
    output: Option<PathBuf>,
    /// The kso to measure [default: beside this program]
    #[arg(long)]
    kso: Option<PathBuf>,
    /// Date to print in the table
    #[arg(long)]
    date: Option<String>,
    /// Set by the program itself when it runs again in its own namespaces
    #[arg(long, hide = true)]
    inside: bool,
}

/// Where the results are that the README shows, too.
const PUBLISHED: &str = "docs/bench";
/// Beyond the time that is measured; an emulated guest that syncs 64 MiB takes its time.
const PATIENCE: Duration = Duration::from_secs(120);
/// A way that failed so often in a row is given up for it.
const FAILURES_MAX: usize = 2;

impl Args {
    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|prefix| name.starts_with(prefix.as_str()))
    }

    fn repetitions(&self) -> u32 {
        self.repetitions.unwrap_or(if self.quick { 2 } else { 7 })
    }

    fn millis(&self) -> u64 {
        self.millis.unwrap_or(if self.quick { 300 } else { 1000 })
    }
}

/// A run that is being made.
struct Run<'a> {
    args: &'a Args,
    samples: Samples,
    failures: Vec<String>,
    this: PathBuf,
    guest: Guest,
    outside: Outside,
}

pub fn run(args: &Args) -> Result<()> {
    if !args.inside {
        // As root: virtiofsd shares files of any owner, and so does kso.
        return namespace::enter(true);
    }
    namespace::prepare()?;
    let scratch = tempfile::tempdir()?;
    let this = std::env::current_exe()?;
    let kso = args.kso.clone().unwrap_or_else(|| this.with_file_name("kso"));
    let kso = kso.canonicalize().with_context(|| format!("{} (make build)", kso.display()))?;
    let kernel = kso_vm::kernels::find(&Choice::Release(args.kernel.clone()))?;
    let tools = Tools { kso, this: this.clone(), scratch: scratch.path().to_owned() };
    let start = Instant::now();
    let mut run = Run::boot(args, &tools, &kernel, this)?;
    run.measure_all();
    run.page_cache(&tools, &kernel);
    let Run { samples: new, failures, .. } = run;
    eprintln!("measured in {:.0} s", start.elapsed().as_secs_f64());
    for failure in &failures {
        eprintln!("failed: {failure}");
    }
    let fallback = if args.quick { "target/bench" } else { PUBLISHED };
    let output = args.output.clone().unwrap_or_else(|| fallback.into());
    fs::create_dir_all(&output).with_context(|| format!("cannot make {}", output.display()))?;
    let path = output.join(report::DATA);
    let mut samples = if args.only.is_empty() { Samples::default() } else { Samples::load(&path)? };
    samples.replace(new);
    samples.save(&path)?;
    let facts = report::facts(&tools, &kernel, args.date.as_deref());
    report::write(&output, &samples, &facts, &failures)?;
    if output == Path::new(PUBLISHED) {
        crate::readme::update(Path::new("README.md"), "bench-files", &report::readme(&samples))?;
    }
    println!("{}", report::table(&samples));
    println!("The data, the table and the plot are in {}", output.display());
    Ok(())
}

impl<'a> Run<'a> {
    fn boot(args: &'a Args, tools: &Tools, kernel: &Kernel, this: PathBuf) -> Result<Self> {
        let outside = Outside::make(&tools.scratch)?;
        let mut guest = Guest::start(tools, kernel, &outside.options())?;
        outside.join(&mut |request| guest.ask(&request, PATIENCE))?;
        Ok(Self { args, samples: Samples::default(), failures: Vec::new(), this, guest, outside })
    }

    /// Every row by every way, again and again: what the machine does for a while to one it does to all.
    fn measure_all(&mut self) {
        let rows: Vec<&Row> = rows::ROWS.iter().filter(|row| self.args.wants(row.name)).collect();
        let mut ways = Way::ALL.to_vec();
        let mut failed: Vec<(&str, Way)> = Vec::new();
        for repetition in 0..self.args.repetitions() {
            for row in &rows {
                for way in ways.clone() {
                    if failed.iter().filter(|one| **one == (row.name, way)).count() >= FAILURES_MAX {
                        continue;
                    }
                    match self.measure(row, way) {
                        Ok(value) => self.samples.add(row.name, way.name(), repetition, value, row.unit),
                        Err(error) => {
                            failed.push((row.name, way));
                            let what = format!("{} {} {repetition}: {error:#}", row.name, way.name());
                            self.failures.push(what);
                        }
                    }
                }
            }
            eprintln!("repetition {}", repetition + 1);
            // No way always follows the same one.
            ways.rotate_left(1);
        }
    }

    fn measure(&mut self, row: &Row, way: Way) -> Result<f64> {
        let time = Duration::from_millis(self.args.millis());
        let work = match row.work {
            Work::Serve(file) => return http::rate(self.outside.server(way), file, time),
            Work::Files(work) => work,
        };
        let words = ["disk", work, "--directory", &self.outside.directory(way), "--millis"];
        let mut words: Vec<String> = words.map(str::to_owned).into();
        words.push(time.as_millis().to_string());
        let patience = PATIENCE + time;
        let line = if way == Way::Native {
            let mut command = vec![self.this.clone().into()];
            command.extend(words.iter().map(Into::into));
            Job::spawn(&[], &command)?.line(patience)?
        } else {
            // On the host files stay in memory: there all are read from it.
            words.push("--forget".to_owned());
            self.guest.ask(&Request::Run(words), patience)?
        };
        let outcome: Outcome =
            serde_json::from_str(&line).with_context(|| format!("the workload says `{line}`"))?;
        ensure!(outcome.value > 0.0, "nothing was done");
        Ok(outcome.value)
    }

    /// Four guests read one file: what the host keeps of it.
    fn page_cache(&mut self, tools: &Tools, kernel: &Kernel) {
        if !self.args.wants(rows::PAGE_CACHE) {
            return;
        }
        if let Err(error) =
            place::page_cache(&self.outside, tools, kernel, self.args.quick, &mut self.samples)
        {
            self.failures.push(format!("{}: {error:#}", rows::PAGE_CACHE));
        }
    }
}
