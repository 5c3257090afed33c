"""A study as people look at it: every trial with its fate, its score and its files.

Read from the Optuna storage and the trial folders, which are the truth; a folder that is not on
this machine leaves gaps, not errors. Read-only: any process may look while a sweep runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from service.tracking.outbox import read_entry
from service.tracking.outcome import FEASIBLE, Outcome, outcome_of
from service.trial import TrialFolder, Verdict
from service.trial_book import trial_folder
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
    duplicate_of: int | None
    """The trial whose result this one repeats without a run of its own."""
    error: str | None
    """The end of the traceback of a failed trial."""
    result: TrainResult | None
    folder: Path
    started: float | None
    """Unix seconds."""
    ended: float | None
    workers: int
    recipe: str | None = None
    """None where the folder is elsewhere."""

    @property
    def is_feasible(self) -> bool:
        return self.outcome.verdict == FEASIBLE


def view_trials(study: optuna.Study, study_dir: Path) -> list[TrialView]:
    """Every trial of a study, by number."""
    common = study.user_attrs.get("overrides", {})
    return [view_trial(trial, study_dir, common) for trial in study.get_trials(deepcopy=False)]


def view_trial(trial: FrozenTrial, study_dir: Path, common: Mapping[str, Any]) -> TrialView:
    """One trial from what storage and folder hold.

    Args:
        common: Settings of every trial of the study.
    """
    folder = trial_folder(study_dir, trial.number)
    files = TrialFolder(folder)
    result = files.read_result()
    verdicts = files.read_verdicts()
    state = trial.state.name
    entry = read_entry(folder)
    attrs = trial.user_attrs
    launched = result is not None or files.metrics.exists()
    outcome = outcome_of(state, verdicts, launched)
    if trial.state.is_finished() and "verdict" in attrs:
        outcome = Outcome(attrs["verdict"], attrs.get("reason", ""))
    return TrialView(
        number=trial.number,
        state=state,
        value=trial.value if state == "COMPLETE" else None,
        params=dict(trial.params),
        overrides=dict(entry.overrides) if entry is not None else {**common, **trial.params},
        seed=_seed(files),
        verdicts=verdicts,
        outcome=outcome,
        duplicate_of=attrs.get("duplicate_of"),
        error=attrs.get("error"),
        result=result,
        folder=folder,
        started=trial.datetime_start.timestamp() if trial.datetime_start else None,
        ended=trial.datetime_complete.timestamp() if trial.datetime_complete else None,
        workers=entry.workers if entry is not None else 1,
        recipe=entry.recipe if entry is not None else None,
    )


def _seed(files: TrialFolder) -> int | None:
    if not files.config.exists():
        return None
    return int(json.loads(files.config.read_text())["runtime"]["seed"])
