//! Whether a destination may be reached.
//!
//! ```text
//!   --no-net ---------------- yes --> denied
//!      | no
//!   a deny rule matches ----- yes --> denied
//!      | no
//!   protected address ------- yes, and no allow rule by address or `host` --> denied
//!      | no, or lifted
//!   there are allow rules --- yes, and none matches --> denied
//!      | no, or one matches
//!   allowed
//! ```
//!
//! A destination is looked at in its [`canonical`] form and in every IPv4 form hidden in it. Rules by name match
//! only names that the session itself resolved to the address (see [`crate::names`]), and never lift a
//! protection: a name that resolves to 127.0.0.1 opens nothing. The whole language is in docs/policy.md.

mod protected;
mod rule;

pub(crate) use rule::port;

use crate::names;
use crate::place::Misplaced;
use ipnet::IpNet;
use kso_wire::{LoopbackMode, MAX_RULES, Protocol};
pub use protected::{Protected, canonical};
use rule::{Rule, Subject};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

/// A rule that cannot be read. It shows the place and says what is right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// The text is not a rule.
    #[error(transparent)]
    Text(#[from] Misplaced),
    /// More rules than [`MAX_RULES`].
    #[error("{0} rules are more than the {MAX_RULES} that a session may have")]
    TooMany(usize),
}

/// Reads one rule for its errors alone.
///
/// # Errors
/// The text is not a rule.
pub fn check(text: &str) -> Result<(), RuleError> {
    parse(text).map(|_| ())
}

fn parse(text: &str) -> Result<Rule, RuleError> {
    Rule::parse(text).map_err(|wrong| Misplaced::new("rule", text, wrong).into())
}

/// Where a program wants to go.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// The address.
    pub address: IpAddr,
    /// The port; 0 for ICMP.
    pub port: u16,
    /// The protocol.
    pub protocol: Protocol,
    /// The names under which this session got the address.
    pub names: &'a [&'a str],
    /// The address is the host: the gateway's, which stands for the host's loopback and is then named
    /// [`names::HOST_NAME`], or one of the host's own interfaces, where it serves what it serves on loopback.
    pub host: bool,
}

/// Whether a destination may be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It may.
    Allow,
    /// It may not.
    Deny(Reason),
}

impl Decision {
    /// Whether it is [`Decision::Allow`].
    #[must_use]
    pub fn is_allow(&self) -> bool {
        matches!(self, Self::Allow)
    }
}

/// Why a destination may not be reached, for a person.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// `--no-net`.
    NoNet,
    /// This deny rule matches.
    Rule(Arc<str>),
    /// The address is protected, and no rule by address lifts that. The rule that would.
    Protected(Protected, String),
    /// There are allow rules, and none matches.
    NotAllowed,
    /// The rules of the broker's configuration say so.
    Broker(Box<Reason>),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoNet => f.write_str("nothing outside may be reached with --no-net"),
            Self::Rule(text) => write!(f, "denied by rule `{text}`"),
            Self::Protected(what, rule) => write!(f, "{what} is protected: allow it with --allow {rule}"),
            Self::NotAllowed => f.write_str("no --allow rule matches"),
            Self::Broker(reason) => write!(f, "by the broker's configuration: {reason}"),
        }
    }
}

/// The compiled rules of a session, or of a broker.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    allow: Vec<Rule>,
    deny: Vec<(Rule, Arc<str>)>,
    no_net: bool,
    loopback: LoopbackMode,
}

impl Policy {
    /// Compiles rules of the form `(allow, text)`. Their order does not matter.
    ///
    /// # Errors
    /// A rule cannot be read, or there are too many.
    pub fn new(rules: &[(bool, String)], no_net: bool, loopback: LoopbackMode) -> Result<Self, RuleError> {
        if rules.len() > MAX_RULES {
            return Err(RuleError::TooMany(rules.len()));
        }
        let mut policy = Self { no_net, loopback, ..Self::default() };
        for (allow, text) in rules {
            let rule = parse(text)?;
            if *allow {
                policy.allow.push(rule);
            } else {
                policy.deny.push((rule, text.as_str().into()));
            }
        }
        Ok(policy)
    }

    /// Whether `target` may be reached.
    #[must_use]
    pub fn decide(&self, target: &Target<'_>) -> Decision {
        self.decide_with(target, true).map_or(Decision::Allow, Decision::Deny)
    }

    /// Whether an allow rule is about just such a target: another than `*`.
    #[must_use]
    pub fn singles_out(&self, target: &Target<'_>) -> bool {
        let place = Place::of(target);
        let about = |rule: &&Rule| {
            !matches!(rule.subject, Subject::Any) && place.views().any(|view| place.is_matched(rule, view))
        };
        self.allow.iter().find(about).is_some()
    }

    /// What both the broker's configuration and the session's rules say. The broker's rules only take away:
    /// without allow rules of its own it leaves protected addresses to the session's rules.
    #[must_use]
    pub fn both(broker: &Policy, session: &Policy, target: &Target<'_>) -> Decision {
        if let Some(reason) = broker.decide_with(target, !broker.allow.is_empty()) {
            return Decision::Deny(Reason::Broker(Box::new(reason)));
        }
        session.decide(target)
    }

