"""One driver per study: a lease in the study's user attributes, renewed by a heartbeat.

The lease names host, process and start of the process, so that a dead driver on this host is seen
at once; one on another host is taken for dead when its heartbeat is old. One that was only slow
finds out at its next write to a trial, whose transaction looks at the lease (driver_storage).
"""

from __future__ import annotations

import math
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import optuna
import psutil

from service.driver_storage import set_fence
from service.errors import StudyBusyError
from service.steady_clock import SteadyClock

LEASE_ATTR = "driver"
HEARTBEAT_S = 5.0
STALE_S = 60.0
"""A foreign heartbeat older than this belongs to a dead driver."""


@dataclass(frozen=True)
class Lease:
    """Who drives a study."""

    token: str
    host: str
    pid: int
    process_started: float
    """Start time of the process: tells it from a later one with the same number."""
    heartbeat: float
    """Wall-clock seconds of the last renewal."""


class DriverLease:
    """Holds the lease of one study for this process.

    Args:
        study: The study.
        clock: Wall-clock seconds, comparable between hosts.

    Raises:
        StudyBusyError: Another live driver holds the study.
    """

    def __init__(self, study: optuna.Study, clock: Callable[[], float]) -> None:
        self._study = study
        self._clock = clock
        self._due = SteadyClock() if clock is time.time else clock
        """Says when to renew; a machine's clock that is put back would not."""
        self._token = uuid.uuid4().hex
        holder = read_lease(study)
        if holder is not None and is_alive(holder, clock()):
            raise _busy(study, holder)
        self._write()
        self._check()
        set_fence(study, LEASE_ATTR, self._refuse)

    def renew(self) -> None:
        """Call often: renews when due. Raises StudyBusyError when the lease was taken over."""
        if self._due() - self._renewed >= HEARTBEAT_S:
            self._check()
            self._write()

    def expire(self) -> None:
        """Renew at the next chance: a storage that was away must answer before work goes on."""
        self._renewed = -math.inf

    def release(self) -> None:
        """Let the next driver in; nothing happens when the lease is no longer ours."""
        holder = read_lease(self._study)
        if holder is not None and holder.token == self._token:
            self._study.set_user_attr(LEASE_ATTR, None)

    def _check(self) -> None:
        self._refuse(self._study.user_attrs.get(LEASE_ATTR))

    def _refuse(self, fields: Mapping[str, Any] | None) -> None:
        if fields and fields["token"] != self._token:
            raise _busy(self._study, Lease(**fields))

    def _write(self) -> None:
        now, pid = self._clock(), os.getpid()
        started = psutil.Process(pid).create_time()
        lease = Lease(self._token, socket.gethostname(), pid, started, now)
        self._study.set_user_attr(LEASE_ATTR, asdict(lease))
        self._renewed = self._due()


def read_lease(study: optuna.Study) -> Lease | None:
    """The lease in the storage, dead or alive; None when the last driver ended in order."""
    fields = study.user_attrs.get(LEASE_ATTR)
    return Lease(**fields) if fields else None


def is_alive(lease: Lease, now: float) -> bool:
    """Whether the driver still works, as far as this host can tell. A heartbeat far in the future
    is none either: a clock was put back since."""
    if lease.host != socket.gethostname():
        return abs(now - lease.heartbeat) < STALE_S
    try:
        started = psutil.Process(lease.pid).create_time()
    except psutil.NoSuchProcess:
        return False
    return abs(started - lease.process_started) < 1.0


def refuse_if_driven(study: optuna.Study, now: float) -> None:
    """Raises StudyBusyError while a live driver holds the study."""
    holder = read_lease(study)
    if holder is not None and is_alive(holder, now):
        raise _busy(study, holder)


def _busy(study: optuna.Study, holder: Lease) -> StudyBusyError:
    return StudyBusyError(
        f"study {study.study_name!r} is being driven by process {holder.pid} on {holder.host}; "
        f"wait for it, end it with `caddie sweep stop {study.study_name}`, or choose another "
        "--study"
    )
