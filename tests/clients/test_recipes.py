"""The clients of deploy/RECIPES.md, from its text: each reaches the right host of Amazon with the right headers, and
without a grant shows the login link."""

import json
import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import requests

REPOSITORY = Path(__file__).resolve().parents[2]
MANUAL = (REPOSITORY / "deploy" / "RECIPES.md").read_text()
RECIPES = dict(re.findall(r"^<!-- recipe: (\S+) -->\n```\w+\n(.*?)^```$", MANUAL, re.MULTILINE | re.DOTALL))
# These have tests of their own.
SPECIAL = {"app.py", "airbyte.sh"}
PROGRAMS = sorted(set(RECIPES) - SPECIAL)

# The sandbox's account for which the manual writes acme-de.
ACCOUNT = "meadow-tools-de"
# A Java compiler and Airbyte's connector start slowly on a busy machine.
LIMIT_SECONDS = 300


@pytest.fixture(scope="module")
def installed() -> Path:
    """Where tests/run has installed what the recipes use."""
    default = REPOSITORY / os.environ.get("CARGO_TARGET_DIR", "target") / "test-recipes"
    path = Path(os.environ.get("ADSIDECAR_TEST_RECIPES", default))
    if not (path / "node_modules" / "axios").is_dir():
        pytest.fail(f"no packages at {path}: run tests/run once, or set ADSIDECAR_TEST_RECIPES")
    return path.resolve()


def written(
    name: str, base: str, account: str, installed: Path, directory: Path, profile: str = "1234567890"
) -> Path:
    """A recipe as a file, with the address of a sandbox and the name and profile of one of its accounts."""
    text = RECIPES[name].replace("http://localhost:8001", base).replace("localhost:8001", base.removeprefix("http://"))
    assert text != RECIPES[name]
    (directory / name).write_text(text.replace("acme-de", account).replace("1234567890", profile))
    if name.endswith(".mjs"):
        (directory / "node_modules").symlink_to(installed / "node_modules")
    if name.startswith("dbt_"):
        return dbt_project(directory, directory / name)
    return directory / name


def dbt_project(directory: Path, model: Path) -> Path:
    """A project around a Python model, and the script that runs it and shows what it has made."""
    (directory / "models").mkdir()
    model.rename(directory / "models" / model.name)
    project = {"name": "ads", "profile": "ads", "flags": {"send_anonymous_usage_stats": False}}
    profile = {"ads": {"target": "dev", "outputs": {"dev": {"type": "duckdb", "path": "ads.duckdb"}}}}
    # JSON is YAML.
    (directory / "dbt_project.yml").write_text(json.dumps(project))
    (directory / "profiles.yml").write_text(json.dumps(profile))
    script = directory / "dbt.sh"
    show = f"dbt show --quiet --limit 100 --inline 'select name from {{{{ ref(\"{model.stem}\") }}}}'"
    script.write_text(f"dbt run --quiet\n{show}\n")
    return script


def run(file: Path, installed: Path, **variables: str) -> subprocess.CompletedProcess:
    """Runs a recipe."""
    command = {
        ".py": [installed / "python" / "bin" / "python"],
        ".mjs": ["node"],
        ".go": ["go", "run"],
        ".java": ["java"],
        ".php": ["php"],
        ".R": ["Rscript"],
        ".sh": ["bash", "-euo", "pipefail"],
    }[file.suffix]
    assert shutil.which(command[0]), f"tests/run installs {command[0]}"
    cache = {
        "HOME": os.environ.get("HOME", str(file.parent)),
        "GOCACHE": str(installed / "go-cache"),
        "GO111MODULE": "off",
    }
    path = f"{installed / 'dbt' / 'bin'}:{os.environ['PATH']}"
    environment = {"PATH": path, **cache, **variables}
    return subprocess.run(
        [*command, file], cwd=file.parent, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS
    )


