"""One line per ended trial, whatever happens to the process."""

from __future__ import annotations

import json
from pathlib import Path

from service.tracking.jsonl_tracker import JsonlTracker
from service.trial import TrialSpec, Verdict
from trainer.recipes import RECIPES

SIZE = Verdict("artifact_size", 9.0, 5.0, "bytes", False, "too big", True)


def make_spec(folder: Path, number: int) -> TrialSpec:
    config = RECIPES["tiny"].build().with_overrides({"runtime.seed": 7})
    return TrialSpec("s", number, "tiny", {"runtime.seed": 7}, config, folder)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_holds_the_verdict_and_the_seed(tmp_path: Path) -> None:
    path = tmp_path / "s" / "trials.jsonl"
    JsonlTracker(path).trial_ended(make_spec(tmp_path, 3), "PRUNED", [SIZE], None)
    (row,) = rows(path)
    assert (row["number"], row["seed"], row["state"]) == (3, 7, "PRUNED")
    assert (row["verdict"], row["reason"]) == ("rejected before launch", "too big")
    assert row["constraints"] == {"artifact_size": {"value": 9.0, "bound": 5.0, "ok": False}}


def test_a_trial_is_recorded_once_over_restarts(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    for _ in range(2):
        tracker = JsonlTracker(path)
        for number in (0, 1):
            tracker.trial_ended(make_spec(tmp_path, number), "COMPLETE", [], None)
    assert [row["number"] for row in rows(path)] == [0, 1]


def test_a_half_written_line_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    JsonlTracker(path).trial_ended(make_spec(tmp_path, 0), "COMPLETE", [], None)
    with path.open("a") as file:
        file.write('{"number": 1, "stu')
    JsonlTracker(path).trial_ended(make_spec(tmp_path, 1), "COMPLETE", [], None)
    assert [row["number"] for row in rows(path)] == [0, 1]
