//! One rule: `SUBJECT[:PORTS][/PROTOCOL]`.
//!
//! ```text
//!   rule     = subject [ ":" ports ] [ "/" protocol ]
//!   subject  = "*" | "host" | name | "*." name | IPv4 [ "/" prefix ] | "[" IPv6 "]" [ "/" prefix ]
//!   ports    = number | number "-" number
//!   protocol = "tcp" | "udp" | "icmp"
//! ```

use super::protected::canonical;
use crate::names;
use crate::place::Wrong;
use ipnet::{IpNet, Ipv4Net};
use kso_wire::{MAX_RULE, Protocol};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::{Range, RangeInclusive};

/// Which destinations a rule is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Subject {
    /// `*`: any destination.
    Any,
    /// `host`: the host's loopback.
    Host,
    /// A name, lower case, without the dot at the end.
    Name(String),
    /// Names below one, at any depth: kept with its dot, `.debian.org`.
    Below(String),
    /// An address or a network.
    Net(IpNet),
}

/// A rule without its verdict.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub subject: Subject,
    pub ports: Option<RangeInclusive<u16>>,
    pub protocol: Option<Protocol>,
}

impl Rule {
    /// Whether the rule is about this port of this protocol. ICMP has no ports.
    pub fn covers(&self, port: u16, protocol: Protocol) -> bool {
        self.protocol.is_none_or(|own| own == protocol)
            && self.ports.as_ref().is_none_or(|ports| protocol != Protocol::Icmp && ports.contains(&port))
    }

    /// Whether the rule is about `name`, which is [`names::normal`].
    pub fn is_about_name(&self, name: &str) -> bool {
        match &self.subject {
            Subject::Name(own) => own == name,
            // More must stand before the dot than nothing: `*.debian.org` is not about `.debian.org`.
            Subject::Below(own) => name.len() > own.len() && name.ends_with(own.as_str()),
            Subject::Any | Subject::Host | Subject::Net(_) => false,
        }
    }

    pub fn parse(text: &str) -> Result<Self, Wrong> {
        if text.len() > MAX_RULE {
            return Err((0..text.len(), format!("a rule is at most {MAX_RULE} bytes long")));
        }
        if let Some((at, c)) = text.char_indices().find(|(_, c)| c.is_whitespace() || c.is_control()) {
            return Err((at..at + c.len_utf8(), "a rule has no blanks in it".into()));
        }
        if let Some(at) = text.find("://") {
            return Err((
                at..at + 3,
                "a rule is no URL: write the host and the port, example.org:443".into(),
            ));
        }
        let mut reader = Reader { text, at: 0 };
        let subject = subject(&mut reader)?;
        let (ports, ports_at) = match reader.after(':') {
            Some(field) => (Some(ports(field.clone(), text)?), field),
            None => (None, 0..0),
        };
        let protocol = match reader.after('/') {
            Some(field) => Some(protocol(field, text)?),
            None => None,
        };
        if reader.at < text.len() {
            let why = "the rule ends before this: SUBJECT[:PORTS][/PROTOCOL]";
            return Err((reader.at..text.len(), why.into()));
        }
        if protocol == Some(Protocol::Icmp) && ports.is_some() {
            return Err((ports_at, "icmp has no ports: leave them out".into()));
        }
        Ok(Self { subject, ports, protocol })
    }
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Reader<'a> {
    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or_default()
    }

    /// Up to the next `:` or `/`, which is left.
    fn field(&mut self) -> Range<usize> {
        let start = self.at;
        self.at += self.rest().find([':', '/']).unwrap_or(self.rest().len());
        start..self.at
    }

    /// The field after `mark`, if `mark` comes next.
    fn after(&mut self, mark: char) -> Option<Range<usize>> {
        self.rest().starts_with(mark).then(|| {
            self.at += mark.len_utf8();
            self.field()
        })
    }
}

fn subject(reader: &mut Reader<'_>) -> Result<Subject, Wrong> {
    let text = reader.text;
    if reader.rest().starts_with('[') {
        let Some(close) = text.find(']') else {
            return Err((0..text.len(), "the bracket is not closed: [::1]".into()));
        };
        let inside = text.get(1..close).unwrap_or_default();
        let address: Ipv6Addr = inside.parse().map_err(|_| {
            (1..close.max(2), "not an IPv6 address: only one stands in brackets, as in [fd00::1]".to_owned())
        })?;
        reader.at = close + 1;
        if let Some(c) = reader.rest().chars().next().filter(|c| !matches!(c, ':' | '/')) {
            return Err((close + 1..close + 1 + c.len_utf8(), "after `]` comes :PORTS or /PREFIX".into()));
        }
        return net(IpAddr::V6(address), 0..close + 1, reader);
    }
    if bare_ipv6(text) {
        return Err((0..text.len(), "an IPv6 address stands in brackets: [fd00::1]:443".into()));
    }
    let field = reader.field();
    let word = text.get(field.clone()).unwrap_or_default();
    if !word.is_empty() && word.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
        let address: Ipv4Addr = word.parse().map_err(|_| {
            let why = "not an IPv4 address: four numbers from 0 to 255 with dots between, as in 10.0.0.1";
            (field.clone(), why.to_owned())
        })?;
        return net(IpAddr::V4(address), field, reader);
    }
    let subject = match word {
        "" => {
            return Err((field.start..field.end + 1, "a name, an address, `host` or `*` is missing".into()));
        }
        "*" => Subject::Any,
        _ => match word.strip_prefix("*.") {
            Some(below) => Subject::Below(format!(".{}", name(below, field.start + 2)?)),
            None => match name(word, field.start)?.as_str() {
                "host" | names::HOST_NAME => Subject::Host,
                "localhost" => {
                    let why = "`localhost` is the sandbox's own: write `host` for the host's loopback";
                    return Err((field, why.into()));
                }
                name => Subject::Name(name.to_owned()),
            },
        },
    };
    if prefix_follows(reader) {
        let (start, end) = (reader.at, reader.at + 1 + digits(reader));
        return Err((start..end, "only an address has a prefix length".into()));
    }
    Ok(subject)
}

