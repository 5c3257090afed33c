"""A driver that dies at any point: the next one loses no trial, tells none twice, leaves none
RUNNING."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages._cached_storage import _CachedStorage

from service.driver_storage import DriverStorage
from service.lease import LEASE_ATTR, Lease, read_lease
from service.runners.fake_runner import FakeRun, FakeRunner
from service.trial import TrialFolder, TrialSpec
from service.trial_book import TrialBook
from tests.service_tests.sweeps import Sweep, plain_space

SPACE = plain_space(3, 8, 4, 5)
"""The second is rejected before launch."""
NUM_TRIALS = 5


class Killed(BaseException):
    """Stands for SIGKILL: nothing below it may run any more."""


def script(spec: TrialSpec) -> FakeRun:
    """Trial 2 diverges; the others are measured."""
    depth = spec.config.model.num_layers
    diverges = spec.number == 2
    loss = (lambda progress: 9.0) if diverges else (lambda progress: 6.0 - progress)
    return FakeRun(val_bpb=3.0 - 0.1 * depth, loss=loss)


def bury(study: optuna.Study) -> None:
    """Make the lease that of a process that is dead."""
    lease = read_lease(study)
    assert lease is not None
    dead = subprocess.Popen(["true"])
    dead.wait()
    study.set_user_attr(LEASE_ATTR, asdict(Lease(**{**asdict(lease), "pid": dead.pid})))


def assert_whole(sweep: Sweep, drivers: list[Sweep]) -> None:
    trials = sweep.trials()
    assert [trial.number for trial in trials] == list(range(NUM_TRIALS))
    assert [trial.state.name for trial in trials][:4] == [
        "COMPLETE", "PRUNED", "PRUNED", "COMPLETE",
    ]  # fmt: skip
    assert "RUNNING" not in sweep.states()
    for trial in trials:
        assert set(trial.params) == {"model.num_layers", "optim.tied_embed_lr"}
        if trial.state.name == "COMPLETE":
            depth = trial.params["model.num_layers"]
            assert trial.value == pytest.approx(3.0 - 0.1 * depth)
            assert trial.constraints["artifact_size"] == -80_000
    depths = [trial.params["model.num_layers"] for trial in trials]
    assert depths[:4] == [3, 8, 4, 5]
    assert trials[1].user_attrs["filter"] == "artifact_size"
    assert trials[2].user_attrs["filter"] == "divergence"
    ended = [end for driver in drivers for end in driver.recorder.ended]
    assert {number for number, _ in ended} == set(range(NUM_TRIALS)), "trackers heard of all"
    assert {state for number, state in ended if number == 0} == {"COMPLETE"}
    assert sweep.scheduler.status().told == NUM_TRIALS


POINTS: list[tuple[Any, str]] = [
    (_CachedStorage, "create_new_trial"),
    (DriverStorage, "set_trial_param"),
    (DriverStorage, "_flush"),
    (optuna.Study, "ask"),
    (TrialBook, "open"),
    (TrialBook, "launch"),
    (FakeRunner, "submit"),
    (FakeRunner, "poll"),
    (FakeRunner, "request_stop"),
    (TrialBook, "close"),
    (TrialFolder, "write_verdicts"),
    (optuna.Trial, "set_user_attr"),
    (optuna.Trial, "set_constraint"),
    (optuna.Study, "tell"),
    (TrialBook, "_mirror"),
]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("owner", "name"), POINTS, ids=[name for _, name in POINTS])
def test_death_around(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, after: bool
) -> None:
    real = getattr(owner, name)
    deaths = iter((1, 2, 5))
    calls, next_death = 0, next(deaths)

    def deadly(*arguments: Any, **options: Any) -> Any:
        nonlocal calls, next_death
        calls += 1
        if calls != next_death:
            return real(*arguments, **options)
        calls, next_death = 0, next(deaths, -1)
        if after:
            real(*arguments, **options)
        raise Killed

    drivers = []
    for life in range(4):
        sweep = Sweep(tmp_path, script, space=SPACE, num_trials=NUM_TRIALS, start_at=1000.0 * life)
        drivers.append(sweep)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, deadly)
            try:
                sweep.run()
                break
            except Killed:
                bury(sweep.study)
    assert len(drivers) > 1, "the first driver died"
    assert_whole(drivers[-1], drivers)
    told = Counter(number for driver in drivers for number, _ in driver.recorder.ended)
    if name != "_mirror":
        assert set(told.values()) == {1}, "no trial is told twice"


def test_a_result_that_the_dead_driver_never_saw_is_judged_without_running_again(
    tmp_path: Path,
) -> None:
    first = Sweep(tmp_path, script, space=SPACE, num_trials=NUM_TRIALS)
    first.steps(4)
    first.runner.advance(100)
    first.runner.poll(0)  # the run ends and writes result.json; nobody listens
    bury(first.study)
    second = Sweep(tmp_path, script, space=SPACE, num_trials=NUM_TRIALS, start_at=1000)
    second.run()
    assert_whole(second, [first, second])
    assert 0 not in [spec.number for spec in second.runner.submissions]
    assert 2 in [spec.number for spec in second.runner.submissions], "it had no result"


def test_a_run_that_only_the_dead_drivers_end_stopped_is_run_again(tmp_path: Path) -> None:
    first = Sweep(tmp_path, script, space=SPACE, num_trials=NUM_TRIALS)
    first.steps(14)
    first.runner.request_stop(0, "the driver went away")
    first.runner.poll(0)
    result = TrialFolder(first.folder / "trial-00000").read_result()
    assert result is not None and result.status == "stopped"
    bury(first.study)
    second = Sweep(tmp_path, script, space=SPACE, num_trials=NUM_TRIALS, start_at=1000)
    second.run()
    assert_whole(second, [first, second])


@pytest.mark.slow
def test_sigkill_again_and_again(tmp_path: Path) -> None:
    """A real process, really killed."""
    command = [sys.executable, "-m", "tests.service_tests.quick_driver", str(tmp_path), "14"]
    root = Path(__file__).parents[2]
    dice = random.Random(5)
    kills = 0
    for _ in range(4):
        driver = subprocess.Popen(command, cwd=root)
        while driver.poll() is None and not (tmp_path / "started").exists():
            time.sleep(0.02)
        time.sleep(dice.uniform(0.0, 0.5))
        if driver.poll() is None:
            driver.kill()
            kills += 1
        driver.wait()
        (tmp_path / "started").unlink(missing_ok=True)
    subprocess.run(command, cwd=root, check=True, timeout=120)
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path / 'caddie.db'}")
    trials = study.get_trials()
    assert kills >= 2
    assert [trial.number for trial in trials] == list(range(14))
    assert {trial.state.name for trial in trials} <= {"COMPLETE", "PRUNED"}
    ends = (tmp_path / "s" / "ends.log").read_text().split()
    assert Counter(int(number) for number in ends) == Counter(range(14))
    for trial in trials:
        if trial.state.name == "COMPLETE":
            expected = 3.0 - 0.1 * trial.params["model.num_layers"]
            assert trial.value == pytest.approx(expected)


def test_a_stop_that_the_dead_driver_had_decided_stands(tmp_path: Path) -> None:
    first = Sweep(tmp_path, script, space=plain_space(3), num_trials=1)
    first.runner._script = lambda spec: FakeRun(loss=lambda progress: 9.0, ignores_stop=True)
    first.steps(16)
    assert first.scheduler.status().running[0].state == "stopping"
    bury(first.study)
    second = Sweep(tmp_path, [], space=plain_space(3), num_trials=1, start_at=1000)
    second.run()
    (trial,) = second.trials()
    assert trial.state.name == "PRUNED"
    assert trial.user_attrs["verdict"] == "stopped while running"
    assert trial.constraints["divergence"] > 0
