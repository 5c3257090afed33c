"""Divergence: a loss that is no number, or far above what the run had already reached.

Only what early data can tell: a run is compared with its own past and with guessing uniformly,
never with other runs, whose order at a tenth of the budget says little about their order at its
end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import takewhile

from service.filters.base import Filter, StepRecord
from service.trial import TrialSpec, Verdict
from trainer.report import TrainResult

MARGIN_NATS = 1.0
"""Above the best loss so far, or above the uniform guess ln(vocab_size); batch noise is a tenth."""
SETTLED = 0.05
"""Share of the budget before which a loss says nothing: sound runs, too, may jump by several nats
in their first steps."""
SPAN = 0.05
"""Share of the budget for which every record must lie above; one spike is no divergence."""


class Divergence(Filter):
    """Stops runs whose loss went away."""

    name = "divergence"

    def while_running(self, spec: TrialSpec, steps: Sequence[StepRecord]) -> Verdict | None:
        if not steps:
            return None
        losses = [record["train_loss"] for record in steps]
        if not math.isfinite(losses[-1]):
            return not_finite(f"the training loss at step {steps[-1]['step']} is {losses[-1]}")
        uniform = math.log(spec.config.model.vocab_size)
        best = min([uniform, *filter(math.isfinite, losses)])
        bound = best + MARGIN_NATS
        above = list(takewhile(lambda record: _is_above(record, bound), reversed(steps)))
        if len(above) < 2 or above[0]["progress"] - above[-1]["progress"] < SPAN:
            return None
        reason = (
            f"the training loss at step {steps[-1]['step']} is {losses[-1]:.2f} nats and stays "
            f"above {bound:.2f}, {MARGIN_NATS:g} more than "
            + ("guessing" if best == uniform else "the run had reached")
        )
        lowest = min(record["train_loss"] for record in above)
        return Verdict(self.name, lowest, bound, "nats", False, reason, predicted=False)

    def after_finish(self, spec: TrialSpec, result: TrainResult) -> Verdict | None:
        if result.val_bpb is not None and math.isfinite(result.val_bpb):
            return None
        return not_finite("the run finished without a finite score")


def not_finite(reason: str) -> Verdict:
    """The verdict on a loss that is no number; its value counts losses, so that it stays one."""
    return Verdict("divergence", 1, 0, "non-finite losses", False, reason, predicted=False)


def has_finite_loss(result: TrainResult) -> bool:
    """Whether the last training loss is a number; JSON has null in the place of nan."""
    return result.train_loss is not None and math.isfinite(result.train_loss)


def _is_above(record: StepRecord, bound: float) -> bool:
    return bool(record["progress"] >= SETTLED and record["train_loss"] > bound)
