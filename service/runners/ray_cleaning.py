"""Sees to it that the processes of an attempt that ended badly are gone from their node.

GPU memory is held by processes: a worker that hangs in its exit, or a child that a worker started
and nobody ended, keeps it, and the next gang on that node runs out of memory through no fault of
its own. Until the node is clean it takes no gang (service.quarantine). Runs in the pump of the
runner; on other nodes than the driver's a task does the looking.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from service.quarantine import Quarantine
from service.runners.processes import end_attempt
from service.runners.ray_cluster import nodes_total

logger = logging.getLogger(__name__)
EXIT_GRACE_S = 10.0
"""How long the processes of an attempt may take to exit by themselves."""
LOOK_AGAIN_S = 1.0


@dataclass
class _Job:
    key: str
    node: str
    names: list[str]
    """Of the workers, as service.runners.processes has them."""
    kill_at: float
    look_at: float = 0.0
    call: Any = None
    """What the task on the other node will answer."""


class Cleaning:
    """The nodes that are being cleaned. All calls come from the runner's pump.

    Args:
        quarantine: Hears which nodes are unclean.
        here: Ray's id of the driver's node.
    """

    def __init__(self, quarantine: Quarantine, here: str) -> None:
        self._quarantine = quarantine
        self._here = here
        self._jobs: list[_Job] = []

    @property
    def is_busy(self) -> bool:
        """Whether some node is not clean yet."""
        return bool(self._jobs)

    def begin(self, key: str, node: str, names: list[str]) -> None:
        """An attempt has ended badly on this node."""
        self._quarantine.unclean(node)
        self._jobs.append(_Job(key, node, names, time.monotonic() + EXIT_GRACE_S))

    def look(self) -> None:
        """Go on cleaning; returns at once."""
        for job in list(self._jobs):
            if self._is_done(job):
                self._jobs.remove(job)
                self._quarantine.clean(job.node)

    def _is_done(self, job: _Job) -> bool:
        now = time.monotonic()
        if now < job.look_at:
            return False
        job.look_at = now + LOOK_AGAIN_S
        if job.node == self._here:
            return not end_attempt(job.key, job.names, now >= job.kill_at)
        if job.node not in nodes_total():
            return True  # gone, and everything on it
        return self._is_done_elsewhere(job, now >= job.kill_at)

    def _is_done_elsewhere(self, job: _Job, by_force: bool) -> bool:
        if job.call is None:
            there = NodeAffinitySchedulingStrategy(job.node, soft=False)
            task = ray.remote(end_attempt).options(
                num_cpus=0, max_retries=0, scheduling_strategy=there
            )
            job.call = task.remote(job.key, job.names, by_force)
        if not ray.wait([job.call], timeout=0)[0]:
            return False
        call, job.call = job.call, None
        try:
            return not ray.get(call)
        except ray.exceptions.RayError as error:
            logger.warning("node %s cannot be looked at: %s", job.node, error)
            return False
