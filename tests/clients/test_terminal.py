"""`adsidecar login` as a person sees it: in a terminal, which tmux draws."""

import os
import re
import shlex
import subprocess
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import requests

# A debug build on a busy machine.
LIMIT_SECONDS = 60
# Of the sandbox, which otherwise asks which advertiser logs in.
OTHER_IDENTITY = "amzn1.account.SANDBOXBOOKS"


class Terminal:
    """One command in a terminal of its own."""

    def __init__(self, directory: Path, command: list, environment: dict[str, str], columns: int):
        self.socket = str(directory / "tmux")
        words = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
        # The shell outlives a Ctrl-C, and the command is killed by it.
        line = f"trap : INT; env -i {words} {shlex.join(map(str, command))}; printf '\\nexit=%s\\n' $?; exec cat"
        self.tmux(
            "-f", "/dev/null", "new-session", "-d", "-x", str(columns), "-y", "50", f"bash -c {shlex.quote(line)}"
        )

    def tmux(self, *words: str) -> str:
        # A server of this test's own, without the person's configuration.
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "TERM": "xterm-256color"}
        command = ["tmux", "-S", self.socket, *words]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    def screen(self) -> str:
        """All that it shows and showed; a line that wraps is one line."""
        return self.tmux("capture-pane", "-p", "-J", "-S", "-")

    def shows(self, pattern: str) -> re.Match:
        deadline = time.monotonic() + LIMIT_SECONDS
        while True:
            screen = self.screen()
            if found := re.search(pattern, screen, re.MULTILINE):
                return found
            assert time.monotonic() < deadline, f"never shown: {pattern}\n{screen}"
            time.sleep(0.05)

    def auth_url(self) -> str:
        """The address of the consent page, once the command waits."""
        self.shows("waiting for the consent")
        return self.shows(r"^  (http\S+/ap/oa\?\S+)$")[1]

    def paste(self, text: str) -> None:
        # A code may begin with a dash.
        self.tmux("set-buffer", "--", text)
        self.tmux("paste-buffer")
        self.tmux("send-keys", "Enter")

    def ended(self) -> tuple[int, str]:
        code = self.shows(r"^exit=(\d+)$")[1]
        return int(code), self.screen()

    def close(self) -> None:
        subprocess.run(["tmux", "-S", self.socket, "kill-server"], capture_output=True, check=False)


@pytest.fixture
def logged_out(sandbox_of_its_own):
    """A sandbox, after the user default has logged out."""
    requests.post(f"{sandbox_of_its_own.proxy}/api/auth/amazon/logout", timeout=30).raise_for_status()
    return sandbox_of_its_own


@pytest.fixture
def login(adsidecar, sandbox_of_its_own, tmp_path):
    """Starts `adsidecar login` in a terminal."""
    terminals = []

    def start(*words: str, columns: int = 100, **variables: str) -> Terminal:
        directory = tmp_path / f"terminal-{len(terminals)}"
        directory.mkdir()
        environment = {"PATH": os.environ["PATH"], "TERM": "xterm-256color", **variables}
        command = [adsidecar, "login", "--config", sandbox_of_its_own.config, *words]
        terminals.append(Terminal(directory, command, environment, columns))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


@pytest.fixture
def browser(tmp_path):
    """A browser: it decides at the consent page, and follows the redirects to the end."""

    def make(decision: str) -> str:
        script = tmp_path / f"browser-{decision}"
        script.write_text(f'#!/bin/sh\nexec curl --silent --location "$1&decision={decision}" > {tmp_path}/page\n')
        script.chmod(0o755)
        return str(script)

    return make


def returned(auth_url: str, decision: str = "allow") -> str:
    """The URL at which a browser ends after the consent, and which it could not open."""
    answer = requests.get(f"{auth_url}&decision={decision}", allow_redirects=False, timeout=30)
    return answer.headers["location"]


def status(sandbox, user: str = "default") -> dict:
    return requests.get(f"{sandbox.proxy}/api/auth/amazon/status", params={"user_id": user}, timeout=30).json()


def token_calls(sandbox) -> int:
    return len(requests.get(f"{sandbox.control}/history?door=lwa", timeout=30).json()["calls"])


def test_a_refused_consent_ends_it_and_changes_nothing(logged_out, login, browser):
    code, screen = login(BROWSER=browser("deny")).ended()
    assert code == 1 and "the consent was refused at Amazon; nothing was changed" in screen, screen
    assert status(logged_out)["state"] == "none"


