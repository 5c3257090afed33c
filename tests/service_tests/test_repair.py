"""A study whose storage, folders and MLflow runs are destroyed in turn and repaired: the repaired
one equals the undisturbed one, byte for byte but for what nothing tells (ids of new runs)."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.cli import main
from service.config import ServiceSettings
from service.study import load_study
from service.tracking.jsonl_tracker import JsonlTracker
from service.tracking.mlflow_tracker import MlflowTracker, quiet_mlflow
from service.trial import TrialSpec
from tests.service_tests.sweeps import BREAKS, DIVERGES, FakeRun, Sweep, plain_space

SPACE = plain_space(3, 8, 4, 5, 6)
"""The second is rejected before launch."""


def script(spec: TrialSpec) -> FakeRun:
    """Trial 2 diverges, trial 4 fails, the others are measured; all leave an artifact."""
    if spec.number == 2:
        return DIVERGES
    if spec.number == 4:
        return BREAKS
    run = FakeRun(val_bpb=3.0 - 0.1 * spec.config.model.num_layers)
    (spec.folder / "artifact.bin").write_bytes(bytes(range(250)) * 320)
    (spec.folder / "provenance.json").write_text('{"code": 1}\n')
    return run


class Place:
    """A finished study with all of its traces."""

    def __init__(self, out: Path) -> None:
        self.out, self.dir = out, out / "s"
        self.mlflow = f"sqlite:///{out / 'mlflow.db'}"
        trackers = [
            JsonlTracker(self.dir / "trials.jsonl"),
            MlflowTracker(
                "s",
                self.dir,
                self.mlflow,
                (out / "mlartifacts").as_uri(),
                dashboard=f"{ServiceSettings().dashboard_url}/dashboard/studies/1",
            ),
        ]
        sweep = Sweep(out, script, num_trials=4, space=SPACE, trackers=trackers, max_attempts=1)
        sweep.run()
        trackers[1].close(120.0)  # type: ignore[attr-defined]
        assert (
            sweep.states()
            == ["COMPLETE", "PRUNED", "PRUNED", "COMPLETE", "FAIL"][:4] + (sweep.states()[4:])
        )

    def trial(self, number: int, name: str) -> Path:
        return self.dir / f"trial-{number:05d}" / name

    def repair(self, *more: str) -> int:
        return main(["sweep", "repair", "s", "--out", str(self.out), *more])

    def client(self) -> Any:
        quiet_mlflow()
        from mlflow.tracking import MlflowClient

        return MlflowClient(self.mlflow)

    def run_of(self, number: int) -> Any:
        (run,) = [each for each in self.runs() if each.data.tags.get("caddie.trial") == str(number)]
        return run

    def runs(self) -> list[Any]:
        client = self.client()
        experiment = client.get_experiment_by_name("caddie/s")
        return list(client.search_runs([experiment.experiment_id], max_results=1000))

    def sql(self, statement: str, *values: Any) -> None:
        with sqlite3.connect(self.out / "caddie.db") as connection:
            connection.execute(statement, values)


def seen(place: Place, approximately: bool = False) -> dict[str, Any]:
    """Everything that people and programs see of a study. Ids of runs are left out, and, where
    asked, the times that only the storage's to the microsecond stand in for."""
    files: dict[str, Any] = {
        str(path.relative_to(place.dir)): path.read_bytes()
        for path in sorted(place.dir.rglob("*"))
        if path.is_file() and not path.name.endswith((".broken", "mirror.json"))
    }
    if approximately:
        for name in files:
            if name.endswith(("tracking.json", "told.json", "trials.jsonl")):
                rows = files[name].splitlines() if "jsonl" in name else [files[name]]
                files[name] = [_without_times(json.loads(row)) for row in rows]
    return {"files": files, "trials": stored(place), "runs": mirrored(place, approximately)}


def _without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k not in ("started", "ended", "time")}


