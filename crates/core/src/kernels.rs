//! `[kernel.NAME]` and `--kernel`: the external kernels there are.
//!
//! ```text
//!   --kernel gvisor                                       a kernel of this make, called so
//!   --kernel 'web=gvisor,address=10.77.0.2/24,attach=bridge:br0'
//!   --kernel 'netstack,address=10.77.0.2/24,gateway=10.77.0.1'
//!   --external 'box=gvisor,share=/srv,share=/etc/ssl:ro'   directories that it can serve
//! ```
//!
//! ```toml
//! [kernel.web]
//! make = "gvisor"
//! address = ["10.77.0.2/24"]     # of its own interface
//! gateway = ["10.77.0.1"]
//! attach = "bridge:br0"          # where its cable goes: "host", "bridge:NAME" or "netns:PATH"
//! patience_ms = 2000             # silent for so long, it counts as hung
//! share = ["/srv", "/etc/ssl:ro"] # directories of this host that it can serve
//!
//! [kernel.far]
//! make = "remote"                # a provider somewhere else: kso provide --listen tcp:ADDRESS:PORT
//! address = "p.example.org:7443"
//! ca = "certs/ca.pem"            # the authority of both sides' certificates
//! cert = "certs/broker.pem"
//! key = "certs/broker.key"
//! server_name = "p"              # as its certificate calls it, if that is not the address
//! ```

mod remote;

use crate::files::Shared;
use crate::routes::is_kernel_name;
use ipnet::IpNet;
pub use remote::Remote;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

/// How a kernel comes about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Make {
    /// The host's own.
    Host,
    /// gVisor: runsc, with a provider inside.
    Gvisor,
    /// smoltcp, in this process.
    Netstack,
    /// A provider that something else started, at a unix socket.
    Provider,
    /// A provider somewhere else, over TLS.
    Remote,
}

impl Make {
    /// All there are.
    pub const ALL: [Self; 5] = [Self::Host, Self::Gvisor, Self::Netstack, Self::Provider, Self::Remote];

    /// As it is written.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Gvisor => "gvisor",
            Self::Netstack => "netstack",
            Self::Provider => "provider",
            Self::Remote => "remote",
        }
    }
}

/// Where the cable of a kernel's interface goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Attach {
    /// The host's own network, as an interface with the gateway's address.
    #[default]
    Host,
    /// A bridge of the host's.
    Bridge(String),
    /// Another network namespace, as an interface with the gateway's address.
    Namespace(PathBuf),
}

/// A kernel that can be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelSpec {
    /// As routes call it.
    pub name: String,
    /// How it comes about.
    pub make: Make,
    /// Addresses of its interface, with their prefixes; none: some are chosen.
    pub addresses: Vec<IpNet>,
    /// Its gateways.
    pub gateways: Vec<IpAddr>,
    /// Where its cable goes.
    pub attach: Attach,
    /// Silent for so long, it counts as hung.
    pub patience: Duration,
    /// Where a provider listens.
    pub path: Option<PathBuf>,
    /// Where a provider is, for [`Make::Remote`].
    pub remote: Option<Remote>,
    /// Directories of this host that it can serve.
    pub shares: Vec<Shared>,
}

/// A kernel that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("kernel `{name}`: {why}")]
pub struct KernelError {
    name: String,
    why: String,
}

/// The settings as they are written.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    make: Option<String>,
    #[serde(deserialize_with = "one_or_more")]
    address: Vec<String>,
    #[serde(deserialize_with = "one_or_more")]
    gateway: Vec<String>,
    attach: Option<String>,
    patience_ms: Option<u64>,
    path: Option<PathBuf>,
    ca: Option<PathBuf>,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    server_name: Option<String>,
    share: Vec<String>,
}

fn one_or_more<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "a text, or a list of them")]
    enum Either {
        One(String),
        More(Vec<String>),
    }
    Ok(match Either::deserialize(from)? {
        Either::One(text) => vec![text],
        Either::More(texts) => texts,
    })
}

impl KernelSpec {
    /// How long a kernel may be silent unless told.
    pub const PATIENCE: Duration = Duration::from_secs(2);

