//! `-p`: which port of the sandbox is reached from where.
//!
//! ```text
//!   publication = [ address ":" ] ports [ "/" ( "tcp" | "udp" ) ]
//!   ports       = outer ":" inner | port | "all"
//!   address     = IPv4 | "[" IPv6 "]" | "*"
//! ```
//!
//! Without an address it is loopback, 127.0.0.1 and `::1`. `8080` is `8080:8080`. `all` publishes every TCP
//! listener on its own port. `*` is every address of the host.

use crate::place::{Misplaced, Wrong};
use crate::policy::port;
use kso_wire::{MAX_RULE, Protocol, Publication};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;

/// A publication that cannot be read. It shows the place and says what is right.
pub type PublishError = Misplaced;

/// Reads `-p`'s argument.
///
/// # Errors
/// The text is not a publication.
pub fn parse(text: &str) -> Result<Publication, PublishError> {
    read(text).map_err(|wrong| Misplaced::new("publication", text, wrong))
}

/// `publication` as a person would write it: [`parse`] reads it back.
#[must_use]
pub fn text(publication: &Publication) -> String {
    let Publication { address, outer_port, inner_port, protocol } = publication;
    let address = match address {
        None => String::new(),
        Some(IpAddr::V4(address)) => format!("{address}:"),
        Some(IpAddr::V6(address)) => format!("[{address}]:"),
    };
    let ports = match (outer_port, inner_port) {
        (_, 0) => "all".to_owned(),
        (0, inner) => format!("{inner}:{inner}"),
        (outer, inner) => format!("{outer}:{inner}"),
    };
    let protocol = if *protocol == Protocol::Tcp { "" } else { "/udp" };
    format!("{address}{ports}{protocol}")
}

fn read(text: &str) -> Result<Publication, Wrong> {
    if text.len() > MAX_RULE {
        return Err((0..text.len(), format!("a publication is at most {MAX_RULE} bytes long")));
    }
    if text.is_empty() {
        return Err((0..0, "a port is missing: 8080:80".into()));
    }
    let (rest, protocol) = match text.split_once('/') {
        None => (text, Protocol::Tcp),
        Some((rest, "tcp")) => (rest, Protocol::Tcp),
        Some((rest, "udp")) => (rest, Protocol::Udp),
        Some((rest, _)) => return Err((rest.len() + 1..text.len(), "published is tcp or udp".into())),
    };
    let (address, at) = address(rest)?;
    let ports = rest.get(at..).unwrap_or_default();
    if ports == "all" {
        if protocol == Protocol::Udp {
            return Err((at..rest.len(), "udp has no listeners to wait for: publish each port".into()));
        }
        return Ok(Publication { address, outer_port: 0, inner_port: 0, protocol });
    }
    let (outer, inner, inner_at) = match ports.split_once(':') {
        None => (ports, ports, at),
        Some((outer, inner)) => (outer, inner, at + outer.len() + 1),
    };
    let (outer_port, inner_port) = (port(outer, at)?, port(inner, inner_at)?);
    Ok(Publication { address, outer_port, inner_port, protocol })
}

/// The address before the ports, and where the ports begin.
fn address(text: &str) -> Result<(Option<IpAddr>, usize), Wrong> {
    let (word, at, after) = if text.starts_with('[') {
        let Some(close) = text.find(']') else {
            return Err((0..text.len(), "the bracket is not closed: [::1]:8080:80".into()));
        };
        (text.get(1..close).unwrap_or_default(), 1..close, close + 1)
    } else {
        // One colon at most belongs to the ports.
        let ports = match text.match_indices(':').count() {
            0 => return Ok((None, 0)),
            1 if !text.ends_with(":all") && !text.starts_with('*') && !text.contains('.') => {
                return Ok((None, 0));
            }
            1 => text.find(':').unwrap_or_default(),
            _ => {
                let before_last = text.rfind(':').and_then(|last| text.get(..last)).unwrap_or_default();
                before_last.rfind(':').unwrap_or_default()
            }
        };
        (text.get(..ports).unwrap_or_default(), 0..ports, ports)
    };
    let Some(ports) = text.get(after..).and_then(|rest| rest.strip_prefix(':')) else {
        return Err((after..text.len(), "after the address comes :PORTS".into()));
    };
    let address = read_address(word, at, text.starts_with('['))?;
    if !text.starts_with('[') && !ports.contains(':') && ports != "all" {
        let why = "after an address both ports are needed: 127.0.0.1:8080:80";
        return Err((after + 1..text.len(), why.into()));
    }
    Ok((Some(address), after + 1))
}

