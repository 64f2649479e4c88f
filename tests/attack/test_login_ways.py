"""A person's ways through a login, in a real Chromium: each ends logged in, or with a page that says what to do."""

import json
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from browser import Browser, served

LOGIN = "/api/auth/amazon/login"
CALLBACK = "/api/auth/amazon/callback"
TOKEN = "knock-knock-knock-knock"


@pytest.fixture
def browser(tmp_path):
    assert shutil.which("chromedriver"), "tests/run installs it: apt-get install chromium chromium-driver"
    running = Browser(tmp_path)
    yield running
    running.stop()


@pytest.fixture
def frontend():
    """An app's page on another port of localhost: its origin, and what it prefetches."""
    prefetched = []

    def page() -> str:
        links = "".join(f'<link rel="prefetch" href="{url}">' for url in prefetched)
        return f"<!doctype html><title>app</title>{links}<p>the app</p>"

    with served(page) as port:
        yield f"http://localhost:{port}", prefetched


class NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *words):
        return None


def order(url: str, method: str = "GET", **headers: str) -> tuple[int, dict, str]:
    request = urllib.request.Request(
        url, method=method, headers={name.replace("_", "-"): value for name, value in headers.items()}
    )
    try:
        with urllib.request.build_opener(NoRedirects).open(request) as answer:
            return answer.status, dict(answer.headers), answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read().decode()


def state(sandbox, user: str, **headers: str) -> str:
    return json.loads(order(f"{sandbox.proxy}/api/auth/amazon/status?user_id={user}", **headers)[2])["state"]


def exchanges(sandbox) -> int:
    return json.loads(order(f"{sandbox.control}/history")[2])["lwa"]["exchanges"]


def configure(sandbox, section: str, line: str) -> None:
    """Adds a line to a section of the configuration of the sandbox's adsidecar."""
    file = Path(sandbox.config)
    text = file.read_text()
    file.write_text(
        text.replace(f"[{section}]\n", f"[{section}]\n{line}\n")
        if f"[{section}]" in text
        else f"{text}\n[{section}]\n{line}\n"
    )
    status, _, answer = order(f"{sandbox.admin}/reload", "POST")
    assert status == 200, answer


def consent(browser) -> None:
    """Consents on Amazon's page, and waits for where it leads."""
    assert urlsplit(browser.url()).path == "/ap/oa", browser.url()
    browser.click("button, input[type=submit], a.allow")
    browser.wait_for("the way back", lambda: "/ap/oa" not in browser.url())


def callback_of(browser) -> str:
    """Amazon's answer to the consent page that the browser shows, without going there."""
    _, headers, _ = order(browser.url() + "&auto=1")
    return headers["location"]


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_a_login_begun_under_any_name_of_this_machine_ends_logged_in(name, sandbox, browser):
    user = f"at-{name}"
    browser.go(f"http://{name}:{urlsplit(sandbox.proxy).port}{LOGIN}?user_id={user}")
    consent(browser)
    assert urlsplit(browser.url()).hostname == "localhost"
    assert "Connected to Amazon Ads" in browser.text() and user in browser.text()
    assert state(sandbox, user) == "fresh"


def test_a_prefetched_and_reloaded_callback_ends_logged_in_once(sandbox, browser, frontend):
    origin, prefetched = frontend
    browser.go(f"{sandbox.proxy}{LOGIN}?user_id=hasty")
    callback = callback_of(browser)
    before = exchanges(sandbox)
    prefetched.append(callback)
    browser.go(origin)
    entry = f"performance.getEntriesByType('resource').some((entry) => entry.name === {json.dumps(callback)})"
    browser.wait_for("the prefetch", lambda: browser.run(f"arguments[0]({entry})"))
    assert (exchanges(sandbox), state(sandbox, "hasty")) == (before, "none"), "a prefetch does nothing"
    browser.go(callback)
    assert "Connected to Amazon Ads" in browser.text()
    for way in ["location.reload()", "location.reload()"]:
        browser.run(f"setTimeout(() => {way}); arguments[0]()")
        browser.wait_for("the page again", lambda: "Connected to Amazon Ads" in browser.text())
    # Forward to another page, and back.
    browser.go(origin)
    browser.order("POST", "/back", {})
    browser.wait_for("the page again", lambda: "Connected to Amazon Ads" in browser.text())
    # In a second tab.
    tab = browser.order("POST", "/window/new", {"type": "tab"})["handle"]
    browser.order("POST", "/window", {"handle": tab})
    browser.go(callback)
    assert "Connected to Amazon Ads" in browser.text()
    assert (exchanges(sandbox), state(sandbox, "hasty")) == (before + 1, "fresh")


