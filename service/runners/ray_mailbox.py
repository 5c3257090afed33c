"""The mailbox of a sweep: how records leave the workers and stops reach them.

Records leave a worker through a background thread that talks to one `Mailbox` actor; the reply
brings back the reason to stop, so the training loop never waits for anybody and never calls
`ray.train.report`, which is a barrier over all ranks. Imports neither Ray Train nor torch, so that
the actor stays small.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
import ray.exceptions
from ray.util.placement_group import PlacementGroup

from trainer.report import EventKind

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
    log_from: int = 0
    """Bytes of it that earlier trials wrote."""
    process: str = ""
    """Its name as service.runners.processes has it."""


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
    outcome: dict[str, Any] | None = None
    """Of a trial on a gang that stays: what its train function returned on rank 0."""
    ready: dict[int, int] = field(default_factory=dict)
    """Of a gang that stays: rank -> number of the last job that it has put behind it."""
    leaving: list[str] = field(default_factory=list)
    """Of a gang that stays: why it gives itself up."""


class Mailbox:
    """Actor between the workers of all trials and the driver; one per sweep, needs no CPU.

    Holds nothing that cannot be said again: when it dies and Ray restarts it, workers repeat the
    batch they could not hand over, and the driver names every stop in each call. Workers and driver
    tell by `born` that jobs and outcomes have to be said again.
    """

    def __init__(self) -> None:
        self._born = secrets.token_hex(8)
        self._news: dict[str, News] = {}
        self._jobs: dict[str, dict[str, Any]] = {}
        self._ready: dict[tuple[str, int], int] = {}
        self._handed = asyncio.Condition()
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

    async def hand(self, gang: str, job: dict[str, Any] | None) -> None:
        """The driver has a job for a gang that stays; None = it is no more."""
        async with self._handed:
            if job is None:
                self._jobs.pop(gang, None)
                self._ready = {at: last for at, last in self._ready.items() if at[0] != gang}
            else:
                self._jobs[gang] = job
            self._handed.notify_all()

    async def next_job(
        self, gang: str, rank: int, last: int, wait_s: float
    ) -> tuple[str, dict[str, Any] | None]:
        """A worker is ready for a job with a number above `last`. Returns who answers, and the job,
        or None when there was none within wait_s."""
        if self._ready.get((gang, rank)) != last:
            self._ready[gang, rank] = last
            self._news_of(gang).ready[rank] = last

        def has_come() -> bool:
            return gang in self._jobs and self._jobs[gang]["number"] > last

        async with self._handed:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._handed.wait_for(has_come), wait_s)
            return self._born, self._jobs[gang] if has_come() else None

    async def finish(self, key: str, outcome: dict[str, Any]) -> str:
        """Rank 0 of a gang that stays is through with a trial. Returns who took the outcome."""
        self._news_of(key).outcome = outcome
        return self._born

    async def leave(self, gang: str, reason: str) -> None:
        """A worker says why its gang gives itself up."""
        self._news_of(gang).leaving.append(reason)

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
    ) -> tuple[str, dict[str, News]]:
        """Who answers, and all news since the last call, after waiting at most wait_s for some. The
        arguments replace what was known, so finished trials are forgotten and a restart loses
        nothing."""
        self._stops, self._cancelled = stops, cancelled
        if not self._news:
            self._wake.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), wait_s)
        news, self._news = self._news, {}
        return self._born, news

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

    def emit(self, kind: EventKind | Literal["system"], **fields: Any) -> None:
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
