"""How other HTTP servers parse the requests that adsidecar forwards. The campaigns do the same with more servers."""

import asyncio

import backends
import desync
import pytest
import spellings
import world

MUTATIONS = 600


@pytest.fixture
def before(tmp_path):
    """Starts an adsidecar in front of a backend of a kind."""
    started = []

    def start(kind: str) -> tuple[world.Sidecar, backends.Simple]:
        started.append(sandbox := world.Sandbox(tmp_path))
        started.append(backend := backends.Simple(kind, tmp_path))
        sidecar = world.Sidecar(sandbox, tmp_path / "sidecar")
        sidecar.import_grant()
        sidecar.start(**backend.before(sandbox))
        started.append(sidecar)
        return sidecar, backend

    yield start
    for one in reversed(started):
        one.stop()


# Covers: failure 80.
def test_for_every_spelling_a_wsgi_backend_gets_exactly_one_value_of_each_managed_header(before):
    assert len(spellings.all_spellings()) >= 500
    sidecar, backend = before("wsgiref")
    passed, refused, wrong = spellings.try_all(sidecar, backend.seen, f"127.0.0.1:{backend.port}")
    assert not wrong, "\n".join(wrong)
    assert passed > 200 and refused > 100, "some spellings must pass and some be rejected"


# Covers: threat 16.
def test_no_mutated_request_is_parsed_differently_by_the_backend(before):
    sidecar, backend = before("aiohttp")
    told = asyncio.run(desync.attack(sidecar.port, range(MUTATIONS), seed=1))
    found = desync.desyncs(told, backend.seen())
    assert not found, "\n".join(found)
    passed = [reply for replies in told.values() for reply in replies if reply[3]]
    assert len(passed) > MUTATIONS / 2, "enough mutations must pass to be meaningful"


def test_the_harness_detects_a_desync():
    told = {7: [(200, "", "c-7-87bd7d4c", "/sandbox/echo?c-7-87bd7d4c")]}
    seen = [{"target": "/sandbox/echo?c-7-87bd7d4c", "headers": []}]
    assert desync.desyncs(told, seen) == []
    assert desync.desyncs(told, [*seen, {"target": "/sandbox/echo?s-7-0", "headers": []}]), (
        "a call that nobody was answered"
    )
    assert desync.desyncs(told, seen * 2), "a call twice"
