"""A trial as the service sees it: what to run, what was judged, where its files are.

One trial = base recipe + dotted overrides + seed. It leaves a folder (`TrialFolder`): the truth
about the trial together with the Optuna storage. Nothing here imports Optuna, Ray, MLflow or torch.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.config import TrainConfig
from trainer.report import TrainResult


@dataclass(frozen=True)
class Verdict:
    """One filter's judgement of one trial at one moment."""

    name: str
    """The filter, as in `constraint.<name>`; such as "artifact_size"."""
    value: float
    bound: float
    """Feasible when value <= bound, unless `ok` says otherwise."""
    unit: str
    """Such as "bytes", "s", "steps", "nats"."""
    ok: bool
    reason: str
    """One sentence for a person."""
    predicted: bool
    """Forecast (True) or measured (False)."""

    @property
    def excess(self) -> float:
        """Constraint value for Optuna: <= 0 means feasible, whatever the direction of the bound."""
        distance = abs(self.value - self.bound)
        return -distance if self.ok else max(distance, 1e-12)


@dataclass(frozen=True)
class TrialSpec:
    """Everything a runner needs to run one trial."""

    study: str
    number: int
    """Optuna trial number."""
    recipe: str
    overrides: dict[str, Any]
    """Dotted paths that differ from the recipe, the sampler's choices included."""
    config: TrainConfig
    folder: Path
    """Absolute; exists when the spec is handed to a runner."""
    workers: int = 1
    gpus_per_worker: float = 0.0
    attempt: int = 1
    """1 for the first try; failures that are nobody's choice are tried again."""

    @cached_property
    def digest(self) -> str:
        """Of the configuration; equal digests, equal runs."""
        return self.config.digest()

    @property
    def key(self) -> str:
        """Unique within the storage: study/number."""
        return f"{self.study}/{self.number}"


@dataclass(frozen=True)
class TrialFolder:
    """The files of a trial and who writes them; writers replace files atomically.

    config.json      scheduler, before launch
    provenance.json  scheduler, before launch: code commit and diff, data digest, versions, hardware
    metrics.jsonl    runner, as records arrive
    train.log        runner
    artifact.bin     runner, from rank 0
    checkpoint.bin   runner, from rank 0, where runtime.save_checkpoint is on
    result.json      runner, last of all: its presence means the run ended by itself
    verdicts.json    scheduler, before tell
    """

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def provenance(self) -> Path:
        return self.path / "provenance.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "train.log"

    @property
    def artifact(self) -> Path:
        return self.path / "artifact.bin"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.bin"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def verdicts(self) -> Path:
        return self.path / "verdicts.json"

    def clear_run(self) -> None:
        """Remove what an unfinished attempt left, keeping config and provenance."""
        written = (self.metrics, self.log, self.artifact, self.checkpoint, self.result)
        for file in (*written, self.path / "stop"):
            file.unlink(missing_ok=True)

    def read_result(self) -> TrainResult | None:
        """The result if the run ended by itself, else None."""
        if not self.result.exists():
            return None
        return TrainResult.model_validate_json(self.result.read_text())

    def write_verdicts(self, verdicts: list[Verdict]) -> None:
        write_json(self.verdicts, [asdict(verdict) for verdict in verdicts])

    def read_verdicts(self) -> list[Verdict]:
        if not self.verdicts.exists():
            return []
        return [Verdict(**row) for row in json.loads(self.verdicts.read_text())]


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader never sees half of it, also when the disk fills up."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)