def test_the_back_button_leads_to_a_login_that_can_be_finished(sandbox, browser):
    browser.go(f"{sandbox.proxy}{LOGIN}?user_id=returning")
    consent(browser)
    assert "Connected to Amazon Ads" in browser.text()
    browser.order("POST", "/back", {})
    browser.wait_for("Amazon's page", lambda: "/ap/oa" in browser.url())
    # A second consent of the same login: its code is new, and its state was used.
    consent(browser)
    assert "Connected to Amazon Ads" in browser.text() or "Start it again" in browser.text(), browser.text()
    assert state(sandbox, "returning") == "fresh"


@pytest.mark.parametrize("users", [("first", "second"), ("same", "same")])
@pytest.mark.parametrize("turn", ["in-order", "reversed"])
def test_logins_in_two_tabs_both_end_logged_in(users, turn, sandbox, browser):
    tabs = [browser.order("GET", "/window")]
    tabs.append(browser.order("POST", "/window/new", {"type": "tab"})["handle"])
    users = [f"{user}-{turn}" for user in users]
    for tab, user in zip(tabs, users):
        browser.order("POST", "/window", {"handle": tab})
        browser.go(f"{sandbox.proxy}{LOGIN}?user_id={user}")
    for tab, user in list(zip(tabs, users))[:: 1 if turn == "in-order" else -1]:
        browser.order("POST", "/window", {"handle": tab})
        consent(browser)
        assert "Connected to Amazon Ads" in browser.text() and user in browser.text(), browser.text()
        assert state(sandbox, user) == "fresh"


@pytest.mark.parametrize("credentials", ["include", "omit"])
def test_a_frontend_that_fetches_the_login_url_gets_a_result_that_it_can_show(
    credentials, sandbox_of_its_own, browser, frontend
):
    sandbox, (origin, _) = sandbox_of_its_own, frontend
    configure(sandbox, "login", f'frontend_url = "{origin}"')
    browser.go(origin)
    url = json.dumps(f"{sandbox.proxy}{LOGIN}?user_id=app-user")
    begun = browser.run(
        f"fetch({url}, {{credentials: '{credentials}'}}).then((answer) => answer.json()).then(arguments[0])"
    )
    browser.go(begun["auth_url"])
    consent(browser)
    browser.wait_for("the app", lambda: browser.url().startswith(origin) and "the app" in browser.text())
    log = (Path(sandbox.config).parents[1] / "sandbox.log").read_text()
    if credentials == "include":
        assert browser.url() == f"{origin}/?status=success&user_id=app-user"
        assert state(sandbox, "app-user") == "fresh"
    else:
        assert browser.url() == f"{origin}/?status=error&error=state_invalid"
        assert 'credentials: \\"include\\"' in log or 'credentials: "include"' in log, log


def test_with_a_caller_token_the_pages_say_how_and_the_app_begins_the_login(sandbox_of_its_own, browser):
    sandbox = sandbox_of_its_own
    configure(sandbox, "proxy", f'caller_token = "{TOKEN}"')
    browser.go(sandbox.admin)
    assert "let your app request the login URL" in browser.text()
    count = "document.querySelectorAll('a[href*=login]').length"
    assert browser.run(f"arguments[0]({count})") == 0, "no link that cannot work"
    status, _, body = order(f"{sandbox.proxy}{LOGIN}?user_id=guarded")
    assert (status, json.loads(body)["code"]) == (407, "caller_unauthorized")
    _, _, body = order(f"{sandbox.proxy}{LOGIN}?user_id=guarded", X_Ads_Sidecar_Token=TOKEN)
    browser.go(json.loads(body)["auth_url"])
    consent(browser)
    assert "Connected to Amazon Ads" in browser.text()
    assert state(sandbox, "guarded", X_Ads_Sidecar_Token=TOKEN) == "fresh"