def test_a_paste_of_another_logins_end_is_refused_and_the_right_one_then_taken(logged_out, login):
    terminal = login("--no-browser")
    url = returned(terminal.auth_url())
    state = parse_qs(urlsplit(url).query)["state"][0]
    terminal.paste(url.replace(state, "x" * len(state)))
    terminal.shows("this is the end of another login")
    terminal.paste("http://localhost/nothing")
    terminal.shows("this is neither a URL with a code nor a code")
    assert status(logged_out)["state"] == "none"
    terminal.paste(url)
    code, screen = terminal.ended()
    assert code == 0 and "default is logged in" in screen, screen


def test_another_identity_replaces_nothing_until_it_is_told_to(sandbox_of_its_own, login):
    sandbox = sandbox_of_its_own
    before = status(sandbox)
    for word, exit_code in (("--again", 1), ("--replace", 0)):
        terminal = login(word, "--no-browser")
        url = f"{terminal.auth_url()}&advertiser={OTHER_IDENTITY}"
        requests.get(returned(url), timeout=30)
        code, screen = terminal.ended()
        assert code == exit_code, screen
        if word == "--again":
            assert "is not the Amazon identity that default had" in screen and "--replace" in screen, screen
            assert status(sandbox)["consented_at"] == before["consented_at"]
        else:
            assert "Harbour Books" in screen, screen
    assert status(sandbox)["consented_at"] != before["consented_at"]


def test_the_browsers_return_ends_it_and_a_second_run_changes_nothing(logged_out, login, browser):
    terminal = login("--user", "anna", BROWSER=browser("allow"))
    code, screen = terminal.ended()
    assert code == 0 and "a browser was opened" in screen, screen
    for told in (
        "anna is logged in",
        "na  2 profiles: Meadow Tools US",
        "eu  2 profiles",
        "fe  2 profiles",
        "days, at",
    ):
        assert told in screen, screen
    assert status(logged_out, "anna")["state"] == "fresh"
    # What it says last is a command, which works.
    command = re.search(r"^try it: (curl .*)$", screen, re.MULTILINE)[1]
    tried = subprocess.run(["bash", "-c", f"{command} --silent --fail"], capture_output=True, text=True, timeout=30)
    assert logged_out.profile_id in tried.stdout, tried

    calls = token_calls(logged_out)
    code, screen = login("--user", "anna", BROWSER=browser("allow")).ended()
    assert code == 0 and "anna is logged in already; nothing was changed" in screen, screen
    assert token_calls(logged_out) == calls


@pytest.mark.parametrize("form", ["url", "query", "code"])
def test_a_paste_ends_it(form, logged_out, login):
    terminal = login("--no-browser")
    url = returned(terminal.auth_url())
    query = urlsplit(url).query
    terminal.paste({"url": url, "query": query, "code": parse_qs(query)["code"][0]}[form])
    code, screen = terminal.ended()
    assert code == 0 and "default is logged in" in screen, screen
    assert status(logged_out)["state"] == "fresh"


def test_over_ssh_it_prints_the_tunnel_and_opens_no_browser(logged_out, login, browser, tmp_path):
    ssh = {"SSH_CONNECTION": "10.0.0.9 51000 10.0.0.5 22", "USER": "anna", "BROWSER": browser("allow")}
    terminal = login(**ssh)
    port = urlsplit(logged_out.proxy).port
    terminal.shows(rf"^  ssh -N -L {port}:localhost:{port} anna@10\.0\.0\.5$")
    # Through the tunnel the browser reaches the callback.
    requests.get(returned(terminal.auth_url()), timeout=30)
    code, screen = terminal.ended()
    assert code == 0 and "a browser was opened" not in screen, screen
    assert not (tmp_path / "page").exists()


def test_in_a_narrow_terminal_the_url_is_whole_and_the_remaining_time_one_line(logged_out, login):
    terminal = login("--no-browser", columns=40)
    assert parse_qs(urlsplit(terminal.auth_url()).query)["state"]
    terminal.shows(r"waiting for the consent, 9:5[0-7] left")
    assert terminal.screen().count("waiting for the consent") == 1, terminal.screen()
    terminal.tmux("send-keys", "C-c")
    assert terminal.ended()[0] == 130
    assert status(logged_out)["state"] == "none"
