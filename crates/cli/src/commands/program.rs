//! What a program gets, wherever it runs: the options that `kso run` and `kso vm` share.

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use kso_broker::{BrokerConfig, KernelsConfig};
use kso_core::files::Volume;
use kso_core::kernels::KernelSpec;
use kso_core::publish;
use kso_core::routes::{HOST, Route, Routes};
use kso_wire::{Hello, LoopbackMode, Protocol, Publication, TunAddresses, VERSION};
use std::ffi::OsString;
use std::path::PathBuf;

/// Longest command line that `kso ps` shows, bytes.
const MAX_COMMAND: usize = 256;

/// See the module.
#[derive(Args, Debug)]
pub struct ProgramArgs {
    /// Allow only what a rule allows (repeatable)
    #[arg(long, value_name = "RULE")]
    allow: Vec<String>,

    /// Deny what a rule names (repeatable; wins over --allow)
    #[arg(long, value_name = "RULE")]
    deny: Vec<String>,

    /// No network outside the sandbox at all, names included
    #[arg(long, conflicts_with_all = ["allow", "publish"])]
    no_net: bool,

    /// Publish a port on 127.0.0.1 and ::1, or on the address given; `all` publishes each listener
    #[arg(short = 'p', long, value_name = "[ADDRESS:]HOST:GUEST[/udp]")]
    pub publish: Vec<String>,

    /// Which loopback 127.0.0.1 and ::1 are to TCP: the sandbox's own, or this host's
    #[arg(long, value_enum, default_value_t = Loopback::Private)]
    loopback: Loopback,

    /// Use the broker that listens on this socket instead of one of our own
    #[arg(long, value_name = "PATH")]
    pub broker: Option<PathBuf>,

    /// Which external kernel serves what (repeatable; the first that fits): tcp-listen:80=gvisor,host
    #[arg(long, value_name = "SERVICE[:PORTS][@NET][%PROGRAM]=KERNEL[,KERNEL]", conflicts_with = "broker")]
    via: Vec<String>,

    /// An external kernel for --via and -v with its settings (repeatable): web=gvisor,address=10.77.0.2/24,attach=bridge:br0
    #[arg(long, value_name = "NAME[=MAKE][,KEY=VALUE]", conflicts_with = "broker")]
    external: Vec<String>,

    /// Let the program see a directory, of this host or of another kernel, at a place (repeatable)
    #[arg(short = 'v', long, value_name = "[KERNEL[,KERNEL]:]PATH:WHERE[:OPTIONS]")]
    volume: Vec<OsString>,

    /// A name for `kso ps` and `kso trace`
    #[arg(long)]
    pub name: Option<String>,

    /// Let the program use io_uring; its connections then go by the TUN, which is slower
    #[arg(long)]
    pub io_uring: bool,

    /// Print each connect, listen, accept, resolve and denial to standard error
    #[arg(long, conflicts_with = "broker")]
    pub trace: bool,

    /// Serve Prometheus metrics on this address (ADDRESS:PORT, or unix:PATH)
    #[arg(long, value_name = "ADDRESS", conflicts_with = "broker")]
    pub metrics: Option<String>,

    /// Set an environment variable (NAME alone: as it is here)
    #[arg(short = 'e', long = "env", value_name = "NAME=VALUE")]
    environment: Vec<OsString>,

    /// Working directory of the program
    #[arg(short = 'w', long, value_name = "DIR")]
    pub workdir: Option<PathBuf>,

    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "CMD")]
    pub command: Vec<OsString>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Loopback {
    /// The sandbox's own
    Private,
    /// This host's
    External,
}

impl ProgramArgs {
    /// What a broker is told of the session.
    pub fn hello(&self) -> Result<Hello> {
        if let Some(word) = self.command.first().filter(|word| word.as_encoded_bytes().starts_with(b"-")) {
            let word = word.display();
            bail!("there is no option {word}: see --help (a program that is called so is ./{word})");
        }
        let rules = self.allow.iter().map(|text| (true, text.clone()));
        let rules: Vec<_> = rules.chain(self.deny.iter().map(|text| (false, text.clone()))).collect();
        let publish =
            self.publish.iter().map(|text| Ok(publish::parse(text)?)).collect::<Result<Vec<_>>>()?;
        refuse_twice(&publish)?;
        let mut command =
            self.command.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
        while command.len() > MAX_COMMAND {
            command.pop();
        }
        let program = self.command.first().map(PathBuf::from);
        let program = program.as_deref().and_then(|path| path.file_name()).unwrap_or_default();
        Ok(Hello {
            version: VERSION,
            name: self.name.clone().unwrap_or_else(|| program.to_string_lossy().chars().take(64).collect()),
            command,
            pid: std::process::id(),
            rules,
            no_net: self.no_net,
            publish,
            loopback: match self.loopback {
                Loopback::Private => LoopbackMode::Private,
                Loopback::External => LoopbackMode::External,
            },
            tun: TunAddresses::standard(),
        })
    }

