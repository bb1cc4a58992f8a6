# fetch_all.py URL DIR: fetches each file of DIR several times at once, whole and in parts, and compares what came.
import os
import random
import sys
import threading
import urllib.request

url, directory, ranges = sys.argv[1], sys.argv[2], sys.argv[3] == "ranges"
names = sorted(os.listdir(directory))
content = {name: open(os.path.join(directory, name), "rb").read() for name in names}
wrong = []


def fetch(number):
    draw = random.Random(number)
    for name in draw.sample(names, len(names)):
        expected = content[name]
        request = urllib.request.Request(f"{url}/{name}")
        if ranges and len(expected) > 2 and draw.random() < 0.5:
            first = draw.randrange(len(expected) - 1)
            last = draw.randrange(first, len(expected))
            request.add_header("Range", f"bytes={first}-{last}")
            expected = expected[first : last + 1]
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                got = reply.read()
            if got != expected:
                wrong.append(f"{name}: {len(got)} bytes of {len(expected)}")
        except OSError as error:
            wrong.append(f"{name}: {error}")


threads = [threading.Thread(target=fetch, args=(number,)) for number in range(6)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("\n".join(wrong) if wrong else "all the same")
sys.exit(bool(wrong))
