"""One attempt of one trial on Ray, as the driver sees it: its thread, its folder, its end.

`fit()` blocks until Ray Train has freed everything, so it has a thread of its own. All other
methods but `take` are called by the runner's pump, one at a time.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterable
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
from ray.train.v2.api.exceptions import WorkerGroupError
from ray.train.v2.torch.torch_trainer import TorchTrainer
from ray.util.placement_group import placement_group_table, remove_placement_group

from service.runners.base import Demand, RunState, Update
from service.runners.processes import is_alive, kill, name_of, pid_of
from service.runners.ray_cluster import gang_resources
from service.runners.ray_mailbox import CONTROLLER, News, WorkerFailure, WorkerInfo
from service.runners.ray_worker import IntroduceController, run_trial
from service.trial import TrialFolder, TrialSpec
from trainer.report import TrainResult, describe

EXIT_GRACE_S = 10.0
"""How long processes may take to exit after their trial has ended."""
LOG_TAIL_BYTES = 4000
"""How much of a lost worker's own output goes into train.log."""
OUT_OF_MEMORY_MARKS = ("OutOfMemoryError", "running low on memory", "memory monitor")
"""How Ray words the end of a worker that it killed because the host's memory ran out."""
RAY_LOG_HEADERS = (":job_id:", ":actor_name:", ":task_name:")
"""Lines that Ray puts into the output of workers for its own readers."""


class LeanTorchTrainer(TorchTrainer):
    """A TorchTrainer without two processes that Ray Train starts for every trial: the one that
    removes the placement group when the controller dies, which takes a second to stop
    (RayTrial.settle removes it), and the one that splits Ray data sets, of which there are none."""

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        spare = (PlacementGroupCleanerCallback, DatasetsCallback)
        return [c for c in super()._create_default_callbacks() if not isinstance(c, spare)]


