"""The MLflow mirror against real stores: a SQLite database, and a server that dies and returns."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service.tracking.mlflow_mirror import MlflowMirror
from service.tracking.mlflow_tracker import MlflowTracker, quiet_mlflow
from service.tracking.mlflow_values import run_name
from service.tracking.outbox import (
    Progress,
    close_entry,
    open_entry,
    read_entry,
    read_progress,
    write_progress,
)
from service.trial import TrialFolder, TrialSpec, Verdict, write_json
from trainer.recipes import RECIPES
from trainer.report import FileReporter, TrainResult

SIZE = Verdict("bytes", 210_000, 200_000, "bytes", False, "210,000 bytes are over 200,000", False)
CLOCK = Verdict("clock", 7.5, 8.0, "s", True, "7.5 s of 8 s", False)


def make_spec(study_dir: Path, number: int, attempt: int = 1) -> TrialSpec:
    overrides = {"optim.matrix_lr": 0.01 * (number + 1), "model.num_layers": 4}
    config = RECIPES["tiny"].build().with_overrides(overrides)
    folder = study_dir / f"{number:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(TrialFolder(folder).config, config.to_dict())
    return TrialSpec("s", number, "tiny", overrides, config, folder, workers=2, attempt=attempt)


def make_result(**changes: object) -> TrainResult:
    values = {
        "status": "finished",
        "steps": 30,
        "tokens": 30 * 4096,
        "num_params": 1000,
        "world_size": 2,
        "device": "cpu",
        "phases": {"train": 7.5, "evaluate": 1.25},
        "val_loss": 3.5,
        "val_bpb": 2.25,
        "bytes_code": 10_000,
        "bytes_model": 190_000,
    }
    return TrainResult.model_validate(values | changes)


def write_steps(folder: Path, first: int, last: int) -> None:
    reporter = FileReporter(folder)
    for step in range(first, last + 1):
        reporter.emit(
            "step",
            step=step,
            elapsed_s=0.25 * step,
            progress=step / 30,
            train_loss=6.0 - 0.1 * step,
            step_ms=250.0,
            lr_mult=1.0,
            tokens_per_s=16384.0,
        )


def store_client(uri: str):  # type: ignore[no-untyped-def]
    quiet_mlflow()
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri)


def child_runs(uri: str) -> list:
    client = store_client(uri)
    experiment = client.get_experiment_by_name("caddie/s")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    return sorted(
        (run for run in runs if "caddie.trial" in run.data.tags),
        key=lambda run: int(run.data.tags["caddie.trial"]),
    )


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated store; making one takes seconds, copying it does not."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    store_client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def database(empty_database: Path, tmp_path: Path) -> str:
    path = tmp_path / "mlflow.db"
    path.write_bytes(empty_database.read_bytes())
    return f"sqlite:///{path}"


def test_a_study_is_mirrored_whole(tmp_path: Path, database: str) -> None:
    study_dir = tmp_path / "s"
    warnings: list[str] = []
    tracker = MlflowTracker(
        "s",
        study_dir,
        database,
        (tmp_path / "art").as_uri(),
        warnings.append,
        interval_s=0.05,
        dashboard="http://127.0.0.1:8080/dashboard/studies/3",
    )
    measured, rejected = make_spec(study_dir, 0), make_spec(study_dir, 1)
    tracker.trial_started(measured)
    write_steps(measured.folder, 1, 30)
    TrialFolder(measured.folder).artifact.write_bytes(b"\x00\x01packed")
    tracker.trial_ended(measured, "COMPLETE", [SIZE, CLOCK], make_result())
    tracker.trial_started(rejected)
    tracker.trial_ended(rejected, "PRUNED", [SIZE], None)
    (study_dir / "bytes_against_loss.svg").write_text("<svg/>")
    tracker.close(grace_seconds=60)

    assert warnings == []
    client = store_client(database)
    done, pruned = child_runs(database)
    experiment = client.get_experiment(done.info.experiment_id)
    assert pruned.info.experiment_id == experiment.experiment_id
    (whole,) = client.search_runs([experiment.experiment_id], "tags.verdict = 'the study'")
    assert whole.info.status == "FINISHED"
    pictures = [file.path for file in client.list_artifacts(whole.info.run_id)]
    assert pictures == ["bytes_against_loss.svg"]
    assert done.info.run_name == "0: num_layers=4 matrix_lr=0.01"
    assert done.data.params["optim.matrix_lr"] == "0.01"
    assert done.data.params["model.model_dim"] == "64"
    assert done.data.metrics["constraint.bytes"] == 10_000
    assert done.data.metrics["constraint.clock"] == -0.5
    assert done.data.metrics["final.val_bpb"] == 2.25
    assert done.data.metrics["seconds.evaluate"] == 1.25
    assert done.data.metrics["bits_per_byte"] == 2.25
    assert done.data.metrics["nats_per_token"] == 3.5
    assert done.data.metrics["bytes_left"] == 0
    assert done.data.metrics["train_seconds_left"] == 0.5
    assert done.data.metrics["eval_seconds_left"] == 28.75
    assert done.data.metrics["worker_seconds"] > 0 and pruned.data.metrics["worker_seconds"] == 0
    view = json.loads(experiment.tags["mlflow.sharedViewState.caddie"])
    shown = {column.split("`")[1] for column in view["selectedColumns"]} - {"verdict"}
    assert shown <= set(done.data.metrics), "a column that stays empty"
    by_second = client.get_metric_history(done.info.run_id, "by_second/train_loss")
    assert [point.step for point in by_second] == [step // 4 for step in range(1, 31)]
    page = "http://127.0.0.1:8080/dashboard/studies/3/trials?numbers=0"
    assert page in done.data.tags["mlflow.note.content"]
    history = client.get_metric_history(done.info.run_id, "train_loss")
    assert [(point.step, point.value) for point in history] == [
        (step, 6.0 - 0.1 * step) for step in range(1, 31)
    ]
    assert done.data.tags["verdict"] == "infeasible"
    assert done.data.tags["reason"] == SIZE.reason
    assert done.info.status == "FINISHED"
    assert pruned.data.tags["verdict"] == "rejected before launch"
    assert pruned.info.status == "KILLED"
    files = {file.path for file in client.list_artifacts(done.info.run_id)}
    assert files == {"config.json", "metrics.jsonl", "train.log", "artifact.bin", "curve.svg"}
    copy = client.download_artifacts(done.info.run_id, "artifact.bin", str(tmp_path))
    assert Path(copy).read_bytes() == b"\x00\x01packed"


def test_repeating_any_part_adds_nothing(tmp_path: Path, database: str) -> None:
    """A driver killed between a call to the server and its note of it repeats the call."""
    study_dir = tmp_path / "s"
    spec = make_spec(study_dir, 0)
    open_entry(spec)
    write_steps(spec.folder, 1, 30)
    entry = close_entry(spec, "COMPLETE", [CLOCK], make_result())
    root = (tmp_path / "art").as_uri()

    first = MlflowMirror(database, "s", "id", root).sync(spec.folder, entry)
    for forgotten in (
        Progress(target=database, launch=1),
        Progress(target=database, launch=1, run_id=first.run_id),
    ):
        write_progress(spec.folder, forgotten)
        again = MlflowMirror(database, "s", "id", root).sync(spec.folder, entry)
        assert again == first

    (run,) = child_runs(database)
    history = store_client(database).get_metric_history(run.info.run_id, "train_loss")
    assert [point.step for point in history] == list(range(1, 31))


def test_a_trial_launched_again_replaces_its_run(tmp_path: Path, database: str) -> None:
    study_dir = tmp_path / "s"
    spec = make_spec(study_dir, 0)
    mirror = MlflowMirror(database, "s", "id", (tmp_path / "art").as_uri())
    open_entry(spec)
    write_steps(spec.folder, 1, 20)
    entry = read_entry(spec.folder)
    assert entry is not None
    lost = mirror.sync(spec.folder, entry)
    assert not lost.finished

    TrialFolder(spec.folder).clear_run()
    open_entry(make_spec(study_dir, 0, attempt=2))
    write_steps(spec.folder, 1, 5)
    mirror.sync(spec.folder, close_entry(spec, "COMPLETE", [], make_result()))

    (run,) = child_runs(database)
    assert run.info.run_id != lost.run_id
    assert run.data.tags["caddie.attempt"] == "2"
    history = store_client(database).get_metric_history(run.info.run_id, "train_loss")
    assert [point.step for point in history] == [1, 2, 3, 4, 5]


def test_a_broken_folder_does_not_hold_up_the_others(tmp_path: Path, database: str) -> None:
    study_dir = tmp_path / "s"
    broken, sound = make_spec(study_dir, 0), make_spec(study_dir, 1)
    for spec in (broken, sound):
        open_entry(spec)
        close_entry(spec, "COMPLETE", [], make_result())
    TrialFolder(broken.folder).metrics.write_text("not json\n")
    warnings: list[str] = []
    tracker = MlflowTracker("s", study_dir, database, None, warnings.append, interval_s=0.05)
    wait_until(lambda: read_progress(sound.folder, database).finished)
    tracker.close(grace_seconds=1)
    assert any("JSONDecodeError" in line for line in warnings)
    assert "1 trial is not mirrored yet" in warnings[-1]


def test_studies_of_one_name_stay_apart(tmp_path: Path, database: str) -> None:
    """Two people on one server; and each finds its own again."""
    root = (tmp_path / "art").as_uri()
    experiments = {}
    for place, study_id in enumerate(("a" * 32, "b" * 32)):
        spec = make_spec(tmp_path / f"{place}" / "s", 0)
        open_entry(spec)
        entry = close_entry(spec, "COMPLETE", [CLOCK], make_result())
        mirror = MlflowMirror(database, "s", study_id, root)
        mirror.sync(spec.folder, entry)
        experiments[study_id] = mirror.experiment_id()
        assert MlflowMirror(database, "s", study_id, root).experiment_id() == mirror.experiment_id()
    assert len(set(experiments.values())) == 2


def test_gpus_of_a_trial_are_system_metrics(tmp_path: Path, database: str) -> None:
    """MLflow shows names with system/ on a page of their own."""
    spec = make_spec(tmp_path / "s", 0)
    open_entry(spec)
    with TrialFolder(spec.folder).metrics.open("a") as file:
        for sample in range(1, 121):  # more numbers than one call may hold
            numbers = {f"gpu_{gpu}_utilization_percentage": sample for gpu in range(16)}
            record = {"kind": "system", "time": 1e9 + sample, "sample": sample, **numbers}
            file.write(json.dumps(record) + "\n")
    entry = close_entry(spec, "COMPLETE", [CLOCK], make_result())
    MlflowMirror(database, "s", "id", (tmp_path / "art").as_uri()).sync(spec.folder, entry)
    (run,) = child_runs(database)
    name = "system/gpu_15_utilization_percentage"
    history = store_client(database).get_metric_history(run.info.run_id, name)
    assert [(point.step, point.value) for point in history] == [(n, n) for n in range(1, 121)]


def test_run_name_tells_equal_leaves_apart(tmp_path: Path) -> None:
    config = RECIPES["tiny"].build()
    overrides = {"data.seq_len": 64, "evaluate.seq_len": 64, "optim.matrix_lr": 0.0312345}
    spec = TrialSpec("s", 7, "tiny", overrides, config, tmp_path)
    name = run_name(open_entry(spec))
    assert name == "7: data.seq_len=64 evaluate.seq_len=64 matrix_lr=0.03123"


@pytest.fixture
def server(empty_database: Path, tmp_path: Path) -> Iterator[Server]:
    database = tmp_path / "server.db"
    database.write_bytes(empty_database.read_bytes())
    running = Server(database, tmp_path / "artifacts")
    yield running
    running.stop()


class Server:
    """A real MLflow server that can be killed and started again on the same port."""

    def __init__(self, database: Path, artifacts: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._database, self._artifacts = database, artifacts
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self._database}", "--workers", "1"]
        command += ["--artifacts-destination", str(self._artifacts)]
        environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        self._process = subprocess.Popen(
            command,
            env=environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(self._healthy, 120)

    def stop(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(self.uri + "/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


@pytest.mark.slow
def test_server_outage_loses_and_doubles_nothing(tmp_path: Path, server: Server) -> None:
    study_dir = tmp_path / "s"
    warnings: list[str] = []
    specs = [make_spec(study_dir, number) for number in range(3)]

    def started_tracker() -> MlflowTracker:
        return MlflowTracker(
            "s", study_dir, server.uri, None, warnings.append, interval_s=0.1, max_backoff_s=0.5
        )

    tracker = started_tracker()  # the server is not there yet
    tracker.trial_started(specs[0])
    write_steps(specs[0].folder, 1, 10)
    wait_until(lambda: len(warnings) == 1)
    assert "cannot be used" in warnings[0] and server.uri in warnings[0]

    server.start()
    wait_until(lambda: read_progress(specs[0].folder, server.uri).metric_bytes > 0)
    assert "is back" in warnings[1]
    server.stop()  # in the middle of trial 0
    write_steps(specs[0].folder, 11, 30)
    tracker.trial_ended(specs[0], "COMPLETE", [CLOCK], make_result())
    tracker.trial_started(specs[1])
    tracker.trial_ended(specs[1], "PRUNED", [SIZE], None)
    wait_until(lambda: len(warnings) == 3)
    tracker.close(grace_seconds=0.5)
    assert "2 trials are not mirrored yet" in warnings[-1]

    server.start()  # the next `sweep run`
    tracker = started_tracker()
    tracker.trial_started(specs[2])
    tracker.trial_ended(specs[2], "COMPLETE", [CLOCK], make_result())
    tracker.close(grace_seconds=60)
    assert tracker.unsent_trials() == 0
    runs = child_runs(server.uri)
    assert [run.data.tags["caddie.trial"] for run in runs] == ["0", "1", "2"]
    assert [run.data.tags["verdict"] for run in runs] == [
        "feasible",
        "rejected before launch",
        "feasible",
    ]
    history = store_client(server.uri).get_metric_history(runs[0].info.run_id, "train_loss")
    assert [point.step for point in history] == list(range(1, 31))


def test_the_scheduler_never_waits_for_a_dead_server(tmp_path: Path) -> None:
    """The calls return although the address swallows every packet; the folder keeps the end."""
    spec = make_spec(tmp_path / "s", 0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)  # accepts, never answers
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        tracker = MlflowTracker("s", tmp_path / "s", uri, None, lambda line: None, interval_s=0.1)
        tracker.trial_started(spec)
        tracker.trial_ended(spec, "COMPLETE", [CLOCK], make_result())
        kept = json.loads((spec.folder / "tracking.json").read_text())
        tracker.close(grace_seconds=0.1)
    assert kept["state"] == "COMPLETE"
    assert tracker.unsent_trials() == 1


def test_a_password_is_neither_shown_nor_written(tmp_path: Path) -> None:
    spec = make_spec(tmp_path / "s", 0)
    warnings: list[str] = []
    uri = "postgresql://me:secret@127.0.0.1:1/none"
    tracker = MlflowTracker("s", tmp_path / "s", uri, None, warnings.append, interval_s=0.05)
    tracker.trial_started(spec)
    wait_until(lambda: bool(warnings))
    tracker.close(grace_seconds=0.1)
    assert "cannot be used" in warnings[0]
    assert not any("secret" in line for line in warnings)
    assert not any("secret" in file.read_text() for file in spec.folder.iterdir())
