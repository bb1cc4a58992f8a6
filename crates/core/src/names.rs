//! Which names a session resolved to which addresses.
//!
//! Rules may be written with names, but what a program connects to is an address. So the broker remembers
//! each answer that it gave: the address then stands for the name that was asked and for each alias on the way
//! (CNAME). Only answers given to this very session count.
//!
//! ```text
//!   remember --> [valid until max(TTL, 10 min) from now] -- asked again --> [valid longer]
//!                      |                     |
//!                  time passes       room is needed: what ends first goes first
//!                      v                     v
//!                  forgotten             forgotten
//! ```
//!
//! Entries of the host's `/etc/hosts` do not end.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The name of the host's loopback.
pub const HOST_NAME: &str = "host.kso.internal";
/// An answer holds at least so long after it was given: programs connect again with addresses they have.
pub const LEAST_LIFE: Duration = Duration::from_secs(10 * 60);
/// And at most so long, whatever its TTL, as resolvers do (RFC 8767, 4: no more than days).
pub const MOST_LIFE: Duration = Duration::from_secs(24 * 60 * 60);
/// At most so many names of one address are remembered: the ones that end last.
pub const MAX_NAMES_PER_ADDRESS: usize = 64;
/// Most lines of a hosts file that are read.
const MAX_HOSTS_LINES: usize = 65_536;

/// `name` in the form in which names are compared: lower case, no dot at the end. `None` if it is not a name
/// that a rule could be about: empty, too long, or with other characters than host names have (so that
/// a dot *inside* a label, which some print as `\.`, is never taken for a dot between labels).
#[must_use]
pub fn normal(name: &str) -> Option<String> {
    let name = name.strip_suffix('.').unwrap_or(name);
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
    };
    (name.len() <= 253 && name.split('.').all(label)).then(|| name.to_ascii_lowercase())
}

/// One name of an address.
#[derive(Debug)]
struct Entry {
    name: Arc<str>,
    until: Until,
}

/// When an entry ends, and a number that makes it unique.
type Until = (Instant, u64);

/// See the module.
#[derive(Debug)]
pub struct NameMemory {
    limit: usize,
    serial: u64,
    by_address: HashMap<IpAddr, Vec<Entry>>,
    by_end: BTreeMap<Until, (IpAddr, Arc<str>)>,
    hosts_by_address: HashMap<IpAddr, Vec<Arc<str>>>,
    hosts_by_name: HashMap<Arc<str>, Vec<IpAddr>>,
}

