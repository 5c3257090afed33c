"""The manifests of deploy/kuberay: valid for their kinds, locked down, in step with the rest."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator
from referencing import Registry, Resource

from tests.deploy_tests.kustomize import Manifest, build, containers, read

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "deploy" / "kuberay"
SCHEMAS = Path(__file__).parent / "schemas"
OVERLAYS = ("cpu-smoke", "h100")
JOBS = sorted((KUBERAY / "jobs").glob("*.yaml"))
SECRETS = {
    "caddie-postgres": {"password"},
    "caddie-mlflow": {"admin-password", "flask-secret"},
    "caddie-ray-token": {"auth_token"},
}
"""Made by hand, with these keys; docs/cluster.md says how."""
DEFINITIONS = {
    "Namespace": "io.k8s.api.core.v1.Namespace",
    "ConfigMap": "io.k8s.api.core.v1.ConfigMap",
    "Service": "io.k8s.api.core.v1.Service",
    "PersistentVolumeClaim": "io.k8s.api.core.v1.PersistentVolumeClaim",
    "Deployment": "io.k8s.api.apps.v1.Deployment",
    "StatefulSet": "io.k8s.api.apps.v1.StatefulSet",
    "NetworkPolicy": "io.k8s.api.networking.v1.NetworkPolicy",
    "RayCluster": "RayCluster",
    "RayJob": "RayJob",
}


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def own_version() -> str:
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def faults(manifest: Manifest) -> list[str]:
    """What the schema of the manifest's kind has against it."""
    names = ("kubernetes.json", "kuberay.json")
    files = {name: json.loads((SCHEMAS / name).read_text()) for name in names}
    registry: Registry = Registry().with_resources(
        (name, Resource.from_contents(content)) for name, content in files.items()
    )
    file = "kuberay" if manifest["apiVersion"].startswith("ray.io/") else "kubernetes"
    schema = {"$ref": f"{file}.json#/$defs/{DEFINITIONS[manifest['kind']]}"}
    found = Draft7Validator(schema, registry=registry).iter_errors(manifest)
    return [f"{each.json_path}: {each.message}" for each in found]


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> list[Manifest]:
    return build(KUBERAY / "overlays" / request.param)


@pytest.fixture(scope="module")
def everything() -> list[Manifest]:
    built = [each for name in OVERLAYS for each in build(KUBERAY / "overlays" / name)]
    return built + [each for path in JOBS for each in read(path)]


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [each for each in manifests if each["kind"] == kind]


def pods(manifests: list[Manifest]) -> list[dict[str, Any]]:
    """Every pod's specification."""

    def below(node: Any) -> list[dict[str, Any]]:
        if isinstance(node, dict):
            own = [node] if "containers" in node else []
            return own + [each for value in node.values() for each in below(value)]
        return [each for v in node for each in below(v)] if isinstance(node, list) else []

    return below(manifests)


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlays_are_valid(name: str) -> None:
    manifests = build(KUBERAY / "overlays" / name)
    assert {each["kind"] for each in manifests} == set(DEFINITIONS) - {"RayJob"}
    assert {each["metadata"]["name"]: faults(each) for each in manifests if faults(each)} == {}


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_jobs_are_valid(path: Path) -> None:
    assert [faults(each) for each in read(path)] == [[]]


def test_the_schemas_refuse_what_is_wrong() -> None:
    (job,) = read(KUBERAY / "jobs" / "rayjob.smoke.yaml")
    job["spec"]["entryPoint"] = "x"
    job["spec"]["submitterPodTemplate"]["spec"]["containers"][0]["envs"] = []
    job["spec"]["activeDeadlineSeconds"] = "20m"
    text = "\n".join(faults(job))
    assert "entryPoint" in text and "envs" in text and "activeDeadlineSeconds" in text


@pytest.mark.parametrize("name", OVERLAYS)
def test_kubectl_builds_the_same(name: str) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    folder = KUBERAY / "overlays" / name
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    real = list(yaml.safe_load_all(done.stdout))

    def key(manifest: Manifest) -> str:
        return f"{manifest['kind']} {manifest['metadata']['name']}"

    assert sorted(real, key=key) == sorted(build(folder), key=key)


def test_versions_are_those_of_the_lock(everything: list[Manifest]) -> None:
    images = {container["image"] for container in containers(everything)}
    compose = yaml.safe_load((ROOT / "deploy" / "compose" / "compose.yaml").read_text())
    composed = {service["image"] for service in compose["services"].values()}
    version = own_version()
    ours = {f"caddie:{version}", f"caddie:{version}-cpu", f"caddie-servers:{version}"}
    assert images - ours == composed - ours == {"postgres:17.6-bookworm"}
    versions = {each["spec"]["rayVersion"] for each in of_kind(everything, "RayCluster")}
    assert versions == {pinned("ray")}


