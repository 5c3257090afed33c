"""Legality: what the sweep's track forbids is rejected before it costs anything.

Which techniques those are is known by construction, from the one table `trainer.legality`.
"""

from __future__ import annotations

from service.filters.base import Filter
from service.trial import TrialSpec, Verdict
from trainer.legality import ILLEGAL, illegal_in_use
from trainer.report import TrainResult


class Legality(Filter):
    """Rejects published techniques that break the rules of a track.

    Args:
        track: Name of the track in force; a user's own track forbids nothing.
    """

    name = "legality"

    def __init__(self, track: str = "") -> None:
        self._track = track

    def before_launch(self, spec: TrialSpec) -> Verdict | None:
        return self._judge(illegal_in_use(spec.config))

    def after_finish(self, spec: TrialSpec, result: TrainResult) -> Verdict | None:
        """What the run says of itself: an artifact that it only scored may have been trained by
        forbidden means."""
        return self._judge(result.illegal)

    def _judge(self, used: dict[str, list[str]]) -> Verdict | None:
        forbidden = [name for name, tracks in used.items() if self._track in tracks]
        if not forbidden:
            return None
        broken = "; ".join(ILLEGAL[name].reason if name in ILLEGAL else name for name in forbidden)
        reason = f"illegal on {self._track}: {broken}"
        unit = "forbidden techniques"
        return Verdict(self.name, len(forbidden), 0, unit, False, reason, predicted=False)
