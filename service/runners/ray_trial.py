"""One attempt of one trial on Ray, as the driver sees it: its folder and its end.

All methods but `take` are called by the runner's pump, one at a time. Its workers are a gang's
(ray_gang), which may outlive it.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ray
from ray.train.v2.api.exceptions import WorkerGroupError

from service.runners.base import Demand, RunState, Update
from service.runners.ray_cluster import gang_resources
from service.runners.ray_gang import Gang
from service.runners.ray_mailbox import CONTROLLER, News, WorkerFailure, WorkerInfo
from service.trial import TrialFolder, TrialSpec
from trainer.report import TrainResult, describe

LOG_TAIL_BYTES = 4000
"""How much of a lost worker's own output goes into train.log."""
OUT_OF_MEMORY_MARKS = ("OutOfMemoryError", "running low on memory", "memory monitor")
"""How Ray words the end of a worker that it killed because the host's memory ran out."""
RAY_LOG_HEADERS = (":job_id:", ":actor_name:", ":task_name:")
"""Lines that Ray puts into the output of workers for its own readers."""


class RayTrial:
    """A submitted trial."""

    def __init__(self, spec: TrialSpec, demand: Demand, mailbox: Any, train: str) -> None:
        self.spec = spec
        self.demand = demand
        self.key = f"{spec.key}/{spec.attempt}"
        self.folder = TrialFolder(spec.folder)
        self.workers: dict[int, WorkerInfo] = {}
        self.cancelled = False
        self.gang: Gang | None = None
        """Where it runs; None = it waits for one to leave."""
        self._job = {"key": self.key, "config": _with_absolute_data_dir(spec), "train": train}
        self._mailbox = mailbox
        self._outcome: dict[str, Any] | None = None
        """What its gang said of it, where that stays."""
        self._failures: list[WorkerFailure] = []
        self._batches_seen = 0
        self._events: deque[dict[str, Any]] = deque()
        self._state = RunState.STARTING
        self._final: Update | None = None
        self._write_error: OSError | None = None
        self.settled = False

    @property
    def ended(self) -> bool:
        """Whether nothing of it runs any more, or its gang is through with it."""
        if self.gang is None:
            return self.cancelled
        return self.gang.ended or (self._outcome is not None and not self.cancelled)

    @property
    def was_never_taken(self) -> bool:
        """Whether a gang that had served others lost a rank before all had taken this trial up."""
        gang = self.gang
        lost = gang is not None and gang.ended and gang.has_served
        taken = self._outcome is not None or len(self.workers) == self.demand.workers
        return lost and not taken and not self.cancelled

    def start_over(self) -> None:
        """Forget a gang that was lost before the trial began, and what survivors said of that."""
        self.gang = None
        self.workers.clear()
        self._failures.clear()
        self._events.clear()
        self._batches_seen = 0
        self.folder.clear_run()

    @property
    def may_share(self) -> bool:
        """Whether it can run on a gang that stays: Ray Train keeps saved states by gang."""
        return self.spec.config.runtime.checkpoint_seconds == 0

    @property
    def node(self) -> str | None:
        """Ray's id of the node of its gang; None = it has none, or no worker was heard of."""
        return self.gang.node if self.gang is not None else None

    @property
    def state(self) -> RunState:
        """Where it stands; the final state once it is settled."""
        return self._final.state if self._final is not None else self._state

    @property
    def is_drivers_fault(self) -> bool:
        """Whether it failed because the driver could not write down what it said."""
        return self._write_error is not None

    def start(self, avoid: Iterable[str]) -> Gang:
        """Get a gang of its own, on any node but those to avoid (Ray's ids)."""
        job = {**self._job, "mailbox": self._mailbox}
        self.gang = Gang(self.key, self.demand, job, self.spec.folder / "ray", avoid)
        return self.gang

    def start_on(self, gang: Gang, is_last: bool) -> None:
        """Run on a gang that stays."""
        self.gang = gang
        gang.hand(self._job, is_last)

    def absorb(self, news: News) -> None:
        """Take in what the workers said, and write the records into the folder."""
        self.workers |= {w.rank: w for w in news.workers if w.rank != CONTROLLER}
        self._failures += news.failures
        self._outcome = news.outcome or self._outcome
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
        """End the trial now, and its gang with it."""
        self.cancelled = True
        if self.gang is not None:
            self.gang.kill()

    def settle(self) -> None:
        """Work out how it ended and complete its folder. Call once, after its last news."""
        if not self.cancelled:
            try:
                self._final = self._finish()
            except Exception as error:
                self._write_error = self._write_error or (
                    error if isinstance(error, OSError) else None
                )
                self._final = self._fail(f"{type(error).__name__}: {error}", RunState.FAILED, [])
        if self.gang is not None and not self.gang.stays:
            self.gang.keeps_storage = self._may_go_on()
            self.gang.drop_storage()
        self.settled = True

    def _may_go_on(self) -> bool:
        """Whether another attempt could use what Ray Train keeps."""
        finished = self._final is not None and self._final.state is RunState.FINISHED
        return self.spec.config.runtime.checkpoint_seconds > 0 and not finished

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
        assert self.gang is not None
        outcome = self._outcome or self.gang.outcome
        if isinstance(outcome, dict) and "result" in outcome:
            result = TrainResult.model_validate(outcome["result"])
            if outcome["artifact"] is not None:
                _write(self.folder.artifact, outcome["artifact"])
            _write(self.folder.result, (result.model_dump_json(indent=2) + "\n").encode())
            return Update(RunState.FINISHED, result=result)
        failures = self._failures or self.gang.failures
        if failures:
            return self._fail_with(min(failures, key=lambda failure: failure.time))
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
            file.seek(max(worker.log_from, os.path.getsize(worker.log) - LOG_TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
        return "\n".join(line for line in lines if not line.startswith(RAY_LOG_HEADERS))


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
