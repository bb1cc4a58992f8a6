"""Python's own ways to use the network: python_clients.py CA. Prints what it saw, the same natively and outsourced."""
import asyncio, hashlib, http.client, selectors, socket, socketserver, ssl, sys, threading, urllib.error, urllib.request

context = ssl.create_default_context(cafile=sys.argv[1])


def digest(data):
    return f"{len(data)} {hashlib.sha256(data).hexdigest()[:16]}"


def with_urllib():
    for url in ("http://origin.test/hello", "https://origin.test/hello", "http://[fd77::2]/hello", "https://v6.test/hello",
                "http://origin.test/redirect", "http://fromhosts.test/hello"):
        print(url, urllib.request.urlopen(url, context=context if url.startswith("https") else None).read())
    print(digest(urllib.request.urlopen("http://origin.test/bytes/3000000").read()))
    print(urllib.request.urlopen("http://origin.test/post", data=b"x" * 1_000_000).read().decode().split()[0])
    for url in ("http://nowhere.test/", "http://10.77.0.2:9/", "http://192.0.2.1/", "http://10.78.0.1/"):
        try:
            urllib.request.urlopen(url, timeout=10)
        except urllib.error.URLError as error:
            print(url, type(error.reason).__name__, error.reason)


def with_keep_alive():
    connection = http.client.HTTPSConnection("origin.test", context=context)
    for _ in range(20):
        connection.request("GET", "/bytes/10000")
        digest(connection.getresponse().read())
    print("keep-alive", connection.sock.getpeername()[1], connection.sock.version())


async def with_asyncio():
    async def fetch(n):
        reader, writer = await asyncio.open_connection("origin.test", 443, ssl=context)
        writer.write(b"GET /bytes/%d HTTP/1.1\r\nHost: origin.test\r\nConnection: close\r\n\r\n" % n)
        data = await reader.read()
        writer.close()
        return digest(data.partition(b"\r\n\r\n")[2])

    print("asyncio", await asyncio.gather(*(fetch(n * 10000) for n in range(1, 20))))

    async def echo(reader, writer):
        while line := await reader.readline():
            writer.write(line.upper())
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"inside\n")
    writer.write_eof()
    print("asyncio server", await reader.read())
    writer.close()
    server.close()
    await server.wait_closed()
    try:
        await asyncio.wait_for(asyncio.open_connection("10.77.0.99", 80), 0.5)
    except asyncio.TimeoutError:
        print("asyncio timeout")
    try:
        await asyncio.open_connection("10.77.0.2", 9)
    except OSError as error:
        print("asyncio", error.errno, type(error).__name__)


def with_socketserver():
    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            for line in self.rfile:
                self.wfile.write(line[::-1])

    class Datagrams(socketserver.BaseRequestHandler):
        def handle(self):
            data, sock = self.request
            sock.sendto(data[::-1], self.client_address)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with socket.create_connection(server.server_address) as client:
            client.sendall(b"abc\n")
            client.shutdown(socket.SHUT_WR)
            print("socketserver", client.makefile("rb").read())
        server.shutdown()
    with socketserver.ThreadingUDPServer(("127.0.0.1", 0), Datagrams) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with socket.socket(type=socket.SOCK_DGRAM) as client:
            client.settimeout(5)
            client.sendto(b"abc", server.server_address)
            print("socketserver udp", client.recvfrom(100)[0])
        server.shutdown()


def with_selectors():
    for kind in (selectors.SelectSelector, selectors.PollSelector, selectors.EpollSelector):
        with kind() as selector:
            clients = []
            for _ in range(10):
                client = socket.socket()
                client.setblocking(False)
                # Registered before connect: what the swap must not lose.
                selector.register(client, selectors.EVENT_WRITE | selectors.EVENT_READ)
                client.connect_ex(("10.77.0.2", 7007))
                clients.append(client)
            sent, answers = set(), []
            while len(answers) < 10:
                ready = selector.select(10)
                if not ready:
                    print("nothing became ready")
                    return
                for key, events in ready:
                    if events & selectors.EVENT_WRITE and key.fileobj not in sent:
                        error = key.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                        if error:
                            print("error", error)
                            return
                        sent.add(key.fileobj)
                        key.fileobj.send(b"eping")
                        selector.modify(key.fileobj, selectors.EVENT_READ)
                    elif events & selectors.EVENT_READ and key.fileobj in sent:
                        answers.append(key.fileobj.recv(100))
                        selector.unregister(key.fileobj)
            print(kind.__name__, sorted(set(answers)), len(answers))
            for client in clients:
                client.close()


with_urllib()
with_keep_alive()
asyncio.run(with_asyncio())
with_socketserver()
with_selectors()
