"""The interface between scheduler and runners, in the words of concurrent.futures.

The scheduler never sees processes; a runner never sees metrics' meaning. All calls come from the
scheduler's thread and return at once, except `close`, which waits for what it stops.

A runner writes metrics.jsonl, train.log, artifact.bin and, last, result.json into the trial's
folder (see TrialFolder), and returns the same records from `poll`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from service.trial import TrialSpec
from trainer.report import TrainResult


class RunState(Enum):
    """Where a submitted trial stands."""

    STARTING = "starting"
    """Processes are being placed and graphs primed: no step yet."""
    RUNNING = "running"
    FINISHED = "finished"
    """result is set; result.status may be "stopped"."""
    FAILED = "failed"
    """error is set: a bug, a lost node, a killed worker. Never raised for a bad configuration."""
    OUT_OF_MEMORY = "out_of_memory"
    """error is set; the configuration does not fit the device."""


@dataclass(frozen=True)
class Update:
    """What happened to a trial since the last poll."""

    state: RunState
    events: list[dict[str, Any]] = field(default_factory=list)
    """New metric records, oldest first, as in trainer.report.EventKind, with "kind" and "time"."""
    result: TrainResult | None = None
    error: str | None = None
    """Traceback and the paths of the logs."""


@dataclass(frozen=True)
class Demand:
    """Resources of one trial."""

    workers: int = 1
    gpus_per_worker: float = 0.0
    cpus_per_worker: float = 1.0


class Runner(Protocol):
    """Runs trials somewhere."""

    def free_slots(self, demand: Demand) -> int:
        """How many trials of this demand would start at once if submitted now."""
        ...

    def total_slots(self, demand: Demand) -> int:
        """How many trials of this demand fit when nothing runs; 0 = never fits."""
        ...

    def submit(self, spec: TrialSpec, demand: Demand) -> None:
        """Start a trial. Raises RunnerError when it cannot be placed."""
        ...

    def poll(self, number: int) -> Update:
        """News of a submitted trial, once each; a final state is returned once, then forgotten."""
        ...

    def request_stop(self, number: int, reason: str) -> None:
        """Ask the trial to stop at the next step boundary, on every rank at once."""
        ...

    def cancel(self, number: int, hung: bool = False) -> None:
        """End the trial's processes now and free what they hold; the trial is forgotten. `hung`:
        it did not end by itself when it should have, which counts against its node."""
        ...

    def close(self) -> None:
        """Cancel everything and free every resource."""
        ...
