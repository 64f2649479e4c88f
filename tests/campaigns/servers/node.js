// `node [--insecure-http-parser] node.js PORT LOG`: as servers.py does it, with Node's own HTTP server.
const fs = require("fs");
const http = require("http");

const [port, path] = process.argv.slice(2);
const log = fs.openSync(path, "a");
const server = http.createServer((request, answer) => {
  const pieces = [];
  request.on("data", (piece) => pieces.push(piece));
  request.on("error", () => {});
  request.on("end", () => {
    const body = Buffer.concat(pieces);
    const headers = [];
    for (let at = 0; at < request.rawHeaders.length; at += 2) {
      headers.push([request.rawHeaders[at], request.rawHeaders[at + 1]]);
    }
    const entry = { target: request.url, headers, length: body.length, body: body.toString("latin1", 0, 200) };
    fs.writeSync(log, JSON.stringify(entry) + "\n");
    answer.writeHead(200, { "X-Echo": request.url, "Content-Length": 0 });
    answer.end();
  });
});
server.on("clientError", (error, socket) => socket.destroy());
server.listen(Number(port), "127.0.0.1");
