"""Fixtures that start a sandbox (a stand-in for Amazon with an adsidecar in front of it)."""

import json
import os
import queue
import signal
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# Long enough for a debug build on a busy machine; a sandbox that is up says so at once.
START_SECONDS = 60
# Above shutdown.drain.
STOP_SECONDS = 30
# No command that a test runs waits for anything.
COMMAND_SECONDS = 60


def binary(variable: str, name: str) -> str:
    """The built program: as the variable says, else the debug build."""
    path = Path(os.environ.get(variable, REPOSITORY / os.environ.get("CARGO_TARGET_DIR", "target") / "debug" / name))
    if not path.is_file():
        pytest.fail(f"no {name} at {path}: run `cargo build --bins` or set {variable}")
    return str(path.resolve())


def bare_environment(**variables: str) -> dict[str, str]:
    """An environment without the caller's configuration: neither AMAZON_* nor proxy settings."""
    return {"PATH": os.environ["PATH"], **variables}


@dataclass
class Sandbox:
    """A running sandbox, with the addresses that it printed at startup."""

    process: subprocess.Popen
    proxy: str
    admin: str
    control: str
    amazon: str
    ca_file: str
    config: str
    store: str
    fernet_key: str
    profile_id: str

    def stop(self) -> int:
        """Stops it like Kubernetes. Returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=STOP_SECONDS)


def start_sandbox(directory: Path, *words: str) -> Sandbox:
    listeners = [
        word for listener in ("proxy", "admin", "amazon", "control") for word in (f"--{listener}", "127.0.0.1:0")
    ]
    command = [binary("ADSIDECAR_SANDBOX_BIN", "adsidecar-sandbox"), "--calm", "--json", *listeners]
    command += ["--data", str(directory / "data"), *words]
    log = directory / "sandbox.log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=directory, env=bare_environment()
        )

    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        # To the end, so that the sandbox never blocks on a full pipe.
        for line in process.stdout:
            lines.put(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    try:
        told = json.loads(lines.get(timeout=START_SECONDS))
        fields = {name: str(told[name]) for name in Sandbox.__dataclass_fields__ if name != "process"}
        return Sandbox(process=process, **fields)
    except (queue.Empty, ValueError, KeyError) as problem:
        process.kill()
        process.wait()
        pytest.fail(f"the sandbox did not come up: {problem!r}\n{log.read_text()}")


@pytest.fixture(scope="session")
def adsidecar() -> str:
    """The path of the adsidecar binary."""
    return binary("ADSIDECAR_BIN", "adsidecar")


@pytest.fixture(scope="session")
def run_adsidecar(adsidecar):
    """Runs an adsidecar command to its end, in an environment of the given variables alone."""

    def run(*words: str, **variables: str) -> subprocess.CompletedProcess:
        command, environment = [adsidecar, *words], bare_environment(**variables)
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=COMMAND_SECONDS)

    return run


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    """A sandbox for one test module. A test may stop it; the teardown checks the exit code."""
    running = start_sandbox(tmp_path_factory.mktemp("sandbox"))
    yield running
    assert running.stop() == 0, "the sandbox must exit with 0 after SIGTERM"


@pytest.fixture
def sandbox_of_its_own(tmp_path):
    """A sandbox for one test, which may stop it."""
    running = start_sandbox(tmp_path)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def sandbox_without_grant(tmp_path_factory):
    """A sandbox for one test module, in which nobody is logged in."""
    running = start_sandbox(tmp_path_factory.mktemp("without-grant"), "--no-login")
    yield running
    running.stop()


@pytest.fixture(scope="session")
def installed_clients() -> Path:
    """Where tests/run has installed the client libraries that have an environment of their own."""
    default = REPOSITORY / os.environ.get("CARGO_TARGET_DIR", "target") / "test-mcp"
    path = Path(os.environ.get("ADSIDECAR_TEST_MCP", default))
    if not (path / "node_modules" / "undici").is_dir():
        pytest.fail(f"no client libraries at {path}: run tests/run once, or set ADSIDECAR_TEST_MCP")
    return path


@pytest.fixture(autouse=True)
def no_proxy_from_the_environment(monkeypatch):
    """The machine's own proxy settings would lead the clients around adsidecar."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
