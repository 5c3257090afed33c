"""Pretended nodes under the fake runner: gangs that need room on one node, and nodes that fail.

For `caddie simulate` and for tests. A node whose gangs keep failing is quarantined by the same
policy as a real one; a node that dies takes its gangs with it and comes back later.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from service.errors import RunnerError
from service.placement import Node, Placement
from service.policies import Policy
from service.quarantine import Quarantine
from service.runners.base import Demand, RunState, Update
from service.runners.fake_runner import FakeRun, FakeRunner, Script
from service.trial import TrialSpec


@dataclass(frozen=True)
class Seat:
    """One attempt's stay on a node, in seconds of the cluster's clock."""

    node: str
    gpus: int
    attempt: int
    since: float
    """The gang was placed."""
    busy_from: float
    """Its trial's own work began: training."""
    busy_until: float
    """Its trial's own work ended, or the attempt did."""


class PretendedCluster(FakeRunner):
    """A FakeRunner whose slots are gangs on nodes.

    Args:
        script: What a trial does.
        nodes: The nodes.
        teardown_s: From the end of a trial until its GPUs are free.
        labels: That the nodes of every gang must carry.
        policy: When a node is quarantined, and for how long.
    """

    def __init__(
        self,
        script: Script,
        nodes: Sequence[Node],
        *,
        teardown_s: float = 0.0,
        labels: Mapping[str, str] | None = None,
        policy: Policy | None = None,
    ) -> None:
        super().__init__(script, slots=0)
        self.placement = Placement(nodes)
        self._teardown_s = teardown_s
        self._labels = dict(labels or {})
        self._quarantine = Quarantine(policy or Policy(), self.now)
        self._down_until: dict[str, float] = {}
        self._since: dict[int, float] = {}
        self._freeing: list[tuple[float, int]] = []
        """Gangs in teardown: (free at, key)."""
        self._order = 0
        self._seat_of: dict[int, int] = {}
        """Trial -> key of its gang: a trial may start again while its last gang is torn down."""
        self.seats: list[Seat] = []
        """Every stay that is over."""

    @property
    def num_gpus(self) -> int:
        """Of all nodes."""
        return sum(node.gpus for node in self.placement.nodes.values())

    def free_slots(self, demand: Demand) -> int:
        self._free_torn_down()
        return self.placement.num_fitting(_gpus(demand), self._labels, self._closed())

    def total_slots(self, demand: Demand) -> int:
        return self.placement.num_fitting(_gpus(demand), self._labels, empty=True)

    def submit(self, spec: TrialSpec, demand: Demand) -> None:
        self._free_torn_down()
        self._order += 1
        key, gpus = self._order, _gpus(demand)
        if self.placement.place(key, gpus, self._labels, self._closed()) is None:
            raise RunnerError(f"trial {spec.key} cannot be placed; no node has {gpus} free GPUs")
        self._seat_of[spec.number] = key
        self._since[spec.number] = self.now()
        self.submissions.append(spec)
        self._start(spec, self._script(spec))

    def poll(self, number: int) -> Update:
        trial = self._submitted[number]
        update = super().poll(number)
        if update.state not in (RunState.STARTING, RunState.RUNNING):
            node = self.seat_of(number)
            if update.state is RunState.FAILED:
                self._quarantine.failed(node)
            else:
                self._quarantine.ended_well(node)
            self._leave(trial.spec, trial.run)
        return update

    def cancel(self, number: int, hung: bool = False) -> None:
        trial = self._submitted[number]
        if hung:
            self._quarantine.failed(self.seat_of(number))
        super().cancel(number)
        self._leave(trial.spec, trial.run)

    def close(self) -> None:
        for number in list(self._submitted):
            self.cancel(number)

    def fail_node(self, name: str, down_s: float) -> None:
        """A node dies now: its gangs fail, and it takes no gang for so long."""
        self._down_until[name] = self.now() + down_s
        gangs = set(self.placement.gangs_on(name))
        for number, key in self._seat_of.items():
            if key in gangs and number in self._submitted:
                trial = self._submitted[number]
                lost = f"node {name} was lost"
                trial.run = replace(trial.run, fails_at_s=self.now() - trial.at, error=lost)

    def seat_of(self, number: int) -> str:
        """The node of a trial that was submitted and has not ended."""
        return self.placement.node_of(self._seat_of[number])

    def next_event(self) -> float:
        """When something will happen next; infinity when nothing will."""
        due = [self._next_of(number) for number in self._submitted]
        due += [self._freeing[0][0]] if self._freeing else []
        due += [until for until in self._closed_until().values() if until > self.now()]
        return min(due, default=float("inf"))

    def _leave(self, spec: TrialSpec, run: FakeRun) -> None:
        key, since = self._seat_of.pop(spec.number), self._since.pop(spec.number)
        now = self.now()
        began = min(now, since + run.start_s)
        ended = max(began, min(now, began + run.train_s + run.finish_s))
        if run.fails_at_s is not None:
            ended = max(began, min(ended, since + run.fails_at_s))
        node, gpus = self.placement.node_of(key), self.placement.gpus_of(key)
        self.seats.append(Seat(node, gpus, spec.attempt, since, began, ended))
        heapq.heappush(self._freeing, (now + self._teardown_s, key))

    def _free_torn_down(self) -> None:
        while self._freeing and self._freeing[0][0] <= self.now():
            self.placement.release(heapq.heappop(self._freeing)[1])

    def _closed_until(self) -> dict[str, float]:
        """Nodes that are down or quarantined -> when they return."""
        closed = dict(self._down_until)
        for name, until in self._quarantine.closed_until().items():
            closed[name] = max(until, closed.get(name, 0.0))
        return closed

    def _closed(self) -> frozenset[str]:
        now = self.now()
        return frozenset(name for name, until in self._closed_until().items() if until > now)

    def _next_of(self, number: int) -> float:
        trial = self._submitted[number]
        run, now = trial.run, self.now()
        times = [trial.at + run.start_s + run.train_s + run.finish_s]
        if trial.told < run.num_records:
            share = (trial.told + 1) / run.num_records
            times.append(trial.at + run.start_s + share * run.train_s)
        if run.fails_at_s is not None:
            times.append(trial.at + run.fails_at_s)
        return now if trial.stop is not None else min(times)


def _gpus(demand: Demand) -> int:
    return max(1, round(demand.workers * demand.gpus_per_worker))
