"""Renders every overlay of deploy/kubernetes and holds it to the API's schema, to Pod Security "restricted", to checkov
and to what adsidecar needs."""

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

OVERLAYS = ["cronjob", "deployment-emptydir", "deployment-volume", "job", "login-ingress", "postgres", "statefulset"]
# The resources of each overlay. All are listed, so that none is rendered without a check.
WORKLOADS = {"Deployment", "StatefulSet", "Job", "CronJob"}
BASE = {"ConfigMap adsidecar", "NetworkPolicy app"}
MONITORING = {
    "ConfigMap adsidecar-dashboard",
    "PodMonitor adsidecar",
    "PrometheusRule adsidecar",
    "NetworkPolicy ads-admin",
}
VOLUME = BASE | MONITORING | {"Deployment app", "PersistentVolumeClaim adsidecar"}
EXPECTED = {
    "cronjob": BASE | {"CronJob app"},
    "deployment-emptydir": BASE | MONITORING | {"Deployment app"},
    "deployment-volume": VOLUME,
    "job": BASE | {"Job app"},
    "login-ingress": VOLUME | {"Service ads-login", "Ingress ads-login", "NetworkPolicy ads-login"},
    "postgres": BASE | MONITORING | {"Deployment app", "PodDisruptionBudget app"},
    "statefulset": BASE | MONITORING | {"StatefulSet app", "Service app"},
}

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
# Fields that the "baseline" level does not allow, or not with the value true.
BASELINE_POD_REFUSALS = ("hostNetwork", "hostPID", "hostIPC")

# The default of shutdown.drain, and the time limit of a token call in flight, in seconds.
LONGEST_SHUTDOWN = 25 + 12

# The custom resources of the Prometheus operator: kubernetes-validate has no schema for them. These are the fields that
# we use, as https://prometheus-operator.dev/docs/api-reference/api/ has them.
POD_MONITOR = {"selector": {"matchLabels"}, "podMetricsEndpoints": None}
ENDPOINT = {"port", "path", "interval", "scrapeTimeout", "relabelings"}
RULE = {"alert", "expr", "for", "labels", "annotations"}


def containers(pod: dict) -> list[dict]:
    return pod.get("initContainers", []) + pod["containers"]


def pod_security_violations(pod: dict) -> list[str]:
    """The violations of the "restricted" level in this pod; empty if there are none."""
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
def rendered(directory) -> dict[str, str]:
    def render(name: str) -> str:
        command = ["kubectl", "kustomize", directory / "overlays" / name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    return {name: render(name) for name in OVERLAYS}


@pytest.fixture(scope="module")
def overlays(rendered) -> dict[str, dict[str, dict]]:
    """The resources of each overlay, by kind and by name without kustomize's hash."""

    def key(resource: dict) -> str:
        name = resource["metadata"]["name"]
        return f"{resource['kind']} {name.rpartition('-')[0] if resource['kind'] == 'ConfigMap' else name}"

    return {name: {key(r): r for r in yaml.safe_load_all(text)} for name, text in rendered.items()}


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request, overlays) -> dict[str, dict]:
    return overlays[request.param]


def workload_of(overlay: dict[str, dict]) -> dict:
    [workload] = [resource for resource in overlay.values() if resource["kind"] in WORKLOADS]
    return workload


def pod_of(overlay: dict[str, dict]) -> dict:
    spec = workload_of(overlay)["spec"]
    spec = spec["jobTemplate"]["spec"] if "jobTemplate" in spec else spec
    return spec["template"]["spec"]


def sidecar_of(overlay: dict[str, dict]) -> dict:
    [sidecar] = pod_of(overlay)["initContainers"]
    assert sidecar["name"] == "adsidecar"
    return sidecar


def is_shared(overlay: dict[str, dict]) -> bool:
    """Whether the grants are in a shared database."""
    return any(e["name"] == "ADSIDECAR_STORE__POSTGRES_URL_FILE" for e in sidecar_of(overlay)["env"])


def settings_of(overlay: dict[str, dict]) -> dict:
    return tomllib.loads(overlay["ConfigMap adsidecar"]["data"]["adsidecar.toml"])


@pytest.fixture(scope="module")
def secret(directory) -> dict:
    return yaml.safe_load((directory / "sidecar" / "secret.example.yaml").read_text())


