"""A real Prometheus scrapes a running sidecar with the shipped configuration, and every query of the rules and of the
dashboard is put to it."""

import json
import re
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml

# The alerts by name; each is a promise to the person on call.
ALERTS = {
    "AdsLoginRequired",
    "AdsConsentEndsSoon",
    "AdsTokenRefreshFailing",
    "AdsTokenExpired",
    "AdsClientRejected",
    "AdsStoreDown",
    "AdsStoreLag",
    "AdsThrottled",
    "AdsThrottleRefuses",
    "AdsUpstreamErrors",
    "AdsSidecarDown",
    "AdsKeyMismatch",
}
# A short scrape interval, so that a rate soon has its two points.
INTERVAL = "1s"
SECONDS = 40

NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def ask(
    url: str, method: str = "GET", data: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, str]:
    request = urllib.request.Request(url, data=data, method=method, headers=headers or {})
    try:
        with NO_PROXY.open(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read().decode()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def shipped(repository) -> Path:
    return repository / "deploy" / "prometheus"


@pytest.fixture(scope="module")
def rules(shipped) -> list[dict]:
    [group] = yaml.safe_load((shipped / "alerts.yaml").read_text())["groups"]
    return group["rules"]


@pytest.fixture(scope="module")
def dashboard(repository) -> dict:
    return json.loads((repository / "deploy" / "kubernetes" / "monitoring" / "adsidecar.json").read_text())


def queries_of(dashboard: dict) -> list[tuple[str, str]]:
    """The title of the panel and the query, its variables replaced as Grafana does for "All"."""
    pairs = [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel.get("targets", [])]
    return [(title, q.replace("$instance", ".*").replace("$__rate_interval", "30s")) for title, q in pairs]


def selectors(query: str) -> list[str]:
    """Every metric that a query uses, with its labels."""
    return re.findall(r"\b((?:adsidecar_\w+|up)(?:\{[^}]*\})?)", query)


def promtool(*words: object, stdin: str | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(["promtool", *map(str, words)], input=stdin, capture_output=True, text=True)


@pytest.fixture(scope="module")
def stirred(sandbox):
    """A sidecar with some history: requests, rejections, a refresh, a throttled request."""
    calls = f"{sandbox.proxy}/v2/profiles"
    assert ask(calls)[0] == 200
    # The search for accounts after the first login asks Amazon too, and would take the troubles below for itself.
    deadline = time.monotonic() + SECONDS
    while not json.loads(ask(f"{sandbox.proxy}/api/auth/amazon/accounts")[1])["sync"]:
        assert time.monotonic() < deadline, "the accounts were not searched for"
        time.sleep(0.05)
    assert ask(calls, headers={"Origin": "http://elsewhere.test"})[0] == 403
    for code, seen in ((401, 200), (429, 429), (503, 503)):
        rule = {"trouble": {"status": {"code": code}}, "door": "na", "when": {"next": 1}}
        headers = {"Content-Type": "application/json"}
        assert ask(f"{sandbox.control}/trouble", "POST", json.dumps(rule).encode(), headers)[0] == 201
        assert ask(calls)[0] == seen, f"Amazon answered {code}"
    assert ask(f"{sandbox.proxy}/sandbox/status/207")[0] == 207
    assert ask(f"{sandbox.proxy}/api/auth/amazon/refresh", "POST")[0] == 200
    return sandbox


@pytest.fixture(scope="module")
def prometheus(stirred, shipped, tmp_path_factory):
    """The shipped configuration, with the sandbox as its target and a shorter interval."""
    directory = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((shipped / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": INTERVAL, "evaluation_interval": INTERVAL}
    config["rule_files"] = [str(shipped / name) for name in config["rule_files"]]
    [scrape] = config["scrape_configs"]
    assert scrape["static_configs"] == [{"targets": ["localhost:9464"]}], "the default address of the admin listener"
    scrape["scrape_timeout"] = INTERVAL
    scrape["static_configs"] = [{"targets": [stirred.admin.removeprefix("http://")]}]
    (directory / "prometheus.yaml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = [
        "prometheus",
        f"--config.file={directory / 'prometheus.yaml'}",
        f"--storage.tsdb.path={directory / 'data'}",
    ]
    command += [f"--web.listen-address={address}", "--log.level=warn"]
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)

    def query(text: str) -> list[dict]:
        status, answer = ask(f"http://{address}/api/v1/query?{urllib.parse.urlencode({'query': text})}")
        assert status == 200, f"{text}: {answer}"
        return json.loads(answer)["data"]["result"]

    def samples() -> float:
        try:
            # It listens before it can answer queries.
            if ask(f"http://{address}/-/ready")[0] != 200:
                return 0
            return max((float(one["value"][1]) for one in query("count_over_time(up[5m])")), default=0)
        except OSError:
            assert process.poll() is None, (directory / "log").read_text()
            return 0

    deadline = time.monotonic() + SECONDS
    while samples() < 3:
        assert time.monotonic() < deadline, "it does not scrape: " + (directory / "log").read_text()
        assert ask(f"{stirred.proxy}/v2/profiles")[0] == 200
        time.sleep(0.1)
    yield query
    process.terminate()
    process.wait(20)


def test_prometheus_own_tool_finds_nothing_wrong(stirred, shipped):
    for checked in (
        promtool("check", "config", shipped / "prometheus.yaml"),
        promtool("check", "rules", shipped / "alerts.yaml"),
    ):
        assert checked.returncode == 0 and "WARNING" not in checked.stdout + checked.stderr, (
            checked.stdout + checked.stderr
        )
    status, text = ask(f"{stirred.admin}/metrics")
    assert status == 200
    checked = promtool("check", "metrics", stdin=text)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_each_alert_fires_when_it_should_and_not_before(shipped):
    cases = shipped / "alerts_test.yaml"
    tested = promtool("test", "rules", cases)
    assert tested.returncode == 0, tested.stdout + tested.stderr
    text = cases.read_text()
    assert set(re.findall(r"^  - name: (Ads\w+)$", text, re.MULTILINE)) >= ALERTS


@pytest.mark.parametrize(
    "changed", [("> 0.05", "> 0.5"), ("for: 5m", "for: 1m"), ("30 * 86400", "20 * 86400"), ("unless on", "and on")]
)
def test_the_cases_see_a_rule_that_is_wrong(shipped, tmp_path, changed):
    rules = (shipped / "alerts.yaml").read_text()
    assert changed[0] in rules
    (tmp_path / "alerts.yaml").write_text(rules.replace(*changed))
    (tmp_path / "test.yaml").write_text((shipped / "alerts_test.yaml").read_text())
    assert promtool("test", "rules", tmp_path / "test.yaml").returncode != 0


def test_each_alert_says_how_bad_it_is_what_follows_and_what_to_do(rules, repository):
    runbook = (repository / "deploy" / "RUNBOOK.md").read_text()
    titles = {title.lower(): title for title in re.findall(r"^## (\w+)$", runbook, re.MULTILINE)}
    assert {rule["alert"] for rule in rules} >= ALERTS
    assert set(titles.values()) == {rule["alert"] for rule in rules}
    for rule in rules:
        severity = rule["labels"]["severity"]
        assert severity in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "consequence", "action", "runbook_url"}
        page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert page.endswith("/deploy/RUNBOOK.md") and titles[anchor] == rule["alert"]
        section = runbook.partition(f"\n## {rule['alert']}\n")[2].partition("\n## ")[0]
        assert section.strip().startswith(f"**{severity}.**"), rule["alert"]
        assert "*Consequence*:" in section and "*Do*:" in section, rule["alert"]


def test_the_operators_rules_are_the_same(rules, repository):
    text = (repository / "deploy" / "kubernetes" / "monitoring" / "prometheusrule.yaml").read_text()
    [group] = yaml.safe_load(text)["spec"]["groups"]
    assert group["rules"] == rules


def test_every_panel_says_what_it_shows_and_asks_for_what_is_exported(dashboard, stirred):
    exported = set(re.findall(r"^# TYPE (\w+) ", ask(f"{stirred.admin}/metrics")[1], re.MULTILINE))
    names = [re.match(r"\w+", one)[0] for _, query in queries_of(dashboard) for one in selectors(query)]
    assert len(names) > 30
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in names} <= exported
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert all(panel["description"] and panel["targets"] for panel in panels)


def test_every_query_of_the_dashboard_returns_data(prometheus, dashboard):
    empty = [f"{title}: {query}" for title, query in queries_of(dashboard) if not prometheus(query)]
    assert empty == []


def test_every_query_of_the_rules_finds_its_metrics_and_nothing_is_wrong(prometheus, rules):
    for rule in rules:
        for one in selectors(rule["expr"]):
            # A series with a failure's label does not exist before the failure; the metric without the label does.
            data = prometheus(one) or prometheus(re.sub(r",?(status|user)[=~!]+\"[^\"]*\"", "", one))
            assert data, f"{rule['alert']}: {one}"
    # The sandbox caused a few failures: only their alerts may be pending, and none fires.
    assert prometheus('ALERTS{alertstate="firing"}') == []


def test_the_number_of_series_does_not_follow_what_callers_invent(stirred):
    def series() -> int:
        return sum(not line.startswith("#") for line in ask(f"{stirred.admin}/metrics")[1].splitlines())

    def invent(number: int) -> None:
        assert ask(f"{stirred.proxy}/nobody/{number}?q={number}", headers={"X-Ads-User": f"u{number}"})[0] == 401
        assert ask(f"{stirred.proxy}/a/account{number}/v2/profiles")[0] == 404

    invent(0)
    before = series()
    for number in range(1, 200):
        invent(number)
    assert series() == before
