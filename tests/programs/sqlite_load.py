# sqlite_load.py load PATH JOURNAL: transactions without end on a database, each told of on standard output once it is committed.
# sqlite_load.py check PATH LAST: whether the database is whole, and everything up to LAST is in it.
import hashlib
import random
import sqlite3
import sys

what, path, argument = sys.argv[1:]
ACCOUNTS = 100


def payload(number):
    return random.Random(number).randbytes(random.Random(-number).randrange(3000))


def load(journal):
    database = sqlite3.connect(path, isolation_level=None, timeout=60)
    database.execute(f"pragma journal_mode={journal}")
    database.execute("pragma synchronous=full")
    database.execute("begin immediate")
    database.execute("create table if not exists account(id integer primary key, balance integer)")
    database.execute("create table if not exists entry(id integer primary key, data blob, digest text)")
    database.execute("create index if not exists digests on entry(digest)")
    if not database.execute("select count(*) from account").fetchone()[0]:
        database.executemany("insert into account values(?, 1000)", ((i,) for i in range(ACCOUNTS)))
    database.execute("commit")
    number = database.execute("select coalesce(max(id), 0) from entry").fetchone()[0]
    while True:
        number += 1
        data = payload(number)
        database.execute("begin immediate")
        database.execute("insert into entry values(?, ?, ?)", (number, data, hashlib.sha256(data).hexdigest()))
        for change in (-5, 5):
            account = random.randrange(ACCOUNTS)
            database.execute("update account set balance = balance + ? where id = ?", (change, account))
        if number % 20 == 0:
            # Many pages at once.
            database.execute("update account set balance = balance + 1")
            database.execute("update account set balance = balance - 1")
        database.execute("commit")
        print("committed", journal, number, flush=True)


def check(last):
    database = sqlite3.connect(path)
    assert database.execute("pragma integrity_check").fetchall() == [("ok",)]
    assert database.execute("select sum(balance) from account").fetchone()[0] == ACCOUNTS * 1000
    rows = database.execute("select id, data, digest from entry order by id").fetchall()
    assert [row[0] for row in rows] == list(range(1, len(rows) + 1)), "rows are missing"
    assert len(rows) >= last, f"{last} were committed, {len(rows)} are there"
    for number, data, digest in rows:
        assert data == payload(number) and digest == hashlib.sha256(data).hexdigest(), number
    print("whole:", len(rows))


load(argument) if what == "load" else check(int(argument))
