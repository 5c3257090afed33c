"""Finding and ending processes, on real ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from service.runners.processes import is_alive, kill, marked, name_of, pid_of
from service.runners.ray_cluster import DRIVER, end_leftovers
from tests.service_tests.runner_trials import wait_until

MARK = "CADDIE_TEST_PROCESS"


@pytest.fixture
def start() -> Iterator[Any]:
    started: list[subprocess.Popen[bytes]] = []

    def start_one(**environment: str) -> subprocess.Popen[bytes]:
        code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True)"
        process = subprocess.Popen(
            [sys.executable, "-c", f"{code}; signal.pause()"],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        return process

    yield start_one
    for process in started:
        process.kill()
        process.communicate()


def test_marked_finds_children_in_other_sessions_and_kill_ends_the_deaf(start: Any) -> None:
    one, other = start(**{MARK: "one"}), start(**{MARK: "other"})
    wait_until(lambda: len(list(marked(MARK))) == 2)
    found = {process.pid: environment[MARK] for process, environment in marked(MARK)}
    assert found == {one.pid: "one", other.pid: "other"}
    one.send_signal(signal.SIGTERM)  # which it ignores
    kill([psutil.Process(one.pid)])
    assert name_of(one.pid) is None
    assert [process.pid for process, _ in marked(MARK)] == [other.pid]


def test_a_name_is_good_for_one_process_only(start: Any) -> None:
    process = start()
    name = name_of(process.pid)
    assert name is not None and pid_of(name) == process.pid
    assert is_alive(name)
    assert not is_alive(f"{process.pid}@{psutil.Process(process.pid).create_time() - 60:.2f}")
    process.kill()
    wait_until(lambda: not is_alive(name))  # a zombie by now, which does not count
    assert name_of(process.pid) is None
    process.wait()


def test_only_workers_without_a_raylet_are_leftovers(start: Any) -> None:
    raylet = start()
    gone = start()
    gone.kill()
    gone.wait()
    mine = start(**{DRIVER: "x", "RAY_RAYLET_PID": str(raylet.pid)})
    orphan = start(**{DRIVER: "x", "RAY_RAYLET_PID": str(gone.pid)})
    no_worker = start(**{DRIVER: "x"})
    wait_until(lambda: len(list(marked(DRIVER))) >= 3)
    end_leftovers()
    assert name_of(orphan.pid) is None
    assert name_of(mine.pid) and name_of(no_worker.pid)
