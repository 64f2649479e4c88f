"""The manuals are true: their commands and samples are run. Their tables are made from the code, which
tests/e2e/manuals.rs checks.

A comment above each fenced block says what the tests do with it:

- `<!-- sandbox -->`: against a running sandbox; each curl line of a shell block, or a whole sample in Python, Node or
  Java;
- `<!-- shell -->`: a script in an empty directory, with adsidecar in PATH and a configuration in the environment;
- `<!-- config -->`: a configuration file, by `adsidecar check`;
- `<!-- build -->`: a cargo line is a step of tests/run, and what it builds is run as shown;
- `<!-- start -->`: the variables with values of the test, then adsidecar until it serves;
- `<!-- page -->`: in Node, which says where the page would go;
- `<!-- published port -->`: a container's variables, in a process without Docker, and the request to it;
- `<!-- campaign -->`: with fewer cycles;
- `<!-- job -->`, `<!-- systemd -->`: by a test of its own; `<!-- postgres -->`: by tests/e2e/postgres.rs;
- `<!-- recipe: FILE -->`: as that file, by tests/clients/test_recipes.py;
- `<!-- not run: REASON -->`: not at all, for one of the reasons in tests/README.md.

Blocks of text and pictures have no comment.
"""

import base64
import configparser
import json
import os
import re
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

# The two commands that a newcomer sees first.
COMMANDS = ("cargo run --release --bin adsidecar-sandbox", "tests/run")

MANUALS = (
    "README.md",
    "config/README.md",
    "deploy/README.md",
    "deploy/RUNBOOK.md",
    "deploy/RECIPES.md",
    "tests/README.md",
    ".github/CONTRIBUTING.md",
    ".github/SECURITY.md",
)
README_LINES = 200

# An optional comment, then a fenced block; both may be indented, as in a list.
BLOCK = re.compile(
    r"(?:^ *<!-- (?P<mark>[^\n]*?) -->\n)?^(?P<indent> *)```(?P<kind>\w*)\n(?P<text>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
MARKS = (
    "sandbox",
    "shell",
    "config",
    "build",
    "start",
    "page",
    "published port",
    "campaign",
    "job",
    "systemd",
    "postgres",
)

# What runs a sample, and the file that it expects.
SAMPLES = {
    "python": (["python3"], "profiles.py"),
    "js": (["node"], "profiles.mjs"),
    "java": (["java"], "Profiles.java"),
}

# No response of the sandbox takes longer.
CURL_SECONDS = 30
# A Java compiler starts slowly on a busy machine.
SAMPLE_SECONDS = 120

@dataclass
class Block:
    """A fenced block of a manual."""

    manual: str
    mark: str
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.manual}: {self.text.splitlines()[0]}"


def blocks_of(manual: str, text: str) -> list[Block]:
    found = []
    for match in BLOCK.finditer(text):
        indent = match["indent"]
        lines = [line.removeprefix(indent) for line in match["text"].splitlines()]
        found.append(Block(manual, match["mark"] or "", match["kind"], "\n".join(lines) + "\n"))
    return found


@pytest.fixture(scope="module")
def manuals(repository) -> dict[str, str]:
    return {name: (repository / name).read_text() for name in MANUALS}


@pytest.fixture(scope="module")
def blocks(manuals) -> list[Block]:
    return [block for name, text in manuals.items() for block in blocks_of(name, text)]


@pytest.fixture(scope="module")
def readme(manuals) -> str:
    return manuals["README.md"]


def section(text: str, title: str) -> str:
    """The text below a heading, until the next one of its level."""
    _, _, rest = text.partition(f"\n## {title}\n")
    assert rest, f"no section {title}"
    return rest.partition("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of all tables in a text, without their heads."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in lines]
    heads = {index - 1 for index, row in enumerate(cells) if set("".join(row)) == {"-"}}
    return [row for index, row in enumerate(cells) if index not in heads and index - 1 not in heads]


