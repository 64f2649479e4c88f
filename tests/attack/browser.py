"""A real browser: Chromium, controlled through chromedriver's protocol (W3C WebDriver), with the standard library."""

import base64
import json
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import backends
import world

# A debug build and a browser on a busy machine.
PATIENCE_SECONDS = 60
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
# Keys, as WebDriver names them.
TAB, ENTER, SPACE, SHIFT, DOWN = "\ue004", "\ue007", " ", "\ue008", "\ue015"


@contextmanager
def served(page: Callable[[], str]) -> Iterator[int]:
    """Serves what `page` returns at every path of an origin of its own; its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = page().encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


class Browser:
    """A new Chromium process with a new profile."""

    def __init__(self, directory: Path, *more_flags: str):
        port = world.free_port()
        command = ["chromedriver", f"--port={port}", f"--log-path={directory}/chromedriver.log"]
        self.driver = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self.base = f"http://127.0.0.1:{port}"
        world.until("chromedriver", lambda: backends.listens(port))
        flags = [*FLAGS, f"--user-data-dir={directory}/profile", *more_flags]
        options = {
            "browserName": "chrome",
            "goog:chromeOptions": {"args": flags},
            "goog:loggingPrefs": {"browser": "ALL"},
            "pageLoadStrategy": "normal",
        }
        session = self.order("POST", "/session", {"capabilities": {"alwaysMatch": options}})
        self.base += f"/session/{session['sessionId']}"
        self.order("POST", "/timeouts", {"script": PATIENCE_SECONDS * 1000, "pageLoad": PATIENCE_SECONDS * 1000})

    def order(self, method: str, path: str, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data=data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()[:500]) from error

    def go(self, url: str) -> None:
        self.order("POST", "/url", {"url": url})

    def url(self) -> str:
        return self.order("GET", "/url")

    def run(self, script: str):
        """Runs a script whose last argument is the callback for its result."""
        return self.order("POST", "/execute/async", {"script": script, "args": []})

    def text(self) -> str:
        return self.order("POST", "/execute/sync", {"script": "return document.body.innerText", "args": []})

    def value(self, expression: str):
        """The value of an expression in the page."""
        return self.order("POST", "/execute/sync", {"script": f"return ({expression})", "args": []})

    def console(self) -> list[str]:
        """What the page wrote to the console since this was called last."""
        return [f"{entry['level']}: {entry['message']}" for entry in self.order("POST", "/se/log", {"type": "browser"})]

    def devtools(self, command: str, **parameters):
        return self.order("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def look(self, theme: str, width: int, height: int = 900) -> None:
        """Changes the colour scheme that the user prefers, and the size of the window."""
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.devtools("Emulation.setEmulatedMedia", features=features)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)

    def picture(self) -> bytes:
        """The whole page, as PNG."""
        taken = self.devtools("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(taken["data"])

    def press(self, *keys: str) -> None:
        """Presses keys one after the other."""
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.strokes(strokes)

    def press_with(self, held: str, key: str) -> None:
        """Presses a key while another one is held."""
        order = [("keyDown", held), ("keyDown", key), ("keyUp", key), ("keyUp", held)]
        self.strokes([{"type": kind, "value": each} for kind, each in order])

    def strokes(self, strokes: list[dict]) -> None:
        self.order("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": strokes}]})

    def click(self, selector: str) -> None:
        found = self.order("POST", "/element", {"using": "css selector", "value": selector})
        self.order("POST", f"/element/{found[ELEMENT]}/click", {})

    def wait_for(self, what: str, look):
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            if seen := look():
                return seen
            time.sleep(0.05)
        raise AssertionError(f"timed out: {what}; at {self.url()}: {self.text()[:300]}")

    def stop(self) -> None:
        try:
            self.order("DELETE", "")
        finally:
            self.driver.terminate()
            self.driver.wait(20)