@pytest.fixture
def configured(directory, tmp_path):
    """Gives the environment of an overlay's sidecar, its mounts replaced by files here that hold `values`."""

    def environment(overlay: dict[str, dict], values: dict[str, str]) -> dict[str, str]:
        names = {variable["name"]: variable["value"] for variable in sidecar_of(overlay)["env"]}
        for name, value in names.items():
            if name.endswith("_FILE"):
                here = tmp_path / Path(value).name
                here.write_text(values[here.name] + "\n")
                names[name] = str(here)
        names["ADSIDECAR_CONFIG"] = str(directory / "sidecar" / "adsidecar.toml")
        return {**names, "PATH": os.environ["PATH"]}

    return environment


# The checks detect what they are for.


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
def test_the_pod_security_check_sees_a_loosened_pod(overlays, change, complaint):
    loosened = copy.deepcopy(pod_of(overlays["deployment-volume"]))
    change(loosened)
    assert complaint in pod_security_violations(loosened)


def test_the_schema_check_sees_a_misspelt_field(overlays):
    wrong = copy.deepcopy(overlays["deployment-volume"]["Deployment app"])
    wrong["spec"]["template"]["spec"]["initContainers"][0]["restartpolicy"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


# Every overlay.


def test_every_overlay_that_lies_there_is_one_of_these(directory):
    assert sorted(path.name for path in (directory / "overlays").iterdir()) == OVERLAYS


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_renders_what_it_should_and_nothing_else(overlays, name):
    assert set(overlays[name]) == EXPECTED[name]


def test_every_resource_obeys_the_schema_of_its_api(overlay, secret):
    for resource in [*overlay.values(), secret]:
        if resource["apiVersion"] == "monitoring.coreos.com/v1":
            continue  # The next test checks these.
        kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)


def test_the_custom_resources_use_known_fields(overlays):
    resources = [r for r in overlays["statefulset"].values() if r["apiVersion"] == "monitoring.coreos.com/v1"]
    specs = {resource["kind"]: resource["spec"] for resource in resources}
    assert set(specs) == {"PodMonitor", "PrometheusRule"}
    monitor = specs["PodMonitor"]
    assert set(monitor) == set(POD_MONITOR) and set(monitor["selector"]) == POD_MONITOR["selector"]
    assert all(set(endpoint) <= ENDPOINT for endpoint in monitor["podMetricsEndpoints"])
    [group] = specs["PrometheusRule"]["groups"]
    assert set(group) == {"name", "rules"} and all(set(rule) == RULE for rule in group["rules"])


def test_the_pod_is_allowed_in_a_restricted_namespace(overlay):
    assert pod_security_violations(pod_of(overlay)) == []


def test_the_pod_is_closed_further_than_restricted_asks(overlay):
    pod = pod_of(overlay)
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False, "Kubernetes would inject ADSIDECAR_* names"
    assert not pod.get("shareProcessNamespace", False)
    assert all(c["securityContext"]["readOnlyRootFilesystem"] for c in containers(pod))
    users = [c["securityContext"]["runAsUser"] for c in containers(pod)]
    assert len(set(users)) == len(users), "each container is a user of its own"


def test_adsidecar_is_a_native_sidecar_of_this_version(overlay, repository):
    version = tomllib.loads((repository / "Cargo.toml").read_text())["package"]["version"]
    sidecar = sidecar_of(overlay)
    assert sidecar["restartPolicy"] == "Always"
    assert sidecar["image"] == f"adsidecar:{version}"
    assert "command" not in sidecar, "the image's entry point is the binary"
    assert sidecar["resources"]["requests"] and sidecar["resources"]["limits"]["memory"]


