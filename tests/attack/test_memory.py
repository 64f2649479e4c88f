"""What a burst leaves behind in memory."""

import socket
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

CALLERS, UPLOADS = 64, 20
BODY = b"x" * (64 << 10)
UPLOAD = b"POST /sandbox/echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY
GIVEN_BACK_SECONDS = 10


def anonymous_kib(process) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")))


def upload(connection: socket.socket, number: int) -> None:
    for _ in range(number):
        connection.sendall(UPLOAD)
        head = b""
        while b"\r\n\r\n" not in head:
            piece = connection.recv(65536)
            assert piece, "closed"
            head += piece
        head, _, body = head.partition(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-l"))
        while len(body) < length:
            body += connection.recv(65536)


def test_what_a_burst_of_uploads_took_is_given_back_once_nothing_is_in_progress(sandbox_of_its_own):
    """glibc alone keeps it: a block that lives as long as its connection lies above all that is free."""
    parts = urlsplit(sandbox_of_its_own.proxy)
    callers = [socket.create_connection((parts.hostname, parts.port)) for _ in range(CALLERS)]
    for caller in callers:
        upload(caller, 1)
    before = anonymous_kib(sandbox_of_its_own.process)
    most = before
    for _ in range(3):
        threads = [threading.Thread(target=upload, args=(caller, UPLOADS)) for caller in callers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        most = max(most, anonymous_kib(sandbox_of_its_own.process))
    assert most > before + 4096, "no burst"
    # Its callers stay connected.
    deadline = time.monotonic() + GIVEN_BACK_SECONDS
    while (after := anonymous_kib(sandbox_of_its_own.process)) > before + 4096 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert after <= before + 4096, f"{before} KiB before, {most} at most, {after} now"
    for caller in callers:
        caller.close()
