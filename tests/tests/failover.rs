//! A chain of kernels under load: a listener that gVisor serves, then a virtual machine, then the host; each dies, in every
//! way it can, and the server inside a microVM never notices.
//!
//! A few deaths in CI; `KSO_TEST_DEATHS=52` for as many as that, whose figures then go to docs/bench/failover.
#![forbid(unsafe_code)]

use kso_tests::{Death, External, Resources, Running, World, argv, seconds, sh, wait_until};
use std::fmt::Write as _;
use std::io::{Read, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// For what waits for emulated machines on a busy host.
const LIMIT: Duration = seconds(240);
/// From one death to the next in a long run: kernels that die more quickly are put aside.
const PACE: Duration = seconds(6);

/// What dies in its turn, and how: 0 is gVisor, 1 the virtual machine.
const DEATHS: [(usize, Death); 6] = [
    (0, Death::Kill),
    (1, Death::Panic),
    (0, Death::Freeze),
    (1, Death::Freeze),
    (0, Death::Kill),
    (1, Death::Kill),
];

fn nginx(world: &World) -> String {
    let directory = world.path("nginx");
    sh(format!(
        "mkdir -p {directory}/www && echo small > {directory}/www/small && chmod -R a+rX {directory}"
    ))
    .run()
    .ok();
    world.file(
        "nginx/nginx.conf",
        "daemon off; worker_processes 1; pid /tmp/nginx.pid; error_log stderr notice;\n\
         events { worker_connections 512; }\n\
         http { access_log off; client_body_temp_path /tmp/a; proxy_temp_path /tmp/b; fastcgi_temp_path /tmp/c;\n\
         uwsgi_temp_path /tmp/d; scgi_temp_path /tmp/e; keepalive_requests 1000000;\n\
         server { listen 80; location /small { return 200 \"small\\n\"; } } }\n",
    )
}

/// Where the server is reached while a kernel serves it.
struct Place {
    name: &'static str,
    at_host: bool,
    address: SocketAddr,
}

impl Place {
    fn all() -> [Self; 3] {
        let place = |name, at_host, address: &str| Self {
            name,
            at_host,
            address: address.parse().expect("an address"),
        };
        [
            place("gvisor", false, "10.79.0.2:8080"),
            place("deb", false, "10.80.0.2:8080"),
            place("host", true, "127.0.0.1:8080"),
        ]
    }

    /// Whether the server answers here.
    fn answers(&self, world: &World) -> bool {
        let netns = if self.at_host { &world.host } else { &world.origin };
        let connected = netns.enter(|| TcpStream::connect_timeout(&self.address, Duration::from_millis(300)));
        let Ok(mut stream) = connected else { return false };
        let _ = stream.set_read_timeout(Some(seconds(5)));
        let mut text = String::new();
        stream.write_all(b"GET /small HTTP/1.0\r\n\r\n").is_ok()
            && stream.read_to_string(&mut text).is_ok()
            && text.ends_with("small\n")
    }

    fn load(&self, world: &World) -> Running {
        let url = format!("http://{}/small", self.address);
        let wrk = argv(["wrk", "-t1", "-c8", "-d30s", &url]);
        if self.at_host { world.at_host(wrk) } else { world.at_origin(wrk) }.spawn()
    }
}

/// Waits until one of the places answers; which, and when.
#[track_caller]
fn reachable<'a>(world: &World, places: impl Iterator<Item = &'a Place> + Clone) -> (&'a Place, Instant) {
    let until = Instant::now() + LIMIT;
    loop {
        if let Some(place) = places.clone().find(|place| place.answers(world)) {
            return (place, Instant::now());
        }
        assert!(Instant::now() < until, "nobody serves it");
        std::thread::sleep(Duration::from_millis(2));
    }
}

struct Row {
    kernel: &'static str,
    death: Death,
    to: &'static str,
    time: Duration,
}

