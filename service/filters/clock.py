"""Clock: seconds of training and of evaluation after the finish, against their caps.

The trainer predicts each step's end and never starts one that would pass the cap, so a violation of
the first is a defect of the trainer or of the machine; the second depends on the evaluation chosen.
"""

from __future__ import annotations

from service.filters.base import Filter
from service.trial import TrialSpec, Verdict
from trainer.config import BudgetConfig
from trainer.report import TrainResult


class PhaseClock(Filter):
    """Compares phases of a run with one cap.

    Args:
        name: Of the verdict, and of the field of BudgetConfig that holds the cap.
        phases: Their seconds add up; a missing one counts 0.
    """

    def __init__(self, name: str, phases: tuple[str, ...]) -> None:
        self.name = name
        self._phases = phases

    def after_finish(self, spec: TrialSpec, result: TrainResult) -> Verdict | None:
        cap = _cap(spec.config.budget, self.name)
        if cap is None:
            return None
        seconds = sum(result.phases.get(phase, 0.0) for phase in self._phases)
        reason = f"{seconds:.2f} s of {' and '.join(self._phases)} against a cap of {cap:g} s"
        return Verdict(self.name, seconds, cap, "s", seconds <= cap, reason, predicted=False)


def _cap(budget: BudgetConfig, name: str) -> float | None:
    caps = {"train_seconds": budget.train_seconds, "eval_seconds": budget.eval_seconds}
    return caps[name]