def test_no_pod_may_become_root_or_see_its_node(everything: list[Manifest]) -> None:
    found = pods(everything)
    assert len(found) >= 10
    for pod in found:
        security = pod["securityContext"]
        assert security["runAsNonRoot"] and security["runAsUser"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert not [volume for volume in pod.get("volumes", []) if "hostPath" in volume]
    for container in containers(everything):
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert security.get("readOnlyRootFilesystem") or container["name"] == "submitter"
        assert container["resources"]["limits"]["memory"]


def test_secrets_come_by_name_only(everything: list[Manifest]) -> None:
    assert of_kind(everything, "Secret") == []
    asked: dict[str, set[str]] = {}
    for container in containers(everything):
        for variable in container.get("env", []):
            if re.search("PASSWORD|TOKEN|SECRET|KEY", variable["name"]) and "value" in variable:
                assert variable["value"] in ("token",) or variable["value"].startswith("/run/")
            if "valueFrom" in variable:
                key = variable["valueFrom"]["secretKeyRef"]
                asked.setdefault(key["name"], set()).add(key["key"])
    for cluster in of_kind(everything, "RayCluster"):
        assert cluster["spec"]["authOptions"] == {"mode": "token", "secretName": "caddie-ray-token"}
    assert asked == SECRETS
    guide = (ROOT / "docs" / "cluster.md").read_text()
    for name, keys in SECRETS.items():
        (line,) = re.findall(rf"create secret generic {name} (.+)", guide)
        assert set(re.findall(r"--from-\w+=([\w-]+)=", line)) == keys
    text = "\n".join(path.read_text() for path in (ROOT / "deploy").rglob("*.yaml"))
    assert re.findall(r"://\w+:[^@\s/]+@", text) == []


def test_trials_get_no_password(overlay: list[Manifest]) -> None:
    (cluster,) = of_kind(overlay, "RayCluster")
    (group,) = cluster["spec"]["workerGroupSpecs"]
    assert group["template"]["spec"]["automountServiceAccountToken"] is False
    assert "secret" not in json.dumps(group).lower()


def test_nothing_comes_in_but_what_a_policy_lets(overlay: list[Manifest]) -> None:
    policies = {
        each["metadata"]["name"]: each["spec"] for each in of_kind(overlay, "NetworkPolicy")
    }
    closed = policies.pop("nothing-comes-in")
    assert closed == {"podSelector": {}, "policyTypes": ["Ingress"]}
    labels = [each["spec"]["template"]["metadata"]["labels"] for each in overlay if _has_pods(each)]
    (cluster,) = of_kind(overlay, "RayCluster")
    assert cluster["spec"]["headGroupSpec"]["template"]["metadata"]["labels"] == {"app": "ray"}
    known = {label["app"] for label in labels} | {"ray", "ray-submitter"}
    named = set(re.findall(r"'app': '([\w-]+)'", str(policies)))
    assert named <= known and {"postgres", "mlflow", "ray"} <= named
    senders = str(policies["to-postgres"]["ingress"])
    assert "'app': 'ray', 'ray.io/node-type': 'head'" in senders and senders.count("'app'") == 3
    for service in of_kind(overlay, "Service"):
        assert service["spec"].get("type", "ClusterIP") == "ClusterIP"
    assert cluster["spec"]["headGroupSpec"]["serviceType"] == "ClusterIP"


def _has_pods(manifest: Manifest) -> bool:
    return manifest["kind"] in ("Deployment", "StatefulSet")


def test_servers_guard_themselves(overlay: list[Manifest]) -> None:
    args = {c["name"]: c["args"] for c in containers(overlay) if c.get("args")}
    assert "--app-name=basic-auth" in args["mlflow"]
    (hosts,) = [word for word in args["mlflow"] if word.startswith("--allowed-hosts=")]
    assert "*" not in hosts and "mlflow:5000" in hosts
    assert "--host=127.0.0.1" in args["dashboard"]


def test_names_of_volumes_and_services_exist(overlay: list[Manifest]) -> None:
    claims = {each["metadata"]["name"] for each in of_kind(overlay, "PersistentVolumeClaim")}
    services = {each["metadata"]["name"] for each in of_kind(overlay, "Service")}
    for pod in pods(overlay):
        names = {volume["name"] for volume in pod.get("volumes", [])}
        used = [m["name"] for c in containers(pod) for m in c.get("volumeMounts", [])]
        assert set(used) - names <= {"data"}, pod  # the StatefulSet's own claim
        for volume in pod.get("volumes", []):
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
    hosts = set(re.findall(r"(?:@|http://)(\w+):\d+", yaml.safe_dump(overlay)))
    assert hosts - {"localhost"} == services


def test_h100_workers_fill_a_node() -> None:
    (cluster,) = of_kind(build(KUBERAY / "overlays" / "h100"), "RayCluster")
    (group,) = cluster["spec"]["workerGroupSpecs"]
    (container,) = containers(group)
    resources = container["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == "8"
    assert group["labels"] == {"ray.io/accelerator-type": "H100"}
    assert 0 == group["minReplicas"] <= group["replicas"] < group["maxReplicas"]
    volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"}
    assert volumes["cache"]["emptyDir"] == {"sizeLimit": "50Gi"}
    assert {"NCCL_NVLS_ENABLE", "NCCL_SOCKET_IFNAME"} <= {e["name"] for e in container["env"]}
    assert cluster["spec"]["autoscalerOptions"]["version"] == "v2"
    assert cluster["spec"]["gcsFaultToleranceOptions"]["backend"] == "rocksdb"


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_jobs_ask_caddie_rightly(path: Path) -> None:
    """Every option of the entry point exists, and the space too."""
    from typer.main import get_command

    from search_spaces import SPACES
    from service.cli import app

    (job,) = read(path)
    words = shlex.split(job["spec"]["entrypoint"])
    if words[0] == "bash":
        words = shlex.split(words[2].partition(";")[2])
    assert words[:3] == ["caddie", "sweep", "run"] and words[3] in SPACES
    command: Any = get_command(app)
    for name in words[1:3]:
        command = command.commands[name]
    command.make_context("run", words[3:])  # raises for an option that is not there
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": "caddie"}
