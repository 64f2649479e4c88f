"""The status page in a real Chromium: how it looks, by the keyboard alone, without findings of axe, and out of reach of
every other origin.

ADSIDECAR_PICTURES names a directory that keeps a picture of each page in both themes and all widths.
"""

import json
import os
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from browser import DOWN, ENTER, SHIFT, SPACE, TAB, Browser, served

PAGES = {
    "overview": "/",
    "users": "/page/users",
    "accounts": "/page/accounts",
    "calls": "/page/calls",
    "throttle": "/page/throttle",
    "settings": "/page/settings",
}
WIDTHS = [360, 768, 1440]
TOKEN = "knock-knock-knock-knock"
# What the element with the focus is called.
NAME = """((element) => (element.getAttribute("aria-label")
    || (element.labels && element.labels[0] && element.labels[0].firstChild.textContent)
    || element.textContent).trim())(document.activeElement)"""


@pytest.fixture(scope="module")
def driven(tmp_path_factory):
    assert shutil.which("chromedriver"), "tests/run installs it: apt-get install chromium chromium-driver"
    flags = ["--host-resolver-rules=MAP evil.test 127.0.0.1", "--hide-scrollbars"]
    running = Browser(tmp_path_factory.mktemp("browser"), *flags)
    yield running
    running.stop()


@pytest.fixture
def browser(driven):
    """The module's browser. What a test leaves in the console is a fault of its pages."""
    driven.look("light", 1440)
    driven.console()
    yield driven
    told = console(driven)
    # A page that stays open would go on asking a sandbox that is gone.
    driven.go("about:blank")
    assert told == [], "the console must stay empty"


def console(browser) -> list[str]:
    """What our pages, which are opened under localhost, wrote to the console; not the stand-in's consent page."""
    return [line for line in browser.console() if "//127.0.0.1:" not in line]


@pytest.fixture(scope="session")
def axe() -> str:
    target = Path(os.environ.get("CARGO_TARGET_DIR", Path(__file__).parents[2] / "target"))
    installed = Path(os.environ.get("ADSIDECAR_TEST_AXE", target / "test-axe"))
    script = installed / "node_modules" / "axe-core" / "axe.min.js"
    assert script.is_file(), f"no axe-core at {installed}: run tests/run once, or set ADSIDECAR_TEST_AXE"
    return script.read_text()


def order(url: str, method: str = "GET", data: bytes | None = None, **headers: str) -> str:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, method=method, data=data, headers=names)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.read().decode()


def state(sandbox, user: str) -> str:
    return json.loads(order(f"{sandbox.proxy}/api/auth/amazon/status?user_id={user}"))["state"]


def fault(sandbox, trouble, **rule) -> None:
    order(f"{sandbox.control}/trouble", "POST", json.dumps({"trouble": trouble, **rule}).encode())


def admin(sandbox) -> str:
    """The page under the name to which a login's cookie belongs."""
    return f"http://localhost:{urlsplit(sandbox.admin).port}"


def consent(browser) -> None:
    browser.wait_for("the consent page", lambda: urlsplit(browser.url()).path == "/ap/oa")
    browser.click("button, input[type=submit], a.allow")
    browser.wait_for("the way back", lambda: "/ap/oa" not in browser.url())


def log_in(browser, sandbox, user: str) -> None:
    browser.go(f"{sandbox.proxy}/api/auth/amazon/login?user_id={user}")
    consent(browser)
    assert state(sandbox, user) == "fresh"


@pytest.fixture(scope="module")
def busy(driven, sandbox):
    """A sidecar with users in several states, accounts, calls of all fates, and a limit of Amazon's."""
    for user in ["anna", "bert", "agency|paris"]:
        log_in(driven, sandbox, user)
    order(f"{sandbox.proxy}/api/auth/amazon/accounts/sync?user_id=anna", "POST")
    for minute in range(52):
        # Some minutes have more calls, and a few of them fail.
        for number in range(minute * 7 % 11 + minute % 4):
            order(f"{sandbox.proxy}/v2/profiles", X_Ads_User="anna")
        if minute % 13 == 5:
            fault(sandbox, {"status": {"code": 503}}, door="na")
            order(f"{sandbox.proxy}/v2/profiles", X_Ads_User="anna")
        order(f"{sandbox.control}/clock", "POST", b'{"advance": "1m"}')
        order(f"{sandbox.admin}/?part=true")
    for number in range(12):
        order(f"{sandbox.proxy}/v2/profiles", X_Ads_User="anna", X_Request_Id=f"morning-{number}")
    fault(sandbox, {"status": {"code": 503}}, door="na")
    order(f"{sandbox.proxy}/v2/profiles", X_Ads_User="anna")
    fault(sandbox, {"status": {"code": 429, "headers": [["Retry-After", "600"]]}}, door="na")
    order(f"{sandbox.proxy}/v2/profiles", X_Ads_User="anna")
    order(f"{sandbox.proxy}/v2/profiles", X_Ads_User="nobody")
    order(f"{sandbox.proxy}/v2/profiles", X_Ads_Account="no-such")
    fault(sandbox, "invalid_grant", door="lwa")
    order(f"{sandbox.proxy}/api/auth/amazon/refresh?user_id=bert", "POST")
    assert state(sandbox, "bert") == "login_required"
    return sandbox


