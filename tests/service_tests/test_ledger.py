"""Every GPU-second has one word, and the words add up to GPUs times wall time."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.config import ServiceSettings
from service.errors import UsageError
from service.ledger import WORDS, Meter, add_up, split_stay
from service.policies import has_room
from service.runners.fake_runner import FakeRun
from service.status import status_of
from service.study import load_study
from tests.service_tests.sweeps import Sweep, plain_space
from tests.service_tests.test_adoption import bury
from tests.service_tests.test_simulate import simulation

BREAKS = FakeRun(fails_at_s=6.0)


def test_a_stay_is_split_by_what_the_trial_measured() -> None:
    phases = {"build": 1.0, "prime": 4.0, "train": 60.0, "calibrate": 2.0}
    phases |= {"quantize": 3.0, "pack": 5.0, "evaluate": 7.0, "validate": 1.0}
    words = split_stay(100.0, phases, until_training_s=15.0)
    assert words == {
        "start": 10.0, "compile": 5.0, "train": 62.0, "evaluate": 8.0, "pack": 8.0,
        "teardown": 7.0,
    }  # fmt: skip
    assert sum(words.values()) == 100.0


def test_what_never_trained_was_starting_and_no_clock_makes_more_of_a_stay() -> None:
    assert split_stay(9.0, {"prime": 4.0}, None)["start"] == 5.0
    fast = split_stay(50.0, {"train": 80.0, "evaluate": 20.0}, 0.0)
    assert (fast["train"], sum(fast.values())) == (40.0, pytest.approx(50.0))


def test_the_meter_counts_what_passes_and_no_clock_that_is_put_back() -> None:
    meter = Meter()
    for now, held in ((100.0, 0.0), (110.0, 4.0), (105.0, 8.0), (115.0, 8.0)):
        meter.tick(now, 8.0, held)
    assert (meter.held, meter.queue) == (40.0 + 80.0, 40.0)
    again = Meter.of_attr(meter.to_attr())
    again.tick(1000.0, 8.0, 0.0)
    assert again.queue == 40.0, "between two drivers nothing is counted"


def test_what_was_held_and_never_booked_is_wasted() -> None:
    words = add_up(
        {"queue": 5.0, "held": 100.0, "running": 20.0},
        [{"ledger": {"train": 50.0, "start": 10.0}}, {"wasted_s": 7.0}],
    )
    assert words["wasted"] == 7.0 + 13.0
    assert words["total"] == 105.0 == sum(words[word] for word in (*WORDS, "running"))


def test_a_simulated_sweep_adds_up(tmp_path: Path) -> None:
    sweep = simulation(tmp_path, trials=8, failure_rate=0.25, start_s=30.0, teardown_s=0.0)
    started = sweep.cluster.now()
    sweep.run()
    wall = sweep.cluster.now() - started
    found = status_of(sweep.study, now=sweep.cluster.now()).gpu_seconds
    words = {word: getattr(found, word) for word in WORDS}
    assert found.total == pytest.approx(16 * wall, rel=0.01)
    assert sum(words.values()) == pytest.approx(16 * wall, rel=0.01)
    assert found.running == 0
    ended = sweep.cluster.seats
    good = [s for s in ended if s.busy_until - s.busy_from > 480 + 20]
    assert words["train"] == pytest.approx(sum(8 * 480 for _ in good), rel=0.01)
    assert words["start"] == pytest.approx(sum(8 * 30 for _ in good), rel=0.02)
    failed = [s for s in ended if s not in good]
    assert failed, "some attempts were lost"
    lost = sum(8 * (s.busy_until - s.since) for s in failed if s.busy_until > s.busy_from)
    assert words["wasted"] >= lost - 1


def test_nothing_is_wasted_where_nothing_failed(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, lambda spec: FakeRun(compile_s=2.0), num_trials=4)
    before = sweep.runner.now()
    sweep.run()
    found = sweep.scheduler.status().gpu_seconds
    assert found.total == pytest.approx(2 * 2 * (sweep.runner.now() - before), rel=0.01)
    assert found.wasted == pytest.approx(0.0, abs=0.01 * found.total)
    launched = len(sweep.runner.submissions)
    assert (found.train, found.compile) == (16.0 * launched, 4.0 * launched)
    assert (found.start, found.evaluate, found.pack) == (
        6.0 * launched,
        2.0 * launched,
        2.0 * launched,
    )


def test_failed_attempts_are_wasted(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, [BREAKS, FakeRun()], space=plain_space(3), num_trials=1, slots=1)
    sweep.run()
    assert sweep.scheduler.status().gpu_seconds.wasted == pytest.approx(2 * 6.0, abs=0.5)


def test_what_a_killed_driver_held_is_wasted_and_the_next_goes_on_counting(tmp_path: Path) -> None:
    first = Sweep(tmp_path, lambda spec: FakeRun(), space=plain_space(3), num_trials=1, slots=1)
    first.steps(25)  # 12.5 s: saved at 10
    bury(first.study)
    second = Sweep(
        tmp_path, lambda spec: FakeRun(), space=plain_space(3), num_trials=1, slots=1, start_at=500
    )
    second.run()
    found = status_of(load_study("s", second.url)).gpu_seconds
    assert found.train == 16.0
    assert found.wasted == pytest.approx(20.0, abs=1.0)
    assert found.total == pytest.approx(20 + 2 * 15, abs=3.0), "not the pause in between"


def test_the_budget_stops_asking_before_it_is_passed(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, lambda spec: FakeRun(), num_trials=50, slots=2, max_gpu_s=200.0)
    sweep.run()
    assert "budget of GPU-hours" in (sweep.scheduler.ending or "")
    found = sweep.scheduler.status().gpu_seconds
    held = found.total - found.queue
    assert 200 - 2 * 2 * 16 < held <= 200, "each holds about 15 s of two workers"
    again = Sweep(tmp_path, [], num_trials=50, slots=2, max_gpu_s=200.0, start_at=900)
    again.run()
    assert again.runner.submissions == [], "the next driver remembers what was spent"


@pytest.mark.parametrize(
    ("held", "owed", "following", "expected"),
    [(0, 0, 100, True), (60, 30, 10, True), (60, 30, 11, False), (101, 0, 0, False)],
)
def test_has_room(held: float, owed: float, following: float, expected: bool) -> None:
    assert has_room(100.0, held, owed, following) is expected
    assert has_room(None, held, owed, following)


def test_money_and_hours_are_one_budget() -> None:
    assert ServiceSettings().max_gpu_s is None
    both = ServiceSettings(max_gpu_hours=10.0, max_cost=30.0, gpu_hour_price=5.0)
    assert both.max_gpu_s == 6 * 3600
    with pytest.raises(UsageError, match="--gpu-hour-price"):
        _ = ServiceSettings(max_cost=30.0).max_gpu_s