def in_backticks(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def curl_lines(blocks: list[Block]) -> list[str]:
    shell = [block for block in blocks if block.mark == "sandbox" and block.kind == "sh"]
    return [line for block in shell for line in block.text.splitlines()]


def at_sandbox(text: str, sandbox) -> str:
    """A command or sample with the addresses of a sandbox on free ports."""
    for printed, real in (
        ("http://localhost:8001", sandbox.proxy),
        ("http://localhost:9464", sandbox.admin),
        ("http://127.0.0.1:8450", sandbox.control),
    ):
        text = text.replace(printed, real)
    return text


def test_the_two_commands_are_at_the_top_word_for_word(readme, repository):
    top = blocks_of("README.md", readme.partition("\n## ")[0])
    assert [line for block in top for line in block.text.splitlines()] == list(COMMANDS)
    assert '[[bin]]\nname = "adsidecar-sandbox"' in (repository / "tests" / "sandbox" / "Cargo.toml").read_text()
    assert (repository / "tests" / "run").is_file()


def test_the_readme_is_short_enough_to_be_read(readme):
    assert len(readme.splitlines()) <= README_LINES


def test_every_page_is_one_of_the_manuals(repository):
    listing = subprocess.run(["git", "ls-files", "*.md"], cwd=repository, check=True, capture_output=True, text=True)
    assert set(listing.stdout.split()) - set(MANUALS) == {"CHANGELOG.md", "tests/RESULTS.md"}


def anchors_of(text: str) -> set[str]:
    """GitHub's anchors of the headings outside of blocks."""
    titles = re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_link_leads_somewhere(manuals, repository):
    wrong = []
    for name, text in manuals.items():
        for target in re.findall(r"\]\(([^)]+)\)", BLOCK.sub("", text)):
            if target.startswith("https://"):
                continue
            path, _, anchor = target.partition("#")
            page = ((repository / name).parent / path if path else repository / name).resolve()
            if not page.exists() or not page.is_relative_to(repository):
                wrong.append(f"{name}: {target}")
            elif anchor and anchor not in anchors_of(page.read_text()):
                wrong.append(f"{name}: {target}")
    assert wrong == []


def test_every_block_says_how_it_is_tested(blocks):
    unmarked = [block for block in blocks if block.kind != "text" and block.mark not in MARKS]
    assert [str(block) for block in unmarked if not block.mark.startswith(("not run: ", "recipe: "))] == []


def test_the_reasons_not_to_run_a_block_stand_in_one_place(blocks, manuals):
    reasons = [row[0] for row in rows(section(manuals["tests/README.md"], "What the tests do with the manuals"))]
    given = [block.mark.removeprefix("not run: ") for block in blocks if block.mark.startswith("not run: ")]
    assert set(given) == set(reasons)
    assert len(given) <= 10, "ten were left when the others began to be run"


def test_a_curl_line_in_a_block_is_run(blocks):
    run = ("sandbox", "published port", "job")
    assert [
        str(block) for block in blocks if block.mark not in run and re.search(r"^curl ", block.text, re.MULTILINE)
    ] == []
    assert all(line.startswith("curl ") for line in curl_lines(blocks))


def test_every_curl_line_succeeds_when_it_is_pasted(blocks, sandbox, tmp_path):
    lines = curl_lines(blocks)
    assert len(lines) > 20
    failed = []
    for line in lines:
        command = at_sandbox(line, sandbox)
        assert command != line, f"goes to no listener of the sandbox: {line}"
        # The status goes to standard error: a line may write its response into a file, for the next line.
        command += " --silent --show-error --write-out '%{stderr}%{http_code}'"
        run = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=CURL_SECONDS
        )
        if run.returncode != 0 or not run.stderr[-3:].startswith("2"):
            failed.append(f"{run.stdout} {run.stderr}: {line}")
    assert failed == []


