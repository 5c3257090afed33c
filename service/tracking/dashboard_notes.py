"""Notes in optuna-dashboard: how each trial ended, and its run in MLflow.

A tracker, because notes are for people and must never stop a sweep. It is called from the
scheduler's thread like every tracker, so it may use the driver's study. The dashboard keeps notes
in attributes of the study, which may be written after a trial was told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optuna

from service.study import live_trial
from service.tracking.outcome import outcome_of
from service.trial import TrialFolder, TrialSpec, Verdict
from trainer.report import TrainResult


class DashboardNotes:
    """Writes a note for every ended trial.

    Args:
        study: The study that is driven.
        run_page: Folder of a trial -> address of its run in MLflow; None = not there (yet).
    """

    def __init__(
        self, study: optuna.Study, run_page: Callable[[TrialSpec], str | None] = lambda _: None
    ) -> None:
        self._study = study
        self._run_page = run_page
        self._unlinked: dict[int, tuple[TrialSpec, str]] = {}
        """Noted without a link to MLflow: trial -> (spec, note)."""

    def trial_started(self, spec: TrialSpec) -> None:
        self._add_links()

    def trial_events(self, spec: TrialSpec, events: list[dict[str, Any]]) -> None:
        pass

    def trial_ended(
        self, spec: TrialSpec, state: str, verdicts: list[Verdict], result: TrainResult | None
    ) -> None:
        launched = result is not None or TrialFolder(spec.folder).metrics.exists()
        outcome = outcome_of(state, verdicts, launched)
        lines = [f"**{outcome.verdict}**" + (f": {outcome.reason}" if outcome.reason else "")]
        if result is not None and result.val_bpb is not None:
            lines.append(f"{result.val_bpb:.4f} bits per byte, {result.bytes_total:,} bytes")
        lines.append(f"`caddie trial show {spec.study} {spec.number}`")
        self._write(spec, "\n\n".join(lines))
        self._add_links()

    def close(self, grace_seconds: float = 10.0) -> None:
        self._add_links()

    def _add_links(self) -> None:
        for spec, note in list(self._unlinked.values()):
            if self._run_page(spec) is not None:
                self._write(spec, note)

    def _write(self, spec: TrialSpec, note: str) -> None:
        from optuna_dashboard import get_note, save_note

        page = self._run_page(spec)
        self._unlinked.pop(spec.number, None)
        if page is None:
            self._unlinked[spec.number] = (spec, note)
        text = note if page is None else f"{note}\n\n[The run in MLflow]({page})"
        trial = live_trial(self._study, spec.number)
        if get_note(trial) != text:
            save_note(trial, text)
