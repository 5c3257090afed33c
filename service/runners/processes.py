"""Finding processes by a mark in their environment, which children inherit whatever else changes.

Process groups and parents do not do: torchrun gives its ranks sessions of their own, and what a
dead parent leaves belongs to init.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

import psutil

TRIAL = "CADDIE_TRIAL"
"""Environment variable that a trial's workers give to every process they start: the attempt."""


def marked(variable: str) -> Iterator[tuple[psutil.Process, dict[str, str]]]:
    """Other living processes of this user that have the environment variable, with their
    environment."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # gone, a zombie, or somebody else's
            environment = process.environ()
            if variable in environment and process.pid != os.getpid():
                yield process, environment


def name_of(pid: int) -> str | None:
    """A name of a process that is never given again, or None when there is no such process."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            return f"{pid}@{process.create_time():.2f}"
    return None


def pid_of(name: str) -> int:
    """The id in a name."""
    return int(name.partition("@")[0])


def is_alive(name: str) -> bool:
    """Whether the process with this name lives."""
    return name_of(pid_of(name)) == name


def kill(processes: list[psutil.Process], timeout_s: float = 5.0) -> None:
    """SIGKILL, and wait until they are gone. Own children are reaped: their exit code is lost."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=timeout_s)


def end_attempt(key: str, names: list[str], by_force: bool) -> list[str]:
    """Runs on the node: which processes of the attempt still live, after killing them where asked.

    Args:
        key: The attempt.
        names: Of its workers.
        by_force: Kill what lives.
    """
    workers = [psutil.Process(pid_of(name)) for name in names if is_alive(name)]
    children = [process for process, environment in marked(TRIAL) if environment[TRIAL] == key]
    if by_force:
        kill(workers + children)
    return [str(process.pid) for process in workers + children if _lives(process)]


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
