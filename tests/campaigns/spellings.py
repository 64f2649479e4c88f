"""Variant spellings of the headers that adsidecar manages."""

import itertools
import re
import socket

import backends
import world

# What a caller may send in any spelling, and what Amazon must get under the name: our value, once, or none.
MANAGED = [
    "Authorization",
    "Amazon-Advertising-API-ClientId",
    "Amazon-Ads-ClientId",
    "Host",
    "Proxy-Authorization",
    "X-Ads-Account",
    "X-Ads-User",
    "X-Ads-Region",
    "X-Ads-Sidecar-Token",
    "Cookie",
    "Origin",
    "X-Forwarded-For",
    "X-Forwarded-Host",
    "X-Forwarded-Proto",
    "Forwarded",
    "Referer",
    "Proxy",
    "Sec-Fetch-Mode",
    "Sec-Ch-Ua",
]
THEIRS = "theirs"


def spellings(name: str):
    """The name in other cases, with `_`, and as lines that some parsers accept as it."""
    words = name.split("-")
    separators = list(itertools.product("-_", repeat=len(words) - 1))
    for separator in separators:
        for case in (str.lower, str.upper, str.title, str.swapcase):
            spelled = words[0] + "".join(mark + word for mark, word in zip(separator, words[1:]))
            yield f"{case(spelled)}: {THEIRS}"
    yield f"{name}:{THEIRS}"
    yield f"{name}: {THEIRS} "
    yield f"{name}:\t{THEIRS}\t"
    yield f"{name} : {THEIRS}"
    yield f"{name}\t: {THEIRS}"
    yield f" {name}: {THEIRS}"
    yield f"\t{name}: {THEIRS}"
    yield f"{name}\0: {THEIRS}"
    yield f"{name}\xad: {THEIRS}"
    yield f"X: y\n{name}: {THEIRS}"
    yield f"X: y\r{name}: {THEIRS}"
    yield f"X: y\r\n {name}: {THEIRS}"
    yield f"{name}: {THEIRS}\r\n{name}: {THEIRS} too"
    yield f"{name}: {THEIRS}\r\n{name.replace('-', '_')}: {THEIRS} too"
    yield f"Connection: {name}\r\n{name}: {THEIRS}"
    yield f"Connection: close, {name.lower()}"
    yield f"Connection:\r\nConnection: {name.replace('-', '_')}\r\n{name.replace('-', '_')}: {THEIRS}"


def all_spellings() -> list[tuple[str, str]]:
    """Each header with each line sent for it, without duplicates."""
    pairs = [(name, line) for name in MANAGED for line in spellings(name)]
    return list(dict.fromkeys(pairs))


def send(port: int, number: int, line: str) -> int:
    """The status of the response to a request with this header line; 0 without a response."""
    raw = f"GET /sandbox/echo?spelling-{number} HTTP/1.1\r\nHost: localhost\r\n{line}\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=30) as stream:
        stream.sendall(raw.encode("latin-1"))
        answer = stream.makefile("rb").readline()
    return int(answer.split(b" ")[1]) if answer.startswith(b"HTTP/1.") else 0


def wrong_with(entry: dict, bearer: str, authority: str) -> list[str]:
    """The managed headers for which the backend got anything but our one value."""

    def seen(name: str) -> list[str]:
        return [value.strip() for value in backends.header(entry, name.lower())]

    client_ids = seen("Amazon-Advertising-API-ClientId") + seen("Amazon-Ads-ClientId")
    ours = {"Authorization": [bearer], "Host": [authority]}
    wrong = [f"{name}: {seen(name)}" for name in MANAGED if "ClientId" not in name and seen(name) != ours.get(name, [])]
    return wrong + ([] if client_ids == [world.CLIENT_ID] else [f"client id: {client_ids}"])


def try_all(sidecar: world.Sidecar, seen, authority: str) -> tuple[int, int, list[str]]:
    """Sends every spelling to a running sidecar; `seen` returns what its backend got. Returns how many passed, how many
    were rejected, and the violations."""
    sidecar.get("/sandbox/echo?spelling-good")
    lines = all_spellings()
    statuses = [send(sidecar.port, number, line) for number, (_, line) in enumerate(lines)]
    entries = {entry["target"].partition("spelling-")[2]: entry for entry in seen()}
    bearer = "".join(backends.header(entries["good"], "authorization"))
    wrong = [] if re.fullmatch(r"Bearer Atza\|\S+", bearer) else ["no bearer token of ours"]
    for number, ((_, line), status) in enumerate(zip(lines, statuses)):
        entry = entries.get(str(number))
        if (status == 200) != (entry is not None):
            wrong.append(f"{line!r}: got {status}, and the backend got {entry}")
        elif entry:
            wrong += [f"{line!r}: {problem}" for problem in wrong_with(entry, bearer, authority)]
    return statuses.count(200), len(lines) - statuses.count(200), wrong
