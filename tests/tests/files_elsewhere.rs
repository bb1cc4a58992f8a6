//! Files of other kernels: `-v KERNEL:PATH:WHERE` of a sandbox and of a guest, performed by a provider on this kernel and by
//! gVisor; and what a program with open files notices when such a kernel dies. Directories of this host too.
#![forbid(unsafe_code)]

use kso_tests::{Client, Cmd, Output, Running, World, argv, has_gvisor, kso_binary, seconds, sh, wait_until};
use rustix::process::Signal;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};

/// Tells everything of a tree that can be told of it.
const TELL: &str = "find . -printf '%P|%y|%m|%s|%U:%G|%n|%l|%T@\\n' | sort; \
    find . -type f -print0 | sort -z | xargs -0 sha256sum";

/// A tree with a little of everything.
fn tree(world: &World, name: &str) -> String {
    let root = world.path(name);
    let path = |name: &str| format!("{root}/{name}");
    for directory in ["", "empty", "deep/er/and/deeper", "many"] {
        fs::create_dir_all(path(directory)).expect("a directory");
    }
    let big: Vec<u8> =
        (0..3_000_000_u32).flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    fs::write(path("big"), &big).expect("a file");
    for (name, bytes) in [("none", 0), ("page", 4096), ("odd", 4097), ("deep/er/and/deeper/file", 100_001)] {
        fs::write(path(name), &big[..bytes]).expect("a file");
    }
    for number in 0..300 {
        fs::write(path(&format!("many/file {number} \u{e4}\u{f6}")), format!("{number}")).expect("a file");
    }
    symlink("deep/er", path("link")).expect("a link");
    symlink("/nowhere/at all", path("dangling")).expect("a link");
    fs::hard_link(path("page"), path("second name")).expect("a link");
    fs::set_permissions(path("odd"), fs::Permissions::from_mode(0o4751)).expect("chmod");
    fs::set_permissions(path("empty"), fs::Permissions::from_mode(0o1777)).expect("chmod");
    chown(path("none"), Some(1000), Some(1001)).expect("chown");
    root
}

/// A place of the sandbox to mount on.
fn place(world: &World, name: &str) -> String {
    let path = world.path(name);
    fs::create_dir_all(&path).expect("a directory");
    path
}

/// A provider on this kernel that shares directories.
fn provider(world: &World, name: &str, shares: &[&str]) -> (Running, String) {
    let path = world.path(&format!("{name}.sock"));
    let mut words = vec![kso_binary(), "provide".to_owned(), "--listen".to_owned(), format!("unix:{path}")];
    words.extend(shares.iter().flat_map(|share| ["--share".to_owned(), (*share).to_owned()]));
    let running = world.at_host(argv(words)).spawn();
    wait_until("the provider", seconds(30), || std::os::unix::net::UnixStream::connect(&path).is_ok());
    (running, format!("--external {name}=provider,path={path}"))
}

fn in_sandbox(world: &World, flags: &str, cmd: Cmd) -> Cmd {
    world.outsourced_on(&Client::Sandbox, flags, cmd)
}

/// A program that holds a file open and does with it what each line of its standard input says.
fn holder(path: &str) -> Cmd {
    let script = format!(
        "import os, sys\n\
         f = os.open('{path}', os.O_RDWR)\n\
         print('open', flush=True)\n\
         for line in sys.stdin:\n    \
             word, *rest = line.split()\n    \
             try:\n        \
                 if word == 'read': print('read', os.pread(f, 100, 0).decode(), flush=True)\n        \
                 if word == 'write': print('wrote', os.pwrite(f, rest[0].encode(), 0), flush=True)\n        \
                 if word == 'list': print('listed', sorted(os.listdir(os.path.dirname('{path}'))), flush=True)\n    \
             except OSError as e: print('error', e.strerror, flush=True)\n"
    );
    argv(["python3", "-c", &script]).hold().limit(seconds(120))
}

#[track_caller]
fn same_tree(world: &World, root: &str, cmd: impl Fn(Cmd) -> Cmd, target: &str) {
    let native = world.native(sh(TELL).cwd(root)).ok();
    let tell = sh(format!("cd {target} && {TELL}")).limit(seconds(90));
    let elsewhere = cmd(tell).run().ok();
    let (native, elsewhere) = (native.text(), elsewhere.text());
    for (one, other) in native.lines().zip(elsewhere.lines()) {
        assert_eq!(one, other);
    }
    assert_eq!(native, elsewhere);
}

