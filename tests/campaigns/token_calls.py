"""A proxy before Login with Amazon's token endpoint that keeps a record of every token call, and the judge of that
record: which refresh token was presented again although it was consumed, and whether that could be avoided."""

import asyncio
import bisect
import dataclasses
import json
import random
import re
import ssl
import subprocess
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs

import world

# The time limit of a token call is 10 s for the process that makes it, and begins with its connection.
HEARD, LIMIT = 9.5, 9.0
# What was heard is stored within this time, also if the database was stopped meanwhile.
STORED = 5.0
# A call arrives here within this time of its sending, also if its sender was killed since.
ARRIVED = 0.1
# A last resort follows its refusal within this time.
RESORT = 30.0


@dataclasses.dataclass
class Call:
    """A call that presented a refresh token with a client secret that was accepted. Times are monotonic."""

    pod: str
    token: str
    received: float
    processed: float = 0.0
    # When the answer was written, and whether somebody was still there to read it.
    ended: float = float("inf")
    heard: bool = False
    # The refresh token of the answer; `None`: invalid_grant.
    successor: str | None = None
    judged: bool = False


class Record:
    """Every call, who was killed when, and when the database failed over."""

    def __init__(self):
        self.calls: dict[str, list[Call]] = {}
        self.kills: dict[str, list[float]] = {}
        # From when on the standby missed what was stored, until it took over.
        self.failovers: list[tuple[float, float]] = []
        # Who logged in with a code, and whose each refresh token is.
        self.codes, self.users = {}, {}
        self.twice, self.resorts, self.excused = [], 0, {}

    def killed(self, pod: str, begun: float, ended: float) -> None:
        """It was killed at some time between these."""
        self.kills.setdefault(pod, []).extend((begun, ended))

    def was_killed(self, pod: str, since: float, until: float) -> bool:
        kills = self.kills.get(pod, [])
        index = bisect.bisect_left(kills, since)
        return index < len(kills) and kills[index] <= until

    def add(self, call: Call) -> None:
        self.calls.setdefault(call.token, []).append(call)
        if call.successor and call.token in self.users:
            self.users[call.successor] = self.users[call.token]

    def excuse(self, earlier: Call, later: Call) -> str | None:
        """Why `later` could not know what became of `earlier`."""
        if self.was_killed(earlier.pod, earlier.received - ARRIVED, min(earlier.ended + STORED, later.received)):
            return "a kill"
        for lags_since, took_over in self.failovers:
            if earlier.ended + STORED >= lags_since and earlier.received <= took_over and later.received >= lags_since:
                return "a failover"
        is_late = not earlier.heard or earlier.ended - earlier.received > HEARD
        # Not before whoever made it gave it up.
        if is_late and later.received - earlier.received >= LIMIT:
            is_overtaken = earlier.processed > later.processed > 0
            return "a call that was given up and processed later" if is_overtaken else "an answer that was not heard"
        return None

    def is_last_resort(self, call: Call, successor: str | None) -> bool:
        """Whether the process presents the token before the one that was just refused to it."""
        refused = [other for other in self.calls.get(successor, []) if other.pod == call.pod and not other.successor]
        return any(0 <= call.received - other.received <= RESORT for other in refused)

    def judge(self) -> None:
        """Compares each call with those that presented the same token earlier. Call it when no call is under way."""
        for calls in self.calls.values():
            if len(calls) < 2 or not any(call.successor for call in calls):
                continue
            # In the order in which they were made: a delayed call may be processed after one that was made later.
            calls.sort(key=lambda call: call.received)
            successor = next(call.successor for call in calls if call.successor)
            for index, later in enumerate(calls[1:], 1):
                if later.judged:
                    continue
                later.judged = True
                if self.is_last_resort(later, successor):
                    self.resorts += 1
                    continue
                # A refusal told the process that the token is consumed, and nothing more than that.
                excuses = [self.excuse(earlier, later) for earlier in calls[:index] if earlier.successor]
                # The consumer may be the later one: then the earlier ones were given up.
                excuses += [self.excuse(earlier, later) for earlier in calls[:index] if later.successor]
                if None in excuses:
                    self.twice.append((later, calls[:index]))
                for excuse in filter(None, excuses):
                    self.excused[excuse] = self.excused.get(excuse, 0) + 1

    def was_lost(self, user: str, since: float, until: float) -> bool:
        """Whether a token of this user was refused, within this time, that another call had consumed: what followed it
        never reached a process that could store it."""
        for token, calls in self.calls.items():
            if self.users.get(token) != user or not any(call.successor for call in calls):
                continue
            if any(not call.successor and since <= call.processed <= until for call in calls):
                return True
        return False

    def story(self, later: Call, earlier: list[Call]) -> str:
        title = f"user {self.users.get(later.token, '?')}: a token was used again without need:"
        return "\n".join([title, *self.lines([*earlier, later], later.received)])

    def lately(self, user: str, at: float) -> str:
        """The calls for this user in the minute before."""
        calls = [call for calls in self.calls.values() for call in calls
                 if self.users.get(call.token) == user and at - 60 < call.received]
        return "\n".join(self.lines(sorted(calls, key=lambda call: call.received), at))

    def lines(self, calls: list[Call], at: float) -> list[str]:
        """What happened, in seconds before or after `at`, and the log's own time of that."""
        names, lines = {}, [f"  0 is {time.strftime('%H:%M:%S', time.gmtime(time.time() - time.monotonic() + at))} UTC"]
        since = lambda moment: f"{moment - at:+.2f}" if moment < float("inf") else "never"
        name = lambda token: names.setdefault(token, f"T{len(names)}")
        for call in calls:
            lines.append(f"  {call.pod} sent {name(call.token)} at {since(call.received)}, processed "
                         f"{since(call.processed)}, answered {since(call.ended)} "
                         f"({'heard' if call.heard else 'nobody there'}): "
                         f"{name(call.successor) if call.successor else 'invalid_grant'}")
        near = lambda moments: [round(moment - at, 2) for moment in moments if -60 < moment - at < 20]
        kills = {pod: near(kills) for pod, kills in self.kills.items()}
        failovers = [(round(begun - at, 2), round(ended - at, 2)) for begun, ended in self.failovers[-2:]]
        return [*lines, f"  kills {kills}, failovers {failovers}"]


