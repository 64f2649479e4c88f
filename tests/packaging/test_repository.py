"""Rules for every tracked file: no path of one machine, no junk, executable scripts."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

# Directories in which people and build machines keep a checkout, and which no program needs. (/data, /etc, /run and
# /tmp exist in a container or on any system.)
MACHINE_PATH = re.compile(r"/(?:home|Users|root|work|mnt)/[\w.]|\b[A-Z]:\\\\?Users")
# A hit that is a path inside the images or the documents that we name. None so far.
ALLOWED_MACHINE_PATHS: frozenset[str] = frozenset()

# Left behind by editors, merges, systems and patches.
JUNK_NAME = re.compile(r"(~|\.(orig|rej|bak|swp|pyc|log|tmp))$|(^|/)(\.DS_Store|Thumbs\.db|__pycache__)(/|$)")
CONFLICT = re.compile(r"^(<{7}|>{7}|\|{7}) ", re.MULTILINE)


def tracked(repository: Path) -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=repository, check=True, capture_output=True, text=True)
    return [repository / name for name in listing.stdout.split("\0") if name and (repository / name).is_file()]


def text_of(path: Path) -> str | None:
    """The file's text; nothing for a picture or another binary file."""
    content = path.read_bytes()
    return None if b"\0" in content else content.decode()


@pytest.fixture(scope="module")
def texts(repository) -> dict[str, str]:
    pairs = {str(path.relative_to(repository)): text_of(path) for path in tracked(repository)}
    return {name: text for name, text in pairs.items() if text is not None}


@pytest.fixture(scope="module")
def scripts(repository, texts) -> list[Path]:
    return [repository / name for name, text in texts.items() if re.match(r"#!.*\b(ba|da)?sh\b", text)]


def test_no_tracked_file_names_a_path_of_one_machine(texts):
    this_file = str(Path("tests/packaging") / Path(__file__).name)
    hits = [
        f"{name}:{number}: {line.strip()[:100]}"
        for name, text in texts.items()
        if name not in {this_file, *ALLOWED_MACHINE_PATHS}
        for number, line in enumerate(text.splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert hits == []


def test_no_junk_is_tracked(repository):
    names = [str(path.relative_to(repository)) for path in tracked(repository)]
    assert [name for name in names if JUNK_NAME.search(name)] == []


def test_no_text_has_trailing_blanks_a_carriage_return_or_a_conflict_mark(texts):
    # Snapshots and pictures as text may need other line ends, so their kinds are not listed here.
    kinds = (".rs", ".toml", ".py", ".md", ".yaml", ".yml", "Dockerfile", "run")
    wrong = []
    for name, text in texts.items():
        if name.endswith(kinds):
            wrong += [f"{name}:{n}" for n, line in enumerate(text.split("\n"), 1) if line != line.rstrip()]
            wrong += [f"{name}: a conflict mark"] if CONFLICT.search(text) else []
            wrong += [f"{name}: does not end with one newline"] if text and not re.search(r"[^\n]\n\Z", text) else []
    assert wrong == []


def test_scripts_that_ci_runs_are_executable(repository):
    started = [*(repository / ".ci").iterdir(), repository / "tests" / "run"]
    assert repository / ".ci" / "run" in started
    for path in started:
        modes = subprocess.run(["git", "ls-files", "--stage", path], cwd=repository, capture_output=True, text=True)
        assert modes.stdout.startswith("100755 "), f"{path.name} is not executable in git: git update-index --chmod=+x"
        assert path.stat().st_mode & 0o111


def test_every_shell_script_parses_and_pleases_shellcheck(scripts):
    assert shutil.which("shellcheck"), "tests/run installs it: apt-get install shellcheck"
    assert scripts, "tests/run is one"
    for script in scripts:
        parsed = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
        assert parsed.returncode == 0, parsed.stderr
    checked = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_every_shell_script_stops_at_the_first_error(scripts):
    for script in scripts:
        assert "\nset -euo pipefail\n" in script.read_text(), f"{script.name}: set -euo pipefail"


def test_a_plain_build_has_no_fail_points(repository):
    def libraries(*words: str) -> set[str]:
        command = ["cargo", "tree", "--locked", "--edges", "normal", "--prefix", "none", *words]
        told = subprocess.run(command, cwd=repository, check=True, capture_output=True, text=True)
        return {line.split()[0] for line in told.stdout.splitlines() if line}

    assert "tokio" in libraries()
    assert "fail" not in libraries(), "an environment variable must not stop what ships"
    assert "fail" in libraries("--features", "failpoints")
