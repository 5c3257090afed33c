"""What optuna-dashboard shows of a study: its own server, asked as a browser asks it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest
from optuna.artifacts import FileSystemArtifactStore
from optuna_dashboard import wsgi

from search_spaces.tracks import TRACKS
from service.attachments import attachments_dir
from service.runners.fake_runner import FakeRun
from service.study import load_study
from service.tracking.dashboard_notes import DashboardNotes
from service.trial import TrialFolder, TrialSpec
from tests.service_tests.sweeps import Sweep, plain_space


class Dashboard:
    """The dashboard's application on a study's storage."""

    def __init__(self, out: Path, url: str) -> None:
        self.study = load_study("s", url)
        store = FileSystemArtifactStore(attachments_dir(out))
        self._app = wsgi(self.study._storage, artifact_store=store)

    def get(self, path: str) -> bytes:
        environ: dict[str, Any] = {}
        setup_testing_defaults(environ)
        path, _, query = path.partition("?")
        environ |= {"PATH_INFO": path, "REQUEST_METHOD": "GET", "QUERY_STRING": query}
        status: list[str] = []
        body = self._app(environ, lambda line, headers, *rest: status.append(line))
        content = b"".join(body)
        assert status[0].startswith("200"), (status, content)
        return content

    def detail(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.get(f"/api/studies/{self.study._study_id}?after=0"))
        return found


def scripted(spec: TrialSpec) -> FakeRun:
    """Writes a curve as a trainer would; four layers come out over the cap."""
    with TrialFolder(spec.folder).metrics.open("w") as file:
        for step in (1, 2, 3):
            record = {"kind": "step", "time": 1.0, "step": step, "train_loss": 6.0 - step}
            file.write(json.dumps(record) + "\n")
    size = 300_000 if spec.config.model.num_layers == 4 else 100_000
    return FakeRun(val_bpb=2.0, bytes_model=size)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trial 0 fits, trial 1 is over the cap, trial 2 is rejected before launch."""
    folder = tmp_path_factory.mktemp("runs")
    runs_known: set[int] = set()

    def page(spec: TrialSpec) -> str | None:
        """MLflow's mirror comes later than the end of a trial: it knows one at the second look."""
        known = spec.number in runs_known
        runs_known.add(spec.number)
        return f"http://127.0.0.1:5000/#/experiments/1/runs/{spec.number}" if known else None

    sweep = Sweep(
        folder,
        scripted,
        num_trials=3,
        slots=1,
        space=plain_space(3, 4, 8),
        track=TRACKS["laptop"],
    )
    notes = DashboardNotes(sweep.study, page)
    sweep.scheduler._book._trackers.append(notes)
    sweep.run()
    notes.close()
    return folder


@pytest.fixture(scope="module")
def dashboard(out: Path) -> Dashboard:
    return Dashboard(out, f"sqlite:///{out / 'caddie.db'}")


def test_feasible_and_infeasible_are_told_apart(dashboard: Dashboard) -> None:
    detail = dashboard.detail()
    fits, over, rejected = detail["trials"]
    assert [trial["state"] for trial in (fits, over, rejected)] == [
        "Complete",
        "Complete",
        "Pruned",
    ]
    assert fits["constraints"] and max(fits["constraints"]) <= 0
    assert max(over["constraints"]) > 0 and max(rejected["constraints"]) > 0
    assert detail["objective_names"] == ["bits per byte"]


def test_notes_say_how_trials_ended_and_link_to_mlflow(dashboard: Dashboard) -> None:
    notes = [trial["note"]["body"] for trial in dashboard.detail()["trials"]]
    assert "**feasible**" in notes[0] and "**infeasible**: " in notes[1]
    assert "**rejected before launch**" in notes[2] and "over it with probability" in notes[2]
    for number, note in enumerate(notes):
        assert f"http://127.0.0.1:5000/#/experiments/1/runs/{number})" in note
        assert f"caddie trial show s {number}" in note


def test_files_of_a_trial_open_without_a_copy(out: Path, dashboard: Dashboard) -> None:
    study_id = dashboard.study._study_id
    fits, _, rejected = dashboard.detail()["trials"]
    files = {row["filename"]: row for row in fits["artifacts"]}
    assert {"curve.svg", "config.json", "verdicts.json"} <= set(files)
    trial_id = fits["trial_id"]
    config = dashboard.get(
        f"/artifacts/{study_id}/{trial_id}/{files['config.json']['artifact_id']}"
    )
    assert config == (out / "s" / "trial-00000" / "config.json").read_bytes()
    assert files["curve.svg"]["mimetype"] == "image/svg+xml"
    assert rejected["artifacts"] == []
    links = list(attachments_dir(out).iterdir())
    assert links and all(link.is_symlink() for link in links)