class Amazon:
    """The proxy before the token endpoint, with a port for each adsidecar."""

    def __init__(self, sandbox: world.Sandbox, directory: Path, names: list[str], chance: random.Random):
        self.chance, self.sandbox, self.slow = chance, sandbox, 0.0
        self.calls, self.busy, self.record = 0, 0, Record()
        openssl = lambda *words: subprocess.run(["openssl", *words], check=True, capture_output=True, cwd=directory)
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        openssl("req", "-x509", *curve, "-days", "2", "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=campaign")
        openssl("req", *curve, "-keyout", "lwa.key", "-out", "lwa.csr", "-subj", "/CN=lwa")
        (directory / "names").write_text("subjectAltName=IP:127.0.0.1")
        openssl("x509", "-req", "-in", "lwa.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
                "-extfile", "names", "-out", "lwa.crt")
        self.bundle = directory / "bundle.pem"
        self.bundle.write_text(sandbox.ca_file.read_text() + (directory / "ca.crt").read_text())
        self.server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.server.load_cert_chain(directory / "lwa.crt", directory / "lwa.key")
        self.client = ssl.create_default_context(cafile=sandbox.ca_file)
        self.ports, ready = {}, threading.Event()
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.run, args=(names, ready), daemon=True).start()
        ready.wait()

    def run(self, names: list[str], ready: threading.Event) -> None:
        asyncio.set_event_loop(self.loop)

        async def listen() -> None:
            for name in names:
                serve = lambda reader, writer, name=name: self.serve(name, reader, writer)
                server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=self.server)
                self.ports[name] = server.sockets[0].getsockname()[1]
            ready.set()

        self.loop.run_until_complete(listen())
        self.loop.run_forever()

    @staticmethod
    async def message(reader) -> bytes:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: *(\d+)", head, re.I)
        return head + (await reader.readexactly(int(length[1])) if length else b"")

    async def serve(self, name: str, reader, writer) -> None:
        """Keeps nothing open: a call is a connection, so that a killed adsidecar's call ends when it is done."""
        received, call = time.monotonic(), None
        try:
            # A client may open a connection that it does not need in the end.
            request = await self.message(reader)
        except (OSError, asyncio.IncompleteReadError):
            writer.close()
            return
        self.busy += 1
        try:
            words = {key: values[0] for key, values in parse_qs(request.split(b"\r\n\r\n", 1)[1].decode()).items()}
            delay = self.chance.uniform(0, 20) if self.chance.random() < self.slow else self.chance.uniform(0, 0.2)
            if before := self.chance.random() < 0.5:
                await asyncio.sleep(delay)
            host, port = self.sandbox.lwa.rsplit(":", 1)
            far_reader, far = await asyncio.open_connection(host, int(port), ssl=self.client, server_hostname=host)
            far.write(re.sub(rb"(?i)connection: *[^\r]*\r\n", b"", request))
            self.calls += 1
            answer = await self.message(far_reader)
            far.close()
            call = self.note(name, words, received, answer)
            if not before:
                await asyncio.sleep(delay)
            writer.write(answer.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n", 1))
            await writer.drain()
            if call:
                # Who gave the call up has closed the connection by now.
                call.ended, call.heard = time.monotonic(), not reader.at_eof()
        except (OSError, asyncio.IncompleteReadError):
            if call:
                call.ended = time.monotonic()
        finally:
            self.busy -= 1
            writer.close()

    def note(self, name: str, words: dict, received: float, answer: bytes) -> Call | None:
        is_granted = answer.startswith(b"HTTP/1.1 200")
        successor = json.loads(answer.split(b"\r\n\r\n", 1)[1])["refresh_token"] if is_granted else None
        if is_granted and words.get("code") in self.record.codes:
            self.record.users[successor] = self.record.codes[words["code"]]
        token = words.get("refresh_token")
        # A client secret that is refused says nothing about the token.
        if not token or not (is_granted or b"invalid_grant" in answer):
            return None
        call = Call(name, token, received, time.monotonic(), successor=successor)
        self.record.add(call)
        return call
