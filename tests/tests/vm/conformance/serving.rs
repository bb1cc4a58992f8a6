//! Web servers in a guest that send outsourced files by sendfile(2).

use super::path;
use crate::LIMIT;
use kso_tests::{World, argv, program, seconds, sh, wait_until};
use std::fs;

fn bytes(seed: u32, size: usize) -> Vec<u8> {
    let mut state = seed | 1;
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    })
    .take(size)
    .collect()
}

#[test]
fn servers_send_outsourced_files_whole_under_load() {
    let world = World::new();
    let www = path(&world, "www");
    fs::create_dir(&www).expect("a directory");
    for (seed, size) in [0, 1, 4095, 4096, 70_001, 1 << 20, 3_000_001].into_iter().enumerate() {
        fs::write(www.join(format!("f{seed}")), bytes(seed as u32, size)).expect("a file");
    }
    let directory = world.path(".");
    let config = world.file(
        "nginx.conf",
        format!(
            "daemon off; user www-data; worker_processes 1; pid /run/nginx.pid; error_log stderr notice;\n\
             events {{ worker_connections 256; }}\n\
             http {{ access_log off; client_body_temp_path /tmp/a; proxy_temp_path /tmp/b; fastcgi_temp_path /tmp/c;\n\
             uwsgi_temp_path /tmp/d; scgi_temp_path /tmp/e; sendfile on; tcp_nopush on;\n\
             server {{ listen 80; root {directory}/www; }} }}\n"
        ),
    );
    let python = format!("/usr/bin/python3 {} 81 {directory}/www &", program("file_server.py"));
    let script = format!("{python} exec nginx -c {config}");
    let mut guest = world.guest("-p 8080:80 -p 8081:81", sh(script)).spawn();
    wait_until("both servers listen", LIMIT, || {
        assert!(guest.running(), "{}", guest.errors());
        guest.errors().contains("start worker process")
            && world.host.listens(8080)
            && world.host.listens(8081)
    });
    let load = |file: &str| {
        let url = format!("http://127.0.0.1:8080/{file}");
        world.at_host(argv(["wrk", "-t1", "-c8", "-d600s", "--timeout", "60s", &url])).spawn()
    };
    let loads = [load("f3"), load("f4")];
    for (port, ranges) in [(8080, "ranges"), (8081, "whole")] {
        let url = format!("http://127.0.0.1:{port}");
        let fetch = argv(["/usr/bin/python3", &program("fetch_all.py"), &url, &world.path("www"), ranges]);
        world.native(fetch.limit(seconds(240))).ok().shows("all the same");
    }
    // A file that is replaced meanwhile is served as it is then.
    let new = bytes(99, 200_000);
    fs::write(www.join("new"), &new).expect("a file");
    fs::rename(www.join("new"), www.join("f4")).expect("a rename");
    std::thread::sleep(seconds(2));
    let got = world.native(argv(["curl", "-sS", "http://127.0.0.1:8080/f4"])).ok();
    assert!(got.stdout == new, "{} bytes", got.stdout.len());
    for load in loads {
        load.signal(rustix::process::Signal::INT);
        let out = load.finish(seconds(620)).ok();
        assert!(!out.text().contains("Non-2xx") && out.text().contains("requests in"), "{}", out.report());
    }
    assert!(guest.running(), "{}", guest.errors());
    guest.terminate();
    world.nothing_left();
}
