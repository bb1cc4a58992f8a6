//! `[kernel.NAME]` and `--kernel`: the external kernels there are.
//!
//! ```text
//!   --kernel gvisor                                       a kernel of this make, called so
//!   --kernel 'web=gvisor,address=10.77.0.2/24,attach=bridge:br0'
//!   --kernel 'netstack,address=10.77.0.2/24,gateway=10.77.0.1'
//!   --external 'box=gvisor,share=/srv,share=/etc/ssl:ro'   directories that it can serve
//!   --external 'deb=vm,kernel=6.12,memory=512M,disk=/images/srv.ext4@/srv:ro'     ,, stands for a comma
//!   --external 'disk=image,path=/var/lib/images/disk.ext4' a file system in an image
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
//!
//! [kernel.deb]
//! make = "vm"
//! kernel = "6.12"                # of `kso kernels`, or the path of an image; otherwise the newest
//! memory = "512M"
//! disk = ["/images/srv.ext4@/srv:ro"]
//! append = ["loglevel=7"]        # more words for its kernel
//! qemu = ["-monitor", "unix:/run/vm,server=on,wait=off"]   # more words for QEMU
//! ```

mod remote;

use crate::files::Shared;
use crate::routes::is_kernel_name;
use ipnet::IpNet;
use kso_wire::machine;
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
    /// A Linux of any version in a virtual machine, with a provider inside.
    Vm,
    /// A file system in an image, read by code of this process: files only.
    Image,
}

impl Make {
    /// All there are.
    pub const ALL: [Self; 7] =
        [Self::Host, Self::Gvisor, Self::Netstack, Self::Provider, Self::Remote, Self::Vm, Self::Image];

    /// As it is written.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Gvisor => "gvisor",
            Self::Netstack => "netstack",
            Self::Provider => "provider",
            Self::Remote => "remote",
            Self::Vm => "vm",
            Self::Image => "image",
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
    /// Where a provider listens, or the image is.
    pub path: Option<PathBuf>,
    /// Where a provider is, for [`Make::Remote`].
    pub remote: Option<Remote>,
    /// Directories of this host that it can serve.
    pub shares: Vec<Shared>,
    /// What a virtual machine is.
    pub machine: MachineSpec,
}

/// A virtual machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineSpec {
    /// A version of `kso kernels`, or the path of an image; `None`: the newest there is.
    pub kernel: Option<String>,
    /// Memory, MiB.
    pub memory: u32,
    /// Disks with file systems.
    pub disks: Vec<DiskSpec>,
    /// More words for its kernel's command line.
    pub append: Vec<String>,
    /// More words for QEMU.
    pub qemu: Vec<String>,
}

impl Default for MachineSpec {
    fn default() -> Self {
        Self { kernel: None, memory: MEMORY, disks: Vec::new(), append: Vec::new(), qemu: Vec::new() }
    }
}

/// A disk of a virtual machine: an ext4 image, and where it is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// The image here.
    pub image: PathBuf,
    /// The mount point there.
    pub target: String,
    /// No writing.
    pub read_only: bool,
}

/// Memory of a virtual machine unless told, MiB.
const MEMORY: u32 = 256;
/// Least and most of it.
const MEMORIES: std::ops::RangeInclusive<u32> = 96..=1 << 20;

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
    kernel: Option<String>,
    memory: Option<String>,
    disk: Vec<String>,
    append: Vec<String>,
    qemu: Vec<String>,
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

impl Settings {
    /// Something that only a virtual machine has.
    fn of_machines(&self) -> Option<&'static str> {
        [
            ("kernel", self.kernel.is_some()),
            ("memory", self.memory.is_some()),
            ("disk", !self.disk.is_empty()),
            ("append", !self.append.is_empty()),
            ("qemu", !self.qemu.is_empty()),
        ]
        .into_iter()
        .find_map(|(name, set)| set.then_some(name))
    }

    fn machine(&self) -> Result<MachineSpec, String> {
        if self.disk.len() > machine::MAX_EACH {
            return Err(format!("at most {} disks", machine::MAX_EACH));
        }
        Ok(MachineSpec {
            kernel: self.kernel.clone(),
            memory: self.memory.as_deref().map_or(Ok(MEMORY), memory)?,
            disks: self.disk.iter().map(|text| disk(text)).collect::<Result<_, _>>()?,
            append: self.append.clone(),
            qemu: self.qemu.clone(),
        })
    }
}

/// A number of MiB, or one with a unit.
fn memory(text: &str) -> Result<u32, String> {
    let (number, factor) = match text.trim_end_matches(['i', 'B', 'b']) {
        text if text.ends_with(['M', 'm']) => (text.trim_end_matches(['M', 'm']), 1),
        text if text.ends_with(['G', 'g']) => (text.trim_end_matches(['G', 'g']), 1024),
        text => (text, 1),
    };
    let size = number.parse::<u32>().ok().and_then(|number| number.checked_mul(factor));
    size.filter(|size| MEMORIES.contains(size)).ok_or_else(|| {
        format!("`{text}` is no memory of at least {} MiB, such as 256M or 1G", MEMORIES.start())
    })
}

