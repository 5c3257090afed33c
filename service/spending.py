"""Counts the GPU-seconds of a sweep while it runs, and says whether the budget has room for more.

Separate from the scheduler, which only tells it when something changes.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable

import optuna

from search_spaces.tracks import Track
from service.ledger import LEDGER_ATTR, Meter
from service.policies import has_room
from service.run import Run
from service.runners.base import Demand, Runner
from service.trial_book import Ending

SAVE_EVERY_S = 10.0
"""A driver that is killed loses at most this much of the account of idle GPUs."""
CAPACITY_EVERY_S = 1.0
"""Between two looks at how large the cluster is."""
RECENT_TRIALS = 32
"""The mean of this many last trials says what the next one will hold."""


class Spending:
    """The account of one driver, on top of what earlier ones of the study wrote down.

    Args:
        study: The study.
        runner: Says how many gangs the cluster holds.
        demand: Of the smallest trial.
        track: Its seconds are the first guess of what a trial takes.
        budget_s: GPU-seconds that trials may hold in all; None = no limit.
        clock: Wall-clock seconds.
    """

    def __init__(
        self,
        study: optuna.Study,
        runner: Runner,
        demand: Demand,
        track: Track,
        budget_s: float | None,
        clock: Callable[[], float],
    ) -> None:
        self._study = study
        self._runner = runner
        self._demand = demand
        self._budget_s = budget_s
        self._clock = clock
        self._meter = Meter.of_attr(study.user_attrs.get(LEDGER_ATTR))
        self._guess_s = (track.train_seconds or 0.0) + (track.eval_seconds or 0.0)
        self._recent: deque[float] = deque(maxlen=RECENT_TRIALS)
        """Seconds that ended trials held their gangs."""
        self._capacity = 0.0
        self._looked_at = self._saved_at = -math.inf
        self.tick(())

    def tick(self, running: Iterable[Run]) -> None:
        """Call before trials start or end, and once a turn."""
        now, runs = self._clock(), list(running)
        if now - self._looked_at >= CAPACITY_EVERY_S:
            self._looked_at = now
            gang = self._demand.workers * (self._demand.gpus_per_worker or 1)
            self._capacity = self._runner.total_slots(self._demand) * gang
        self._meter.tick(now, self._capacity, sum(run.units(1.0) for run in runs))
        self._meter.running = sum(run.held(now) for run in runs)

    def learn(self, end: Ending) -> None:
        """Take in how long an ended trial held its gang."""
        if end.held_s > 0:
            self._recent.append(end.held_s)

    def has_room(self, in_flight: Iterable[Run]) -> bool:
        """Whether the budget has room for one more trial beside those in flight."""
        if self._budget_s is None:
            return True
        now = self._clock()
        each_s = statistics.fmean(self._recent) if self._recent else self._guess_s
        owed = sum(max(0.0, run.units(each_s) - run.held(now)) for run in in_flight)
        next_s = each_s * self._demand.workers * (self._demand.gpus_per_worker or 1)
        return has_room(self._budget_s, self._meter.held, owed, next_s)

    def save(self, now: bool = False) -> None:
        """Write the account into the study when it is due."""
        at = self._clock()
        if now or at - self._saved_at >= SAVE_EVERY_S:
            self._saved_at = at
            self._study.set_user_attr(LEDGER_ATTR, self._meter.to_attr())
