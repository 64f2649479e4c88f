"""adsidecar serves on sockets that systemd has opened, and a restart then refuses no connection."""

import configparser
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import urllib.request
from contextlib import contextmanager

import pytest

KEY = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
LIMIT_SECONDS = 60


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "AMAZON_CLIENT_ID": "amzn1.application-oa2-client.0123",
        "AMAZON_CLIENT_SECRET": "unused",
        "FERNET_KEY": KEY,
        "ADSIDECAR_STORE__PATH": str(tmp_path / "store.sled"),
        "ADSIDECAR_ADMIN__LISTEN": f"127.0.0.1:{free_port()}",
    }


@contextmanager
def started(adsidecar, environment: dict[str, str], *sockets: socket.socket):
    """adsidecar as systemd starts it: the sockets from descriptor 3 on, and LISTEN_PID its own."""
    moves = " ".join(f"exec {3 + place}<&{one.fileno()};" for place, one in enumerate(sockets))
    script = f"{moves} export LISTEN_FDS={len(sockets)} LISTEN_PID=$$; exec {adsidecar} serve"
    # Descriptors that no move overwrites.
    process = subprocess.Popen(
        ["bash", "-c", script],
        env=environment,
        pass_fds=[one.fileno() for one in sockets],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(LIMIT_SECONDS)
        process.stderr.close()


def opened(address=("127.0.0.1", 0), family=socket.AF_INET, kind=socket.SOCK_STREAM) -> socket.socket:
    listener = socket.socket(family, kind)
    listener.bind(address)
    if kind == socket.SOCK_STREAM:
        listener.listen(64)
    # Above those that the moves write to.
    high = socket.socket(fileno=os.dup2(listener.fileno(), listener.fileno() + 100, inheritable=True))
    listener.close()
    return high


def answer(port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/auth/amazon/status", timeout=LIMIT_SECONDS) as response:
        return response.status


def test_a_socket_that_no_listener_names_is_refused(adsidecar, environment):
    with opened() as stranger:
        environment["ADSIDECAR_PROXY__LISTEN"] = f"127.0.0.1:{free_port()}"
        with started(adsidecar, environment, stranger) as process:
            told = process.communicate(timeout=LIMIT_SECONDS)[1]
            assert process.returncode not in (0, None)
    assert "no listener is configured" in told and "proxy.listen" in told, told


def test_what_is_no_listening_stream_socket_is_refused(adsidecar, environment):
    with opened(kind=socket.SOCK_DGRAM) as datagrams:
        with started(adsidecar, environment, datagrams) as process:
            told = process.communicate(timeout=LIMIT_SECONDS)[1]
            assert process.returncode not in (0, None)
    assert "no listening stream socket as descriptor 3" in told and "ListenStream=" in told, told


def test_the_variables_of_another_process_mean_nothing(adsidecar, environment):
    port = free_port()
    environment |= {"ADSIDECAR_PROXY__LISTEN": f"127.0.0.1:{port}", "LISTEN_FDS": "1", "LISTEN_PID": "1"}
    process = subprocess.Popen([adsidecar, "serve"], env=environment, stderr=subprocess.DEVNULL)
    try:
        subprocess.run([adsidecar, "wait", "--timeout", "60s"], env=environment, check=True, timeout=LIMIT_SECONDS)
        assert answer(port) == 200
    finally:
        process.terminate()
        assert process.wait(LIMIT_SECONDS) == 0


def test_a_unix_socket_is_served_and_its_file_left_to_systemd(adsidecar, environment, tmp_path):
    path = tmp_path / "proxy.sock"
    environment["ADSIDECAR_PROXY__LISTEN"] = f"unix:{path}"
    with opened(str(path), socket.AF_UNIX) as listener, started(adsidecar, environment, listener) as process:
        asked = ["curl", "--silent", "--fail", "--unix-socket", path, "http://localhost/api/auth/amazon/status"]
        assert b"users" in subprocess.run(asked, check=True, capture_output=True, timeout=LIMIT_SECONDS).stdout
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_SECONDS) == 0
        assert path.is_socket(), "systemd's socket unit owns the file"


def test_no_connection_is_refused_while_it_restarts(adsidecar, environment):
    """Callers connect anew all the time, through ten restarts."""
    failures, answered, over = [], [0], threading.Event()
    with opened() as listener:
        port = listener.getsockname()[1]
        environment["ADSIDECAR_PROXY__LISTEN"] = f"127.0.0.1:{port}"

        def call() -> None:
            while not over.is_set():
                try:
                    assert answer(port) == 200
                    answered[0] += 1
                except OSError as failure:
                    failures.append(repr(failure))

        callers = [threading.Thread(target=call) for _ in range(4)]
        for caller in callers:
            caller.start()
        try:
            for _ in range(10):
                before = answered[0]
                with started(adsidecar, environment, listener) as process:
                    wait = [adsidecar, "wait", "--timeout", "60s"]
                    subprocess.run(wait, env=environment, check=True, timeout=LIMIT_SECONDS)
                    assert answer(port) == 200
                    process.send_signal(signal.SIGTERM)
                    assert process.wait(LIMIT_SECONDS) == 0, process.stderr.read()
                assert answered[0] > before
            over.set()
            # For those that wait for the next one.
            with started(adsidecar, environment, listener) as process:
                for caller in callers:
                    caller.join(LIMIT_SECONDS)
                process.terminate()
                assert process.wait(LIMIT_SECONDS) == 0
        finally:
            over.set()
    assert failures == []


@pytest.mark.skipif(not shutil.which("systemd-socket-activate"), reason="only with systemd")
def test_systemd_starts_it_at_the_first_connection_which_is_answered(adsidecar, environment):
    port = free_port()
    environment["ADSIDECAR_PROXY__LISTEN"] = f"127.0.0.1:{port}"
    passed = [f"--setenv={name}={value}" for name, value in environment.items()]
    command = ["systemd-socket-activate", f"--listen=127.0.0.1:{port}", *passed, adsidecar, "serve"]
    process = subprocess.Popen(command, env={"PATH": os.environ["PATH"]}, stderr=subprocess.PIPE, text=True)
    try:
        # Its first word is that it listens.
        assert "Listening on" in process.stderr.readline()
        assert answer(port) == 200
    finally:
        process.terminate()
        assert process.wait(LIMIT_SECONDS) == 0
        process.stderr.close()


def test_the_socket_unit_names_the_default_addresses_and_is_valid(repository, tmp_path):
    text = (repository / "deploy/debian/adsidecar.socket").read_text()
    listen = [line.partition("=")[2] for line in text.splitlines() if line.startswith("ListenStream=")]
    example = (repository / "config/example.toml").read_text()
    [default] = [line for line in example.split("[proxy]")[1].split("[login]")[0].splitlines() if "listen = [" in line]
    assert json.dumps(listen) == default.partition(" = ")[2]
    read = configparser.RawConfigParser(strict=False)
    read.read_string(text)
    assert "accept" not in read["Socket"], "one process serves all connections"
    unit, service = tmp_path / "adsidecar.socket", tmp_path / "adsidecar.service"
    unit.write_text(text)
    shipped = (repository / "deploy/debian/adsidecar.service").read_text()
    service.write_text(shipped.replace("/usr/bin/adsidecar serve", "/bin/true serve"))
    verified = subprocess.run(["systemd-analyze", "verify", "--man=no", unit, service], capture_output=True, text=True)
    assert verified.returncode == 0 and "adsidecar" not in verified.stderr, verified.stderr
