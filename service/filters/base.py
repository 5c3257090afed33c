"""What a filter is: one budget, judged at up to three moments of a trial's life."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from service.trial import TrialSpec, Verdict
from trainer.config import TrainConfig
from trainer.report import TrainResult

StepRecord = dict[str, Any]
"""A "step" record of trainer.report.EventKind; its train_loss is a float, maybe not finite."""


class Filter:
    """Judges trials. A subclass overrides the moments at which it has something to say.

    All calls come from the scheduler's thread. A verdict that is not ok before launch rejects the
    trial, while running stops it, and after the finish makes it infeasible.
    """

    name: str
    """Of the verdicts, and of the constraint `constraint.<name>`."""

    def before_launch(self, spec: TrialSpec) -> Verdict | None:
        """Judge a proposal that has touched no worker yet."""
        return None

    def while_running(self, spec: TrialSpec, steps: Sequence[StepRecord]) -> Verdict | None:
        """Judge a run by all of its step records so far, oldest first; None = let it go on."""
        return None

    def after_finish(self, spec: TrialSpec, result: TrainResult) -> Verdict | None:
        """Judge what was measured; only called for runs that finished."""
        return None

    def learn(self, config: TrainConfig, result: TrainResult) -> None:
        """Take in a finished run of this study, also of an earlier driver."""
