"""The end of a process: Jobs, and shutdowns under load."""

import os
import re
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def job(repository) -> str:
    """The script of RECIPES.md for a Job without native sidecars."""
    [script] = re.findall(
        r"<!-- job -->\n```sh\n(.*?)```", (repository / "deploy" / "RECIPES.md").read_text(), re.DOTALL
    )
    return script


@pytest.mark.parametrize("called, code", [("/v2/profiles", 0), ("/a/nobody/v2/profiles", 22)])
def test_a_job_ends_its_sidecar_whatever_came_of_its_work(job, sandbox_of_its_own, called, code):
    sandbox = sandbox_of_its_own
    script = job.replace("http://localhost:8001/v2/profiles", sandbox.proxy + called)
    script = script.replace("http://localhost:9464", sandbox.admin)
    ran = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=60)
    assert ran.returncode == code, ran.stderr
    assert sandbox.process.wait(30) == 0, "the sidecar ends, and with it the pod"


@pytest.mark.parametrize(
    "words", [["--cycles", "2", "--rate", "300"], ["--cycles", "1", "--rate", "100", "--known-bad"]]
)
# Covers: failure 96.
def test_a_sigterm_under_load_loses_no_request_and_the_harness_detects_losses(repository, adsidecar, words):
    campaign = repository / "tests" / "campaigns" / "sigterms"
    # What ships stands alone: the sandbox is then of another build.
    sandbox = os.environ.get("ADSIDECAR_SANDBOX_BIN") or str(adsidecar.with_name("adsidecar-sandbox"))
    environment = {**os.environ, "ADSIDECAR_BIN": str(adsidecar), "ADSIDECAR_SANDBOX_BIN": sandbox}
    command = [sys.executable, campaign, *words]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
