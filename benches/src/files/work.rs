//! `kso-bench disk`: one workload on a directory, in the guest or on the host.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::client::Outcome;

/// Bytes of the file that is read.
pub const BIG: u64 = 256 << 20;
/// Bytes written in one go.
const WRITTEN: usize = 64 << 20;
/// Files in the directory of small ones.
pub const SMALL: u32 = 1000;
const PAGE: usize = 4096;
const BLOCK: usize = 1 << 20;
/// So many operations between looks at the clock.
const STRIDE: u32 = 16;

#[derive(clap::Args)]
pub struct Args {
    /// Which, as the rows of `kso-bench files` are called
    work: String,
    #[arg(long)]
    directory: PathBuf,
    #[arg(long, default_value_t = 1000)]
    millis: u64,
    /// This kernel forgets what it has of files and names before what is to be cold
    #[arg(long)]
    forget: bool,
}

/// What a directory must have for all workloads.
pub fn prepare(directory: &Path) -> Result<()> {
    let block: Vec<u8> = (0..BLOCK).map(|at| ((at * 31) >> 3) as u8).collect();
    for (name, size) in [("big", BIG), ("10m", 10_000_000), ("100m", 100_000_000)] {
        let mut file = File::create(directory.join(name))?;
        let mut left = usize::try_from(size)?;
        while left > 0 {
            let part = block.get(..left.min(BLOCK)).unwrap_or_default();
            file.write_all(part)?;
            left -= part.len();
        }
    }
    fs::write(directory.join("random"), vec![0; WRITTEN])?;
    let small = directory.join("small");
    fs::create_dir(&small)?;
    for number in 0..SMALL {
        fs::write(small.join(number.to_string()), block.get(..PAGE).unwrap_or_default())?;
    }
    Ok(())
}

/// The kernel forgets what it has of files and names: proc_sys_vm(5).
fn forget(wanted: bool) -> Result<()> {
    if wanted {
        fs::write("/proc/sys/vm/drop_caches", "3").context("drop_caches")?;
    }
    Ok(())
}

pub fn run(args: &Args) -> Result<()> {
    let time = Duration::from_millis(args.millis);
    let directory = &args.directory;
    let value = match args.work.as_str() {
        "read-cold" => {
            forget(args.forget)?;
            read(directory)?
        }
        "read-warm" => {
            read(directory)?;
            read(directory)?
        }
        "write" => write(directory)?,
        "read-random" => {
            forget(args.forget)?;
            read_random(directory, time)?
        }
        "write-random" => write_random(directory, time)?,
        "stat" => stat(directory, time)?,
        "walk" => walk(directory, time, args.forget)?,
        "open-read-close" => open_read_close(directory, time)?,
        "create-unlink" => create_unlink(directory, time)?,
        other => bail!("no workload is called `{other}`"),
    };
    println!("{}", serde_json::to_string(&Outcome { value, loss: None })?);
    Ok(())
}

fn per_second(count: f64, since: Instant) -> f64 {
    count / since.elapsed().as_secs_f64()
}

fn read(directory: &Path) -> Result<f64> {
    let mut buffer = vec![0; BLOCK];
    let start = Instant::now();
    let mut file = File::open(directory.join("big"))?;
    let mut total = 0;
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            got => total += got,
        }
    }
    Ok(per_second(total as f64 / 1e6, start))
}

fn write(directory: &Path) -> Result<f64> {
    let path = directory.join("written");
    let block = vec![7; BLOCK];
    let start = Instant::now();
    let mut file = File::create(&path)?;
    for _ in 0..WRITTEN / BLOCK {
        file.write_all(&block)?;
    }
    file.sync_all()?;
    let rate = per_second(WRITTEN as f64 / 1e6, start);
    fs::remove_file(path)?;
    Ok(rate)
}

/// xorshift: enough to choose places with.
struct Lots(u64);

impl Lots {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// Repeats `step` until the time is over: how often a second.
fn repeat(time: Duration, mut step: impl FnMut(u32) -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    let mut count = 0;
    while start.elapsed() < time {
        for _ in 0..STRIDE {
            step(count)?;
            count += 1;
        }
    }
    Ok(per_second(f64::from(count), start))
}

fn read_random(directory: &Path, time: Duration) -> Result<f64> {
    let file = File::open(directory.join("big"))?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random)?;
    let mut lots = Lots(0x9e37_79b9_7f4a_7c15 ^ u64::from(std::process::id()));
    let mut page = [0; PAGE];
    repeat(time, |_| Ok(file.read_exact_at(&mut page, lots.below(BIG / PAGE as u64) * PAGE as u64)?))
}

fn write_random(directory: &Path, time: Duration) -> Result<f64> {
    let file = OpenOptions::new().write(true).open(directory.join("random"))?;
    let mut lots = Lots(0x9e37_79b9_7f4a_7c15 ^ u64::from(std::process::id()));
    let page = [1; PAGE];
    let pages = (WRITTEN / PAGE) as u64;
    repeat(time, |_| Ok(file.write_all_at(&page, lots.below(pages) * PAGE as u64)?))
}

fn small(directory: &Path) -> Vec<PathBuf> {
    (0..SMALL).map(|number| directory.join("small").join(number.to_string())).collect()
}

fn nth(paths: &[PathBuf], count: u32) -> Result<&PathBuf> {
    paths.get(count as usize % paths.len().max(1)).context("no files")
}

fn stat(directory: &Path, time: Duration) -> Result<f64> {
    let paths = small(directory);
    repeat(time, |count| {
        fs::metadata(nth(&paths, count)?)?;
        Ok(())
    })
}

/// Only the walks are timed, not the forgetting.
fn walk(directory: &Path, time: Duration, cold: bool) -> Result<f64> {
    let mut spent = Duration::ZERO;
    let mut count = 0.0;
    while spent < time {
        forget(cold)?;
        let start = Instant::now();
        for entry in fs::read_dir(directory.join("small"))? {
            entry?.metadata()?;
            count += 1.0;
        }
        spent += start.elapsed();
    }
    Ok(count / spent.as_secs_f64())
}

fn open_read_close(directory: &Path, time: Duration) -> Result<f64> {
    let paths = small(directory);
    let mut page = [0; PAGE];
    repeat(time, |count| Ok(File::open(nth(&paths, count)?)?.read_exact(&mut page)?))
}

fn create_unlink(directory: &Path, time: Duration) -> Result<f64> {
    let path = directory.join("created");
    repeat(time, |_| {
        File::create(&path)?;
        Ok(fs::remove_file(&path)?)
    })
}
