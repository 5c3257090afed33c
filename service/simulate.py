"""A sweep in simulated time: the real scheduler, filters, sampler and storage on pretended nodes.

What is simulated is what a trial does, how long its start and its end take, what fails, and time:
the clock jumps to the next event. What the scheduler itself takes is real and counts as it passes,
so that a slow driver shows as idle GPUs.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState

from search_spaces import Space
from search_spaces.tracks import TRACKS, Track
from service.errors import UsageError
from service.filters import default_filters
from service.filters.artifact_size import code_bytes
from service.filters.size_facts import reckoned_bytes
from service.placement import Node
from service.policies import Policy
from service.runners.base import Demand
from service.runners.fake_runner import FakeRun
from service.runners.pretended_cluster import PretendedCluster, Seat
from service.scheduler import Scheduler
from service.study import frozen_trials, open_study
from service.trial import TrialSpec

TURN_S = 0.1
"""Pause between two turns of a driver, as service.commands.sweep_driver has it."""
START_S = 13.0
TEARDOWN_S = 2.8
"""One TorchTrainer per trial, measured on an H200 host: fit() to the first line of the train
function, median of three, and the rest of fit() around an empty one."""
TRAIN_SHARE = 0.8
"""Of a trial's seconds; the clock ends training exactly. The rest is packing and evaluation."""
FINISH_NOISE = 0.1
"""Relative standard deviation of the seconds after training."""
SEED_NOISE = 0.0007
"""Bits per byte; the typical standard deviation over seeds of one published configuration."""
SIZE_RATIO = (0.998, 0.002)
"""Mean and standard deviation of artifact bytes over the account, as in published runs."""
NUM_RECORDS = 3
"""Step records of a pretended trial."""
DIVERGES_BEYOND = 0.95
"""A trial further than this from the best point, on the scale of its axes, diverges."""


