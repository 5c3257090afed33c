"""The loop against scripted runs in simulated time, on a real SQLite storage: every way a trial
can end. How a sweep ends is in test_sweep_ends."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, IntDistribution

from search_spaces import Space
from service.errors import RunnerError
from service.runners.base import Demand
from service.runners.fake_runner import FakeRun
from service.trial import TrialFolder
from tests.service_tests.sweeps import (
    BREAKS,
    DIVERGES,
    GOOD,
    SMOKE,
    TRACK,
    Sweep,
    by_depth,
    plain_space,
)
from trainer.config import TrainConfig


def test_measured_trials_are_told_with_value_constraints_and_files(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, by_depth, space=plain_space(3, 4), num_trials=2)
    sweep.run()
    first, second = sweep.trials()
    assert [first.state.name, second.state.name] == ["COMPLETE", "COMPLETE"]
    assert (first.value, second.value) == (pytest.approx(2.7), pytest.approx(2.6))
    assert first.constraints["artifact_size"] == 120_000 - 200_000
    assert first.constraints["eval_seconds"] == 1 - 30
    assert first.constraints["step_time"] == 20 - 160
    assert first.user_attrs["verdict"] == "feasible"
    assert first.user_attrs["bytes_total"] == 120_000
    assert first.user_attrs["spent_s"] == 16.0, "8 s on 2 workers"
    folder = TrialFolder(sweep.folder / "trial-00000")
    config = TrainConfig.from_dict(json.loads(folder.config.read_text()))
    assert config.digest() == first.user_attrs["digest"]
    assert config.budget.artifact_bytes == TRACK.artifact_bytes
    assert {verdict.name: verdict.value for verdict in folder.read_verdicts()} == {
        "artifact_size": 120_000,
        "train_seconds": 8.0,
        "eval_seconds": 1.0,
        "step_time": 160,
    }
    provenance = json.loads(folder.provenance.read_text())
    assert (provenance["digest"], provenance["number"]) == (config.digest(), 0)
    assert sweep.recorder.started == [(0, 1), (1, 1)]
    assert sweep.recorder.ended == [(0, "COMPLETE"), (1, "COMPLETE")]
    assert sweep.recorder.closed


def test_starting_points_come_first_and_only_once(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, by_depth, num_trials=5)
    sweep.run()
    again = Sweep(tmp_path, by_depth, num_trials=6, start_at=500)
    again.run()
    params = [trial.params for trial in again.trials()]
    assert params[:3] == list(SMOKE.enqueued)
    assert len(params) == 6
    assert sum(point in SMOKE.enqueued for point in params) == 3


@pytest.mark.parametrize(("track", "state"), [("laptop", "PRUNED"), ("bench", "COMPLETE")])
def test_what_the_track_forbids_is_rejected_without_a_worker(
    tmp_path: Path, track: str, state: str
) -> None:
    axes = {"data.train_split": CategoricalDistribution(["val", "train"])}
    points = ({"data.train_split": "val"}, {"data.train_split": "train"})
    space = Space("replay", "tiny", "laptop", axes, points, "for tests")
    named = TRACK.model_copy(update={"name": track})
    sweep = Sweep(tmp_path, by_depth, space=space, num_trials=2, track=named)
    sweep.run()
    assert sweep.states() == [state, "COMPLETE"]
    first = sweep.trials()[0]
    if state == "PRUNED":
        assert first.constraints["legality"] == 1
        assert first.user_attrs["verdict"] == "rejected before launch"
        assert "data.train_split trains on validation text" in first.user_attrs["reason"]
        assert [spec.number for spec in sweep.runner.submissions] == [1]


def test_too_large_is_rejected_without_a_worker(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, [GOOD], space=plain_space(8, 3), num_trials=2)
    sweep.run()
    rejected, _ = sweep.trials()
    assert rejected.state.name == "PRUNED"
    assert rejected.user_attrs["verdict"] == "rejected before launch"
    assert rejected.user_attrs["filter"] == "artifact_size"
    assert "against a cap of 200,000" in rejected.user_attrs["reason"]
    assert rejected.constraints["artifact_size"] > 0
    assert rejected.user_attrs["saved_s"] == 16.0
    assert [spec.number for spec in sweep.runner.submissions] == [1]
    assert not (sweep.folder / "trial-00000" / "metrics.jsonl").exists()


def test_invalid_configuration_is_rejected_with_its_faults(tmp_path: Path) -> None:
    space = Space(
        "heads", "tiny", "laptop", {"model.num_heads": IntDistribution(2, 8)},
        ({"model.num_heads": 3}, {"model.num_heads": 4}), "for tests",
    )  # fmt: skip
    sweep = Sweep(tmp_path, [GOOD], space=space, num_trials=2)
    sweep.run()
    rejected, good = sweep.trials()
    assert (rejected.state.name, good.state.name) == ("PRUNED", "COMPLETE")
    assert rejected.user_attrs["filter"] == "configuration"
    assert "model.num_heads = 3 does not divide" in rejected.user_attrs["reason"]
    assert rejected.constraints["configuration"] > 0


def test_unequal_shares_of_the_workers_are_invalid(tmp_path: Path) -> None:
    space = Space(
        "rows", "tiny", "laptop", {"data.batch_tokens": IntDistribution(128, 4096, step=128)},
        ({"data.batch_tokens": 384}, {"data.batch_tokens": 4096}), "for tests",
    )  # fmt: skip
    sweep = Sweep(tmp_path, [GOOD], space=space, num_trials=2)
    sweep.run()
    assert "3 rows of data.seq_len = 128, which 2 workers" in sweep.trials()[0].user_attrs["reason"]


def test_over_the_cap_when_measured_is_complete_but_infeasible(tmp_path: Path) -> None:
    run = replace(GOOD, bytes_model=160_001)
    sweep = Sweep(tmp_path, [run], space=plain_space(3), num_trials=1)
    sweep.run()
    (trial,) = sweep.trials()
    assert trial.state.name == "COMPLETE"
    assert trial.constraints["artifact_size"] == 1.0
    assert trial.user_attrs["verdict"] == "infeasible"
    assert sweep.scheduler.status().best is None


@pytest.mark.parametrize("field", ["train_s", "eval_s"])
def test_seconds_over_a_cap_make_a_trial_infeasible(tmp_path: Path, field: str) -> None:
    sweep = Sweep(tmp_path, [replace(GOOD, **{field: 31.0})], space=plain_space(3), num_trials=1)
    sweep.run()
    (trial,) = sweep.trials()
    name, cap = {"train_s": ("train_seconds", 8), "eval_s": ("eval_seconds", 30)}[field]
    assert trial.constraints[name] == 31 - cap
    assert trial.user_attrs["filter"] == name


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (replace(GOOD, loss=lambda p: 9.0), "more than guessing"),
        (DIVERGES, "the run had reached"),
        (replace(GOOD, loss=lambda p: 5 - 8 * p if p < 0.4 else 4.0), "the run had reached"),
        (replace(GOOD, loss=lambda p: math.nan if p > 0.3 else 5.0), "is nan"),
        (replace(GOOD, loss=lambda p: math.inf if p > 0.3 else 5.0), "is inf"),
    ],
)
def test_divergence_is_stopped_and_told_pruned(tmp_path: Path, run: FakeRun, words: str) -> None:
    sweep = Sweep(tmp_path, [run], space=plain_space(3), num_trials=1)
    sweep.run()
    (trial,) = sweep.trials()
    assert trial.state.name == "PRUNED"
    assert trial.user_attrs["verdict"] == "stopped while running"
    assert trial.user_attrs["filter"] == "divergence"
    assert words in trial.user_attrs["reason"]
    assert 0 < trial.constraints["divergence"] < math.inf
    spent, saved = trial.user_attrs["spent_s"], trial.user_attrs["saved_s"]
    assert 0 < spent < 16
    assert spent + saved == pytest.approx(16)


def test_one_spike_is_no_divergence(tmp_path: Path) -> None:
    spiky = replace(GOOD, loss=lambda p: 30.0 if 0.45 < p < 0.55 else 5.0)
    sweep = Sweep(tmp_path, [spiky], space=plain_space(3), num_trials=1)
    sweep.run()
    assert sweep.states() == ["COMPLETE"]


def test_too_slow_is_stopped_by_the_forecast_of_its_steps(tmp_path: Path) -> None:
    slow = replace(GOOD, step_s=0.8, num_records=5)
    sweep = Sweep(tmp_path, [slow], space=plain_space(3), num_trials=1)
    sweep.run()
    (trial,) = sweep.trials()
    assert trial.state.name == "PRUNED"
    assert trial.user_attrs["filter"] == "step_time"
    assert trial.constraints["step_time"] == 20 - 10
    assert "short of the minimum of 20" in trial.user_attrs["reason"]
    assert trial.user_attrs["train_seconds"] < 4


def test_a_run_that_ignores_the_stop_is_cancelled_after_the_grace(tmp_path: Path) -> None:
    deaf = replace(DIVERGES, ignores_stop=True, train_s=5000.0)
    sweep = Sweep(tmp_path, [deaf], space=plain_space(3), num_trials=1, stop_grace_s=30)
    asked = sweep.runner.now()
    sweep.run(second=5)
    (trial,) = sweep.trials()
    assert trial.user_attrs["filter"] == "divergence"
    assert 5000 * 3 / 20 < sweep.runner.now() - asked < 5000
    assert sweep.runner.free_slots(Demand()) == 2


def test_a_failure_is_tried_again_within_the_trial(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, [BREAKS, GOOD], space=plain_space(3), num_trials=1)
    sweep.run()
    (trial,) = sweep.trials()
    assert trial.state.name == "COMPLETE"
    assert trial.user_attrs["attempt"] == 2
    assert "ValueError: a defect" in trial.user_attrs["error.attempt-1"]
    assert sweep.recorder.started == [(0, 1), (0, 2)]
    status = sweep.scheduler.status()
    assert status.gpu_seconds.spent == pytest.approx(2 * (8.0 + 0.8)), "the failed attempt counts"


def test_a_trial_that_keeps_failing_is_told_fail_and_another_is_asked(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, [BREAKS, BREAKS, GOOD], space=plain_space(3, 4), num_trials=1, slots=1)
    sweep.run()
    failed, good = sweep.trials()
    assert (failed.state.name, good.state.name) == ("FAIL", "COMPLETE")
    assert failed.user_attrs["reason"] == "ValueError: a defect"
    assert failed.constraints == {}
    assert sweep.recorder.ended == [(0, "FAIL"), (1, "COMPLETE")]


def test_a_defect_that_fails_every_trial_ends_the_sweep(tmp_path: Path) -> None:
    """Proposals that are rejected in between, here a model far too large, change nothing of it."""
    depths = plain_space(3, 8, 4, 2)
    sweep = Sweep(tmp_path, lambda spec: BREAKS, slots=1, max_failures=3, space=depths)
    sweep.run()
    assert sweep.states() == ["FAIL", "PRUNED", "FAIL", "FAIL"]
    assert (sweep.scheduler.ending or "").startswith("the last 3 launched trials all failed")
    assert sweep.scheduler.status().ending == sweep.scheduler.ending


def test_all_rejected_ends_the_sweep_with_a_remedy(tmp_path: Path) -> None:
    tight = TRACK.model_copy(update={"artifact_bytes": 1000})
    sweep = Sweep(tmp_path, by_depth, track=tight, num_trials=99, max_rejections=7)
    sweep.run()
    assert sweep.states() == ["PRUNED"] * 7
    assert "every one of the last 7 proposals was rejected" in (sweep.scheduler.ending or "")
    assert sweep.runner.submissions == []


def test_out_of_memory_is_pruned_and_the_same_configuration_never_run_again(
    tmp_path: Path,
) -> None:
    oom = FakeRun(fails_at_s=6, out_of_memory=True, error="torch.OutOfMemoryError: tried 2 GiB")
    space = plain_space(3)
    sweep = Sweep(tmp_path, [oom], space=space, num_trials=1)
    sweep.run()
    again = Sweep(tmp_path, [], space=space, num_trials=2, start_at=500)
    again.study.enqueue_trial(space.enqueued[0])
    again.run()
    first, second = again.trials()
    assert [trial.state.name for trial in (first, second)] == ["PRUNED", "PRUNED"]
    assert first.user_attrs["verdict"] == "stopped while running"
    assert "torch.OutOfMemoryError: tried 2 GiB" in second.user_attrs["reason"]
    assert second.user_attrs["duplicate_of"] == 0
    assert second.constraints == first.constraints
    assert first.constraints["memory"] > 0
    assert again.runner.submissions == []


def test_an_equal_trial_waits_for_the_running_one_and_is_told_the_same(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, [GOOD, replace(GOOD, val_bpb=9.0)], space=plain_space(3), num_trials=3)
    for _ in range(2):
        sweep.study.enqueue_trial(plain_space(3).enqueued[0])
    sweep.steps(3)
    assert [row.state for row in sweep.scheduler.status().running] == [
        "starting", "waiting", "waiting",
    ]  # fmt: skip
    sweep.run()
    trials = sweep.trials()
    assert [trial.value for trial in trials] == [2.0, 2.0, 2.0]
    assert [trial.user_attrs.get("duplicate_of") for trial in trials] == [None, 0, 0]
    assert [trial.user_attrs["spent_s"] for trial in trials] == [16.0, 0.0, 0.0]
    assert trials[1].constraints == trials[0].constraints
    assert len(sweep.runner.submissions) == 1


def test_equals_of_a_failed_trial_run_themselves_one_for_all(tmp_path: Path) -> None:
    runs = [BREAKS, BREAKS, GOOD]
    sweep = Sweep(tmp_path, runs, space=plain_space(3), num_trials=2, slots=3)
    for _ in range(2):
        sweep.study.enqueue_trial(plain_space(3).enqueued[0])
    sweep.run()
    assert sweep.states() == ["FAIL", "COMPLETE", "COMPLETE"]
    assert [spec.number for spec in sweep.runner.submissions] == [0, 0, 1]


def test_another_seed_is_another_trial(tmp_path: Path) -> None:
    space = Space(
        "seeds", "tiny", "laptop", {"runtime.seed": IntDistribution(1, 99)},
        ({"runtime.seed": 1}, {"runtime.seed": 2}), "for tests",
    )  # fmt: skip
    sweep = Sweep(tmp_path, [GOOD, GOOD], space=space, num_trials=2)
    sweep.run()
    assert len(sweep.runner.submissions) == 2


def test_finished_without_a_score_is_pruned(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, [replace(GOOD, val_bpb=math.nan)], space=plain_space(3), num_trials=1)
    sweep.run()
    (trial,) = sweep.trials()
    assert trial.state.name == "PRUNED"
    assert trial.user_attrs["reason"] == "the run finished without a finite score"


def test_a_hung_run_is_cancelled_and_tried_again(tmp_path: Path) -> None:
    hung = replace(GOOD, start_s=math.inf)
    sweep = Sweep(tmp_path, [hung, GOOD], space=plain_space(3), num_trials=1, overhead_s=100)
    sweep.run()
    (trial,) = sweep.trials()
    assert trial.state.name == "COMPLETE"
    assert "hung: no step 100 s after launch" in trial.user_attrs["error.attempt-1"]


def test_a_run_that_hangs_after_training_is_cancelled_by_its_budgets(tmp_path: Path) -> None:
    hung = replace(GOOD, finish_s=math.inf)
    sweep = Sweep(
        tmp_path, [hung, GOOD], space=plain_space(3), num_trials=1, overhead_s=100, silence_s=0
    )
    sweep.run()
    (trial,) = sweep.trials()
    assert trial.state.name == "COMPLETE"
    assert "cancelled: no result 138 s after launch" in trial.user_attrs["error.attempt-1"]


def test_a_trial_that_cannot_be_placed_fails_and_one_that_never_fits_is_refused(
    tmp_path: Path,
) -> None:
    runs = [replace(GOOD, cannot_be_placed=True)] * 2 + [GOOD]
    sweep = Sweep(tmp_path, runs, space=plain_space(3, 4), num_trials=1, slots=1)
    sweep.run()
    assert sweep.states() == ["FAIL", "COMPLETE"]
    with pytest.raises(RunnerError, match="never fits here; lower --workers-per-trial"):
        Sweep(tmp_path, [], slots=0, space=plain_space(3, 4))


def test_no_more_than_fits_runs_at_once_and_no_more_than_asked_is_asked(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, by_depth, slots=3, num_trials=7, space=plain_space(2, 3, 4))
    most = 0
    while sweep.scheduler.step():
        most = max(most, 3 - sweep.runner.free_slots(Demand()))
        sweep.runner.advance(1)
    assert most == 3
    assert sweep.states() == ["COMPLETE"] * 7


def test_a_tracker_that_raises_is_reported_and_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            def call(*arguments: Any, **options: Any) -> None:
                if name != "close":
                    raise ConnectionError("no route to host")

            return call

    sweep = Sweep(tmp_path, by_depth, space=plain_space(3), num_trials=1, trackers=[Broken()])
    sweep.run()
    assert sweep.states() == ["COMPLETE"]
    assert sweep.recorder.ended == [(0, "COMPLETE")]
    assert "no route to host; the sweep goes on" in caplog.text
