"""`adsidecar doctor` names a cure for each fault, and the cure works: a fault is injected, the cure is carried out word
for word (its command is run, or the key that it names is corrected and no other), and the doctor finds the fault no
more.
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import threading
import tomllib
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

LIMIT_SECONDS = 90
OTHER_KEY = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
# A key of the configuration in the text of a cure.
KEY = re.compile(r"\b(?:amazon|proxy|login|admin|store|refresh|upstream|throttle|notify|log|shutdown)\.\w+\b")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclass
class Installation:
    """A configuration and an environment, which a test breaks and a cure mends."""

    adsidecar: Path
    directory: Path
    settings: dict
    accounts: list = field(default_factory=list)
    environment: dict = field(default_factory=dict)
    # In place of what the settings say.
    text: str | None = None
    # Before the command, to run it as another user.
    wrapper: list = field(default_factory=list)

    @property
    def file(self) -> Path:
        return self.directory / "adsidecar.toml"

    def write(self) -> None:
        lines = []
        for section in sorted({key.partition(".")[0] for key in self.settings if "." in key}):
            own = {
                key.partition(".")[2]: value for key, value in self.settings.items() if key.startswith(f"{section}.")
            }
            lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in own.items())]
        for account in self.accounts:
            lines += ["[[account]]", *(f"{key} = {json.dumps(value)}" for key, value in account.items())]
        top = [f"{key} = {json.dumps(value)}" for key, value in self.settings.items() if "." not in key]
        text = "\n".join(top + lines) + "\n"
        if not self.file.exists() or self.file.read_text() != (self.text or text):
            self.file.write_text(self.text or text)

    def run(self, *words: str, **more) -> subprocess.CompletedProcess:
        self.write()
        environment = {"PATH": f"{self.adsidecar.parent}:{os.environ['PATH']}", **self.environment}
        return subprocess.run(
            [*self.wrapper, *words], cwd=self.directory, env=environment, capture_output=True, text=True,
            timeout=LIMIT_SECONDS, **more,
        )

    def shell(self, line: str, **more) -> str:
        """A command as a person would type it here, with the file in ADSIDECAR_CONFIG."""
        self.environment["ADSIDECAR_CONFIG"] = str(self.file)
        ended = self.run("bash", "-euo", "pipefail", "-c", line, **more)
        assert ended.returncode == 0, f"{line}: {ended.stdout}{ended.stderr}"
        return ended.stdout

    def wrong(self, *words: str) -> dict[str, dict]:
        """What the doctor finds, by its codes."""
        ended = self.run(str(self.adsidecar), "doctor", "-o", "json", "--config", str(self.file), *words)
        assert ended.stdout, ended.stderr
        checks = [check for group in json.loads(ended.stdout)["groups"] for check in group["checks"]]
        return {check["code"]: check for check in checks if check["status"] in ("warn", "fail")}


def base_of(sandbox) -> tuple[dict, list]:
    """The sandbox's configuration as settings and accounts."""
    config = tomllib.loads(Path(sandbox.config).read_text())
    settings = {}
    for name, value in config.items():
        if isinstance(value, dict):
            settings |= {f"{name}.{key}": one for key, one in value.items()}
        elif name != "account":
            settings[name] = value
    return settings, config["account"]


@pytest.fixture
def beside(adsidecar, sandbox, tmp_path) -> Installation:
    """An installation whose sidecar runs: the sandbox's."""
    settings, accounts = base_of(sandbox)
    made = Installation(Path(adsidecar).resolve(), tmp_path, settings, accounts)
    made.write()
    made.file.chmod(0o600)
    return made


@pytest.fixture
def stopped(beside, sandbox) -> Installation:
    """An installation whose sidecar does not run, with a store of its own in which `default` has a grant."""
    beside.settings |= {
        "proxy.listen": f"127.0.0.1:{free_port()}",
        "admin.listen": f"127.0.0.1:{free_port()}",
        "store.path": str(beside.directory / "own.sled"),
        "store.fernet_keys": sandbox.fernet_key,
    }
    import_grant(beside, sandbox, "default")
    return beside


