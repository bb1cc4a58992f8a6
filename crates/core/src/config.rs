//! `kso.toml`: the configuration of `kso broker`.
//!
//! ```toml
//! socket = "/run/kso/broker.sock"
//! max_sessions = 64
//!
//! [policy]                      # what no session may do, whatever its own rules say
//! allow = ["*.debian.org:443"]
//! deny = ["*:25"]
//! no_net = false
//!
//! [publish]
//! enabled = true
//! addresses = ["127.0.0.1", "::1"]
//! ports = "1024-65535"
//!
//! [metrics]
//! listen = "127.0.0.1:9464"     # or "unix:/run/kso/metrics.sock"
//!
//! [guest.web]                   # a guest whose VMM something else starts; other guests know it as web.kso.internal
//! vsock = "/run/kso/web.vsock"  # where its VMM finds the vsock device (vhost-user)
//! publish = ["8080:80"]
//! allow = ["*.debian.org:443"]
//!
//! [[guest.web.share]]
//! socket = "/run/kso/web.root"  # where its VMM finds the file system device (vhost-user)
//! tag = "root"
//! directory = "/srv/web"
//! read_only = true
//!
//! [guest.tiny]
//! hybrid = "/run/tiny/v.sock"   # the vsock socket of a Firecracker
//!
//! [kernel.web]                  # an external kernel: see crate::kernels for all settings
//! make = "gvisor"
//! address = ["10.77.0.2/24"]
//!
//! [[route]]                     # which kernels serve what: see crate::routes; what no route fits is the host's
//! services = ["tcp-listen"]
//! ports = "80"
//! strategy = "failover"         # or "fixed", "spread", "shuffle/60"
//! kernels = ["web", "host"]
//! ```
//!
//! Everything may be left out. What is not known is an error, and each error shows its place.

mod external;

use crate::kernels::{KernelError, KernelSpec, Settings};
use crate::policy::{self, Policy, RuleError};
use crate::publish::PublishError;
use crate::routes::{Route, RouteError};
use kso_wire::{LoopbackMode, Publication};
use serde::{Deserialize, Deserializer};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::{Range, RangeInclusive};
use std::path::PathBuf;
use toml::Spanned;

/// A configuration that cannot be used. Display shows the line, the place and what is wrong.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not TOML, or not with these fields.
    #[error("cannot read the configuration: {0}")]
    Toml(#[from] toml::de::Error),
    /// A rule in it cannot be read.
    #[error("in line {line} of the configuration: {error}")]
    Rule {
        /// The line, from 1.
        line: usize,
        /// What is wrong with the rule.
        error: RuleError,
    },
    /// A publication in it cannot be read.
    #[error("in line {line} of the configuration: {error}")]
    Publish {
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        error: PublishError,
    },
    /// An external kernel in it cannot be understood.
    #[error("in the configuration: {0}")]
    Kernel(#[from] KernelError),
    /// A route in it cannot be read.
    #[error("in the route of line {line} of the configuration: {error}")]
    Route {
        /// The line of its services, from 1.
        line: usize,
        /// What is wrong with it, as `--via` has it.
        error: RouteError,
    },
    /// A part of a route has a mark that belongs between parts.
    #[error(
        "in the route of line {line} of the configuration: `{part}` is more than one part: write each by itself"
    )]
    RoutePart {
        /// The line of its services, from 1.
        line: usize,
        /// Which.
        part: String,
    },
    /// A guest has no way in, or two.
    #[error(
        "guest {name} of the configuration needs one of these: vsock = \"PATH\" (a vhost-user device), hybrid = \"PATH\" (Firecracker's socket)"
    )]
    Vsock {
        /// Its name.
        name: String,
    },
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// Where the broker listens; `None` is its place in the runtime directory.
    pub socket: Option<PathBuf>,
    /// At most so many sessions at one time.
    pub max_sessions: Option<u32>,
    /// Rules for every session, in the form of [`Policy::new`].
    pub rules: Vec<(bool, String)>,
    /// No session reaches anything.
    pub no_net: bool,
    /// What sessions may publish.
    pub publish: PublishLimits,
    /// Where metrics are read.
    pub metrics: Option<MetricsAddress>,
    /// Guests that something else starts.
    pub guests: Vec<Guest>,
    /// External kernels, besides the host's own.
    pub kernels: Vec<KernelSpec>,
    /// Which kernels serve what, for every session.
    pub routes: Vec<Route>,
}

