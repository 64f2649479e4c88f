"""Clients that tunnel even http:// URLs through their proxy work: undici's ProxyAgent and curl --proxytunnel."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import requests

HOSTS = {"na": "advertising-api.amazon.com", "eu": "advertising-api-eu.amazon.com"}
LIMIT_SECONDS = 60


def run(*command: str) -> str:
    ended = subprocess.run(
        command, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=LIMIT_SECONDS
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture
def undici(installed_clients) -> Path:
    """The script, beside the package that tests/run has installed."""
    script = installed_clients / "tunnel_client.mjs"
    script.write_text((Path(__file__).parent / "tunnel_client.mjs").read_text())
    return script


@pytest.mark.parametrize("region", HOSTS)
def test_undicis_proxy_agent_reaches_the_region_of_its_url(region, sandbox, undici):
    requests.delete(f"{sandbox.control}/history", timeout=30)
    shown = json.loads(run("node", str(undici), sandbox.proxy, f"http://{HOSTS[region]}/v2/profiles"))
    for status, profiles in shown.values():
        assert status == 200 and profiles
    calls = requests.get(f"{sandbox.control}/history", timeout=30).json()["calls"]
    # Beside the calls with which adsidecar itself looks for accounts, which name no encoding.
    asked = [call["door"] for call in calls if any(name == "accept-encoding" for name, _ in call["headers"])]
    served = [call["door"] for call in calls if call["target"] == "/v2/profiles"]
    assert asked and set(asked) == {region} and served.count(region) >= 2, calls


@pytest.mark.parametrize("region", HOSTS)
def test_curls_tunnel_reaches_the_region_of_its_url(region, sandbox):
    url = f"http://{HOSTS[region]}/v2/profiles"
    shown = run("curl", "--silent", "--fail", "--proxytunnel", "--proxy", sandbox.proxy, url, url)
    assert shown.count("profileId") >= 2


def test_no_other_tunnel_is_opened(sandbox):
    command = ["curl", "--silent", "--proxytunnel", "--proxy", sandbox.proxy, "http://127.0.0.1:9/"]
    ended = subprocess.run(
        command, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=LIMIT_SECONDS
    )
    assert ended.returncode != 0, ended.stdout
