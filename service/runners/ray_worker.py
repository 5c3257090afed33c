"""What lands on the nodes: the mailbox of a sweep and the function every train worker runs.

Records leave a worker through a background thread that talks to one `Mailbox` actor; the reply
brings back the reason to stop, so the training loop never waits for anybody and never calls
`ray.train.report`, which is a barrier over all ranks. Separate from ray_runner because this code
runs on GPU nodes: it imports neither Optuna nor MLflow.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import socket
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.util.placement_group import PlacementGroup, get_current_placement_group

from trainer.config import TrainConfig
from trainer.errors import DataError
from trainer.report import EventKind, NullReporter, Reporter, TrainResult

PUSH_INTERVAL_S = 0.25
"""How often rank 0 hands over its records and looks for a stop; the most that a kill loses."""
FLUSH_TIMEOUT_S = 15.0
"""How long a worker that is done waits for its last records to be taken."""

CONTROLLER = -1
"""In place of a rank."""


@dataclass(frozen=True)
class WorkerInfo:
    """One process of a trial, as it introduces itself before training."""

    rank: int
    """CONTROLLER for Ray Train's own process that watches the workers."""
    pid: int
    host: str
    node: str
    """Ray's id of the node, which is unique where names of hosts are not."""
    actor: Any
    """Handle of the worker's actor: killing it makes Ray Train take the whole group down."""
    placement_group: PlacementGroup | None
    log: str
    """File on `host` with the worker's standard error."""


@dataclass(frozen=True)
class WorkerFailure:
    """An exception on one worker. The earliest of a trial is its cause: the other ranks then lose
    their peer and fail too."""

    rank: int
    time: float
    kind: str
    """Class name, such as "ConfigError"."""
    message: str
    traceback: str
    out_of_memory: bool


@dataclass
class News:
    """What workers said about one attempt since the mailbox was last emptied."""

    batches: list[tuple[int, list[dict[str, Any]]]] = field(default_factory=list)
    """(sequence number, records); a batch whose receipt got lost comes twice."""
    workers: list[WorkerInfo] = field(default_factory=list)
    failures: list[WorkerFailure] = field(default_factory=list)


class Mailbox:
    """Actor between the workers of all trials and the driver; one per sweep, needs no CPU.

    Holds nothing that cannot be said again: when it dies and Ray restarts it, workers repeat the
    batch they could not hand over, and the driver names every stop in each call.
    """

    def __init__(self) -> None:
        self._news: dict[str, News] = {}
        self._stops: dict[str, str] = {}
        self._cancelled: set[str] = set()
        self._wake = asyncio.Event()

    async def register(self, key: str, worker: WorkerInfo) -> bool:
        """A worker is about to train. False when the trial was cancelled meanwhile."""
        self._news_of(key).workers.append(worker)
        return key not in self._cancelled

    async def push(self, key: str, number: int, records: list[dict[str, Any]]) -> str | None:
        """Rank 0 hands over batch `number`. Returns why the trial should stop, or None."""
        if records:
            self._news_of(key).batches.append((number, records))
        return self._stops.get(key)

    async def fail(self, key: str, failure: WorkerFailure) -> None:
        """A worker raised."""
        self._news_of(key).failures.append(failure)

    async def wake(self) -> None:
        """Answer a waiting `collect` at once."""
        self._wake.set()

    async def stop(self, key: str, reason: str) -> None:
        """The driver wants the trial to stop."""
        self._stops[key] = reason

    async def cancel(self, key: str) -> None:
        """The driver gave the trial up."""
        self._cancelled.add(key)

    async def collect(
        self, stops: dict[str, str], cancelled: set[str], wait_s: float
    ) -> dict[str, News]:
        """All news since the last call, after waiting at most wait_s for some. The arguments
        replace what was known, so finished trials are forgotten and a restart loses nothing."""
        self._stops, self._cancelled = stops, cancelled
        if not self._news:
            self._wake.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), wait_s)
        news, self._news = self._news, {}
        return news

    def _news_of(self, key: str) -> News:
        self._wake.set()
        return self._news.setdefault(key, News())


