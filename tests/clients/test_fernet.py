"""Python's `cryptography` reads what adsidecar stores, and adsidecar reads what Python stored.

Each token of a record is a Fernet token of its own whose plaintext is the token itself, so that nobody's grants are
locked in.
"""

import json

import pytest
from cryptography.fernet import Fernet, InvalidToken


@pytest.fixture(scope="module")
def records(sandbox, run_adsidecar) -> dict:
    """The records of the sandbox's store, dumped after the sandbox ended: a dump needs the store to itself."""
    assert sandbox.stop() == 0
    dump = run_adsidecar("--config", sandbox.config, "store", "dump")
    assert dump.returncode == 0, dump.stderr
    return json.loads(dump.stdout)


@pytest.fixture
def standalone(run_adsidecar, tmp_path):
    """Runs an adsidecar command on a store of the test's own, encrypted with the given key."""

    def run(key: str, *words: str):
        return run_adsidecar(
            *words,
            AMAZON_CLIENT_ID="amzn1.application-oa2-client.test",
            AMAZON_CLIENT_SECRET="unused",
            FERNET_KEY=key,
            ADSIDECAR_STORE__PATH=str(tmp_path / "store.sled"),
        )

    return run


@pytest.fixture
def written_by_python(tmp_path):
    """A file of records as a service in Python would have stored them: five fields, times without a zone."""

    def write(key: str, access_token: str, refresh_token: str) -> str:
        seal = Fernet(key)
        record = {
            "access_token": seal.encrypt(access_token.encode()).decode(),
            "refresh_token": seal.encrypt(refresh_token.encode()).decode(),
            "token_type": "bearer",
            "expires_at": "2026-01-01T12:00:00",
            "updated_at": "2026-01-01T11:00:00",
        }
        path = tmp_path / "records.json"
        path.write_text(json.dumps({"anna": record}))
        return str(path)

    return write


def test_another_key_opens_no_stored_token(records):
    stranger = Fernet(Fernet.generate_key())
    for name in ("access_token", "refresh_token", "seal"):
        with pytest.raises(InvalidToken):
            stranger.decrypt(records["default"][name])


def test_no_stored_token_stands_there_in_the_clear(records):
    assert "Atza|" not in json.dumps(records) and "Atzr|" not in json.dumps(records)


def test_python_opens_the_stored_tokens_and_finds_nothing_else_in_them(records, sandbox):
    ring, record = Fernet(sandbox.fernet_key), records["default"]
    # The prefixes are Login with Amazon's.
    assert ring.decrypt(record["access_token"]).startswith(b"Atza|")
    assert ring.decrypt(record["refresh_token"]).startswith(b"Atzr|")
    assert ring.decrypt(record["seal"])


def test_python_takes_the_key_that_key_new_makes(standalone):
    made = standalone(Fernet.generate_key().decode(), "key", "new")
    assert made.returncode == 0, made.stderr
    assert Fernet(made.stdout.strip()).encrypt(b"anything")


def test_records_sealed_by_another_key_are_not_imported(standalone, written_by_python):
    path = written_by_python(Fernet.generate_key().decode(), "Atza|access", "Atzr|refresh")
    run = standalone(Fernet.generate_key().decode(), "users", "import", "--records", path, "--offline")
    assert run.returncode != 0
    assert run.stderr.strip(), "a refusal says why"


def test_records_that_python_wrote_are_imported_and_come_out_the_same(standalone, written_by_python):
    key = Fernet.generate_key().decode()
    path = written_by_python(key, "Atza|access", "Atzr|refresh")
    run = standalone(key, "users", "import", "--records", path, "--offline")
    assert run.returncode == 0, run.stderr
    dump = standalone(key, "store", "dump")
    assert dump.returncode == 0, dump.stderr
    record = json.loads(dump.stdout)["anna"]
    assert Fernet(key).decrypt(record["access_token"]) == b"Atza|access"
    assert Fernet(key).decrypt(record["refresh_token"]) == b"Atzr|refresh"
    assert record["expires_at"] == "2026-01-01T12:00:00Z", "a time without a zone is UTC"
