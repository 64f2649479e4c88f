"""What the campaigns share: a sandbox (the stand-in for Amazon), and the adsidecar under test as a separate process.

Only the standard library. The binaries are those of the variables ADSIDECAR_BIN and ADSIDECAR_SANDBOX_BIN, or the
release build: `cargo build --release --bins`.
"""

import http.client
import json
import os
import random
import signal
import socket
import struct
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CLIENT_ID = "amzn1.application-oa2-client.sandbox"
CLIENT_SECRET = "amzn1.oa2-cs.v1.sandbox-secret"
FERNET_KEY = "cw_0x689RpI-jtRR7oE8h_eQsKImvJapLeSbXpwF4e4="

# The build to use: cargo's profile, and its output directory. tests/bench sets it to `dist`.
PROFILE = "release"

# Without the machine's proxies and AMAZON_* variables.
ENVIRONMENT = {"PATH": os.environ["PATH"]}
# Without the machine's own proxies.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def binary(name: str) -> str:
    variable = name.upper().replace("-", "_") + "_BIN"
    target = Path(os.environ.get("CARGO_TARGET_DIR", REPOSITORY / "target"))
    path = Path(os.environ.get(variable, target / PROFILE / name))
    if not path.is_file():
        raise SystemExit(f"no {name} at {path}: run `cargo build --profile {PROFILE} --bins` or set {variable}")
    return str(path.resolve())


# Ports that were handed out.
PORTS: set[int] = set()


def free_port() -> int:
    """A port that nobody uses, below those that the kernel by default gives to clients: one of them could take it
    before the process that it is for has started."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in PORTS:
            PORTS.add(port)
            return port


def until(what: str, look, seconds: float = 20, period: float = 0.01):
    """Polls until `look` returns a true value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if seen := look():
            return seen
        time.sleep(period)
    raise SystemExit(f"not within {seconds} s: {what}")


