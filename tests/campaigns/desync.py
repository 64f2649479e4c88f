"""Mutated requests to a listener, and how both sides parse them: a disagreement is a desync."""

import asyncio
import json
import random
import re
from collections import Counter

import backends
import mutations

CONCURRENT = 64
# A listener that is silent for this long waits for more of a body: the caller then disconnects.
QUIET_SECONDS = 2
# Marks data after which the caller disconnected before the listener did.
GAVE_UP = b"HTTP/1.1 000 gave up\r\n\r\n"


async def converse(port: int, raw: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    came = b""
    try:
        writer.write(raw)
        while piece := await asyncio.wait_for(reader.read(65536), QUIET_SECONDS):
            came += piece
        return came
    except TimeoutError:
        return came + GAVE_UP
    except ConnectionError:
        return came
    finally:
        writer.close()


def answers(came: bytes) -> list[tuple[int, str, str, str]]:
    """Status, code, request id and the backend's echo, for each complete response."""
    seen = []
    while came:
        head, end, came = came.partition(b"\r\n\r\n")
        status = re.match(rb"HTTP/1\.[01] (\d{3})", head)
        if not end or not status:
            break
        found = re.findall(rb"(?mi)^([^:\r\n]+): *([^\r\n]*)", head)
        fields = {name.lower(): value.decode("latin-1") for name, value in found}
        body = b""
        if "chunked" in fields.get(b"transfer-encoding", ""):
            while match := re.match(rb"([0-9a-f]+)\r\n", came):
                size = int(match[1], 16)
                body, came = body + came[match.end() : match.end() + size], came[match.end() + size + 2 :]
                if size == 0:
                    break
        elif not (fields.get(b"x-request-id", "").startswith("m-") and len(came) < 9):
            length = int(fields.get(b"content-length", 0))
            # A response to HEAD has a length but no body.
            if not came[:5] == b"HTTP/":
                body, came = came[:length], came[length:]
        echo = fields.get(b"x-echo", "")
        if not echo and body.startswith(b"{") and b'"target"' in body:
            echo = json.loads(body)["target"]
        if status[1] != b"100":
            code = fields.get(b"x-adsidecar-error", "")
            seen.append((int(status[1]), code, fields.get(b"x-request-id", ""), echo))
    return seen


async def attack(port: int, numbers: range, seed: int) -> dict[int, list[tuple[int, str, str, str]]]:
    waiting, told = iter(numbers), {}

    async def worker() -> None:
        for number in waiting:
            raw = mutations.mutated(number, random.Random(f"{seed}-{number}"))
            behind = mutations.call("c", number, "GET", "Connection: close").encode()
            told[number] = answers(await converse(port, raw + behind))

    await asyncio.gather(*(worker() for _ in range(CONCURRENT)))
    return told


def desyncs(told: dict, seen: list[dict]) -> list[str]:
    """The contradictions that show a disagreement between both sides."""
    found, answered, nameless, understood = [], Counter(), Counter(), Counter()
    for number, replies in told.items():
        for _, code, name, echo in replies:
            # Not every mutated head keeps its name; adsidecar then assigns a new request id.
            if mutations.is_name(name) and mutations.is_name(echo.rpartition("?")[2]) and not echo.endswith(name):
                found.append(f"{number}: the response to {name} is that to {echo}")
            if not code:
                # hyper's backend echoes in the body, and a response to HEAD has none.
                answered[echo or f"{mutations.ECHO}?{name}"] += 1
                nameless[str(number)] += not echo and not mutations.is_name(name)
    for entry in seen:
        understood[entry["target"]] += 1
        for name in backends.header(entry, "x-request-id"):
            understood_name = entry["target"].rpartition("?")[2]
            if mutations.is_name(name) and mutations.is_name(understood_name) and understood_name != name:
                found.append(f"{entry['target']} arrived with the headers of {name}")
    gave_up = {str(number) for number, replies in told.items() if replies and replies[-1][0] == 0}
    for target, times in understood.items():
        kind, _, rest = target.rpartition("?")[2].partition("-")
        # A caller that disconnects misses the response to its last request, but never to a hidden one.
        number = rest.partition("-")[0]
        excused = kind != "s" and number in gave_up
        if times > answered[target] + nameless[number] and not excused:
            found.append(f"{target} was parsed {times} times and got {answered[target]} responses")
    return found
