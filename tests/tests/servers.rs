//! Real servers inside, published to the host, driven from there; and measuring tools both ways.
#![forbid(unsafe_code)]

use kso_tests::{Resources, World, argv, program, seconds, sh};
use std::io::{Read, Write};

fn nginx_files(world: &World) -> String {
    let directory = world.path("nginx");
    sh(format!("mkdir -p {directory}/www && head -c 100000 /dev/zero | tr '\\0' n > {directory}/www/file && echo small > {directory}/www/small && chmod -R a+rX {directory}"))
        .run()
        .ok();
    world.file(
        "nginx/nginx.conf",
        format!(
            "daemon off; user www-data; worker_processes 2; pid {directory}/pid; error_log stderr notice;\n\
             events {{ worker_connections 1024; multi_accept on; }}\n\
             http {{ access_log off; client_body_temp_path {directory}/a; proxy_temp_path {directory}/b; fastcgi_temp_path {directory}/c;\n\
             uwsgi_temp_path {directory}/d; scgi_temp_path {directory}/e; sendfile on; tcp_nopush on; keepalive_requests 100000;\n\
             resolver 10.77.0.2;\n\
             server {{ listen 80 reuseport; listen [::]:80 reuseport; listen 81 reuseport; root {directory}/www;\n\
               location /peer {{ return 200 \"$remote_addr $server_addr $server_port\\n\"; }}\n\
               location /up/ {{ proxy_pass http://10.77.0.2:80/; }} }} }}\n"
        ),
    )
}

#[test]
fn nginx_published_and_driven_by_wrk() {
    let world = World::new();
    world.http();
    let config = nginx_files(&world);
    let mut nginx = world.start("-p 8080:80 -p 10.77.0.1:8081:81", argv(["nginx", "-c", &config]));
    world.host.wait_for_port(8080);
    world.host.wait_for_port(8081);
    assert!(nginx.running(), "{}", nginx.errors());
    world.native(argv(["curl", "-sS", "http://127.0.0.1:8080/small"])).ok().shows("small");
    world.native(argv(["curl", "-sS", "http://[::1]:8080/small"])).ok().shows("small");
    world.native(sh("curl -sS http://127.0.0.1:8080/file | wc -c")).ok().shows("100000");
    // As a reverse proxy: its own connections go outside.
    world.native(argv(["curl", "-sS", "http://127.0.0.1:8080/up/hello"])).ok().shows("hello from origin");
    // The true address of the peer, and the server's port as it knows it itself.
    let peer = world.native(argv(["curl", "-sS", "http://127.0.0.1:8080/peer"])).ok();
    assert!(
        peer.text().starts_with("127.0.0.1 ") && peer.text().trim().ends_with(" 80"),
        "{}",
        peer.report()
    );
    // From another machine only by the address that was published to it.
    world.at_origin(argv(["curl", "-sS", "http://10.77.0.1:8081/peer"])).run().ok().shows("10.77.0.2");
    world.at_origin(argv(["curl", "-sS", "-m", "3", "http://10.77.0.1:8080/peer"])).run().exits(7);
    let before = Resources::of(nginx.pid());
    let wrk = world.native(argv(["wrk", "-t2", "-c64", "-d3s", "http://127.0.0.1:8080/small"])).ok();
    assert!(!wrk.text().contains("Socket errors") && !wrk.text().contains("Non-2xx"), "{}", wrk.report());
    world
        .native(argv([
            "wrk",
            "-t1",
            "-c32",
            "-d2s",
            "-H",
            "Connection: close",
            "http://127.0.0.1:8080/small",
        ]))
        .ok();
    let after = Resources::settled(nginx.pid(), |after| {
        after.threads <= before.threads + 1 && after.descriptors <= before.descriptors + 4
    });
    assert!(after.threads <= before.threads + 1, "threads grew: {before:?} {after:?}");
    assert!(after.descriptors <= before.descriptors + 4, "descriptors grew: {before:?} {after:?}");
    nginx.terminate();
    assert!(!world.host.listens(8080), "the published port outlived kso");
    world.nothing_left();
}

