"""Renders deploy/kubernetes and holds it to the API's schema, to Pod Security "restricted" and to what adsidecar needs."""

import copy
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from cryptography.fernet import Fernet

# https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted
RESTRICTED_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
# Fields that the "baseline" level refuses to see at all or to see true.
BASELINE_POD_REFUSALS = ("hostNetwork", "hostPID", "hostIPC")

# shutdown.drain when nobody says otherwise, in seconds.
DEFAULT_DRAIN = 25


def containers(pod: dict) -> list[dict]:
    return pod.get("initContainers", []) + pod["containers"]


def pod_security_violations(pod: dict) -> list[str]:
    """What the "restricted" level has against this pod, in its own words; empty if nothing."""
    found = [f"{name} is set" for name in BASELINE_POD_REFUSALS if pod.get(name)]
    pod_context = pod.get("securityContext", {})
    for volume in pod.get("volumes", []):
        kinds = set(volume) - {"name"}
        found += [f"volume {volume['name']} is a {kind}" for kind in kinds - RESTRICTED_VOLUMES]
    for container in containers(pod):
        context = container.get("securityContext", {})
        effective = {**pod_context, **context}
        capabilities = context.get("capabilities", {})
        rules = {
            "privileged": not context.get("privileged", False),
            "allowPrivilegeEscalation": context.get("allowPrivilegeEscalation") is False,
            "runAsNonRoot": effective.get("runAsNonRoot") is True,
            "runAsUser": effective.get("runAsUser", 1) != 0,
            "seccompProfile": effective.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"),
            "capabilities.drop": "ALL" in capabilities.get("drop", []),
            "capabilities.add": set(capabilities.get("add", [])) <= {"NET_BIND_SERVICE"},
            "procMount": context.get("procMount", "Default") == "Default",
            "hostPort": not any(port.get("hostPort") for port in container.get("ports", [])),
        }
        found += [f"{container['name']}: {rule}" for rule, kept in rules.items() if not kept]
    return found


@pytest.fixture(scope="module")
def directory(repository) -> Path:
    return repository / "deploy" / "kubernetes"


