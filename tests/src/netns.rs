//! A named network namespace, removed on drop.

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::{self, File};
use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::time::Duration;

/// A network namespace made by `ip netns add`.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

/// Runs `ip` with `arguments` split at spaces; panics with its message when it fails.
pub(crate) fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().expect("ip(8) runs");
    assert!(
        output.status.success(),
        "ip {arguments}: {} (the tests need root: run `make test` as root)",
        String::from_utf8_lossy(&output.stderr).trim()
    );
}

impl Netns {
    /// Makes it, with loopback up.
    pub(crate) fn new(name: String) -> Self {
        ip(&format!("netns add {name}"));
        let netns = Self { name };
        ip(&format!("-n {} link set lo up", netns.name));
        fs::create_dir_all(netns.etc()).expect("/etc/netns can be written");
        netns
    }

    /// Its name, for `ip netns exec`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Files here appear in /etc for what `ip netns exec` runs.
    pub(crate) fn etc(&self) -> String {
        format!("/etc/netns/{}", self.name)
    }

    /// Runs several lines of `ip -n NAME ...` in one process.
    pub fn ip_batch(&self, lines: &[String]) {
        let mut child = Command::new("ip")
            .args(["-n", &self.name, "-batch", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("ip(8) runs");
        let mut stdin = child.stdin.take().expect("piped");
        stdin.write_all(lines.join("\n").as_bytes()).expect("ip(8) reads");
        drop(stdin);
        let output = child.wait_with_output().expect("ip(8) ends");
        assert!(output.status.success(), "ip {lines:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Runs `ip -n NAME ...`.
    pub fn ip(&self, arguments: &str) {
        ip(&format!("-n {} {arguments}", self.name));
    }

    /// Runs `work` on a thread that is in the namespace. Sockets it makes stay there wherever they go.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let file = File::open(format!("/run/netns/{}", self.name)).expect("the namespace is there");
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
                    .expect("root may enter it");
                work()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// A TCP listener in it.
    pub fn listen(&self, address: &str) -> TcpListener {
        self.enter(|| TcpListener::bind(address)).unwrap_or_else(|error| panic!("bind {address}: {error}"))
    }

    /// A UDP socket in it, with a receive limit of five seconds.
    pub fn udp(&self, address: &str) -> UdpSocket {
        let socket =
            self.enter(|| UdpSocket::bind(address)).unwrap_or_else(|error| panic!("bind {address}: {error}"));
        socket.set_read_timeout(Some(Duration::from_secs(5))).expect("a limit can be set");
        socket
    }

    /// Connects from it, with limits of five seconds.
    pub fn connect(&self, address: &str) -> io::Result<TcpStream> {
        let address: SocketAddr = address.parse().expect("an address");
        let stream = self.enter(|| TcpStream::connect_timeout(&address, Duration::from_secs(5)))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.set_write_timeout(Some(Duration::from_secs(10)))?;
        Ok(stream)
    }

    /// Ports with a TCP listener in it, IPv4 and IPv6, as (address in the kernel's hexadecimal, port).
    pub fn listeners(&self) -> Vec<(String, u16)> {
        // /proc/thread-self: the thread that entered, not the test's main thread.
        let tables = self.enter(|| {
            ["tcp", "tcp6"]
                .map(|t| fs::read_to_string(format!("/proc/thread-self/net/{t}")).unwrap_or_default())
        });
        let mut found = Vec::new();
        for line in tables.iter().flat_map(|table| table.lines().skip(1)) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            if let (Some(local), Some(&"0A")) = (fields.get(1), fields.get(3))
                && let Some((address, port)) = local.split_once(':')
            {
                found.push((address.to_owned(), u16::from_str_radix(port, 16).unwrap_or(0)));
            }
        }
        found
    }

    /// Whether something listens on TCP `port`.
    pub fn listens(&self, port: u16) -> bool {
        self.listeners().iter().any(|(_, p)| *p == port)
    }

    /// UDP ports bound in it.
    pub fn udp_ports(&self) -> Vec<u16> {
        let tables = self.enter(|| {
            ["udp", "udp6"]
                .map(|t| fs::read_to_string(format!("/proc/thread-self/net/{t}")).unwrap_or_default())
        });
        tables
            .iter()
            .flat_map(|table| table.lines().skip(1))
            .filter_map(|line| {
                line.split_whitespace().nth(1)?.split_once(':').map(|(_, port)| port.to_owned())
            })
            .filter_map(|port| u16::from_str_radix(&port, 16).ok())
            .collect()
    }

    /// Waits until something listens on TCP `port`.
    pub fn wait_for_port(&self, port: u16) {
        let limit = crate::Client::current().patience(Duration::from_secs(20));
        crate::wait_until(&format!("port {port} in {}", self.name), limit, || self.listens(port));
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).output();
        let _ = fs::remove_dir_all(self.etc());
    }
}

/// Removes what a killed test run left: namespaces whose maker, named by its pid, is gone.
pub(crate) fn sweep() {
    let Ok(entries) = fs::read_dir("/run/netns") else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let maker = name.strip_prefix("ksot-").and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
        if maker.is_some_and(|pid| !fs::exists(format!("/proc/{pid}")).unwrap_or(true)) {
            drop(Netns { name });
        }
    }
}
