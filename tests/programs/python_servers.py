"""Servers on 8001 (asyncio), 8002 (socketserver), 8003 (http.server), 8004 (UDP): each answers in capitals."""
import asyncio, http.server, socketserver, threading


class Stream(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(line.upper())


class Datagram(socketserver.BaseRequestHandler):
    def handle(self):
        self.request[1].sendto(self.request[0].upper(), self.client_address)


socketserver.ThreadingTCPServer.allow_reuse_address = True
servers = [socketserver.ThreadingTCPServer(("", 8002), Stream), http.server.ThreadingHTTPServer(("", 8003), http.server.SimpleHTTPRequestHandler),
           socketserver.ThreadingUDPServer(("", 8004), Datagram)]
for server in servers:
    threading.Thread(target=server.serve_forever, daemon=True).start()


async def echo(reader, writer):
    while line := await reader.readline():
        writer.write(line.upper())
    writer.close()


async def main():
    server = await asyncio.start_server(echo, "0.0.0.0", 8001)
    print("ready", flush=True)
    await server.serve_forever()


asyncio.run(main())
