"""Shared by the benchmarks: requests on persistent connections, and a store full of users. Standard library only."""

import json
import re
import resource
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "campaigns"))
import world  # noqa: E402
from world import ENVIRONMENT, Sandbox, Sidecar, binary, free_port, until, workspace  # noqa: E402, F401

# The shipped profile is measured.
world.PROFILE = "dist"

REQUEST = b"GET /v2/profiles HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\r\n"
UPLOAD = b"POST /sandbox/echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 65536\r\n\r\n" + b"x" * 65536
DOWNLOAD = b"GET /sandbox/bytes/1048576 HTTP/1.1\r\nHost: localhost\r\n\r\n"
LENGTH = re.compile(rb"^content-length: (\d+)\r$", re.MULTILINE)


def connect(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), 60)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def received(connection: socket.socket) -> bytes:
    if data := connection.recv(1 << 20):
        return data
    raise SystemExit("the connection broke")


def call(connection: socket.socket, request: bytes = REQUEST) -> int:
    """Sends one request and reads the whole response; returns the length of its body."""
    connection.sendall(request)
    return answer(connection)


def answer(connection: socket.socket) -> int:
    """Reads one response with a Content-Length; returns the length of its body."""
    head = b""
    while b"\r\n\r\n" not in head:
        head += received(connection)
    head, _, body = head.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"unexpected response: {head[:200]!r}")
    length = int(LENGTH.search(head.lower() + b"\r")[1])
    left = length - len(body)
    while left > 0:
        left -= len(received(connection))
    return length


def calls(port: int, connections: int, each: int, request: bytes = REQUEST) -> None:
    """Sends `request` `each` times on each of `connections` concurrent connections."""

    def one() -> None:
        with connect(port) as connection:
            for _ in range(each):
                call(connection, request)

    with ThreadPoolExecutor(connections) as pool:
        for done in [pool.submit(one) for _ in range(connections)]:
            done.result()


def many_descriptors(count: int) -> None:
    """Raises the limit of file descriptors to `count` for this process and its children."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < count:
        raise SystemExit(f"the limit on descriptors is {most}, and {count} are needed: ulimit -Hn {count}, as root")
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, most))


def fill(sidecar: Sidecar, users: int, life: timedelta, unused: timedelta = timedelta()) -> None:
    """Gives `users` users (u0, u1, …) a grant whose access token expires after `life`, and that was last used the given
    time ago. All share one grant of the sandbox's."""
    sidecar.import_grant("seed")
    sidecar.start()
    status, _, text = sidecar.get("/v2/profiles", **{"X-Ads-User": "seed"})
    if status != 200:
        raise SystemExit(f"the first request failed: {status} {text}")
    sidecar.stop()
    record = json.loads(sidecar.command("store", "dump").stdout)["seed"]
    now = datetime.now(timezone.utc)
    # A record that is not bound to a user can be imported for any user.
    record = {key: record[key] for key in ("access_token", "refresh_token", "token_type")}
    used = (now - unused).isoformat()
    record |= {"expires_at": (now + life).isoformat(), "updated_at": used, "used_at": used}
    if not users:
        return
    records = json.dumps({f"u{number}": record for number in range(users)})
    # Each record is on disk before the next one is imported, which is slow on a slow disk; TMPDIR=/dev/shm avoids that.
    command = [binary("adsidecar"), "--config", str(sidecar.config), "users", "import", "--records", "-", "--offline"]
    subprocess.run(command, input=records, text=True, check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
