"""The campaigns of the store, in small: they run, and what they look for is not there. The long runs are by hand."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOAK = Path(__file__).resolve().parents[1] / "soak"


@pytest.fixture(scope="session")
def writer(target_directory) -> str:
    built = target_directory / "debug" / "examples" / "store-writer"
    assert built.is_file(), f"no store-writer at {built}: run `cargo build --example store-writer`"
    return str(built)


@pytest.fixture
def campaign(writer):
    """Runs a campaign to its end, and gives what it said."""

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


def test_row_36_no_kill_loses_an_acknowledged_grant(campaign):
    assert "0 violations" in campaign("kill-loop", "--cycles", "12")


def test_row_36_no_kill_at_a_system_call_loses_one(campaign, strace):
    assert "0 violations" in campaign("syscall-faults", "--faults", "5", "--fault", "signal=KILL")


def test_row_42_what_could_not_be_synced_is_not_acknowledged(campaign, strace):
    assert "0 violations" in campaign("syscall-faults", "--faults", "5", "--call", "fsync", "--fault", "error=EIO")


def test_row_39_no_damage_brings_an_older_token_back(campaign):
    assert "0 violations" in campaign("damaged-stores", "--cases", "8")


def test_row_37_every_acknowledged_write_was_on_the_disk_before(writer, strace, tmp_path):
    """What a power cut takes is what was not synced: the order of the system calls tells, without cutting any power."""
    log = tmp_path / "log"
    calls = "pwrite64,write,writev,fsync,sync_file_range,rename,unlink"
    command = ["strace", "-f", "-y", "-o", log, "-e", f"trace={calls}", writer, tmp_path / "store", "write", "3", "1", "12"]
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
