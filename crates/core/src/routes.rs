//! `--via`: which kernel serves what.
//!
//! ```text
//!   route    = services [ ":" ports ] [ "@" network ] [ "%" program ] "=" [ strategy ":" ] kernel { "," kernel }
//!   services = "*" | "tcp" | service { "+" service }
//!   service  = "tcp-connect" | "tcp-listen" | "udp" | "ping" | "names" | "files"
//!   ports    = number | number "-" number
//!   network  = address [ "/" prefix ]
//!   strategy = "fixed" | "failover" | "spread" | "shuffle" [ "/" seconds ]
//! ```
//!
//! The first route that fits decides; what none fits is the host's. With several kernels and no strategy it is
//! `failover`. `tcp` is `tcp-connect+tcp-listen`. The network is that of the peer; of a listener, its own.
//!
//! ```text
//!   fixed     the first, up or not
//!   failover  the first that is up, then the others
//!   spread    each in its turn
//!   shuffle   one drawn by lot, and drawn again after so many seconds (60 unless told)
//! ```

use crate::place::{Misplaced, Wrong};
use crate::policy::port;
use ipnet::IpNet;
use kso_wire::MAX_RULE;
use kso_wire::provide::Service;
use std::net::IpAddr;
use std::ops::{Range, RangeInclusive};
use std::time::{Duration, Instant};

/// The kernel that is always there.
pub const HOST: &str = "host";
/// Longest name of a kernel, bytes.
pub const MAX_KERNEL_NAME: usize = 32;
/// Most kernels of a route.
pub const MAX_KERNELS: usize = 16;
/// Of [`Routes::after`]: any number that all counts of kernels divide, so that no kernel has more turns than another.
const MAX_TURNS: u64 = 720_720;
/// How long a lot holds unless told.
const SHUFFLE: Duration = Duration::from_secs(60);

/// A route that cannot be read.
pub type RouteError = Misplaced;

/// The order in which the kernels of a route are asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    /// The first alone.
    Fixed,
    /// The first that is up.
    Failover,
    /// Each in its turn.
    Spread,
    /// By lot.
    Shuffle {
        /// How long a lot holds.
        every: Duration,
    },
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// What it is about.
    pub services: Vec<Service>,
    /// Ports of the peer, or of the listener inside; `None`: all.
    pub ports: Option<RangeInclusive<u16>>,
    /// The peer's network; `None`: all.
    pub network: Option<IpNet>,
    /// The program's name; `None`: all.
    pub program: Option<String>,
    /// How a kernel is chosen.
    pub strategy: Strategy,
    /// The kernels, at least one.
    pub kernels: Vec<String>,
}

/// What is to be served.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// By which service.
    pub service: Service,
    /// The peer's address; of a listener, its own.
    pub address: IpAddr,
    /// The peer's port; of a listener, its own inside; 0 where there is none.
    pub port: u16,
    /// Who asks; empty when unknown.
    pub program: &'a str,
}

impl Route {
    /// Reads `--via`'s argument.
    ///
    /// # Errors
    /// The text is no route.
    pub fn parse(text: &str) -> Result<Self, RouteError> {
        read(text).map_err(|wrong| Misplaced::new("route", text, wrong))
    }

    /// The route of `--kernel NAME`: all TCP by this kernel.
    ///
    /// # Errors
    /// It is no name.
    pub fn all_tcp(kernel: &str) -> Result<Self, RouteError> {
        Self::parse(&format!("tcp={kernel}"))
    }

