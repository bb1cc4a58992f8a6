//! Releases, and which is newer.

use std::cmp::Ordering;

/// As people order them: numbers by value, the rest by letters.
pub fn compare(one: &str, other: &str) -> Ordering {
    runs(one).cmp(runs(other))
}

/// Whether `release` is `wanted`, or of the version `wanted`: 6.1.0-44 is of 6 and of 6.1, not of 6.10 or of 6.12.
pub fn is_of(release: &str, wanted: &str) -> bool {
    let rest = release.strip_prefix(wanted);
    rest.is_some_and(|rest| !rest.starts_with(|next: char| next.is_ascii_digit())) && !wanted.is_empty()
}

/// A run of digits is worth its number, anything else its characters; a number is newer than a letter is.
fn runs(text: &str) -> impl Iterator<Item = (u64, &str)> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let digits = rest.starts_with(|c: char| c.is_ascii_digit());
        let end = rest.find(|c: char| c.is_ascii_digit() != digits).unwrap_or(rest.len());
        let (run, after) = rest.split_at(end);
        rest = after;
        match run {
            "" => None,
            _ if digits => Some((run.parse().unwrap_or(u64::MAX), "")),
            _ => Some((0, run)),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newer_is_greater() {
        for pair in [
            ["6.1.0-9-amd64", "6.1.0-44-amd64"],
            ["6.1.0-44", "6.12.1"],
            ["5.10.0-40", "6.1.0-1"],
            ["6.12.9", "6.12.10+deb13"],
            ["6.1", "6.1.0"],
        ] {
            assert_eq!(compare(pair[0], pair[1]), Ordering::Less, "{pair:?}");
        }
    }

    #[test]
    fn a_version_names_its_releases() {
        assert!(is_of("6.1.0-44-cloud-amd64", "6.1") && is_of("6.1.0-44", "6.1.0-44") && is_of("6.1.0", "6"));
        assert!(!is_of("6.12.1", "6.1") && !is_of("6.1.0", "") && !is_of("6.1", "6.1.0"));
    }
}