/// A guest that something else starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guest {
    /// Its name.
    pub name: String,
    /// How its streams come.
    pub vsock: VsockSocket,
    /// Its rules, in the form of [`Policy::new`].
    pub rules: Vec<(bool, String)>,
    /// It reaches nothing.
    pub no_net: bool,
    /// What is published of it.
    pub publish: Vec<Publication>,
    /// Directories that it sees.
    pub shares: Vec<ShareSocket>,
}

/// How a guest's streams come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VsockSocket {
    /// A vhost-user device on this socket.
    VhostUser(PathBuf),
    /// The socket of a VMM that has a device of its own, as Firecracker.
    Hybrid(PathBuf),
}

/// A directory that a guest sees by a vhost-user device on a socket.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareSocket {
    /// The device's socket.
    pub socket: PathBuf,
    /// The tag that the guest mounts it by.
    pub tag: String,
    /// The directory.
    pub directory: PathBuf,
    /// No writing.
    #[serde(default)]
    pub read_only: bool,
}

impl Config {
    /// Reads the text of a `kso.toml`.
    ///
    /// # Errors
    /// It is not TOML, has a field that is not known, or a rule that cannot be read.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let file: File = toml::from_str(text)?;
        let rules = rules(text, file.policy.allow, file.policy.deny)?;
        let guests = file.guest.into_iter().map(|(name, guest)| guest.check(text, name));
        let (kernels, routes) = external::check(text, file.kernel, file.route)?;
        let config = Self {
            socket: file.socket,
            max_sessions: file.max_sessions,
            rules,
            no_net: file.policy.no_net,
            publish: file.publish,
            metrics: file.metrics.map(|metrics| metrics.listen),
            guests: guests.collect::<Result<_, _>>()?,
            kernels,
            routes,
        };
        config.policy().map_err(|error| ConfigError::Rule { line: 1, error })?;
        Ok(config)
    }

    /// The rules, compiled: the first argument of [`Policy::both`].
    ///
    /// # Errors
    /// A rule cannot be read: never after [`Self::parse`].
    pub fn policy(&self) -> Result<Policy, RuleError> {
        Policy::new(&self.rules, self.no_net, LoopbackMode::Private)
    }
}

fn rules(
    text: &str,
    allow: Vec<Spanned<String>>,
    deny: Vec<Spanned<String>>,
) -> Result<Vec<(bool, String)>, ConfigError> {
    let mut rules = Vec::new();
    for (allow, list) in [(true, allow), (false, deny)] {
        for rule in list {
            let line = line_of(text, rule.span());
            let rule = rule.into_inner();
            policy::check(&rule).map_err(|error| ConfigError::Rule { line, error })?;
            rules.push((allow, rule));
        }
    }
    Ok(rules)
}

