# locker.py FILE: takes and drops locks of FILE as it is told on standard input, line by line: "NUMBER COMMAND...".
# Each is answered by "NUMBER: RESULT".
#   posix|ofd|flock r|w|u START LENGTH      without waiting (LENGTH 0: to the end; flock knows no ranges)
#   wait KIND r|w START LENGTH              answered when the lock was got
#   interrupted KIND r|w START LENGTH       waits until a signal comes
#   get KIND r|w START LENGTH               the lock that is in the way: "r|w START LENGTH PID", or "free"
#   child KIND r|w START LENGTH, kill       a child that takes a lock and keeps it: "ok PID"
#   reopen                                  closes FILE and opens it again
#   pass                                    nothing
import errno
import fcntl
import os
import signal
import struct
import sys
import threading

F_OFD_GETLK, F_OFD_SETLK, F_OFD_SETLKW = 36, 37, 38
TYPES = {"r": fcntl.F_RDLCK, "w": fcntl.F_WRLCK, "u": fcntl.F_UNLCK}
LAYOUT = "hhqqi4x"
path = sys.argv[1]
file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
child = None
out = threading.Lock()


class Interrupted(Exception):
    pass


def answer(number, text):
    with out:
        print(f"{number}: {text}", flush=True)


def lock(fd, kind, how, start, length, wait=False):
    if kind == "flock":
        operation = {"r": fcntl.LOCK_SH, "w": fcntl.LOCK_EX, "u": fcntl.LOCK_UN}[how]
        fcntl.flock(fd, operation | (0 if wait else fcntl.LOCK_NB))
        return
    set_, set_wait = (F_OFD_SETLK, F_OFD_SETLKW) if kind == "ofd" else (fcntl.F_SETLK, fcntl.F_SETLKW)
    wanted = struct.pack(LAYOUT, TYPES[how], os.SEEK_SET, int(start), int(length), 0)
    fcntl.fcntl(fd, set_wait if wait else set_, wanted)


def attempt(*words, **more):
    try:
        lock(file, *words, **more)
        return "ok"
    except Interrupted:
        return "EINTR"
    except OSError as error:
        return errno.errorcode[error.errno]


def get(kind, how, start, length):
    wanted = struct.pack(LAYOUT, TYPES[how], os.SEEK_SET, int(start), int(length), 0)
    found = fcntl.fcntl(file, F_OFD_GETLK if kind == "ofd" else fcntl.F_GETLK, wanted)
    how, _, start, length, pid = struct.unpack(LAYOUT, found)
    if how == fcntl.F_UNLCK:
        return "free"
    return f"{'r' if how == fcntl.F_RDLCK else 'w'} {start} {length} {pid}"


def ring(*_):
    raise Interrupted


def interrupted(*words):
    signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1)
        return attempt(*words, wait=True)
    except Interrupted:
        return "EINTR"


def spawn(*words):
    global child
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        # A file of its own: locks of an open file description would be its parent's too.
        own = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            lock(own, *words)
            os.write(tell, b"ok")
        except OSError as error:
            os.write(tell, errno.errorcode[error.errno].encode())
        while True:
            signal.pause()
    os.close(tell)
    result = os.read(ready, 20).decode()
    os.close(ready)
    return f"{result} {child}"


for line in sys.stdin:
    number, command, *words = line.split()
    if command == "wait":
        # The thread's lock is the process's; who reads on has begun to wait.
        started = threading.Event()

        def later(number=number, words=words, started=started):
            started.set()
            answer(number, attempt(*words, wait=True))

        threading.Thread(target=later, daemon=True).start()
        started.wait()
    elif command == "interrupted":
        answer(number, interrupted(*words))
    elif command == "get":
        answer(number, get(*words))
    elif command == "child":
        answer(number, spawn(*words))
    elif command == "kill":
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        answer(number, "ok")
    elif command == "reopen":
        os.close(file)
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        answer(number, "ok")
    elif command == "pass":
        answer(number, "ok")
    else:
        answer(number, attempt(command, *words))