def keep(name: str, picture: bytes) -> None:
    if directory := os.environ.get("ADSIDECAR_PICTURES"):
        (Path(directory) / f"{name}.png").write_bytes(picture)


def fits(browser) -> None:
    """Nothing of the page is wider than the window: only tables scroll, by themselves."""
    wide = browser.value("[document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1], wide


def findings(browser, axe: str) -> list[str]:
    script = (
        axe
        + "; const done = arguments[arguments.length - 1]; axe.run(document).then(done, (error) => done(`${error}`));"
    )
    result = browser.order("POST", "/execute/async", {"script": script, "args": []})
    assert isinstance(result, dict) and len(result["passes"]) > 10, result
    return [f"{each['impact']} {each['id']}: {each['nodes'][0]['html'][:200]}" for each in result["violations"]]


@pytest.mark.parametrize("page", PAGES)
def test_each_page_fits_in_both_themes_and_all_widths_and_axe_finds_nothing(page, busy, browser, axe):
    for theme in ["light", "dark"]:
        for width in [*WIDTHS, 3840]:
            browser.look(theme, width)
            browser.go(admin(busy) + PAGES[page])
            fits(browser)
            assert findings(browser, axe) == [], f"{page} {theme} {width}"
            keep(f"{page}-{theme}-{width}", browser.picture())


def test_what_needs_a_person_stands_above_everything_else(busy, browser):
    browser.go(admin(busy))
    text = browser.text()
    assert text.index("One user has to log in again") < text.index("is ready") < text.index("The last hour")
    assert text.index("bert") < text.index("anna"), "users who need attention are first"


def focus(browser, name: str, back: bool = False) -> None:
    """Presses Tab until the element called `name` has the focus, which must be visible."""
    for _ in range(200):
        if back:
            browser.press_with(SHIFT, TAB)
        else:
            browser.press(TAB)
        if browser.value(NAME) == name:
            assert browser.value("getComputedStyle(document.activeElement).outlineStyle") != "none", name
            return
    raise AssertionError(f"no Tab leads to {name!r} in {browser.url()}: {browser.text()[:500]}")


def says(browser, text: str) -> None:
    browser.wait_for(text, lambda: text in browser.text())


def test_login_refresh_find_accounts_and_log_out_by_the_keyboard_alone(sandbox_of_its_own, browser):
    sandbox = sandbox_of_its_own
    browser.go(admin(sandbox))
    focus(browser, "Skip to the content")
    browser.press(ENTER)
    focus(browser, "Users", back=True)
    browser.press(ENTER)
    browser.wait_for("the users", lambda: browser.url().endswith("/page/users"))

    focus(browser, "User id")
    browser.press(*"kim", ENTER)
    browser.wait_for("the consent page", lambda: urlsplit(browser.url()).path == "/ap/oa")
    focus(browser, "Allow")
    browser.press(ENTER)
    says(browser, "Connected to Amazon Ads")
    assert state(sandbox, "kim") == "fresh"
    # Typed, as the page says: a link from another origin is refused.
    assert f"{admin(sandbox)}/" in browser.text()
    browser.go(admin(sandbox))
    says(browser, "kim")

    focus(browser, "Users")
    browser.press(ENTER)
    focus(browser, "Refresh kim")
    before = order(f"{sandbox.control}/history?door=lwa")
    browser.press(ENTER)
    says(browser, "The access token of user kim was refreshed.")
    refreshes = [
        json.loads(text)["lwa"]["refreshes"] for text in (before, order(f"{sandbox.control}/history?door=lwa"))
    ]
    assert refreshes[1] == refreshes[0] + 1

    focus(browser, "Find accounts kim")
    browser.press(SPACE)
    says(browser, "Amazon was asked for the accounts of user kim.")
    assert "X-Ads-Account: " in browser.text()
    header = browser.value("document.querySelector('[data-copy]').dataset.copy")
    browser.devtools("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    focus(browser, f"Copy the header: {header}")
    browser.press(ENTER)
    says(browser, f"Copied: {header}")
    assert browser.run("navigator.clipboard.readText().then(arguments[0])") == header

    focus(browser, "Users", back=True)
    browser.press(ENTER)
    focus(browser, "Name contains")
    browser.press(*"nobody", ENTER)
    says(browser, "No user matches.")
    focus(browser, "All users")
    browser.press(ENTER)
    says(browser, "kim")
    focus(browser, "State")
    browser.press(*"fresh", TAB, ENTER)
    browser.wait_for("the filter", lambda: "state=fresh" in browser.url())
    assert "kim" in browser.text()

    focus(browser, "Log out kim")
    browser.press(ENTER)
    focus(browser, "Delete the tokens of kim")
    browser.press(ENTER)
    says(browser, "The tokens of user kim were deleted.")
    assert state(sandbox, "kim") == "none"


def test_the_tail_follows_is_paused_and_filtered_by_the_keyboard_alone(sandbox_of_its_own, browser):
    sandbox = sandbox_of_its_own
    call = lambda identity: order(f"{sandbox.proxy}/v2/profiles", X_Request_Id=identity)  # noqa: E731
    browser.go(admin(sandbox))
    focus(browser, "Calls")
    browser.press(ENTER)
    browser.wait_for("the calls", lambda: browser.url().endswith("/page/calls"))
    call("the-first")
    says(browser, "the-first")
    focus(browser, "Pause")
    browser.press(SPACE)
    says(browser, "Paused")
    call("while-paused")
    # Two more periods, by the page's own clock.
    browser.run("setTimeout(arguments[0], 2200)")
    assert "while-paused" not in browser.text()
    assert browser.value(NAME) == "Continue"
    browser.press(SPACE)
    says(browser, "while-paused")
    fault(sandbox, {"status": {"code": 500}}, door="na")
    call("amazons-fault")
    says(browser, "amazons-fault")
    focus(browser, "Show", back=True)
    browser.press(DOWN, TAB, ENTER)
    browser.wait_for("the filter", lambda: browser.url().endswith("only=failures"))
    assert "amazons-fault" in browser.text() and "the-first" not in browser.text()
    focus(browser, "Calls")
    focus(browser, "Calls")
    assert browser.value("document.activeElement.getAttribute('role')") == "region", "the table can be scrolled by keys"


def test_the_tail_goes_on_after_an_outage_and_leaves_what_somebody_selects_alone(sandbox_of_its_own, browser):
    sandbox = sandbox_of_its_own
    call = lambda identity: order(f"{sandbox.proxy}/v2/profiles", X_Request_Id=identity)  # noqa: E731
    browser.go(f"{admin(sandbox)}/page/calls")
    call("before-the-outage")
    says(browser, "before-the-outage")
    browser.devtools("Network.enable")
    online = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.devtools("Network.emulateNetworkConditions", offline=True, **online)
    says(browser, "No answer from adsidecar: trying again.")
    call("during-the-outage")
    browser.devtools("Network.emulateNetworkConditions", offline=False, **online)
    says(browser, "during-the-outage")
    browser.wait_for("no complaint", lambda: "No answer" not in browser.text())
    assert all("ERR_INTERNET_DISCONNECTED" in line for line in console(browser))

    browser.run("getSelection().selectAllChildren(document.querySelector('[data-live] td')); arguments[0]()")
    call("while-selected")
    # Two more periods, by the page's own clock.
    browser.run("setTimeout(arguments[0], 2200)")
    assert "while-selected" not in browser.text()
    browser.run("getSelection().removeAllRanges(); arguments[0]()")
    says(browser, "while-selected")


def test_the_level_and_a_reload_by_the_keyboard_alone(sandbox_of_its_own, browser):
    sandbox = sandbox_of_its_own
    browser.go(f"{admin(sandbox)}/page/settings")
    focus(browser, "Level")
    browser.press(*"debug", TAB, ENTER)
    says(browser, "The log level was changed")
    assert order(f"{sandbox.admin}/log") == "debug"
    Path(sandbox.config).write_text(Path(sandbox.config).read_text() + '\n[no_such_section]\nkey = "x"\n')
    focus(browser, "Reload the configuration")
    browser.press(ENTER)
    says(browser, "That did not work")
    assert "no_such_section" in browser.text()
    # Chromium reports every answer from 400 in the console.
    told = console(browser)
    assert len(told) == 1 and "status of 400" in told[0], told


def test_a_login_that_fails_is_readable_on_a_phone_and_leads_on(sandbox_of_its_own, browser, axe):
    sandbox = sandbox_of_its_own
    login = f"{sandbox.proxy}/api/auth/amazon/login?user_id=kim"

    def shows(text: str, picture: str) -> None:
        says(browser, text)
        fits(browser)
        assert findings(browser, axe) == [], picture
        keep(picture, browser.picture())

    for theme in ["light", "dark"]:
        browser.look(theme, 360, 740)
        browser.go(login)
        focus(browser, "Deny")
        browser.press(ENTER)
        shows("Consent was not given", f"refused-{theme}-360")
        drop_answers(browser, 400)
        focus(browser, "Try again")
        browser.press(ENTER)
        focus(browser, "Allow")
        browser.press(ENTER)
        shows("Connected to Amazon Ads", f"connected-{theme}-360")
        before = json.loads(order(f"{sandbox.proxy}/api/auth/amazon/status?user_id=kim"))

        # Another Amazon user than before: the page says so, and offers both ways on.
        browser.go(login)
        sign_in_as_another(browser)
        shows("You signed in as another Amazon user", f"another-{theme}-360")
        drop_answers(browser, 409)
        assert (
            json.loads(order(f"{sandbox.proxy}/api/auth/amazon/status?user_id=kim"))["updated_at"]
            == before["updated_at"]
        )
        focus(browser, "Try again")
        focus(browser, "Replace")
        browser.press(ENTER)
        sign_in_as_another(browser)
        says(browser, "Connected to Amazon Ads")
        order(f"{sandbox.proxy}/api/auth/amazon/logout?user_id=kim", "POST")
    browser.go(sandbox.proxy)
    shows("Requests to this address go to the Amazon Ads API", "root-dark-360")

    # Nobody knows whose login that was: the page leads to one that asks.
    browser.go(f"{sandbox.proxy}/api/auth/amazon/callback?code=x&state=unknown")
    shows("This login has expired", "expired-dark-360")
    drop_answers(browser, 400)
    order(f"{sandbox.proxy}/api/auth/amazon/logout", "POST")
    focus(browser, "Try again")
    browser.press(ENTER)
    says(browser, "Log in, as the user:")
    focus(browser, "default")
    browser.press(ENTER)
    focus(browser, "Allow")
    browser.press(ENTER)
    says(browser, "Connected to Amazon Ads")
    assert state(sandbox, "default") == "fresh"
    browser.go(f"{login}&region=moon")
    shows("That did not work", "problem-dark-360")
    drop_answers(browser, 400)


def sign_in_as_another(browser) -> None:
    browser.wait_for("the consent page", lambda: urlsplit(browser.url()).path == "/ap/oa")
    focus(browser, "Sign in as")
    browser.press(DOWN)
    focus(browser, "Allow")
    browser.press(ENTER)


def drop_answers(browser, status: int) -> None:
    """Chromium reports every answer from 400 in the console: nothing else may stand there."""
    told = console(browser)
    assert told and all(f"status of {status}" in line for line in told), told


ATTACK = """
const [base, key, done] = [%s, %s, arguments[0]];
const read = [];
const settled = [];
const wait = (ms) => new Promise((go) => setTimeout(go, ms));
const forms = {refresh: "user_id=anna", logout: "user_id=anna", sync: "user_id=anna", reload: "", log: "level=trace"};
const paths = ["/", "/page/users", "/page/accounts", "/page/calls?part=true", "/page/settings",
      "/page/script.js", "/log"];
const ask = (path, options) => settled.push((async () => {
  try {
    const answer = await fetch(base + path, options);
    if (!answer.type.startsWith("opaque")) read.push([path, await answer.text()]);
  } catch {}
})());
for (const path of paths) {
  ask(path, {});
  ask(path, {credentials: "include", headers: {Accept: "text/html"}});
  ask(path, {mode: "no-cors"});
  for (const [name, properties] of [["img", {src: base + path}], ["iframe", {src: base + path}],
      ["script", {src: base + path}], ["object", {data: base + path}]]) {
    settled.push(new Promise((go) => {
      const made = Object.assign(document.createElement(name), properties);
      made.onload = made.onerror = go;
      document.body.append(made);
      setTimeout(go, 2000);
    }));
  }
}
for (const [action, fields] of Object.entries(forms)) {
  for (const sent of ["", key]) {
    const body = new URLSearchParams(`${fields}&form_key=${sent}`);
    ask(`/page/${action}`, {method: "POST", mode: "no-cors", body});
    const options = {method: "POST", mode: "no-cors", credentials: "include", referrerPolicy: "no-referrer", body};
    ask(`/page/${action}`, options);
    ask(`/page/${action}`, {method: "POST", headers: {"X-Own": "1"}, body});
    navigator.sendBeacon(`${base}/page/${action}`, body);
    const frame = Object.assign(document.createElement("iframe"), {name: `${action}${sent}`});
    const attributes = {method: "post", action: `${base}/page/${action}`, target: frame.name};
    const form = Object.assign(document.createElement("form"), attributes);
    for (const [name, value] of body) form.append(Object.assign(document.createElement("input"), {name, value}));
    document.body.append(frame, form);
    form.submit();
    const image = new Image();
    image.src = `${base}/page/${action}?${body}`;
  }
}
Promise.all(settled).then(() => wait(1000)).then(() => done({
  read,
  framed: [...document.querySelectorAll("iframe")].filter((frame) => {
    try { return frame.contentDocument && frame.contentDocument.body.innerText.length > 0; } catch { return false; }
  }).length,
}));
"""


@pytest.fixture
def elsewhere():
    """Another origin's page, under a name of its own and under localhost, which is the same site."""
    with served(lambda: "<!doctype html><link rel=icon href=data:,><title>elsewhere</title><p>elsewhere") as port:
        yield port


# Covers: threat 2.
@pytest.mark.parametrize("host", ["evil.test", "localhost", "127.0.0.1"])
def test_another_origin_can_read_nothing_and_do_nothing_even_with_the_key_of_the_forms(host, busy, driven, elsewhere):
    browser = driven
    base = admin(busy)
    page = order(f"{base}/page/settings", Accept="text/html")
    key = page.split('name="form_key" value="')[1].split('"')[0]
    level = order(f"{base}/log")
    history = json.loads(order(f"{busy.control}/history?door=lwa"))["lwa"]
    denied = lambda: sum(  # noqa: E731
        int(line.rsplit(" ", 1)[1])
        for line in order(f"{base}/metrics").splitlines()
        if line.startswith('adsidecar_guard_denied_total{reason="cross_site"}')
    )
    before = denied()
    browser.go(f"http://{host}:{elsewhere}/")
    result = browser.run(ATTACK % (json.dumps(base), json.dumps(key)))
    assert result == {"read": [], "framed": 0}
    assert denied() - before >= 60, "the requests must arrive and be rejected"
    assert state(busy, "anna") == "fresh", "nobody was logged out"
    assert order(f"{base}/log") == level
    assert json.loads(order(f"{busy.control}/history?door=lwa"))["lwa"] == history, "nothing was refreshed"
    # A form that the page opens as a whole, with the key.
    form = (
        f"const form = Object.assign(document.createElement('form'), {{method: 'post', action: '{base}/page/logout'}});"
        f"form.innerHTML = '<input name=user_id value=anna><input name=form_key value={key}>';"
        "document.body.append(form); form.submit(); arguments[0]()"
    )
    browser.run(form)
    says(browser, "cross_site")
    assert state(busy, "anna") == "fresh"
    # Nor can it lead the browser to the page.
    browser.go(f"http://{host}:{elsewhere}/")
    browser.run(f"location = {json.dumps(base + '/page/users')}; arguments[0]()")
    says(browser, "cross_site")
    browser.console()


def test_with_a_caller_token_the_page_works_and_offers_no_login(sandbox_of_its_own, browser):
    sandbox = sandbox_of_its_own
    file = Path(sandbox.config)
    text = file.read_text()
    token = f'caller_token = "{TOKEN}"'
    file.write_text(
        text.replace("[proxy]\n", f"[proxy]\n{token}\n") if "[proxy]\n" in text else f"{text}\n[proxy]\n{token}\n"
    )
    assert order(f"{sandbox.admin}/reload", "POST") == "reloaded\n"
    browser.go(f"{admin(sandbox)}/page/users")
    assert "let your app request the login URL" in browser.text()
    focus(browser, "Refresh default")
    browser.press(ENTER)
    says(browser, "The access token of user default was refreshed.")
    assert TOKEN not in browser.value("document.documentElement.outerHTML")