fn line_of(text: &str, span: Range<usize>) -> usize {
    text.bytes().take(span.start).filter(|b| *b == b'\n').count() + 1
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    socket: Option<PathBuf>,
    max_sessions: Option<u32>,
    #[serde(default)]
    policy: PolicySection,
    #[serde(default)]
    publish: PublishLimits,
    metrics: Option<MetricsSection>,
    #[serde(default)]
    guest: BTreeMap<String, GuestSection>,
    #[serde(default)]
    kernel: BTreeMap<String, Settings>,
    #[serde(default)]
    route: Vec<external::RouteSection>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GuestSection {
    vsock: Option<PathBuf>,
    hybrid: Option<PathBuf>,
    #[serde(default)]
    allow: Vec<Spanned<String>>,
    #[serde(default)]
    deny: Vec<Spanned<String>>,
    #[serde(default)]
    no_net: bool,
    #[serde(default)]
    publish: Vec<Spanned<String>>,
    #[serde(default)]
    share: Vec<ShareSocket>,
}

impl GuestSection {
    fn check(self, text: &str, name: String) -> Result<Guest, ConfigError> {
        let vsock = match (self.vsock, self.hybrid) {
            (Some(path), None) => VsockSocket::VhostUser(path),
            (None, Some(path)) => VsockSocket::Hybrid(path),
            _ => return Err(ConfigError::Vsock { name }),
        };
        let publish = self.publish.into_iter().map(|one| {
            let line = line_of(text, one.span());
            crate::publish::parse(one.get_ref()).map_err(|error| ConfigError::Publish { line, error })
        });
        Ok(Guest {
            vsock,
            rules: rules(text, self.allow, self.deny)?,
            no_net: self.no_net,
            publish: publish.collect::<Result<_, _>>()?,
            shares: self.share,
            name,
        })
    }
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct PolicySection {
    allow: Vec<Spanned<String>>,
    deny: Vec<Spanned<String>>,
    no_net: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MetricsSection {
    listen: MetricsAddress,
}

/// What sessions may publish.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PublishLimits {
    /// Whether they may at all.
    pub enabled: bool,
    /// On which addresses. 0.0.0.0 or `::` here stands for every address of its family.
    pub addresses: Vec<IpAddr>,
    /// On which ports outside.
    #[serde(deserialize_with = "ports")]
    pub ports: RangeInclusive<u16>,
}

impl Default for PublishLimits {
    fn default() -> Self {
        let addresses = vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        Self { enabled: true, addresses, ports: 1..=u16::MAX }
    }
}

impl PublishLimits {
    /// Why `publication` is not permitted, if it is not. `all` is asked again, port by port, when a program
    /// listens.
    #[must_use]
    pub fn refusal(&self, publication: &Publication) -> Option<String> {
        if !self.enabled {
            return Some("this broker publishes nothing".into());
        }
        let permitted = |wanted: IpAddr| {
            self.addresses.iter().any(|own| {
                own.is_unspecified() && own.is_ipv4() == wanted.is_ipv4()
                    || own.to_canonical() == wanted.to_canonical()
            })
        };
        let loopback = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        let wanted = publication.address.as_ref().map_or(&loopback[..], std::slice::from_ref);
        if let Some(address) = wanted.iter().find(|address| !permitted(**address)) {
            return Some(format!("this broker does not publish on {address}"));
        }
        let port = if publication.outer_port == 0 { publication.inner_port } else { publication.outer_port };
        if port != 0 && !self.ports.contains(&port) {
            let (low, high) = (self.ports.start(), self.ports.end());
            return Some(format!("this broker publishes on ports {low}-{high} only, not on {port}"));
        }
        None
    }
}

fn ports<'de, D: Deserializer<'de>>(deserializer: D) -> Result<RangeInclusive<u16>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let (low, high) = text.split_once('-').unwrap_or((&text, &text));
    match (policy::port(low, 0), policy::port(high, 0)) {
        (Ok(low), Ok(high)) if low <= high => Ok(low..=high),
        _ => Err(serde::de::Error::custom("ports are two numbers from 1 to 65535: \"1024-65535\"")),
    }
}

/// Where metrics are read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetricsAddress {
    /// Over TCP.
    Tcp(SocketAddr),
    /// Over a unix socket.
    Unix(PathBuf),
}

impl std::str::FromStr for MetricsAddress {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix("unix:") {
            Some("") => Err("a path is missing: unix:/run/kso/metrics.sock"),
            Some(path) => Ok(Self::Unix(path.into())),
            None => text
                .parse()
                .map(Self::Tcp)
                .map_err(|_| "metrics are read at an address and port (127.0.0.1:9464) or a path (unix:/run/kso/metrics.sock)"),
        }
    }
}

