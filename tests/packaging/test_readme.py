"""The README is true: its curl lines are run, its tables are compared with the code and with a running sidecar."""

import json
import re
import subprocess
import tomllib
import urllib.error
import urllib.request
from http import HTTPStatus
from pathlib import Path

import pytest

# The two commands that a newcomer is shown first.
COMMANDS = ("cargo run --release --bin adsidecar-sandbox", "tests/run")

# A fenced block that is run, because this comment stands before it.
SANDBOX_BLOCK = re.compile(r"^ *<!-- sandbox -->\n *```sh\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
FENCED_BLOCK = re.compile(r"^ *```\w*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)

# No answer of the sandbox takes longer.
CURL_SECONDS = 30

# The http crate's names of status codes that Python calls otherwise.
PYTHON_NAMES = {
    "PAYLOAD_TOO_LARGE": "REQUEST_ENTITY_TOO_LARGE",
    "URI_TOO_LONG": "REQUEST_URI_TOO_LONG",
}


@pytest.fixture(scope="module")
def readme(repository) -> str:
    return (repository / "README.md").read_text()


def section(readme: str, title: str) -> str:
    """What stands below a heading, down to the next."""
    _, _, rest = readme.partition(f"\n## {title}\n")
    assert rest, f"the README has no section {title}"
    return rest.partition("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of all tables in a text, without their heads."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in lines]
    heads = {index - 1 for index, row in enumerate(cells) if set("".join(row)) == {"-"}}
    return [row for index, row in enumerate(cells) if index not in heads and index - 1 not in heads]


def in_backticks(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def curl_lines(readme: str) -> list[str]:
    blocks = SANDBOX_BLOCK.findall(readme)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip().startswith("curl ")]


def test_the_two_commands_stand_at_the_top_word_for_word(readme, repository):
    top = readme.partition("\n## ")[0]
    assert [line for line in "".join(FENCED_BLOCK.findall(top)).splitlines() if line] == list(COMMANDS)
    assert '[[bin]]\nname = "adsidecar-sandbox"' in (repository / "tests" / "sandbox" / "Cargo.toml").read_text()
    assert (repository / "tests" / "run").is_file()


def test_every_link_leads_somewhere(readme, repository):
    titles = re.findall(r"^#+ (.+)$", readme, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)]+)\)", readme):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("https://"):
            assert (repository / target).exists(), target


def test_every_curl_line_in_a_block_is_one_that_is_run(readme):
    shown = [line.strip() for block in FENCED_BLOCK.findall(readme) for line in block.splitlines()]
    assert [line for line in shown if line.startswith("curl ")] == curl_lines(readme)


def test_every_curl_line_gives_200_when_it_is_pasted(readme, sandbox):
    lines = curl_lines(readme)
    assert len(lines) > 10
    failed = []
    for line in lines:
        command = line
        for printed, real in (
            ("http://localhost:8001", sandbox.proxy),
            ("http://localhost:9464", sandbox.admin),
            ("http://127.0.0.1:8450", sandbox.control),
        ):
            command = command.replace(printed, real)
        assert command != line, f"goes to no door of the sandbox: {line}"
        command += " --silent --show-error --output /dev/null --write-out '%{http_code}'"
        run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=CURL_SECONDS)
        if (run.returncode, run.stdout) != (0, "200"):
            failed.append(f"{run.stdout} {run.stderr}: {line}")
    assert failed == []


def test_the_lines_that_the_sandbox_prints_are_in_the_readme_and_the_reverse(readme, repository):
    source = (repository / "tests" / "sandbox" / "src" / "command.rs").read_text()
    doors = {"proxy": "http://localhost:8001", "admin": "http://localhost:9464", "control": "http://127.0.0.1:8450"}
    printed = []
    for line in re.findall(r"^ *(curl \{.*?)(?:\\n)+\\$", source, re.MULTILINE):
        for door, url in doors.items():
            line = line.replace(f"{{{door}}}", url)
        printed.append(line.replace("{{}}", "{}"))
    assert printed and set(printed) <= set(curl_lines(readme))


def keys_of(example: str) -> dict[str, bool]:
    """The keys of config/example.toml, and whether each stands there with its default."""
    keys, section_name = {}, ""
    for line in example.splitlines():
        if header := re.match(r"#?\[\[?(\w+)\]\]?$", line):
            section_name = header[1] + "."
        elif key := re.match(r"(#?)(\w+) = ", line):
            keys[section_name + key[2]] = not key[1]
    return keys


def test_the_table_of_keys_is_complete_and_has_the_defaults(readme, repository):
    example = (repository / "config" / "example.toml").read_text()
    keys = keys_of(example)
    table = {row[0].strip("`"): row[1] for row in rows(section(readme, "Configuration"))}
    assert sorted(table) == sorted(keys)
    values = tomllib.loads(example)
    for key in (key for key, is_default in keys.items() if is_default):
        name, _, rest = key.partition(".")
        value = values[name][rest] if rest else values[name]
        shown = value if isinstance(value, str) else json.dumps(value)
        assert in_backticks(table[key]) == [shown], f"the default of {key}"


