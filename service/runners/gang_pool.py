"""Which gang a trial gets: one that stays and is idle, or a new one, for which idle ones may go.

The runner's scheduler calls place trials; its pump keeps the account of gangs that come and go.
Gangs of another size are given up when what waits needs their room, and all of them when nothing
has come for them for a while.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import ray

from service.runners.base import Demand
from service.runners.ray_cluster import (
    gang_resources,
    gangs_per_node,
    nodes_available,
    nodes_total,
)
from service.runners.ray_gang import Gang
from service.runners.ray_mailbox import News
from service.runners.ray_trial import RayTrial

logger = logging.getLogger(__name__)

Isolation = Literal["trial", "resident"]
IDLE_S = 60.0
"""How long a gang that stays keeps its GPUs for nothing."""

Nodes = dict[str, dict[str, float]]


class GangPool:
    """All gangs of a runner.

    Args:
        mailbox: Handle of the sweep's mailbox.
        isolation: "trial": each gets processes of its own. "resident": gangs stay.
        trials_per_gang: A gang that stays is replaced after so many.
    """

    def __init__(self, mailbox: Any, isolation: Isolation, trials_per_gang: int) -> None:
        self._mailbox = mailbox
        self._isolation = isolation
        self._trials_per_gang = trials_per_gang
        self._gangs: dict[str, Gang] = {}
        self._parting: list[Gang] = []
        """Freed, but not all of their processes are gone."""
        self._waiting: list[tuple[RayTrial, list[Gang]]] = []
        """Trials, and the gangs that leave to make room for them."""
        self._numbers = itertools.count()
        self._lock = threading.RLock()

    @property
    def is_empty(self) -> bool:
        """Whether nothing of any gang is left."""
        with self._lock:
            return not (self._gangs or self._parting)

    def free_slots(self, demand: Demand) -> int:
        """How many gangs could start now: by Ray's own account, which is up to a second old, and by
        ours, which knows what is under way but not who else uses the cluster. Idle gangs count as
        room."""
        with self._lock:
            idle = [gang for gang in self._gangs.values() if gang.is_idle]
            busy = [gang for gang in self._gangs.values() if not gang.is_idle]
            waiting = [trial.demand for trial, _ in self._waiting]
        seen_by_ray = self._room(gang for gang in busy if not gang.workers)
        _add(seen_by_ray, idle)
        ours = nodes_total()
        for gang in busy:
            _occupy(ours, gang.demand, gang.node)
        for nodes in (seen_by_ray, ours):
            for other in waiting:
                _occupy(nodes, other)
        return min(num_gangs(seen_by_ray, demand), num_gangs(ours, demand))

    def place(self, trial: RayTrial) -> None:
        """Give a trial a gang, now or when those in its way have left."""
        with self._lock:
            idle = [gang for gang in self._gangs.values() if gang.is_idle and not gang.ended]
            mine = [gang for gang in idle if gang.demand == trial.demand]
            if mine and trial.may_share:
                gang = max(mine, key=lambda gang: gang.idle_since or 0.0)
                trial.start_on(gang, self._is_last(gang))
                return
            leaving = self._in_the_way(trial.demand, idle)
            for gang in leaving:
                gang.kill()
            if leaving:
                self._waiting.append((trial, leaving))
            else:
                self._start(trial)

    def hand_again(self) -> None:
        """A new mailbox knows no jobs: repeat them."""
        with self._lock:
            for gang in self._gangs.values():
                gang.hand_again()

    def ended(self) -> list[Gang]:
        """Gangs that Ray Train is done with. Look before emptying the mailbox."""
        with self._lock:
            return [gang for gang in self._gangs.values() if gang.ended]

    def absorb(self, news: dict[str, News]) -> None:
        """Take in what gangs said."""
        with self._lock:
            for key in news.keys() & self._gangs.keys():
                self._gangs[key].absorb(news[key])

    def free(self, ended: Iterable[Gang]) -> None:
        """Give back what gangs held that have ended."""
        for gang in ended:
            gang.free()
            if gang.stays:
                _say_why(gang)
            with self._lock:
                del self._gangs[gang.key]
                self._parting.append(gang)

    def attend(self) -> None:
        """Start what has room now, end what has been idle for long, see processes off."""
        parting = [gang for gang in self._parting if not gang.is_gone()]
        with self._lock:
            self._parting = parting
            waiting, self._waiting = self._waiting, []
            for trial, leaving in waiting:
                if trial.cancelled:
                    continue
                if any(gang.key in self._gangs for gang in leaving):
                    self._waiting.append((trial, leaving))
                else:
                    self._start(trial)
            for gang in self._gangs.values():
                if gang.is_idle and time.monotonic() - (gang.idle_since or 0.0) > IDLE_S:
                    gang.kill()

    def end_all(self) -> None:
        """End every gang, whatever it does."""
        with self._lock:
            for gang in self._gangs.values():
                gang.kill()

    def _start(self, trial: RayTrial) -> None:
        if self._isolation == "trial" or not trial.may_share:
            gang = trial.start()
        else:
            key = f"resident-{next(self._numbers)}"
            job = {"key": key, "mailbox": self._mailbox}
            gang = Gang(key, trial.demand, job, _session_folder() / key, stays=True)
            trial.start_on(gang, self._is_last(gang))
        self._gangs[gang.key] = gang

    def _is_last(self, gang: Gang) -> bool:
        return gang.num_given + 1 >= self._trials_per_gang

    def _room(self, unseen: Iterable[Gang]) -> Nodes:
        """Free resources by Ray's account, less gangs that it does not show yet."""
        nodes = nodes_available()
        for gang in unseen:
            _occupy(nodes, gang.demand)
        return nodes

    def _in_the_way(self, demand: Demand, idle: list[Gang]) -> list[Gang]:
        """The fewest idle gangs of one node that must leave for this demand; none when it fits, or
        when it would not fit even so."""
        nodes = self._room(gang for gang in self._gangs.values() if not gang.workers)
        if num_gangs(nodes, demand) > 0:
            return []
        choices: list[list[Gang]] = []
        for name in nodes_total():
            room: Nodes = {name: dict(nodes.get(name, {}))}
            leaving: list[Gang] = []
            for gang in (gang for gang in idle if gang.node == name):
                leaving.append(gang)
                _add(room, [gang])
                if num_gangs(room, demand) > 0:
                    choices.append(leaving)
                    break
        return min(choices, key=len, default=[])


