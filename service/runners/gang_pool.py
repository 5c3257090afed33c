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

from service.quarantine import Quarantine
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
        quarantine: Knows which nodes take no gang.
        isolation: "trial": each gets processes of its own. "resident": gangs stay.
        trials_per_gang: A gang that stays is replaced after so many.
    """

    def __init__(
        self, mailbox: Any, quarantine: Quarantine, isolation: Isolation, trials_per_gang: int
    ) -> None:
        self._mailbox = mailbox
        self._quarantine = quarantine
        self._isolation = isolation
        self._trials_per_gang = trials_per_gang
        self._gangs: dict[str, Gang] = {}
        self._parting: list[Gang] = []
        """Freed, but not all of their processes are gone."""
        self._waiting: list[tuple[RayTrial, list[Gang]]] = []
        """Trials, and the gangs that leave to make room for them; none where one is about to be
        idle, or a node to be clean."""
        self._numbers = itertools.count()
        self._lock = threading.RLock()

    @property
    def is_empty(self) -> bool:
        """Whether nothing of any gang is left."""
        with self._lock:
            return not (self._gangs or self._parting)

    def free_slots(self, demand: Demand) -> int:
        """How many gangs could start now on nodes that are open: by Ray's own account, which is up
        to a second old, and by ours, which knows what is under way but not who else uses the
        cluster. Idle gangs count as room."""
        with self._lock:
            idle = [gang for gang in self._gangs.values() if gang.is_idle]
            busy = [gang for gang in self._gangs.values() if not gang.is_idle]
            unseen = [trial.demand for trial, _ in self._waiting]
        seen_by_ray, ours = nodes_available(), nodes_total()
        _add(seen_by_ray, idle)
        for gang in busy:
            if gang.node is None:
                unseen.append(gang.demand)
            elif gang.node in ours:
                _occupy(ours, gang.demand, gang.node)
        for nodes in (seen_by_ray, ours):
            _drop(nodes, self.closed(demand))
            for other in unseen:
                _occupy(nodes, other)
        return min(num_gangs(seen_by_ray, demand), num_gangs(ours, demand))

    def closed(self, demand: Demand) -> set[str]:
        """Nodes that take no gang of this size now."""
        return self._failing(demand) | self._quarantine.unclean_nodes()

    def _failing(self, demand: Demand) -> set[str]:
        """Nodes closed for their failures: only while another one could take the gang. Where there
        is no choice the sweep goes on, and ends by its own rule."""
        failing = set(self._quarantine.closed_until())
        return failing if failing and self._has_room_without(failing, demand) else set()

    def _has_room_without(self, closed: set[str], demand: Demand) -> bool:
        """Whether the other nodes, were they idle, could take the gang."""
        nodes = nodes_total()
        _drop(nodes, closed)
        return num_gangs(nodes, demand) > 0

    def _fits(self, demand: Demand, closed: set[str]) -> bool:
        """Whether open nodes have room beside all gangs that there are, by our own account."""
        nodes = nodes_total()
        _drop(nodes, closed)
        for gang in self._gangs.values():
            if gang.node is None or gang.node in nodes:
                _occupy(nodes, gang.demand, gang.node)
        return num_gangs(nodes, demand) > 0

    def place(self, trial: RayTrial) -> None:
        """Give a trial a gang, now or when those in its way have left. A gang that puts back what
        its last trial changed is soon idle: one that was begun beside it would wait for its place
        inside Ray."""
        with self._lock:
            closed = self.closed(trial.demand)
            idle = [
                gang
                for gang in self._gangs.values()
                if gang.is_idle and not gang.ended and gang.node not in closed
            ]
            mine = [gang for gang in idle if gang.demand == trial.demand]
            if mine and trial.may_share:
                gang = max(mine, key=lambda gang: gang.idle_since or 0.0)
                trial.start_on(gang, self._is_last(gang))
                return
            leaving = self._in_the_way(trial.demand, idle, closed)
            for gang in leaving:
                gang.kill()
            if leaving or not self._fits(trial.demand, closed):
                self._waiting.append((trial, leaving))
            else:
                self._start(trial)

    def cancel(self, trial: RayTrial) -> None:
        """End a trial, whether it has a gang or waits for one."""
        with self._lock:
            trial.kill_workers()

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
                elif leaving and self._fits(trial.demand, self.closed(trial.demand)):
                    self._start(trial)  # Ray's account may not show yet that they have left
                else:
                    self.place(trial)
            for gang in self._gangs.values():
                if gang.is_idle and self._is_of_no_use(gang):
                    gang.kill()

    def _is_of_no_use(self, gang: Gang) -> bool:
        """Whether an idle gang waits for too long, or on a node that takes no trials. Where a node
        only is not clean yet, its gangs wait too."""
        waits_s = time.monotonic() - (gang.idle_since or 0.0)
        return waits_s > IDLE_S or gang.node in self._failing(gang.demand)

    def end_all(self) -> None:
        """End every gang, whatever it does."""
        with self._lock:
            for gang in self._gangs.values():
                gang.kill()

    def _start(self, trial: RayTrial) -> None:
        avoid = self.closed(trial.demand)
        if self._isolation == "trial" or not trial.may_share:
            gang = trial.start(avoid)
        else:
            key = f"resident-{next(self._numbers)}"
            job = {"key": key, "mailbox": self._mailbox}
            gang = Gang(key, trial.demand, job, _session_folder() / key, avoid, stays=True)
            trial.start_on(gang, self._is_last(gang))
        self._gangs[gang.key] = gang

    def _is_last(self, gang: Gang) -> bool:
        return gang.num_given + 1 >= self._trials_per_gang

    def _in_the_way(self, demand: Demand, idle: list[Gang], closed: set[str]) -> list[Gang]:
        """The fewest idle gangs of one open node that must leave for this demand; none when it
        fits, or when it would not fit even so."""
        nodes = nodes_available()
        _drop(nodes, closed)
        for gang in self._gangs.values():
            if not gang.workers:  # Ray does not show it yet
                _occupy(nodes, gang.demand)
        if num_gangs(nodes, demand) > 0:
            return []
        choices: list[list[Gang]] = []
        for name, free in nodes.items():
            room: Nodes = {name: dict(free)}
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


def _drop(nodes: Nodes, names: Iterable[str]) -> None:
    """Leave nodes out."""
    for name in names:
        nodes.pop(name, None)


def _occupy(nodes: Nodes, demand: Demand, name: str | None = None) -> None:
    """Take a gang off the resources of its node, or of the first that holds it."""
    fitting = (node for node in nodes.values() if gangs_per_node(node, demand) > 0)
    node = nodes[name] if name is not None else next(fitting, None)
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
