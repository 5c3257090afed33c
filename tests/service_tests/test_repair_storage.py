"""What a dead driver left RUNNING, and when `caddie sweep repair` must not work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.cli import main
from service.trial import TrialSpec
from tests.service_tests.sweeps import FakeRun, Sweep
from tests.service_tests.test_adoption import bury


def slow_third(spec: TrialSpec) -> FakeRun:
    return FakeRun(train_s=1000.0 if spec.number == 2 else 8.0)


def repaired(sweep: Sweep, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, Any]:
    capsys.readouterr()
    code = main(["sweep", "repair", "s", "--out", str(sweep.folder.parent), "--json", *more])
    answer = capsys.readouterr()
    return code, json.loads(answer.out) if answer.out else answer.err


@pytest.mark.slow
def test_trials_that_a_dead_driver_left_running(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two are in flight: of one the run ended before the driver could tell it."""
    sweep = Sweep(tmp_path, slow_third, num_trials=9, slots=2)
    while sweep.runner.submissions[-1:] == [] or len(sweep.runner.submissions) < 4:
        sweep.steps(1)
    running = [number for number, state in enumerate(sweep.states()) if state == "RUNNING"]
    finished, unfinished = running[-1], running[0]
    sweep.runner.advance(100.0)
    result = sweep.runner.poll(finished).result
    assert result is not None
    assert "is being driven by process" in repaired(sweep, capsys)[1]
    assert repaired(sweep, capsys, "--apply")[0] == 1, "its driver lives"
    bury(sweep.study)
    found = {
        each["trial"]: each["remedy"]
        for each in repaired(sweep, capsys)[1]["findings"]
        if each["where"] == "storage"
    }
    assert found == {
        unfinished: "put it back into the queue",
        finished: "tell it COMPLETE, as its folder says",
    }
    assert sweep.states().count("RUNNING") == 2, "looking changes nothing"
    repaired(sweep, capsys, "--apply")
    assert (sweep.states()[unfinished], sweep.states()[finished]) == ("WAITING", "COMPLETE")
    assert sweep.trials()[finished].value == result.val_bpb
    assert not [e for e in repaired(sweep, capsys)[1]["findings"] if e["where"] == "storage"]
    lines = (sweep.folder / "trials.jsonl").read_text().splitlines()
    assert finished in [json.loads(line)["number"] for line in lines]
    told = sum(state in ("COMPLETE", "PRUNED") for state in sweep.states())
    again = Sweep(tmp_path, lambda spec: FakeRun(), num_trials=told + 1, start_at=5000.0)
    again.run()
    assert again.runner.submissions[0].number == unfinished, "it resumes where it was left"


def test_without_mlflow_the_rest_is_repaired(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = Sweep(tmp_path, lambda spec: FakeRun(), num_trials=1)
    sweep.run()
    (sweep.folder / "trial-00000" / "config.json").unlink()
    uri = ("--tracking-uri", "http://127.0.0.1:9")
    code, answer = repaired(sweep, capsys, "--apply", *uri)
    assert code == 1, "MLflow could not be looked at"
    assert (sweep.folder / "trial-00000" / "config.json").exists()
    mended = [each["what"] for each in answer["findings"] if each["mended"]]
    assert "config.json is missing" in mended


def test_a_study_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "repair", "none", "--out", str(tmp_path)]) == 2
    assert "no study 'none'" in capsys.readouterr().err
