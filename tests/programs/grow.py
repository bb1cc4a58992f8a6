# grow.py tree DIR: a tree of some thousand files, links and directories, the same each time.
# grow.py project DIR: a small program in C, and a package of Debian's with some files.
# grow.py list DIR: what is in a tree, one line for each.
import hashlib
import os
import random
import stat
import sys

what, root = sys.argv[1:]
words = "alpha beta gamma delta kernel socket broker runner guest device provider file".split()


def write(path, data, mode=0o644):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)
    os.chmod(path, mode)


def text(draw, lines):
    return "".join(" ".join(draw.choices(words, k=9)) + "\n" for _ in range(lines)).encode()


def tree():
    draw = random.Random(1)
    paths = []
    for number in range(1200):
        directory = "/".join(draw.choices(words, k=draw.randrange(4)))
        name = f"{draw.choice(words)}-{number}{draw.choice(['', '.c', '.rs', ' with blanks', '.é'])}"
        path = os.path.join(root, directory, name)
        if number % 25 == 0 and paths:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            target = draw.choice(paths)
            os.symlink(os.path.relpath(target, os.path.dirname(path)), path)
            continue
        size = draw.choice([0, 1, 20, 20, 50, 100, 400])
        data = draw.randbytes(size * 50) if number % 10 == 0 else text(draw, size)
        write(path, data, draw.choice([0o644, 0o644, 0o755, 0o600]))
        if number % 40 == 1:
            os.link(path, path + ".link")
        paths.append(path)


def project():
    names = words[:6]
    for name in names:
        write(f"{root}/src/{name}.c", f'#include <stdio.h>\n#include "all.h"\nvoid {name}(void) {{ puts("{name}"); }}\n'.encode())
    write(f"{root}/src/all.h", "".join(f"void {name}(void);\n" for name in names).encode())
    calls = " ".join(f"{name}();" for name in names)
    write(f"{root}/src/main.c", f'#include "all.h"\nint main(void) {{ {calls} return 0; }}\n'.encode())
    objects = " ".join(f"src/{name}.o" for name in [*names, "main"])
    write(f"{root}/Makefile", f"all: {objects}\n\tcc -o all {objects}\n%.o: %.c src/all.h\n\tcc -O1 -c -o $@ $<\n".encode())
    draw = random.Random(2)
    for number in range(60):
        write(f"{root}/package/usr/share/kso-test/{draw.choice(words)}/{number}", text(draw, 40))
    control = "Package: kso-test\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: files\n"
    write(f"{root}/package/DEBIAN/control", control.encode())
    write(f"{root}/crate/Cargo.toml", b'[package]\nname = "small"\nversion = "0.1.0"\nedition = "2021"\n')
    write(f"{root}/crate/src/main.rs", b'mod part;\nfn main() { println!("{}", part::answer()); }\n')
    write(f"{root}/crate/src/part.rs", b"pub fn answer() -> u32 { (1..=6).product::<u32>() }\n")


def lines():
    for directory, directories, files in os.walk(root):
        directories.sort()
        for name in sorted(directories + files):
            path = os.path.join(directory, name)
            found = os.lstat(path)
            line = f"{os.path.relpath(path, root)!r} {found.st_mode:o} {found.st_uid}:{found.st_gid}"
            if stat.S_ISLNK(found.st_mode):
                line += f" -> {os.readlink(path)!r}"
            elif stat.S_ISREG(found.st_mode):
                with open(path, "rb") as file:
                    line += f" {found.st_nlink} {found.st_size} {hashlib.sha256(file.read()).hexdigest()[:16]}"
            print(line)


{"tree": tree, "project": project, "list": lines}[what]()