@pytest.mark.parametrize("kind", SAMPLES)
def test_the_sample_in_each_language_prints_the_profiles(blocks, sandbox, tmp_path, kind):
    [sample] = [block for block in blocks if block.kind == kind and block.mark == "sandbox"]
    command, name = SAMPLES[kind]
    assert shutil.which(command[0]), f"tests/run installs {command[0]}"
    (tmp_path / name).write_text(at_sandbox(sample.text, sandbox))
    run = subprocess.run([*command, name], cwd=tmp_path, capture_output=True, text=True, timeout=SAMPLE_SECONDS)
    assert run.returncode == 0, run.stderr
    assert sandbox.profile_id in run.stdout


@pytest.mark.parametrize("kind", SAMPLES)
def test_the_sample_in_each_language_says_that_a_login_is_needed(blocks, sandbox, tmp_path, kind):
    [sample] = [block for block in blocks if block.kind == kind and block.mark == "sandbox"]
    command, name = SAMPLES[kind]
    # The same request for a user who never logged in.
    text = at_sandbox(sample.text, sandbox).replace('"X-Ads-User": "default"', '"X-Ads-User": "nobody"')
    if text == at_sandbox(sample.text, sandbox):
        url = f'"{sandbox.proxy}/v2/profiles"'
        assert url in text
        with_user = {"python": f'urllib.request.Request({url}, headers={{"X-Ads-User": "nobody"}})', "java": url}[kind]
        text = text.replace(url, with_user).replace(".build();", '.header("X-Ads-User", "nobody").build();')
    (tmp_path / name).write_text(text)
    run = subprocess.run([*command, name], cwd=tmp_path, capture_output=True, text=True, timeout=SAMPLE_SECONDS)
    assert run.returncode != 0
    assert "login_required" in run.stderr or "in a browser and consent" in run.stdout


@pytest.fixture
def standalone(adsidecar, tmp_path) -> dict[str, str]:
    """An environment in which adsidecar is in PATH, configured, and has a store of the test's own."""
    adsidecar = Path(adsidecar).resolve()
    return {
        "PATH": f"{adsidecar.parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "AMAZON_CLIENT_ID": "amzn1.application-oa2-client.0123",
        "AMAZON_CLIENT_SECRET": "unused",
        "FERNET_KEY": base64.urlsafe_b64encode(bytes(range(32))).decode(),
    }


def test_every_shell_script_runs(blocks, standalone, tmp_path):
    scripts = [block for block in blocks if block.mark == "shell"]
    assert len(scripts) >= 3
    for number, script in enumerate(scripts):
        directory = tmp_path / str(number)
        directory.mkdir()
        command = ["bash", "-euo", "pipefail", "-c", script.text]
        run = subprocess.run(
            command, cwd=directory, env=standalone, capture_output=True, text=True, timeout=CURL_SECONDS
        )
        assert run.returncode == 0, f"{script}: {run.stdout}{run.stderr}"


def test_pythons_key_is_one_for_adsidecar(blocks, standalone, tmp_path):
    [script] = [block for block in blocks if block.mark == "shell" and "urlsafe_b64encode" in block.text]
    key = subprocess.run(["bash", "-c", script.text], capture_output=True, text=True, check=True).stdout.strip()
    environment = {**standalone, "FERNET_KEY": key}
    run = subprocess.run(
        ["adsidecar", "store", "dump"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=CURL_SECONDS,
    )
    assert (run.returncode, json.loads(run.stdout or "null")) == (0, {}), run.stderr


def test_every_configuration_is_accepted(blocks, standalone, tmp_path):
    files = [block for block in blocks if block.mark == "config"]
    assert len(files) >= 2
    for block in files:
        (tmp_path / "adsidecar.toml").write_text(block.text)
        command = ["adsidecar", "--config", "adsidecar.toml", "check"]
        run = subprocess.run(
            command, cwd=tmp_path, env=standalone, capture_output=True, text=True, timeout=CURL_SECONDS
        )
        assert run.returncode == 0, f"{block}: {run.stderr}"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def marked(blocks: list[Block], mark: str) -> list[Block]:
    found = [block for block in blocks if block.mark == mark]
    assert found, f"no block is marked {mark}"
    return found


@contextmanager
def serving(command: list[str], environment: dict[str, str], directory: Path) -> Iterator[None]:
    """adsidecar, from the moment at which it serves until it has ended without an error."""
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=directory, env=environment, stderr=log)
    try:
        subprocess.run(["adsidecar", "wait"], cwd=directory, env=environment, check=True, timeout=70)
        yield
    finally:
        process.terminate()
        assert process.wait(30) == 0, (directory / "log").read_text()