def test_the_table_of_names_in_the_environment_is_complete(readme, repository):
    source = (repository / "src" / "config" / "keys.rs").read_text()
    known = re.findall(r'^    (?:guide\("[\w.]+", |secret\("[\w.]+", Some\()"(\w+)"', source, re.MULTILINE)
    assert "FERNET_KEY" in known and "ENVIRONMENT" in known
    text = section(readme, "Configuration")
    assert [name for name in known if f"`{name}`" not in text] == []


def test_the_table_of_headers_names_the_paths_and_ids_of_each_family(readme, repository):
    source = (repository / "src" / "domain" / "api_families.rs").read_text().partition("static TABLE")[2].partition("\n];")[0]
    ids = {
        "Scope": "profile_id",
        "Marketplace": "marketplace_id",
        "Advertiser": "advertiser_id",
        "Entity": "entity_id",
        "Account": "account_id",
        "StreamAccount": "account_id",
        "DspAdvertiser": "dsp_advertiser_id",
        "AmcInstance": "amc_instance_id",
        "Manager": "manager_account_id",
        "AdmManager": "manager_account_id",
        "PartnerManager": "manager_account_id",
    }
    in_code = {}
    for paths, context in re.findall(r"paths: &\[(.*?)\],.*?context: &\[(.*?)\]", source, re.DOTALL):
        for path in re.findall(r'"([^"]+)"', paths):
            in_code[path] = {ids[name] for name in re.findall(r"\w+", context)}
    table = rows(section(readme, "Which headers are attached"))
    shown = {path: set(in_backticks(row[1])) for row in table for path in in_backticks(row[0])}
    assert shown == in_code


def test_the_table_of_error_codes_is_that_of_the_code(readme, repository):
    source = (repository / "src" / "inbound" / "problem.rs").read_text()
    facts = re.findall(r'\(StatusCode::(\w+), "(\w+)", (?:true|false)\)', source)
    in_code = {(HTTPStatus[PYTHON_NAMES.get(name, name)].value, code) for name, code in facts}
    assert len(in_code) > 15
    shown = {(int(row[0]), row[1].strip("`")) for row in rows(section(readme, "When a call fails"))}
    assert shown == in_code


def commands_of(run_adsidecar, *group: str) -> set[str]:
    """The commands that --help lists, those of a group by their full name."""
    told = run_adsidecar(*group, "--help").stdout.partition("Commands:\n")[2].partition("\n\n")[0]
    return {" ".join([*group, line.split()[0]]) for line in told.splitlines()}


def test_the_commands_are_those_of_the_program(readme, run_adsidecar):
    groups = {"users", "key", "store"}
    told = commands_of(run_adsidecar)
    assert groups <= told
    told = (told - groups).union(*(commands_of(run_adsidecar, group) for group in groups))
    table = [in_backticks(row[0]) for row in rows(section(readme, "Commands"))]
    shown = {command.removeprefix("adsidecar").strip() for cell in table for command in cell}
    # Without its arguments, and without `adsidecar` alone, which serves.
    names = [re.match(r"(?:(?:users|key|store) )?[a-z]+", command) for command in shown]
    assert {name[0] for name in names if name} == told


def status_of(url: str, method: str = "GET", data: object = None, **headers: str) -> int:
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(url, method=method, data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=CURL_SECONDS) as answer:
            return answer.status
    except urllib.error.HTTPError as refused:
        return refused.code


def exported(sandbox) -> set[str]:
    with urllib.request.urlopen(f"{sandbox.admin}/metrics", timeout=CURL_SECONDS) as answer:
        return set(re.findall(r"^# TYPE (\w+) ", answer.read().decode(), re.MULTILINE))


def stir(sandbox) -> None:
    """Makes happen what each metric with labels waits for."""
    calls = f"{sandbox.proxy}/v2/profiles"
    assert status_of(f"{sandbox.proxy}/api/auth/amazon/refresh", "POST") == 200
    assert status_of(calls, Origin="http://elsewhere.test") == 403
    rule = {"trouble": {"status": {"code": 401}}, "door": "na", "when": {"next": 1}}
    assert status_of(f"{sandbox.control}/trouble", "POST", rule) == 201
    assert status_of(calls) == 200, "the 401 was cured by a new token"
    # The store cannot delete a user's second copy while a directory stands in its place.
    copies = Path(f"{sandbox.store}.copies").glob("*.json")
    (copy,) = (copy for copy in copies if copy.name != "notes.json")
    copy.unlink()
    copy.mkdir()
    try:
        assert status_of(f"{sandbox.proxy}/api/auth/amazon/logout?user_id=default", "POST") == 503
    finally:
        copy.rmdir()


def test_the_table_of_metrics_is_what_a_running_sidecar_exports(readme, sandbox):
    stir(sandbox)
    shown = [in_backticks(row[0])[0].partition("{")[0] for row in rows(section(readme, "Metrics"))]
    seen = {name for name in exported(sandbox) if not name.startswith("adsidecar_process_")}
    assert sorted(shown) == sorted(seen)
