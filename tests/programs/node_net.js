// node: an HTTP server inside, clients to the outside, errors by name. node_net.js CA
const http = require("http"), https = require("https"), net = require("net"), dgram = require("dgram"), fs = require("fs"), dns = require("dns");
const ca = fs.readFileSync(process.argv[2]);
const get = (module, url, options = {}) => new Promise((resolve) => {
  module.get(url, options, (response) => {
    let n = 0;
    response.on("data", (d) => (n += d.length));
    response.on("end", () => resolve(`${response.statusCode} ${n}`));
  }).on("error", (e) => resolve(e.code));
});
(async () => {
  console.log("http", await get(http, "http://origin.test/bytes/1000000"));
  console.log("https", await get(https, "https://origin.test/hello", { ca }));
  console.log("v6", await get(http, "http://[fd77::2]/hello"));
  const agent = new https.Agent({ keepAlive: true, maxSockets: 4, ca });
  console.log("agent", (await Promise.all(Array.from({ length: 40 }, () => get(https, "https://origin.test/bytes/5020", { agent })))).join());
  agent.destroy();
  console.log("refused", await get(http, "http://10.77.0.2:9/"));
  console.log("no name", await get(http, "http://nowhere.test/"));
  console.log("unreachable", await get(http, "http://10.78.0.1/"));
  const server = http.createServer((request, response) => response.end("from node " + request.url));
  await new Promise((r) => server.listen(0, "127.0.0.1", r));
  console.log("inside", await get(http, `http://127.0.0.1:${server.address().port}/x`));
  server.close();
  const half = await new Promise((resolve) => {
    const s = net.connect({ port: 7007, host: "10.77.0.2", allowHalfOpen: true }, () => s.end("g" + "x".repeat(70000)));
    let text = "";
    s.on("data", (d) => (text += d)).on("end", () => resolve(text)).on("error", (e) => resolve(e.code));
  });
  console.log("half-close", half.trim());
  const socket = dgram.createSocket("udp4");
  const answer = new Promise((r) => socket.on("message", (m, from) => r(`${m} ${from.address}:${from.port}`)));
  socket.send("ping", 7007, "10.77.0.2");
  console.log("udp", await answer);
  socket.close();
  console.log("dns", (await dns.promises.resolveMx("origin.test")).map((m) => m.exchange).join(), (await dns.promises.resolve6("origin.test")).join());
})();
