"""Other HTTP servers, each on a plain loopback port: `servers.py KIND PORT LOG`.

Each writes a line of JSON for each complete request that it parsed, and responds with `X-Echo: <target>`. h11, aiohttp
and waitress are imported only if their kind runs; wsgiref and its TLS need only the standard library.
"""

import asyncio
import json
import socket
import ssl
import sys


class Log:
    def __init__(self, path: str):
        self.file = open(path, "a", buffering=1, encoding="utf-8")

    def enter(self, target: str, headers: list[tuple[str, str]], body: bytes) -> None:
        entry = {"target": target, "headers": headers, "length": len(body), "body": body[:200].decode("latin-1")}
        self.file.write(json.dumps(entry) + "\n")


def tls(certificate: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def wsgi_application(log: Log):
    def application(environ, start_response):
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        headers = [(name, value) for name, value in environ.items() if name.startswith("HTTP_")]
        headers += [(name, str(environ[name])) for name in ("CONTENT_LENGTH", "CONTENT_TYPE") if environ.get(name)]
        target = environ["PATH_INFO"] + ("?" + environ["QUERY_STRING"] if environ.get("QUERY_STRING") else "")
        log.enter(target, headers, body)
        start_response("200 OK", [("X-Echo", target), ("Content-Length", "0")])
        return []

    return application


def serve_wsgiref(port: int, log: Log, certificate: str = "") -> None:
    from socketserver import ThreadingMixIn
    from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

    class Server(ThreadingMixIn, WSGIServer):
        daemon_threads = True
        request_queue_size = 128

    class Quiet(WSGIRequestHandler):
        def log_message(self, *words):
            pass

    server = make_server("127.0.0.1", port, wsgi_application(log), Server, Quiet)
    if certificate:
        server.socket = tls(certificate).wrap_socket(server.socket, server_side=True)
    server.serve_forever()


def serve_waitress(port: int, log: Log) -> None:
    import logging

    import waitress

    logging.disable(logging.CRITICAL)
    waitress.serve(wsgi_application(log), listen=f"127.0.0.1:{port}", threads=4, _quiet=True)


def serve_aiohttp(port: int, log: Log, certificate: str = "") -> None:
    import logging

    from aiohttp import web

    logging.disable(logging.CRITICAL)

    async def answer(request: web.Request) -> web.Response:
        body = await request.read()
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in request.raw_headers]
        log.enter(request.raw_path, headers, body)
        return web.Response(headers={"X-Echo": request.raw_path})

    application = web.Application()
    application.router.add_route("*", "/{path:.*}", answer)
    context = tls(certificate) if certificate else None
    web.run_app(application, host="127.0.0.1", port=port, print=None, access_log=None, ssl_context=context)


def serve_h11(port: int, log: Log) -> None:
    import h11

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER)
        request, body = None, b""
        try:
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    if connection.they_are_waiting_for_100_continue:
                        writer.write(connection.send(h11.InformationalResponse(status_code=100, headers=[])))
                    connection.receive_data(await reader.read(65536))
                elif isinstance(event, h11.Request):
                    request, body = event, b""
                elif isinstance(event, h11.Data):
                    body += bytes(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    headers = [(name.decode(), value.decode("latin-1")) for name, value in request.headers]
                    log.enter(request.target.decode("latin-1"), headers, body)
                    fields = [("X-Echo", request.target), ("Content-Length", "0")]
                    writer.write(connection.send(h11.Response(status_code=200, headers=fields)))
                    writer.write(connection.send(h11.EndOfMessage()))
                    await writer.drain()
                    if connection.our_state is h11.MUST_CLOSE:
                        break
                    connection.start_next_cycle()
                else:
                    break
        except (h11.RemoteProtocolError, h11.LocalProtocolError, ConnectionError):
            pass
        finally:
            writer.close()

    async def main() -> None:
        server = await asyncio.start_server(converse, "127.0.0.1", port, family=socket.AF_INET)
        await server.serve_forever()

    asyncio.run(main())


if __name__ == "__main__":
    kind, port, log, *more = sys.argv[1:]
    serve = {"wsgiref": serve_wsgiref, "waitress": serve_waitress, "aiohttp": serve_aiohttp, "h11": serve_h11}[kind]
    serve(int(port), Log(log), *more)