fn digits(reader: &Reader<'_>) -> usize {
    reader.rest().bytes().skip(1).take_while(u8::is_ascii_digit).count()
}

/// A digit after `/` begins a prefix length, a letter begins a protocol.
fn prefix_follows(reader: &Reader<'_>) -> bool {
    reader.rest().starts_with('/') && digits(reader) > 0
}

/// `fd00::1`, `fd00::/8`, `::1:443`: what people write when they forget the brackets.
fn bare_ipv6(text: &str) -> bool {
    let address = text.split('/').next().unwrap_or_default();
    text.matches(':').count() > 1 && address.parse::<Ipv6Addr>().is_ok()
}

fn net(address: IpAddr, at: Range<usize>, reader: &mut Reader<'_>) -> Result<Subject, Wrong> {
    let widest = if address.is_ipv4() { 32 } else { 128 };
    if !prefix_follows(reader) {
        // The unspecified address is loopback to the kernel, and so to a rule.
        return Ok(Subject::Net(canonical(address).into()));
    }
    let Some(field) = reader.after('/') else { return Ok(Subject::Net(address.into())) };
    let prefix = reader.text.get(field.clone()).unwrap_or_default().parse::<u8>().ok();
    let Some(net) = prefix.and_then(|prefix| IpNet::new(address, prefix).ok()) else {
        return Err((field, format!("a prefix length here is a number from 0 to {widest}")));
    };
    if net.addr() != net.network() {
        let right = net.trunc();
        let why = format!("the address has bits beyond its prefix: the network is {}", bracketed(right));
        return Err((at.start..field.end, why));
    }
    Ok(Subject::Net(canonical_net(net)))
}

fn bracketed(net: IpNet) -> String {
    match net {
        IpNet::V4(net) => net.to_string(),
        IpNet::V6(net) => format!("[{}]/{}", net.addr(), net.prefix_len()),
    }
}

/// A network of IPv4-mapped addresses is a network of IPv4 addresses.
fn canonical_net(net: IpNet) -> IpNet {
    let mapped = match net {
        IpNet::V6(net) => net.addr().to_ipv4_mapped().zip(net.prefix_len().checked_sub(96)),
        IpNet::V4(_) => None,
    };
    mapped.and_then(|(address, prefix)| Ipv4Net::new(address, prefix).ok()).map_or(net, IpNet::V4)
}

fn name(text: &str, at: usize) -> Result<String, Wrong> {
    if let Some((index, c)) =
        text.char_indices().find(|(_, c)| !(c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')))
    {
        let why = if c == '*' {
            "`*` stands alone or at the beginning, before a dot: *.debian.org"
        } else if !c.is_ascii() {
            "a name is written in ASCII (xn--...) here"
        } else {
            "a name has only letters, digits, `-`, `_` and dots"
        };
        return Err((at + index..at + index + c.len_utf8(), why.into()));
    }
    names::normal(text).ok_or_else(|| {
        let why = "not a name: its parts have 1 to 63 letters, and all of it at most 253";
        (at..at + text.len().max(1), why.to_owned())
    })
}

fn ports(field: Range<usize>, text: &str) -> Result<RangeInclusive<u16>, Wrong> {
    let word = text.get(field.clone()).unwrap_or_default();
    let (low, high) = match word.split_once('-') {
        Some((low, high)) => (port(low, field.start)?, port(high, field.start + low.len() + 1)?),
        None => {
            let port = port(word, field.start)?;
            (port, port)
        }
    };
    if low > high {
        return Err((field, format!("the smaller port comes first: {high}-{low}")));
    }
    Ok(low..=high)
}

/// The port in `text`, which begins at byte `at`: plain digits, from 1.
pub(crate) fn port(text: &str, at: usize) -> Result<u16, Wrong> {
    let plain = text.bytes().all(|b| b.is_ascii_digit());
    text.parse()
        .ok()
        .filter(|port| plain && *port > 0)
        .ok_or_else(|| (at..at + text.len().max(1), "a port is a number from 1 to 65535".to_owned()))
}

fn protocol(field: Range<usize>, text: &str) -> Result<Protocol, Wrong> {
    match text.get(field.clone()).unwrap_or_default() {
        "tcp" => Ok(Protocol::Tcp),
        "udp" => Ok(Protocol::Udp),
        "icmp" => Ok(Protocol::Icmp),
        _ => Err((field.start..field.end.max(field.start + 1), "a protocol is tcp, udp or icmp".into())),
    }
}
