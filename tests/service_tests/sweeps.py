"""Sweeps in simulated time on a real SQLite storage, for the tests of the service."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import optuna
from sqlalchemy import event
from sqlalchemy.engine import Engine

from search_spaces import SPACES, Space
from search_spaces.tracks import Track
from service.filters import default_filters
from service.policies import Policy
from service.runners.base import Demand
from service.runners.fake_runner import FakeRun, FakeRunner
from service.scheduler import Scheduler
from service.study import load_study, open_study
from service.tracking.base import Tracker
from service.trial import TrialSpec, Verdict
from trainer.report import TrainResult

SMOKE = SPACES["smoke"]
SIZE_LIMIT = 0.9
"""Fake runs weigh the same whatever their shape: reject only what is over the cap for sure."""
TRACK = Track(
    name="bench", artifact_bytes=200_000, train_seconds=8.0, eval_seconds=30.0, min_steps=20
)


@event.listens_for(Engine, "connect")
def _trust_the_power_supply(connection: Any, record: Any) -> None:
    """SQLite without fsync survives a killed process, as the tests need, and is much faster."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous=OFF")


class Recorder:
    """A tracker that keeps what it heard."""

    def __init__(self) -> None:
        self.started: list[tuple[int, int]] = []
        self.ended: list[tuple[int, str]] = []
        self.num_events = 0
        self.closed = False

    def trial_started(self, spec: TrialSpec) -> None:
        self.started.append((spec.number, spec.attempt))

    def trial_events(self, spec: TrialSpec, events: list[dict[str, Any]]) -> None:
        self.num_events += len(events)

    def trial_ended(
        self, spec: TrialSpec, state: str, verdicts: list[Verdict], result: TrainResult | None
    ) -> None:
        self.ended.append((spec.number, state))

    def close(self, grace_seconds: float = 10.0) -> None:
        self.closed = True


class Sweep:
    """One driver of the study "s" in a folder; make another one to resume."""

    def __init__(
        self,
        folder: Path,
        script: Callable[[TrialSpec], FakeRun] | Iterable[FakeRun],
        *,
        num_trials: int = 4,
        slots: int = 2,
        space: Space = SMOKE,
        track: Track = TRACK,
        storage_url: str | None = None,
        start_at: float = 0.0,
        trackers: Iterable[Tracker] = (),
        max_gpu_s: float | None = None,
        **policy: Any,
    ) -> None:
        self.url = storage_url or f"sqlite:///{folder / 'caddie.db'}"
        self.folder = folder / "s"
        self.runner = FakeRunner(script, slots=slots)
        self.runner.advance(start_at)
        self.recorder = Recorder()
        self.study = open_study("s", self.url, space, track=track)
        self.scheduler = Scheduler(
            self.study,
            space,
            self.runner,
            [self.recorder, *trackers],
            default_filters(SIZE_LIMIT, track.name),
            Demand(workers=2),
            num_trials,
            folder,
            track=track,
            max_gpu_s=max_gpu_s,
            policy=Policy(**policy),
            clock=self.runner.now,
        )

    def run(self, turns: int = 2000, second: float = 0.5) -> None:
        """Step to the end, half a simulated second a turn."""
        for _ in range(turns):
            if not self.scheduler.step():
                self.scheduler.close()
                return
            self.runner.advance(second)
        raise AssertionError("the sweep did not end")

    def steps(self, turns: int, second: float = 0.5) -> None:
        """Step a while; the sweep goes on."""
        for _ in range(turns):
            self.scheduler.step()
            self.runner.advance(second)

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """As another process sees them."""
        return load_study("s", self.url).get_trials()

    def states(self) -> list[str]:
        return [trial.state.name for trial in self.trials()]


def plain_space(*layers: int, lr: float = 0.05) -> Space:
    """Enqueues these depths in this order; nothing but the depth tells the trials apart."""
    points = [{"model.num_layers": depth, "optim.tied_embed_lr": lr} for depth in layers]
    return Space("plain", "tiny", "laptop", SMOKE.axes, tuple(points), "for tests")


GOOD = FakeRun()
DIVERGES = FakeRun(loss=lambda progress: 5.0 + 20 * progress)
BREAKS = FakeRun(fails_at_s=6.0, error="Traceback ...\nValueError: a defect")


def by_depth(spec: TrialSpec) -> FakeRun:
    """Deeper is better, on this bench."""
    return FakeRun(val_bpb=3.0 - 0.1 * spec.config.model.num_layers)
