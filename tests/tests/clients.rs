//! Real client programs, unmodified, natively and outsourced.
#![forbid(unsafe_code)]

use kso_tests::{
    EchoServer, UdpEcho, World, argv, c_program, go_program, java_program, program, seconds, sh,
};

#[test]
fn curl_by_name_ipv6_and_tls() {
    let world = World::new();
    world.http();
    let ca = world.ca();
    for url in [
        "http://origin.test/hello",
        "http://10.77.0.2/hello",
        "http://[fd77::2]/hello",
        "http://v6.test/hello",
    ] {
        world.same_ok("", argv(["curl", "-sS", url])).shows("hello from origin");
    }
    for url in ["https://origin.test/hello", "https://[fd77::2]/hello", "https://v6.test/hello"] {
        world.same_ok("", argv(["curl", "-sS", "--cacert", &ca, url])).shows("hello from origin");
    }
    world.same_ok("", sh("curl -sS http://origin.test/bytes/20000000 | sha256sum"));
    world.same_ok(
        "",
        sh("head -c 3000000 /dev/zero | curl -sS -T - -X POST -H 'Expect:' -H 'Transfer-Encoding:' \
                          -H 'Content-Length: 3000000' http://origin.test/post"),
    );
    world.same_ok(
        "",
        sh("curl -sS -Z http://origin.test/hello http://origin.test/hello http://[fd77::2]/hello"),
    );
    // Errors are the kernel's own: curl's exit status tells them apart.
    world.same("", argv(["curl", "-sS", "http://10.77.0.2:9/"])).exits(7);
    world.same("", argv(["curl", "-sS", "http://nowhere.test/"])).exits(6);
    world.same("", argv(["curl", "-sS", "-m", "1", "http://10.77.0.99/"])).exits(28);
    world.same("", argv(["curl", "-sS", "https://origin.test/hello"])).exits(60);
    // The next address is tried when the first is unreachable.
    world.same_ok("", argv(["curl", "-sS", "http://two.test/hello"])).shows("hello");
    world.nothing_left();
}

#[test]
fn wget_by_name_ipv6_and_tls() {
    let world = World::new();
    world.http();
    let ca = world.ca();
    for url in ["http://origin.test/hello", "http://[fd77::2]/hello", "http://origin.test/redirect"] {
        world.same_ok("", argv(["wget", "-q", "-O", "-", url])).shows("hello from origin");
    }
    let tls = format!("--ca-certificate={ca}");
    world.same_ok("", argv(["wget", "-q", &tls, "-O", "-", "https://origin.test/hello"])).shows("hello");
    world.same("", argv(["wget", "-q", "-t", "1", "-O", "-", "http://10.77.0.2:9/"])).exits(4);
    world.nothing_left();
}

#[test]
fn git_clone_and_push_over_http() {
    let world = World::new();
    let root = world.path("git");
    let make = format!(
        "set -e; mkdir -p {root}; git init -q --bare -b main {root}/repo.git; git -C {root}/repo.git config http.receivepack true; \
         git init -q -b main {root}/work; cd {root}/work; git config user.name T; git config user.email t@example.org; \
         head -c 2000000 /dev/urandom > blob; i=0; while [ $i -lt 30 ]; do echo $i > f$i; git add .; git commit -q -m $i; i=$((i+1)); done; \
         git push -q {root}/repo.git main"
    );
    sh(make).run().ok();
    let mut server =
        world.at_origin(argv(["/usr/bin/python3", "-u", &program("git_http.py"), &root, "8000"])).spawn();
    server.wait_for("ready");
    world.keep(server);
    let clone = format!(
        "set -e; rm -rf {root}/copy; git clone -q http://origin.test:8000/repo.git {root}/copy; cd {root}/copy; git log --format=%H; git fsck"
    );
    world.same_ok("", sh(clone).env("HOME", &root));
    let push = format!(
        "set -e; cd {root}/copy; git config user.name T; git config user.email t@example.org; echo new > new; git add new; \
         git commit -q -m new; git push -q origin main; git ls-remote origin main | cut -f1 > a; git rev-parse HEAD > b; cmp a b && echo pushed"
    );
    world.kso("", sh(push).env("HOME", &root)).ok().shows("pushed");
    world.nothing_left();
}

#[test]
fn python_urllib_asyncio_socketserver_selectors() {
    let world = World::new();
    world.http();
    let _echo = world.echo(7007);
    let out = world.same_ok("", argv(["/usr/bin/python3", &program("python_clients.py"), &world.ca()]));
    for line in
        ["EpollSelector [b'ping'] 10", "asyncio timeout", "Network is unreachable", "Connection refused"]
    {
        assert!(out.text().contains(line), "{line}: {}", out.report());
    }
    world.nothing_left();
}

#[test]
fn node_server_and_client() {
    let world = World::new();
    world.http();
    let _echo = world.echo(7007);
    let _udp = UdpEcho::start(&world.origin, "10.77.0.2:7007");
    world
        .same_ok("", argv(["node", &program("node_net.js"), &world.ca()]))
        .shows("half-close got 70000")
        .shows("inside 200");
    world.nothing_left();
}

