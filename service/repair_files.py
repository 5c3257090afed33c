"""Whether a file of a trial's folder is what the storage says it must be, and putting it there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from service.study import deciding
from service.tracking.outbox import Entry, read_entry
from service.tracking.outcome import REJECTED
from service.trial import TrialFolder, Verdict
from trainer.report import TrainResult

TRIALS_FILE = "trials.jsonl"
"""The study's list of trials, a line each."""


def is_due(trial: FrozenTrial, name: str) -> bool:
    """Whether a trial that ended so has a file of this name."""
    attrs = trial.user_attrs
    if name == "result.json":
        return "steps" in attrs
    ran = attrs.get("verdict") != REJECTED and "duplicate_of" not in attrs
    if name == "metrics.jsonl":
        return ran
    if name == "artifact.bin":
        return ran and "bytes_total" in attrs
    return True


def is_entry(trial: FrozenTrial, data: bytes) -> bool:
    try:
        entry = Entry(**json.loads(data))
    except (ValueError, TypeError):
        return False
    return entry.number == trial.number and entry.state == trial.state.name


def are_verdicts(trial: FrozenTrial, data: bytes) -> bool:
    """Whether verdicts give the constraints that the storage has."""
    try:
        verdicts = [Verdict(**row) for row in json.loads(data)]
    except (ValueError, TypeError):
        return False
    if trial.state == TrialState.FAIL:
        return True
    stored = {name: value for name, value in trial.constraints.items() if not name.isdigit()}
    return stored == {verdict.name: verdict.excess for verdict in deciding(verdicts)}


def is_result(trial: FrozenTrial, data: bytes) -> bool:
    try:
        result = TrainResult.model_validate_json(data)
    except ValueError:
        return False
    steps = trial.user_attrs.get("steps")
    if steps is not None and result.steps != steps:
        return False
    return trial.state != TrialState.COMPLETE or result.val_bpb == trial.value


def is_artifact(files: TrialFolder, data: bytes) -> bool:
    result = read_json(files.result)
    size = result.get("bytes_model") if isinstance(result, dict) else None
    return size is None or len(data) == size


def is_row(trial: FrozenTrial, row: Mapping[str, Any]) -> bool:
    digest = trial.user_attrs.get("digest")
    return row["state"] == trial.state.name and row["digest"] == (digest or row["digest"])


def is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


def read_json(path: Path) -> Any:
    """What a file holds; None where it is missing or broken."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def entry_or_none(folder: Path) -> Entry | None:
    try:
        return read_entry(folder)
    except (ValueError, TypeError):
        return None


def as_json(value: Any) -> bytes:
    """As service.trial.write_json writes it."""
    return (json.dumps(value, indent=2) + "\n").encode()


def put(path: Path, data: bytes) -> None:
    """Write a file whole; one that is there and cannot be read is kept as NAME.broken."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.name != TRIALS_FILE:
        path.replace(path.with_name(path.name + ".broken"))
    partial_file = path.with_name(path.name + ".partial")
    partial_file.write_bytes(data)
    partial_file.replace(path)


def move(folder: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    while target.exists():
        target = target.with_name(target.name + "-again")
    folder.replace(target)
