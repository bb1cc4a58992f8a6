//! The test's own small internet.

use crate::netns::{Netns, ip, sweep};
use crate::programs::output_directory;
use crate::{Authority, Client, Cmd, EchoServer, HttpOrigin, Output, Pty, Running, argv, leaks};
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, Once, OnceLock};
use tempfile::TempDir;

static COUNTER: AtomicU32 = AtomicU32::new(0);
static SWEEP: Once = Once::new();

/// Where this test's profile is built.
pub(crate) fn target_directory() -> PathBuf {
    let test = std::env::current_exe().expect("the test's own path");
    // target/PROFILE/deps/test-HASH
    test.parent().and_then(|deps| deps.parent()).expect("a target directory").to_path_buf()
}

/// The cache of the user who tests.
fn cache() -> String {
    std::env::var("XDG_CACHE_HOME").unwrap_or_else(|_| {
        format!("{}/.cache", std::env::var("HOME").unwrap_or_else(|_| "/root".to_owned()))
    })
}

/// Where the guest programs are built.
fn programs_directory() -> String {
    output_directory().display().to_string()
}

/// The kso under test: `KSO_BIN`, or the one built with the tests.
pub fn kso_binary() -> String {
    let path = std::env::var("KSO_BIN").map_or_else(|_| target_directory().join("kso"), PathBuf::from);
    assert!(path.exists(), "{} is missing: `cargo build -p kso` first, or `make test`", path.display());
    path.display().to_string()
}

/// A host, an outside, and the commands between them.
#[derive(Debug)]
pub struct World {
    // Dropped in this order: what runs before where it runs.
    origin_http: OnceLock<HttpOrigin>,
    services: Mutex<Vec<Running>>,
    /// Where kso runs.
    pub host: Netns,
    /// The outside.
    pub origin: Netns,
    mark: String,
    authority: OnceLock<Authority>,
    directory: TempDir,
}