impl<'de> Deserialize<'de> for MetricsAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn the_example_of_the_module_is_read() {
        let text: String = include_str!("config.rs")
            .lines()
            .skip_while(|line| *line != "//! ```toml")
            .skip(1)
            .take_while(|line| *line != "//! ```")
            .map(|line| format!("{}\n", line.trim_start_matches("//!").trim_start()))
            .collect();
        let config = Config::parse(&text).unwrap();
        assert_eq!(config.socket, Some("/run/kso/broker.sock".into()));
        assert_eq!(config.max_sessions, Some(64));
        assert_eq!(config.rules, [(true, "*.debian.org:443".into()), (false, "*:25".into())]);
        assert_eq!(config.publish.ports, 1024..=65535);
        let [tiny, web] = &config.guests[..] else { panic!() };
        assert_eq!(tiny.vsock, VsockSocket::Hybrid("/run/tiny/v.sock".into()));
        assert_eq!(web.vsock, VsockSocket::VhostUser("/run/kso/web.vsock".into()));
        assert_eq!((web.publish[0].outer_port, web.rules.len(), web.shares.len()), (8080, 1, 1));
        assert_eq!(config.metrics, Some(MetricsAddress::Tcp("127.0.0.1:9464".parse().unwrap())));
        assert_eq!((config.kernels.len(), config.kernels[0].name.as_str()), (1, "web"));
        assert_eq!(config.routes, [Route::parse("tcp-listen:80=web,host").unwrap()]);
    }

    #[test]
    fn everything_may_be_left_out() {
        let config = Config::parse("").unwrap();
        assert_eq!(config.publish, PublishLimits::default());
        assert!(config.rules.is_empty() && config.metrics.is_none() && !config.no_net);
    }

    #[test]
    fn errors_show_the_place() {
        for (text, line, why) in [
            ("sokcet = \"x\"", "line 1", "unknown field `sokcet`"),
            ("[policy]\nallow = [\n  \"ok.example\",\n  \"10.0.0.0/33\",\n]", "line 4", "from 0 to 32"),
            ("[policy]\ndeny = [\"a b\"]", "line 2", "blanks"),
            ("[publish]\nports = \"90-80\"", "line 2", "two numbers"),
            ("[metrics]\nlisten = \"9464\"", "line 2", "127.0.0.1:9464"),
            ("[metrics]\nlisten = \"unix:\"", "line 2", "path is missing"),
            ("[publish]\naddresses = [\"lo\"]", "line 2", "IP address"),
            ("max_sessions = -1", "line 1", "-1"),
            ("[guest.a]\nvsock = 1", "line 2", "string"),
        ] {
            let error = Config::parse(text).unwrap_err().to_string();
            assert!(error.contains(line) && error.contains(why), "{text}: {error}");
            assert!(error.contains('^'), "{error}");
        }
    }

    #[test]
    fn a_guest_has_one_way_in() {
        for (text, why) in [
            ("[guest.a]", "guest a"),
            ("[guest.a]\nvsock = \"/a\"\nhybrid = \"/b\"", "guest a"),
            ("[guest.a]\nvsock = \"/a\"\nallow = [\"a b\"]", "line 3"),
            ("[guest.a]\nvsock = \"/a\"\npublish = [\"0:1\"]", "line 3"),
        ] {
            let error = Config::parse(text).unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn publications_stay_within_the_limits() {
        let limits = PublishLimits { ports: 1024..=2000, ..PublishLimits::default() };
        let refusal = |text: &str| limits.refusal(&crate::publish::parse(text).unwrap());
        assert_eq!(refusal("1080:80"), None);
        assert_eq!(refusal("127.0.0.1:1080:80"), None);
        assert_eq!(refusal("all"), None);
        assert!(refusal("80:1080").unwrap().contains("1024-2000"));
        assert!(refusal("0.0.0.0:1080:80").unwrap().contains("0.0.0.0"));
        assert!(refusal("10.0.0.1:1080:80").unwrap().contains("10.0.0.1"));
        let every = PublishLimits { addresses: vec!["0.0.0.0".parse().unwrap()], ..limits.clone() };
        assert_eq!(every.refusal(&crate::publish::parse("10.0.0.1:1080:80").unwrap()), None);
        assert!(every.refusal(&crate::publish::parse("[::1]:1080:80").unwrap()).is_some());
        let none = PublishLimits { enabled: false, ..limits };
        assert!(none.refusal(&crate::publish::parse("1080:80").unwrap()).is_some());
    }
}
