//! Where the files are, and by which ways they are reached.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use kso_vm::Kernel;

use super::rows::PAGE_CACHE;
use super::work;
use crate::guest::agent::Request;
use crate::guest::machine::Guest;
use crate::guest::net::{self, nic};
use crate::namespace::ip;
use crate::samples::Samples;
use crate::sandbox::Tools;

/// Time for a process to come up.
const PATIENCE: Duration = Duration::from_secs(10);
/// A guest reads a gibibyte.
const READ_PATIENCE: Duration = Duration::from_secs(180);
const MAC: &str = "52:54:00:00:00:01";
const HOST: &str = "10.79.1.1/24";
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 79, 1, 2);
/// MiB of the ext4 image: all of the files, and room to write.
const DISK_MIB: u64 = 768;
/// Guests that read one file.
const READERS: u32 = 4;

/// By which way files are reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// On the host, without a guest.
    Native,
    /// Outsourced: `kso vm -v`.
    Kso,
    /// virtiofsd, cache=auto.
    Virtiofsd,
    /// virtio-blk with ext4.
    Disk,
}

impl Way {
    pub const ALL: [Way; 4] = [Way::Native, Way::Kso, Way::Virtiofsd, Way::Disk];

    pub fn name(self) -> &'static str {
        match self {
            Way::Native => "native",
            Way::Kso => "kso",
            Way::Virtiofsd => "virtiofsd",
            Way::Disk => "virtio-blk",
        }
    }

    fn port(self) -> u16 {
        match self {
            Way::Native => 8080,
            Way::Kso => 8081,
            Way::Virtiofsd => 8082,
            Way::Disk => 8083,
        }
    }
}

/// The host's side: files, devices and processes.
pub struct Outside {
    scratch: PathBuf,
    processes: Vec<Child>,
}

