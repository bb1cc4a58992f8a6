//! A network of addresses.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// The addresses that begin as one of them does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Network {
    /// One of them.
    pub address: IpAddr,
    /// So many leading bits are the same in all. More than an address has mean all of them.
    pub bits: u8,
}

/// A text is no network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}: not a network (an address, a slash and the number of leading bits, as 10.1.0.0/16)")]
pub struct NotANetwork(String);

impl Network {
    /// Whether `address` is in it. An IPv4 address is the same when IPv6 carries it.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        let different = match (self.address.to_canonical(), address.to_canonical()) {
            (IpAddr::V4(one), IpAddr::V4(other)) => (u32::from(one) ^ u32::from(other)).leading_zeros(),
            (IpAddr::V6(one), IpAddr::V6(other)) => (u128::from(one) ^ u128::from(other)).leading_zeros(),
            _ => return false,
        };
        let whole = if self.address.is_ipv4() { 32 } else { 128 };
        different >= u32::from(self.bits).min(whole)
    }
}

impl FromStr for Network {
    type Err = NotANetwork;

    /// A single address is a network, too.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || NotANetwork(text.to_owned());
        let (address, bits) = text.split_once('/').map_or((text, None), |(one, two)| (one, Some(two)));
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.map_or(Ok(most), str::parse::<u8>).map_err(|_| wrong())?;
        if bits > most { Err(wrong()) } else { Ok(Self { address, bits }) }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_a_network() {
        for (network, inside, outside) in [
            ("10.79.1.0/24", "10.79.1.255", "10.79.2.0"),
            ("10.79.1.1", "::ffff:10.79.1.1", "10.79.1.2"),
            ("fd00::/8", "fdff::1", "fe00::1"),
            ("::1", "::1", "0.0.0.1"),
            ("128.0.0.0/1", "255.0.0.1", "::1"),
        ] {
            let network: Network = network.parse().unwrap();
            assert!(network.contains(inside.parse().unwrap()), "{network} {inside}");
            assert!(!network.contains(outside.parse().unwrap()), "{network} {outside}");
        }
        let everything: Network = "0.0.0.0/0".parse().unwrap();
        assert!(everything.contains("9.9.9.9".parse().unwrap()));
        let odd = Network { address: "10.0.0.1".parse().unwrap(), bits: 200 };
        assert!(odd.contains("10.0.0.1".parse().unwrap()) && !odd.contains("10.0.0.2".parse().unwrap()));
    }

    #[test]
    fn what_is_none() {
        for text in ["", "10.0.0.0/33", "10.0.0.0/", "10.0.0/8", "::/129", "name/8", "1.2.3.4/-1"] {
            let error = text.parse::<Network>().unwrap_err();
            assert!(error.to_string().contains("10.1.0.0/16"));
        }
    }
}