def test_the_probes_run_inside_the_pod_where_the_listeners_are(overlay):
    sidecar = sidecar_of(overlay)
    ready, alive = ["/adsidecar", "health", "--ready"], ["/adsidecar", "health"]
    probes = {name: sidecar[name] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert {name: probe["exec"]["command"] for name, probe in probes.items()} == {
        "startupProbe": ready,
        "readinessProbe": ready,
        "livenessProbe": alive,
    }
    assert "args" not in sidecar, "the probes would not get them: configure by the environment"


def test_the_user_is_that_of_the_image(overlay, repository):
    user = sidecar_of(overlay)["securityContext"]["runAsUser"]
    assert f"USER {user}:{user}" in (repository / "Dockerfile").read_text()
    assert pod_of(overlay)["securityContext"]["fsGroup"] == user


def test_there_is_time_to_drain(overlay):
    assert "shutdown" not in settings_of(overlay), "the drain is not the default: compare with it"
    assert pod_of(overlay)["terminationGracePeriodSeconds"] > LONGEST_SHUTDOWN


def test_the_store_lies_on_the_volume(overlay):
    if is_shared(overlay):
        assert not any("persistentVolumeClaim" in v or "emptyDir" in v for v in pod_of(overlay)["volumes"])
        assert all(mount["readOnly"] for mount in sidecar_of(overlay)["volumeMounts"])
        return
    [mount] = [m for m in sidecar_of(overlay)["volumeMounts"] if m["name"] == "adsidecar-store"]
    assert Path(settings_of(overlay)["store"]["path"]).parent == Path(mount["mountPath"])
    volumes = pod_of(overlay).get("volumes", []) + [
        {"name": claim["metadata"]["name"]} for claim in workload_of(overlay)["spec"].get("volumeClaimTemplates", [])
    ]
    assert "adsidecar-store" in [volume["name"] for volume in volumes]


def test_the_secrets_are_projected_files_that_only_adsidecar_can_read(overlay, secret):
    pod, sidecar = pod_of(overlay), sidecar_of(overlay)
    [volume] = [v for v in pod["volumes"] if "projected" in v]
    [source] = volume["projected"]["sources"]
    assert source["secret"]["name"] == secret["metadata"]["name"]
    assert volume["projected"]["defaultMode"] & 0o007 == 0
    [mount] = [m for m in sidecar["volumeMounts"] if m["name"] == volume["name"]]
    assert mount["readOnly"] is True
    assert "volumeMounts" not in pod["containers"][0]
    read = {e["value"] for e in sidecar["env"] if e["name"].endswith("_FILE")}
    assert read == {f"{mount['mountPath']}/{item['path']}" for item in source["secret"]["items"]}
    assert {item["key"] for item in source["secret"]["items"]} <= set(secret["stringData"])
    assert all("valueFrom" not in e for e in sidecar["env"]), "no secret in the environment"


def test_the_configuration_is_accepted_with_secrets_in_files(overlay, adsidecar, configured):
    client_secret = "a-client-secret-that-must-not-be-shown"
    values = {"amazon-client-secret": client_secret, "fernet-key": Fernet.generate_key().decode()}
    values["amazon-refresh-token"] = "Atzr|a-refresh-token-that-must-not-be-shown"
    values["postgres-url"] = "postgres://adsidecar:must-not-be-shown@db.example/adsidecar?sslmode=verify-full"
    env = configured(overlay, values)
    run = subprocess.run([adsidecar, "check"], env=env, capture_output=True, text=True)
    assert run.returncode == 78 and "amazon.client_id" in run.stderr, "the client id is still to be filled in"
    env["AMAZON_CLIENT_ID"] = "amzn1.application-oa2-client.example"
    run = subprocess.run([adsidecar, "check"], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "amzn1.application-oa2-client.example" in run.stdout, "check prints the resolved configuration"
    assert "must-not-be-shown" not in run.stdout + run.stderr
    assert tomllib.loads(run.stdout)["store"]["kind"] == ("postgres" if is_shared(overlay) else "sled")


def test_the_example_secret_is_not_applied_and_starts_nothing(overlay, adsidecar, configured, secret):
    assert not any(key.startswith("Secret ") for key in overlay), "an apply would overwrite the real values"
    assert set(secret["stringData"].values()) == {"replace-me"}
    run = subprocess.run(
        [adsidecar, "check"], env=configured(overlay, secret["stringData"]), capture_output=True, text=True
    )
    assert run.returncode == 78, run.stdout + run.stderr


def test_a_policy_closes_the_pod_and_opens_only_what_another_names(overlay):
    policies = [r["spec"] for r in overlay.values() if r["kind"] == "NetworkPolicy"]
    assert all(policy["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "app"} for policy in policies)
    [base] = [policy for policy in policies if "Egress" in policy["policyTypes"]]
    assert "ingress" not in base or base["ingress"] == []
    database = {5432} if is_shared(overlay) else set()
    assert {port["port"] for rule in base["egress"] for port in rule["ports"]} == {53, 443} | database
    assert all(rule["to"] for rule in base["egress"])
    opened = [port["port"] for policy in policies for rule in policy.get("ingress", []) for port in rule["ports"]]
    listening = {p["containerPort"]: p["name"] for p in sidecar_of(overlay)["ports"]}
    assert 8001 not in opened and set(opened) <= set(listening)
    # A listener is opened if and only if it listens beyond loopback.
    environment = {e["name"]: e["value"] for e in sidecar_of(overlay)["env"]}
    beyond = {value.rpartition(":")[2] for name, value in environment.items() if name.endswith("__LISTEN")}
    assert beyond == {str(port) for port in opened}


# Individual overlays.


def test_the_sidecar_of_a_cronjob_is_that_of_a_job(overlays):
    assert sidecar_of(overlays["cronjob"]) == sidecar_of(overlays["job"])
    assert pod_of(overlays["cronjob"]) == pod_of(overlays["job"])


def test_a_store_on_a_volume_has_one_holder_at_a_time(overlays):
    for name in ("deployment-volume", "login-ingress"):
        deployment = overlays[name]["Deployment app"]["spec"]
        assert (deployment["replicas"], deployment["strategy"]) == (1, {"type": "Recreate"})
        [volume] = [v for v in pod_of(overlays[name])["volumes"] if "persistentVolumeClaim" in v]
        assert f"PersistentVolumeClaim {volume['persistentVolumeClaim']['claimName']}" in overlays[name]
    assert overlays["statefulset"]["StatefulSet app"]["spec"]["serviceName"] == "app"


def test_pods_that_share_their_grants_are_several_and_replaced_one_by_one(overlays):
    overlay = overlays["postgres"]
    assert [name for name in OVERLAYS if is_shared(overlays[name])] == ["postgres"]
    deployment = overlay["Deployment app"]["spec"]
    assert deployment["replicas"] >= 2
    assert deployment["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}
    budget = overlay["PodDisruptionBudget app"]["spec"]
    assert budget["selector"] == deployment["selector"] and budget["maxUnavailable"] == 1
    environment = {e["name"]: e["value"] for e in sidecar_of(overlay)["env"]}
    assert environment["ADSIDECAR_STORE__KIND"] == "postgres"
    assert "AMAZON_REFRESH_TOKEN_FILE" not in environment


def test_a_store_that_goes_with_its_pod_gets_its_grant_from_the_secret(overlays):
    for name in ("deployment-emptydir", "job", "cronjob"):
        assert any("emptyDir" in volume for volume in pod_of(overlays[name])["volumes"])
        names = [variable["name"] for variable in sidecar_of(overlays[name])["env"]]
        assert "AMAZON_REFRESH_TOKEN_FILE" in names


def test_a_job_ends(overlays):
    job = overlays["job"]["Job app"]["spec"]
    cronjob = overlays["cronjob"]["CronJob app"]["spec"]
    assert cronjob["jobTemplate"]["spec"] == job
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["activeDeadlineSeconds"] and job["backoffLimit"] and job["ttlSecondsAfterFinished"]
    assert cronjob["concurrencyPolicy"] == "Forbid"


def test_the_ingress_leads_only_to_the_callback_at_the_login_listener(overlays):
    overlay = overlays["login-ingress"]
    environment = {e["name"]: e["value"] for e in sidecar_of(overlay)["env"]}
    [rule] = overlay["Ingress ads-login"]["spec"]["rules"]
    [path] = rule["http"]["paths"]
    assert environment["AMAZON_OAUTH_REDIRECT_URI"] == f"https://{rule['host']}{path['path']}"
    assert path["pathType"] == "Exact"
    service = overlay[f"Service {path['backend']['service']['name']}"]["spec"]
    [port] = [p for p in service["ports"] if p["name"] == path["backend"]["service"]["port"]["name"]]
    ports = {p["name"]: p["containerPort"] for p in sidecar_of(overlay)["ports"]}
    assert environment["ADSIDECAR_LOGIN__LISTEN"].endswith(f":{ports[port['targetPort']]}")


def test_no_service_makes_kubernetes_inject_our_names(overlay):
    assert "Service adsidecar" not in overlay


def test_checkov_finds_nothing_that_is_not_waived_with_a_reason(rendered, tmp_path):
    # All overlays in one run: starting checkov takes longer than reading them.
    for name, text in rendered.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    checkov = Path(sys.executable).with_name("checkov")
    waivers = Path(__file__).with_name("checkov.yaml")
    command = [checkov, "--config-file", waivers, "--directory", tmp_path, "--output", "json"]
    run = subprocess.run(command, capture_output=True, text=True)
    report = json.loads(run.stdout)
    failed = [
        f"{c['check_id']} {c['check_name']}: {c['file_path']} {c['resource']}"
        for c in report["results"]["failed_checks"]
    ]
    assert failed == [] and run.returncode == 0
    assert report["summary"]["passed"] > 60 * len(OVERLAYS), "too few checks: did checkov read the files?"
