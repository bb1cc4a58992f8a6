//! Databases on an outsourced directory whose guest, or whose kso, is killed in the middle: what was committed is there.

use crate::LIMIT;
use crate::killed::qemu_of;
use kso_tests::{Cmd, Running, World, program, seconds, sh, wait_until};
use rustix::process::{Signal, kill_process};

/// Who is killed.
#[derive(Clone, Copy, Debug)]
enum Victim {
    Qemu,
    Kso,
}

/// The highest number that the guest has told of as committed by `who`.
fn committed(text: &str, who: &str) -> u64 {
    let start = format!("committed {who} ");
    // The last line may have been cut.
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole.lines().filter_map(|line| line.strip_prefix(&start)?.parse().ok()).max().unwrap_or(0)
}

/// Waits until each has committed so many more, and kills. What was told.
fn kill(world: &World, mut run: Running, who: &[&str], more: u64, victim: Victim) -> String {
    let mut begun = vec![0; who.len()];
    wait_until("all commit", LIMIT * 3, || {
        assert!(run.running(), "it ended: {}\n{}", run.text(), run.errors());
        let text = run.text();
        let now = who.iter().map(|who| committed(&text, who));
        let mut enough = true;
        for (begun, now) in begun.iter_mut().zip(now) {
            if *begun == 0 {
                *begun = now;
            }
            enough &= *begun > 0 && now >= *begun + more;
        }
        enough
    });
    match victim {
        Victim::Qemu => kill_process(qemu_of(world), Signal::KILL).expect("kill"),
        Victim::Kso => run.signal(Signal::KILL),
    }
    let text = run.finish(LIMIT * 5).text();
    world.nothing_left();
    text
}

#[test]
fn sqlite_survives_kill_nine() {
    let world = World::new();
    let journals = ["delete", "wal", "persist"];
    let load = program("sqlite_load.py");
    let script: String = journals
        .iter()
        .map(|journal| format!("/usr/bin/python3 -u {load} load {} {journal} &\n", world.path(journal)))
        .collect();
    for victim in [Victim::Qemu, Victim::Kso] {
        let run = world.guest("", sh(format!("{script} wait"))).spawn();
        let text = kill(&world, run, &journals, 15, victim);
        for journal in journals {
            let last = committed(&text, journal);
            // Of a copy, so that the next guest finds it as it was left, and recovers by itself.
            let check = format!(
                "cp -a {0} copy; for x in journal wal; do [ -e {0}-$x ] && cp -a {0}-$x copy-$x; done\n\
                 /usr/bin/python3 {load} check copy {last}; status=$?; rm -f copy*; exit $status",
                world.path(journal)
            );
            let checked = world.native(sh(check).cwd(world.path(".")));
            assert!(checked.code() == Some(0), "{victim:?}, {journal}: {}", checked.report());
        }
    }
}

/// As the user that PostgreSQL wants.
fn postgres(words: &str) -> String {
    format!("setpriv --reuid=postgres --regid=postgres --clear-groups {words}")
}

#[test]
fn postgresql_survives_kill_nine() {
    let world = World::new();
    let place = world.path("pg");
    let bin = sh("ls -d /usr/lib/postgresql/*/bin | tail -n1").run().ok().text().trim().to_owned();
    let native = |script: &str| -> Cmd {
        let start = postgres(&format!(
            "{bin}/pg_ctl -D {place}/data -s -w -t 60 -l {place}/log -o \"-k {place} -c listen_addresses=''\" start"
        ));
        let stop = postgres(&format!("{bin}/pg_ctl -D {place}/data -s -w -m fast stop"));
        sh(format!("set -e; {start}; trap '{stop}' EXIT; export PGHOST={place}\n{script}"))
            .cwd(&place)
            .limit(seconds(120))
    };
    let prepare = format!(
        "set -e; mkdir {place}; chown postgres: {place}; cd {place}; {}",
        postgres(&format!("{bin}/initdb -D {place}/data -A trust --locale=C -E UTF8 >/dev/null"))
    );
    world.native(sh(prepare).limit(seconds(120))).ok();
    let setup = format!(
        "{}; {}; {}",
        postgres(&format!("{bin}/createdb bench")),
        postgres(&format!("{bin}/pgbench -q -i -s 1 bench 2>/dev/null")),
        postgres(
            "psql -qAt bench -c 'create table kept(id bigint primary key, filler text)' -c 'create extension amcheck'"
        ),
    );
    world.native(native(&setup)).ok();
    let mut last = 0;
    for victim in [Victim::Qemu, Victim::Kso] {
        let run = world.guest("", sh(load(&bin, &place, last))).spawn();
        let text = kill(&world, run, &["kept"], 30, victim);
        let before = last;
        last = committed(&text, "kept");
        assert!(last > before, "{text}");
    }
    // The guest's own start after the first kill has recovered; after the second it is the host's.
    let psql = postgres("psql -v ON_ERROR_STOP=1 -qAt bench");
    let check = format!(
        "{psql} -c \"select 'kept', count(*), coalesce(min(id), 0), max(id) >= {last}, bool_and(filler = repeat(md5(id::text), 20)) from kept\"\n\
         {psql} -c \"select 'sums', a = b, b = t, t = h, h is not null from (select sum(abalance) a from pgbench_accounts) a, \
         (select sum(bbalance) b from pgbench_branches) b, (select sum(tbalance) t from pgbench_tellers) t, \
         (select sum(delta) h from pgbench_history) h\"\n\
         {psql} -c \"select 'gaps', max(id) - count(*) from kept where id <= {last}\"\n\
         {} && echo checked",
        postgres(&format!("{bin}/pg_amcheck --heapallindexed --parent-check bench")),
    );
    let out = world.native(native(&check)).ok().shows("sums|t|t|t|t").shows("gaps|0").shows("checked");
    assert!(out.text().contains("|1|t|t\n"), "{}", out.report());
    world.nothing_left();
}

/// A server, pgbench's load, and a session that tells of each row when it is committed.
fn load(bin: &str, place: &str, last: u64) -> String {
    let server = postgres(&format!(
        "{bin}/postgres -D {place}/data -k /tmp -c listen_addresses='' -c shared_buffers=16MB -c max_connections=10"
    ));
    format!(
        "{server} > {place}/log.guest 2>&1 &\n\
         export PGHOST=/tmp; until {bin}/pg_isready -q; do sleep 0.2; done\n\
         {} > /dev/null 2>&1 &\n\
         i={last}; while :; do i=$((i+1)); echo \"insert into kept values($i, repeat(md5('$i'), 20)) returning 'committed kept ' || id;\"; done \
         | {}",
        postgres(&format!("{bin}/pgbench -n -c 2 -T 1000 bench")),
        postgres("stdbuf -oL psql -qAt bench"),
    )
}

#[test]
fn what_was_told_is_read() {
    assert_eq!(committed("committed a 1\ncommitted b 7\ncommitted a 12\ncommitted a 13", "a"), 12);
    assert_eq!(committed("", "a"), 0);
}