#[test]
fn redis_server_and_benchmark() {
    let world = World::new();
    let server =
        ["redis-server", "--port", "6379", "--save", "", "--protected-mode", "no", "--bind", "0.0.0.0", "::"];
    let redis = world.start("-p 6380:6379", argv(server).cwd(world.path(".")));
    world.host.wait_for_port(6380);
    world.native(argv(["redis-cli", "-p", "6380", "set", "key", "value"])).ok().shows("OK");
    world.native(argv(["redis-cli", "-h", "::1", "-p", "6380", "get", "key"])).ok().shows("value");
    let benchmark = "redis-benchmark -n 20000 -c 50 -q -t set,get,lpush -p 6380";
    let out = world.native(sh(benchmark)).ok();
    assert!(out.text().contains("GET:") && !out.errors().contains("rror"), "{}", out.report());
    redis.terminate();
    // And the other way: the server outside, the benchmark inside.
    let mut server = world.at_origin(argv(server).cwd(world.path("."))).spawn();
    world.origin.wait_for_port(6379);
    let out = world.kso(
        "",
        sh("redis-benchmark -h origin.test -n 20000 -c 50 -q -t set,get; redis-cli -h 10.77.0.2 dbsize"),
    );
    assert!(out.clone().ok().text().contains("GET:"), "{}", out.report());
    assert!(server.running());
    // Both inside one sandbox: nothing of it goes outside.
    let both = "redis-server --port 7000 --save '' --bind 127.0.0.1 >/dev/null & p=$!; sleep 0.5; \
                redis-benchmark -p 7000 -n 5000 -q -t get; redis-cli -p 7000 ping; kill $p; wait $p";
    world.kso("", sh(both).cwd(world.path("."))).ok().shows("PONG");
    world.nothing_left();
}

#[test]
fn postgresql_server_and_psql() {
    let world = World::new();
    let data = world.path("pg");
    let bin = sh("ls -d /usr/lib/postgresql/*/bin | tail -1").run().ok().text().trim().to_owned();
    let user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"];
    sh(format!("mkdir -p {data} && chown postgres {data}")).run().ok();
    argv([
        format!("{bin}/initdb"),
        "-D".into(),
        data.clone(),
        "-A".into(),
        "trust".into(),
        "--no-sync".into(),
    ])
    .prefixed(user)
    .cwd("/")
    .run()
    .ok();
    let hba = format!("echo 'host all all all trust' >> {data}/pg_hba.conf");
    sh(hba).run().ok();
    let settings = format!(
        "{bin}/postgres -D {data} -c listen_addresses='*' -c port=5432 -c unix_socket_directories={data} -c fsync=off"
    );
    let server = sh(format!("exec {settings}")).prefixed(user).cwd("/");
    let mut postgres = world.start("-p 5433:5432", server.clone());
    postgres.wait_for("ready to accept connections");
    let psql = |host: &str, port: u16, statement: &str| {
        argv([
            "psql",
            "-X",
            "-q",
            "-A",
            "-t",
            "-U",
            "postgres",
            "-h",
            host,
            "-p",
            &port.to_string(),
            "-c",
            statement,
        ])
        .cwd("/")
    };
    world.native(psql("127.0.0.1", 5433, "select 6*7")).ok().shows("42");
    world.native(psql("::1", 5433, "create table t as select generate_series(1,100000) i")).ok();
    world.native(psql("127.0.0.1", 5433, "select sum(i), count(*) from t")).ok().shows("5000050000|100000");
    world.native(psql("127.0.0.1", 5433, "select inet_server_port()")).ok().shows("5432");
    let bench = format!(
        "{bin}/pgbench -h 127.0.0.1 -p 5433 -U postgres -i -q -s 1 postgres && {bin}/pgbench -h 127.0.0.1 -p 5433 -U postgres -C -c 4 -t 20 postgres"
    );
    world.native(sh(bench).cwd("/")).ok().shows("number of failed transactions: 0");
    // PostgreSQL shuts down in good order on SIGINT, which kso hands on.
    postgres.signal(rustix::process::Signal::INT);
    let out = postgres.finish(seconds(30));
    assert!(out.errors().contains("database system is shut down"), "{}", out.report());
    // The server outside, psql inside.
    let mut outside = world.at_origin(server).spawn();
    outside.wait_for("ready to accept connections");
    for host in ["origin.test", "10.77.0.2", "fd77::2"] {
        world.same_ok("", psql(host, 5432, "select count(*), repeat('x', 100000) from t"));
    }
    world.nothing_left();
}

