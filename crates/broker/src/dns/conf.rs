//! `/etc/resolv.conf` (resolv.conf(5)): which servers are asked, how often and how long.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::time::Duration;

const PORT: u16 = 53;
/// `MAXNS`.
const MAX_SERVERS: usize = 3;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ResolvConf {
    /// In order; never empty.
    pub servers: Vec<SocketAddr>,
    /// How long one try may take.
    pub timeout: Duration,
    /// How often each server is asked.
    pub attempts: usize,
    /// TCP only.
    pub use_tcp: bool,
}

impl ResolvConf {
    pub fn parse(text: &str) -> Self {
        let mut conf =
            Self { servers: Vec::new(), timeout: Duration::from_secs(5), attempts: 2, use_tcp: false };
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                Some("nameserver") => {
                    conf.servers
                        .extend(words.next().and_then(server).filter(|_| conf.servers.len() < MAX_SERVERS));
                }
                Some("options") => words.for_each(|option| conf.option(option)),
                _ => {}
            }
        }
        if conf.servers.is_empty() {
            conf.servers.push(SocketAddr::from((Ipv4Addr::LOCALHOST, PORT)));
        }
        conf
    }

    fn option(&mut self, option: &str) {
        let (name, value) = option.split_once(':').unwrap_or((option, ""));
        match (name, value.parse::<u8>()) {
            ("timeout", Ok(seconds)) => self.timeout = Duration::from_secs(seconds.clamp(1, 30).into()),
            ("attempts", Ok(attempts)) => self.attempts = attempts.clamp(1, 5).into(),
            ("use-vc", _) => self.use_tcp = true,
            _ => {}
        }
    }
}

/// An address, of a link-local one with its interface: `fe80::1%eth0`.
fn server(word: &str) -> Option<SocketAddr> {
    if let Some((address, interface)) = word.split_once('%') {
        let address: Ipv6Addr = address.parse().ok()?;
        let scope = interface.parse().ok().or_else(|| index_of(interface))?;
        return Some(SocketAddrV6::new(address, PORT, 0, scope).into());
    }
    Some(SocketAddr::new(word.parse::<IpAddr>().ok()?, PORT))
}

fn index_of(interface: &str) -> Option<u32> {
    if interface.contains(['/', '.']) {
        return None;
    }
    std::fs::read_to_string(format!("/sys/class/net/{interface}/ifindex")).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_usual_file_is_read() {
        let text = "# a\nsearch example.org\nnameserver 192.0.2.53\nnameserver 2001:db8::53\nnameserver x\n\
                    options ndots:2 timeout:3 attempts:9 use-vc\nnameserver fe80::1%7";
        let conf = ResolvConf::parse(text);
        let servers: Vec<String> = conf.servers.iter().map(ToString::to_string).collect();
        assert_eq!(servers, ["192.0.2.53:53", "[2001:db8::53]:53", "[fe80::1%7]:53"]);
        assert_eq!((conf.timeout.as_secs(), conf.attempts, conf.use_tcp), (3, 5, true));
    }

    #[test]
    fn without_a_server_it_is_this_host() {
        assert_eq!(ResolvConf::parse("").servers, [SocketAddr::from((Ipv4Addr::LOCALHOST, 53))]);
    }
}
