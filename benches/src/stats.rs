//! Medians and quartiles, and ratios of runs that were made next to each other.

/// Median and quartiles.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    pub count: usize,
    pub low: f64,
    pub median: f64,
    pub high: f64,
}

/// None of no values.
pub fn summary(values: &[f64]) -> Option<Summary> {
    let mut sorted: Vec<f64> = values.iter().copied().filter(|value| value.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    Some(Summary {
        count: sorted.len(),
        low: quantile(&sorted, 0.25)?,
        median: quantile(&sorted, 0.5)?,
        high: quantile(&sorted, 0.75)?,
    })
}

/// By linear interpolation between the two nearest.
fn quantile(sorted: &[f64], part: f64) -> Option<f64> {
    let place = part * sorted.len().checked_sub(1)? as f64;
    let below = sorted.get(place.floor() as usize)?;
    let above = sorted.get(place.ceil() as usize)?;
    Some(below + (above - below) * place.fract())
}

/// The ratios of values of the same repetition.
pub fn paired_ratios(values: &[(u32, f64)], base: &[(u32, f64)]) -> Vec<f64> {
    values
        .iter()
        .filter_map(|(repetition, value)| {
            let (_, base) = base.iter().find(|(other, _)| other == repetition)?;
            (*base > 0.0).then(|| value / base)
        })
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn quartiles() {
        let summary = summary(&[5.0, 1.0, 2.0, 4.0, 3.0]).unwrap();
        assert_eq!((summary.low, summary.median, summary.high, summary.count), (2.0, 3.0, 4.0, 5));
        assert_eq!(super::summary(&[]), None);
        assert_eq!(super::summary(&[1.0, 2.0]).unwrap().median, 1.5);
    }

    #[test]
    fn pairs() {
        assert_eq!(paired_ratios(&[(0, 2.0), (2, 9.0)], &[(0, 4.0), (1, 1.0)]), vec![0.5]);
    }
}