#[test]
fn iperf3_client_tcp_and_udp_both_ways() {
    let world = World::new();
    world.keep(world.at_origin(argv(["iperf3", "-s"])).spawn());
    world.origin.wait_for_port(5201);
    for options in ["-t 1", "-t 1 -R", "-t 1 -P 8", "-t 1 --bidir", "-6 -t 1 -c fd77::2"] {
        let target = if options.contains("-c") { "" } else { "-c 10.77.0.2" };
        world.kso("", sh(format!("iperf3 {target} {options} -J | grep -q sum_received"))).ok();
    }
    for options in ["", "-R", "-l 16000", "-l 60000 -b 100M"] {
        let udp = format!("iperf3 -u -b 50M -t 1 -c 10.77.0.2 {options} -J");
        let out = world.kso("", sh(udp)).ok();
        let lost = out.text().split("\"lost_percent\":").last().and_then(|rest| {
            rest.split(['\n', '}']).next()?.trim().trim_end_matches(',').parse::<f64>().ok()
        });
        assert!(lost.is_some_and(|percent| percent < 20.0), "{lost:?}: {}", out.report());
    }
    world.nothing_left();
}

#[test]
fn iperf3_server_published_tcp_and_udp() {
    let world = World::new();
    let mut server = world.start("-p 5201:5201 -p 5201:5201/udp", argv(["iperf3", "-s", "--forceflush"]));
    world.host.wait_for_port(5201);
    for options in ["-t 1", "-t 1 -R", "-t 1 -P 4"] {
        world.native(sh(format!("iperf3 -c 127.0.0.1 {options}"))).ok();
    }
    for options in ["", "-R"] {
        world.native(sh(format!("iperf3 -u -b 50M -t 1 -c 127.0.0.1 {options}"))).ok();
    }
    assert!(server.running());
    server.terminate();
    world.nothing_left();
}

#[test]
fn python_servers_published() {
    // asyncio, socketserver and http.server, each with its own way to listen.
    let world = World::new();
    let mut server = world.start(
        "-p 8001 -p 8002 -p 8003 -p 8004:8004/udp",
        argv(["/usr/bin/python3", "-u", &program("python_servers.py")]),
    );
    server.wait_for("ready");
    for port in [8001, 8002] {
        let mut stream = world.host.connect(&format!("127.0.0.1:{port}")).expect("published");
        stream.write_all(b"hello\n").expect("a line");
        let mut line = [0; 6];
        stream.read_exact(&mut line).expect("its echo");
        assert_eq!(&line, b"HELLO\n");
    }
    world.native(argv(["curl", "-sS", "http://127.0.0.1:8003/"])).ok();
    let socket = world.host.udp("127.0.0.1:0");
    socket.send_to(b"datagram", "127.0.0.1:8004").expect("send");
    let mut buffer = [0; 100];
    let (n, from) = socket.recv_from(&mut buffer).expect("an answer");
    assert_eq!((&buffer[..n], from.to_string().as_str()), (&b"DATAGRAM"[..], "127.0.0.1:8004"));
    server.terminate();
    world.nothing_left();
}
