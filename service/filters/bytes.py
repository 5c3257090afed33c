"""Artifact bytes after the finish: packed code plus packed model, as measured on disk."""

from __future__ import annotations

from service.filters.base import Filter
from service.trial import TrialSpec, Verdict
from trainer.report import TrainResult


class Bytes(Filter):
    """The measured form of the constraint that ArtifactSize forecasts; hence the same name."""

    name = "artifact_size"

    def after_finish(self, spec: TrialSpec, result: TrainResult) -> Verdict | None:
        cap, total = spec.config.budget.artifact_bytes, result.bytes_total
        if cap is None or total is None:
            return None
        distance = f"{abs(cap - total):,} bytes {'over' if total > cap else 'under'} the cap"
        reason = f"{total:,} bytes measured, {distance} of {cap:,}"
        return Verdict(self.name, total, cap, "bytes", total <= cap, reason, predicted=False)
