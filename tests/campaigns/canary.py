"""Searches for secrets where none may be, in every likely encoding."""

import base64
import http.client
import json
import os
import urllib.parse
from pathlib import Path

import world

NOBODY = 65534

ENCODINGS = ("plain", "url", "base64", "base64url", "hex", "json")


def encoded(secret: bytes) -> dict[str, list[bytes]]:
    """The needles by encoding. Base64 inside a longer text has three alignments."""
    text = secret.decode()
    aligned = [base64.b64encode(b"\0" * shift + secret)[4 if shift else 0 : -4] for shift in range(3)]
    return {
        "plain": [secret],
        "url": [urllib.parse.quote(text, safe="").encode(), urllib.parse.quote(text, safe="").lower().encode()],
        "base64": aligned,
        "base64url": [piece.translate(bytes.maketrans(b"+/", b"-_")) for piece in aligned],
        "hex": [secret.hex().encode(), secret.hex().upper().encode()],
        "json": [json.dumps(text)[1:-1].encode(), "".join(f"\\u{ord(char):04x}" for char in text).encode()],
    }


def halves(secret: str) -> list[bytes]:
    """A leak may be truncated: either half of a secret counts."""
    middle = len(secret) // 2
    assert middle >= 10, "each half must be long enough not to occur by chance"
    return [secret[:middle].encode(), secret[middle:].encode()]


def hits(canaries: dict[str, str], places: dict[str, bytes]) -> list[tuple[str, str, str]]:
    """Canary, encoding and place of each match."""
    found = []
    for name, secret in canaries.items():
        needles = [
            (encoding, needle) for half in halves(secret) for encoding, all_ in encoded(half).items() for needle in all_
        ]
        for place, content in places.items():
            seen = {encoding for encoding, needle in needles if needle in content}
            found += [(name, encoding, place) for encoding in ENCODINGS if encoding in seen]
    return found


