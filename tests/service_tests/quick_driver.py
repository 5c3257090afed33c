"""A driver process for tests to kill: runs of 60 ms on the real clock.

python -m tests.service_tests.quick_driver FOLDER NUM_TRIALS
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from service.filters import default_filters
from service.runners.base import Demand
from service.runners.fake_runner import FakeRun, FakeRunner
from service.scheduler import Scheduler
from service.study import open_study
from service.trial import TrialSpec, Verdict
from tests.service_tests.sweeps import SMOKE, TRACK, Recorder
from trainer.report import TrainResult


class EndsFile(Recorder):
    """Appends the number of every trial told."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def trial_ended(
        self, spec: TrialSpec, state: str, verdicts: list[Verdict], result: TrainResult | None
    ) -> None:
        with self._path.open("a") as file:
            file.write(f"{spec.number}\n")


def script(spec: TrialSpec) -> FakeRun:
    depth = spec.config.model.num_layers
    return FakeRun(
        start_s=0.02, train_s=0.02, finish_s=0.02, step_s=0.0001, val_bpb=3.0 - 0.1 * depth
    )


def main(folder: Path, num_trials: int) -> None:
    study = open_study("s", f"sqlite:///{folder / 'caddie.db'}", SMOKE, track=TRACK)
    (folder / "s").mkdir(exist_ok=True)
    trackers: list[Any] = [EndsFile(folder / "s" / "ends.log")]
    runner = FakeRunner(script, slots=2, clock=time.time)
    scheduler = Scheduler(
        study, SMOKE, runner, trackers, default_filters(), Demand(), num_trials, folder, track=TRACK
    )
    (folder / "started").touch()
    while scheduler.step():
        time.sleep(0.005)
    scheduler.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
