"""The small decisions."""

import pytest

from service.policies import (
    AfterFailure,
    Ending,
    Policy,
    Streak,
    after_failure,
    ending,
    is_hung,
    is_overdue,
    is_quarantined,
    num_to_launch,
    should_report,
)
from service.tracking.outcome import FAILED, FEASIBLE, REJECTED
from trainer.config import BudgetConfig

POLICY = Policy(max_attempts=2, max_rejections=3, max_failures=2, overhead_s=100)


@pytest.mark.parametrize(
    ("num_trials", "told", "in_flight", "free_slots", "expected"),
    [(10, 0, 0, 2, 2), (10, 9, 0, 2, 1), (10, 8, 2, 2, 0), (10, 12, 0, 2, 0), (10, 0, 0, 0, 0)],
)
def test_num_to_launch(
    num_trials: int, told: int, in_flight: int, free_slots: int, expected: int
) -> None:
    assert num_to_launch(num_trials, told, in_flight, free_slots) == expected


def test_after_failure() -> None:
    assert after_failure(1, POLICY) is AfterFailure.RETRY
    assert after_failure(2, POLICY) is AfterFailure.GIVE_UP


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([REJECTED, REJECTED, FEASIBLE, REJECTED], Streak(rejected=1)),
        ([FAILED, FAILED, FEASIBLE, FAILED], Streak(failed=1)),
        ([REJECTED, FAILED], Streak(failed=1)),
        ([FAILED, REJECTED, REJECTED, FAILED, REJECTED], Streak(rejected=1, failed=2)),
    ],
)
def test_rejections_interrupt_no_streak_of_failures(verdicts: list[str], expected: Streak) -> None:
    streak = Streak()
    for verdict in verdicts:
        streak = streak.after(verdict)
    assert streak == expected


@pytest.mark.parametrize(
    ("told", "streak", "expected"),
    [
        (10, Streak(), Ending.ENOUGH),
        (9, Streak(rejected=2), None),
        (9, Streak(rejected=3, failed=1), Ending.ALL_REJECTED),
        (9, Streak(failed=1), None),
        (9, Streak(rejected=1, failed=2), Ending.ALL_FAILED),
        (9, Streak(), None),
    ],
)
def test_ending(told: int, streak: Streak, expected: Ending | None) -> None:
    assert ending(told, 10, streak, POLICY) is expected


def test_is_overdue_needs_both_budgets() -> None:
    budget = BudgetConfig(train_seconds=8, eval_seconds=30)
    assert not is_overdue(budget, 138, POLICY)
    assert is_overdue(budget, 138.1, POLICY)
    assert not is_overdue(BudgetConfig(train_seconds=None), 1e9, POLICY)


def test_should_report() -> None:
    assert should_report(0, float("inf"), POLICY)
    assert not should_report(0, POLICY.report_every_s / 2, POLICY)
    assert not should_report(POLICY.reports_per_trial, 1e9, POLICY)


@pytest.mark.parametrize(
    ("failed_at", "now", "expected"),
    [
        ([], 0, False),
        ([10, 20], 21, False),
        ([10, 20, 30], 31, True),
        ([10, 20, 30], 129, True),
        ([10, 20, 30], 130, False),
        ([10, 20, 130], 131, False),
        ([10, 20, 130, 140, 150], 151, True),
    ],
)
def test_a_node_is_quarantined_after_failures_in_a_row_for_a_while(
    failed_at: list[float], now: float, expected: bool
) -> None:
    policy = Policy(quarantine_failures=3, quarantine_s=100)
    assert is_quarantined(failed_at, now, policy) is expected


def test_quarantine_can_be_switched_off() -> None:
    assert not is_quarantined([1.0] * 99, 2.0, Policy(quarantine_failures=0))


@pytest.mark.parametrize(
    ("is_training", "silent_s", "gap_s", "running_s", "expected"),
    [
        (True, 31.0, 1.0, 40.0, True),
        (True, 30.0, 1.0, 40.0, False),
        (True, 60.0, 7.0, 90.0, False),  # its steps are long
        (True, 71.0, 7.0, 90.0, True),
        (False, 90.0, 0.0, 100.0, False),  # it may compile in silence
        (False, 90.0, 0.0, 101.0, True),
    ],
)
def test_a_run_is_hung_when_it_is_silent_for_longer_than_its_steps_explain(
    is_training: bool, silent_s: float, gap_s: float, running_s: float, expected: bool
) -> None:
    policy = Policy(silence_s=30, overhead_s=100)
    assert is_hung(is_training, silent_s, gap_s, running_s, policy) is expected
    assert not is_hung(is_training, 1e9, gap_s, 1e9, Policy(silence_s=0))