@dataclass(frozen=True)
class Load:
    """What is simulated."""

    nodes: int
    gpus_per_node: int
    trials: int
    trial_s: float
    """A trial's own work: training, packing, evaluation."""
    failure_rate: float = 0.0
    """Share of attempts that are lost through nobody's choice, at a random moment."""
    gangs: tuple[int, ...] = (8,)
    """GPUs of a trial; several sizes take turns."""
    start_s: float = START_S
    """From submission until a trial's own work begins."""
    teardown_s: float = TEARDOWN_S
    """From the end of its work until its GPUs are free."""
    bad_nodes: int = 0
    """Nodes on which every attempt fails, one minute after its start."""
    seed: int = 0

    def faults(self) -> list[str]:
        """Everything that cannot be simulated, one line each."""
        faults = []
        for name in ("nodes", "gpus_per_node", "trials"):
            if getattr(self, name) < 1:
                faults.append(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.trial_s <= 0:
            faults.append(f"trial_s = {self.trial_s:g}: must be above 0")
        if not 0 <= self.failure_rate < 1:
            faults.append(f"failure_rate = {self.failure_rate:g}: must be in 0 .. 1, without 1")
        faults += [
            f"a gang of {gang} GPUs does not fit a node of {self.gpus_per_node}; gangs never span "
            "nodes"
            for gang in self.gangs
            if not 1 <= gang <= self.gpus_per_node
        ]
        return faults


@dataclass(frozen=True)
class Simulated:
    """What a simulation measured."""

    busy_fraction: float
    """GPU-seconds of trials' own work over those of all nodes, while trials were left to start."""
    busy_fraction_to_the_end: float
    """The same until the last trial was told: the last wave never fills the nodes."""
    simulated_hours: float
    wall_s: float
    """Of the simulation."""
    driver_s: float
    """The part of it that the scheduler took; it is in the simulated time, too."""
    states: dict[str, int]
    gap_s: dict[str, float]
    """p50 and p95 of the seconds between two trials' work on the same GPUs."""
    utilization: float
    """GPU-seconds that gangs held, start and teardown included, while trials were left to start."""


class Simulation:
    """One pretended sweep.

    Args:
        space: What is searched.
        load: Nodes and trials.
        folder: Where the trial folders go. Deleted by nobody.
        storage_url: Optuna storage; None = SQLite in memory.
        track: None = the space's own. Its seconds give way to those of the load.
        count_driver: Whether the scheduler's real time passes in the simulation; False makes it
            repeatable.

    Raises:
        UsageError: The load cannot be placed, or makes no sense.
    """

    def __init__(
        self,
        space: Space,
        load: Load,
        folder: Path,
        *,
        storage_url: str | None = None,
        track: Track | None = None,
        count_driver: bool = True,
        policy: Policy | None = None,
    ) -> None:
        faults = load.faults()
        if faults:
            raise UsageError("\n".join(faults))
        self.load = load
        self._space = space
        self._count_driver = count_driver
        # In memory nothing waits, so that processor time is what an idle machine would take.
        self._driver_clock = time.process_time if storage_url is None else time.perf_counter
        track = _timed(track or TRACKS[space.track], load.trial_s)
        nodes = [Node(f"node-{i}", load.gpus_per_node) for i in range(load.nodes)]
        policy = policy or Policy()
        self.cluster = PretendedCluster(
            self._run_of, nodes, teardown_s=load.teardown_s, policy=policy
        )
        self.started_at = self.cluster.now()
        url = storage_url or "sqlite://"
        self.study = open_study("simulated", url, space, track=track, seed=load.seed)
        self.scheduler = Scheduler(
            self.study,
            space,
            self.cluster,
            [],
            default_filters(track=track.name),
            Demand(min(load.gangs), 1.0),
            load.trials,
            folder,
            track=track,
            demand_of=lambda number: Demand(load.gangs[number % len(load.gangs)], 1.0),
            policy=policy,
            clock=self.cluster.now,
        )
        self.driver_s = 0.0
        code_bytes(space.base())  # seconds, once; a driver has them before its nodes are there

    def turn(self) -> bool:
        """One turn of the scheduler, then on to the next event; False at the end."""
        before = self._driver_clock()
        goes_on = self.scheduler.step()
        taken = self._driver_clock() - before
        self.driver_s += taken
        if self._count_driver:
            self.cluster.advance(taken)
        wait = self.cluster.next_event() - self.cluster.now()
        self.cluster.advance(TURN_S if self._is_asking() else max(TURN_S, min(wait, 3600.0)))
        return goes_on

    def run(self) -> Simulated:
        """To the end."""
        began = time.perf_counter()
        try:
            while self.turn():
                pass
            ended_at = self.cluster.now()
        finally:
            self.scheduler.close()
        return self._measured(ended_at, time.perf_counter() - began)

    def _is_asking(self) -> bool:
        """Whether the next turn has something to ask or start, event or not."""
        unplaced = self.load.trials - len(self.cluster.submissions)
        smallest = Demand(min(self.load.gangs), 1.0)
        return unplaced > 0 and self.cluster.free_slots(smallest) > 0

    def _measured(self, ended_at: float, wall_s: float) -> Simulated:
        seats, gpus = self.cluster.seats, self.cluster.num_gpus
        first = [seat for seat in seats if seat.attempt == 1]
        start = self.started_at
        full_until = max((seat.since for seat in first), default=ended_at)
        if full_until - start < self.load.trial_s:  # one wave: nothing was left to start
            full_until = ended_at
        room = gpus * max(full_until - start, 1e-9)
        gaps = _gaps([seat for seat in seats if seat.since <= full_until], self.load.gpus_per_node)
        states = Counter(trial.state for trial in frozen_trials(self.study))
        return Simulated(
            busy_fraction=_busy(seats, start, full_until) / room,
            busy_fraction_to_the_end=_busy(seats, start, ended_at)
            / (gpus * max(ended_at - start, 1e-9)),
            simulated_hours=(ended_at - start) / 3600,
            wall_s=wall_s,
            driver_s=self.driver_s,
            states={state.name: states[state] for state in TOLD},
            gap_s={"p50": _quantile(gaps, 0.5), "p95": _quantile(gaps, 0.95)},
            utilization=_held(seats, start, full_until, self.load.teardown_s) / room,
        )

    def _run_of(self, spec: TrialSpec) -> FakeRun:
        return pretended_run(spec, self._space, self.load, self.cluster.seat_of(spec.number))


TOLD = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def pretended_run(spec: TrialSpec, space: Space, load: Load, node: str) -> FakeRun:
    """What a trial does: a bowl over the axes with a seed's noise, an artifact of the size that its
    configuration gives, a failure at a random moment. The same trial does the same again."""
    chance = random.Random(f"{load.seed} {spec.number} {spec.attempt}")
    distance = distance_to_best(spec.config.flat(), space)
    train_s = TRAIN_SHARE * load.trial_s
    finish_s = (load.trial_s - train_s) * max(0.2, chance.gauss(1.0, FINISH_NOISE))
    whole_s = load.start_s + train_s + finish_s
    fails_at_s = chance.uniform(0.0, whole_s) if chance.random() < load.failure_rate else None
    if node in {f"node-{i}" for i in range(load.bad_nodes)}:
        fails_at_s = min(60.0, whole_s / 2)
    ratio = chance.gauss(*SIZE_RATIO)
    top = 2.0 * math.log(spec.config.model.vocab_size)
    diverges = distance > DIVERGES_BEYOND
    return FakeRun(
        start_s=load.start_s,
        train_s=train_s,
        step_s=train_s / 1000,
        finish_s=finish_s,
        eval_s=finish_s / 2,
        num_records=NUM_RECORDS,
        loss=lambda progress: top if diverges else 6.0 - 3.0 * progress,
        val_bpb=1.2 + 0.1 * distance**2 + chance.gauss(0.0, SEED_NOISE),
        bytes_code=code_bytes(spec.config),
        bytes_model=round(ratio * reckoned_bytes(spec.config)),
        fails_at_s=fails_at_s,
        error=f"node {node} was lost",
    )


def distance_to_best(settings: Mapping[str, object], space: Space) -> float:
    """Root mean square distance from the middle of every numeric axis: 0 in the middle, 1 in the
    corners."""
    squares = []
    for path, axis in space.axes.items():
        if isinstance(axis, CategoricalDistribution) or axis.single():
            continue
        low, high, value = (float(x) for x in (axis.low, axis.high, settings[path]))  # type: ignore
        if axis.log:  # type: ignore[attr-defined]
            low, high, value = math.log(low), math.log(high), math.log(value)
        squares.append((2 * (value - low) / (high - low) - 1) ** 2)
    return math.sqrt(statistics.fmean(squares)) if squares else 0.0


def _timed(track: Track, trial_s: float) -> Track:
    seconds = {"train_seconds": TRAIN_SHARE * trial_s, "eval_seconds": trial_s, "min_steps": 0}
    return track.model_copy(update=seconds)


def _busy(seats: Sequence[Seat], start: float, end: float) -> float:
    return sum(seat.gpus * _overlap(seat.busy_from, seat.busy_until, start, end) for seat in seats)


def _held(seats: Sequence[Seat], start: float, end: float, teardown_s: float) -> float:
    return sum(
        seat.gpus * _overlap(seat.since, seat.busy_until + teardown_s, start, end) for seat in seats
    )


def _overlap(a: float, b: float, start: float, end: float) -> float:
    return max(0.0, min(b, end) - max(a, start))


def _gaps(seats: Sequence[Seat], gpus_per_node: int) -> list[float]:
    """Seconds between the work of each gang and that of the last one on its GPUs."""
    idle_since: dict[str, list[float]] = defaultdict(lambda: [-math.inf] * gpus_per_node)
    gaps = []
    for seat in sorted(seats, key=lambda seat: seat.since):
        gpus = sorted(idle_since[seat.node])
        taken, kept = gpus[: seat.gpus], gpus[seat.gpus :]
        if math.isfinite(taken[-1]) and seat.busy_until > seat.busy_from:
            gaps.append(seat.busy_from - taken[-1])
        idle_since[seat.node] = kept + [seat.busy_until] * seat.gpus
    return gaps


def _quantile(values: Sequence[float], share: float) -> float:
    if not values:
        return math.nan
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
