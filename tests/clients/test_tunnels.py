"""Clients that tunnel even http:// URLs through their proxy work: undici's ProxyAgent and curl --proxytunnel."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import requests

from conftest import REPOSITORY, bare_environment

HOSTS = {"na": "advertising-api.amazon.com", "eu": "advertising-api-eu.amazon.com"}
LIMIT_SECONDS = 60


def run(*command: str) -> str:
    ended = subprocess.run(command, env=bare_environment(), capture_output=True, text=True, timeout=LIMIT_SECONDS)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def undici() -> Path:
    """The script, beside the package that tests/run has installed."""
    default = REPOSITORY / os.environ.get("CARGO_TARGET_DIR", "target") / "test-mcp"
    path = Path(os.environ.get("ADSIDECAR_TEST_MCP", default))
    if not (path / "node_modules" / "undici").is_dir():
        pytest.fail(f"no undici at {path}: run tests/run once, or set ADSIDECAR_TEST_MCP")
    script = path / "tunnel_client.mjs"
    script.write_text((Path(__file__).parent / "tunnel_client.mjs").read_text())
    return script


@pytest.mark.parametrize("region", HOSTS)
def test_undicis_proxy_agent_reaches_the_region_of_its_url(region, sandbox, undici):
    requests.delete(f"{sandbox.control}/history", timeout=30)
    shown = json.loads(run("node", str(undici), sandbox.proxy, f"http://{HOSTS[region]}/v2/profiles"))
    for status, profiles in shown.values():
        assert status == 200 and profiles
    calls = requests.get(f"{sandbox.control}/history", timeout=30).json()["calls"]
    assert [(call["door"], call["target"]) for call in calls] == [(region, "/v2/profiles")] * 2


@pytest.mark.parametrize("region", HOSTS)
def test_curls_tunnel_reaches_the_region_of_its_url(region, sandbox):
    url = f"http://{HOSTS[region]}/v2/profiles"
    shown = run("curl", "--silent", "--fail", "--proxytunnel", "--proxy", sandbox.proxy, url, url)
    assert shown.count("profileId") >= 2


def test_no_other_tunnel_is_opened(sandbox):
    command = ["curl", "--silent", "--proxytunnel", "--proxy", sandbox.proxy, "http://127.0.0.1:9/"]
    ended = subprocess.run(command, env=bare_environment(), capture_output=True, text=True, timeout=LIMIT_SECONDS)
    assert ended.returncode != 0, ended.stdout
