"""What the store campaigns share: the writer program, and the record of its acknowledged writes.

Only the standard library. The program is that of the variable ADSIDECAR_STORE_WRITER, or the release build:
`cargo build --release --example store-writer`.
"""

import argparse
import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from world import ENVIRONMENT, REPOSITORY


def writer() -> str:
    target = Path(os.environ.get("CARGO_TARGET_DIR", REPOSITORY / "target"))
    path = Path(os.environ.get("ADSIDECAR_STORE_WRITER", target / "release" / "examples" / "store-writer"))
    if not path.is_file():
        raise SystemExit(f"no store-writer at {path}: run `cargo build --release --example store-writer`")
    return str(path.resolve())


class Violation(Exception):
    """A violation: a lost write, an older token, a store that does not open."""


class Book:
    """What a store must contain: for each user the last acknowledged write, or one attempted after it."""

    def __init__(self):
        self.acknowledged: dict[str, str] = {}
        self.tried: dict[str, list[str]] = {}
        self.writes = 0
        self.next = 1

    def read(self, lines: list[str]) -> None:
        """Processes a writer's output: compares `open …` with the record, and adds the rest to it."""
        for line in lines:
            word, _, rest = line.partition(" ")
            if word == "open":
                self.compare(json.loads(rest)["users"])
            elif word == "try":
                user, what = rest.split()
                self.tried.setdefault(user, []).append(what)
                if what != "erase":
                    self.next = max(self.next, int(what) + 1)
            elif word == "ack":
                user, what = rest.split()
                self.acknowledged[user], self.tried[user] = what, []
                self.writes += 1
            elif word == "failed":
                raise Violation(f"it does not open: {rest}")

    def compare(self, users: dict[str, str | None]) -> None:
        users = {user: token for user, token in users.items() if user != "probe"}
        wrong = []
        for user in sorted({*users, *self.acknowledged, *self.tried}):
            wanted = {self.acknowledged.get(user, "erase"), *self.tried.get(user, [])}
            found = "erase"
            if user in users:
                found = users[user].rsplit("-", 1)[1] if users[user] else "a record that does not open"
            if found not in wanted:
                wrong.append(f"{user}: found {found}, acknowledged or tried: {sorted(wanted)}")
            self.acknowledged[user], self.tried[user] = found, []
        if wrong:
            raise Violation("; ".join(wrong))


def lines_of(text: bytes) -> list[str]:
    """The complete lines: a kill may have truncated the last one."""
    return text.decode("utf-8", "replace").split("\n")[:-1]


def start(store: Path, *words: str, before: tuple[str, ...] = ()) -> subprocess.Popen:
    """Starts the writer, with the command prefix `before`, in a new process group: `end` reaches both."""
    command = [*before, writer(), str(store), *words]
    pipe = subprocess.PIPE
    # Unbuffered, so that a campaign can read a line and leave the rest to communicate().
    return subprocess.Popen(command, bufsize=0, stdout=pipe, stderr=pipe, env=ENVIRONMENT, start_new_session=True)


def end(process: subprocess.Popen, how: int = signal.SIGKILL) -> None:
    os.killpg(process.pid, how)


def check(book: Book, store: Path, seconds: float = 30) -> dict:
    """Opens the store in a new process, compares it with the record, saves one grant, and closes it. Returns the
    output."""
    process = start(store, "check")
    try:
        out, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        end(process)
        process.communicate()
        raise Violation(f"it hangs: no output within {seconds} s") from None
    if b"panicked" in errors:
        raise Violation(f"it panics: {errors.decode()[-500:]}")
    lines = lines_of(out)
    book.read(lines)
    if process.returncode or lines[-1:] != ["closed"]:
        raise Violation(f"it does not work: {process.returncode} {lines[-1:]} {errors.decode()[-500:]}")
    return json.loads(lines[0].partition(" ")[2])


def write(book: Book, store: Path, seed: int, count: int) -> None:
    """Writes `count` times without faults."""
    out, _ = start(store, "write", str(seed), str(book.next), str(count)).communicate(timeout=60)
    book.read(lines_of(out))


def arguments(description: str, only: tuple[str, ...] = (), **defaults: int) -> argparse.Namespace:
    """`--seed`, `--known-bad`, a count per name, and a filter for each of `only`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--known-bad", action="store_true", help="use a broken store, which the harness must notice")
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in only:
        parser.add_argument(f"--{name}", help="try only this")
    return parser.parse_args()


class Tally:
    """Counts and prints rounds and violations."""

    def __init__(self, name: str, rounds: int):
        self.name, self.rounds, self.done, self.violations = name, rounds, 0, 0
        self.begun = self.said = time.monotonic()

    def violation(self, text: str) -> None:
        self.violations += 1
        if self.violations <= 20:
            print(f"VIOLATION in round {self.done}: {text}", flush=True)

    def round(self) -> None:
        self.done += 1
        if time.monotonic() - self.said > 30:
            self.said = time.monotonic()
            print(f"{self.name}: {self.done} of {self.rounds}, {self.violations} violations", flush=True)

    def end(self, known_bad: bool, more: str) -> int:
        took = time.monotonic() - self.begun
        print(f"{self.name}: {self.done} rounds, {more}, {self.violations} violations, {took:.0f} s", flush=True)
        if known_bad:
            print("known-bad variant: " + ("noticed, as expected" if self.violations else "NOT NOTICED"))
            return 0 if self.violations else 1
        return 1 if self.violations else 0


def workspace(name: str) -> tempfile.TemporaryDirectory:
    """A directory that is removed at the end; in memory, unless TMPDIR is set."""
    memory = "/dev/shm" if "TMPDIR" not in os.environ and os.access("/dev/shm", os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix=f"adsidecar-{name}-", dir=memory)


def needs_root() -> None:
    if os.geteuid() != 0:
        raise SystemExit("mounting needs root: run it as root, on a machine with loop devices")


class Volume:
    """A small mounted ext4 volume in a file. The file is in memory, so that copying it is fast."""

    def __init__(self, directory: Path, megabytes: int, image: Path | None = None, options: str = "loop"):
        self.options = options
        self.image, self.place = image or directory / "volume.ext4", directory / "mounted"
        if image is None:
            with self.image.open("wb") as file:
                file.truncate(megabytes << 20)
            subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", str(self.image)], check=True)
        self.place.mkdir(parents=True, exist_ok=True)

    def __enter__(self):
        subprocess.run(["mount", "-o", self.options, str(self.image), str(self.place)], check=True)
        return self

    def __exit__(self, *_):
        # A process killed a moment ago may still use it.
        for _ in range(100):
            if subprocess.run(["umount", str(self.place)], capture_output=True).returncode == 0:
                return
            time.sleep(0.05)
        raise SystemExit(f"{self.place} stays mounted")
