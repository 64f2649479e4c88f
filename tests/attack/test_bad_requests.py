"""The catalogue of bad requests, sent raw to a running adsidecar: status, code, next request, requests at Amazon."""

import json
import re
import signal
import socket
import time
import urllib.request
from urllib.parse import urlsplit

from catalogue import MARK, Case, Outcome, catalogue

# The debug build of a busy machine answers within this.
PATIENCE_SECONDS = 10
AT_LEAST = 300


def send(address: tuple[str, int], case: Case, number: int) -> bytes:
    """Everything received for the case and a good request after it, which closes the connection."""
    raw = case.raw.replace(MARK.encode(), f"X-Case: {number}\r\n".encode())
    behind = f"GET /sandbox/echo?behind HTTP/1.1\r\nHost: localhost\r\nX-Case: {number}\r\nConnection: close\r\n\r\n"
    with socket.create_connection(address, timeout=PATIENCE_SECONDS) as stream:
        try:
            stream.sendall(raw if case.ends else raw + behind.encode())
            if case.ends:
                stream.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass
        came = b""
        try:
            while piece := stream.recv(65536):
                came += piece
        except ConnectionResetError:
            pass
        return came


def answers(came: bytes) -> list[tuple[int, str]]:
    """Status and code of each response, delimited by length or chunks."""
    seen = []
    while came:
        head, end, came = came.partition(b"\r\n\r\n")
        assert end, f"incomplete head: {head!r}"
        fields = dict(re.findall(rb"(?m)^([^:\r\n]+): *([^\r\n]*)", head.lower()))
        status = int(head.split(b" ")[1])
        if status != 100:
            seen.append((status, fields.get(b"x-adsidecar-error", b"").decode()))
        if b"transfer-encoding" in fields:
            while True:
                size, _, came = came.partition(b"\r\n")
                came = came[int(size, 16) + 2 :]
                if int(size, 16) == 0:
                    break
        else:
            came = came[int(fields.get(b"content-length", b"0")) :]
    return seen


def whole_calls(sandbox) -> dict[str, list[tuple[str, str, str]]]:
    """The complete requests that Amazon received, by case."""
    with urllib.request.urlopen(f"{sandbox.control}/history?door=na") as answer:
        calls = json.load(answer)["calls"]
    by_case: dict[str, list[tuple[str, str, str]]] = {}
    for call in calls:
        # adsidecar itself looks for accounts after the login; no case asks for these paths.
        if call["complete"] and not call["target"].startswith(("/v2/profiles", "/managerAccounts", "/dsp/", "/amc/")):
            marks = [value for name, value in call["headers"] if name == "x-case"]
            by_case.setdefault("".join(marks), []).append((call["method"], call["target"], call["body"]))
    return by_case


def wrong_with(outcome: Outcome, seen: list[tuple[int, str]], reached: list[tuple[str, str, str]]) -> str:
    """The deviation from the expected outcome; empty if there is none."""
    behind = ("GET", "/sandbox/echo?behind", "")
    follows = seen[-1:] == [(200, "")] and reached[-1:] == [behind]
    first = seen[0] if seen else None
    if outcome.status == 0:
        right = first is None or (first[0] in (400, 408) and first[1] in ("", outcome.code))
    elif outcome.reaches:
        right = first is not None and first[1] == ""
    else:
        right = first == (outcome.status, outcome.code)
    if not right:
        return "another answer"
    if len(seen) != (first is not None) + outcome.kept:
        return "the connection stays open" if not outcome.kept else "the connection does not stay open"
    if outcome.kept and not follows:
        return "the next request was not served unchanged"
    expected = [outcome.reaches] if outcome.reaches else []
    if reached != expected + [behind] * outcome.kept:
        return "something else reached Amazon"
    return ""


def test_every_case_of_the_catalogue_has_the_expected_outcome(sandbox):
    cases = catalogue()
    assert len(cases) >= AT_LEAST
    address = urlsplit(sandbox.proxy)
    urllib.request.urlopen(urllib.request.Request(f"{sandbox.control}/history", method="DELETE")).close()
    seen = {str(n): answers(send((address.hostname, address.port), case, n)) for n, case in enumerate(cases)}
    # The last request got its response, so all earlier ones have arrived; aborted ones never become complete.
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        reached = whole_calls(sandbox)
        wrong = [
            f"{case.group}: {case.name}: {problem}: answered {seen[str(n)]}, reached {reached.get(str(n), [])}"
            for n, case in enumerate(cases)
            if (problem := wrong_with(case.outcome, seen[str(n)], reached.get(str(n), [])))
        ]
        if not wrong or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    assert not wrong, "\n" + "\n".join(wrong)
    assert set(reached) <= set(seen), "a request without a case was smuggled"


def test_the_harness_detects_a_smuggled_request():
    """The behavior of a proxy that serves data after bad framing: the harness must find each sign of it."""
    behind, refused = ("GET", "/sandbox/echo?behind", ""), Outcome(400, "bad_request")
    assert wrong_with(refused, [(400, "bad_request")], []) == ""
    assert wrong_with(refused, [(400, "bad_request"), (200, "")], [behind]) == "the connection stays open"
    assert wrong_with(refused, [(400, "bad_request")], [behind]) == "something else reached Amazon"
    assert wrong_with(refused, [(200, "")], [("POST", "/sandbox/echo", "abc")]) == "another answer"
    passed = Outcome(200, reaches=("POST", "/sandbox/echo", "abc"))
    assert wrong_with(passed, [(200, "")], [("POST", "/sandbox/echo", "abcd")]) == "something else reached Amazon"


def test_a_thousand_callers_may_connect_while_it_is_busy(sandbox_of_its_own):
    """A caller beyond the backlog would wait for a second, until the kernel repeats what was dropped."""
    parts = urlsplit(sandbox_of_its_own.proxy)
    sandbox_of_its_own.process.send_signal(signal.SIGSTOP)
    try:
        callers = [socket.socket() for _ in range(1000)]
        for caller in callers:
            caller.setblocking(False)
            caller.connect_ex((parts.hostname, parts.port))
        # On loopback the kernel has answered each before it returned.
        states = [caller.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] for caller in callers]
        established = states.count(1)
    finally:
        sandbox_of_its_own.process.send_signal(signal.SIGCONT)
    assert established == len(callers)
    for caller in callers[::100]:
        caller.settimeout(PATIENCE_SECONDS)
        caller.sendall(b"GET /sandbox/echo HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert caller.recv(65536).startswith(b"HTTP/1.1 200"), "each is served, too"
    for caller in callers:
        caller.close()