fn read_address(word: &str, at: Range<usize>, bracketed: bool) -> Result<IpAddr, Wrong> {
    let address = match (word, bracketed) {
        ("*", false) => Some(Ipv4Addr::UNSPECIFIED.into()),
        (word, false) => word.parse::<Ipv4Addr>().ok().map(IpAddr::V4),
        (word, true) => word.parse::<Ipv6Addr>().ok().map(|address| IpAddr::V6(address).to_canonical()),
    };
    let end = at.end.max(at.start + 1);
    address.ok_or_else(|| match (bracketed, word.contains(':')) {
        (true, _) => (at.start..end, "not an IPv6 address: only one stands in brackets".into()),
        (false, true) => (at.start..end, "an IPv6 address stands in brackets: [::1]:8080:80".into()),
        (false, false) => {
            (at.start..end, "not an address: a number such as 127.0.0.1, or `*` for all".into())
        }
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn publication(
        address: Option<&str>,
        outer_port: u16,
        inner_port: u16,
        protocol: Protocol,
    ) -> Publication {
        Publication { address: address.map(|text| text.parse().unwrap()), outer_port, inner_port, protocol }
    }

    #[test]
    fn what_people_write() {
        let tcp = Protocol::Tcp;
        for (text, expected) in [
            ("8080:80", publication(None, 8080, 80, tcp)),
            ("8080", publication(None, 8080, 8080, tcp)),
            ("8080/udp", publication(None, 8080, 8080, Protocol::Udp)),
            ("8080:80/tcp", publication(None, 8080, 80, tcp)),
            ("127.0.0.1:9000:9000/udp", publication(Some("127.0.0.1"), 9000, 9000, Protocol::Udp)),
            ("0.0.0.0:80:8080", publication(Some("0.0.0.0"), 80, 8080, tcp)),
            ("*:80:8080", publication(Some("0.0.0.0"), 80, 8080, tcp)),
            ("[::1]:8080:80", publication(Some("::1"), 8080, 80, tcp)),
            ("[::1]:8080", publication(Some("::1"), 8080, 8080, tcp)),
            ("[::ffff:127.0.0.2]:1:2", publication(Some("127.0.0.2"), 1, 2, tcp)),
            ("all", publication(None, 0, 0, tcp)),
            ("0.0.0.0:all", publication(Some("0.0.0.0"), 0, 0, tcp)),
            ("[::]:all", publication(Some("::"), 0, 0, tcp)),
        ] {
            assert_eq!(parse(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn errors_show_the_place() {
        for (text, column, why) in [
            ("", 0, "missing"),
            ("80:", 3, "from 1 to 65535"),
            (":80", 0, "from 1 to 65535"),
            ("0:80", 0, "from 1 to 65535"),
            ("80:+5", 3, "from 1 to 65535"),
            ("65536", 0, "from 1 to 65535"),
            ("80:80/sctp", 6, "tcp or udp"),
            ("127.0.0.1:80", 10, "both ports"),
            ("::1:80:80", 0, "brackets"),
            ("[::1:80:80", 0, "not closed"),
            ("[127.0.0.1]:80:80", 1, "not an IPv6"),
            ("[::1]", 5, ":PORTS"),
            ("localhost:80:80", 0, "not an address"),
            ("all/udp", 0, "no listeners"),
            ("1:2:3", 0, "not an address"),
            ("\u{1b}[31m:80", 0, "from 1 to"),
        ] {
            let error = parse(text).unwrap_err();
            assert_eq!(error.column(), column, "{text}: {error}");
            assert!(error.why().contains(why), "{text}: {error}");
            assert!(!error.to_string().contains('\u{1b}'));
        }
    }

    proptest! {
        #[test]
        fn text_is_read_back(
            address in proptest::option::of(proptest::prelude::any::<IpAddr>()),
            outer in 1..=u16::MAX, inner in 1..=u16::MAX, udp: bool, all: bool,
        ) {
            let protocol = if udp { Protocol::Udp } else { Protocol::Tcp };
            let address = address.map(|address| address.to_canonical());
            let publication = if all {
                Publication { address, outer_port: 0, inner_port: 0, protocol: Protocol::Tcp }
            } else {
                Publication { address, outer_port: outer, inner_port: inner, protocol }
            };
            prop_assert_eq!(parse(&text(&publication)).unwrap(), publication);
        }

        #[test]
        fn nothing_panics(text in "\\PC*") {
            let _ = parse(&text).map_err(|error| error.to_string());
        }

        #[test]
        fn nothing_like_a_publication_panics(text in "[0-9a-z:./\\[\\]*é-]{0,40}") {
            if let Ok(publication) = parse(&text) {
                prop_assert_eq!(parse(&super::text(&publication)).unwrap(), publication);
            }
        }
    }
}
