//! Options as `getsockopt` and `setsockopt` of a program lay them out: for one whose socket cannot answer itself.

use super::{Entry, Layout, MICROS, TABLE, padded};
use kso_wire::{CONGESTION_CONTROLS, Family, OptionName, OptionValue};

fn entry_of(name: OptionName) -> Option<&'static Entry> {
    TABLE.iter().find(|entry| entry.name == name)
}

/// The portable name of the option `number` of `level`, if a socket of this family has it.
#[must_use]
pub fn name_of(level: i32, number: i32, family: Family) -> Option<OptionName> {
    let found = TABLE.iter().find(|entry| entry.level == level && entry.number == number)?;
    found.family.is_none_or(|only| only == family).then_some(found.name)
}

/// The bytes that `getsockopt` gives for a value.
#[must_use]
pub fn to_bytes(name: OptionName, value: OptionValue) -> Vec<u8> {
    let int = |value: i64| i32::try_from(value).unwrap_or(i32::MAX).to_ne_bytes();
    match entry_of(name).map_or(Layout::Int, |entry| entry.layout) {
        Layout::Int => int(value).to_vec(),
        Layout::Doubled => int(value.saturating_mul(2)).to_vec(),
        Layout::Linger => [int((value >= 0).into()), int(value.max(0))].concat(),
        Layout::Time => [(value / MICROS).to_ne_bytes(), (value % MICROS).to_ne_bytes()].concat(),
        Layout::Congestion => {
            let known = usize::try_from(value).ok().and_then(|at| CONGESTION_CONTROLS.get(at));
            padded(known.copied().unwrap_or("cubic")).to_vec()
        }
    }
}

/// The value that `setsockopt` is given. `None`: too short, or a name that is not known.
#[must_use]
pub fn from_bytes(name: OptionName, bytes: &[u8]) -> Option<OptionValue> {
    let entry = entry_of(name)?;
    let int = |at: usize| bytes.get(at..)?.first_chunk::<4>().map(|bytes| i32::from_ne_bytes(*bytes));
    let long = |at: usize| bytes.get(at..)?.first_chunk::<8>().map(|bytes| i64::from_ne_bytes(*bytes));
    Some(match entry.layout {
        // ip(7) takes a byte too.
        Layout::Int if entry.level == libc::IPPROTO_IP && (1..4).contains(&bytes.len()) => {
            (*bytes.first()?).into()
        }
        Layout::Int | Layout::Doubled => int(0)?.into(),
        Layout::Linger => {
            let seconds = int(4)?;
            if int(0)? == 0 { -1 } else { seconds.max(0).into() }
        }
        Layout::Time => long(0)?.checked_mul(MICROS)?.checked_add(long(8)?)?,
        Layout::Congestion => {
            let text = bytes.split(|&byte| byte == 0).next()?;
            let at = CONGESTION_CONTROLS.iter().position(|known| known.as_bytes() == text)?;
            i64::try_from(at).ok()?
        }
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn values_survive_the_round_trip() {
        for (name, value) in [
            (OptionName::NoDelay, 1),
            (OptionName::Linger, -1),
            (OptionName::Linger, 0),
            (OptionName::Linger, 5),
            (OptionName::ReceiveTimeout, 1_250_000),
            (OptionName::CongestionControl, 1),
            (OptionName::UnicastHops, -1),
        ] {
            assert_eq!(from_bytes(name, &to_bytes(name, value)), Some(value), "{name:?}");
        }
        assert_eq!(to_bytes(OptionName::SendBuffer, 1000), 2000_i32.to_ne_bytes());
        assert_eq!(from_bytes(OptionName::SendBuffer, &1000_i32.to_ne_bytes()), Some(1000));
        assert_eq!(from_bytes(OptionName::CongestionControl, b"reno"), Some(0));
        assert_eq!(from_bytes(OptionName::CongestionControl, b"nonesuch"), None);
        assert_eq!(from_bytes(OptionName::NoDelay, &[1]), None);
        assert_eq!(from_bytes(OptionName::TypeOfService, &[16]), Some(16));
    }

    #[test]
    fn options_are_known_by_number() {
        assert_eq!(name_of(libc::IPPROTO_TCP, libc::TCP_NODELAY, Family::V4), Some(OptionName::NoDelay));
        assert_eq!(name_of(libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, Family::V4), None);
        assert_eq!(name_of(libc::IPPROTO_TCP, 9999, Family::V4), None);
    }
}
