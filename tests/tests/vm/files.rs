//! The guest's files: what it may see and change of the host's, and nothing else.

use kso_tests::{World, argv, sh};
use std::fs;

#[test]
fn the_root_is_the_hosts_and_stays_as_it_is() {
    let world = World::new();
    let script = "cat /etc/debian_version && echo changed > /etc/debian_version && cat /etc/debian_version\n\
        echo x > /usr/bin/kso-test-new && chmod +x /usr/bin/kso-test-new && ls /usr/bin/kso-test-new && rm -r /usr/share/doc";
    let before = fs::read_to_string("/etc/debian_version").expect("Debian");
    world.guest("", sh(script)).run().ok().shows(&before).shows("changed").shows("kso-test-new");
    assert_eq!(fs::read_to_string("/etc/debian_version").expect("Debian"), before);
    assert!(!fs::exists("/usr/bin/kso-test-new").expect("stat"));
    assert!(fs::exists("/usr/share/doc").expect("stat"));
    world.nothing_left();
}

#[test]
fn volumes_are_shared_as_they_are_told() {
    let world = World::new();
    for name in ["rw", "ro"] {
        fs::create_dir(world.path(name)).expect("a directory");
        fs::write(format!("{}/file", world.path(name)), "from the host").expect("a file");
    }
    let flags = format!("-v {}:/srv/rw -v {}:/srv/ro:ro", world.path("rw"), world.path("ro"));
    let script = "cat /srv/rw/file /srv/ro/file; echo; echo from the guest > /srv/rw/new\n\
        mkdir /srv/rw/d && ln -s ../file /srv/rw/d/link && cat /srv/rw/d/link && mv /srv/rw/file /srv/rw/moved\n\
        for c in 'echo x > /srv/ro/file' 'touch /srv/ro/new' 'rm /srv/ro/file' 'mkdir /srv/ro/d' 'chmod 777 /srv/ro/file' 'mv /srv/ro/file /srv/ro/g'\n\
        do sh -c \"$c\" 2>/dev/null && echo \"SUCCEEDED $c\"; done; mount -o remount,rw /srv/ro; echo x > /srv/ro/file; true";
    let out = world.guest(&flags, sh(script)).run().ok().shows("from the hostfrom the host");
    assert!(!out.text().contains("SUCCEEDED"), "{}", out.report());
    assert_eq!(fs::read_to_string(format!("{}/new", world.path("rw"))).expect("made"), "from the guest\n");
    assert!(fs::exists(format!("{}/moved", world.path("rw"))).expect("stat"));
    assert_eq!(fs::read_to_string(format!("{}/file", world.path("ro"))).expect("kept"), "from the host");
    assert_eq!(fs::read_dir(world.path("ro")).expect("kept").count(), 1);
    world.nothing_left();
}

#[test]
fn what_is_changed_on_the_host_is_seen_inside() {
    let world = World::new();
    let path = world.path("shared");
    fs::create_dir(&path).expect("a directory");
    let script = "echo ready; read line; cat /srv/later; rm /srv/later";
    let mut run = world.guest(&format!("-v {path}:/srv"), sh(script).hold()).spawn();
    run.wait_for("ready");
    fs::write(format!("{path}/later"), "written meanwhile").expect("a file");
    run.send("go\n");
    run.finish(crate::LIMIT).ok().shows("written meanwhile");
    assert!(!fs::exists(format!("{path}/later")).expect("stat"));
    world.nothing_left();
}

#[test]
fn nothing_beside_a_volume_is_reached() {
    let world = World::new();
    // The world's own directory is a volume of each guest: what is not to be reached is elsewhere.
    let elsewhere = tempfile::tempdir().expect("a directory");
    let (path, secret) = (elsewhere.path().join("shared"), elsewhere.path().join("secret"));
    let path = path.display();
    fs::create_dir_all(format!("{path}/d")).expect("a directory");
    fs::write(&secret, "outside the share").expect("a file");
    std::os::unix::fs::symlink("../secret", format!("{path}/relative")).expect("a link");
    std::os::unix::fs::symlink(&secret, format!("{path}/absolute")).expect("a link");
    // Another root than the host's, so that every path leads into what is shared.
    let root = world.path("root");
    let busybox = "mkdir -p root/bin root/srv root/usr/bin root/proc root/dev root/sys root/tmp root/etc && \
        for p in dash cat ls mv ln rm; do cp -a /usr/bin/$p root/usr/bin/; done && cp -L /usr/bin/dash root/bin/sh && \
        for l in $(ldd /usr/bin/ls /usr/bin/mv | grep -o '/lib[^ ]*'); do mkdir -p root$(dirname $l) && cp -L $l root$l; done";
    sh(busybox).cwd(world.path(".")).run().ok();
    let script = "cat /srv/relative /srv/absolute /srv/../secret /srv/../../secret /../secret; ln -s ../../secret /srv/d/l; cat /srv/d/l\n\
        i=0; while [ $i -lt 100 ]; do ln -s ../../secret /srv/x; mv /srv/x /srv/d/file; cat /srv/d/file; rm -f /srv/d/file; i=$((i+1)); done\n\
        ls / /srv; true";
    let flags = format!("--root {root} -v {path}:/srv");
    let cmd = argv(["/bin/sh", "-c", script]).env("PATH", "/usr/bin:/bin");
    let out = world.guest(&flags, cmd).run().ok();
    assert!(!out.text().contains("outside the share"), "{}", out.report());
    assert_eq!(fs::read_to_string(secret).expect("kept"), "outside the share");
    world.nothing_left();
}
