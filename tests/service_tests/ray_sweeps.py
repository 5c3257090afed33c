"""Sweeps on a real Ray for the tests of faults: the scheduler, SQLite, stand-in trials by seed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import ray
from ray.util.placement_group import placement_group_table

from search_spaces import Space
from service.policies import Policy
from service.runners.base import Demand
from service.runners.ray_runner import RayRunner
from service.scheduler import Scheduler
from service.study import load_study, open_study
from tests.service_tests.sweeps import TRACK, Recorder

AXIS = {"runtime.seed": optuna.distributions.IntDistribution(0, 999)}
TRAIN = "tests.service_tests.cluster_faults:train"


class RaySweep:
    """One driver of the study "s"; the trials' kinds are the last digits of their seeds."""

    def __init__(
        self,
        folder: Path,
        seeds: Sequence[int],
        *,
        steps: int = 4,
        demand: Demand | None = None,
        runner: RayRunner | None = None,
        trackers: Sequence[Any] = (),
        **policy: Any,
    ) -> None:
        points = tuple({"runtime.seed": seed} for seed in seeds)
        space = Space("seeds", "tiny", "laptop", AXIS, points, "for tests")
        self.url = f"sqlite:///{folder / 'caddie.db'}"
        self.folder = folder / "s"
        self.study = open_study("s", self.url, space, track=TRACK)
        limits = Policy(**policy)
        self.runner = runner or RayRunner(train=TRAIN, policy=limits)
        self.recorder = Recorder()
        self.scheduler = Scheduler(
            self.study,
            space,
            self.runner,
            [self.recorder, *trackers],
            [],
            demand or Demand(),
            len(seeds),
            folder,
            track=TRACK,
            overrides={"budget.max_steps": steps},
            policy=limits,
        )

    def run(
        self, each_turn: Callable[[], object] = lambda: None, timeout_s: float = 280.0
    ) -> float:
        """To the end; returns the seconds until no work was left."""
        started = time.monotonic()
        try:
            while self.scheduler.step():
                assert time.monotonic() - started < timeout_s, self.states()
                each_turn()
                time.sleep(0.05)
            return time.monotonic() - started
        finally:
            self.scheduler.close()

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """As another process sees them."""
        return load_study("s", self.url).get_trials()

    def states(self) -> list[str]:
        return [trial.state.name for trial in self.trials()]


def leftovers() -> list[Any]:
    """Actors and placement groups that are not gone, but for the one actor that Ray Train itself
    keeps in every cluster, which coordinates wishes for nodes."""
    groups = [g for g in placement_group_table().values() if g["state"] != "REMOVED"]
    actors = ray._private.state.actors().values()
    alive = [actor for actor in actors if actor["State"] != "DEAD"]
    return groups + [actor for actor in alive if actor["Name"] != "AutoscalingCoordinator"]
