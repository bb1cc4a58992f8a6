//! What developers do: tar, git, make, cargo, dpkg, on trees of some thousand files.

use super::path;
use crate::everything;
use kso_tests::{World, program, seconds, sh};
use std::path::PathBuf;

/// All of it, below the directory where it begins; `$FROM` has what it begins with.
const SCRIPT: &str = r#"
set -e
export GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_SYSTEM=/dev/null GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@a GIT_COMMITTER_NAME=a
export GIT_COMMITTER_EMAIL=a@a GIT_AUTHOR_DATE='1700000000 +0000' GIT_COMMITTER_DATE='1700000000 +0000' HOME=$PWD LC_ALL=C.UTF-8
umask 022

echo "tar"
tar -C $FROM/tree --sort=name -cf all.tar .
sha256sum all.tar
mkdir unpacked && tar -C unpacked -xpf all.tar
diff -r --no-dereference $FROM/tree unpacked && echo the same
tar -C unpacked --sort=name -cf - . | cmp - all.tar && echo the same again

echo "git"
git clone -q --no-hardlinks $FROM/repository clone
cd clone
git fsck --full --strict 2>&1
git status --porcelain
find . -name '*.c' -not -path './.git/*' | sort | head -n 50 | while read -r f; do echo "/* changed */" >> "$f"; done
git mv -k alpha moved; rm -r beta
git add -A && git commit -q -m changes && git rev-parse HEAD 'HEAD^{tree}'
git checkout -q HEAD~1 && git checkout -q - && git -c pack.threads=1 gc -q --prune=now
git fsck --full --strict 2>&1
git status --porcelain
git ls-files -s | sha256sum
cd ..

echo "make"
cp -a $FROM/project project
make -s -C project && project/all && make -s -C project -q && echo up to date
touch project/src/all.h && ! make -s -C project -q && make -s -C project && sha256sum project/all

echo "dpkg"
dpkg-deb --root-owner-group -Zgzip -b project/package package.deb > /dev/null
dpkg-deb -x package.deb extracted
mkdir -p system/var/lib/dpkg/info system/var/lib/dpkg/updates && touch system/var/lib/dpkg/status
dpkg --root=$PWD/system --force-script-chrootless --log=/dev/null -i package.deb > /dev/null
dpkg --root=$PWD/system -V && dpkg --root=$PWD/system -s kso-test | grep Status

rm -rf all.tar clone/.git package.deb system/var/lib/dpkg
"#;

/// The compiler of Rust, which takes its time where it is emulated.
const CARGO: &str = r#"
echo "cargo"
export CARGO_HOME=$PWD/cargo RUSTC=$SYSROOT/bin/rustc CARGO_INCREMENTAL=1
cd project/crate
$SYSROOT/bin/cargo build -q --offline && target/debug/small
echo 'pub fn answer() -> u32 { 42 }' > src/part.rs
$SYSROOT/bin/cargo build -q --offline && target/debug/small
cd ../..
rm -rf cargo project/crate/target
"#;

#[test]
fn trees_repositories_and_builds_are_the_same() {
    let world = World::new();
    let grow = program("grow.py");
    let from = world.path("from");
    let prepare = format!(
        "set -e; /usr/bin/python3 {grow} tree {from}/tree; /usr/bin/python3 {grow} project {from}/project; cd {from}; cp -a tree repository; cd repository\n\
         git -c init.defaultBranch=main init -q; git config gc.auto 0; git add -A\n\
         git -c user.name=a -c user.email=a@a commit -q -m begin"
    );
    world.native(sh(prepare).limit(seconds(120))).ok();
    let sysroot = sh("rustc --print sysroot").run().ok().text().trim().to_owned();
    let work = |place: &str| {
        std::fs::create_dir(path(&world, place)).expect("a directory");
        let more = if everything() { CARGO } else { "" };
        sh(format!("cd {}\n{SCRIPT}{more}", world.path(place)))
            .env("FROM", &from)
            .env("SYSROOT", &sysroot)
            .limit(seconds(300))
    };
    let native = world.native(work("native")).ok();
    let guest = world.guest(&format!("-v {sysroot}:{sysroot}:ro"), work("guest")).run().ok();
    assert_eq!(native.text(), guest.text(), "{}", guest.report());
    let list = |place: &str| -> PathBuf {
        let lines =
            world.native(sh(format!("/usr/bin/python3 {grow} list {}", world.path(place)))).ok().text();
        world.file(&format!("{place}.list"), lines).into()
    };
    let (native, guest) = (list("native"), list("guest"));
    sh(format!("diff {} {}", native.display(), guest.display())).run().ok();
    world.nothing_left();
}