/// What a program changes there is changed here.
const CHANGE: &str = "set -e; cd $1\n\
    echo new > new; echo more >> new; mkdir -p a/b; mv new a/b/moved; ln -s moved a/b/link; ln a/b/moved a/hard\n\
    chmod 640 a/hard; truncate -s 70000 a/b/sparse; dd if=/dev/zero of=a/zeros bs=128k count=9 conv=fsync 2>/dev/null\n\
    cp a/zeros a/copy; rm a/zeros; rmdir empty; touch -d @1000000000 a/copy\n\
    exec 3> a/gone; rm a/gone; echo kept >&3; exec 3>&-; sync a/copy\n\
    cat a/b/link; stat -c '%n %s %a %h %Y' a/b/moved a/b/sparse a/copy; ls a a/b";

#[track_caller]
fn changed(world: &World, root: &str, out: &Output) {
    assert_eq!(fs::read_to_string(format!("{root}/a/hard")).expect("made"), "new\nmore\n");
    assert_eq!(fs::metadata(format!("{root}/a/copy")).expect("made").len(), 9 * 128 * 1024);
    assert!(!fs::exists(format!("{root}/empty")).expect("stat"));
    // The same there and here.
    let look = "cd $1; cat a/b/link; stat -c '%n %s %a %h %Y' a/b/moved a/b/sparse a/copy; ls a a/b";
    let native = world.native(argv(["sh", "-c", look, "sh", root])).ok();
    assert_eq!(native.text(), out.text(), "{}", out.report());
}

#[test]
fn a_sandbox_sees_and_changes_a_directory_of_a_provider() {
    let world = World::new();
    let root = tree(&world, "tree");
    let mount = place(&world, "mount");
    let (_provider, kernel) = provider(&world, "box", &[&root]);
    let flags = format!("{kernel} -v box:{root}:{mount}");
    same_tree(&world, &root, |cmd| in_sandbox(&world, &flags, cmd), &mount);
    // A part of what is shared.
    let part = format!("{kernel} -v box:{root}/deep/er:{mount}");
    same_tree(&world, &format!("{root}/deep/er"), |cmd| in_sandbox(&world, &part, cmd), &mount);
    let out = in_sandbox(&world, &flags, argv(["sh", "-c", CHANGE, "sh", &mount])).run().ok();
    changed(&world, &root, &out);
    assert_eq!(fs::read_dir(&mount).expect("the place").count(), 0, "nothing is written below the mount");
    drop(_provider);
    world.nothing_left();
}

#[test]
fn a_guest_sees_and_changes_a_directory_of_a_provider() {
    let world = World::new();
    let root = tree(&world, "tree");
    let (_provider, kernel) = provider(&world, "box", &[&root]);
    let flags = format!("{kernel} -v box:{root}:/data/tree");
    same_tree(&world, &root, |cmd| world.guest(&flags, cmd), "/data/tree");
    let out = world.guest(&flags, argv(["sh", "-c", CHANGE, "sh", "/data/tree"])).run().ok();
    changed(&world, &root, &out);
    drop(_provider);
    world.nothing_left();
}

#[test]
fn gvisor_performs_the_files_of_a_sandbox() {
    if !has_gvisor() {
        return;
    }
    let world = World::new();
    let root = tree(&world, "tree");
    let mount = place(&world, "mount");
    let flags = format!("--external box=gvisor,share={root} -v box:{root}:{mount}");
    same_tree(&world, &root, |cmd| in_sandbox(&world, &flags, cmd), &mount);
    let out = in_sandbox(&world, &flags, argv(["sh", "-c", CHANGE, "sh", &mount])).run().ok();
    changed(&world, &root, &out);
    // It acts for the caller.
    let made = format!(
        "cd {mount} && mkdir -m 777 open && setpriv --reuid 1000 --regid 1001 --clear-groups touch open/own && stat -c %u:%g open/own"
    );
    in_sandbox(&world, &flags, sh(made)).run().ok().shows("1000:1001");
    let made = fs::metadata(format!("{root}/open/own")).expect("made");
    assert_eq!((made.uid(), made.gid()), (1000, 1001));
    let refused = format!("--external box=gvisor,share={root}:ro -v box:{root}:{mount}");
    let out = in_sandbox(&world, &refused, sh(format!("echo x > {mount}/page"))).run();
    assert!(out.errors().contains("Read-only file system"), "{}", out.report());
    world.nothing_left();
}