def num_gangs(nodes: Nodes, demand: Demand) -> int:
    """How many gangs fit, each on one node."""
    return sum(gangs_per_node(node, demand) for node in nodes.values())


def _occupy(nodes: Nodes, demand: Demand, name: str | None = None) -> None:
    """Take a gang off the resources of its node, or of the first that holds it."""
    fitting = (node for node in nodes.values() if gangs_per_node(node, demand) > 0)
    node = nodes.get(name) if name in nodes else next(fitting, None)
    if node is not None:
        for resource, amount in gang_resources(demand).items():
            node[resource] = node.get(resource, 0.0) - amount * demand.workers


def _add(nodes: Nodes, gangs: Iterable[Gang]) -> None:
    """Give the resources of gangs back to their nodes."""
    for gang in gangs:
        if gang.node in nodes:
            node = nodes[gang.node]
            for resource, amount in gang_resources(gang.demand).items():
                node[resource] = node.get(resource, 0.0) + amount * gang.demand.workers


def _say_why(gang: Gang) -> None:
    if gang.reasons:
        logger.warning("%s was given up after %d trials: %s", *_ends(gang), gang.reasons[0])
    elif not gang.is_leaving and gang.is_idle:
        logger.warning("%s was lost after %d trials: %s", *_ends(gang), gang.outcome)


def _ends(gang: Gang) -> tuple[str, int]:
    return gang.key, gang.num_given


def _session_folder() -> Path:
    """Ray's own folder of this session on this machine, where what is left over is not ours to
    keep."""
    node: Any = ray._private.worker._global_node
    return Path(node.get_session_dir_path()) / "caddie"