def test_the_build_of_the_manual_is_a_step_of_tests_run_and_its_binary_runs(blocks, standalone, tmp_path, repository):
    steps = (repository / "tests" / "run").read_text()
    for block in marked(blocks, "build"):
        build, *commands = block.text.splitlines()
        assert re.search(rf"^(step|beside) .*{re.escape(build)} ", steps, re.MULTILINE), build
        assert commands
        for command in commands:
            words = command.replace("dist/adsidecar", "adsidecar").split()
            run = subprocess.run(
                words, cwd=tmp_path, env=standalone, capture_output=True, text=True, timeout=CURL_SECONDS
            )
            assert run.returncode == 0 and run.stdout.strip(), run.stderr


def test_three_variables_start_it(blocks, standalone, tmp_path):
    [block] = marked(blocks, "start")
    *exports, program = block.text.splitlines()
    assert program == "dist/adsidecar"
    named = {line.removeprefix("export ").partition("=")[0] for line in exports}
    given = {name for name in standalone if name in named}
    assert named == given and len(named) == 3
    port, admin = free_port(), free_port()
    listeners = {"ADSIDECAR_PROXY__LISTEN": f"127.0.0.1:{port}", "ADSIDECAR_ADMIN__LISTEN": f"127.0.0.1:{admin}"}
    environment = {"PATH": standalone["PATH"], **{name: standalone[name] for name in named}, **listeners}
    with serving(["adsidecar"], environment, tmp_path):
        assert status_of(f"http://localhost:{port}/api/auth/amazon/login") == 200
    assert (tmp_path / "data").is_dir(), "the tokens are stored under data/"


