//! How a stack is set up.

use ipnet::IpNet;
use std::net::IpAddr;

/// Most addresses that can be given.
const MAX_ADDRESSES: usize = 5;

/// How a stack is set up.
#[derive(Clone, Debug)]
pub struct Config {
    /// Its addresses, with their networks.
    pub addresses: Vec<IpNet>,
    /// Where packets to elsewhere go, at most one of a family.
    pub gateways: Vec<IpAddr>,
    /// The longest packet that the link carries, bytes.
    pub mtu: usize,
    /// The link completes checksums, and cuts TCP into segments.
    pub offload: bool,
}

/// A configuration that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// No address.
    #[error("it has no address: give it one, address=10.77.0.2/24")]
    NoAddress,
    /// Too many.
    #[error("it has more than {MAX_ADDRESSES} addresses")]
    TooManyAddresses,
    /// One that nobody can have.
    #[error("{0} is not the address of a host")]
    Address(IpAddr),
    /// A gateway that cannot be reached.
    #[error("the gateway {0} is not in the network of any of its addresses")]
    Gateway(IpAddr),
    /// A link for less than IPv6 (RFC 8200), or for more than there is.
    #[error("the link carries packets of {0} bytes; they have to be of 1280 to 65535")]
    Mtu(usize),
}

impl Config {
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        if self.addresses.is_empty() {
            return Err(ConfigError::NoAddress);
        }
        if self.addresses.len() > MAX_ADDRESSES {
            return Err(ConfigError::TooManyAddresses);
        }
        let is_host = |address: IpAddr| {
            let broadcast = matches!(address, IpAddr::V4(v4) if v4.is_broadcast());
            !address.is_unspecified() && !address.is_multicast() && !address.is_loopback() && !broadcast
        };
        if let Some(wrong) = self.addresses.iter().map(IpNet::addr).find(|address| !is_host(*address)) {
            return Err(ConfigError::Address(wrong));
        }
        let near = |gateway: &IpAddr| self.addresses.iter().any(|own| own.contains(gateway));
        let local = |gateway: &IpAddr| matches!(gateway, IpAddr::V6(v6) if v6.is_unicast_link_local());
        if let Some(far) = self.gateways.iter().find(|gateway| !near(gateway) && !local(gateway)) {
            return Err(ConfigError::Gateway(*far));
        }
        if !(1280..=crate::frame::MAX_PACKET).contains(&self.mtu) {
            return Err(ConfigError::Mtu(self.mtu));
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_is_refused() {
        let config = |addresses: &[&str], gateways: &[&str], mtu| Config {
            addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
            gateways: gateways.iter().map(|text| text.parse().unwrap()).collect(),
            mtu,
            offload: true,
        };
        let good = config(&["10.77.0.2/24", "fd77::2/64"], &["10.77.0.1", "fe80::1"], 1500);
        assert_eq!(good.check(), Ok(()));
        for (wrong, error) in [
            (config(&[], &[], 1500), ConfigError::NoAddress),
            (config(&["10.0.0.1/8"; 6], &[], 1500), ConfigError::TooManyAddresses),
            (config(&["127.0.0.1/8"], &[], 1500), ConfigError::Address([127, 0, 0, 1].into())),
            (config(&["10.0.0.1/24"], &["10.0.1.1"], 1500), ConfigError::Gateway([10, 0, 1, 1].into())),
            (config(&["10.0.0.1/24"], &[], 70_000), ConfigError::Mtu(70_000)),
        ] {
            assert_eq!(wrong.check(), Err(error));
        }
    }
}