/// `IMAGE@/TARGET[:ro]`.
fn disk(text: &str) -> Result<DiskSpec, String> {
    let form = || format!("`{text}`: a disk is IMAGE@/MOUNT/POINT, or with :ro");
    let (rest, read_only) = match text.strip_suffix(":ro") {
        Some(rest) => (rest, true),
        None => (text.strip_suffix(":rw").unwrap_or(text), false),
    };
    let (image, target) = rest.rsplit_once('@').filter(|(image, _)| !image.is_empty()).ok_or_else(form)?;
    if !machine::is_target(target) {
        return Err(format!("{}, whose path is absolute and of letters, digits and ._-+%", form()));
    }
    Ok(DiskSpec { image: image.into(), target: target.to_owned(), read_only })
}

/// Splits at commas; two of them stand for one.
fn words(text: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(c) = characters.next() {
        if c == ',' && characters.next_if_eq(&',').is_none() {
            words.push(String::new());
        } else if let Some(word) = words.last_mut() {
            word.push(c);
        }
    }
    words
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
        if make == Make::Image && settings.path.is_none() {
            return Err(error("the path of the image is missing: path=/var/lib/images/disk.ext4".into()));
        }
        if make == Make::Image && !settings.share.is_empty() {
            return Err(error("all of an image is shared: leave out share=".into()));
        }
        if make == Make::Provider && !settings.share.is_empty() {
            return Err(error("what a provider shares is told to itself: kso provide --share DIR".into()));
        }
        let share =
            |text: &String| Shared::parse(text.as_ref()).map_err(|wrong| error(format!("share={wrong}")));
        if make != Make::Vm
            && let Some(setting) = settings.of_machines()
        {
            return Err(error(format!("`{setting}` is for make vm only")));
        }
        let machine = settings.machine().map_err(error)?;
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
            machine,
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
        let mut words = words(&rest).into_iter();
        let mut settings = Settings { make: words.next(), ..Settings::default() };
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
                "kernel" => settings.kernel = Some(value.to_owned()),
                "memory" => settings.memory = Some(value.to_owned()),
                "disk" => settings.disk.push(value.to_owned()),
                "append" => settings.append.push(value.to_owned()),
                "qemu" => settings.qemu.push(value.to_owned()),
                "patience_ms" => {
                    settings.patience_ms =
                        Some(value.parse().map_err(|_| error(format!("`{value}` is no number")))?);
                }
                _ => {
                    return Err(error(format!(
                        "`{key}` is no setting: address, gateway, attach, path, patience_ms, share, for make remote ca, cert, key, \
                         server_name, or for make vm kernel, memory, disk, append, qemu"
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
    fn a_virtual_machine_is_read_in_both_forms() {
        let text = "make = \"vm\"\nkernel = \"6.12\"\nmemory = \"1G\"\ndisk = [\"/a,b@c.img@/srv:ro\", \"d@/d\"]\n\
                    append = [\"a=1,2\"]\nqemu = [\"-monitor\", \"unix:/m,server=on\"]";
        let written = KernelSpec::new("deb", toml::from_str(text).unwrap()).unwrap();
        let short = "deb=vm,kernel=6.12,memory=1024,disk=/a,,b@c.img@/srv:ro,disk=d@/d,append=a=1,,2,qemu=-monitor,\
                     qemu=unix:/m,,server=on";
        assert_eq!(written, KernelSpec::parse(short).unwrap());
        let MachineSpec { kernel, memory, disks, .. } = written.machine;
        assert_eq!((kernel.as_deref(), memory), (Some("6.12"), 1024));
        let disk = DiskSpec { image: "/a,b@c.img".into(), target: "/srv".into(), read_only: true };
        assert_eq!((disks.first(), disks.len()), (Some(&disk), 2));
        assert_eq!(KernelSpec::parse("vm").unwrap().machine, MachineSpec::default());
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
            ("x=image", "path=/var"),
            ("x=image,path=/i,share=/srv", "leave out share="),
            ("x=provider,path=/p,share=/srv", "kso provide --share"),
            ("x=gvisor,share=srv", "absolute"),
            ("x=gvisor,patience_ms=1", "at least 50"),
            ("x=gvisor,kernel=6.12", "for make vm only"),
            ("x=vm,memory=64M", "at least 96 MiB"),
            ("x=vm,disk=/a.img", "IMAGE@/MOUNT/POINT"),
            ("x=vm,disk=/a.img@srv", "absolute"),
            ("x=vm,disk=/a.img@/s rv", "absolute"),
        ] {
            let error = KernelSpec::parse(text).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
