"""The tracker that is always on: one line of JSON per ended trial in STUDY/trials.jsonl.

Needs nothing but a disk, so it is what remains when every server is gone. A line is appended with
one write call; a trial that already has its line does not get another, whoever asks.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from service.tracking.outcome import outcome_of
from service.trial import TrialFolder, TrialSpec, Verdict
from trainer.report import TrainResult


class JsonlTracker:
    """Appends ended trials to a file.

    Args:
        path: The file; its folder is made when missing.
        clock: Wall-clock seconds, for the lines.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._recorded = self._mend_and_read()

    def trial_started(self, spec: TrialSpec) -> None:
        pass

    def trial_events(self, spec: TrialSpec, events: list[dict[str, Any]]) -> None:
        pass

    def trial_ended(
        self, spec: TrialSpec, state: str, verdicts: list[Verdict], result: TrainResult | None
    ) -> None:
        if spec.number in self._recorded:
            return
        launched = result is not None or TrialFolder(spec.folder).metrics.exists()
        outcome = outcome_of(state, verdicts, launched)
        row = {
            "study": spec.study,
            "number": spec.number,
            "time": self._clock(),
            "state": state,
            "verdict": outcome.verdict,
            "reason": outcome.reason,
            "recipe": spec.recipe,
            "overrides": spec.overrides,
            "seed": spec.config.runtime.seed,
            "digest": spec.digest,
            "constraints": {
                verdict.name: {"value": verdict.value, "bound": verdict.bound, "ok": verdict.ok}
                for verdict in verdicts
            },
            "result": result.model_dump(mode="json") if result is not None else None,
            "folder": str(spec.folder),
        }
        self._append(json.dumps(row))
        self._recorded.add(spec.number)

    def close(self, grace_seconds: float = 10.0) -> None:
        pass

    def _append(self, line: str) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode() + b"\n")
        finally:
            os.close(descriptor)

    def _mend_and_read(self) -> set[int]:
        """Numbers already recorded; cuts off a half line that a killed process left."""
        if not self._path.exists():
            return set()
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with self._path.open("r+b") as file:
                file.truncate(len(whole))
        return {row["number"] for _, row in read_lines(self._path) if row is not None}


def read_lines(path: Path) -> list[tuple[str, dict[str, Any] | None]]:
    """Every whole line and what it says; None for one that cannot be read, which is left alone
    here: `caddie sweep repair` writes it again."""
    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
    return [(line, _row(line)) for line in lines if line.endswith("\n")]


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and {"number", "time", "state"} <= row.keys() else None