def ask(url: str, method: str = "GET", body=None, timeout: float = 30, headers=None):
    """Status, headers and text of a response, whatever its status."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, method=method, headers=headers or {})
    try:
        with DIRECT.open(request, timeout=timeout) as answer:
            return answer.status, answer.headers, answer.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read().decode("utf-8", "replace")


class Sandbox:
    """The stand-in for Amazon. The adsidecar that it starts is unused; the one under test is a Sidecar."""

    def __init__(self, directory: Path, *words: str):
        self.directory = directory / "amazon"
        self.directory.mkdir(parents=True, exist_ok=True)
        listeners = [
            word for listener in ("proxy", "admin", "amazon", "control") for word in (f"--{listener}", "127.0.0.1:0")
        ]
        command = [binary("adsidecar-sandbox"), "--calm", "--no-login", "--json", *listeners]
        command += ["--data", str(self.directory), *words]
        self.log = (self.directory / "sandbox.log").open("w")
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.log, text=True, cwd=directory, env=ENVIRONMENT
        )
        self.control = json.loads(self.process.stdout.readline())["control"]
        overview = self.order("GET", "/")
        addresses = overview["addresses"]
        self.lwa, self.na, self.eu, self.fe = (addresses[listener] for listener in ("lwa", "na", "eu", "fe"))
        self.mcp = "".join(f'mcp_{region} = "https://{addresses[f"mcp_{region}"]}"\n' for region in ("na", "eu", "fe"))
        self.ca_file = self.directory / "ca.pem"

    def order(self, method: str, path: str, body=None):
        status, _, text = ask(self.control + path, method, body)
        if status >= 300:
            raise SystemExit(f"the sandbox's control port: {method} {path}: {status} {text}")
        return json.loads(text) if text else None

    def grant(self) -> str:
        """A new refresh token."""
        return self.order("POST", "/consent", {"want": "grant"})["refresh_token"]

    def set_fault(self, fault, **rule) -> None:
        self.order("POST", "/trouble", {"trouble": fault, **rule})

    def calm(self) -> None:
        self.order("DELETE", "/trouble")

    def refreshes(self) -> int:
        """Token calls with a refresh token, successful or not, since the history was last cleared."""
        return self.order("GET", "/history?door=lwa")["lwa"]["refreshes"]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self.log.close()


class Sidecar:
    """The adsidecar under test: its configuration, its store, and its process while it runs."""

    def __init__(self, sandbox: Sandbox, directory: Path, extra: str = "", store: Path | None = None):
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.sandbox = directory, sandbox
        self.port, self.admin_port = free_port(), free_port()
        self.proxy, self.admin = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{self.admin_port}"
        self.store = store or directory / "store" / "adsidecar.sled"
        self.store.parent.mkdir(parents=True, exist_ok=True)
        self.config = directory / "adsidecar.toml"
        self.log = directory / "adsidecar.log"
        self.process: subprocess.Popen | None = None
        # Another build than the one under test, for a version that it has to work beside.
        self.program: str | None = None
        ca = json.dumps(str(sandbox.ca_file))
        listeners = "" if "[proxy]" in extra else f'[proxy]\nlisten = "127.0.0.1:{self.port}"\n'
        self.config.write_text(
            f'environment = "production"\n{listeners}[admin]\nlisten = "127.0.0.1:{self.admin_port}"\n'
            f'[amazon]\nclient_id = "{CLIENT_ID}"\nclient_secret = "{CLIENT_SECRET}"\n'
            f'token_url = "https://{sandbox.lwa}/auth/o2/token"\nca_file = {ca}\n'
            f'[store]\npath = {json.dumps(str(self.store))}\nfernet_keys = "{FERNET_KEY}"\n'
            f'[upstream]\nna = "https://{sandbox.na}"\neu = "https://{sandbox.eu}"\nfe = "https://{sandbox.fe}"\n'
            f"{sandbox.mcp}ca_file = {ca}\n{extra}\n"
        )

    def command(self, *words: str, stdin: str = "", check: bool = True, **environment: str):
        """Runs an adsidecar command and waits for it."""
        ended = subprocess.run(
            [binary("adsidecar"), "--config", str(self.config), *words],
            input=stdin, text=True, capture_output=True, env={**ENVIRONMENT, **environment}, timeout=120,
        )
        if check and ended.returncode:
            raise SystemExit(f"adsidecar {' '.join(words)}: {ended.returncode} {ended.stderr}")
        return ended

    def import_grant(self, user: str = "default", token: str | None = None) -> str:
        """Gives a user a grant, while the process is stopped."""
        token = token or self.sandbox.grant()
        self.command("users", "import", "--user", user, "--offline", "--replace", stdin=token)
        return token

    def spawn(self, *before: str, **environment: str) -> subprocess.Popen:
        """Starts it with the command prefix `before` (strace, faketime, setpriv …), without waiting."""
        assert self.process is None or self.process.poll() is not None, "it is already running"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*before, self.program or binary("adsidecar"), "--config", str(self.config)],
                stdout=log, stderr=log, env={**ENVIRONMENT, **environment},
            )
        return self.process

    def start(self, *before: str, seconds: float = 30, **environment: str) -> None:
        """Starts it, and returns once it is ready."""
        self.spawn(*before, **environment)
        until("readiness", lambda: self.is_ready() or self.died(), seconds)

    def died(self) -> bool:
        if self.process.poll() is None:
            return False
        raise SystemExit(f"adsidecar exited with {self.process.returncode}:\n{self.log.read_text()[-3000:]}")

    def is_ready(self) -> bool:
        try:
            return ask(self.admin + "/readyz", timeout=2)[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def follows(self) -> bool:
        """Whether it is ready, everything is stored, and it knows what others have changed."""
        try:
            return ask(self.admin + "/readyz", timeout=2)[2] == "ready\n"
        except (OSError, http.client.HTTPException):
            return False

    def get(self, path: str, **headers: str):
        return ask(self.proxy + path, headers=headers)

    def post(self, path: str, body=b""):
        return ask(self.proxy + path, "POST", body)

    def status(self, user: str = "default") -> dict:
        return json.loads(self.get(f"/api/auth/amazon/status?user_id={user}")[2])

    def metric(self, series: str) -> float:
        """A metric by its name and labels as Prometheus prints them; 0 if absent."""
        for line in ask(self.admin + "/metrics")[2].splitlines():
            if line.startswith(series + " "):
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    def memory_kib(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")))

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        """Kills it, if it is running: for cleanup."""
        if self.process and self.process.poll() is None:
            self.kill()

    def stop(self, seconds: float = 60) -> int:
        """Stops it like Kubernetes. Returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


class Starts:
    """Starts processes and hears when they are ready, as systemd does: to poll many of them for it takes the processors
    that they need."""

    def __init__(self, directory: Path):
        self.path = str(directory / "ready.sock")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        # The processor time in milliseconds of each process that was started last, when all were ready.
        self.processor_times: list[float] = []

    def start(self, sidecars: list[Sidecar], seconds: float = 60) -> list[float]:
        """Starts them all at once. Returns after how many seconds each was ready."""
        begun = {}
        for sidecar in sidecars:
            now = time.monotonic()
            begun[sidecar.spawn(NOTIFY_SOCKET=self.path).pid] = now
        ready, deadline = {}, time.monotonic() + seconds
        while len(ready) < len(begun):
            self.socket.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                message, ancillary, _, _ = self.socket.recvmsg(4096, 1000)
            except TimeoutError:
                missing = len(begun) - len(ready)
                ended = [sidecar.log.read_text()[-500:] for sidecar in sidecars if sidecar.process.poll() is not None]
                raise SystemExit(f"{missing} of {len(begun)} were not ready within {seconds} s; {ended}") from None
            pid = struct.unpack("iII", ancillary[0][2])[0]
            if b"READY=1" in message and pid in begun:
                ready[pid] = time.monotonic() - begun[pid]
        self.processor_times = [self.processor_time(pid) for pid in begun]
        return list(ready.values())

    @staticmethod
    def processor_time(pid: int) -> float:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e6


def workspace(name: str) -> tempfile.TemporaryDirectory:
    """A directory that is removed at the end."""
    return tempfile.TemporaryDirectory(prefix=f"adsidecar-{name}-")