#[test]
fn a_server_in_a_microvm_outlives_the_kernels_that_serve_it() {
    let world = World::new();
    let Some(gvisor) = External::gvisor(&world) else { return };
    let kernels = [gvisor, External::machine(&world, "")];
    let places = Place::all();
    let config = nginx(&world);
    let flags = format!(
        "--trace -p 8080:80 --external {} --external {} --via tcp-listen:80=gvisor,deb,host",
        kernels[0].flag, kernels[1].flag
    );
    let mut server = world.guest(&flags, argv(["nginx", "-c", &config])).spawn();
    let wanted = std::env::var("KSO_TEST_DEATHS").ok().and_then(|text| text.parse::<usize>().ok());
    let rounds = wanted.unwrap_or(4);
    let (mut place, _) = reachable(&world, places.iter());
    // The first of the route that is up.
    eprintln!("at {}", place.name);
    let settled = |server: &Running| kernels.iter().all(|kernel| kernel.is_up(server));
    wait_until("both kernels are up", LIMIT, || settled(&server));
    let before = Resources::of(server.pid());
    let mut rows = Vec::new();
    for (which, death) in DEATHS.into_iter().cycle().take(rounds) {
        let began = Instant::now();
        let kernel = &kernels[which];
        // Where the turn before left it: on this one, or on the host while both were down.
        if place.name != kernel.name {
            eprintln!("{} does not serve it now: {}", kernel.name, place.name);
        }
        let load = place.load(&world);
        std::thread::sleep(Duration::from_millis(500));
        kernel.die(&server, death);
        let died = Instant::now();
        let (next, there) = reachable(&world, places.iter().filter(|other| other.name != kernel.name));
        drop(load);
        eprintln!("{} of {}: at {} after {:?}", death.name(), kernel.name, next.name, there - died);
        rows.push(Row { kernel: kernel.name, death, to: next.name, time: there - died });
        place = next;
        wait_until("both kernels are up again", LIMIT, || settled(&server));
        assert!(server.running(), "{}", server.errors());
        if wanted.is_some() {
            std::thread::sleep(PACE.saturating_sub(began.elapsed()));
        }
    }
    // What the connections of the load and of dead kernels held is free. Where both ends of the streams that wait at a
    // listener are in this process it has more of them.
    let waiting = if place.name == "gvisor" { 4 } else { 40 };
    let until = Instant::now() + LIMIT;
    let after = loop {
        let after = Resources::of(server.pid());
        if after.descriptors <= before.descriptors + waiting {
            break after;
        }
        assert!(Instant::now() < until, "descriptors are left: before {before:?}, after {after:?}");
        std::thread::sleep(Duration::from_millis(100));
    };
    eprintln!("before {before:?}, after {after:?}");
    assert!(after.threads <= before.threads + 2, "{before:?} {after:?}");
    // The last is the host, which does not die.
    for kernel in &kernels {
        kernel.die(&server, Death::Kill);
    }
    let (last, _) = reachable(&world, places.iter());
    eprintln!("both killed: at {}", last.name);
    wait_until("both kernels are up again", LIMIT, || settled(&server));
    let started = server.errors().matches("start worker process ").count();
    assert_eq!(started, 1, "nginx started again: {}", server.errors());
    server.terminate();
    world.nothing_left();
    if wanted.is_some() {
        record(&rows);
    }
}

/// Writes the figures.
fn record(rows: &[Row]) {
    let directory = format!("{}/../docs/bench", env!("CARGO_MANIFEST_DIR"));
    std::fs::create_dir_all(&directory).expect("a directory");
    let mut csv = String::from("kernel,death,to,ms\n");
    for row in rows {
        let ms = row.time.as_secs_f64() * 1000.0;
        writeln!(csv, "{},{},{},{ms:.1}", row.kernel, row.death.name(), row.to).expect("a string");
    }
    let mut table = format!(
        "# Failover\n\n\
         nginx in a microVM listens on port 80, which gVisor, a Linux in a virtual machine (emulated), or else the host serves,\n\
         under `wrk -c8`. One of the two dies; the time is that from the signal to the first answer on another kernel.\n\
         A frozen kernel counts as dead after `patience_ms=3000`. {} deaths; nginx ran through all of them.\n\n\
         | kernel | death | deaths | median ms | worst ms |\n|---|---|---|---|---|\n",
        rows.len()
    );
    let mut kinds: Vec<(&str, &str)> = rows.iter().map(|row| (row.kernel, row.death.name())).collect();
    kinds.sort_unstable();
    kinds.dedup();
    for (kernel, death) in kinds {
        let of_kind = rows.iter().filter(|row| (row.kernel, row.death.name()) == (kernel, death));
        let mut times: Vec<f64> = of_kind.map(|row| row.time.as_secs_f64() * 1000.0).collect();
        times.sort_unstable_by(f64::total_cmp);
        let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
        let name = if kernel == "deb" { "virtual machine" } else { "gVisor" };
        writeln!(table, "| {name} | {death} | {} | {median:.0} | {worst:.0} |", times.len())
            .expect("a string");
    }
    table.push_str(
        "\n`KSO_TEST_DEATHS=52 cargo test -p kso-tests --test failover` writes this page and failover.csv.\n",
    );
    std::fs::write(format!("{directory}/failover.csv"), csv).expect("a file");
    std::fs::write(format!("{directory}/failover.md"), table).expect("a file");
}