class RayTrial:
    """A submitted trial."""

    def __init__(
        self,
        spec: TrialSpec,
        demand: Demand,
        mailbox: Any,
        train: str,
        avoid: Iterable[str] = (),
    ) -> None:
        """Start it, on any node but those to avoid (Ray's ids)."""
        self.spec = spec
        self.demand = demand
        self.key = f"{spec.key}/{spec.attempt}"
        self.folder = TrialFolder(spec.folder)
        self.workers: dict[int, WorkerInfo] = {}
        self.cancelled = False
        self._job = {
            "key": self.key,
            "mailbox": mailbox,
            "config": _with_absolute_data_dir(spec),
            "train": train,
        }
        self._avoid = sorted(avoid)
        self._storage = spec.folder / "ray"
        self._outcome: dict[str, Any] | BaseException | None = None
        self._failures: list[WorkerFailure] = []
        self._batches_seen = 0
        self._events: deque[dict[str, Any]] = deque()
        self._state = RunState.STARTING
        self._final: Update | None = None
        self._write_error: OSError | None = None
        self._processes_here: list[str | None] = []
        self._kill_at = 0.0
        self.settled = False
        self._thread = threading.Thread(target=self._fit, name=f"fit {self.key}", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether Ray Train is done with it and has freed its workers."""
        return not self._thread.is_alive()

    @property
    def node(self) -> str | None:
        """Ray's id of the node of its gang; None = no worker has been heard of."""
        return next((worker.node for worker in self.workers.values()), None)

    @property
    def state(self) -> RunState:
        """Where it stands; the final state once it is settled."""
        return self._final.state if self._final is not None else self._state

    @property
    def is_drivers_fault(self) -> bool:
        """Whether it failed because the driver could not write down what it said."""
        return self._write_error is not None

    def _fit(self) -> None:
        introduce: Any = IntroduceController(self.key, self._job["mailbox"])
        try:
            trainer = LeanTorchTrainer(
                run_trial,
                train_loop_config=self._job,
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
            self._outcome = result.return_value  # metrics would need a checkpoint
        except BaseException as error:
            self._outcome = error
        self._job["mailbox"].wake.remote()  # the pump need not wait for news to see the end

    def absorb(self, news: News) -> None:
        """Take in what the workers said, and write the records into the folder."""
        for worker in news.workers:
            if worker.node == ray.get_runtime_context().get_node_id():
                self._processes_here.append(name_of(worker.pid))
            if worker.rank == CONTROLLER:
                continue
            self.workers[worker.rank] = worker
            if self.cancelled:
                ray.kill(worker.actor)
        self._failures += news.failures
        for number, records in news.batches:
            if number > self._batches_seen:
                self._batches_seen = number
                self._record(records)

    def _record(self, records: list[dict[str, Any]]) -> None:
        if self.cancelled:
            return  # the folder may belong to the next attempt by now
        try:
            with self.folder.metrics.open("a") as metrics, self.folder.log.open("a") as log:
                metrics.writelines(json.dumps(record) + "\n" for record in records)
                log.writelines(describe(record) + "\n" for record in records)
        except OSError as error:
            self._write_error = error
        if any(record["kind"] == "step" for record in records):
            self._state = RunState.RUNNING
        self._events.extend(records)

    def kill_workers(self) -> None:
        """End the trial now. Workers that introduce themselves later are killed then."""
        self.cancelled = True
        for worker in list(self.workers.values()):
            ray.kill(worker.actor)

    def settle(self) -> None:
        """Work out how it ended and complete its folder. Call once, after its last news."""
        self._free_placement_group()
        if not self.cancelled:
            try:
                self._final = self._finish()
            except Exception as error:
                self._write_error = self._write_error or (
                    error if isinstance(error, OSError) else None
                )
                self._final = self._fail(f"{type(error).__name__}: {error}", RunState.FAILED, [])
        self._drop_storage()
        self._kill_at = time.monotonic() + EXIT_GRACE_S
        self.settled = True

    def _may_go_on(self) -> bool:
        """Whether another attempt could use what Ray Train keeps."""
        finished = self._final is not None and self._final.state is RunState.FINISHED
        return self.spec.config.runtime.checkpoint_seconds > 0 and not finished

    def _drop_storage(self) -> None:
        if not self._may_go_on():
            shutil.rmtree(self._storage, ignore_errors=True)

    def is_gone(self) -> bool:
        """Whether its processes on this machine have ended; they are killed when they take too
        long. Some controllers hang in their exit, unnoticed by Ray, and keep their memory."""
        self._drop_storage()  # again: a controller may have written there since
        left = [name for name in self._processes_here if name and is_alive(name)]
        if left and time.monotonic() > self._kill_at:
            kill([psutil.Process(pid_of(name)) for name in left])
            return True
        return not left

    def take(self) -> Update:
        """What is new; the final state is set in the last one."""
        final = self._final  # first: its events are complete by now
        events = [self._events.popleft() for _ in range(len(self._events))]
        if final is None:
            return Update(self._state, events)
        return Update(final.state, events, final.result, final.error)

    def _finish(self) -> Update:
        if self._write_error is not None:
            raise self._write_error
        outcome = self._outcome
        if isinstance(outcome, dict) and "result" in outcome:
            result = TrainResult.model_validate(outcome["result"])
            if outcome["artifact"] is not None:
                _write(self.folder.artifact, outcome["artifact"])
            _write(self.folder.result, (result.model_dump_json(indent=2) + "\n").encode())
            return Update(RunState.FINISHED, result=result)
        if self._failures:
            return self._fail_with(min(self._failures, key=lambda failure: failure.time))
        return self._lost(outcome)

    def _fail_with(self, cause: WorkerFailure) -> Update:
        state = RunState.OUT_OF_MEMORY if cause.out_of_memory else RunState.FAILED
        head = f"{cause.kind}: {cause.message}\n\non rank {cause.rank}:\n{cause.traceback}"
        return self._fail(head, state, [cause.rank])

    def _lost(self, error: Any) -> Update:
        """No worker could say why: it was killed, or never started."""
        lost = error.worker_failures if isinstance(error, WorkerGroupError) else {}
        text = "\n".join(str(reason) for reason in lost.values()) or str(error)
        who = ", ".join(self._name(rank) for rank in lost)
        if any(mark in text for mark in OUT_OF_MEMORY_MARKS):
            head = f"the host ran out of memory and Ray killed {who or 'a worker'}\n\n{text}"
            return self._fail(head, RunState.OUT_OF_MEMORY, list(lost))
        if self.workers:
            return self._fail(
                f"{who or 'the trial'} was lost\n\n{text}", RunState.FAILED, list(lost)
            )
        head = (
            f"the workers did not start: {self.demand.workers} x {gang_resources(self.demand)} on "
            "one node; see with `ray status` who else uses the cluster, or ask for less per trial"
        )
        return self._fail(f"{head}\n\n{text}", RunState.FAILED, [])

    def _name(self, rank: int) -> str:
        worker = self.workers.get(rank)
        return f"rank {rank}" + (f" (pid {worker.pid} on {worker.host})" if worker else "")

    def _fail(self, head: str, state: RunState, ranks: list[int]) -> Update:
        """Final state with the error text, which also ends train.log. `ranks` are to blame."""
        files = [self.workers[rank].log for rank in ranks if rank in self.workers]
        error = (
            f"{head.rstrip()}\n\n"
            f"trial {self.spec.key}, attempt {self.spec.attempt}, "
            f"config {self.spec.digest}\n"
            f"logs: {', '.join([str(self.folder.log), *files])}\n"
            f"alone: caddie trial rerun {self.spec.study} {self.spec.number}"
        )
        try:
            with self.folder.log.open("a") as log:
                log.writelines(
                    f"{part}\n" for part in [error, *(self._printed(rank) for rank in ranks)]
                )
        except OSError:
            pass  # the disk is full: the error itself still reaches the scheduler
        return Update(state, error=error)

    def _printed(self, rank: int) -> str:
        """The end of what a worker printed, where this host has it: a crash in native code leaves
        its only trace there."""
        worker = self.workers.get(rank)
        here = ray.get_runtime_context().get_node_id()
        if not worker or worker.node != here or not os.path.isfile(worker.log):
            return ""
        with open(worker.log, "rb") as file:
            file.seek(max(0, os.path.getsize(worker.log) - LOG_TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
        return "\n".join(line for line in lines if not line.startswith(RAY_LOG_HEADERS))

    def _free_placement_group(self) -> None:
        """Ray Train removes its placement group, unless its controller died at a bad moment."""
        for worker in self.workers.values():
            group = worker.placement_group
            if group is not None:
                if placement_group_table(group).get("state") not in (None, "REMOVED"):
                    remove_placement_group(group)
                return


def _all_but(nodes: list[str]) -> dict[str, str] | None:
    """Ray's selector of all other nodes."""
    return {"ray.io/node-id": f"!in({','.join(nodes)})"} if nodes else None


def _with_absolute_data_dir(spec: TrialSpec) -> dict[str, Any]:
    """Workers start in another folder."""
    config = spec.config
    if config.data.dir:
        config = config.with_overrides({"data.dir": str(Path(config.data.dir).resolve())})
    return config.to_dict()


def _write(path: Path, content: bytes) -> None:
    """Write a file so that a reader never sees half of it, also when the disk fills up."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