impl Outside {
    pub fn make(scratch: &Path) -> Result<Self> {
        let mut outside = Self { scratch: scratch.to_owned(), processes: Vec::new() };
        // nginx drops root, and must reach what it serves.
        fs::set_permissions(scratch, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let tree = outside.tree();
        fs::create_dir(&tree)?;
        work::prepare(&tree)?;
        let disk = outside.path("disk.ext4");
        let (tree_word, disk_word) = (tree.display().to_string(), disk.display().to_string());
        command(&["mkfs.ext4", "-q", "-F", "-d", &tree_word, &disk_word, &format!("{DISK_MIB}M")])?;
        fs::write(tree.join("nginx.conf"), config(&[Way::Kso, Way::Virtiofsd, Way::Disk], "/srv"))?;
        net::tap("tap0")?;
        ip(&["address", "add", HOST, "dev", "tap0"])?;
        let socket = outside.path("virtiofsd.sock");
        let socket_word = format!("--socket-path={}", socket.display());
        let shared = format!("--shared-dir={tree_word}");
        outside.spawn(&["virtiofsd", &socket_word, &shared, "--cache=auto", "--sandbox=none"])?;
        let end = Instant::now() + PATIENCE;
        while !socket.exists() {
            ensure!(Instant::now() < end, "virtiofsd makes no socket");
            thread::sleep(Duration::from_millis(5));
        }
        let native = outside.path("native.conf");
        fs::write(&native, config(&[Way::Native], &tree_word))?;
        outside.spawn(&["nginx", "-c", &native.display().to_string()])?;
        Ok(outside)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    fn tree(&self) -> PathBuf {
        self.path("tree")
    }

    fn spawn(&mut self, words: &[&str]) -> Result<()> {
        let (first, rest) = words.split_first().context("a command")?;
        let mut command = Command::new(first);
        command.args(rest).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.processes.push(command.spawn().with_context(|| format!("cannot start {first} (make bench)"))?);
        Ok(())
    }

    /// More options of `kso vm`.
    pub fn options(&self) -> Vec<String> {
        let mut options = vec!["-m".to_owned(), "1024".to_owned()];
        options.extend(["-v".to_owned(), format!("{}:/srv/kso", self.tree().display())]);
        options.extend(["-p".to_owned(), format!("{0}:{0}", Way::Kso.port())]);
        options.extend(["--inside".to_owned(), net::NETWORKS.to_owned()]);
        let modules = ["virtio_net", "virtio_blk", "ext4"];
        options.extend(modules.iter().flat_map(|module| ["--module".to_owned(), (*module).to_owned()]));
        let mut words = nic("tap,id=tap,ifname=tap0,script=no,downscript=no", "tap", MAC);
        let socket = self.path("virtiofsd.sock");
        let disk = self.path("disk.ext4");
        words.extend([
            "-chardev".to_owned(),
            format!("socket,id=virtiofsd,path={}", socket.display()),
            "-device".to_owned(),
            "vhost-user-fs-device,chardev=virtiofsd,tag=virtiofsd".to_owned(),
            "-drive".to_owned(),
            format!("file={},format=raw,if=none,id=disk,cache=writeback", disk.display()),
            "-device".to_owned(),
            "virtio-blk-device,drive=disk".to_owned(),
        ]);
        options.extend(words.into_iter().flat_map(|word| ["--qemu-arg".to_owned(), word]));
        options
    }

    /// Mounts in the guest, and starts its nginx.
    pub fn join(&self, ask: &mut dyn FnMut(Request) -> Result<String>) -> Result<()> {
        ask(Request::Address(MAC.into(), format!("{GUEST}/24")))?;
        for words in [
            &["/bin/mkdir", "-p", "/srv/virtiofsd", "/srv/virtio-blk"][..],
            &["/bin/mount", "-t", "virtiofs", "virtiofsd", "/srv/virtiofsd"],
            &["/bin/mount", "-t", "ext4", "/dev/vda", "/srv/virtio-blk"],
        ] {
            ask(Request::Run(words.iter().map(|word| (*word).to_owned()).collect()))?;
        }
        let nginx = ["/usr/sbin/nginx", "-c", "/srv/kso/nginx.conf"].map(str::to_owned);
        ask(Request::Start("nginx".into(), nginx.into()))?;
        for way in Way::ALL {
            let server = self.server(way);
            let end = Instant::now() + PATIENCE;
            while std::net::TcpStream::connect_timeout(&server, Duration::from_secs(1)).is_err() {
                ensure!(Instant::now() < end, "nginx does not answer by way of {}", way.name());
                thread::sleep(Duration::from_millis(50));
            }
        }
        Ok(())
    }

    /// The files, as they are seen.
    pub fn directory(&self, way: Way) -> String {
        match way {
            Way::Native => self.tree().display().to_string(),
            _ => format!("/srv/{}", way.name()),
        }
    }

    /// The nginx that serves them, as the host's clients reach it.
    pub fn server(&self, way: Way) -> SocketAddr {
        let address = match way {
            Way::Native | Way::Kso => Ipv4Addr::LOCALHOST,
            Way::Virtiofsd | Way::Disk => GUEST,
        };
        SocketAddr::new(IpAddr::V4(address), way.port())
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        for process in &mut self.processes {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// nginx's configuration: a server for each way.
fn config(ways: &[Way], root: &str) -> String {
    let server = |way: &Way| {
        let root = if *way == Way::Native { root.to_owned() } else { format!("{root}/{}", way.name()) };
        format!("  server {{ listen {}; root {root}; }}\n", way.port())
    };
    let servers: String = ways.iter().map(server).collect();
    format!(
        "daemon off; user root; worker_processes 1; pid /tmp/kso-bench-nginx.pid; error_log /dev/null;\n\
         events {{ worker_connections 256; }}\n\
         http {{\n  access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000;\n\
         client_body_temp_path /tmp/b1; proxy_temp_path /tmp/b2; fastcgi_temp_path /tmp/b3;\n\
         uwsgi_temp_path /tmp/b4; scgi_temp_path /tmp/b5;\n{servers}}}\n"
    )
}

fn command(words: &[&str]) -> Result<()> {
    let (first, rest) = words.split_first().context("a command")?;
    let done = Command::new(first).args(rest).output().with_context(|| format!("cannot start {first}"))?;
    if !done.status.success() {
        bail!("{}: {}", words.join(" "), String::from_utf8_lossy(&done.stderr).trim());
    }
    Ok(())
}

/// A number of /proc/meminfo, MiB.
fn memory(name: &str) -> Result<f64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let number = line.and_then(|rest| rest.split_whitespace().next()).context("no such number")?;
    Ok(number.parse::<f64>()? / 1024.0)
}

/// Four guests read one file: MiB that the host's page cache grows by, and the guests' own memory.
pub fn page_cache(
    outside: &Outside,
    tools: &Tools,
    kernel: &Kernel,
    quick: bool,
    samples: &mut Samples,
) -> Result<()> {
    let mib: u64 = if quick { 128 } else { 1024 };
    let directory = outside.path("shared");
    fs::create_dir(&directory)?;
    let size = mib.to_string();
    let path = directory.join("file").display().to_string();
    command(&[
        "dd",
        "if=/dev/urandom",
        &format!("of={path}"),
        "bs=1M",
        &format!("count={size}"),
        "status=none",
    ])?;
    command(&["sync", "-f", &path])?;
    let options = ["-m", "256", "-v", &format!("{}:/srv/shared:ro", directory.display())].map(str::to_owned);
    let mut guests = Vec::new();
    for _ in 0..READERS {
        guests.push(Guest::start(tools, kernel, &options)?);
    }
    // Shared memory is the guests', and counted as cached, too.
    let cached = || Ok::<f64, anyhow::Error>(memory("Cached")? - memory("Shmem")?);
    fs::write("/proc/sys/vm/drop_caches", "3").context("drop_caches")?;
    let (before, own) = (cached()?, memory("Shmem")?);
    for (count, guest) in (1..).zip(&mut guests) {
        let words = ["/bin/cat", "/srv/shared/file"].map(str::to_owned);
        let words = ["/bin/sh", "-c", &format!("{} > /dev/null", words.join(" "))].map(str::to_owned);
        guest.ask(&Request::Run(words.into()), READ_PATIENCE)?;
        samples.add(&format!("{PAGE_CACHE}/host"), "kso", count, cached()? - before, "MiB");
        samples.add(&format!("{PAGE_CACHE}/guests"), "kso", count, memory("Shmem")? - own, "MiB");
    }
    samples.add(&format!("{PAGE_CACHE}/file"), "kso", 0, mib as f64, "MiB");
    Ok(())
}