impl NameMemory {
    /// Remembers at most `limit` pairs of name and address, besides those of the hosts file.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            serial: 0,
            by_address: HashMap::new(),
            by_end: BTreeMap::new(),
            hosts_by_address: HashMap::new(),
            hosts_by_name: HashMap::new(),
        }
    }

    /// `name` was answered with `addresses`. Call it for the name that was asked and for each alias.
    /// A name that no rule could be about is not remembered.
    pub fn remember(&mut self, name: &str, addresses: &[IpAddr], ttl: Duration, now: Instant) {
        let Some(name) = normal(name) else { return };
        self.forget_ended(now);
        let name: Arc<str> = name.into();
        let until = now + ttl.clamp(LEAST_LIFE, MOST_LIFE);
        for address in addresses {
            self.remember_one(&name, address.to_canonical(), until);
        }
    }

    fn remember_one(&mut self, name: &Arc<str>, address: IpAddr, end: Instant) {
        if self.limit == 0 {
            return;
        }
        self.serial += 1;
        let until = (end, self.serial);
        let entries = self.by_address.entry(address).or_default();
        if let Some(entry) = entries.iter_mut().find(|entry| entry.name == *name) {
            // An answer never shortens what an earlier one promised.
            if entry.until.0 < end {
                self.by_end.remove(&entry.until);
                entry.until = until;
                self.by_end.insert(until, (address, name.clone()));
            }
            return;
        }
        if entries.len() >= MAX_NAMES_PER_ADDRESS
            && let Some(first) = entries.iter().map(|entry| entry.until).min()
        {
            entries.retain(|entry| entry.until != first);
            self.by_end.remove(&first);
        }
        entries.push(Entry { name: name.clone(), until });
        self.by_end.insert(until, (address, name.clone()));
        while self.by_end.len() > self.limit {
            self.forget_first();
        }
    }

    fn forget_ended(&mut self, now: Instant) {
        while self.by_end.first_key_value().is_some_and(|((end, _), _)| *end <= now) {
            self.forget_first();
        }
    }

    fn forget_first(&mut self) {
        let Some((until, (address, _))) = self.by_end.pop_first() else { return };
        if let Some(entries) = self.by_address.get_mut(&address) {
            entries.retain(|entry| entry.until != until);
            if entries.is_empty() {
                self.by_address.remove(&address);
            }
        }
    }

    /// Reads the host's `/etc/hosts` (`hosts(5)`), in place of what was read before. What is not an entry is skipped.
    pub fn load_hosts(&mut self, text: &str) {
        self.hosts_by_address.clear();
        self.hosts_by_name.clear();
        for line in text.lines().take(MAX_HOSTS_LINES) {
            let line = line.split('#').next().unwrap_or_default();
            let mut words = line.split_ascii_whitespace();
            let Some(address) = words.next().and_then(|word| word.parse::<IpAddr>().ok()) else { continue };
            for name in words.filter_map(normal) {
                let name: Arc<str> = name.into();
                let address = address.to_canonical();
                let names = self.hosts_by_address.entry(address).or_default();
                if !names.contains(&name) {
                    names.push(name.clone());
                    self.hosts_by_name.entry(name).or_default().push(address);
                }
            }
        }
    }

    /// Appends the names under which the session knows `address` at `now`.
    pub fn names_of<'a>(&'a self, address: IpAddr, now: Instant, into: &mut Vec<&'a str>) {
        let address = address.to_canonical();
        let live = |entry: &&Entry| entry.until.0 > now;
        let answered =
            self.by_address.get(&address).into_iter().flatten().filter(live).map(|entry| &*entry.name);
        let hosts = self.hosts_by_address.get(&address).into_iter().flatten().map(|name| &**name);
        for name in answered.chain(hosts) {
            if !into.contains(&name) {
                into.push(name);
            }
        }
    }

    /// The addresses that the hosts file gives to `name`, in its order.
    #[must_use]
    pub fn addresses_of(&self, name: &str) -> &[IpAddr] {
        normal(name).and_then(|name| self.hosts_by_name.get(name.as_str())).map_or(&[], Vec::as_slice)
    }

    /// How many answers are remembered.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_end.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_end.is_empty()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn names(memory: &NameMemory, address: &str, now: Instant) -> Vec<String> {
        let mut names = Vec::new();
        memory.names_of(address.parse().unwrap(), now, &mut names);
        let mut names: Vec<String> = names.into_iter().map(str::to_owned).collect();
        names.sort_unstable();
        names
    }

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn normal_names() {
        assert_eq!(normal("Example.ORG.").as_deref(), Some("example.org"));
        assert_eq!(normal("_dmarc.x-y.example").as_deref(), Some("_dmarc.x-y.example"));
        let long = format!("{}.example", "a".repeat(64));
        let very_long = "a.".repeat(130);
        for name in ["", ".", "..", "a..b", ".a", "a b", "a\\.b", "é.example", "a\0b", &long, &very_long] {
            assert_eq!(normal(name), None, "{name:?}");
        }
    }

    #[test]
    fn an_answer_holds_for_its_ttl_and_at_least_ten_minutes() {
        let start = Instant::now();
        let mut memory = NameMemory::new(10);
        memory.remember("Short.example.", &[address("192.0.2.1")], Duration::ZERO, start);
        memory.remember("long.example", &[address("192.0.2.1")], 60 * MINUTE, start);
        memory.remember(
            "ever.example",
            &[address("192.0.2.2")],
            Duration::from_secs(u64::from(u32::MAX)),
            start,
        );
        assert_eq!(names(&memory, "192.0.2.1", start + 9 * MINUTE), ["long.example", "short.example"]);
        assert_eq!(names(&memory, "::ffff:192.0.2.1", start), ["long.example", "short.example"]);
        assert_eq!(names(&memory, "192.0.2.1", start + 10 * MINUTE), ["long.example"]);
        assert!(names(&memory, "192.0.2.1", start + 60 * MINUTE).is_empty());
        assert!(names(&memory, "192.0.2.2", start + MOST_LIFE).is_empty());
        assert!(names(&memory, "192.0.2.3", start).is_empty());
    }

    #[test]
    fn asked_again_it_holds_longer_and_never_shorter() {
        let start = Instant::now();
        let mut memory = NameMemory::new(10);
        memory.remember("a.example", &[address("192.0.2.1")], 60 * MINUTE, start);
        memory.remember("a.example", &[address("192.0.2.1")], MINUTE, start + MINUTE);
        assert_eq!(names(&memory, "192.0.2.1", start + 50 * MINUTE), ["a.example"]);
        memory.remember("a.example", &[address("192.0.2.1")], 60 * MINUTE, start + 50 * MINUTE);
        assert_eq!(names(&memory, "192.0.2.1", start + 100 * MINUTE), ["a.example"]);
        assert_eq!(memory.len(), 1);
        memory.remember("b.example", &[], MINUTE, start + 110 * MINUTE);
        assert!(memory.is_empty(), "what ended is let go");
    }

    #[test]
    fn it_is_bounded() {
        let start = Instant::now();
        let mut memory = NameMemory::new(100);
        for n in 0..1000_u32 {
            let addresses = [IpAddr::from(n.to_be_bytes()), address("192.0.2.1")];
            memory.remember(
                &format!("n{n}.example"),
                &addresses,
                MINUTE,
                start + n * Duration::from_millis(1),
            );
            assert!(memory.len() <= 100);
        }
        assert_eq!(names(&memory, "192.0.2.1", start).len(), 50);
        assert_eq!(memory.by_address.len(), 51);
        let mut memory = NameMemory::new(1000);
        for n in 0..1000_u32 {
            memory.remember(&format!("n{n}.example"), &[address("192.0.2.1")], MINUTE, start);
        }
        assert_eq!(names(&memory, "192.0.2.1", start).len(), MAX_NAMES_PER_ADDRESS);
        assert_eq!(memory.len(), MAX_NAMES_PER_ADDRESS);
        let mut none = NameMemory::new(0);
        none.remember("a.example", &[address("192.0.2.1")], MINUTE, start);
        assert!(none.is_empty() && none.by_address.is_empty());
    }

    #[test]
    fn the_hosts_file() {
        let start = Instant::now();
        let mut memory = NameMemory::new(10);
        memory.load_hosts("old 1.2.3.4\n");
        memory.load_hosts(
            "127.0.0.1 localhost # me\n\n# a comment\n192.0.2.7\tNAS.lan nas\n::1 localhost\nnonsense\n192.0.2.8 nas nas",
        );
        assert_eq!(memory.addresses_of("nas"), [address("192.0.2.7"), address("192.0.2.8")]);
        assert_eq!(memory.addresses_of("nas.LAN."), [address("192.0.2.7")]);
        assert_eq!(memory.addresses_of("localhost"), [address("127.0.0.1"), address("::1")]);
        assert!(memory.addresses_of("me").is_empty());
        assert_eq!(names(&memory, "192.0.2.7", start), ["nas", "nas.lan"]);
        memory.remember("nas", &[address("192.0.2.7")], MINUTE, start);
        assert_eq!(names(&memory, "192.0.2.7", start), ["nas", "nas.lan"]);
    }

    proptest! {
        #[test]
        fn both_indexes_agree(steps in proptest::collection::vec((0..8_u8, 0..8_u8, 0..40_u32, 0..30_u32), 0..200)) {
            let mut now = Instant::now();
            let mut memory = NameMemory::new(12);
            for (name, host, ttl, wait) in steps {
                now += wait * MINUTE;
                memory.remember(&format!("n{name}.example"), &[IpAddr::from([192, 0, 2, host])], ttl * MINUTE, now);
                let entries: usize = memory.by_address.values().map(Vec::len).sum();
                prop_assert_eq!(entries, memory.by_end.len());
                prop_assert!(entries <= 12);
                prop_assert!(memory.by_address.values().all(|entries| !entries.is_empty()));
                for (until, (address, name)) in &memory.by_end {
                    let entries = memory.by_address.get(address);
                    prop_assert!(entries.unwrap().iter().any(|entry| entry.until == *until && entry.name == *name));
                }
                prop_assert_eq!(names(&memory, &format!("192.0.2.{host}"), now).is_empty(), false);
            }
        }

        #[test]
        fn no_hosts_file_panics(text in "\\PC*") {
            NameMemory::new(1).load_hosts(&text);
        }
    }
}