#[test]
fn an_image_is_read_without_a_kernels_file_system_code() {
    if sh("command -v mke2fs").run().code() != Some(0) {
        eprintln!("mke2fs is not installed: NOT TESTED (apt-get install e2fsprogs)");
        return;
    }
    let world = World::new();
    let root = tree(&world, "outer/data");
    let mount = place(&world, "mount");
    let (outer, image) = (world.path("outer"), world.path("disk.ext4"));
    world.native(argv(["mke2fs", "-q", "-t", "ext4", "-d", &outer, &image, "64m"])).ok();
    let flags = format!("--external disk=image,path={image} -v disk:/data:{mount}");
    // Links and sizes of directories are the image's own, and it has whole seconds.
    let tell = "find . -printf '%P|%y|%m|%U:%G|%l|%Ts\n' | sort; find . -type f -print0 | sort -z | xargs -0 sha256sum";
    let native = world.native(sh(tell).cwd(&root)).ok();
    let inside =
        in_sandbox(&world, &flags, sh(format!("cd {mount} && {tell}")).limit(seconds(90))).run().ok();
    for (one, other) in native.text().lines().zip(inside.text().lines()) {
        assert_eq!(one, other);
    }
    assert_eq!(native.text(), inside.text());
    let script = format!(
        "cd {mount}; for c in 'echo x > page' 'touch new' 'rm page' 'mkdir d'; do sh -c \"$c\" && echo SUCCEEDED; done; \
         tail -c 5 big | od -c; dd if=big bs=1 skip=5000000 count=4 2>/dev/null | od -c"
    );
    let out = in_sandbox(&world, &flags, sh(script)).run().ok();
    assert!(!out.text().contains("SUCCEEDED"), "{}", out.report());
    assert_eq!(out.errors().matches("Read-only file system").count(), 4, "{}", out.report());
    // A part of it in a guest, and what cannot be had.
    let guest = format!("--external disk=image,path={image} -v disk:/data/deep:/srv/deep:ro");
    world.guest(&guest, sh("wc -c < /srv/deep/er/and/deeper/file")).run().ok().shows("100001");
    for (kernel, path, why) in [
        (format!("disk=image,path={image}"), "/data/nothing", "no such directory"),
        (format!("disk=image,path={image}"), "/data/link", "no directory"),
        (format!("disk=image,path={}", world.path("missing")), "/", "No such file"),
        (format!("disk=image,path={}", world.file("noimage", "text")), "/", "no ext4 file system"),
    ] {
        let out =
            in_sandbox(&world, &format!("--external {kernel} -v disk:{path}:{mount}"), sh("true")).run();
        assert!(out.code() == Some(125) && out.errors().contains(why), "{why}: {}", out.report());
    }
    world.nothing_left();
}

#[test]
fn an_open_file_outlives_its_provider() {
    let world = World::new();
    let (root, mount) = (place(&world, "tree"), place(&world, "mount"));
    fs::write(format!("{root}/file"), "before").expect("a file");
    let (provider_one, kernel) = provider(&world, "box", &[&root]);
    let flags = format!("{kernel} -v box:{root}:{mount}:cache=none");
    let mut running = in_sandbox(&world, &flags, holder(&format!("{mount}/file"))).spawn();
    running.wait_for("open");
    running.send("read\n");
    running.wait_for("read before");
    provider_one.signal(Signal::KILL);
    // It asks while nobody is there, and has its answer from the next one.
    running.send("read\n");
    let (_provider_two, _) = provider(&world, "box", &[&root]);
    running.send("write AFTER\n");
    running.wait_for("wrote 5");
    assert_eq!(fs::read_to_string(format!("{root}/file")).expect("kept"), "AFTERe");
    running.send("list\n");
    running.wait_for("listed ['file']");
    let out = running.finish(seconds(60)).ok();
    assert_eq!(out.text().matches("read before").count(), 2, "{}", out.report());
    drop((provider_one, _provider_two));
    world.nothing_left();
}

