"""A driver process on Ray for tests to kill, or that kills itself in a phase.

python -m tests.service_tests.ray_driver FOLDER NUM_TRIALS [PHASE]

Joins RAY_ADDRESS, else starts a Ray of its own. PHASE is one of PHASES: when the first trial gets
there the process ends as by `kill -9`.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import optuna

from service.runners.ray_cluster import connect
from service.runners.ray_trial import RayTrial
from service.trial import TrialSpec
from service.trial_book import TrialBook
from tests.service_tests.quick_driver import EndsFile
from tests.service_tests.ray_sweeps import RaySweep

PHASES: dict[str, tuple[Any, str]] = {
    "start": (TrialBook, "launch"),
    "train": (RayTrial, "_record"),
    "artifact": (RayTrial, "_finish"),
    "tell": (optuna.Study, "tell"),
}
"""Phase -> what is about to be called."""


def die_in(phase: str) -> None:
    owner, name = PHASES[phase]

    def dies(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, dies)


class Ends(EndsFile):
    """Leaves a file named `running` beside it when a trial speaks."""

    def trial_events(self, spec: TrialSpec, events: list[dict[str, Any]]) -> None:
        self._path.with_name("running").touch()


def main(folder: Path, num_trials: int, phase: str | None) -> None:
    connect(num_cpus=1)
    (folder / "s").mkdir(exist_ok=True)
    if phase is not None:
        die_in(phase)
    seeds = [10 * (number + 1) for number in range(num_trials)]
    sweep = RaySweep(folder, seeds, steps=10, trackers=[Ends(folder / "s" / "ends.log")])
    sweep.run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
