"""The workers of one TorchTrainer as the driver sees them: their thread, their end, what they left.

A gang serves one trial, or stays and serves trial after trial (resident_worker). `fit()` blocks
until Ray Train has freed everything, so it has a thread of its own. All methods but `hand` and
`kill` are called by the runner's pump, one at a time.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.callback import RayTrainCallback
from ray.train.v2.api.config import (
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
)
from ray.train.v2.torch.torch_trainer import TorchTrainer
from ray.util.placement_group import placement_group_table, remove_placement_group

from service.runners.base import Demand
from service.runners.processes import is_alive, kill, name_of, pid_of
from service.runners.ray_cluster import gang_resources
from service.runners.ray_mailbox import CONTROLLER, News, WorkerFailure, WorkerInfo
from service.runners.ray_worker import IntroduceController, run_trial
from service.runners.resident_worker import serve_trials

EXIT_GRACE_S = 10.0
"""How long processes may take to exit after their gang has ended."""


class LeanTorchTrainer(TorchTrainer):
    """A TorchTrainer without two processes that Ray Train starts for every trial: the one that
    removes the placement group when the controller dies, which takes a second to stop
    (Gang.free removes it), and the one that splits Ray data sets, of which there are none."""

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        spare = (PlacementGroupCleanerCallback, DatasetsCallback)
        return [c for c in super()._create_default_callbacks() if not isinstance(c, spare)]


class Gang:
    """A TorchTrainer under way.

    Args:
        key: Its name in the mailbox; that of its trial where it serves only one.
        demand: Its workers.
        job: For `run_trial`, or {"key", "mailbox"} for `serve_trials`.
        storage: Folder that Ray Train writes to.
        avoid: Nodes that it must not be on (Ray's ids).
        stays: It serves trials until it is told that one is its last.
    """

    def __init__(
        self,
        key: str,
        demand: Demand,
        job: dict[str, Any],
        storage: Path,
        avoid: Iterable[str] = (),
        stays: bool = False,
    ) -> None:
        self.key = key
        self.demand = demand
        self.stays = stays
        self.workers: dict[int, WorkerInfo] = {}
        self.outcome: dict[str, Any] | BaseException | None = None
        """What Ray Train says of its end."""
        self.keeps_storage = False
        self.num_given = 0
        """Jobs handed to it, where it stays."""
        self.idle_since: float | None = None
        """When it last had nothing to do, by the monotonic clock."""
        self.is_leaving = False
        """It takes no more trials."""
        self.reasons: list[str] = []
        """Why, in the workers' words."""
        self.failures: list[WorkerFailure] = []
        """Between trials, where it stays."""
        self.job_in_hand: dict[str, Any] | None = None
        self._mailbox = job["mailbox"]
        self._storage = storage
        self._avoid = sorted(avoid)
        self._ready: dict[int, int] = {}
        self._is_killed = False
        self._processes_here: list[str | None] = []
        self._kill_at = 0.0
        loop: Callable[[dict[str, Any]], dict[str, Any]] = serve_trials if stays else run_trial
        self._thread = threading.Thread(
            target=self._fit, args=(loop, job), name=f"fit {key}", daemon=True
        )
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether Ray Train is done with it and has freed its workers."""
        return not self._thread.is_alive()

    @property
    def is_idle(self) -> bool:
        """Whether it can take a trial now."""
        return self.idle_since is not None and not self.is_leaving

    @property
    def has_served(self) -> bool:
        """Whether it was through with a job before the last one."""
        return bool(self._ready) and max(self._ready.values()) > 0

    @property
    def node(self) -> str | None:
        """Ray's id of its node, once it is there."""
        return next((worker.node for worker in list(self.workers.values())), None)

    @property
    def process_names(self) -> list[str]:
        """Its workers, as service.runners.processes names them."""
        return [worker.process for worker in self.workers.values() if worker.process]

    def _fit(self, loop: Callable[[dict[str, Any]], dict[str, Any]], job: dict[str, Any]) -> None:
        introduce: Any = IntroduceController(self.key, self._mailbox)
        try:
            trainer = LeanTorchTrainer(
                loop,
                train_loop_config=job,
                scaling_config=ScalingConfig(
                    num_workers=self.demand.workers,
                    use_gpu=self.demand.gpus_per_worker > 0,
                    resources_per_worker=gang_resources(self.demand),
                    placement_strategy="STRICT_PACK",
                    label_selector=_all_but(self._avoid),
                ),
                run_config=RunConfig(
                    name="train",
                    storage_path=str(self._storage),
                    # What is tried again, and how often, is the scheduler's to say.
                    failure_config=FailureConfig(
                        max_failures=0, controller_failure_limit=0, max_preemption_failures=0
                    ),
                    # An attempt of the same name goes on from the last one's.
                    checkpoint_config=CheckpointConfig(num_to_keep=1),
                    callbacks=[introduce],
                    logging_config=LoggingConfig(log_level="CRITICAL"),
                ),
            )
            result: Any = trainer.fit()
            self.outcome = result.return_value  # metrics would need a checkpoint
        except BaseException as error:
            self.outcome = error
        self._mailbox.wake.remote()  # the pump need not wait for news to see the end

    def hand(self, job: dict[str, Any], is_last: bool) -> None:
        """Give it its next trial. It must be idle, or new."""
        self.num_given += 1
        self.idle_since = None
        self.is_leaving = is_last
        self.job_in_hand = {**job, "number": self.num_given, "is_last": is_last}
        self.hand_again()

    def hand_again(self) -> None:
        """Repeat what a dead mailbox knew."""
        if self.job_in_hand is not None:
            self._mailbox.hand.remote(self.key, self.job_in_hand)

    def absorb(self, news: News) -> None:
        """Take in what its processes said."""
        for worker in news.workers:
            if worker.node == ray.get_runtime_context().get_node_id():
                self._processes_here.append(name_of(worker.pid))
            if worker.rank == CONTROLLER:
                continue
            self.workers[worker.rank] = worker
            if self._is_killed:
                ray.kill(worker.actor)
        if self.stays:
            self.failures += news.failures
        self.reasons += news.leaving
        self.is_leaving = self.is_leaving or bool(news.leaving)
        self._ready.update(news.ready)
        behind = [self._ready.get(rank) for rank in range(self.demand.workers)]
        if self.num_given and behind == [self.num_given] * len(behind) and self.idle_since is None:
            self.idle_since = time.monotonic()
            self.job_in_hand = None

    def kill(self) -> None:
        """End it now. Workers that introduce themselves later are killed then."""
        self._is_killed = self.is_leaving = True
        for worker in list(self.workers.values()):
            ray.kill(worker.actor)

    def free(self) -> None:
        """Give back what it holds. Call once, when it has ended."""
        self._free_placement_group()
        if self.stays:
            self._mailbox.hand.remote(self.key, None)
        self._kill_at = time.monotonic() + EXIT_GRACE_S

    def _free_placement_group(self) -> None:
        """Ray Train removes its placement group, unless its controller died at a bad moment."""
        for worker in self.workers.values():
            group = worker.placement_group
            if group is not None:
                if placement_group_table(group).get("state") not in (None, "REMOVED"):
                    remove_placement_group(group)
                return

    def is_gone(self) -> bool:
        """Whether its processes on this machine have ended; they are killed when they take too
        long. Some controllers hang in their exit, unnoticed by Ray, and keep their memory."""
        self.drop_storage()  # again: a controller may have written there since
        left = [name for name in self._processes_here if name and is_alive(name)]
        if left and time.monotonic() > self._kill_at:
            kill([psutil.Process(pid_of(name)) for name in left])
            return True
        return not left

    def drop_storage(self) -> None:
        """Remove what Ray Train wrote, unless another attempt could use it."""
        if not self.keeps_storage:
            shutil.rmtree(self._storage, ignore_errors=True)


def _all_but(nodes: list[str]) -> dict[str, str] | None:
    """Ray's selector of all other nodes."""
    return {"ray.io/node-id": f"!in({','.join(nodes)})"} if nodes else None
