"""The real scheduler on pretended nodes: packed, busy, and honest about what failed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from search_spaces import SPACES
from service.errors import UsageError
from service.policies import Policy
from service.runners.base import Demand
from service.simulate import Load, Simulated, Simulation

SMOKE = SPACES["smoke"]


def simulation(folder: Path, policy: Policy | None = None, **load: Any) -> Simulation:
    """Repeatable: the scheduler's own time does not count."""
    settings = {"nodes": 2, "gpus_per_node": 8, "trials": 12, "trial_s": 600.0, **load}
    return Simulation(SMOKE, Load(**settings), folder, count_driver=False, policy=policy)


def simulated(folder: Path, **load: Any) -> Simulated:
    return simulation(folder, **load).run()


def test_gpus_idle_for_the_overheads_and_nothing_else(tmp_path: Path) -> None:
    found = simulated(tmp_path, start_s=50.0, teardown_s=30.0)
    assert (
        found.states == {"COMPLETE": 12, "PRUNED": 0, "FAIL": 0} or sum(found.states.values()) >= 12
    )
    assert found.gap_s["p50"] == pytest.approx(80.0, abs=0.5), "start + teardown + a turn"
    assert found.busy_fraction == pytest.approx(600 / 680, abs=0.02)
    assert found.utilization > 0.98
    without = simulated(tmp_path / "b", start_s=0.0, teardown_s=0.0, trials=6)
    assert without.busy_fraction > 0.99


def test_the_same_load_gives_the_same_sweep(tmp_path: Path) -> None:
    runs = [simulation(tmp_path / name, failure_rate=0.2) for name in "ab"]
    first, second = ((run.run(), [t.params for t in run.study.get_trials()]) for run in runs)
    assert first[1] == second[1]
    assert first[0].states == second[0].states
    assert first[0].simulated_hours == pytest.approx(second[0].simulated_hours)


def test_failed_attempts_are_tried_again(tmp_path: Path) -> None:
    sweep = simulation(tmp_path, failure_rate=0.3)
    found = sweep.run()
    assert found.states["COMPLETE"] + found.states["PRUNED"] == 12
    assert max(spec.attempt for spec in sweep.cluster.submissions) == 2


def test_gangs_of_all_sizes_leave_no_node_idle_while_one_fits(tmp_path: Path) -> None:
    sweep = simulation(tmp_path, trials=30, gangs=(1, 2, 4, 8), nodes=3)
    step = sweep.scheduler.step

    def checked_step() -> bool:
        goes_on = step()
        waiting = {run.spec.workers for run in sweep.scheduler._ready}
        assert not any(sweep.cluster.free_slots(Demand(gang, 1.0)) for gang in waiting)
        return goes_on

    sweep.scheduler.step = checked_step  # type: ignore[method-assign]
    sweep.run()
    assert {spec.workers for spec in sweep.cluster.submissions} == {1, 2, 4, 8}
    for seat in sweep.cluster.seats:
        together = [
            other.gpus
            for other in sweep.cluster.seats
            if other.node == seat.node and other.since <= seat.since < other.busy_until
        ]
        assert sum(together) <= 8


def test_a_node_on_which_everything_fails_is_left_alone(tmp_path: Path) -> None:
    policy = Policy(quarantine_failures=2, quarantine_s=1e6, max_attempts=4, max_failures=99)
    sweep = simulation(tmp_path, policy=policy, nodes=3, bad_nodes=1, trials=9)
    found = sweep.run()
    attempts = [seat for seat in sweep.cluster.seats if seat.node == "node-0"]
    assert len(attempts) == 2, "then it is quarantined"
    assert found.states["COMPLETE"] + found.states["PRUNED"] == 9
    sweep.cluster.advance(10)
    assert sweep.cluster.free_slots(Demand(8, 1.0)) == 2


def test_a_lost_node_takes_its_gang_along_and_comes_back(tmp_path: Path) -> None:
    sweep = simulation(tmp_path, nodes=1, trials=3)
    for _ in range(4):
        sweep.turn()
    (number,) = sweep.scheduler._running
    sweep.cluster.fail_node("node-0", down_s=5000.0)
    lost_at = sweep.cluster.now()
    found = sweep.run()
    again = [seat for seat in sweep.cluster.seats if seat.since > lost_at]
    assert min(seat.since for seat in again) >= lost_at + 5000
    assert [spec.number for spec in sweep.cluster.submissions].count(number) == 2
    assert found.states["COMPLETE"] + found.states["PRUNED"] == 3


@pytest.mark.parametrize(
    ("load", "words"),
    [
        ({"gangs": (16,)}, "16 GPUs does not fit a node of 8"),
        ({"failure_rate": 1.0}, "failure_rate = 1"),
        ({"trial_s": 0.0}, "trial_s = 0: must be above 0"),
        ({"nodes": 0}, "nodes = 0"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, load: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        simulation(tmp_path, **load)
