//! A provider somewhere else, over mutual TLS: how it is written.

use super::{Make, Settings};
use std::net::Ipv6Addr;
use std::path::PathBuf;

/// Where a provider is that is reached over TLS, and how both sides prove who they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remote {
    /// Its name or address.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// The authority that its certificate has to be of.
    pub ca: PathBuf,
    /// Our certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// As its certificate calls it.
    pub server_name: String,
}

impl Remote {
    /// From the settings of a kernel; `None`: it is of another make.
    pub(super) fn read(make: Make, settings: &Settings) -> Result<Option<Self>, String> {
        let Settings { ca, cert, key, server_name, .. } = settings;
        if make != Make::Remote {
            let files = [("ca", ca), ("cert", cert), ("key", key)];
            let set = files.into_iter().find_map(|(name, path)| path.is_some().then_some(name));
            return match set.or(server_name.is_some().then_some("server_name")) {
                Some(name) => Err(format!("{name} is for kernels of make remote")),
                None => Ok(None),
            };
        }
        let (host, port) = address(&settings.address)?;
        let file = |path: &Option<PathBuf>, key: &str| {
            path.clone().ok_or_else(|| {
                format!("{key}=FILE is missing: certificates are made by kso provide certs DIR --name {host}")
            })
        };
        Ok(Some(Self {
            port,
            ca: file(ca, "ca")?,
            cert: file(cert, "cert")?,
            key: file(key, "key")?,
            server_name: server_name.clone().unwrap_or_else(|| host.to_owned()),
            host: host.to_owned(),
        }))
    }
}

/// `HOST:PORT`.
fn address(texts: &[String]) -> Result<(&str, u16), String> {
    let [text] = texts else { return Err("one address is missing: address=HOST:PORT".into()) };
    let (host, port) = text
        .rsplit_once(':')
        .and_then(|(host, port)| Some((host, port.parse().ok().filter(|port| *port != 0)?)))
        .filter(|(host, _)| !host.is_empty())
        .ok_or_else(|| format!("`{text}` is no HOST:PORT, such as p.example.org:7443"))?;
    let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(inside) if inside.parse::<Ipv6Addr>().is_ok() => inside,
        None if !host.contains(':') => host,
        _ => return Err(format!("`{text}` is no HOST:PORT: an IPv6 address goes into brackets")),
    };
    Ok((host, port))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use crate::kernels::KernelSpec;

    #[test]
    fn a_remote_provider_is_read_in_both_forms() {
        let text = "make = \"remote\"\naddress = \"p.test:7443\"\nca = \"a\"\ncert = \"b\"\nkey = \"c\"";
        let written = KernelSpec::new("far", toml::from_str(text).unwrap()).unwrap();
        let short = KernelSpec::parse("far=remote,address=p.test:7443,ca=a,cert=b,key=c").unwrap();
        assert_eq!(written, short);
        let remote = written.remote.unwrap();
        assert_eq!(
            (remote.host.as_str(), remote.port, remote.server_name.as_str()),
            ("p.test", 7443, "p.test")
        );
        let text = "remote,address=[2001:db8::1]:1,ca=a,cert=b,key=c,server_name=p";
        let remote = KernelSpec::parse(text).unwrap().remote.unwrap();
        assert_eq!((remote.host.as_str(), remote.server_name.as_str()), ("2001:db8::1", "p"));
    }

    #[test]
    fn errors_say_what_to_do() {
        for (text, why) in [
            ("x=remote", "address=HOST:PORT"),
            ("x=remote,address=p.test", "no HOST:PORT"),
            ("x=remote,address=p.test:0,ca=a,cert=b,key=c", "no HOST:PORT"),
            ("x=remote,address=2001:db8::1:1,ca=a,cert=b,key=c", "brackets"),
            ("x=remote,address=p.test:1,ca=a,cert=b", "key=FILE is missing"),
            ("x=gvisor,ca=a", "make remote"),
        ] {
            let error = KernelSpec::parse(text).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
