"""deploy/compose.yaml, without a container engine: its services are started as processes, in its order, with its
variables and commands; what only an engine reads is compared with the image and with adsidecar's own limits."""

import json
import os
import re
import socket
import subprocess
import tomllib
import urllib.request
from pathlib import Path

import pytest
import yaml

LIMIT_SECONDS = 60
# shutdown.accept and shutdown.drain by default, and the deadline of a refresh.
LONGEST_SHUTDOWN_SECONDS = 0 + 25 + 12


@pytest.fixture(scope="module")
def compose(repository) -> dict:
    return yaml.safe_load((repository / "deploy" / "compose.yaml").read_text())


def interpolated(value: str, variables: dict[str, str]) -> str:
    """A value as compose reads it. `KeyError` names a required variable that is missing."""

    def one(found: re.Match) -> str:
        name, operator, text = found.groups()
        if operator == ":?" and not variables.get(name):
            raise KeyError(name)
        return variables.get(name) or text

    return re.sub(r"\$\{(\w+)(:[?-])([^}]*)\}", one, value)


def run(command: list, environment: dict[str, str], **more) -> subprocess.CompletedProcess:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS, **more)


def seconds(duration: str) -> int:
    return int(duration.removesuffix("s"))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def variables(sandbox) -> dict[str, str]:
    """What the manual asks the user for, for a grant that has a refresh token already."""
    config = tomllib.loads(Path(sandbox.config).read_text())["amazon"]
    request = urllib.request.Request(f"{sandbox.control}/consent", data=b'{"want": "grant"}', method="POST")
    with urllib.request.urlopen(request, timeout=LIMIT_SECONDS) as answer:
        refresh_token = json.load(answer)["refresh_token"]
    return {
        "AMAZON_CLIENT_ID": config["client_id"],
        "AMAZON_CLIENT_SECRET": config["client_secret"],
        "FERNET_KEY": sandbox.fernet_key,
        "AMAZON_REFRESH_TOKEN": refresh_token,
    }


@pytest.fixture
def environment_of(compose, sandbox, tmp_path):
    """The environment of the service adsidecar; the sandbox is its Amazon, and its ports are free ones."""
    config = tomllib.loads(Path(sandbox.config).read_text())
    ports = {f"ADSIDECAR_{name}__LISTEN": f"127.0.0.1:{free_port()}" for name in ("PROXY", "ADMIN")}
    amazon = {f"ADSIDECAR_AMAZON__{key.upper()}": config["amazon"][key] for key in ("token_url", "ca_file")}
    upstream = {f"ADSIDECAR_UPSTREAM__{key.upper()}": value for key, value in config["upstream"].items()}

    def make(variables: dict[str, str]) -> dict[str, str]:
        service = compose["services"]["adsidecar"]["environment"]
        given = {name: interpolated(value, variables) for name, value in service.items()}
        return {"PATH": os.environ["PATH"], **ports, **amazon, **upstream, **given}

    return make


def test_each_variable_that_compose_demands_is_one_without_which_it_does_not_start(
    compose, environment_of, variables, adsidecar, tmp_path
):
    text = "\n".join(compose["services"]["adsidecar"]["environment"].values())
    demanded = re.findall(r"\$\{(\w+):\?", text)
    assert sorted(demanded) == ["AMAZON_CLIENT_ID", "AMAZON_CLIENT_SECRET", "FERNET_KEY"]
    for name in demanded:
        with pytest.raises(KeyError, match=name):
            environment_of({key: value for key, value in variables.items() if key != name})
    # Without a Fernet key, `development` would keep one on the volume, beside the grants that it opens.
    for name in ("AMAZON_CLIENT_ID", "AMAZON_CLIENT_SECRET"):
        environment = {key: value for key, value in environment_of(variables).items() if key != name}
        ended = run([adsidecar, "check"], environment, cwd=tmp_path)
        assert ended.returncode == 78, f"{name} is not needed: {ended.stdout}"


@pytest.mark.parametrize("with_refresh_token", [False, True])
def test_the_app_starts_once_adsidecar_is_healthy_and_gets_its_profiles(
    with_refresh_token, compose, environment_of, variables, adsidecar, sandbox, tmp_path
):
    services = compose["services"]
    if not with_refresh_token:
        del variables["AMAZON_REFRESH_TOKEN"]
    environment = environment_of(variables)
    (tmp_path / "data").mkdir()
    with (tmp_path / "log").open("w") as log:
        serving = subprocess.Popen([adsidecar], cwd=tmp_path, env=environment, stderr=log)
    try:
        word, program, *arguments = services["adsidecar"]["healthcheck"]["test"]
        assert (word, program) == ("CMD", "/adsidecar")
        for _ in range(LIMIT_SECONDS):
            probe = run([adsidecar, *arguments], environment)
            if probe.returncode == 0:
                break
            # `wait` sleeps until it is ready; the probe alone decides.
            run([adsidecar, "wait", "--timeout", "1s"], environment)
        assert probe.returncode == 0, (tmp_path / "log").read_text()
        app = services["app"]
        assert app["image"].startswith("curlimages/curl:")
        assert app["depends_on"]["adsidecar"]["condition"] == "service_healthy"
        command = [word.replace("localhost:8001", environment["ADSIDECAR_PROXY__LISTEN"]) for word in app["command"]]
        assert command != app["command"]
        ended = run(["curl", *command], {"PATH": os.environ["PATH"]})
        expected = sandbox.profile_id if with_refresh_token else "/api/auth/amazon/login?user_id=default"
        assert expected in ended.stdout, ended.stdout + ended.stderr
    finally:
        serving.terminate()
        assert serving.wait(seconds(services["adsidecar"]["stop_grace_period"])) == 0, (tmp_path / "log").read_text()
    # The image's working directory is /, and the volume is mounted at /data.
    assert (tmp_path / "data" / "adsidecar.sled").is_dir()


def test_what_only_an_engine_reads_fits_the_image(compose, repository):
    services = compose["services"]
    own, dockerfile = services["adsidecar"], (repository / "Dockerfile").read_text()
    assert (repository / "deploy" / own["build"] / "Dockerfile").is_file()
    assert own["image"].split(":")[1] == tomllib.loads((repository / "Cargo.toml").read_text())["package"]["version"]
    [volume] = own["volumes"]
    name, place = volume.split(":")
    assert name in compose["volumes"] and f'VOLUME ["{place}"]' in dockerfile and "WORKDIR /\n" in dockerfile
    assert seconds(own["stop_grace_period"]) >= LONGEST_SHUTDOWN_SECONDS
    assert 'ENTRYPOINT ["/adsidecar"]' in dockerfile and own["read_only"] and own["cap_drop"] == ["ALL"]
    for name, service in services.items():
        if name == "adsidecar":
            continue
        assert service["network_mode"] == "service:adsidecar" and "ports" not in service, name
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), f"{name} has no fixed version"
        for mount in service.get("volumes", []):
            assert (repository / "deploy" / mount.split(":")[0]).exists(), mount
    [config] = [word.partition("=")[2] for word in services["prometheus"]["command"]]
    assert (repository / "deploy" / "prometheus" / Path(config).name).is_file()
