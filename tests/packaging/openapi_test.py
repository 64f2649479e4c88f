"""config/openapi.yaml matches a running sidecar: calls its endpoints and validates their responses against its
schemas."""

import json
import re
import urllib.error
import urllib.request

import jsonschema
import pytest
import yaml

# The parameters of requests that need some.
QUERIES = {"beginLogin": "?user_id=anna", "status": "?user_id=default", "exportUser": "?user_id=default"}
BODIES = {
    "setLogLevel": b"info",
    "restore": b"{}",
    "placeholderToken": b"grant_type=refresh_token&refresh_token=x&client_id=x&client_secret=x",
}
# These are sent without a required parameter, and are refused as described.
REFUSED = {"endLogin": 400, "confirm": 400, "rotate": 400, "importUser": 400}
# These take away what others need, so they are called last, in this order.
LAST = ["logout", "quit"]


@pytest.fixture(scope="module")
def described(repository) -> dict:
    return yaml.safe_load((repository / "config" / "openapi.yaml").read_text())


def operations(described: dict) -> list[tuple[str, str, dict]]:
    found = [(path, method, op) for path, item in described["paths"].items() for method, op in item.items()]
    return sorted(found, key=lambda one: 1 + LAST.index(name) if (name := one[2]["operationId"]) in LAST else 0)


def resolved(described: dict, node: dict) -> dict:
    while "$ref" in node:
        target = described
        for name in node["$ref"].removeprefix("#/").split("/"):
            target = target[name]
        node = target
    return node


def response_to(url: str, method: str, body: bytes | None) -> tuple[int, str, str]:
    request = urllib.request.Request(url, method=method, data=body, headers={"Accept": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    if body is not None and method == "POST":
        request.add_header("Content-Type", "application/x-www-form-urlencoded")
    try:
        with opener.open(request, timeout=30) as answer:
            kind = answer.headers.get_content_type()
            # The event stream ends with the sidecar: its first line is enough.
            text = answer.readline() if kind == "text/event-stream" else answer.read()
            return answer.status, kind, text.decode()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.headers.get_content_type(), refused.read().decode()


def test_every_response_is_as_described(described, sandbox_of_its_own):
    sandbox = sandbox_of_its_own
    for path, method, operation in operations(described):
        name = operation["operationId"]
        listener = sandbox.admin if "servers" in operation else sandbox.proxy
        url = listener + path.replace("{user_id}", "nobody") + QUERIES.get(name, "")
        status, kind, text = response_to(url, method.upper(), BODIES.get(name))
        if name in REFUSED:
            assert status == REFUSED[name], f"{name}: {status} {text}"
        else:
            assert str(status) in operation["responses"] and status < 300, f"{name}: {status} {text}"
        response = operation["responses"].get(str(status)) or operation["responses"]["default"]
        content = resolved(described, response).get("content")
        if content is None:
            assert text == "", name
            continue
        if name == "endLogin":
            continue  # Its refusal has codes of its own; tests/e2e/login.rs holds it to them.
        assert kind in content, f"{name}: {kind}"
        schema = content[kind].get("schema")
        if schema and kind.endswith("json"):
            jsonschema.validate(json.loads(text), {**schema, "components": described["components"]})
    assert sandbox.process.wait(30) == 0


def test_the_schemas_see_an_answer_that_lacks_something(described):
    schema = {"$ref": "#/components/schemas/Problem", "components": described["components"]}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"type": "x", "title": "x"}, schema)


def test_every_endpoint_and_every_reference_is_there(described, repository):
    text = (repository / "config" / "openapi.yaml").read_text()
    for reference in re.findall(r'\$ref: "(#/[^"]+)"', text):
        assert resolved(described, {"$ref": reference}), reference
    sources = [repository / "src" / "inbound" / folder / "mod.rs" for folder in ("destination", "admin")]
    source = "".join(file.read_text() for file in sources)
    known = set(re.findall(r'"(/(?:api/auth/amazon/|auth/o2/)?[a-z]+)"', source)) | {"/"}
    # Paths that are answered with 404 only, the health check of the login listener, and the prefix of an account.
    known -= {"/register", "/authorize", "/healthz", "/token", "/a"}
    paths = {path for path in described["paths"] if "{" not in path}
    assert known <= paths, known - paths
    assert "/api/auth/amazon/users/{user_id}" in described["paths"]
