"""Every spelling of a managed header before a WSGI server, to which `_` and `-` are one."""

import subprocess
import sys

import backends
import spellings
import world


def test_row_80_whatever_the_spelling_a_wsgi_backend_sees_one_value_of_each_managed_header_and_that_is_ours(tmp_path):
    assert len(spellings.all_spellings()) >= 500
    sandbox = world.Sandbox(tmp_path)
    pem, port, log = backends.certificate(tmp_path), world.free_port(), tmp_path / "requests.log"
    server = subprocess.Popen([sys.executable, backends.SERVERS / "servers.py", "wsgiref", str(port), log, pem])
    sidecar = world.Sidecar(sandbox, tmp_path / "sidecar")
    try:
        world.until("the backend", lambda: backends.listens(port))
        sidecar.import_grant()
        trusted = str(backends.trust(sandbox, tmp_path))
        sidecar.start(ADSIDECAR_UPSTREAM__NA=f"https://127.0.0.1:{port}", ADSIDECAR_UPSTREAM__CA_FILE=trusted)
        passed, refused, wrong = spellings.try_all(sidecar, lambda: backends.entries(log), f"127.0.0.1:{port}")
        assert not wrong, "\n".join(wrong)
        assert passed > 200 and refused > 100, "the spellings are of both kinds"
        assert sidecar.stop() == 0
    finally:
        server.kill()
        server.wait()
        sidecar.end()
        sandbox.stop()