#[test]
fn static_go_binary() {
    let world = World::new();
    world.http();
    let _echo = world.echo(7007);
    let _udp = UdpEcho::start(&world.origin, "10.77.0.2:7007");
    let go = go_program("gonet");
    world.same_ok("", argv([go.as_str(), &world.ca()])).shows("fifty at once 1255000").shows("inside <nil>");
    // As a published server.
    let mut server = world.start("-p 8080:9090", argv([go.as_str(), "serve", ":9090"]));
    server.wait_for("ready [::]:9090");
    world.native(argv(["curl", "-sS", "http://127.0.0.1:8080/a"])).ok().shows("go saw /a");
    world.native(argv(["curl", "-sS", "http://[::1]:8080/b"])).ok().shows("go saw /b");
    server.terminate();
    world.nothing_left();
}

#[test]
fn docker_client_is_a_static_go_binary() {
    // The docker client against a port where nothing listens, and against an HTTP origin that is no docker.
    if sh("command -v docker").run().code() != Some(0) {
        eprintln!("docker is not installed: the static Go binary of tests/programs stands for it");
        return;
    }
    let world = World::new();
    world.http();
    for host in ["tcp://10.77.0.2:80", "tcp://10.77.0.2:9", "tcp://[fd77::2]:80"] {
        world.same(
            "",
            argv(["docker", "-H", host, "version", "--format", "{{.Client.Version}}"])
                .env("HOME", "/nonexistent"),
        );
    }
    world.nothing_left();
}

#[test]
fn java_nio_selector_registered_before_connect() {
    let world = World::new();
    world.http();
    let _echo = world.echo(7007);
    let classes = java_program("NioClient");
    let java = argv([
        "java",
        "-Xshare:auto",
        "-XX:+UseSerialGC",
        "-cp",
        &classes,
        "NioClient",
        "10.77.0.2",
        "7007",
        "50",
    ]);
    let out = world.same_ok("", java);
    for line in ["connected 50 done 50", "Connection refused", "inside true", "hello from origin"] {
        assert!(out.text().contains(line), "{line}: {}", out.report());
    }
    world.nothing_left();
}

#[test]
fn ssh_to_a_server_outside() {
    let world = World::new();
    let (server, port) = ssh_server_files(&world);
    let mut sshd = world.at_origin(argv(["/usr/sbin/sshd", "-D", "-e", "-f", &server])).spawn();
    world.origin.wait_for_port(port);
    assert!(sshd.running(), "{}", sshd.errors());
    let ssh = ssh_client(&world, "10.77.0.2", port);
    world
        .same_ok("", sh(format!("{ssh} 'echo over ssh; cat; exit 3'; echo $?")).stdin("typed\n"))
        .shows("over ssh\ntyped\n3");
    world.same_ok("", sh(format!("{ssh} 'head -c 5000000 /dev/zero' | sha256sum")));
    // A forwarded port: ssh listens inside the sandbox and connects from the server.
    world.http();
    let forward = format!("{ssh} -f -L 9999:127.0.0.1:80 sleep 2; curl -sS http://127.0.0.1:9999/hello");
    world.same_ok("", sh(forward)).shows("hello from origin");
    drop(sshd);
    world.nothing_left();
}

#[test]
fn sshd_published() {
    let world = World::new();
    let (server, port) = ssh_server_files(&world);
    // A guest's /run is its own.
    let serve = format!("mkdir -p /run/sshd && exec /usr/sbin/sshd -D -e -f {server}");
    let mut sshd = world.start(&format!("-p 2200:{port}"), sh(serve));
    world.host.wait_for_port(2200);
    assert!(sshd.running(), "{}", sshd.errors());
    let ssh = ssh_client(&world, "127.0.0.1", 2200);
    world.native(sh(format!("{ssh} 'echo from inside; exit 4'"))).exits(4).shows("from inside");
    world.native(sh(format!("{ssh} 'head -c 5000000 /dev/zero' | wc -c"))).ok().shows("5000000");
    sshd.terminate();
    world.nothing_left();
}

fn ssh_server_files(world: &World) -> (String, u16) {
    let directory = world.path("ssh");
    sh(format!(
        "set -e; mkdir -p {directory} /run/sshd; chmod 700 {directory}; cd {directory}; ssh-keygen -q -t ed25519 -N '' -f host; \
         ssh-keygen -q -t ed25519 -N '' -f user; cp user.pub authorized"
    ))
    .run()
    .ok();
    let config = format!(
        "Port 2222\nHostKey {directory}/host\nAuthorizedKeysFile {directory}/authorized\nPidFile none\nUsePAM no\nStrictModes no\n\
         PermitRootLogin yes\nPasswordAuthentication no\nUseDNS no\nPrintMotd no\nSubsystem sftp internal-sftp\n"
    );
    (world.file("ssh/config", config), 2222)
}

fn ssh_client(world: &World, address: &str, port: u16) -> String {
    format!(
        "ssh -F none -i {0}/user -p {port} -o StrictHostKeyChecking=no -o UserKnownHostsFile={0}/known -o LogLevel=ERROR \
         -o BatchMode=yes -o ConnectTimeout=10 root@{address}",
        world.path("ssh")
    )
}

#[test]
fn programs_of_the_c_library() {
    // getent and a plain C client: what the resolver and the sockets of glibc do.
    let world = World::new();
    let _echo = EchoServer::start(&world.origin, "10.77.0.2:7007");
    world.same_ok(
        "",
        sh("getent ahosts origin.test | sort; getent hosts fromhosts.test; getent ahostsv4 alias.test"),
    );
    let client = c_program("client");
    world
        .same_ok("", argv([client.as_str(), "10.77.0.2", "7007", "e", "hello"]).limit(seconds(20)))
        .shows("hello");
    world.nothing_left();
}
