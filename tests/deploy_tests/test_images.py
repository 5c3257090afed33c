"""The images, as far as they can be judged without Docker: what they install, in which versions,
and that it runs in an environment that has nothing else."""

from __future__ import annotations

import base64
import importlib.metadata
import json
import os
import re
import secrets
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from service.runners.processes import kill, marked
from tests.deploy_tests.compose_stack import NOT_INHERITED, free_port

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "deploy" / "docker"
MARK = "CADDIE_TEST_IMAGE"
START_S = 240.0
"""A first start compiles all modules and makes two databases."""


def requirements(path: Path) -> list[Requirement]:
    lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    return [Requirement(line) for line in lines if line]


def pins(path: Path) -> dict[str, str]:
    """Exact versions by normalised name."""
    return {
        canonicalize_name(each.name): str(each.specifier).removeprefix("==")
        for each in requirements(path)
        if str(each.specifier).startswith("==")
    }


LOCK = pins(ROOT / "constraints.txt")


def closure(wanted: list[Requirement]) -> set[str]:
    """Names of everything that these need here, by the metadata of what is installed."""
    found: set[str] = set()
    queue = [(each.name, tuple(sorted(each.extras))) for each in wanted]
    seen = set()
    while queue:
        name, extras = item = queue.pop()
        if item in seen:
            continue
        seen.add(item)
        found.add(canonicalize_name(name))
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # only the image has it
        for each in map(Requirement, needed):
            environments = [{"extra": extra} for extra in (*extras, "")]
            if each.marker is None or any(each.marker.evaluate(env) for env in environments):
                queue.append((each.name, tuple(sorted(each.extras))))
    return found


@pytest.mark.parametrize("name", ["gpu.txt", "servers.txt"])
def test_an_image_adds_to_the_lock_and_never_contradicts_it(name: str) -> None:
    own = pins(DOCKER / name)
    assert own and not set(own) & set(LOCK)
    for version in own.values():
        Version(version)


def test_every_package_of_the_slim_image_is_pinned() -> None:
    own = LOCK | pins(DOCKER / "servers.txt")
    needed = closure(requirements(DOCKER / "servers.txt"))
    assert {"mlflow", "optuna", "flask-wtf", "sqlalchemy", "gunicorn"} <= needed
    assert needed - set(own) <= {"setuptools"}
    assert not needed & {"torch", "ray", "caddie"}


def test_every_package_of_the_ray_image_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"]
    for extra in ("postgres", "hub"):
        lines += project["optional-dependencies"][extra]
    needed = closure([Requirement(line) for line in lines])
    assert {"torch", "ray", "psycopg2-binary", "grpcio"} <= needed
    # What torch for CUDA brings is pinned by torch's own requirements.
    assert needed - set(LOCK) <= {"setuptools", "triton"} | {
        name for name in needed if name.startswith(("nvidia-", "cuda-"))
    }


