"""Fixtures of the packaging tests: the repository and the built binary."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the working tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def target_directory() -> Path:
    """Cargo's target directory, absolute, as cargo itself would choose it."""
    return REPOSITORY / os.environ.get("CARGO_TARGET_DIR", "target")


@pytest.fixture(scope="session")
def adsidecar(target_directory) -> Path:
    """The built binary: ADSIDECAR_BIN, else the dist build, else the release build, else the debug build."""
    named = os.environ.get("ADSIDECAR_BIN")
    built = [target_directory / profile / "adsidecar" for profile in ("dist", "release", "debug")]
    candidates = [Path(named)] if named else built
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    pytest.fail(
        f"no adsidecar binary at {', '.join(map(str, candidates))}: run `cargo build --bins` or set ADSIDECAR_BIN"
    )
