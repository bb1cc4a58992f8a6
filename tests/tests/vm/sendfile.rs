//! Files of the host's that a guest sends to sockets outside: the host does it, and all is as if it had not.

use crate::LIMIT;
use kso_tests::{World, argv, c_program, sh, wait_until};
use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// Bytes that a peer of the kind `c` reads before it closes.
const FEW: usize = 300_000;

/// The peers of `programs/sendfile.c`, which says what they do.
struct Peers {
    /// How often `g` was said, and how often it was waited for.
    turns: Mutex<(u64, u64)>,
    said: Condvar,
}

impl Peers {
    fn serve(listener: TcpListener) {
        let peers = Arc::new(Peers { turns: Mutex::default(), said: Condvar::new() });
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                let peers = peers.clone();
                std::thread::spawn(move || peers.one(stream));
            }
        });
    }

    fn one(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let mut how = [0];
        stream.read_exact(&mut how)?;
        match &how {
            b"g" => {
                self.turns.lock().expect("no panic").0 += 1;
                self.said.notify_all();
                return Ok(());
            }
            b"p" => {
                let mut turns = self.turns.lock().expect("no panic");
                turns.1 += 1;
                let mine = turns.1;
                drop(self.said.wait_while(turns, |turns| turns.0 < mine));
            }
            _ => {}
        }
        let mut buffer = vec![0; 65536];
        let (mut bytes, mut hash, mut sum) = (0_u64, 0xcbf2_9ce4_8422_2325_u64, 0_u64);
        loop {
            let got = stream.read(&mut buffer)?;
            for &byte in &buffer[..got] {
                hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
                sum += u64::from(byte);
            }
            bytes += got as u64;
            if got == 0 {
                return stream.write_all(format!("{bytes} {hash} {sum}\n").as_bytes());
            }
            if &how == b"c" && bytes >= FEW as u64 {
                return Ok(());
            }
            if &how == b"s" {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

/// The counters of what the host did for the guest: calls and bytes.
fn counters(world: &World, socket: &str) -> (u64, u64) {
    let scrape = format!("curl -sS --unix-socket {socket} http://localhost/metrics");
    let text = world.native(sh(scrape)).ok().text();
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        line.unwrap_or_else(|| panic!("{name} is not in {text}"))
    };
    (value("kso_sendfile_calls_total "), value("kso_sendfile_bytes_total "))
}

#[test]
fn every_way_to_send_a_file_is_as_it_is_natively() {
    let world = World::new();
    Peers::serve(world.origin.listen("10.77.0.2:9100"));
    let binary = c_program("sendfile");
    let cmd = |name: &str| {
        let directory = world.path(name);
        fs::create_dir(&directory).expect("a directory");
        argv([binary.as_str(), &directory, "9100"]).limit(LIMIT)
    };
    let native = world.native(cmd("native")).ok();
    let socket = world.path("metrics.sock");
    let flags = format!("--metrics unix:{socket}");
    let mut guest = world.guest(&flags, cmd("guest").arg("hold").hold()).spawn();
    wait_until("it is over", LIMIT * 4, || guest.text().contains("over\n") || !guest.running());
    let (calls, bytes) = counters(&world, &socket);
    guest.release();
    let outsourced = guest.finish(LIMIT * 5).ok();
    let report = outsourced.report();
    assert_eq!(outsourced.text(), native.text(), "{}\n=== in a guest: {report}", native.report());
    assert!(!native.text().contains("OTHERS"), "{}", native.report());
    // Of these alone the host did all: simple, interleaved.
    assert!(calls > 40 && bytes > 64 << 20, "{calls} calls, {bytes} bytes: {report}");
    world.nothing_left();
}

#[test]
fn nginx_and_python_serve_files_that_never_pass_the_guest() {
    let world = World::new();
    let www = world.path("www");
    fs::create_dir(&www).expect("a directory");
    let mut sums = String::new();
    for mib in [1, 10, 100_u32] {
        let make = format!(
            "head -c {} /dev/urandom > {www}/{mib} && cd {www} && sha256sum {mib}",
            (mib << 20) + mib
        );
        sums += &sh(make).run().ok().text();
    }
    sh(format!("chmod -R a+rX {www}")).run().ok();
    let directory = world.path("nginx");
    fs::create_dir(&directory).expect("a directory");
    let mut config = format!(
        "daemon off; user root; worker_processes 1; pid {directory}/pid; error_log stderr notice;\n\
         events {{ worker_connections 256; }}\n\
         http {{ access_log off; sendfile on; tcp_nopush on;\n"
    );
    for (what, place) in
        [("client_body", "a"), ("proxy", "b"), ("fastcgi", "c"), ("uwsgi", "d"), ("scgi", "e")]
    {
        let _ = writeln!(config, "{what}_temp_path {directory}/{place};");
    }
    let _ = writeln!(config, "server {{ listen 80; root {www}; }} }}");
    let config = world.file("nginx/nginx.conf", config);
    let serve = "import http.server,shutil,os,sys\n\
        class H(http.server.SimpleHTTPRequestHandler):\n    \
            def copyfile(self,source,out): out.flush(); self.connection.sendfile(source)\n    \
            def log_message(self,*a): pass\n\
        os.chdir(sys.argv[1]); http.server.ThreadingHTTPServer(('0.0.0.0',81),H).serve_forever()\n";
    let serve = world.file("serve.py", serve);
    let socket = world.path("metrics.sock");
    let flags = format!("--metrics unix:{socket} -p 8080:80 -p 8081:81");
    let script = format!("python3 {serve} {www} & exec nginx -c {config}");
    let mut guest = world.guest(&flags, sh(script)).spawn();
    for port in [8080, 8081] {
        wait_until("it serves", LIMIT, || {
            assert!(guest.running(), "{}{}", guest.text(), guest.errors());
            world.host.listens(port)
        });
    }
    let (_, before) = counters(&world, &socket);
    for port in [8080, 8081] {
        // One after the other, and all at once.
        let get =
            |mib: &str| format!("curl -sS http://127.0.0.1:{port}/{mib} | sha256sum | sed 's/-/{mib}/'");
        let all = ["1", "10", "100"].map(&get);
        let out = world.native(sh(all.join("\n")).limit(LIMIT)).ok();
        assert_eq!(out.text(), sums, "{}\n{}", out.report(), guest.errors());
        let many = format!("for i in 1 2 3 4 5 6; do {} & done; wait", get("10"));
        let out = world.native(sh(many).limit(LIMIT)).ok();
        let expected = sums.lines().nth(1).expect("three");
        assert_eq!(out.text().lines().filter(|line| *line == expected).count(), 6, "{}", out.report());
    }
    let (calls, bytes) = counters(&world, &socket);
    // Of 2 x 171 MiB most; what clients were too slow for went through the guest.
    assert!(bytes - before > 170 << 20, "{calls} calls, {bytes} bytes");
    guest.terminate();
    world.nothing_left();
}
