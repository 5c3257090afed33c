"""The small decisions of a sweep, free of effects: how many, again or not, when to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from service.tracking.outcome import FAILED, REJECTED
from trainer.config import BudgetConfig


@dataclass(frozen=True)
class Policy:
    """Numbers that the decisions follow."""

    max_attempts: int = 2
    """Tries of one trial that fails through nobody's choice."""
    stop_grace_s: float = 30.0
    """A run that was asked to stop is cancelled after this long."""
    overhead_s: float = 1800.0
    """A run may take this much beyond its budgets (start, compilation, packing) before it counts
    as hung."""
    silence_s: float = 300.0
    """A run that trains and says nothing for this long is hung; 0 = never."""
    silence_gaps: float = 10.0
    """But one whose records are far apart may be silent for this many times their longest gap."""
    max_rejections: int = 200
    """Trials rejected before launch in a row that end a sweep."""
    max_failures: int = 5
    """Launched trials failed in a row that end a sweep."""
    storage_patience_s: float = 300.0
    """A storage that is away for longer ends the sweep."""
    asks_per_step: int = 4
    """Proposals looked at in one step of the scheduler, so that it stays responsive."""
    reports_per_trial: int = 50
    """Intermediate values written to the storage for one trial, at most."""
    report_every_s: float = 2.0
    """And at least this far apart."""
    quarantine_failures: int = 3
    """Failed attempts on one node within quarantine_s that close it; 0 = never."""
    quarantine_s: float = 1800.0
    """How long a closed node takes no trial; also how far back failures count."""


class Ending(Enum):
    """Why a sweep asks for no more trials; the value is a sentence for people."""

    ENOUGH = "the asked number of trials is told"
    ALL_REJECTED = (
        "every one of the last {rejected} proposals was rejected before launch: the budgets leave "
        "no room in this space; widen its axes or raise the budgets"
    )
    ALL_FAILED = (
        "the last {failed} launched trials all failed: this is a defect, not bad luck; see "
        "`caddie trial show` and the train.log of a failed trial"
    )
    BUDGET = "the budget of GPU-hours has no room for one more trial; raise --max-gpu-hours"
    REQUESTED = "the sweep was asked to stop"


class AfterFailure(Enum):
    """What to do with a trial whose run failed."""

    RETRY = "retry"
    GIVE_UP = "give up"


@dataclass(frozen=True)
class Streak:
    """How long nothing has gone well. A rejected trial never ran: it says nothing of a defect, and
    leaves the count of failures as it is."""

    rejected: int = 0
    """Latest trials in a row that were rejected before launch."""
    failed: int = 0
    """Latest launched trials in a row that failed."""

    def after(self, verdict: str) -> Streak:
        """The streak when one more trial ends so, in the words of service.tracking.outcome."""
        if verdict == REJECTED:
            return Streak(self.rejected + 1, self.failed)
        return Streak(0, self.failed + 1 if verdict == FAILED else 0)


def num_to_launch(num_trials: int, told: int, in_flight: int, free_slots: int) -> int:
    """How many new trials to start now: never more than are still wanted, nor than fit."""
    return max(0, min(num_trials - told - in_flight, free_slots))


def after_failure(attempt: int, policy: Policy) -> AfterFailure:
    """Whether a failed run is tried again within the same trial."""
    return AfterFailure.RETRY if attempt < policy.max_attempts else AfterFailure.GIVE_UP


def ending(told: int, num_trials: int, streak: Streak, policy: Policy) -> Ending | None:
    """Whether the sweep is over.

    Args:
        told: COMPLETE and PRUNED trials.
        num_trials: How many of them are wanted.
        streak: Of the trials that this driver saw end.
        policy: The limits.
    """
    if told >= num_trials:
        return Ending.ENOUGH
    if streak.rejected >= policy.max_rejections:
        return Ending.ALL_REJECTED
    if streak.failed >= policy.max_failures:
        return Ending.ALL_FAILED
    return None


def is_overdue(budget: BudgetConfig, running_s: float, policy: Policy) -> bool:
    """Whether a run has taken so long that it must be hung; never without both time budgets."""
    if budget.train_seconds is None or budget.eval_seconds is None:
        return False
    return running_s > budget.train_seconds + budget.eval_seconds + policy.overhead_s


def is_hung(
    is_training: bool, silent_s: float, longest_gap_s: float, running_s: float, policy: Policy
) -> bool:
    """Whether a run must be hung: one rank that hangs holds up all the others in their next
    collective, and no step is reported any more.

    Args:
        is_training: It has done a step and has not ended training. Before, it may compile in
            silence, for as long as the overhead; after, it may score in silence.
        silent_s: Seconds since its last record.
        longest_gap_s: The most seconds between two of its records, so far.
        running_s: Seconds since submission; of a run that has not done a step.
        policy: The limits.
    """
    if policy.silence_s == 0:
        return False
    if is_training:
        return silent_s > max(policy.silence_s, policy.silence_gaps * longest_gap_s)
    return running_s > policy.overhead_s


def hung_error(is_training: bool, silent_s: float) -> str:
    """What a trial that was cancelled as hung is told to have died of."""
    if is_training:
        return (
            f"hung: no step was reported for {silent_s:.0f} s, so all its processes were killed; a "
            "rank that hangs holds up the others (py-spy dump shows where); raise hang_seconds if "
            "its steps are that long"
        )
    return f"hung: no step {silent_s:.0f} s after launch, so all its processes were killed"


def has_room(budget_s: float | None, held_s: float, owed_s: float, next_s: float) -> bool:
    """Whether one more trial stays within the budget of GPU-seconds.

    Args:
        budget_s: GPU-seconds that the study's trials may hold; None = no limit.
        held_s: What they have held so far, failed attempts included.
        owed_s: What trials in flight are expected to hold yet.
        next_s: What one more is expected to hold.
    """
    return budget_s is None or held_s + owed_s + next_s <= budget_s


def is_quarantined(failed_at: Sequence[float], now: float, policy: Policy) -> bool:
    """Whether a node is closed: its last few attempts failed, and not long ago.

    Args:
        failed_at: When attempts failed on this node since the last one that ended well, oldest
            first.
        now: By the same clock.
        policy: The limits.
    """
    count = policy.quarantine_failures
    if count == 0 or len(failed_at) < count:
        return False
    first, last = failed_at[-count], failed_at[-1]
    return last - first <= policy.quarantine_s and now - last < policy.quarantine_s


def should_report(num_reported: int, since_last_s: float, policy: Policy) -> bool:
    """Whether to write one more intermediate value."""
    return num_reported < policy.reports_per_trial and since_last_s >= policy.report_every_s
