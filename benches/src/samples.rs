//! The raw data: one line of CSV for each repetition.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

const HEADER: &str = "row,variant,repetition,value,unit";

/// One repetition's value.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub row: String,
    pub variant: String,
    pub repetition: u32,
    pub value: f64,
    pub unit: String,
}

/// All repetitions of all rows.
#[derive(Clone, Debug, Default)]
pub struct Samples(Vec<Sample>);

impl Samples {
    pub fn add(&mut self, row: &str, variant: &str, repetition: u32, value: f64, unit: &str) {
        let (row, variant, unit) = (row.to_owned(), variant.to_owned(), unit.to_owned());
        self.0.push(Sample { row, variant, repetition, value, unit });
    }

    /// The repetitions of a row and variant.
    pub fn of(&self, row: &str, variant: &str) -> Vec<(u32, f64)> {
        let wanted = self.0.iter().filter(|sample| sample.row == row && sample.variant == variant);
        wanted.map(|sample| (sample.repetition, sample.value)).collect()
    }

    pub fn values(&self, row: &str, variant: &str) -> Vec<f64> {
        self.of(row, variant).into_iter().map(|(_, value)| value).collect()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Puts `newer` in place of what is here of the same rows.
    pub fn replace(&mut self, newer: Samples) {
        let base = |row: &str| row.split('/').next().unwrap_or_default().to_owned();
        self.0.retain(|old| !newer.0.iter().any(|new| base(&new.row) == base(&old.row)));
        self.0.extend(newer.0);
    }

    pub fn load(path: &Path) -> Result<Samples> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Samples::default()),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        parse(&text).with_context(|| format!("{} is no data of ours", path.display()))
    }

    pub fn save(&self, path: &Path) -> Result<()> {
        fs::write(path, self.to_csv()).with_context(|| format!("cannot write {}", path.display()))
    }

    fn to_csv(&self) -> String {
        let mut text = format!("{HEADER}\n");
        for Sample { row, variant, repetition, value, unit } in &self.0 {
            let _ = writeln!(text, "{row},{variant},{repetition},{value},{unit}");
        }
        text
    }
}

fn parse(text: &str) -> Result<Samples> {
    let mut samples = Samples::default();
    for line in text.lines().filter(|line| !line.is_empty() && *line != HEADER) {
        let mut fields = line.split(',');
        let mut next = || fields.next().with_context(|| format!("`{line}`: a field is missing"));
        let (row, variant) = (next()?, next()?);
        let (repetition, value) = (next()?.parse()?, next()?.parse()?);
        samples.add(row, variant, repetition, value, next()?);
    }
    Ok(samples)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_and_replace() {
        let mut old = Samples::default();
        old.add("up-1", "native", 0, 21.5, "Gbit/s");
        old.add("udp", "kso", 0, 1.0, "Gbit/s");
        old.add("udp/loss", "kso", 0, 50.0, "%");
        assert_eq!(parse(&old.to_csv()).unwrap().0, old.0);
        let mut new = Samples::default();
        new.add("udp", "kso", 0, 2.0, "Gbit/s");
        old.replace(new);
        assert_eq!(old.values("udp", "kso"), vec![2.0]);
        assert!(old.values("udp/loss", "kso").is_empty());
        assert_eq!(old.values("up-1", "native"), vec![21.5]);
    }
}