impl World {
    /// Makes the namespaces, the link between them, and the name server.
    pub fn new() -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "the end-to-end tests make network namespaces: run them as root"
        );
        SWEEP.call_once(sweep);
        let n = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("ksot-{}-{n}", std::process::id());
        let host = Netns::new(format!("{name}-h"));
        let origin = Netns::new(format!("{name}-o"));
        ip(&format!("link add eth0 netns {} type veth peer name eth0 netns {}", host.name(), origin.name()));
        for (netns, addresses) in [
            (&host, &["10.77.0.1/24", "fd77::1/64"][..]),
            (
                &origin,
                &[
                    "10.77.0.2/24",
                    "10.77.0.3/24",
                    "10.77.0.4/24",
                    "fd77::2/64",
                    "fd77::3/64",
                    "169.254.169.254/32",
                    "169.254.7.7/32",
                    "fd00:ec2::254/128",
                ][..],
            ),
        ] {
            let nodad = |address: &str| if address.contains("::") { "nodad" } else { "" };
            let mut lines: Vec<String> = addresses
                .iter()
                .map(|address| format!("addr add {address} dev eth0 {}", nodad(address)))
                .collect();
            lines.push("link set eth0 up".to_owned());
            netns.ip_batch(&lines);
        }
        host.ip_batch(&[
            "route add 169.254.0.0/16 dev eth0".to_owned(),
            "route add fd00:ec2::254/128 dev eth0".to_owned(),
            // A neighbour that nobody is: a SYN sent there is dropped in silence.
            "neigh add 10.77.0.99 lladdr 02:00:00:00:00:99 dev eth0 nud permanent".to_owned(),
            "route add unreachable 10.78.0.0/24".to_owned(),
        ]);
        let directory = tempfile::Builder::new().prefix("kso-test-").tempdir().expect("a directory in /tmp");
        // Servers that drop root must reach what is in it.
        fs::set_permissions(directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .expect("chmod");
        let resolver = "nameserver 10.77.0.2\noptions timeout:2 attempts:2\n";
        fs::write(format!("{}/resolv.conf", host.etc()), resolver).expect("/etc/netns can be written");
        fs::write(
            format!("{}/hosts", host.etc()),
            "127.0.0.1 localhost\n::1 localhost ip6-localhost\n10.77.0.2 fromhosts.test\n",
        )
        .expect("/etc/netns can be written");
        fs::create_dir_all(directory.path().join("run")).expect("a runtime directory");
        let world = Self {
            origin_http: OnceLock::new(),
            services: Mutex::default(),
            host,
            origin,
            mark: format!("KSO_TEST_WORLD={name}"),
            authority: OnceLock::new(),
            directory,
        };
        world.start_names();
        world
    }

    fn start_names(&self) {
        let long = "x".repeat(200);
        let config = format!(
            "no-resolv\nno-hosts\nno-daemon\nport=53\nlisten-address=10.77.0.2,fd77::2\nbind-interfaces\nuser=root\npid-file=\n\
             local=/test/\nedns-packet-max=4096\n\
             host-record=origin.test,10.77.0.2,fd77::2\nhost-record=www.origin.test,10.77.0.2,fd77::2\n\
             host-record=v4.test,10.77.0.2\nhost-record=v6.test,fd77::2\nhost-record=other.test,10.77.0.3,fd77::3\n\
             host-record=third.test,10.77.0.4\nhost-record=two.test,10.78.0.1\nhost-record=two.test,10.77.0.2\n\
             host-record=metadata.test,169.254.169.254\nhost-record=rebind.test,127.0.0.1\n\
             host-record=cname-target.test,10.77.0.4\ncname=alias.test,cname-target.test\n\
             mx-host=origin.test,mail.origin.test,10\ntxt-record=origin.test,\"hello from origin\"\n\
             srv-host=_http._tcp.origin.test,origin.test,80,1,2\n{}",
            (0..12).map(|i| format!("txt-record=long.test,\"{i}{long}\"\n")).collect::<String>()
        );
        let path = self.path("dnsmasq.conf");
        fs::write(&path, config).expect("a file");
        let conf = format!("--conf-file={path}");
        let mut dnsmasq = self.at_origin(argv(["dnsmasq", "--keep-in-foreground", &conf])).spawn();
        crate::wait_until("dnsmasq", crate::seconds(10), || {
            assert!(dnsmasq.running(), "dnsmasq: {}", dnsmasq.errors());
            self.origin.udp_ports().contains(&53)
        });
        self.keep(dnsmasq);
    }

    /// Keeps a background process until the world ends.
    pub fn keep(&self, process: Running) {
        self.services.lock().expect("no panic").push(process);
    }

    /// A path in the test's own directory.
    pub fn path(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }

    /// Writes a file in the test's own directory; its path.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        let path = self.path(name);
        fs::write(&path, content).expect("a file");
        path
    }

    /// The certificate authority, made at first use.
    pub fn authority(&self) -> &Authority {
        self.authority.get_or_init(|| Authority::new(self.directory.path()))
    }

    /// The path of the CA's certificate.
    pub fn ca(&self) -> String {
        self.authority().ca.display().to_string()
    }

    /// HTTP and HTTPS in the origin namespace, started at first use.
    pub fn http(&self) -> &HttpOrigin {
        self.origin_http.get_or_init(|| HttpOrigin::start(&self.origin, self.authority()))
    }

    /// A TCP echo server on `port` of all the origin's addresses.
    pub fn echo(&self, port: u16) -> EchoServer {
        EchoServer::start(&self.origin, &format!("[::]:{port}"))
    }

    /// `cmd` in the origin namespace.
    pub fn at_origin(&self, cmd: Cmd) -> Cmd {
        cmd.prefixed(["ip", "netns", "exec", self.origin.name()])
    }

    /// `cmd` in the host namespace, without kso.
    pub fn at_host(&self, cmd: Cmd) -> Cmd {
        let (key, value) = self.mark.split_once('=').expect("KEY=VALUE");
        cmd.prefixed(["ip", "netns", "exec", self.host.name()])
            .env(key, value)
            .env("KSO_RUNTIME_DIR", self.path("run"))
            // Kernels of guests are in the user's own cache, whatever home a program is given.
            .env("XDG_CACHE_HOME", cache())
    }

    /// `kso WORDS` in the host namespace.
    pub fn kso_command<S: Into<String>>(&self, words: impl IntoIterator<Item = S>) -> Cmd {
        self.at_host(argv(words).prefixed([kso_binary()]))
    }

    /// `cmd` under kso with `flags` (split at spaces) in the host namespace, on the client kernel that is tested.
    pub fn outsourced(&self, flags: &str, cmd: Cmd) -> Cmd {
        self.outsourced_on(Client::current(), flags, cmd)
    }

    /// The same in a microVM, whatever is tested otherwise.
    pub fn guest(&self, flags: &str, cmd: Cmd) -> Cmd {
        self.outsourced_on(&Client::guest(), flags, cmd)
    }

    /// The same on a client kernel.
    pub fn outsourced_on(&self, client: &Client, flags: &str, cmd: Cmd) -> Cmd {
        let shared = [self.directory.path().display().to_string(), programs_directory()];
        let limit = client.patience(cmd.limit);
        self.at_host(cmd.prefixed(client.words(&kso_binary(), flags, &shared)).limit(limit))
    }

    /// Runs `cmd` natively.
    pub fn native(&self, cmd: Cmd) -> Output {
        self.at_host(cmd).run()
    }

    /// Runs `cmd` under kso.
    pub fn kso(&self, flags: &str, cmd: Cmd) -> Output {
        self.outsourced(flags, cmd).run()
    }

    /// Runs `cmd` natively, then under kso: both must print the same and end the same. The output.
    #[track_caller]
    pub fn same(&self, flags: &str, cmd: Cmd) -> Output {
        let native = self.native(cmd.clone());
        // Twice natively shows whether the program itself is deterministic.
        let kso = if natively_only() { self.native(cmd) } else { self.kso(flags, cmd) };
        assert!(
            native.stdout == kso.stdout && native.status == kso.status,
            "the outputs differ\n=== natively: {}\n=== under kso: {}",
            native.report(),
            kso.report()
        );
        kso
    }

    /// Like [`World::same`], and both must succeed.
    #[track_caller]
    pub fn same_ok(&self, flags: &str, cmd: Cmd) -> Output {
        self.same(flags, cmd).ok()
    }

    /// Starts `cmd` under kso in the background.
    pub fn start(&self, flags: &str, cmd: Cmd) -> Running {
        self.outsourced(flags, cmd).spawn()
    }

    /// Starts `cmd` under kso on a terminal.
    pub fn terminal(&self, flags: &str, cmd: Cmd, rows: u16, columns: u16) -> Pty {
        Pty::spawn(&self.outsourced(flags, cmd), rows, columns)
    }

    /// Processes of this world's host side that still live.
    pub fn processes(&self) -> Vec<(u32, String)> {
        leaks::marked_processes(&self.mark)
    }

    /// Waits until none lives; panics with a list otherwise.
    #[track_caller]
    pub fn nothing_left(&self) {
        leaks::wait_gone(&self.mark);
        let left = fs::read_dir(self.path("run")).map_or(0, Iterator::count);
        // kso is gone: its control socket must be too, unless it was killed (then the next one sweeps).
        assert!(left <= 1, "{left} control sockets were left");
    }
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

/// For who writes a guest program: `KSO_TESTS_NATIVE=1` runs it natively, twice.
fn natively_only() -> bool {
    let set = std::env::var_os("KSO_TESTS_NATIVE").is_some();
    assert!(!set || std::env::var_os("CI").is_none(), "KSO_TESTS_NATIVE tests nothing of kso");
    set
}