#[test]
fn an_open_file_moves_to_the_next_kernel() {
    let world = World::new();
    let (root, mount) = (place(&world, "tree"), place(&world, "mount"));
    fs::write(format!("{root}/file"), "before").expect("a file");
    let (first, one) = provider(&world, "one", &[&root]);
    let (_second, two) = provider(&world, "two", &[&root]);
    let flags = format!("{one} {two} -v one,two:{root}:{mount}:cache=none");
    let mut running = in_sandbox(&world, &flags, holder(&format!("{mount}/file"))).spawn();
    running.wait_for("open");
    first.signal(Signal::KILL);
    running.send("write AFTER\n");
    running.wait_for("wrote 5");
    running.send("read\n");
    running.wait_for("read AFTERe");
    // The host's own kernel can be the last resort.
    let (third, three) = provider(&world, "three", &[&root]);
    let flags = format!("{three} -v three,host:{root}:{mount}:cache=none");
    let mut other = in_sandbox(&world, &flags, holder(&format!("{mount}/file"))).spawn();
    other.wait_for("open");
    third.signal(Signal::KILL);
    other.send("write again\n");
    other.wait_for("wrote 5");
    other.finish(seconds(60)).ok();
    running.send("read\n");
    running.wait_for("read againe");
    running.finish(seconds(60)).ok();
    drop((first, _second, third));
    world.nothing_left();
}

#[test]
fn a_program_goes_on_when_gvisor_dies() {
    if !has_gvisor() {
        return;
    }
    let world = World::new();
    let (root, mount) = (place(&world, "tree"), place(&world, "mount"));
    fs::write(format!("{root}/file"), "before").expect("a file");
    let flags = format!("--external box=gvisor,share={root} -v box,host:{root}:{mount}:cache=none");
    let list = format!("while read line; do cat {mount}/file; echo; echo done $line; done");
    let mut running = in_sandbox(&world, &flags, sh(list).hold().limit(seconds(120))).spawn();
    running.send("1\n");
    running.wait_for("done 1");
    let sandbox = sh(format!("pgrep -f 'runsc-sandbox.*kso-{}-'", running.pid())).run().ok();
    let pid = sandbox.text().split_whitespace().next().and_then(|pid| pid.parse().ok());
    let pid = rustix::process::Pid::from_raw(pid.expect("gVisor runs")).expect("a process");
    rustix::process::kill_process(pid, Signal::KILL).expect("it is ours");
    running.send("2\n");
    running.wait_for("done 2");
    let out = running.finish(seconds(60)).ok();
    assert_eq!(out.text().matches("before").count(), 2, "{}", out.report());
    world.nothing_left();
}

#[test]
fn a_file_that_is_gone_meanwhile_is_stale() {
    let world = World::new();
    let (root, mount) = (place(&world, "tree"), place(&world, "mount"));
    fs::write(format!("{root}/file"), "before").expect("a file");
    let (first, one) = provider(&world, "one", &[&root]);
    let (_second, two) = provider(&world, "two", &[&root]);
    let flags = format!("{one} {two} -v one,two:{root}:{mount}:cache=none");
    let mut running = in_sandbox(&world, &flags, holder(&format!("{mount}/file"))).spawn();
    running.wait_for("open");
    // Another file of that name: it is not the one that was opened.
    fs::write(format!("{root}/other"), "another").expect("a file");
    first.signal(Signal::KILL);
    fs::rename(format!("{root}/other"), format!("{root}/file")).expect("rename");
    running.send("read\n");
    running.wait_for("error Stale file handle");
    running.send("list\n");
    running.wait_for("listed ['file']");
    running.finish(seconds(60)).ok();
    drop((first, _second));
    world.nothing_left();
}

