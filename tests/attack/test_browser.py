"""A page in a real Chromium that tries to use the proxy; and a user who logs in with the same browser."""

import json
import re
import shutil
import socket
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from browser import Browser

PAGE = (Path(__file__).parent / "page.html").read_bytes()


@pytest.fixture(scope="module")
def evil(sandbox):
    """The attacker's server: on its own port and, on another address, on the port of the proxy listener. There it
    serves its page, and afterwards forwards connections to the proxy listener, like a rebound name."""
    port = urlsplit(sandbox.proxy).port

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(PAGE)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(PAGE)

        def log_message(self, *words):
            pass

    class Rebound(Handler):
        def handle(self):
            head = self.connection.recv(65536, socket.MSG_PEEK)
            if head.startswith((b"GET /page", b"GET /favicon")) or not head:
                return super().handle()
            with socket.create_connection(("127.0.0.1", port)) as listener:
                answers = threading.Thread(target=relay, args=(listener, self.connection))
                answers.start()
                relay(self.connection, listener)
                answers.join()

    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler), ThreadingHTTPServer(("127.0.0.2", port), Rebound)]
    for server in servers:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://evil.test:{servers[0].server_port}/page", f"http://rebound.test:{port}/page"
    for server in servers:
        server.shutdown()
        server.server_close()


def relay(source: socket.socket, sink: socket.socket) -> None:
    try:
        while piece := source.recv(65536):
            sink.sendall(piece)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@pytest.fixture
def browser(tmp_path):
    assert shutil.which("chromedriver"), "tests/run installs it: apt-get install chromium chromium-driver"
    running = Browser(tmp_path, "--host-resolver-rules=MAP evil.test 127.0.0.1, MAP rebound.test 127.0.0.2")
    yield running
    running.stop()


def get(url: str, method: str = "GET") -> str:
    with urllib.request.urlopen(urllib.request.Request(url, method=method)) as answer:
        return answer.read().decode()


def amazon(sandbox) -> list[dict]:
    """Every request that reached Amazon, on any listener."""
    return json.loads(get(f"{sandbox.control}/history"))["calls"]


def denied(sandbox) -> dict[str, int]:
    """How many requests admission rejected, by reason."""
    series = re.findall(r'adsidecar_guard_denied_total\{reason="(\w+)"\} (\d+)', get(f"{sandbox.admin}/metrics"))
    return {reason: int(count) for reason, count in series}


# Covers: threat 1.
def test_no_page_in_a_real_browser_can_use_the_proxy(sandbox, evil, browser):
    port = urlsplit(sandbox.proxy).port
    foreign, rebound = evil
    get(f"{sandbox.control}/history", "DELETE")
    before = denied(sandbox)

    browser.go(foreign)
    bases = [f"http://localhost:{port}", f"http://127.0.0.1:{port}"]
    read = browser.run(f"attack({json.dumps(bases)}).then(arguments[0])")
    assert read == [], "a page of another origin can read nothing"
    crossed = denied(sandbox).get("cross_site", 0) - before.get("cross_site", 0)
    assert crossed >= 40, f"the requests must arrive and be rejected: {crossed}"

    browser.go(rebound)
    read = browser.run(f"attack({json.dumps([f'http://rebound.test:{port}'])}).then(arguments[0])")
    assert read, "a rebound page has the same origin and can read the responses"
    assert {(entry.get("status"), json.loads(entry["text"])["code"]) for entry in read} == {(403, "host_not_allowed")}
    assert denied(sandbox).get("host", 0) - before.get("host", 0) >= 20

    for url in bases:
        browser.go(f"{url}/sandbox/echo?typed")
        assert '"code":"cross_site"' in browser.text().replace(" ", "")

    assert amazon(sandbox) == [], "nothing may reach Amazon, neither the Ads listeners nor the token endpoint"
    status = json.loads(get(f"{sandbox.proxy}/api/auth/amazon/status"))
    assert [user["user_id"] for user in status["users"]] == ["default"], "no user was logged out or added"
    assert json.loads(get(f"{sandbox.proxy}/sandbox/echo?own"))["target"] == "/sandbox/echo?own"
    assert [call["target"] for call in amazon(sandbox)] == ["/sandbox/echo?own"], (
        "the harness must see requests that do reach Amazon"
    )


def test_a_user_logs_in_with_the_same_browser(sandbox, evil, browser):
    browser.go(f"{sandbox.proxy}/api/auth/amazon/login?user_id=person")
    assert urlsplit(browser.url()).path == "/ap/oa", "at Amazon's consent page"
    browser.click("button, input[type=submit], a.allow")
    text = browser.wait_for(
        "the end of the login", lambda: "/api/auth/amazon/callback" in browser.url() and browser.text()
    )
    assert "person" in text
    status = json.loads(get(f"{sandbox.proxy}/api/auth/amazon/status?user_id=person"))
    assert status["state"] == "fresh"
    # A page of another origin can neither start a login in this browser, nor complete one that it started itself.
    foreign, _ = evil
    begun = json.loads(get(f"{sandbox.proxy}/api/auth/amazon/login?user_id=victim"))
    browser.go(foreign)
    browser.run(f"location = {json.dumps(sandbox.proxy)} + '/api/auth/amazon/login?user_id=victim'; arguments[0]()")
    browser.wait_for("the refusal", lambda: "cross_site" in browser.text())
    assert begun["state"]
    assert json.loads(get(f"{sandbox.proxy}/api/auth/amazon/status?user_id=victim"))["state"] == "none"
