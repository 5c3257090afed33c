"""The interface between scheduler and trackers.

A tracker mirrors trials for people to look at. It must never block or fail the sweep: network
trouble is its own affair, and whatever it could not send it sends later from the trial's folder.
"""

from __future__ import annotations

from typing import Any, Protocol

from service.trial import TrialSpec, Verdict
from trainer.report import TrainResult


class Tracker(Protocol):
    """Mirrors a study."""

    def trial_started(self, spec: TrialSpec) -> None:
        """Before launch, or before a rejected trial is told."""
        ...

    def trial_events(self, spec: TrialSpec, events: list[dict[str, Any]]) -> None:
        """New metric records of a running trial."""
        ...

    def trial_ended(
        self, spec: TrialSpec, state: str, verdicts: list[Verdict], result: TrainResult | None
    ) -> None:
        """After the folder is complete and the study was told; state is Optuna's state name."""
        ...

    def close(self, grace_seconds: float = 10.0) -> None:
        """Send what is left for at most that long; the rest stays in the folders for next time."""
        ...