@pytest.mark.parametrize("name", ["Dockerfile", "servers.Dockerfile"])
def test_dockerfiles_pin_and_end_without_rights(name: str) -> None:
    text = (DOCKER / name).read_text()
    lines = re.sub(r"\\\n", " ", text).splitlines()
    assert [line for line in lines if line.startswith("USER")] == ["USER caddie"]
    for line in lines:
        if "pip install" in line and "--no-deps" not in line:
            assert line.count("pip install") == line.count("constraints.txt")
        if line.startswith("ARG BASE="):
            assert re.search(r":[\w.-]*\d[\w.-]*$", line) and "latest" not in line
    stages = [line.split()[-1] for line in lines if line.startswith("FROM")]
    assert set(re.findall(r"COPY --from=(\w+)", text)) <= set(stages)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for words in re.findall(r"^COPY (?!--)(.+)$", text, re.MULTILINE):
        for source in words.split()[:-1]:
            assert (ROOT / source).exists()
            assert any(f"!{part}" in ignored for part in (source, str(Path(source).parent)))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_servers_in_a_clean_environment_ask_for_a_password(tmp_path: Path) -> None:
    """The slim image's package set, installed from nothing; then MLflow as the cluster runs it."""
    python = install(tmp_path / "env")
    manifest = ROOT / "deploy" / "kuberay" / "base" / "mlflow.yaml"
    documents = list(yaml.safe_load_all(manifest.read_text()))
    (settings,) = [each for each in documents if each["kind"] == "ConfigMap"]
    (deployment,) = [each for each in documents if each["kind"] == "Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    port, password, mark = free_port(), secrets.token_hex(16), secrets.token_hex(8)
    ini = settings["data"]["basic_auth.ini"]
    assert "postgresql+psycopg2://caddie@postgres:5432/mlflow_auth" in ini
    (tmp_path / "basic_auth.ini").write_text(local(ini, tmp_path, port))
    command = [local(word, tmp_path, port) for word in container["args"]]
    environment = {
        **{k: v for k, v in os.environ.items() if not NOT_INHERITED.match(k)},
        "PATH": f"{python.parent}:/usr/bin:/bin",
        "MLFLOW_AUTH_CONFIG_PATH": str(tmp_path / "basic_auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        MARK: mark,
    }
    log = tmp_path / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        url = f"http://127.0.0.1:{port}"

        deadline = time.monotonic() + START_S
        while answer(f"{url}/health") != 200:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        question = f"{url}/api/2.0/mlflow/experiments/get?experiment_id=0"
        assert answer(question) == 401
        assert answer(question, user=("admin", "wrong")) == 401
        assert answer(question, user=("admin", password)) == 200
        assert answer(question, user=("admin", password), host="evil.example") == 403
        assert answer(question, user=("admin", password), host="mlflow:5000") == 200
        assert password not in log.read_text()
        assert not [p for p, env in marked(MARK) if password in " ".join(p.cmdline())]
    finally:
        kill([p for p, env in marked(MARK) if env[MARK] == mark])


def install(folder: Path) -> Path:
    """Do what the second stage of servers.Dockerfile does; its interpreter. Skips without
    a package index."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "pip", "install", "--quiet"]
    files = ["-c", ROOT / "constraints.txt", "-r", DOCKER / "servers.txt"]
    done = subprocess.run([*pip, *files], capture_output=True, text=True)
    if done.returncode and re.search("Max retries|Could not find a version", done.stderr):
        pytest.skip(f"no package index: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr
    python = folder / "bin" / "python"
    frozen = subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True)
    installed = {canonicalize_name(p["name"]): p["version"] for p in json.loads(frozen.stdout)}
    pinned = LOCK | pins(DOCKER / "servers.txt")
    wrong = {n: v for n, v in installed.items() if pinned.get(n) != v}
    assert set(wrong) <= {"pip", "setuptools"}, wrong
    for program, version in {"mlflow": LOCK["mlflow"], "optuna-dashboard": ""}.items():
        shown = subprocess.run(
            [folder / "bin" / program, "--version"], capture_output=True, text=True, check=True
        )
        assert version in shown.stdout
    return python


def local(text: str, folder: Path, port: int) -> str:
    """A setting of the pod, as it is right on this machine: SQLite for PostgreSQL, loopback."""
    database = r"postgresql\+psycopg2://caddie@postgres:5432/(\w+)"
    text = re.sub(database, rf"sqlite:///{folder}/\1.db", text)
    text = text.replace("--host=0.0.0.0", "--host=127.0.0.1").replace("/mlartifacts", str(folder))
    if text.startswith("--port="):
        return f"--port={port}"
    return text.replace("127.0.0.1:5000", f"127.0.0.1:{port}")


def answer(url: str, user: tuple[str, str] | None = None, host: str | None = None) -> int:
    """The status with which the server answers; 0 = nobody there."""
    headers = {"Host": host} if host else {}
    if user:
        headers["Authorization"] = "Basic " + base64.b64encode(":".join(user).encode()).decode()
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=30) as got:
            return int(got.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