def stored(place: Place) -> list[Any]:
    trials = load_study("s", f"sqlite:///{place.out / 'caddie.db'}").get_trials()
    return [(t.number, t.state, t.values, t.params, t.user_attrs, t.system_attrs) for t in trials]


def mirrored(place: Place, approximately: bool) -> dict[str, Any]:
    client, found = place.client(), {}
    parent = [run for run in place.runs() if "caddie.trial" not in run.data.tags]
    assert len(parent) == 1
    for run in place.runs():
        run_id = run.info.run_id
        tags = dict(run.data.tags)
        points = {
            (name, m.value, m.step, 0 if approximately else m.timestamp)
            for name in run.data.metrics
            for m in client.get_metric_history(run_id, name)
            if not (approximately and name == "worker_seconds")
        }
        root = Path(run.info.artifact_uri.removeprefix("file://"))
        artifacts = {path.name: path.read_bytes() for path in sorted(root.glob("*"))}
        times = None if approximately else (run.info.end_time, run.info.start_time)
        if run is parent[0] or "caddie.trial" not in tags:
            times = None
        key = tags["caddie.key"].partition("/")[2]
        info = (run.info.run_name, run.info.status, times)
        found[key] = (info, tags, dict(run.data.params), points, artifacts)
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def undisturbed(place: Place) -> tuple[dict[str, Any], dict[str, Any]]:
    return seen(place), seen(place, approximately=True)


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content), indent=2) + "\n")


def delete_run(place: Place) -> None:
    place.client().delete_run(place.run_of(0).info.run_id)


def delete_for_good(place: Place) -> None:
    """As after `mlflow gc`: the key is gone with the run."""
    run_id = place.run_of(0).info.run_id
    place.client().set_tag(run_id, "caddie.key", "gone")
    place.client().delete_run(run_id)


def delete_parent(place: Place) -> None:
    (parent,) = [run for run in place.runs() if "caddie.trial" not in run.data.tags]
    place.client().delete_run(parent.info.run_id)


def log_extra_runs(place: Place) -> None:
    client, run = place.client(), place.run_of(3)
    study = run.data.tags["caddie.key"].split("/")[0]
    for key in (f"{study}/77/1", f"{study}/1/1", f"{study}/3/9"):
        client.create_run(run.info.experiment_id, tags={"caddie.key": key, "caddie.trial": "77"})


def change_points(place: Place) -> None:
    client = place.client()
    run_id = place.run_of(3).info.run_id
    client.log_metric(run_id, "train_loss", 99.0, step=5)
    client.log_metric(run_id, "final.val_bpb", 0.1)


def drop_points(place: Place) -> None:
    run_id = place.run_of(3).info.run_id
    with sqlite3.connect(place.out / "mlflow.db") as connection:
        for table in ("metrics", "latest_metrics"):
            connection.execute(f"DELETE FROM {table} WHERE run_uuid = ?", (run_id,))


def change_params(place: Place) -> None:
    with sqlite3.connect(place.out / "mlflow.db") as connection:
        run_id = place.run_of(3).info.run_id
        connection.execute(
            "UPDATE params SET value = '3' WHERE run_uuid = ? AND key = 'optim.matrix_lr'",
            (run_id,),
        )


def drop_params_and_tags(place: Place) -> None:
    run_id = place.run_of(3).info.run_id
    with sqlite3.connect(place.out / "mlflow.db") as connection:
        connection.execute("DELETE FROM params WHERE run_uuid = ?", (run_id,))
        connection.execute(
            "UPDATE tags SET value = 'running' WHERE run_uuid = ? AND key = 'verdict'", (run_id,)
        )
    place.client().update_run(run_id, status="RUNNING", name="mine")


def spoil_artifacts(place: Place) -> None:
    root = Path(place.run_of(0).info.artifact_uri.removeprefix("file://"))
    (root / "artifact.bin").write_bytes(b"x" * (root / "artifact.bin").stat().st_size)
    (root / "result.json").unlink()