    /// The directories of `-v`.
    pub fn volumes(&self) -> Result<Vec<Volume>> {
        let volumes = super::volumes::read(&self.volume)?;
        if self.broker.is_some() {
            super::volumes::refuse_elsewhere(&volumes)?;
        }
        Ok(volumes)
    }

    /// How a broker in this process is set up. `first`: kernels that serve all TCP, unless a route says otherwise.
    /// `volumes` may name others, for files.
    pub fn broker_config(&self, first: &[String], volumes: &[Volume]) -> Result<BrokerConfig> {
        let specs = self.external.iter().chain(first).map(|text| Ok(KernelSpec::parse(text)?));
        let mut kernels: Vec<KernelSpec> = specs.collect::<Result<_>>()?;
        let mut routes: Vec<Route> =
            self.via.iter().map(|text| Ok(Route::parse(text)?)).collect::<Result<_>>()?;
        for text in first {
            routes.push(Route::all_tcp(&KernelSpec::parse(text)?.name)?);
        }
        let via = Routes::new(routes.clone());
        let via = via.kernels().into_iter().map(|name| ("--via", name.to_owned()));
        let files = volumes.iter().flat_map(|volume| &volume.kernels).map(|name| ("-v", name.clone()));
        for (option, name) in via.chain(files) {
            if name == HOST || kernels.iter().any(|known| known.name == name) {
                continue;
            }
            // A kernel that is called as its make needs no settings.
            let hint = || {
                format!(
                    "{option} names the kernel `{name}`, which --external does not describe: \
                     --external {name}=MAKE,KEY=VALUE"
                )
            };
            kernels.push(KernelSpec::parse(&name).with_context(hint)?);
        }
        Ok(BrokerConfig {
            trace: self.trace,
            metrics: self.metrics.clone(),
            kernels: KernelsConfig { kernels, program: None },
            routes,
            ..BrokerConfig::default()
        })
    }

    /// `NAME=VALUE`, or `NAME` for the value it has here.
    pub fn variables(&self) -> Result<Vec<(OsString, OsString)>> {
        use std::os::unix::ffi::{OsStrExt, OsStringExt};
        let mut variables = Vec::new();
        for text in &self.environment {
            let bytes = text.as_bytes();
            match bytes.iter().position(|&byte| byte == b'=') {
                Some(0) => bail!("-e {}: a variable has a name before its =", text.display()),
                Some(at) => {
                    let (name, value) = bytes.split_at(at);
                    let value = value.get(1..).unwrap_or_default();
                    variables.push((OsString::from_vec(name.to_vec()), OsString::from_vec(value.to_vec())));
                }
                None => {
                    if let Some(value) = std::env::var_os(text) {
                        variables.push((text.clone(), value));
                    }
                }
            }
        }
        Ok(variables)
    }

    /// The directory of `-w`.
    pub fn directory(&self) -> Result<Option<PathBuf>> {
        let Some(directory) = &self.workdir else { return Ok(None) };
        let canonical = directory.canonicalize().with_context(|| format!("-w {}", directory.display()))?;
        Ok(Some(canonical))
    }
}

/// The same port twice would fail later, or silently do half of what was asked.
fn refuse_twice(publish: &[Publication]) -> Result<()> {
    for (index, one) in publish.iter().enumerate() {
        for other in publish.iter().skip(index + 1).filter(|other| other.protocol == one.protocol) {
            let protocol = one.protocol.name();
            if one.address == other.address && one.outer_port == other.outer_port && one.outer_port != 0 {
                bail!("port {}/{protocol} is published twice: remove one -p", one.outer_port);
            }
            if one.protocol == Protocol::Tcp && one.inner_port == other.inner_port {
                bail!(
                    "port {}/{protocol} inside is published twice, and a listener has one address outside: \
                     publish it on 0.0.0.0 (-p 0.0.0.0:{}:{}) to reach it by every address",
                    one.inner_port,
                    one.outer_port,
                    one.inner_port
                );
            }
        }
    }
    Ok(())
}

/// The text of `/etc/resolv.conf` inside: the gateway, and the host's search list and options.
pub fn resolv_conf(tun: &TunAddresses) -> String {
    let host = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let kept = host.lines().filter(|line| {
        ["search", "domain", "options"].iter().any(|word| line.split_whitespace().next() == Some(word))
    });
    let [gateway, _] = tun.gateway;
    let mut text = format!("# kso: names are resolved by the broker\nnameserver {gateway}\n");
    for line in kept {
        text.push_str(line);
        text.push('\n');
    }
    text
}

/// Descriptors of connections pass through here, and numbers of the program's are used here: as many as may
/// be.
pub fn raise_open_files((_, hard): (u64, u64)) {
    let most = std::fs::read_to_string("/proc/sys/fs/nr_open")
        .ok()
        .and_then(|text| text.trim().parse::<u64>().ok())
        .unwrap_or(hard);
    let wanted = most.max(hard);
    if kso_sys::process::set_open_files_limit(wanted, wanted).is_err() {
        // Without privilege the hard limit is the end.
        let _ = kso_sys::process::set_open_files_limit(hard, hard);
    }
}