#[test]
fn what_is_read_only_is_not_written() {
    let world = World::new();
    let (root, mount) = (tree(&world, "tree"), place(&world, "mount"));
    let read_only = format!("{root}:ro");
    let (_one, one) = provider(&world, "one", &[&read_only]);
    let (_two, two) = provider(&world, "two", &[&root]);
    let script = format!(
        "cd {mount}; for c in 'echo x > page' 'touch new' 'rm page' 'mkdir d' 'chmod 777 page' 'mv page other' 'ln page hard'\n\
         do sh -c \"$c\" 2>&1 && echo \"SUCCEEDED $c\"; done; cat many/*7* | wc -c"
    );
    for flags in [format!("{one} -v one:{root}:{mount}"), format!("{two} -v two:{root}:{mount}:ro")] {
        let out = in_sandbox(&world, &flags, sh(&script)).run().ok();
        assert!(!out.text().contains("SUCCEEDED"), "{}", out.report());
        assert_eq!(out.text().matches("Read-only file system").count(), 7, "{}", out.report());
    }
    drop((_one, _two));
    world.nothing_left();
}

#[test]
fn what_cannot_be_had_is_told_before_the_program_starts() {
    let world = World::new();
    let (root, mount) = (place(&world, "tree"), place(&world, "mount"));
    fs::write(format!("{root}/file"), "").expect("a file");
    symlink("/etc", format!("{root}/out")).expect("a link");
    let (_one, one) = provider(&world, "one", &[&root]);
    let (_none, none) = provider(&world, "none", &[]);
    let missing = world.path("missing");
    for (flags, why) in [
        (format!("{one} -v one:/etc:{mount}"), "not in a directory that it shares"),
        (format!("{one} -v one:{root}/out:{mount}"), "not in a directory that it shares"),
        (format!("{one} -v one:{root}/nothing:{mount}"), "there is no such directory there"),
        (format!("{one} -v one:{root}/file:{mount}"), "it is no directory there"),
        (format!("{none} -v none:{root}:{mount}"), "--share DIR"),
        (format!("-v other:{root}:{mount}"), "--external other=MAKE"),
        (format!("--external gone=provider,path={missing} -v gone:{root}:{mount}"), "kso provide --listen"),
        (format!("{one} -v one:{root}:{missing}"), "mkdir -p"),
        (format!("{one} -v one:{root}:{mount}:fast"), "no option"),
        (format!("-v {root}"), "the form is"),
        (format!("-v {missing}:{mount}"), "No such file or directory"),
        (format!("--broker {missing} -v one:{root}:{mount}"), "leave out --broker"),
    ] {
        let out = in_sandbox(&world, &flags, sh("echo STARTED")).run().exits(125);
        assert!(out.errors().contains(why) && !out.text().contains("STARTED"), "{why}: {}", out.report());
    }
    // A second kernel takes the place of one that does not start.
    let flags = format!("--external gone=provider,path={missing} {one} -v gone,one:{root}:{mount}");
    in_sandbox(&world, &flags, sh(format!("ls {mount}"))).run().ok().shows("file");
    drop((_one, _none));
    world.nothing_left();
}

#[test]
fn a_sandbox_sees_directories_of_this_host_elsewhere() {
    let world = World::new();
    let (root, mount) = (tree(&world, "tree"), place(&world, "mount"));
    same_tree(&world, &root, |cmd| in_sandbox(&world, &format!("-v {root}:{mount}"), cmd), &mount);
    let flags = format!("-v {root}:{mount} -v {root}/deep:{mount}/empty:ro");
    let script = format!(
        "cd {mount}; echo x > written; cat empty/er/and/deeper/file | wc -c; touch empty/x && echo SUCCEEDED; \
         stat -f -c %T . | grep -v fuse"
    );
    let out = in_sandbox(&world, &flags, sh(script)).run().ok().shows("100001");
    assert!(!out.text().contains("SUCCEEDED") && out.errors().contains("Read-only"), "{}", out.report());
    assert_eq!(fs::read_to_string(format!("{root}/written")).expect("native"), "x\n");
    // A source means what it means outside.
    let flags = format!("-v {root}/deep:{root}/empty -v {root}/empty:{mount}");
    in_sandbox(&world, &flags, sh(format!("ls -A {mount} {root}/empty"))).run().ok().shows("er");
    let listed = in_sandbox(&world, &flags, sh(format!("ls -A {mount}"))).run().ok();
    assert_eq!(listed.text(), "", "{}", listed.report());
    world.nothing_left();
}