def lose_files(*names: str) -> Callable[[Place], None]:
    def lose(place: Place) -> None:
        for name in names:
            place.trial(0, name).unlink()

    return lose


def lose_every_folder(place: Place) -> None:
    for name in ("config", "verdicts", "result", "provenance"):
        for path in place.dir.glob(f"trial-*/{name}.json"):
            path.unlink()


def garble(place: Place) -> None:
    for name in ("result.json", "verdicts.json", "config.json"):
        path = place.trial(0, name)
        path.write_text(path.read_text()[: path.stat().st_size // 2])
    place.trial(3, "artifact.bin").write_bytes(b"half")


def of_another_trial(place: Place) -> None:
    for name in ("result.json", "verdicts.json", "config.json", "tracking.json"):
        shutil.copy(place.trial(1 if name != "result.json" else 3, name), place.trial(0, name))


def lose_lines(place: Place) -> None:
    path = place.dir / "trials.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for i, line in enumerate(lines) if i != 1) + '{"number": 8')


def foreign_line(place: Place) -> None:
    path = place.dir / "trials.jsonl"
    row = json.loads(path.read_text().splitlines()[0])
    path.write_text("not json\n" + path.read_text() + json.dumps({**row, "number": 55}) + "\n")


def leftovers(place: Place) -> None:
    shutil.copytree(place.trial(0, ""), place.dir / "trial-00042")
    place.trial(0, "config.json.partial").write_text("{")


def lose_study_id(place: Place) -> None:
    (place.dir / "study_id").unlink()


DAMAGES: dict[str, tuple[tuple[Callable[[Place], None], ...], bool]] = {
    "runs deleted and added": ((log_extra_runs, delete_run, delete_parent), False),
    "points added": ((change_points, delete_for_good), False),
    "points lost, artifacts spoiled": ((drop_points, spoil_artifacts), False),
    "a parameter changed": ((change_params, lose_files("metrics.jsonl", "artifact.bin")), False),
    "parameters lost, tags stale": ((drop_params_and_tags, lose_files("verdicts.json")), False),
    "JSON of all folders lost": ((lose_every_folder, leftovers), False),
    "half files, the study's name lost": ((garble, lose_study_id), False),
    "lines lost": ((lose_lines, foreign_line), False),
    "word for the mirror lost": ((lose_files("tracking.json", "mirror.json", "told.json"),), True),
    "another trial's files": ((of_another_trial,), True),
}
"""What is destroyed; and whether times come back only as exact as the storage has them."""


def assert_equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """As ==, with the first difference in the message."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if isinstance(value, dict):
            assert_equal(found[name], value)
        else:
            assert found[name] == value, name


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_was_destroyed_is_mended(
    place: Place,
    undisturbed: tuple[dict[str, Any], dict[str, Any]],
    damage: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    destroyers, approximately = DAMAGES[damage]
    for destroy in destroyers:
        destroy(place)
    capsys.readouterr()
    assert place.repair("--json") == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    assert len(found) >= len(destroyers) - ("name" in damage), "looking says what differs"
    assert place.repair("--apply", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["left"] == 0 and all(each["mended"] for each in answer["findings"])
    for leftover in [*place.dir.rglob("*.broken"), place.dir / "orphaned"]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    assert_equal(seen(place, approximately=True), undisturbed[1])
    if not approximately and damage != "lines lost":
        exact = {name: data for name, data in seen(place)["files"].items() if ".jsonl" not in name}
        before = {name: data for name, data in undisturbed[0]["files"].items() if name in exact}
        assert_equal(exact, before)
    assert place.repair("--json") == 0
    assert json.loads(capsys.readouterr().out)["findings"] == [], "nothing is left to say"


def test_an_undisturbed_study_has_nothing_to_mend(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    before = seen(place)
    assert place.repair() == 0
    assert "nothing differs" in capsys.readouterr().out
    assert seen(place) == before, "looking changes nothing"
