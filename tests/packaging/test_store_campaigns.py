"""Short runs of the store campaigns: they run and find no violation. The long runs are by hand."""

import os
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

SOAK = Path(__file__).resolve().parents[1] / "campaigns"
sys.path.insert(0, str(SOAK))

import world  # noqa: E402


@pytest.fixture(scope="session")
def writer(target_directory) -> str:
    built = target_directory / "debug" / "examples" / "store-writer"
    assert built.is_file(), f"no store-writer at {built}: run `cargo build --example store-writer`"
    return str(built)


@pytest.fixture
def campaign(writer):
    """Runs a campaign and returns its output."""

    def run(name: str, *words: str) -> str:
        environment = {**os.environ, "ADSIDECAR_STORE_WRITER": writer, "PYTHONDONTWRITEBYTECODE": "1"}
        ended = subprocess.run(
            [SOAK / name, *words], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    return run


@pytest.fixture
def strace() -> None:
    assert shutil.which("strace"), "tests/run installs it: apt-get install strace"


# Covers: failure 36.
def test_no_kill_loses_an_acknowledged_grant(campaign):
    assert "0 violations" in campaign("kill-loop", "--cycles", "12")


# Covers: failure 36.
def test_no_kill_at_a_system_call_loses_a_grant(campaign, strace):
    assert "0 violations" in campaign("syscall-faults", "--faults", "5", "--fault", "signal=KILL")


# Covers: failure 42.
def test_unsynced_writes_are_not_acknowledged(campaign, strace):
    assert "0 violations" in campaign("syscall-faults", "--faults", "5", "--call", "fsync", "--fault", "error=EIO")


# Covers: failure 39.
def test_no_damage_brings_an_older_token_back(campaign):
    assert "0 violations" in campaign("damaged-stores", "--cases", "8")


# Covers: failure 37.
def test_every_acknowledged_write_is_on_disk_first(writer, strace, tmp_path):
    """A power cut loses unsynced data: the order of the system calls shows it, without a power cut."""
    log = tmp_path / "log"
    calls = "pwrite64,write,writev,fsync,sync_file_range,rename,unlink"
    command = [
        "strace",
        "-f",
        "-y",
        "-o",
        log,
        "-e",
        f"trace={calls}",
        writer,
        tmp_path / "store",
        "write",
        "3",
        "1",
        "12",
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    database, unsynced, acknowledged = str(tmp_path / "store" / "db"), set(), 0
    for line in log.read_text().splitlines():
        call = line.split(None, 1)[1]
        path = call.partition("<")[2].partition(">")[0]
        if call.startswith("writev") and "ack " in call:
            acknowledged += 1
            assert not unsynced, f"acknowledged while {unsynced} was not on the disk: {line}"
        elif call.startswith(("pwrite64(", "write(")) and path.startswith(str(tmp_path)) and path != str(log):
            unsynced.add(path)
        elif call.startswith("fsync("):
            unsynced.discard(path)
            # A renamed file is there once its directory is.
            unsynced -= {name for name in unsynced if name.startswith("in ") and name == f"in {path}"}
        elif call.startswith(("rename(", "unlink(")) and " = 0" in call:
            name = Path(call.partition('"')[2].partition('"')[0])
            unsynced.add(f"in {name.parent}")
    assert acknowledged == 12
    assert (tmp_path / "store" / "db").is_file() and database not in unsynced


# Covers: failure 35.
def test_a_disk_that_fills_later_fails_no_request_and_loses_no_grant(strace, tmp_path):
    """The file system fails the first writes of a refreshed grant's mirror record, like a full one, then accepts
    them."""
    amazon = world.Sandbox(tmp_path)
    try:
        sidecar = world.Sidecar(amazon, tmp_path / "own")
        sidecar.import_grant()
        copy = sidecar.store.with_name(f"{sidecar.store.name}.copies") / sha256(b"default").hexdigest()
        amazon.set_fault("rotate_refresh_token", when="always")
        # As a grandchild, so that the process is adsidecar itself. The write is retried every second, so the test needs
        # several failures to observe one.
        full = ["strace", "-D", "-f", "-qq", "-o", "/dev/null", "-P", f"{copy}.tmp", "-e", "trace=write"]
        sidecar.start(*full, "-e", "inject=write:error=ENOSPC:when=1..3")
        assert sidecar.post("/api/auth/amazon/refresh")[0] == 200, "the refreshed token is used from memory"
        assert not sidecar.is_ready()
        assert sidecar.metric("adsidecar_store_up") == 0
        assert sidecar.get("/v2/profiles")[0] == 200
        world.until("readiness without intervention", sidecar.is_ready)
        sidecar.kill()
        sidecar.start()
        assert sidecar.post("/api/auth/amazon/refresh")[0] == 200, "the rotated refresh token was stored"
        assert sidecar.stop() == 0
    finally:
        amazon.stop()