    /// From `[kernel.NAME]`.
    ///
    /// # Errors
    /// Something in it cannot be understood.
    pub fn new(name: &str, settings: Settings) -> Result<Self, KernelError> {
        let error = |why: String| KernelError { name: name.to_owned(), why };
        if !is_kernel_name(name) {
            return Err(error("a name is letters, digits, - and _, at most 32".into()));
        }
        let make = settings.make.as_deref().unwrap_or(name);
        let Some(make) = Make::ALL.into_iter().find(|known| known.name() == make) else {
            let known = Make::ALL.map(Make::name).join(", ");
            return Err(error(format!("`{make}` is no make of kernel: one of {known}")));
        };
        let address = |text: &String| {
            text.parse::<IpNet>()
                .map_err(|_| error(format!("`{text}` is no address with its prefix, such as 10.77.0.2/24")))
        };
        let gateway =
            |text: &String| text.parse::<IpAddr>().map_err(|_| error(format!("`{text}` is no address")));
        let attach = match settings.attach.as_deref() {
            None | Some("host") => Attach::Host,
            Some(text) => match text.split_once(':') {
                Some(("bridge", name)) if !name.is_empty() => Attach::Bridge(name.to_owned()),
                Some(("netns", path)) if path.starts_with('/') => Attach::Namespace(path.into()),
                _ => {
                    return Err(error(format!("`{text}`: a cable goes to host, bridge:NAME or netns:/PATH")));
                }
            },
        };
        if make == Make::Provider && settings.path.is_none() {
            return Err(error("the path of its socket is missing: path=/run/kso/p.sock".into()));
        }
        let remote = Remote::read(make, &settings).map_err(error)?;
        // Its address is where it is reached; its own ones it tells.
        let addresses: &[String] = if remote.is_some() { &[] } else { &settings.address };
        if make == Make::Provider && !settings.share.is_empty() {
            return Err(error("what a provider shares is told to itself: kso provide --share DIR".into()));
        }
        let share =
            |text: &String| Shared::parse(text.as_ref()).map_err(|wrong| error(format!("share={wrong}")));
        let patience = settings.patience_ms.map_or(Self::PATIENCE, Duration::from_millis);
        if patience < Duration::from_millis(50) {
            return Err(error("patience_ms is at least 50".into()));
        }
        Ok(Self {
            name: name.to_owned(),
            make,
            addresses: addresses.iter().map(address).collect::<Result<_, _>>()?,
            gateways: settings.gateway.iter().map(gateway).collect::<Result<_, _>>()?,
            attach,
            patience,
            path: settings.path,
            remote,
            shares: settings.share.iter().map(share).collect::<Result<_, _>>()?,
        })
    }

    /// From `--kernel`: `NAME`, or `NAME=MAKE[,KEY=VALUE...]`.
    ///
    /// # Errors
    /// Something in it cannot be understood.
    pub fn parse(text: &str) -> Result<Self, KernelError> {
        let (name, rest) = match text.split_once('=') {
            // `gvisor,address=..`: the make is the name.
            Some((name, _)) if name.contains(',') => {
                let (name, rest) = text.split_once(',').unwrap_or((text, ""));
                (name, format!("{name},{rest}"))
            }
            Some((name, rest)) => (name, rest.to_owned()),
            None => (text, text.to_owned()),
        };
        let error = |why: String| KernelError { name: name.to_owned(), why };
        let mut words = rest.split(',');
        let mut settings = Settings { make: words.next().map(str::to_owned), ..Settings::default() };
        for word in words {
            let Some((key, value)) = word.split_once('=') else {
                return Err(error(format!("`{word}` is no setting: address=10.77.0.2/24")));
            };
            match key {
                "address" => settings.address.push(value.to_owned()),
                "gateway" => settings.gateway.push(value.to_owned()),
                "attach" => settings.attach = Some(value.to_owned()),
                "path" => settings.path = Some(value.into()),
                "ca" => settings.ca = Some(value.into()),
                "cert" => settings.cert = Some(value.into()),
                "key" => settings.key = Some(value.into()),
                "server_name" => settings.server_name = Some(value.to_owned()),
                "share" => settings.share.push(value.to_owned()),
                "patience_ms" => {
                    settings.patience_ms =
                        Some(value.parse().map_err(|_| error(format!("`{value}` is no number")))?);
                }
                _ => {
                    return Err(error(format!(
                        "`{key}` is no setting: address, gateway, attach, path, share, ca, cert, key, server_name or patience_ms"
                    )));
                }
            }
        }
        Self::new(name, settings)
    }
}

/// The kernels of a configuration.
///
/// # Errors
/// One of them cannot be understood.
pub fn all(sections: BTreeMap<String, Settings>) -> Result<Vec<KernelSpec>, KernelError> {
    sections.into_iter().map(|(name, settings)| KernelSpec::new(&name, settings)).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_read_in_both_forms() {
        let text = "make = \"gvisor\"\naddress = [\"10.77.0.2/24\"]\nattach = \"bridge:br0\"";
        let settings: Settings = toml::from_str(text).unwrap();
        let written = KernelSpec::new("web", settings).unwrap();
        let short = KernelSpec::parse("web=gvisor,address=10.77.0.2/24,attach=bridge:br0").unwrap();
        assert_eq!(written, short);
        let plain = KernelSpec::parse("gvisor").unwrap();
        assert_eq!((plain.name.as_str(), plain.make, plain.attach), ("gvisor", Make::Gvisor, Attach::Host));
        let shown = KernelSpec::parse("x=gvisor,share=/srv,share=/etc:ro").unwrap().shares;
        assert_eq!(shown.iter().map(|one| one.read_only).collect::<Vec<_>>(), [false, true]);
        let named = KernelSpec::parse("gvisor,gateway=10.0.0.1").unwrap();
        assert_eq!((named.name.as_str(), named.gateways.len()), ("gvisor", 1));
    }

    #[test]
    fn errors_say_what_to_do() {
        for (text, why) in [
            ("linux", "no make"),
            ("a b=gvisor", "letters"),
            ("x=gvisor,address=10.0.0.1", "no address with its prefix"),
            ("x=gvisor,color=red", "no setting"),
            ("x=gvisor,attach=wifi", "bridge:NAME"),
            ("x=provider", "path=/run"),
            ("x=provider,path=/p,share=/srv", "kso provide --share"),
            ("x=gvisor,share=srv", "absolute"),
            ("x=gvisor,patience_ms=1", "at least 50"),
        ] {
            let error = KernelSpec::parse(text).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