def test_after_the_commands_of_the_readme_the_doctor_warns_of_nothing(adsidecar, sandbox):
    command = [str(adsidecar), "doctor", "-o", "json", "--fail-on", "warn", "--config", sandbox.config]
    environment = {"PATH": os.environ["PATH"]}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    checks = [check for group in json.loads(ended.stdout)["groups"] for check in group["checks"]]
    assert [check for check in checks if check["status"] not in ("ok", "skipped")] == []
    assert ended.returncode == 0 and "secrets" in [check["code"] for check in checks], ended.stderr


def import_grant(installation: Installation, sandbox, user: str) -> None:
    token = control(sandbox, "POST", "/consent", {"want": "grant"})["refresh_token"]
    ended = installation.run(
        str(installation.adsidecar), "--config", str(installation.file), "users", "import", "--user", user, "--offline",
        input=token,
    )
    assert ended.returncode == 0, ended.stderr


def control(sandbox, method: str, path: str, body: object = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(sandbox.control + path, method=method, data=data)
    with urllib.request.urlopen(request, timeout=LIMIT_SECONDS) as answer:
        return json.loads(answer.read() or b"null")


@contextmanager
def serving(installation: Installation) -> Iterator[None]:
    # A file of its own: a running sidecar reads one that changes again.
    installation.write()
    own = installation.directory / "serving.toml"
    own.write_text(installation.file.read_text())
    own.chmod(0o600)
    variables = {**installation.environment, "ADSIDECAR_CONFIG": str(own)}
    environment = {"PATH": f"{installation.adsidecar.parent}:{os.environ['PATH']}", **variables}
    with (installation.directory / "log").open("w") as log:
        process = subprocess.Popen(
            ["adsidecar", "serve"], cwd=installation.directory, env=environment, stdout=log, stderr=log
        )
    try:
        wait = ["adsidecar", "wait", "--timeout", f"{LIMIT_SECONDS}s"]
        subprocess.run(wait, env=environment, check=True, timeout=2 * LIMIT_SECONDS)
        yield
    finally:
        process.terminate()
        process.wait(LIMIT_SECONDS)


def log_in(installation: Installation, command: str) -> None:
    """Runs a login that a cure names; its browser consents."""
    browser = installation.directory / "browser"
    browser.write_text('#!/bin/sh\nexec curl --silent --location --output /dev/null "$1&decision=allow"\n')
    browser.chmod(0o755)
    installation.environment["BROWSER"] = str(browser)
    assert "is logged in" in installation.shell(command)


def restore(installation: Installation, cure: str, right: dict) -> None:
    """Corrects the first key that a cure names, or all where it is a list, and no other. `right` has its value; a key
    without one is removed."""
    of_account = re.match(r'(?P<key>\w+)(?: = "(?P<value>\w+)")? of the account (?P<name>[\w-]+)', cure)
    if of_account:
        [account] = [one for one in installation.accounts if one["name"] == of_account["name"]]
        value = of_account["value"] or right.get(of_account["key"])
        account.pop(of_account["key"], None)
        if value is not None:
            account[of_account["key"]] = value
        return
    if re.fullmatch(rf"{KEY.pattern}(?:, {KEY.pattern})+", cure):
        for key in cure.split(", "):
            restore(installation, key, right)
        return
    key = KEY.search(cure)
    assert key, f"the cure names neither a command nor a key: {cure}"
    exact = re.search(rf'{re.escape(key[0])} = "([^"]+)"', cure)
    value = exact[1] if exact else right.get(key[0])
    if command := re.search(r"\((openssl [^)]+)\)", cure):
        value = installation.shell(command[1]).strip()
    installation.settings.pop(key[0], None)
    if value is not None:
        installation.settings[key[0]] = value


def show(installation: Installation, code: str, *words: str) -> str:
    """The cure of a fault, which has to be found."""
    found = installation.wrong(*words)
    assert code in found, f"{code} is not among {sorted(found)}"
    return found[code]["cure"]


def green(installation: Installation, code: str, *words: str) -> None:
    assert code not in installation.wrong(*words), f"{code} is still there after its cure"


# Code, keys with a wrong value, and where the right one is not that of the base, the right one.
BY_KEY = [
    ("config_unknown_key", {"proxy.port": 1}, {}),
    ("config_value", {"refresh.margin": "soon"}, {}),
    ("config_client_id", {"amazon.client_id": "a b"}, {}),
    ("config_client_secret", {"amazon.client_secret": "can ary"}, {}),
    ("config_redirect_uri", {"environment": "production", "amazon.redirect_uri": "http://app.example.com/cb"}, {}),
    ("config_listen", {"proxy.listen": "0.0.0.0:8001"}, {}),
    ("config_doubtful", {"amazon.redirect_uri": "http://localhost:8001/elsewhere"}, {}),
    ("secret_file_unreadable", {"store.fernet_keys": None, "store.fernet_keys_file": "/nowhere/key"}, {}),
    ("store_unwritable", {"store.path": "/proc/adsidecar/store"}, {}),
    ("store_key_wrong", {"store.fernet_keys": OTHER_KEY}, {}),
    ("store_postgres", {"store.kind": "postgres", "store.postgres_url": "postgres://u:canary@127.0.0.1:1/x"}, None),
    ("caller_token_short", {"proxy.caller_token": "short"}, {}),
]


@pytest.mark.parametrize(("code", "wrong", "right"), BY_KEY, ids=[case[0] for case in BY_KEY])
def test_the_key_that_the_cure_names_is_the_one_to_correct(code, wrong, right, stopped, sandbox):
    # Nothing is bound; a redirect URI at another port would be doubtful.
    stopped.settings["proxy.listen"] = sandbox.proxy.replace("http://localhost", "127.0.0.1")
    healthy = dict(stopped.settings)
    assert stopped.wrong("--pre") == {}
    stopped.settings |= {key: value for key, value in wrong.items() if value is not None}
    for key in [key for key, value in wrong.items() if value is None]:
        del stopped.settings[key]
    cure = show(stopped, code, "--pre")
    if right is None:
        # There is no PostgreSQL here: the cure names the URL, and the previous store needs none.
        assert cure == "store.postgres_url"
        stopped.settings = healthy
    else:
        restore(stopped, cure, healthy | right)
    green(stopped, code, "--pre")


def test_a_cure_that_names_another_key_would_be_noticed(stopped):
    """Known-bad: what these tests do with a cure mends nothing but what the cure names."""
    healthy = dict(stopped.settings)
    stopped.settings["refresh.margin"] = "soon"
    for cure in ("refresh.sweep", "adsidecar doctor --pre || true"):
        if cure.startswith("adsidecar"):
            stopped.shell(cure)
        else:
            restore(stopped, cure, healthy)
        with pytest.raises(AssertionError, match="is still there"):
            green(stopped, "config_value", "--pre")
    with pytest.raises(AssertionError, match="neither a command nor a key"):
        restore(stopped, "look again", healthy)


def test_a_file_that_is_no_toml_is_shown_by_the_command_that_the_cure_names(stopped):
    stopped.text = "[amazon\n"
    cure = show(stopped, "config_file", "--pre")
    ended = stopped.run("bash", "-c", cure.replace("FILE", shlex.quote(str(stopped.file))))
    assert ended.returncode == 78 and "line 1" in ended.stderr, ended.stderr
    stopped.text = None
    green(stopped, "config_file", "--pre")


ACCOUNTS = [
    ("config_account", {"name": "a b"}),
    ("account_id_kind", {"name": "shop", "profile_id": "ENTITY1"}),
    ("account_region", {"name": "shop", "region": "fe", "marketplace_id": "A1PA6795UKMFR9"}),
]


@pytest.mark.parametrize(("code", "account"), ACCOUNTS, ids=[case[0] for case in ACCOUNTS])
def test_an_account_is_corrected_as_the_cure_says(code, account, stopped):
    stopped.accounts.append(account)
    cure = show(stopped, code, "--pre")
    if code == "config_account":
        assert cure.startswith("[[account]]") and "name" in cure, cure
        account["name"] = "ab"
    else:
        restore(stopped, cure, {})
    green(stopped, code, "--pre")


@pytest.mark.parametrize("code", ["fernet_key_missing", "fernet_key_malformed"])
def test_a_fernet_key_is_made_by_the_command_of_the_cure(code, stopped):
    del stopped.settings["store.fernet_keys"]
    stopped.settings |= {"environment": "production", "store.path": str(stopped.directory / "new.sled")}
    if code == "fernet_key_malformed":
        stopped.environment["FERNET_KEY"] = "canary-key"
    cure = show(stopped, code, "--pre")
    stopped.environment["FERNET_KEY"] = stopped.shell(f'{cure}; printf %s "$FERNET_KEY"')
    green(stopped, code, "--pre")


def test_an_open_file_is_closed_by_the_command_of_the_cure(stopped):
    stopped.file.chmod(0o644)
    stopped.shell(show(stopped, "secret_file_open", "--pre"))
    green(stopped, "secret_file_open", "--pre")


def test_an_open_socket_is_closed_by_the_value_of_the_cure(stopped):
    stopped.settings |= {"proxy.listen": f"unix:{stopped.directory}/proxy.sock", "proxy.socket_mode": "0666"}
    restore(stopped, show(stopped, "socket_open", "--pre"), {})
    assert stopped.settings["proxy.socket_mode"] == "0660"
    green(stopped, "socket_open", "--pre")


def test_what_does_not_suit_a_pod_is_cured(stopped, tmp_path_factory):
    stopped.environment["KUBERNETES_SERVICE_HOST"] = "10.0.0.1"
    stopped.settings["store.path"] = "/adsidecar-doctor-test/store.sled"
    cure = show(stopped, "pod_store_ephemeral", "--pre")
    assert os.stat("/dev/shm").st_dev != os.stat("/").st_dev, "as a mounted volume"
    restore(stopped, cure, {"store.path": f"/dev/shm/adsidecar-doctor-test-{os.getpid()}"})
    green(stopped, "pod_store_ephemeral", "--pre")

    cure = show(stopped, "pod_probe", "--pre")
    assert cure.startswith("exec: [adsidecar, health]")
    restore(stopped, cure, {})
    assert stopped.settings["admin.listen"] == "0.0.0.0:9464"
    green(stopped, "pod_probe", "--pre")

    if os.geteuid() == 0:
        assert show(stopped, "pod_root", "--pre") == "securityContext.runAsNonRoot: true"
        # What the kubelet then does: the process has another user. That user's directory is one that it can read.
        directory = tmp_path_factory.mktemp("nobody")
        for place in (directory, *directory.parents[:2]):
            place.chmod(0o755)
        stopped.directory = directory
        # The binary may lie where only root looks.
        stopped.adsidecar = Path(shutil.copy(stopped.adsidecar, directory))
        stopped.write()
        os.chown(stopped.file, 65534, 65534)
        stopped.file.chmod(0o600)
        stopped.wrapper = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    green(stopped, "pod_root", "--pre")


def test_a_damaged_store_is_restored_by_the_command_of_the_cure(stopped):
    database = Path(stopped.settings["store.path"]) / "db"
    database.write_bytes(b"\xff" * database.stat().st_size)
    assert show(stopped, "store_damaged", "--pre") == "adsidecar serve"
    with serving(stopped):
        pass
    green(stopped, "store_damaged", "--pre")


def test_records_of_a_lost_key_are_readable_with_the_key_that_the_cure_asks_for(stopped, sandbox):
    old = stopped.settings["store.fernet_keys"]
    stopped.settings["store.fernet_keys"] = [OTHER_KEY, old]
    import_grant(stopped, sandbox, "two")
    stopped.settings["store.fernet_keys"] = OTHER_KEY
    restore(stopped, show(stopped, "store_records_unreadable", "--pre"), {"store.fernet_keys": [OTHER_KEY, old]})
    green(stopped, "store_records_unreadable", "--pre")


def test_a_store_that_another_process_holds_is_diagnosed_with_the_configuration_of_that_process(stopped):
    with serving(stopped):
        healthy = stopped.settings
        stopped.settings = {**healthy, "proxy.listen": "127.0.0.1:1"}
        cure = show(stopped, "store_held")
        assert cure.startswith("adsidecar doctor --config FILE"), cure
        stopped.settings = healthy
        green(stopped, "store_held")


def test_a_sidecar_that_does_not_run_is_started_by_the_command_of_the_cure(stopped):
    assert show(stopped, "not_running") == "adsidecar serve"
    with serving(stopped):
        green(stopped, "not_running")


class Stub(threading.Thread):
    """A listener that accepts connections and sends an answer, or nothing."""

    def __init__(self, answer: bytes):
        super().__init__(daemon=True)
        self.answer, self.open = answer, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.start()

    def run(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            self.open.append(connection)
            if self.answer:
                connection.recv(4096)
                connection.sendall(self.answer)
                connection.close()


def closing(status: str, body: str) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()


ONLINE = [
    ("dns", lambda: {"amazon.token_url": "https://no-such-host.invalid/auth/o2/token"}),
    ("unreachable", lambda: {"upstream.eu": "https://127.0.0.1:1"}),
    ("connect_timeout", lambda: {"upstream.fe": f"https://{Stub(b'').address}"}),
    ("mcp_unreachable", lambda: {"upstream.mcp_eu": "https://127.0.0.1:1"}),
    ("outgoing_proxy", lambda: {"upstream.proxy": "http://127.0.0.1:1"}),
    ("outgoing_proxy", lambda: {"amazon.proxy": f"http://{Stub(closing('403 Forbidden', 'no')).address}"}),
    ("tls", lambda: {"upstream.ca_file": None}),
    ("invalid_client", lambda: {"amazon.client_secret": "amzn1.oa2-cs.v1.wrong"}),
    ("redirect_uri_refused", lambda: {"amazon.redirect_uri": "http://localhost:9/api/auth/amazon/callback"}),
    ("caller_token_refused", lambda: {"proxy.caller_token": "another-token-of-enough-length"}),
    ("port_taken", lambda: {"proxy.listen": Stub(closing("200 OK", "hi")).address}),
    ("not_ready", lambda: {"admin.listen": Stub(closing("503 Service Unavailable", "starting\n")).address}),
]


@pytest.mark.parametrize(("code", "fault"), ONLINE, ids=[case[0] for case in ONLINE])
def test_what_is_wrong_on_the_way_is_cured_by_the_key_or_the_command_that_the_cure_names(code, fault, stopped, sandbox):
    if code == "caller_token_refused":
        stopped.settings["proxy.caller_token"] = "one-token-of-enough-length"
    if code in ("caller_token_refused", "not_ready"):
        with serving(stopped):
            cured_by_the_way(code, fault(), stopped)
    else:
        cured_by_the_way(code, fault(), stopped)


def cured_by_the_way(code: str, fault: dict, stopped: Installation) -> None:
    healthy = dict(stopped.settings)
    stopped.settings |= fault
    stopped.settings = {key: value for key, value in stopped.settings.items() if value is not None}
    cure = show(stopped, code)
    if code == "not_ready":
        assert cure == "adsidecar health --ready"
        refused = stopped.run("bash", "-c", f"{cure} --config {stopped.file}")
        assert refused.returncode == 1 and "starting" in refused.stdout + refused.stderr, refused
        stopped.settings = healthy
    elif code == "dns":
        command, _, key = cure.partition("; ")
        assert stopped.run("bash", "-c", command).returncode == 2, "getent finds no such host"
        restore(stopped, key, healthy)
    elif code == "redirect_uri_refused":
        assert "Allowed Return URLs" in cure and stopped.settings["amazon.redirect_uri"] in cure
        # The sandbox's security profile has the other one.
        stopped.settings = healthy
    else:
        restore(stopped, cure, healthy)
    green(stopped, code)


def test_a_clock_that_differs_is_cured_by_setting_it(beside, sandbox):
    for seconds, code in ((120, "clock_skew"), (600, "clock_wrong")):
        control(sandbox, "POST", "/clock", {"advance": f"{seconds}s"})
        try:
            assert show(beside, code) == "timedatectl set-ntp true"
        finally:
            # What time synchronization does, from the other side.
            control(sandbox, "POST", "/clock", {"advance": f"-{seconds}s"})
        green(beside, code)


def test_a_missing_login_is_made_by_the_command_of_the_cure(adsidecar, sandbox_without_grant, tmp_path):
    settings, accounts = base_of(sandbox_without_grant)
    installation = Installation(Path(adsidecar).resolve(), tmp_path, settings, accounts)
    cure = show(installation, "nobody_logged_in")
    log_in(installation, cure)
    green(installation, "nobody_logged_in")

    installation.accounts.append({"name": "annas", "user": "anna"})
    log_in(installation, show(installation, "account_user"))
    green(installation, "account_user")

    control(sandbox_without_grant, "POST", "/revoke", {})
    for user in ("default", "anna"):
        [cure] = [
            finding["cure"] for finding in everything(installation)
            if finding["code"] == "login_required" and finding["cause"].startswith(f"{user}:")
        ]
        log_in(installation, cure)
    green(installation, "login_required")

    control(sandbox_without_grant, "POST", "/clock", {"advance": "8160h"})
    log_in(installation, "adsidecar login --user anna --again")
    log_in(installation, show(installation, "consent_ending"))
    green(installation, "consent_ending")


def everything(installation: Installation) -> list[dict]:
    """Every finding, where a code may be found for several users."""
    ended = installation.run(str(installation.adsidecar), "doctor", "-o", "json", "--config", str(installation.file))
    return [check for group in json.loads(ended.stdout)["groups"] for check in group["checks"]]


TROUBLES = [
    ("region_unauthorized", {"trouble": "token_unauthorized", "door": "eu", "path": "/v2/profiles", "when": "always"}),
    (
        "region_forbidden",
        {"trouble": {"status": {"code": 403}}, "door": "fe", "path": "/v2/profiles", "when": "always"},
    ),
    (
        "region_throttled",
        {"trouble": {"status": {"code": 429}}, "door": "na", "path": "/v2/profiles", "when": "always"},
    ),
    ("region_failed", {"trouble": {"status": {"code": 500}}, "door": "na", "path": "/v2/profiles", "when": "always"}),
    ("lwa_unavailable", {"trouble": {"status": {"code": 503}}, "door": "lwa", "path": "/auth/", "when": "always"}),
    ("refresh_failed", {"trouble": {"status": {"code": 503}}, "door": "lwa", "path": "/auth/", "when": "always"}),
]


@pytest.mark.parametrize(("code", "rule"), TROUBLES, ids=[case[0] for case in TROUBLES])
def test_what_amazon_refuses_is_over_when_the_command_of_the_cure_says_so(code, rule, beside, sandbox):
    control(sandbox, "POST", "/trouble", rule)
    try:
        cure = show(beside, code)
    finally:
        control(sandbox, "DELETE", "/trouble")
    if code == "region_unauthorized":
        log_in(beside, cure)
    elif code == "region_forbidden":
        assert "apply for access" in cure, cure
    else:
        command = re.match(r"adsidecar \w+", cure)[0]
        beside.environment["ADSIDECAR_CONFIG"] = str(beside.file)
        # After a failure the sidecar waits for a moment before it tries again.
        for _ in range(LIMIT_SECONDS):
            ended = beside.run("bash", "-c", command)
            if ended.returncode == 0 and (command != "adsidecar status" or "failing" not in ended.stdout):
                break
        assert ended.returncode == 0, ended.stdout
    green(beside, code)


def test_a_profile_that_the_user_does_not_reach_is_replaced_by_one_of_the_list(beside, sandbox):
    beside.accounts.append({"name": "shop", "profile_id": "1"})
    cure = show(beside, "account_profile_unknown")
    key, _, command = cure.partition(": ")
    beside.environment["ADSIDECAR_CONFIG"] = str(beside.file)
    listed = json.loads(beside.shell(f"{command} -o json"))
    [profile] = [one["ids"]["profile_id"] for one in listed if one["slug"] == "meadow-tools-ca"]
    restore(beside, key, {"profile_id": profile})
    green(beside, "account_profile_unknown")


def test_every_code_of_the_manual_is_injected_by_a_test(repository):
    manual = (repository / "deploy/README.md").read_text()
    table = manual.partition("<!-- generated: doctor -->")[2].partition("<!-- end -->")[0]
    codes = re.findall(r"^\| [^|]+ \| `(\w+)`", table, re.MULTILINE)
    assert len(codes) >= 52
    tests = Path(__file__).read_text() + (repository / "tests/e2e/doctor.rs").read_text()
    assert [code for code in codes if f'"{code}"' not in tests] == []
