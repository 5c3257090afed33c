"""Which large files of a study may go: the policy of `caddie sweep clean`.

What the leaderboard, the reports and `caddie trial show` read (config, result, verdicts, metrics,
provenance) is small and stays for every trial. Artifacts, checkpoints and logs of failed attempts
go, except those of trials that somebody may still want: see `kept_trials`. What went is noted in
the trial's folder before it goes, so that `caddie sweep repair` does not take it for lost.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.trial import TrialState

from service.reports.leaderboard import leaderboard
from service.reports.study_view import TrialView
from service.study import CONFIRMS, frozen_trials
from service.trial import TrialFolder, write_json

CLEANED_FILE = "cleaned.json"
"""Names of a trial's files that were removed."""
SOURCES = ("source.artifact", "source.checkpoint")
"""Settings that name a file of an earlier trial."""


@dataclass(frozen=True)
class Removal:
    """Files of one trial that may go."""

    number: int
    files: tuple[Path, ...]

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files if file.exists())


def kept_trials(
    study: optuna.Study,
    views: Sequence[TrialView],
    keep: int,
    wanted_elsewhere: Iterable[str] = (),
) -> dict[int, str]:
    """Trials of which nothing goes, and why.

    Args:
        study: The study.
        views: All of its trials.
        keep: So many of the best rows of the leaderboard, and so many of the newest trials.
        wanted_elsewhere: Files that configurations of other studies start from.
    """
    trials = frozen_trials(study)
    why = {t.number: "not ended" for t in trials if not t.state.is_finished()}
    newest = [view.number for view in views][-keep:] if keep else []
    why |= dict.fromkeys((n for n in newest if n not in why), "among the newest")
    for row in leaderboard(views, None):
        confirmed = any(CONFIRMS in trials[number].user_attrs for number in row.numbers)
        if row.rank <= max(1, keep) or confirmed:
            reason = "confirmed" if confirmed else f"rank {row.rank}"
            why |= dict.fromkeys(row.numbers, reason)
    used = {
        str(view.overrides[path]) for view in views for path in SOURCES if path in view.overrides
    } | set(wanted_elsewhere)
    for view in views:
        if any(Path(file).is_relative_to(view.folder) for file in used if file):
            why[view.number] = "another trial starts from its file"
    return why


def removals(
    study: optuna.Study, views: Sequence[TrialView], kept: dict[int, str]
) -> list[Removal]:
    """What may go, by trial."""
    found = []
    for view, trial in zip(views, frozen_trials(study), strict=True):
        if view.number in kept or not trial.state.is_finished():
            continue
        files = TrialFolder(view.folder)
        large = [files.artifact, files.checkpoint]
        if trial.state != TrialState.FAIL:  # a failure's logs say why
            large += sorted(view.folder.glob("train.attempt-*.log"))
        there = tuple(file for file in large if file.exists())
        if there:
            found.append(Removal(view.number, there))
    return found


def remove(removal: Removal) -> None:
    """Take the files away. May be cut off anywhere and made again."""
    folder = removal.files[0].parent
    names = {*cleaned_files(folder), *(file.name for file in removal.files)}
    write_json(folder / CLEANED_FILE, sorted(names))
    for file in removal.files:
        file.unlink(missing_ok=True)


def cleaned_files(folder: Path) -> list[str]:
    """Names of the files of a trial that were removed on purpose."""
    try:
        names = json.loads((folder / CLEANED_FILE).read_text())
    except (OSError, ValueError):
        return []
    return names if isinstance(names, list) else []


def sources_of(studies: Iterable[optuna.Study]) -> list[str]:
    """Files of trials that whole studies start from."""
    overrides = [study.user_attrs.get("overrides", {}) for study in studies]
    return [str(each[path]) for each in overrides for path in SOURCES if path in each]
