"""How a trial ended, in the words that MLflow, the leaderboard and the command line share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from service.trial import Verdict

FEASIBLE = "feasible"
INFEASIBLE = "infeasible"
REJECTED = "rejected before launch"
STOPPED = "stopped while running"
FAILED = "failed"
RUNNING = "running"


@dataclass(frozen=True)
class Outcome:
    """The fate of a trial and why."""

    verdict: str
    """One of the constants of this module."""
    reason: str
    """The broken constraints' sentences, or "" for a feasible trial."""


def outcome_of(state: str, verdicts: Sequence[Verdict], launched: bool) -> Outcome:
    """Words for an Optuna state name and the trial's verdicts.

    Args:
        state: COMPLETE, PRUNED, FAIL, RUNNING or WAITING.
        verdicts: Everything that filters said of the trial.
        launched: Whether the trial ever reached a runner; tells a rejection from a stop.
    """
    broken = [verdict for verdict in verdicts if not verdict.ok]
    reason = "; ".join(dict.fromkeys(verdict.reason for verdict in broken))
    if state == "COMPLETE":
        return Outcome(INFEASIBLE if broken else FEASIBLE, reason)
    if state == "PRUNED":
        return Outcome(STOPPED if launched else REJECTED, reason)
    return Outcome(FAILED if state == "FAIL" else RUNNING, reason)
