"""MCP clients, unchanged, work through adsidecar; without a grant each shows the login link and starts no OAuth."""

import json
import os
import select
import subprocess
import time
from pathlib import Path

import pytest
import requests

HERE = Path(__file__).parent / "mcp"
# Longer than any client takes to give up.
LIMIT_SECONDS = 60

CLIENTS = ["mcp 1", "mcp 2", "fastmcp 3", "fastmcp 4", "npm sdk", "mcp-remote"]


def run(client: str, installed: Path, home: Path, url: str) -> str:
    """Lists the tools at `url`. Returns all that the client shows."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "NO_COLOR": "1"}
    if client == "mcp-remote":
        return run_mcp_remote(installed, environment, url)
    library, version = client.split()
    if library == "npm":
        script = installed / "sdk_client.mjs"
        script.write_text((HERE / "sdk_client.mjs").read_text())
        command = ["node", str(script), url]
    else:
        venv = {"1": "python-1", "2": "python-2", "3": "python-1", "4": "python-2"}[version]
        command = [str(installed / venv / "bin" / "python"), str(HERE / "python_client.py"), library, url]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    return ended.stdout + ended.stderr


def run_mcp_remote(installed: Path, environment: dict, url: str) -> str:
    """mcp-remote is a server on standard input and output for programs that start their servers themselves."""
    command = [
        "node",
        str(installed / "node_modules" / "mcp-remote" / "dist" / "proxy.js"),
        url,
        "--transport",
        "http-only",
    ]
    initialize = {
        "protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "adsidecar-test", "version": "1"}
    }
    messages = [
        {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": initialize},
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {"jsonrpc": "2.0", "id": 1, "method": "tools/list"},
    ]
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        for message in messages:
            process.stdin.write(json.dumps(message).encode() + b"\n")
        process.stdin.flush()
        shown, deadline = b"", time.monotonic() + LIMIT_SECONDS
        while b"list_profiles" not in shown and time.monotonic() < deadline:
            if select.select([process.stdout], [], [], 1)[0]:
                part = os.read(process.stdout.fileno(), 65536)
                if not part:
                    break
                shown += part
        return shown.decode()
    finally:
        process.kill()
        process.wait()


def calls(sandbox, listener: str) -> list:
    return requests.get(f"{sandbox.control}/history?door={listener}", timeout=30).json()["calls"]


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("path", ["/mcp", "/mcp/lite"])
def test_each_client_lists_the_tools(client, path, installed_clients, tmp_path, sandbox):
    shown = run(client, installed_clients, tmp_path, sandbox.proxy + path)
    assert "list_profiles" in shown, shown
    assert {call["status"] for call in calls(sandbox, "mcp_na")} <= {200, 202}


@pytest.mark.parametrize("client", CLIENTS)
def test_without_a_grant_each_client_shows_the_login_link_and_ends(
    client, installed_clients, tmp_path, sandbox_without_grant
):
    shown = run(client, installed_clients, tmp_path, sandbox_without_grant.proxy + "/mcp")
    assert f"{sandbox_without_grant.proxy}/api/auth/amazon/login?user_id=default" in shown, shown
    assert not calls(sandbox_without_grant, "mcp_na") and not calls(sandbox_without_grant, "na"), "nothing left"


@pytest.mark.parametrize("client", CLIENTS)
def test_a_401_of_amazons_starts_no_oauth_at_amazon(client, installed_clients, tmp_path, sandbox_of_its_own):
    sandbox = sandbox_of_its_own
    rule = {"trouble": "token_unauthorized", "door": "mcp_na", "when": "always"}
    assert requests.post(f"{sandbox.control}/trouble", json=rule, timeout=30).status_code == 201
    shown = run(client, installed_clients, tmp_path, sandbox.proxy + "/mcp")
    assert "list_profiles" not in shown and "lwa.amazon.com" not in shown, shown
    paths = {call["target"] for call in calls(sandbox, "mcp_na")}
    assert paths == {"/mcp"}, "discovery is answered here"