    /// Whether a name may be looked up. A name that no rule could ever allow is not, so that questions
    /// themselves carry nothing out; with a rule by address, or none, any name may turn out to be allowed.
    #[must_use]
    pub fn decide_name(&self, name: &str) -> Decision {
        if self.no_net {
            return Decision::Deny(Reason::NoNet);
        }
        let normal = names::normal(name);
        let normal = normal.as_deref();
        let about = |rule: &Rule| match rule.subject {
            Subject::Any => true,
            Subject::Host => normal == Some(names::HOST_NAME),
            _ => normal.is_some_and(|name| rule.is_about_name(name)),
        };
        let denied =
            |(rule, _): &&(Rule, Arc<str>)| rule.ports.is_none() && rule.protocol.is_none() && about(rule);
        if let Some((_, text)) = self.deny.iter().find(denied) {
            return Decision::Deny(Reason::Rule(text.clone()));
        }
        let allowed = |rule: &Rule| matches!(rule.subject, Subject::Net(_)) || about(rule);
        if !self.allow.is_empty() && !self.allow.iter().any(allowed) {
            return Decision::Deny(Reason::NotAllowed);
        }
        Decision::Allow
    }

    /// As [`Self::both`], for [`Self::decide_name`].
    #[must_use]
    pub fn both_names(broker: &Policy, session: &Policy, name: &str) -> Decision {
        match broker.decide_name(name) {
            Decision::Deny(reason) => Decision::Deny(Reason::Broker(Box::new(reason))),
            Decision::Allow => session.decide_name(name),
        }
    }

    /// The names that allow rules spell out, in normal form: not wildcards.
    pub fn exact_names(&self) -> impl Iterator<Item = &str> {
        self.allow.iter().filter_map(|rule| match &rule.subject {
            Subject::Name(name) => Some(name.as_str()),
            _ => None,
        })
    }

    /// Why not, if not. `protect`: addresses that are protected need a rule.
    fn decide_with(&self, target: &Target<'_>, protect: bool) -> Option<Reason> {
        if self.no_net {
            return Some(Reason::NoNet);
        }
        let place = Place::of(target);
        let denied =
            |(rule, _): &&(Rule, Arc<str>)| place.denied_views().any(|view| place.is_matched(rule, view));
        if let Some((_, text)) = self.deny.iter().find(denied) {
            return Some(Reason::Rule(text.clone()));
        }
        let external = self.loopback == LoopbackMode::External && place.address.is_loopback();
        if protect && !external {
            for view in place.views() {
                let Some((what, range)) = place.protection(view) else { continue };
                let lifts = |rule: &&Rule| {
                    place.is_matched(rule, view)
                        && match &rule.subject {
                            Subject::Host => true,
                            Subject::Net(net) => range.contains(net),
                            Subject::Any | Subject::Name(_) | Subject::Below(_) => false,
                        }
                };
                if self.allow.iter().find(lifts).is_none() {
                    return Some(Reason::Protected(what, place.rule_for(view)));
                }
            }
        }
        // Whoever asks for loopback outside need not allow it too.
        let listed = external || self.allow.iter().any(|rule| place.is_matched(rule, place.address));
        (!self.allow.is_empty() && !listed).then_some(Reason::NotAllowed)
    }
}

/// A target in normal form.
struct Place {
    address: IpAddr,
    /// The other loopback address, if the gateway's was meant: the broker tries both.
    other: Option<IpAddr>,
    /// The address is one of the host's interfaces.
    own: bool,
    port: u16,
    protocol: Protocol,
    names: Vec<String>,
}

impl Place {
    fn of(target: &Target<'_>) -> Self {
        let names: Vec<String> = target.names.iter().filter_map(|name| names::normal(name)).collect();
        let literal = canonical(target.address);
        let gateway = target.host && names.iter().any(|name| name == names::HOST_NAME);
        let (address, other) = match literal {
            literal if !gateway => (literal, None),
            IpAddr::V4(_) => (Ipv4Addr::LOCALHOST.into(), Some(Ipv6Addr::LOCALHOST.into())),
            IpAddr::V6(_) => (Ipv6Addr::LOCALHOST.into(), Some(Ipv4Addr::LOCALHOST.into())),
        };
        let own = target.host && !address.is_loopback();
        Self { address, other, own, port: target.port, protocol: target.protocol, names }
    }

    /// The address and those hidden in it.
    fn views(&self) -> impl Iterator<Item = IpAddr> {
        std::iter::once(self.address).chain(protected::embedded(self.address))
    }

    /// And whatever else must not be denied.
    fn denied_views(&self) -> impl Iterator<Item = IpAddr> {
        self.views().chain(self.other)
    }

    /// Why `view` is protected, and the network within which a rule lifts that.
    fn protection(&self, view: IpAddr) -> Option<(Protected, IpNet)> {
        if self.own && view == self.address {
            return Some((Protected::Host, view.into()));
        }
        protected::protection(view)
    }

    fn is_matched(&self, rule: &Rule, view: IpAddr) -> bool {
        rule.covers(self.port, self.protocol)
            && match &rule.subject {
                Subject::Any => true,
                Subject::Host => view.is_loopback() || self.own,
                Subject::Net(net) => net.contains(&view),
                Subject::Name(_) | Subject::Below(_) => {
                    self.names.iter().any(|name| rule.is_about_name(name))
                }
            }
    }

    /// The narrowest rule that names `view`.
    fn rule_for(&self, view: IpAddr) -> String {
        let subject = match view {
            view if view.is_loopback() || self.own => "host".to_owned(),
            IpAddr::V4(view) => view.to_string(),
            IpAddr::V6(view) => format!("[{view}]"),
        };
        match self.protocol {
            Protocol::Tcp => format!("{subject}:{}", self.port),
            Protocol::Udp => format!("{subject}:{}/udp", self.port),
            Protocol::Icmp => format!("{subject}/icmp"),
        }
    }
}

#[cfg(test)]
mod tests;