    /// Whether it is about this.
    #[must_use]
    pub fn fits(&self, asked: &Asked<'_>) -> bool {
        self.services.contains(&asked.service)
            && self.ports.as_ref().is_none_or(|ports| ports.contains(&asked.port))
            && self.network.is_none_or(|network| network.contains(&asked.address.to_canonical()))
            && self.program.as_ref().is_none_or(|program| program == asked.program)
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Turn {
    next: usize,
    drawn: Option<(usize, Instant)>,
}

/// The routes of a session, and whose turn it is.
#[derive(Clone, Debug, Default)]
pub struct Routes {
    routes: Vec<Route>,
    turns: Vec<Turn>,
}

impl Routes {
    /// In the order in which they are looked at.
    #[must_use]
    pub fn new(routes: Vec<Route>) -> Self {
        let turns = vec![Turn::default(); routes.len()];
        Self { routes, turns }
    }

    /// As [`Self::new`], where others had their turns before: `spread` goes on from there. Sessions are many and short.
    #[must_use]
    pub fn after(routes: Vec<Route>, turns: u64) -> Self {
        let mut new = Self::new(routes);
        for turn in &mut new.turns {
            turn.next = usize::try_from(turns % MAX_TURNS).unwrap_or_default();
        }
        new
    }

    /// Whether there are none: all is the host's.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.routes.is_empty()
    }

    /// Whether this is the host's own business, natively: no other kernel can come to serve it.
    #[must_use]
    pub fn is_native(&self, asked: &Asked<'_>) -> bool {
        let route = self.routes.iter().find(|route| route.fits(asked));
        route.is_none_or(|route| route.kernels.iter().all(|kernel| kernel == HOST))
    }

    /// Whether a route depends on who asks.
    #[must_use]
    pub fn ask_for_programs(&self) -> bool {
        self.routes.iter().any(|route| route.program.is_some())
    }

    /// Whether a route has no other kernel than this.
    #[must_use]
    pub fn rest_on(&self, kernel: &str) -> bool {
        self.routes.iter().any(|route| route.kernels.iter().all(|name| name == kernel))
    }

    /// Every kernel that is named, once each.
    #[must_use]
    pub fn kernels(&self) -> Vec<&str> {
        let mut names: Vec<&str> =
            self.routes.iter().flat_map(|route| &route.kernels).map(String::as_str).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// The kernels to ask, in this order. Those that are not up come only where no other choice is left. `lot` is any
    /// number that nobody can guess. `None`: the host's, natively.
    pub fn choose(
        &mut self,
        asked: &Asked<'_>,
        now: Instant,
        lot: u64,
        up: impl Fn(&str) -> bool,
    ) -> Option<Vec<String>> {
        let at = self.routes.iter().position(|route| route.fits(asked))?;
        let (route, turn) = (self.routes.get(at)?, self.turns.get_mut(at)?);
        let mut alive: Vec<usize> = Vec::with_capacity(route.kernels.len());
        alive.extend(route.kernels.iter().enumerate().filter(|(_, name)| up(name)).map(|(at, _)| at));
        let first = match route.strategy {
            Strategy::Fixed => return route.kernels.first().map(|first| vec![first.clone()]),
            // Better to wait for the first than to have nobody.
            _ if alive.is_empty() => return route.kernels.first().map(|first| vec![first.clone()]),
            Strategy::Failover => 0,
            Strategy::Spread => {
                turn.next = turn.next.wrapping_add(1);
                turn.next.wrapping_sub(1) % alive.len()
            }
            Strategy::Shuffle { every } => {
                let held = turn.drawn.filter(|(_, since)| now.duration_since(*since) < every);
                let held = held.and_then(|(drawn, _)| alive.iter().position(|at| *at == drawn));
                held.unwrap_or_else(|| {
                    let drawn = usize::try_from(lot % alive.len() as u64).unwrap_or(0);
                    turn.drawn = alive.get(drawn).map(|at| (*at, now));
                    drawn
                })
            }
        };
        alive.rotate_left(first);
        Some(alive.into_iter().filter_map(|at| route.kernels.get(at).cloned()).collect())
    }
}

/// Whether a kernel can be called so.
#[must_use]
pub fn is_kernel_name(name: &str) -> bool {
    let ordinary = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    !name.is_empty() && name.len() <= MAX_KERNEL_NAME && name.bytes().all(ordinary) && !name.starts_with('-')
}

fn read(text: &str) -> Result<Route, Wrong> {
    if text.len() > MAX_RULE {
        return Err((0..text.len(), format!("a route is at most {MAX_RULE} bytes long")));
    }
    let Some(equals) = text.find('=') else {
        return Err((text.len()..text.len(), "a kernel is missing: tcp-listen:80=gvisor,host".into()));
    };
    // From the end: each part is begun by its own mark, and an IPv6 address has colons.
    let mut end = equals;
    let mut part = |mark: char| {
        let at = text.get(..end)?.find(mark)?;
        let range = at + 1..end;
        end = at;
        Some(range)
    };
    let program = part('%');
    let network = part('@');
    let ports = part(':');
    let services = services(text, 0..end)?;
    let (strategy, kernels) = kernels(text, equals + 1..text.len())?;
    Ok(Route {
        services,
        ports: ports.map(|range| ports_of(text, range)).transpose()?,
        network: network.map(|range| network_of(text, range)).transpose()?,
        program: program.map(|range| program_of(text, range)).transpose()?,
        strategy,
        kernels,
    })
}

fn slice(text: &str, range: Range<usize>) -> &str {
    text.get(range).unwrap_or_default()
}

/// The words of `range` between `mark`s, with their places.
fn words(text: &str, range: Range<usize>, mark: char) -> impl Iterator<Item = (Range<usize>, &str)> {
    let mut at = range.start;
    slice(text, range).split(mark).map(move |word| {
        let place = at..at + word.len();
        at = place.end + mark.len_utf8();
        (place, word)
    })
}

fn services(text: &str, range: Range<usize>) -> Result<Vec<Service>, Wrong> {
    let mut found = Vec::new();
    for (place, word) in words(text, range, '+') {
        match word {
            "*" => found.extend(Service::ALL),
            "tcp" => found.extend([Service::TcpConnect, Service::TcpListen]),
            _ => match Service::ALL.into_iter().find(|service| service.name() == word) {
                Some(service) => found.push(service),
                None => {
                    let names = Service::ALL.map(Service::name).join(", ");
                    return Err((place, format!("a service is one of {names}, tcp or *")));
                }
            },
        }
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

fn ports_of(text: &str, range: Range<usize>) -> Result<RangeInclusive<u16>, Wrong> {
    let word = slice(text, range.clone());
    let (low, high) = word.split_once('-').unwrap_or((word, word));
    let high_at = range.end - high.len();
    let (low, high) = (port(low, range.start)?, port(high, high_at)?);
    if low > high { Err((range, "the lower port comes first".into())) } else { Ok(low..=high) }
}

fn network_of(text: &str, range: Range<usize>) -> Result<IpNet, Wrong> {
    let word = slice(text, range.clone());
    let network = word.parse().ok().or_else(|| word.parse::<IpAddr>().ok().map(IpNet::from));
    network.ok_or_else(|| (range, "a network is an address with or without a prefix: 10.0.0.0/8".into()))
}

fn program_of(text: &str, range: Range<usize>) -> Result<String, Wrong> {
    let word = slice(text, range.clone());
    if word.is_empty() || word.len() > kso_wire::MAX_PROGRAM || word.contains('/') {
        return Err((range, "a program is the name of a process, without its directory: %nginx".into()));
    }
    Ok(word.to_owned())
}

fn kernels(text: &str, range: Range<usize>) -> Result<(Strategy, Vec<String>), Wrong> {
    let value = slice(text, range.clone());
    let (strategy, names) = match value.find(':') {
        None => (None, range),
        Some(at) => (Some(strategy(text, range.start..range.start + at)?), range.start + at + 1..range.end),
    };
    let mut kernels: Vec<String> = Vec::new();
    for (place, word) in words(text, names.clone(), ',') {
        if !is_kernel_name(word) {
            return Err((place, "the name of a kernel is letters, digits, - and _".into()));
        }
        if kernels.iter().any(|known| known == word) {
            return Err((place, "this kernel is in the route already".into()));
        }
        kernels.push(word.to_owned());
    }
    if kernels.len() > MAX_KERNELS {
        return Err((names, format!("a route has at most {MAX_KERNELS} kernels")));
    }
    if strategy == Some(Strategy::Fixed) && kernels.len() > 1 {
        return Err((names, "fixed is one kernel; failover takes the others, too".into()));
    }
    let alone = if kernels.len() == 1 { Strategy::Fixed } else { Strategy::Failover };
    Ok((strategy.unwrap_or(alone), kernels))
}

fn strategy(text: &str, range: Range<usize>) -> Result<Strategy, Wrong> {
    let word = slice(text, range.clone());
    let (name, seconds) = match word.split_once('/') {
        None => (word, None),
        Some((name, seconds)) => (name, Some(seconds)),
    };
    match (name, seconds) {
        ("fixed", None) => Ok(Strategy::Fixed),
        ("failover", None) => Ok(Strategy::Failover),
        ("spread", None) => Ok(Strategy::Spread),
        ("shuffle", None) => Ok(Strategy::Shuffle { every: SHUFFLE }),
        ("shuffle", Some(seconds)) => match seconds.parse::<u32>() {
            Ok(seconds) if seconds > 0 => {
                Ok(Strategy::Shuffle { every: Duration::from_secs(seconds.into()) })
            }
            _ => Err((range, "a lot holds a number of seconds: shuffle/60".into())),
        },
        _ => Err((range, "a strategy is fixed, failover, spread or shuffle/SECONDS".into())),
    }
}

#[cfg(test)]
mod tests;