def profile_of(sandbox, account: str) -> str:
    """The profile of an account, once the search that follows a login has found it. A search of one's own might end
    before that one, whose calls would then be among those of the client."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while True:
        answer = requests.get(f"{sandbox.proxy}/api/auth/amazon/accounts", timeout=30).json()
        if found := [one for one in answer["accounts"] if one["slug"] == account]:
            return found[0]["ids"]["profile_id"]
        assert time.monotonic() < deadline, answer
        time.sleep(0.05)


def calls(sandbox) -> list:
    return requests.get(f"{sandbox.control}/history", timeout=30).json()["calls"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_without_a_grant_each_client_fails_and_shows_the_login_link(name, sandbox_without_grant, installed, tmp_path):
    sandbox = sandbox_without_grant
    ended = run(written(name, sandbox.proxy, "default", installed, tmp_path), installed)
    shown = ended.stdout + ended.stderr
    assert ended.returncode != 0, shown
    # This SDK shows the code of an error alone.
    link = "login_required" if "scaleleap" in name else f"{sandbox.proxy}/api/auth/amazon/login?user_id=default"
    assert link in shown, shown
    assert not calls(sandbox), "nothing left"


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_client_reaches_the_host_of_the_account_with_its_headers(name, sandbox, installed, tmp_path):
    profile = profile_of(sandbox, ACCOUNT)
    requests.delete(f"{sandbox.control}/history", timeout=30)
    # The proxy of a machine that needs one for the Internet, as its administrator sets it.
    proxy = {"http_proxy": "http://127.0.0.1:9", "no_proxy": "localhost"}
    proxy |= {name.upper(): value for name, value in proxy.items()}
    ended = run(written(name, sandbox.proxy, ACCOUNT, installed, tmp_path, profile), installed, **proxy)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    made = calls(sandbox)
    assert len(made) == 1, made
    call, headers = made[0], dict(made[0]["headers"])
    assert call["door"] == "eu" and call["status"] == 200, call
    assert headers["authorization"].startswith("Bearer Atza|")
    assert headers["amazon-advertising-api-clientid"] == "amzn1.application-oa2-client.sandbox"
    assert not [header for header in headers if header.startswith("x-ads-")], "they never leave"
    if "campaigns" in name.lower():
        assert call["target"] == "/sp/campaigns/list"
        assert headers["amazon-advertising-api-scope"] == profile
        assert "Café – broad" in ended.stdout, "with every letter"
    else:
        assert call["target"] == "/v2/profiles" and "DE Meadow Tools DE\n" in ended.stdout


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def web_app(sandbox_without_grant, adsidecar, installed, tmp_path):
    """The FastAPI app, with an adsidecar that has a login listener as an Ingress would reach it. The base URLs of both,
    and of the login listener."""
    sandbox, ports = sandbox_without_grant, [free_port() for _ in range(4)]
    app, proxy, login, admin = (f"http://localhost:{port}" for port in ports)
    settings = {
        "proxy.listen": f"127.0.0.1:{ports[1]}",
        "login.listen": f"127.0.0.1:{ports[2]}",
        "admin.listen": f"127.0.0.1:{ports[3]}",
        "login.frontend_url": f"{app}/",
        "store.path": str(tmp_path / "store.sled"),
    }
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    environment = {"PATH": os.environ["PATH"]}
    serve = [adsidecar, "serve", "--config", sandbox.config, *sets]
    uvicorn = [installed / "python" / "bin" / "python", "-m", "uvicorn", "app:app", "--port", str(ports[0])]
    written("app.py", proxy, ACCOUNT, installed, tmp_path)
    with (tmp_path / "log").open("w") as log:
        processes = [
            subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
            for command in (serve, uvicorn)
        ]
        try:
            wait_until_served(f"{admin}/readyz", f"{app}/docs")
            yield app, proxy, login
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(30)


def wait_until_served(*urls: str) -> None:
    for url in urls:
        session = requests.Session()
        retries = requests.adapters.Retry(60, connect=60, backoff_factor=0.05, backoff_max=1)
        session.mount("http://", requests.adapters.HTTPAdapter(max_retries=retries))
        assert session.get(url, timeout=30).status_code == 200, url


def decide(auth_url: str, login: str, decision: str = "allow") -> str:
    """A person decides at the sandbox's consent page, and the browser returns to the login listener, as through an
    Ingress. Where adsidecar then sends the browser."""
    decided = requests.get(f"{auth_url}&decision={decision}", allow_redirects=False, timeout=30)
    callback = urlsplit(decided.headers["location"])
    url, headers = f"{login}{callback.path}?{callback.query}", {"Host": callback.netloc}
    back = requests.get(url, headers=headers, allow_redirects=False, timeout=30)
    assert back.status_code == 302, back.text
    return back.headers["location"]


def signed_in(app: str, user: str) -> requests.Session:
    browser = requests.Session()
    assert browser.post(f"{app}/sign_in", params={"user": user}, timeout=30).status_code == 200
    return browser


def begin(browser: requests.Session, app: str) -> str:
    """The address of Amazon's consent page, to which the app sends the browser."""
    sent = browser.get(f"{app}/connect", allow_redirects=False, timeout=30)
    assert sent.status_code == 307, sent.text
    return sent.headers["location"]


