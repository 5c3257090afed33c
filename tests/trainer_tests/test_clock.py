"""The budget clock against a clock that the test turns by hand."""

import torch

from trainer.clock import SAFETY, BudgetClock, PhaseTimer
from trainer.distributed import Group


class HandClock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def run_until_stop(cap_s: float, step_seconds: list[float], lag: int) -> tuple[float, int]:
    """Drive a clock through steps of given lengths on a device that is `lag` steps behind.

    Returns the time at which the last started step ended, and how many ran.
    """
    now = HandClock()
    clock = BudgetClock(cap_s, Group(torch.device("cpu")), now)
    clock.expect_step(step_seconds[0])
    clock.start()
    started, pending = now.time, []
    device_free = now.time
    ran = 0
    while True:
        while len(pending) > lag:
            now.time = max(now.time, pending.pop(0))
            clock.step_completed()
        gate = clock.gate(len(pending), stop_requested=False)
        if gate.near_cap and pending:
            for end in pending:
                now.time = max(now.time, end)
                clock.step_completed()
            pending = []
            gate = clock.gate(0, stop_requested=False)
        if gate.stop:
            return device_free - started, ran
        device_free = max(device_free, now.time) + step_seconds[ran % len(step_seconds)]
        pending.append(device_free)
        ran += 1


def test_training_ends_before_the_cap_and_wastes_less_than_two_steps() -> None:
    for lag in (0, 1):
        ended, ran = run_until_stop(10.0, [0.1], lag)
        assert ended <= 10.0
        assert ended > 10.0 - 2 * 0.1 * SAFETY
        assert ran >= 97


def test_the_slowest_recent_step_is_what_the_next_one_is_taken_for() -> None:
    ended, _ = run_until_stop(10.0, [0.1, 0.1, 0.1, 0.3], lag=0)
    assert 10.0 - 0.3 * SAFETY - 0.3 < ended <= 10.0


def test_pauses_do_not_count() -> None:
    now = HandClock()
    clock = BudgetClock(10.0, Group(torch.device("cpu")), now)
    clock.start()
    now.time += 2
    clock.stop()
    now.time += 50
    clock.start()
    now.time += 3
    assert clock.elapsed() == 5.0


def test_a_request_stops_and_is_told_apart_from_the_cap() -> None:
    now = HandClock()
    clock = BudgetClock(None, Group(torch.device("cpu")), now)
    clock.start()
    assert clock.gate(0, stop_requested=True).requested
    assert clock.gate(0, stop_requested=True).stop
    now.time += 1e9
    assert not clock.gate(0, stop_requested=False).stop  # no cap


def test_phases_add_up_and_are_reported() -> None:
    now = HandClock()
    told: list[tuple[str, float]] = []
    timer = PhaseTimer(lambda: None, lambda name, seconds: told.append((name, seconds)), now)
    for seconds in (1.0, 2.5):
        with timer.phase("pack"):
            now.time += seconds
    assert timer.seconds == {"pack": 3.5}
    assert told == [("pack", 1.0), ("pack", 2.5)]
