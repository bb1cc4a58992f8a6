"""The HTTP and HTTPS origin: http_origin.py CERTIFICATE KEY. Ports 80 and 443, IPv4 and IPv6, HTTP/1.1."""
import hashlib, http.server, socket, ssl, sys, threading, time, urllib.parse


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def reply(self, body, status=200, extra=()):
        self.send_response(status)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        for key, value in extra:
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        url = urllib.parse.urlparse(self.path)
        parts = url.path.strip("/").split("/")
        if parts[0] == "hello":
            self.reply(b"hello from origin\n")
        elif parts[0] == "host":
            self.reply(self.headers.get("Host", "").encode() + b"\n")
        elif parts[0] == "peer":
            self.reply(self.client_address[0].removeprefix("::ffff:").encode() + b"\n")
        elif parts[0] == "bytes":
            self.reply(bytes(i * 7 % 251 for i in range(251)) * (int(parts[1]) // 251))
        elif parts[0] == "slow":
            time.sleep(float(parts[1]))
            self.reply(b"slow\n")
        elif parts[0] == "redirect":
            self.reply(b"", 302, [("Location", "/hello")])
        else:
            self.reply(b"no such thing\n", 404)

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.reply(f"{len(body)} {hashlib.sha256(body).hexdigest()}\n".encode())

    def log_message(self, format, *args):
        print(self.client_address[0].removeprefix("::ffff:"), format % args, flush=True)


class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
    request_queue_size = 1024

    def server_bind(self):
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def handle_error(self, request, client_address):
        pass


plain = Server(("::", 80), Handler)
secure = Server(("::", 443), Handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[1], sys.argv[2])
secure.socket = context.wrap_socket(secure.socket, server_side=True, do_handshake_on_connect=False)
threading.Thread(target=secure.serve_forever, daemon=True).start()
print("ready", flush=True)
plain.serve_forever()