@pytest.fixture(scope="module")
def rendered(directory) -> str:
    return subprocess.run(["kubectl", "kustomize", directory], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def resources(rendered) -> dict[str, dict]:
    return {resource["kind"]: resource for resource in yaml.safe_load_all(rendered)}


@pytest.fixture(scope="module")
def deployment(resources) -> dict:
    return resources["Deployment"]["spec"]


@pytest.fixture(scope="module")
def pod(deployment) -> dict:
    return deployment["template"]["spec"]


@pytest.fixture(scope="module")
def sidecar(pod) -> dict:
    [sidecar] = pod["initContainers"]
    assert sidecar["name"] == "adsidecar"
    return sidecar


@pytest.fixture(scope="module")
def secret(directory) -> dict:
    return yaml.safe_load((directory / "secret.example.yaml").read_text())


@pytest.fixture
def configured(directory, sidecar, tmp_path):
    """Gives the environment of the sidecar's container, its mounts replaced by files here that hold `values`."""

    def environment(values: dict[str, str]) -> dict[str, str]:
        names = {variable["name"]: variable["value"] for variable in sidecar["env"]}
        for name, value in names.items():
            if name.endswith("_FILE"):
                here = tmp_path / Path(value).name
                here.write_text(values[here.name] + "\n")
                names[name] = str(here)
        return {**names, "ADSIDECAR_CONFIG": str(directory / "adsidecar.toml"), "PATH": os.environ["PATH"]}

    return environment


def without(container_field: str):
    def change(pod: dict) -> None:
        del pod["initContainers"][0]["securityContext"][container_field]

    return change


@pytest.mark.parametrize(
    "change, complaint",
    [
        (without("allowPrivilegeEscalation"), "adsidecar: allowPrivilegeEscalation"),
        (without("capabilities"), "adsidecar: capabilities.drop"),
        (lambda pod: pod["securityContext"].pop("runAsNonRoot"), "app: runAsNonRoot"),
        (lambda pod: pod["securityContext"].pop("seccompProfile"), "app: seccompProfile"),
        (lambda pod: pod["containers"][0]["securityContext"].update(runAsUser=0), "app: runAsUser"),
        (lambda pod: pod["volumes"].append({"name": "x", "hostPath": {"path": "/"}}), "volume x is a hostPath"),
        (lambda pod: pod.update(hostNetwork=True), "hostNetwork is set"),
    ],
)
def test_the_pod_security_check_sees_a_loosened_pod(pod, change, complaint):
    loosened = copy.deepcopy(pod)
    change(loosened)
    assert complaint in pod_security_violations(loosened)


def test_the_schema_check_sees_a_misspelt_field(resources):
    wrong = copy.deepcopy(resources["Deployment"])
    wrong["spec"]["template"]["spec"]["initContainers"][0]["restartpolicy"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


def test_the_example_secret_is_not_applied_and_holds_no_real_value(resources, secret):
    assert "Secret" not in resources, "an apply would write the example's values over the real ones"
    assert set(secret["stringData"].values()) == {"replace-me"}
    assert "data" not in secret


def test_the_example_secret_does_not_start_adsidecar(adsidecar, configured, secret):
    run = subprocess.run([adsidecar, "check"], env=configured(secret["stringData"]), capture_output=True, text=True)
    assert run.returncode == 78, run.stdout + run.stderr


def test_every_resource_obeys_the_schema_of_its_api(resources, secret):
    assert set(resources) == {"ConfigMap", "Deployment", "PersistentVolumeClaim"}
    for resource in [*resources.values(), secret]:
        kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)


def test_the_pod_is_allowed_in_a_restricted_namespace(pod):
    assert pod_security_violations(pod) == []


def test_the_pod_is_closed_further_than_restricted_asks(pod):
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False, "Kubernetes would inject ADSIDECAR_* names"
    assert not pod.get("shareProcessNamespace", False)
    assert all(c["securityContext"]["readOnlyRootFilesystem"] for c in containers(pod))
    users = [c["securityContext"].get("runAsUser", pod["securityContext"]["runAsUser"]) for c in containers(pod)]
    assert len(set(users)) == len(users), "each container is a user of its own"


def test_adsidecar_is_a_native_sidecar_of_this_version(sidecar, repository):
    version = tomllib.loads((repository / "Cargo.toml").read_text())["package"]["version"]
    assert sidecar["restartPolicy"] == "Always"
    assert sidecar["image"] == f"adsidecar:{version}"
    assert "command" not in sidecar, "the image's entry point is the binary"


def test_the_probes_run_inside_the_pod_where_the_doors_listen(sidecar):
    ready, alive = ["/adsidecar", "health", "--ready"], ["/adsidecar", "health"]
    probes = {name: sidecar[name] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert {name: probe["exec"]["command"] for name, probe in probes.items()} == {
        "startupProbe": ready,
        "readinessProbe": ready,
        "livenessProbe": alive,
    }
    assert "args" not in sidecar, "the probes would not get them: configure by the environment"


def test_the_user_is_that_of_the_image(pod, repository):
    user = pod["securityContext"]["runAsUser"]
    assert f"USER {user}:{user}" in (repository / "Dockerfile").read_text()
    assert pod["securityContext"]["fsGroup"] == user


def test_the_store_has_one_holder_at_a_time(deployment, pod, sidecar, resources):
    assert deployment["strategy"] == {"type": "Recreate"}
    assert deployment["replicas"] == 1
    [volume] = [v for v in pod["volumes"] if "persistentVolumeClaim" in v]
    assert volume["persistentVolumeClaim"]["claimName"] == resources["PersistentVolumeClaim"]["metadata"]["name"]
    [mount] = [m for m in sidecar["volumeMounts"] if m["name"] == volume["name"]]
    store = Path(tomllib.loads(resources["ConfigMap"]["data"]["adsidecar.toml"])["store"]["path"])
    assert store.parent == Path(mount["mountPath"])


def test_there_is_time_to_drain(pod, resources):
    settings = tomllib.loads(resources["ConfigMap"]["data"]["adsidecar.toml"])
    assert "drain" not in settings.get("shutdown", {}), "then compare with that"
    assert pod["terminationGracePeriodSeconds"] > DEFAULT_DRAIN


def test_the_secrets_are_files_that_only_adsidecar_can_read(pod, sidecar, secret):
    [volume] = [v for v in pod["volumes"] if "secret" in v]
    assert volume["secret"]["secretName"] == secret["metadata"]["name"]
    assert volume["secret"]["defaultMode"] & 0o007 == 0
    [mount] = [m for m in sidecar["volumeMounts"] if m["name"] == volume["name"]]
    assert mount["readOnly"] is True
    assert "volumeMounts" not in pod["containers"][0]
    files = {e["value"] for e in sidecar["env"] if e["name"].endswith("_FILE")}
    assert files == {f"{mount['mountPath']}/{key}" for key in secret["stringData"]}
    assert all("valueFrom" not in e for e in sidecar["env"]), "no secret by the environment"


def test_the_configuration_is_accepted_with_secrets_in_files(adsidecar, configured):
    client_secret = "a-client-secret-that-must-not-be-shown"
    values = {"amazon-client-secret": client_secret, "fernet-key": Fernet.generate_key().decode()}
    run = subprocess.run([adsidecar, "check"], env=configured(values), capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "amzn1.application-oa2-client.replace-me" in run.stdout, "check prints the resolved configuration"
    assert client_secret not in run.stdout + run.stderr


def test_checkov_finds_nothing_that_is_not_waived_with_a_reason(rendered, tmp_path):
    manifest = tmp_path / "rendered.yaml"
    manifest.write_text(rendered)
    checkov = Path(sys.executable).with_name("checkov")
    waivers = Path(__file__).with_name("checkov.yaml")
    command = [checkov, "--config-file", waivers, "--file", manifest, "--output", "json"]
    run = subprocess.run(command, capture_output=True, text=True)
    report = json.loads(run.stdout)
    failed = [f"{c['check_id']} {c['check_name']}: {c['resource']}" for c in report["results"]["failed_checks"]]
    assert failed == [] and run.returncode == 0
    assert report["summary"]["passed"] > 60, "so few checks: did checkov read the file?"