class MailboxReporter:
    """Reporter of rank 0: emit appends to a queue, a thread does the talking."""

    def __init__(self, mailbox: Any, key: str, interval_s: float = PUSH_INTERVAL_S) -> None:
        self._mailbox = mailbox
        self._key = key
        self._interval_s = interval_s
        self._records: deque[dict[str, Any]] = deque()
        self._reason: str | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._talk, name="mailbox", daemon=True)
        self._thread.start()

    def emit(self, kind: EventKind, **fields: Any) -> None:
        self._records.append({"kind": kind, "time": time.time(), **fields})

    def stop_requested(self) -> str | None:
        return self._reason

    def close(self) -> None:
        """Hand over what is left; waits at most FLUSH_TIMEOUT_S."""
        self._closing.set()
        self._thread.join(FLUSH_TIMEOUT_S)

    def _talk(self) -> None:
        number = 0
        batch: list[dict[str, Any]] = []
        while True:
            closing = self._closing.wait(self._interval_s)
            if not batch:
                number, batch = number + 1, self._take()
            try:
                call = self._mailbox.push.remote(self._key, number, batch)
                self._reason = ray.get(call, timeout=FLUSH_TIMEOUT_S) or self._reason
                batch = []
            except (ray.exceptions.RayError, TimeoutError):
                continue  # the mailbox is being restarted: the same batch again
            if closing and not self._records:
                return

    def _take(self) -> list[dict[str, Any]]:
        return [self._records.popleft() for _ in range(len(self._records))]


class IntroduceController(ControllerCallback):
    """Makes the controller of a trial known to the driver, which sees to it that it goes."""

    def __init__(self, key: str, mailbox: Any) -> None:
        self._key = key
        self._mailbox = mailbox

    def after_controller_start(self, train_run_context: Any) -> None:
        self._mailbox.register.remote(self._key, introduce(CONTROLLER))


def run_trial(job: dict[str, Any]) -> dict[str, Any]:
    """Train loop of a TorchTrainer: runs on every worker, in its process group.

    `job` has {"key", "mailbox", "config" (TrainConfig.to_dict), "train" (import path)}. Returns
    {"result": TrainResult as JSON types, "artifact": bytes or None} on rank 0, {} elsewhere.
    """
    rank = ray.train.get_context().get_world_rank()
    key, mailbox = job["key"], job["mailbox"]
    if not ray.get(mailbox.register.remote(key, introduce(rank))):
        raise RuntimeError("the trial was cancelled before it started")
    try:
        return _train(job, rank)
    except BaseException as error:
        ray.get(mailbox.fail.remote(key, _describe_failure(rank, error)))
        raise


def _train(job: dict[str, Any], rank: int) -> dict[str, Any]:
    config = TrainConfig.from_dict(job["config"])
    data_dir = config.data.dir
    if data_dir and not os.path.isdir(data_dir):
        raise DataError(
            f"data.dir = {data_dir!r} is not a folder on node {socket.gethostname()}; copy the "
            "data set to the same path on every node, or put it on a file system they share"
        )
    train = _load(job["train"])
    if rank != 0:
        train(config, NullReporter(), None)
        return {}
    reporter = MailboxReporter(job["mailbox"], job["key"])
    try:
        # Train workers start in a folder of their own inside the session's.
        with tempfile.TemporaryDirectory(prefix="artifact-", dir=".") as out:
            result = train(config, reporter, Path(out))
            artifact = Path(out, "artifact.bin")
            packed = artifact.read_bytes() if artifact.exists() else None
        return {"result": result.model_dump(mode="json"), "artifact": packed}
    finally:
        reporter.close()


def _load(path: str) -> Callable[[TrainConfig, Reporter, Path | None], TrainResult]:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def introduce(rank: int) -> WorkerInfo:
    """The process that calls this, an actor."""
    return WorkerInfo(
        rank=rank,
        pid=os.getpid(),
        host=socket.gethostname(),
        node=ray.get_runtime_context().get_node_id(),
        actor=ray.get_runtime_context().current_actor,
        placement_group=get_current_placement_group(),
        log=os.readlink("/proc/self/fd/2"),
    )


def _describe_failure(rank: int, error: BaseException) -> WorkerFailure:
    return WorkerFailure(
        rank=rank,
        time=time.time(),
        kind=type(error).__name__,
        message=str(error),
        traceback="".join(traceback.format_exception(error)),
        out_of_memory=is_out_of_memory(error),
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host had no memory left for what was asked."""
    import torch  # here: the driver imports this module too, and starts faster without torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError)
