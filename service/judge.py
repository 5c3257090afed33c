"""All filters of a sweep as one: what they say at each moment, and what that makes of a trial."""

from __future__ import annotations

import math
from collections.abc import Sequence

from optuna.trial import TrialState

from service.filters import Filter
from service.filters.base import StepRecord
from service.trial import TrialSpec, Verdict
from trainer.config import TrainConfig
from trainer.report import TrainResult


class Judge:
    """Asks every filter.

    Args:
        filters: In the order in which they are asked.
    """

    def __init__(self, filters: Sequence[Filter]) -> None:
        self._filters = list(filters)

    def before_launch(self, spec: TrialSpec) -> list[Verdict]:
        """Every verdict on a proposal; one that is not ok rejects it."""
        verdicts = (judge.before_launch(spec) for judge in self._filters)
        return [verdict for verdict in verdicts if verdict is not None]

    def while_running(
        self, spec: TrialSpec, steps: Sequence[StepRecord]
    ) -> tuple[list[Verdict], Verdict | None]:
        """Verdicts on a run that goes on, and the first of them that ends it."""
        verdicts = [judge.while_running(spec, steps) for judge in self._filters]
        said = [verdict for verdict in verdicts if verdict is not None]
        return said, next((verdict for verdict in said if not verdict.ok), None)

    def after_finish(
        self, spec: TrialSpec, result: TrainResult
    ) -> tuple[TrialState, list[Verdict]]:
        """What a finished run is told as; the filters learn from it."""
        verdicts = [judge.after_finish(spec, result) for judge in self._filters]
        self.learn(spec.config, result)
        scored = result.val_bpb is not None and math.isfinite(result.val_bpb)
        state = TrialState.COMPLETE if scored else TrialState.PRUNED
        return state, [verdict for verdict in verdicts if verdict is not None]

    def learn(self, config: TrainConfig, result: TrainResult) -> None:
        """Take in a finished run."""
        for judge in self._filters:
            judge.learn(config, result)
