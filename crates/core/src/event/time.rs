//! The time of an event.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A time with microseconds, in UTC: `2026-11-24T12:34:56.789012Z` (RFC 3339) in JSON and Display.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(u64);

const MICROS: u64 = 1_000_000;
const DAY: u64 = 24 * 60 * 60;

impl From<SystemTime> for Time {
    /// Times before 1970 are 1970.
    fn from(time: SystemTime) -> Self {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        Self(u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
    }
}

impl Time {
    /// From microseconds since 1970.
    #[must_use]
    pub fn from_micros(micros: u64) -> Self {
        Self(micros)
    }

    /// Microseconds since 1970.
    #[must_use]
    pub fn micros(self) -> u64 {
        self.0
    }

    /// Display without the date: `12:34:56.789`.
    #[must_use]
    pub fn of_day(self) -> impl fmt::Display {
        let (hour, minute, second) = self.clock();
        format!("{hour:02}:{minute:02}:{second:02}.{:03}", self.0 % MICROS / 1000)
    }

    fn clock(self) -> (u64, u64, u64) {
        let second = self.0 / MICROS % DAY;
        (second / 3600, second / 60 % 60, second % 60)
    }

    /// Year, month and day: the days since 1970-01-01 in the Gregorian calendar, counted in eras of
    /// 400 years that begin on the first of March, so that the leap day is the last of its year.
    fn date(self) -> (u64, u64, u64) {
        let days = self.0 / MICROS / DAY + 719_468;
        let (era, day_of_era) = (days / 146_097, days % 146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let from_march = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * from_march + 2) / 5 + 1;
        let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
        (era * 400 + year_of_era + u64::from(month <= 2), month, day)
    }

    fn parse(text: &str) -> Option<Self> {
        let (date, clock) = text.strip_suffix('Z')?.split_once('T')?;
        let mut date = date.split('-').map(number);
        let (year, month, day) = (date.next()??, date.next()??, date.next()??);
        let (clock, fraction) = clock.split_once('.')?;
        let mut clock = clock.split(':').map(number);
        let (hour, minute, second) = (clock.next()??, clock.next()??, clock.next()??);
        let micros = number(fraction).filter(|_| fraction.len() == 6)?;
        let sound = date.next().is_none() && clock.next().is_none();
        let in_range = (1970..=9999).contains(&year)
            && (1..=12).contains(&month)
            && (1..=31).contains(&day)
            && hour < 24
            && minute < 60
            && second < 60;
        if !sound || !in_range {
            return None;
        }
        let year = if month <= 2 { year - 1 } else { year };
        let (era, year_of_era) = (year / 400, year % 400);
        let from_march = if month > 2 { month - 3 } else { month + 9 };
        let day_of_year = (153 * from_march + 2) / 5 + day - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = (era * 146_097 + day_of_era).checked_sub(719_468)?;
        Some(Self((days * DAY + hour * 3600 + minute * 60 + second) * MICROS + micros))
    }
}

/// Digits alone, and not more than fit any field.
fn number(text: &str) -> Option<u64> {
    let plain = (1..=6).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
    plain.then(|| text.parse().ok()).flatten()
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ((year, month, day), (hour, minute, second)) = (self.date(), self.clock());
        let micros = self.0 % MICROS;
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z")
    }
}

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| D::Error::custom("a time is written 2026-11-24T12:34:56.789012Z"))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_times() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000000Z"),
            (951_782_400, "2000-02-29T00:00:00.000000Z"),
            (951_868_800, "2000-03-01T00:00:00.000000Z"),
            (1_732_451_696, "2024-11-24T12:34:56.000000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000000Z"),
        ] {
            assert_eq!(Time::from_micros(seconds * MICROS).to_string(), text);
        }
        assert_eq!(Time::from_micros(45_296_789_012).of_day().to_string(), "12:34:56.789");
    }

    #[test]
    fn other_texts_are_not_times() {
        for text in
            ["", "2024-11-24", "2024-13-24T12:34:56.000000Z", "2024-11-24T12:34:56Z", "-1-1-1T1:1:1.000000Z"]
        {
            assert_eq!(Time::parse(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn text_is_read_back(micros in 0..253_402_300_799_999_999_u64) {
            let time = Time::from_micros(micros);
            prop_assert_eq!(Time::parse(&time.to_string()), Some(time));
        }

        #[test]
        fn nothing_panics(micros: u64, text in "[0-9TZ:.-]{0,40}") {
            let _ = (Time::from_micros(micros).to_string(), Time::parse(&text));
        }
    }
}
