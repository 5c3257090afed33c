"""A study as people look at it: every trial with its fate, its score and its files.

Read from the Optuna storage and the trial folders, which are the truth; a folder that is not on
this machine leaves gaps, not errors. Read-only: any process may look while a sweep runs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from service.tracking.outbox import read_entry
from service.tracking.outcome import FEASIBLE, Outcome, outcome_of
from service.trial import TrialFolder, Verdict
from trainer.report import TrainResult


@dataclass(frozen=True)
class TrialView:
    """One trial."""

    number: int
    state: str
    """Optuna's state name."""
    value: float | None
    """Bits per byte, when the trial was measured."""
    params: dict[str, Any]
    """What the sampler chose."""
    overrides: dict[str, Any]
    """Everything that differs from the recipe; equals params when the folder is elsewhere."""
    seed: int | None
    verdicts: list[Verdict]
    outcome: Outcome
    result: TrainResult | None
    folder: Path
    started: float | None
    """Unix seconds."""
    ended: float | None
    workers: int

    @property
    def is_feasible(self) -> bool:
        return self.outcome.verdict == FEASIBLE

    @property
    def worker_seconds(self) -> float:
        """Wall seconds between launch and end, times workers; 0 for a trial that never ran."""
        if self.started is None or self.ended is None or not _launched(self.folder, self.result):
            return 0.0
        return (self.ended - self.started) * self.workers


def trial_folder(study_dir: Path, number: int) -> Path:
    """Where the files of a trial are."""
    return study_dir / f"trial-{number:05d}"


def view_trials(study: optuna.Study, study_dir: Path) -> list[TrialView]:
    """Every trial of a study, by number."""
    return [view_trial(trial, study_dir) for trial in study.get_trials(deepcopy=False)]


def view_trial(trial: FrozenTrial, study_dir: Path) -> TrialView:
    """One trial from what storage and folder hold."""
    folder = trial_folder(study_dir, trial.number)
    files = TrialFolder(folder)
    result = files.read_result()
    verdicts = files.read_verdicts()
    state = trial.state.name
    entry = read_entry(folder)
    return TrialView(
        number=trial.number,
        state=state,
        value=trial.value if state == "COMPLETE" else None,
        params=dict(trial.params),
        overrides=dict(entry.overrides if entry is not None else trial.params),
        seed=_seed(files),
        verdicts=verdicts,
        outcome=outcome_of(state, verdicts, _launched(folder, result)),
        result=result,
        folder=folder,
        started=trial.datetime_start.timestamp() if trial.datetime_start else None,
        ended=trial.datetime_complete.timestamp() if trial.datetime_complete else None,
        workers=entry.workers if entry is not None else 1,
    )


def _launched(folder: Path, result: TrainResult | None) -> bool:
    return result is not None or TrialFolder(folder).metrics.exists()


def _seed(files: TrialFolder) -> int | None:
    if not files.config.exists():
        return None
    return int(json.loads(files.config.read_text())["runtime"]["seed"])
