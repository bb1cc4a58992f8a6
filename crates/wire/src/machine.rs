//! What a virtual machine is told that is an external kernel: words of its kernel's command line, read by init.
//!
//! ```text
//!   kso.provide kso.address=10.79.0.2/24 kso.gateway=10.79.0.1 kso.disk=kso0:ro:/srv
//! ```

use std::net::IpAddr;

/// Most addresses, gateways or disks: the command line is short (`COMMAND_LINE_SIZE`, 2048 on x86).
pub const MAX_EACH: usize = 16;
/// Longest path of a mount point, bytes.
pub const MAX_TARGET: usize = 64;
/// The word that makes a guest a provider.
const PROVIDE: &str = "kso.provide";
const ADDRESS: &str = "kso.address=";
const GATEWAY: &str = "kso.gateway=";
const DISK: &str = "kso.disk=";

/// A disk with a file system on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Its serial number, by which it is found.
    pub serial: String,
    /// Where it is mounted.
    pub target: String,
    /// No writing.
    pub read_only: bool,
}

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Machine {
    /// Addresses of its network card, with the lengths of their prefixes.
    pub addresses: Vec<(IpAddr, u8)>,
    /// Where everything else is reached.
    pub gateways: Vec<IpAddr>,
    /// What is mounted, in this order.
    pub disks: Vec<Disk>,
}

/// Words that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed(String);

impl std::fmt::Display for Malformed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}` on the kernel's command line is of another version of kso", self.0)
    }
}

impl std::error::Error for Malformed {}

/// Whether a path can be a mount point: absolute, with nothing in it that a command line could mistake.
#[must_use]
pub fn is_target(path: &str) -> bool {
    let plain = |part: &str| {
        !matches!(part, "" | "." | "..")
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "._-+%".contains(c))
    };
    path.len() <= MAX_TARGET && path.strip_prefix('/').is_some_and(|rest| rest.split('/').all(plain))
}

impl Machine {
    /// The words.
    #[must_use]
    pub fn words(&self) -> Vec<String> {
        let addresses = self.addresses.iter().map(|(address, prefix)| format!("{ADDRESS}{address}/{prefix}"));
        let gateways = self.gateways.iter().map(|gateway| format!("{GATEWAY}{gateway}"));
        let disks = self.disks.iter().map(|disk| {
            let mode = if disk.read_only { "ro" } else { "rw" };
            format!("{DISK}{}:{mode}:{}", disk.serial, disk.target)
        });
        std::iter::once(PROVIDE.to_owned()).chain(addresses).chain(gateways).chain(disks).collect()
    }

    /// From a kernel's command line; `None`: the guest is no provider.
    ///
    /// # Errors
    /// It cannot be understood.
    pub fn parse(line: &str) -> Result<Option<Self>, Malformed> {
        let mut machine = Self::default();
        if !line.split_ascii_whitespace().any(|word| word == PROVIDE) {
            return Ok(None);
        }
        for word in line.split_ascii_whitespace() {
            machine.take(word).ok_or_else(|| Malformed(word.to_owned()))?;
        }
        Ok(Some(machine))
    }

    fn take(&mut self, word: &str) -> Option<()> {
        if let Some(text) = word.strip_prefix(ADDRESS) {
            let (address, prefix) = text.split_once('/')?;
            let (address, prefix): (IpAddr, u8) = (address.parse().ok()?, prefix.parse().ok()?);
            let most = if address.is_ipv4() { 32 } else { 128 };
            push(&mut self.addresses, Some((address, prefix)), prefix <= most)
        } else if let Some(text) = word.strip_prefix(GATEWAY) {
            push(&mut self.gateways, text.parse().ok(), true)
        } else if let Some(text) = word.strip_prefix(DISK) {
            let (serial, rest) = text.split_once(':')?;
            let (mode, target) = rest.split_once(':')?;
            let read_only = match mode {
                "ro" => true,
                "rw" => false,
                _ => return None,
            };
            let disk = Disk { serial: serial.to_owned(), target: target.to_owned(), read_only };
            push(&mut self.disks, Some(disk), is_target(target))
        } else {
            Some(())
        }
    }
}

fn push<T>(list: &mut Vec<T>, one: Option<T>, fits: bool) -> Option<()> {
    if !fits || list.len() >= MAX_EACH {
        return None;
    }
    list.push(one?);
    Some(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_survives_its_command_line() {
        let machine = Machine {
            addresses: vec![("10.79.0.2".parse().unwrap(), 24), ("fd79::2".parse().unwrap(), 64)],
            gateways: vec!["10.79.0.1".parse().unwrap()],
            disks: vec![
                Disk { serial: "kso0".into(), target: "/srv".into(), read_only: true },
                Disk { serial: "kso1".into(), target: "/var/lib/data".into(), read_only: false },
            ],
        };
        let line = format!("console=ttyS0 {} quiet", machine.words().join(" "));
        assert!(line.contains("kso.provide kso.address=10.79.0.2/24 "), "{line}");
        assert_eq!(Machine::parse(&line), Ok(Some(machine)));
        assert_eq!(Machine::parse("console=ttyS0 kso.address=nonsense"), Ok(None));
    }

    #[test]
    fn what_cannot_be_understood_is_an_error() {
        for word in [
            "kso.address=10.0.0.1",
            "kso.address=10.0.0.1/33",
            "kso.gateway=",
            "kso.disk=a:rx:/srv",
            "kso.disk=a:ro:srv",
            "kso.disk=a:ro:/srv/../etc",
            "kso.disk=a:ro:/",
        ] {
            assert!(Machine::parse(&format!("kso.provide {word}")).is_err(), "{word}");
        }
        let many = "kso.gateway=10.0.0.1 ".repeat(MAX_EACH + 1);
        assert!(Machine::parse(&format!("kso.provide {many}")).is_err());
    }
}