def test_a_page_gets_the_address_of_amazons_consent_page(blocks, sandbox, tmp_path):
    [block] = marked(blocks, "page")
    there = "globalThis.location = { assign: (url) => console.log(String(url)) };\n"
    (tmp_path / "page.mjs").write_text(there + at_sandbox(block.text, sandbox))
    run = subprocess.run(["node", "page.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=SAMPLE_SECONDS)
    assert run.returncode == 0, run.stderr
    assert re.match(r"https?://\S+\?.*state=", run.stdout), run.stdout


def test_a_login_through_a_published_port(blocks, standalone, tmp_path):
    """Docker Desktop's login: the listener on every address, a caller token, and a callback that needs none."""
    container, request = [block.text.strip() for block in marked(blocks, "published port")]
    port, admin = free_port(), free_port()
    token = "a-caller-token-of-the-test-0123456789"
    variables = dict(
        re.findall(r"--env (\w+)=(\S+)", container.replace('"$TOKEN"', token).replace(":8001", f":{port}"))
    )
    assert set(variables) == {f"ADSIDECAR_PROXY__{name}" for name in ("LISTEN", "ALLOW_REMOTE", "CALLER_TOKEN")}
    environment = {**standalone, **variables, "ADSIDECAR_ADMIN__LISTEN": f"127.0.0.1:{admin}"}
    base = f"http://localhost:{port}/api/auth/amazon"
    with serving(["adsidecar"], environment, tmp_path):
        assert status_of(f"{base}/login") == 407
        command = request.replace("http://localhost:8001", f"http://localhost:{port}") + " --fail --silent"
        run = subprocess.run(
            ["bash", "-c", command],
            env={**environment, "TOKEN": token},
            capture_output=True,
            text=True,
            timeout=CURL_SECONDS,
        )
        assert run.returncode == 0 and json.loads(run.stdout)["auth_url"], run.stderr
        assert status_of(f"{base}/callback?code=any&state=any") == 400, (
            "state_invalid: the callback itself needs no token"
        )


def test_the_campaign_of_the_manual_runs(blocks, repository, target_directory, adsidecar):
    writer = target_directory / "debug" / "examples" / "store-writer"
    environment = {
        **os.environ,
        "ADSIDECAR_BIN": str(adsidecar),
        "ADSIDECAR_STORE_WRITER": str(writer),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    for line in "".join(block.text for block in marked(blocks, "campaign")).splitlines():
        words = line.replace("--cycles 100", "--cycles 12").split()
        assert words != line.split(), f"takes as long as by hand: {line}"
        run = subprocess.run(
            words, cwd=repository, env=environment, capture_output=True, text=True, timeout=SAMPLE_SECONDS
        )
        assert run.returncode == 0, f"{line}: {run.stdout}{run.stderr}"


def test_the_systemd_unit_is_valid_and_gives_it_time_to_end(blocks, adsidecar, tmp_path):
    [unit] = [block for block in blocks if block.mark == "systemd"]
    read = configparser.RawConfigParser(strict=False)
    read.optionxform = str
    read.read_string(unit.text)
    # Accept and drain by default, and the deadline of a refresh.
    assert int(read["Service"]["TimeoutStopSec"]) >= 0 + 25 + 12
    assert read["Service"]["ExecStart"].split()[1] == "--config"
    if shutil.which("systemd-analyze"):
        service = tmp_path / "adsidecar.service"
        service.write_text(unit.text.replace("/usr/local/bin/adsidecar", str(Path(adsidecar).resolve())))
        run = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", service], capture_output=True, text=True, timeout=CURL_SECONDS
        )
        said = [line for line in run.stderr.splitlines() if "adsidecar.service" in line]
        assert said == []


def test_the_lines_that_the_sandbox_prints_are_in_the_manuals(blocks, repository):
    source = (repository / "tests" / "sandbox" / "src" / "command.rs").read_text()
    listeners = {"proxy": "http://localhost:8001", "admin": "http://localhost:9464", "control": "http://127.0.0.1:8450"}
    printed = []
    for line in re.findall(r"^ *(curl \{.*?)(?:\\n)+\\$", source, re.MULTILINE):
        for listener, url in listeners.items():
            line = line.replace(f"{{{listener}}}", url)
        printed.append(line.replace("{{}}", "{}"))
    assert printed and set(printed) <= set(curl_lines(blocks))


def test_the_sandboxs_faults_are_those_of_the_code(manuals, repository):
    source = (repository / "tests" / "sandbox" / "src" / "fault.rs").read_text()
    known = set(re.findall(r'Self::\w+(?: \{ \.\. \})? => "(\w+)"', source))
    assert "rotate_refresh_token" in known
    table = section(manuals["config/README.md"], "The sandbox").partition("| `trouble` |")[2]
    shown = {re.match(r'[{"]*(\w+)', text)[1] for row in rows(table) for text in in_backticks(row[0])}
    assert shown == known


def test_every_fault_is_accepted_by_the_sandbox(manuals, sandbox):
    table = section(manuals["config/README.md"], "The sandbox").partition("| `trouble` |")[2]
    for fault in (text for row in rows(table) for text in in_backticks(row[0])):
        # No request meets it: nothing has this path.
        rule = {"trouble": json.loads(fault), "path": "/nothing", "when": "always"}
        assert status_of(f"{sandbox.control}/trouble", "POST", rule) == 201, fault
    assert status_of(f"{sandbox.control}/trouble", "DELETE") == 204


def status_of(url: str, method: str = "GET", data: object = None, **headers: str) -> int:
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(url, method=method, data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=CURL_SECONDS) as answer:
            return answer.status
    except urllib.error.HTTPError as refused:
        return refused.code
