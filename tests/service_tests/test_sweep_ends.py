"""The loop against scripted runs in simulated time, on a real SQLite storage: how a sweep is
stopped, interrupted and watched."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from sqlalchemy.exc import OperationalError

from service.driver_storage import batch
from service.errors import StorageError, StudyBusyError
from service.runners.base import Demand
from service.study import ask_to_stop
from tests.service_tests.sweeps import (
    BREAKS,
    DIVERGES,
    GOOD,
    TRACK,
    Sweep,
    by_depth,
    plain_space,
)


def test_stop_lets_running_trials_finish_within_the_grace(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, by_depth, num_trials=9, space=plain_space(3, 4, 5))
    sweep.steps(4)
    ask_to_stop(sweep.study, 60.0)
    sweep.run()
    assert sweep.states() == ["COMPLETE", "COMPLETE", "WAITING"]
    assert sweep.scheduler.ending == "the sweep was asked to stop"
    resumed = Sweep(tmp_path, by_depth, num_trials=4, space=plain_space(3, 4, 5), start_at=500)
    resumed.run()
    assert resumed.states() == ["COMPLETE"] * 4
    assert [trial.number for trial in resumed.trials()] == [0, 1, 2, 3]


def test_stop_now_puts_running_trials_back_and_they_keep_number_and_parameters(
    tmp_path: Path,
) -> None:
    space = plain_space(3, 4, 5)
    sweep = Sweep(tmp_path, by_depth, num_trials=3, space=space)
    sweep.steps(16)
    before = [trial.params for trial in sweep.trials()]
    sweep.scheduler.stop_asking(60.0)
    sweep.scheduler.stop_asking(0.0)
    sweep.run(turns=3)
    assert sweep.states() == ["WAITING"] * 3
    assert sweep.runner.free_slots(Demand()) == 2
    spent = sweep.scheduler.status().gpu_seconds.spent
    assert 0 < spent < 2 * 16, "what the interrupted runs trained is not forgotten"
    resumed = Sweep(tmp_path, by_depth, num_trials=3, space=space, start_at=500)
    resumed.run()
    assert [trial.params for trial in resumed.trials()][:2] == before[:2]
    assert [trial.value for trial in resumed.trials()] == pytest.approx([2.7, 2.6, 2.5])
    assert resumed.scheduler.status().gpu_seconds.spent == pytest.approx(spent + 3 * 16)


def test_closing_in_the_middle_leaves_nothing_running(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, by_depth, num_trials=3)
    sweep.steps(5)
    sweep.scheduler.close()
    assert "RUNNING" not in sweep.states()
    assert sweep.scheduler.status().driver is None
    Sweep(tmp_path, by_depth, num_trials=3, start_at=500).run()


def test_a_second_driver_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, by_depth, num_trials=1, space=plain_space(3))
    with pytest.raises(StudyBusyError, match="study 's' is being driven by process"):
        Sweep(tmp_path, by_depth, num_trials=1, space=plain_space(3))
    sweep.run()


def test_the_storage_may_be_away_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = Sweep(tmp_path, by_depth, num_trials=3, space=plain_space(3, 4, 5))
    calls = iter(range(10_000))
    real = optuna.Trial.set_user_attr

    def flaky(trial: optuna.Trial, key: str, value: Any) -> None:
        if next(calls) % 7 == 3:
            raise OperationalError("UPDATE", {}, Exception("server closed the connection"))
        real(trial, key, value)

    monkeypatch.setattr(optuna.Trial, "set_user_attr", flaky)
    sweep.run()
    assert sweep.states() == ["COMPLETE"] * 3
    assert sorted(sweep.recorder.ended) == [(number, "COMPLETE") for number in range(3)]
    assert [trial.value for trial in sweep.trials()] == pytest.approx([2.7, 2.6, 2.5])


def test_a_storage_that_stays_away_ends_the_sweep_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = Sweep(tmp_path, by_depth, num_trials=3, storage_patience_s=20)

    def gone(*arguments: Any) -> None:
        raise OperationalError("SELECT", {}, Exception("server closed the connection"))

    sweep.steps(2)
    with monkeypatch.context() as patch:
        patch.setattr("service.lease.DriverLease._write", gone)
        patch.setattr("service.scheduler.stop_grace", gone)
        with pytest.raises(StorageError, match="does not answer, for 20 s now; run"):
            sweep.run()
    sweep.scheduler.close()
    assert "RUNNING" not in sweep.states()


def test_intermediate_values_are_few_and_increasing(tmp_path: Path) -> None:
    chatty = replace(GOOD, num_records=500, train_s=400.0)
    track = TRACK.model_copy(update={"train_seconds": 400.0})
    sweep = Sweep(
        tmp_path, [chatty], space=plain_space(3), num_trials=1, track=track, reports_per_trial=12
    )
    sweep.run()
    values = sweep.trials()[0].intermediate_values
    assert len(values) == 12
    assert list(values.values()) == sorted(values.values(), reverse=True)


def test_status_has_the_contract_and_the_numbers(tmp_path: Path) -> None:
    runs = {3: GOOD, 4: DIVERGES, 5: replace(GOOD, bytes_model=190_000), 2: BREAKS}
    sweep = Sweep(
        tmp_path, lambda spec: runs[spec.config.model.num_layers], num_trials=4, slots=1,
        space=plain_space(3, 8, 4, 2, 5),
    )  # fmt: skip
    sweep.steps(9, second=1)
    live = sweep.scheduler.status()
    assert live.driver is not None
    assert [(row.number, row.state) for row in live.running] == [(0, "running")]
    assert (live.running[0].elapsed_s, live.running[0].train_seconds) == (pytest.approx(2.8), 8.0)
    sweep.run()
    status = sweep.scheduler.status().to_dict()
    assert status["states"] == {
        "COMPLETE": 2, "PRUNED": 2, "FAIL": 1, "RUNNING": 0, "WAITING": 0,
    }  # fmt: skip
    assert (status["rejected_before_launch"], status["stopped_while_running"]) == (1, 1)
    assert status["feasible"] == 1
    assert status["best"] == {"number": 0, "value": 2.0, "params": sweep.trials()[0].params}
    assert status["running"] == []
    assert status["ended_by"] == {"artifact_size": 2, "divergence": 1}
    seconds = status["gpu_seconds"]
    assert seconds["saved_before_launch"] == 16.0
    assert 0 < seconds["saved_while_running"] < 16
    assert seconds["unit"] == "worker-seconds"
    assert json.loads(json.dumps(status)) == status


def test_what_was_measured_before_the_stop_arrived_counts(tmp_path: Path) -> None:
    late = replace(GOOD, loss=lambda p: 9.0 if p > 0.8 else 5.0, ignores_stop=True)
    sweep = Sweep(tmp_path, [late], space=plain_space(3), num_trials=1)
    sweep.run()
    (trial,) = sweep.trials()
    assert trial.user_attrs["stop_verdict"]["name"] == "divergence"
    assert (trial.state.name, trial.user_attrs["verdict"]) == ("COMPLETE", "feasible")
    assert "divergence" not in trial.constraints


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, by_depth, num_trials=2)
    sweep.steps(3)
    sweep.scheduler.close()
    sweep.scheduler.close()
    assert "RUNNING" not in sweep.states()


WRITES: dict[str, tuple[Any, str]] = {
    "tell": (optuna.Study, "tell"),
    "ask": (optuna.Study, "ask"),
    "report": (optuna.Trial, "report"),
    "attribute": (optuna.Trial, "set_user_attr"),
}


@pytest.mark.parametrize("point", WRITES)
def test_a_driver_that_was_only_slow_writes_no_trial_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """Between its look at the lease and its write the driver sleeps, and another takes over."""
    space = plain_space(3, 4)
    slow = Sweep(tmp_path, by_depth, space=space, num_trials=4, slots=1)
    owner, name = WRITES[point]
    real = getattr(owner, name)
    others: list[Sweep] = []
    written: list[list[optuna.trial.FrozenTrial]] = []
    """All trials as the other driver left them, before the slow one woke and after its write."""

    def sleeps(*arguments: Any, **options: Any) -> Any:
        if others:
            return real(*arguments, **options)
        lease = slow.study.user_attrs["driver"]
        slow.study.set_user_attr("driver", {**lease, "host": "elsewhere", "heartbeat": 0.0})
        others.append(Sweep(tmp_path, by_depth, space=space, num_trials=4, start_at=500))
        others[0].steps(1)
        written.append(slow.trials())
        with batch(slow.study):  # as the callers of attributes do
            return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, sleeps)
        with pytest.raises(StudyBusyError, match="is being driven by"):
            while slow.scheduler.step():
                slow.runner.advance(0.5)
                assert not others, f"the slow driver's {point} went through"
        written.append(slow.trials())
    slow.scheduler.close()
    written.append(slow.trials())
    assert written[0] == written[1] == written[2]
    others[0].run()
    assert others[0].states() == ["COMPLETE"] * 4 or "RUNNING" not in others[0].states()
    assert others[0].scheduler.status().told == 4