def files(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def secret(name: str) -> str:
    """A long secret with characters that each encoding represents differently."""
    return f"cnry-{name}/+?&=%\u0022|{os.urandom(12).hex()}-{name[::-1]}"


class Run:
    """One run of an adsidecar, with all output that was seen."""

    def __init__(self, sandbox: world.Sandbox, directory: Path, log_format: str, before: tuple[str, ...] = ()):
        """`before` is the command prefix that starts it as another user."""
        self.sandbox, self.directory, self.before, self.answers = sandbox, directory, before, {}
        directory.mkdir()
        spell = {
            name: secret(name).replace('"', "")
            for name in ("old-client-secret", "caller", "other-caller", "theirs", "shim-body")
        }
        self.keys = [base64.urlsafe_b64encode(os.urandom(32)).decode() for _ in range(2)]
        self.imported = sandbox.grant()
        self.canaries = {
            "old client secret": spell["old-client-secret"],
            # Each half distinguishes it from other secrets.
            "client secret": world.CLIENT_SECRET[-14:] * 2,
            "Fernet key": self.keys[0],
            "other Fernet key": self.keys[1],
            "caller token": spell["caller"],
            "other caller token": spell["other-caller"],
            "imported refresh token": self.imported.partition("|")[2],
            "the caller's own bearer": spell["theirs"],
            "secret sent to the token endpoint": spell["shim-body"],
        }
        self.callers, self.theirs = [spell["caller"], spell["other-caller"]], spell["theirs"]
        self.sidecar = world.Sidecar(
            sandbox,
            directory,
            f'[log]\nlevel = "trace"\nformat = "{log_format}"\naudit = true\n[login]\nconfirm = true\n',
        )
        text = self.sidecar.config.read_text()
        for name, value in {
            "key": ",".join(self.keys),
            "callers": ",".join(self.callers),
            "clients": f"{spell['old-client-secret']},{world.CLIENT_SECRET}",
        }.items():
            (directory / name).write_text(value)
        text = text.replace(f'fernet_keys = "{world.FERNET_KEY}"', f'fernet_keys_file = "{directory}/key"')
        text = text.replace(
            f'client_secret = "{world.CLIENT_SECRET}"',
            f'client_secret_file = "{directory}/clients"\nauthorize_url = "https://{sandbox.lwa}/ap/oa"',
        )
        self.sidecar.config.write_text(
            text.replace("[proxy]\n", f'[proxy]\ncaller_token_file = "{directory}/callers"\n')
        )

    def ask(
        self,
        name: str,
        path: str,
        method: str = "GET",
        body=None,
        token: bool = True,
        keep: bool = True,
        **headers: str,
    ):
        sent = {**({"X-Ads-Sidecar-Token": self.callers[0]} if token else {}), **headers}
        connection = http.client.HTTPConnection("localhost", self.sidecar.port, timeout=30)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in sent.items()})
        answer = connection.getresponse()
        status, got, text = answer.status, answer.headers, answer.read().decode("utf-8", "replace")
        connection.close()
        if keep:
            self.answers[f"answer: {name}"] = f"{status} {got}\n{text}".encode()
        return status, got, text

    def live(self) -> None:
        """Everything that an app, its users and its attackers do."""
        self.sidecar.import_grant(token=self.imported)
        if self.before:
            for path in (self.directory, *self.directory.rglob("*")):
                os.chown(path, NOBODY, NOBODY)
        self.sidecar.start(*self.before, RUST_LOG="trace", RUST_BACKTRACE="full")
        assert self.ask("a call", "/sandbox/status/200", Authorization=f"Bearer {self.theirs}")[0] == 200
        self.ask("Amazon's refusal", "/v2/profiles", X_Ads_User="nobody")
        self.sandbox.set_fault("token_unauthorized", door="na")
        self.ask("a replay", "/sandbox/status/200")
        for fault in (
            "invalid_grant",
            "invalid_client",
            "bad_json",
            "html",
            "reset",
            {"status": {"code": 500, "headers": [], "body": "x"}},
        ):
            self.sandbox.set_fault(fault, door="lwa")
            self.ask(f"refresh: {fault}", "/api/auth/amazon/refresh", "POST")
        self.sandbox.calm()
        self.ask("refresh", "/api/auth/amazon/refresh", "POST")
        for headers in ({"X_Ads_Sidecar_Token": self.theirs}, {"Proxy_Authorization": f"Bearer {self.theirs}"}):
            assert self.ask(f"a wrong token: {[*headers]}", "/v2/profiles", token=False, **headers)[0] == 407
        basic = base64.b64encode(f"ads:{self.callers[1]}".encode()).decode()
        self.ask("by Basic", "/sandbox/status/200", token=False, Proxy_Authorization=f"Basic {basic}")
        form = urllib.parse.urlencode(
            {
                "client_id": "x",
                "client_secret": self.canaries["secret sent to the token endpoint"],
                "refresh_token": self.imported,
            }
        ).encode()
        self.ask(
            "the shim", "/auth/o2/token", "POST", form, token=False, Content_Type="application/x-www-form-urlencoded"
        )
        self.log_in("by a server", "server")
        self.log_in("by a browser", "browser", Accept="text/html")
        for name, query in {
            "a bad state": "code=ANx&state=" + self.canaries["state"],
            "a bad code": "code=" + self.canaries["authorization code"],
            "an error": "error=x&state=" + self.canaries["state"],
        }.items():
            self.ask(name, f"/api/auth/amazon/callback?{query}", token=False)
        self.ask("a bad confirmation", "/api/auth/amazon/confirm?grant=" + self.canaries["one-time id"], "POST")
        for path in ("/api/auth/amazon/status", "/api/auth/amazon/nothing", "/a/nobody/x"):
            self.ask(path, path)
        self.ask("logout", "/api/auth/amazon/logout?user_id=server", "POST")
        for path in ("/metrics", "/", "/log", "/readyz", "/nothing"):
            answer = world.ask(self.sidecar.admin + path, headers={"X-Ads-Sidecar-Token": self.callers[0]})
            self.answers[f"admin: {path}"] = f"{answer[0]} {answer[1]}\n{answer[2]}".encode()
        seen = [call for call in self.sandbox.order("GET", "/history")["calls"] if call["door"] == "na"]
        bearers = {value for call in seen for name, value in call["headers"] if name == "authorization"}
        self.canaries["access token"] = max(bearers, key=len).partition("|")[2]

    def log_in(self, how: str, user: str, **headers: str) -> None:
        """A whole login. Its first response and the id in the last one contain secrets by design."""
        _, got, text = self.ask(f"login {how}", f"/api/auth/amazon/login?user_id={user}", keep=False, **headers)
        url = got.get("Location") or json.loads(text)["auth_url"]
        query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(url).query))
        consent = {"code_challenge": query["code_challenge"], "redirect_uri": query["redirect_uri"]}
        code = self.sandbox.order("POST", "/consent", consent)["code"]
        cookie = (got.get("Set-Cookie") or "").partition(";")[0]
        back = f"/api/auth/amazon/callback?code={code}&state={query['state']}&scope=x"
        status, _, text = self.ask(f"callback {how}", back, token=False, keep=how == "by a browser", Cookie=cookie)
        assert status == 200, text
        self.canaries |= {"state": query["state"], "authorization code": code}
        if cookie:
            self.canaries["login cookie"] = cookie.partition("=")[2]
        else:
            self.canaries["one-time id"] = json.loads(text)["grant"]
            assert (
                self.ask("confirm", f"/api/auth/amazon/confirm?grant={self.canaries['one-time id']}", "POST")[0] == 200
            )

    def commands(self) -> None:
        for words in (
            ["check"],
            ["users", "list"],
            ["users", "show", "default"],
            ["doctor"],
            ["doctor", "--json"],
            ["health"],
        ):
            ended = self.sidecar.command(*words, check=False)
            self.answers[f"command {' '.join(words)}"] = (ended.stdout + ended.stderr).encode()
        for key in (
            "store.fernet_keys",
            "amazon.redirect_uri",
            "refresh.margin",
            "proxy.caller_token",
            "log.level",
            "amazon.client_id",
        ):
            value = self.canaries["old client secret"] + "\n\x01"
            ended = self.sidecar.command("--set", f"{key}={value}", "check", check=False)
            self.answers[f"bad {key}"] = (ended.stdout + ended.stderr).encode()

    def places(self) -> dict[str, bytes]:
        """The places to search, after it has stopped."""
        return {**self.answers, "log": self.sidecar.log.read_bytes(), **files(self.sidecar.store.parent)}
