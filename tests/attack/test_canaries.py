"""Secrets appear only where they belong."""

import canary
import world


# Covers: failure 107.
def test_no_secret_is_in_a_log_a_metric_a_page_an_error_or_a_file_in_any_of_six_encodings(tmp_path):
    sandbox = world.Sandbox(tmp_path)
    run = canary.Run(sandbox, tmp_path / "run", "json")
    try:
        run.live()
        assert run.sidecar.stop() == 0
        run.commands()
    finally:
        run.sidecar.end()
        sandbox.stop()
    places = run.places()
    assert len(run.canaries) >= 12
    assert sum(len(content) for content in places.values()) > 100_000, "too little output was searched"
    assert canary.hits(run.canaries, places) == []


def test_a_planted_secret_is_found_in_each_encoding():
    secret = canary.secret("planted").replace('"', "")
    for encoding, needles in canary.encoded(secret.encode()).items():
        for needle in needles:
            found = canary.hits({"planted": secret}, {"log": b"2026-11-24T12:00:00Z INFO words " + needle + b" more\n"})
            assert ("planted", encoding, "log") in found, (encoding, needle)