def test_the_web_app_connects_each_user_and_nobody_for_somebody_else(web_app):
    app, proxy, login = web_app
    assert requests.get(f"{app}/connect", allow_redirects=False, timeout=30).status_code == 401
    anna, mallory = signed_in(app, "anna"), signed_in(app, "mallory")

    # Mallory has Anna's browser finish his login: her account must not become his.
    begin(anna, app)
    lured = anna.get(decide(begin(mallory, app), login), timeout=30)
    assert lured.status_code == 403, lured.text
    state = requests.get(f"{proxy}/api/auth/amazon/status", params={"user_id": "mallory"}, timeout=30).json()["state"]
    assert state == "none"

    assert anna.get(f"{app}/profiles", allow_redirects=False, timeout=30).headers["location"] == "/connect"
    back = decide(begin(anna, app), login)
    assert back.startswith(f"{app}/connected?") and parse_qs(urlsplit(back).query)["status"] == ["pending"]
    assert anna.get(back, timeout=30).json() == {"connected": "anna"}
    assert [profile["countryCode"] for profile in anna.get(f"{app}/profiles", timeout=30).json()] == ["US", "CA"]
    assert mallory.get(f"{app}/profiles", allow_redirects=False, timeout=30).headers["location"] == "/connect"

    # Anna refuses the next time: the app says so, and her grant is as before.
    told = anna.get(decide(begin(anna, app), login, "deny"), timeout=30)
    assert (told.status_code, told.json()["detail"]) == (400, "access_denied")
    assert anna.get(f"{app}/profiles", timeout=30).status_code == 200


@pytest.fixture
def airbyte(installed, tmp_path) -> dict:
    """The variables with which the Airbyte recipe runs: the installed connector, a copy whose manifest it may change,
    and a pip that installs nothing."""
    package = next((installed / "airbyte").glob("lib/python*/site-packages/source_amazon_ads"))
    shutil.copytree(package, tmp_path / "packages" / package.name)
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "pip").symlink_to("/bin/true")
    return {
        "PATH": f"{programs}:{installed / 'airbyte' / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(tmp_path / "packages"),
    }


def test_airbytes_connector_shows_the_login_link_and_reads_nothing(sandbox_without_grant, airbyte, installed, tmp_path):
    sandbox = sandbox_without_grant
    ended = run(written("airbyte.sh", sandbox.proxy, ACCOUNT, installed, tmp_path), installed, **airbyte)
    assert '"status":"SUCCEEDED"' not in ended.stdout.replace(" ", ""), ended.stdout
    assert f"{sandbox.proxy}/api/auth/amazon/login?user_id=default" in ended.stdout + ended.stderr, (
        ended.stdout + ended.stderr
    )


def test_airbytes_connector_checks_its_connection_and_reads_from_the_region_of_its_setting(
    sandbox, airbyte, installed, tmp_path
):
    requests.delete(f"{sandbox.control}/history", timeout=30)
    script = written("airbyte.sh", sandbox.proxy, ACCOUNT, installed, tmp_path)
    stream = {"name": "profiles", "json_schema": {}, "supported_sync_modes": ["full_refresh"]}
    catalog = {"streams": [{"stream": stream, "sync_mode": "full_refresh", "destination_sync_mode": "overwrite"}]}
    (tmp_path / "catalog.json").write_text(json.dumps(catalog))
    [read] = re.findall(r"`(source-amazon-ads read .*?)`", MANUAL)
    script.write_text(f"{script.read_text()}\n{read}\n")
    ended = run(script, installed, **airbyte)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    messages = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    assert [one["connectionStatus"]["status"] for one in messages if one["type"] == "CONNECTION_STATUS"] == [
        "SUCCEEDED"
    ]
    countries = [one["record"]["data"]["countryCode"] for one in messages if one["type"] == "RECORD"]
    assert countries == ["UK", "DE"], ended.stdout
    served = calls(sandbox)
    assert {call["door"] for call in served} == {"eu"} and all(call["status"] == 200 for call in served), served


def test_the_versions_that_the_manual_names_are_those_that_are_run():
    here = Path(__file__).parent / "recipes"
    pinned = dict(
        re.findall(r"^([\w-]+)==(\S+)$", "\n".join(path.read_text() for path in here.glob("*.txt")), re.MULTILINE)
    )
    package = json.loads((here / "package.json").read_text())
    for name, version in (
        ("python-amazon-ad-api", pinned["python-amazon-ad-api"]),
        ("@scaleleap/amazon-advertising-api-sdk", package["dependencies"]["@scaleleap/amazon-advertising-api-sdk"]),
        ("source-amazon-ads", pinned["airbyte-source-amazon-ads"]),
        ("dbt-duckdb", pinned["dbt-duckdb"]),
    ):
        text = MANUAL.partition(name)[2]
        assert re.search(r"\((\d[\d.]+)\)", text)[1] == version, name
    for name, version in package["overrides"].items():
        assert f'"{name}": "{version}"' in MANUAL
