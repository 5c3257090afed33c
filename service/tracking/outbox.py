"""What a tracker needs to mirror a trial, kept in the trial's folder so that nothing is lost.

Two small files with one writer each:

    tracking.json  the scheduler's thread: what the trial is, when it started, how it ended
    mirror.json    the mirror's thread: how much of the folder the tracking server already has

`tracking.json` is written before the tracker's call returns; mirroring happens later, from the
folder alone, by this process or by the next one. A trial that is launched again (a lost node, a
killed driver) gets a new launch number; the mirror then drops what it had of the earlier launch,
because the folder no longer holds it.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from service.trial import TrialFolder, TrialSpec, Verdict, write_json
from trainer.report import TrainResult

STUDY_ID_FILE = "study_id"
"""In the study's folder: its unique name wherever it is mirrored."""


@dataclass(frozen=True)
class Entry:
    """One trial to mirror, as tracking.json holds it."""

    study: str
    number: int
    attempt: int
    launch: int
    """Counts the times this trial was started in this folder, from 1."""
    recipe: str
    overrides: dict[str, Any]
    workers: int
    gpus_per_worker: float
    started: float
    """Unix seconds."""
    state: str = "RUNNING"
    """Optuna's state name once the trial ended."""
    ended: float | None = None
    verdicts: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] | None = None

    @property
    def has_ended(self) -> bool:
        return self.ended is not None

    def read_verdicts(self) -> list[Verdict]:
        return [Verdict(**row) for row in self.verdicts]

    def read_result(self) -> TrainResult | None:
        return TrainResult.model_validate(self.result) if self.result is not None else None


@dataclass(frozen=True)
class Progress:
    """What one tracking server has of a trial, as mirror.json holds it."""

    target: str = ""
    """The tracking URI without its password; another one starts from nothing."""
    launch: int = 0
    run_id: str | None = None
    metric_bytes: int = 0
    """Bytes of metrics.jsonl that were sent."""
    finished: bool = False


def entry_path(folder: Path) -> Path:
    return folder / "tracking.json"


def progress_path(folder: Path) -> Path:
    return folder / "mirror.json"


def open_entry(spec: TrialSpec) -> Entry:
    """Record that a trial starts (again)."""
    earlier = read_entry(spec.folder)
    entry = Entry(
        study=spec.study,
        number=spec.number,
        attempt=spec.attempt,
        launch=earlier.launch + 1 if earlier is not None else 1,
        recipe=spec.recipe,
        overrides=spec.overrides,
        workers=spec.workers,
        gpus_per_worker=spec.gpus_per_worker,
        started=time.time(),
    )
    write_json(entry_path(spec.folder), asdict(entry))
    return entry


def close_entry(
    spec: TrialSpec, state: str, verdicts: list[Verdict], result: TrainResult | None
) -> Entry:
    """Record how a trial ended. The first end stands: calling again changes nothing."""
    entry = read_entry(spec.folder) or open_entry(spec)
    if entry.has_ended:
        return entry
    entry = replace(
        entry,
        state=state,
        ended=time.time(),
        verdicts=[asdict(verdict) for verdict in verdicts],
        result=result.model_dump(mode="json") if result is not None else None,
    )
    write_json(entry_path(spec.folder), asdict(entry))
    return entry


def read_entry(folder: Path) -> Entry | None:
    """The trial's entry, or None for a folder that no tracker has seen."""
    path = entry_path(folder)
    return Entry(**json.loads(path.read_text())) if path.exists() else None


def read_progress(folder: Path, target: str) -> Progress:
    """How far `target` has the trial; a fresh Progress for a target not seen before."""
    path = progress_path(folder)
    if path.exists():
        progress = Progress(**json.loads(path.read_text()))
        if progress.target == target:
            return progress
    return Progress(target=target)


def write_progress(folder: Path, progress: Progress) -> None:
    write_json(progress_path(folder), asdict(progress))


def folders_with_entries(root: Path) -> list[Path]:
    """Every trial folder under `root` that a tracker has seen."""
    return sorted(path.parent for path in root.rglob("tracking.json"))


def is_unsent(folder: Path, target: str) -> bool:
    """Whether `target` lacks something of a trial that a tracker has seen."""
    entry, progress = read_entry(folder), read_progress(folder, target)
    return entry is not None and not (progress.finished and progress.launch == entry.launch)


def unsent_folders(root: Path, target: str) -> list[Path]:
    """Every trial folder under `root` that `target` does not have completely."""
    return [folder for folder in folders_with_entries(root) if is_unsent(folder, target)]


def new_records(folder: Path, start: int, limit: int) -> tuple[list[dict[str, Any]], int]:
    """Complete lines of metrics.jsonl from byte `start` on, at most `limit` of them.

    Returns:
        The records and the byte after the last one; a half-written last line is left for later.
    """
    metrics = TrialFolder(folder).metrics
    if not metrics.exists():
        return [], start
    records: list[dict[str, Any]] = []
    with metrics.open("rb") as file:
        file.seek(start)
        while len(records) < limit:
            line = file.readline()
            if not line.endswith(b"\n"):
                break
            start += len(line)
            records.append(json.loads(line))
    return records, start
